// SPDX-License-Identifier: Apache-2.0
// A tracer spreads on a periodic line; all ranks but the first train a surrogate of its time step.
#include <mics/mics.hpp>

using Space = Kokkos::DefaultHostExecutionSpace;
using Cells = Kokkos::RangePolicy<Space>;
constexpr int n = 32;

void simulate(const auto& now, const auto& next, int sample) {
  Kokkos::parallel_for(Cells(0, n), [=](int i) { now(i) = std::sin(1.0F * (i + 1) * sample); });
  Kokkos::parallel_for(Cells(0, n), [=](int i) { next(i) = (now(i) + now((i + 1) % n)) / 2; });
  Kokkos::fence();
}

bool learns(MPI_Comm trainers) {
  const Kokkos::ScopeGuard kokkos;
  mics::Model model;
  const auto surrogate = model.unit("surrogate");
  const auto weight = model.parameter(surrogate, "weight", {n, n});
  mics::Engine engine(trainers, model, {.optimizer = {.learning_rate = 0.01}});
  const auto halves = Kokkos::Experimental::partition_space(Space(), 1, 1);
  const Kokkos::View<float*, Space> now("now", n), next("next", n);
  std::vector<double> losses;
  for (int step = 0; step < 300; ++step) {
    simulate(now, next, step * engine.size() + engine.rank() + 1);
    engine.begin_micro_step({.samples = 1});
    auto lease = engine.gather(surrogate, halves[0]);
    auto scope = engine.gradient(surrogate, halves[0]);
    lease.also_on(halves[1]);
    scope.also_on(halves[1]);
    const auto w = lease.view<const float**>(weight);
    const auto dw = scope.view<float**>(weight);
    const auto learn = [=](int i, double& squares) {
      float error = -next(i);
      for (int j = 0; j < n; ++j) error += w(i, j) * now(j);
      for (int j = 0; j < n; ++j) dw(i, j) += 2 * error * now(j);
      squares += error * error;
    };
    double loss[2] = {};
    for (int h = 0; h < 2; ++h)  // each instance predicts half of the line
      Kokkos::parallel_reduce(Cells(halves[h], h * n / 2, (h + 1) * n / 2), learn, loss[h]);
    engine.loss()() += loss[0] + loss[1];
    lease.end();
    scope.reduce();
    losses.push_back(engine.step().get().loss);
  }
  if (engine.rank() == 0) Kokkos::printf("loss %g -> %g\n", losses.front(), losses.back());
  return losses.back() < 0.01 * losses.front();
}

int main(int argc, char** argv) {
  int provided = 0, rank = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_SERIALIZED, &provided);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm trainers = MPI_COMM_NULL;
  MPI_Comm_split(MPI_COMM_WORLD, rank > 0 ? 0 : MPI_UNDEFINED, rank, &trainers);
  const bool well = rank == 0 || learns(trainers);
  MPI_Finalize();
  return well ? 0 : 1;
}
