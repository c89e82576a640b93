// SPDX-License-Identifier: Apache-2.0
#include <mics/comm/communicator.hpp>
#include <mics/mics.hpp>
#include <mics/state/arena.hpp>

#include <Kokkos_Core.hpp>
#include <bench/commands.hpp>
#include <bench/race.hpp>
#include <bench/results.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

namespace mics::apps::bench {
namespace {

// The floor of both sides is the same: on one machine every byte of the result is read and written
// once by a core, (2p - 1)/p of the buffer for a gather; over a network (p - 1)/p of the buffer
// crosses each rank's link. So mics races MPI itself; the bars are those that the library promises.
constexpr double gather_bar = 0.95;
constexpr std::int64_t gather_bar_from = std::int64_t{1} << 20;
constexpr double reduce_bar = 1.5;
constexpr std::int64_t reduce_bar_at = std::int64_t{16} << 20;
constexpr double reduce_16_bit_bar = 1;  // beside the bare fp32 call of as many elements
// Short gathers are timed several in a row.
constexpr std::int64_t bytes_per_timing = std::int64_t{32} << 20;

/// Arrays of the bare calls, in memory as an engine's: large pages, starts at multiples of 256
/// bytes. Which pages an array lies in can make a third of the time in which it is copied, more
/// than the race is about.
class Arrays {
 public:
  template <class T>
  using Array = Kokkos::View<T*, Kokkos::HostSpace, Kokkos::MemoryTraits<Kokkos::Unmanaged>>;

  /// Room for `arrays` arrays of `count` elements of T.
  template <class T>
  static Arrays of(std::int64_t arrays, std::int64_t count) {
    return Arrays(arrays * state::arena_bytes(count * static_cast<std::int64_t>(sizeof(T))));
  }
  template <class T>
  Array<T> take(std::int64_t count) {
    std::byte* data =
        arena_.take(count * static_cast<std::int64_t>(sizeof(T)), "an array of a bare call");
    return Array<T>(reinterpret_cast<T*>(data), static_cast<std::size_t>(count));
  }

 private:
  explicit Arrays(std::int64_t bytes) : arena_(bytes) {}
  state::Arena arena_;
};

/// The shard group's ranks in an order, for calls of MPI itself.
struct BareGroup {
  std::string name;
  comm::Communicator comm;
};

/// Lane-major, the order of shards, first; node-major where that is another order.
std::vector<BareGroup> bare_groups(const Session& session, const layout::GroupLayout& layout) {
  const auto world = comm::Communicator::duplicate(session.world());
  const layout::Place& here = layout.place(session.rank());
  std::vector<BareGroup> groups;
  groups.push_back({"lane-major", world.split(here.group, here.shard)});
  auto node_major = world.split(here.group, here.node * session.size() + here.lane);
  int order = MPI_IDENT;
  MPI_Comm_compare(groups[0].comm.native(), node_major.native(), &order);
  int differs = order == MPI_CONGRUENT ? 0 : 1;
  MPI_Allreduce(MPI_IN_PLACE, &differs, 1, MPI_INT, MPI_MAX, session.world());
  if (differs != 0) {
    groups.push_back({"node-major", std::move(node_major)});
  } else {
    groups[0].name = "bare";
  }
  return groups;
}

Config collectives_config(const Options& options, DType compute) {
  Config config = engine_config(options);
  config.compute = compute;
  config.optimizer.kind = OptimizerKind::sgd;
  config.optimizer.learning_rate = 0;
  // Two units that take turns in one slot, and nothing started ahead: every gather communicates,
  // and all of it is in its own time.
  config.slots = 1;
  config.prefetch = 0;
  return config;
}

int mpi_count(std::int64_t count) {
  if (count > std::numeric_limits<int>::max()) {
    raise<ArgumentError>({.object = "buffer of a bare MPI call",
                          .expected = "at most 2147483647 elements a rank",
                          .found = std::to_string(count)});
  }
  return static_cast<int>(count);
}

/// Prints one race: runner 0 is mics, the others are the bare calls, of which the fastest counts.
/// \param bar  0 if there is none
void report(Results& results, const std::string& operation, DType dtype, std::int64_t bytes,
            int shard_size, const std::vector<Runner>& runners, const Times& times, double bar) {
  const double mine = median(times[0]);
  std::size_t best = 1;
  for (std::size_t i = 2; i < times.size(); ++i) {
    if (median(times[i]) < median(times[best])) best = i;
  }
  const double bare = median(times[best]);
  const Ratio won = ratio(times[best], times[0]);
  const double moved = static_cast<double>(bytes) * (shard_size - 1) / shard_size;
  const std::string verdict = bar > 0 ? results.judge(won.median >= bar, bar) : "";
  results.line(padded_left(operation, 8) + padded_left(std::string(name(dtype)), 6) +
               padded(bytes_text(bytes), 8) + padded(time_text(mine), 10) +
               padded(time_text(bare), 10) + number_text(won.median, 2, 7) + " (" +
               number_text(won.low, 2) + "-" + number_text(won.high, 2) + ")" +
               number_text(moved / mine * 1e-9, 2, 8) + number_text(moved / bare * 1e-9, 2, 8) +
               "  " + padded_left(runners[best].name, 11) + verdict);
  nlohmann::json record{{"operation", operation},
                        {"dtype", name(dtype)},
                        {"bytes", bytes},
                        {"shard_size", shard_size},
                        {"mics_seconds", mine},
                        {"bare_seconds", bare},
                        {"bare_order", runners[best].name},
                        {"ratio", won.median},
                        {"ratio_first_quartile", won.low},
                        {"ratio_third_quartile", won.high},
                        {"pairs", times[0].size()}};
  if (bar > 0) record["bar"] = bar;
  results.record(std::move(record));
}

/// Timed: `gather` with its checks, the view, the end of the lease; beside it MPI_Allgather from
/// two buffers in turn into the very memory into which mics gathers.
template <class T>
void race_gather(const Session& session, const Options& options, std::int64_t bytes,
                 Results& results) {
  const std::int64_t count =
      std::max<std::int64_t>(1, bytes / static_cast<std::int64_t>(sizeof(T)));
  Model model;
  std::array<UnitId, 2> units;
  std::array<ParameterId, 2> weights;
  for (std::size_t i = 0; i < 2; ++i) {
    units[i] = model.unit("unit" + std::to_string(i));
    weights[i] = model.parameter(units[i], "weight", {count},
                                 {.init = Init::uniform(-1, 1), .trainable = false});
  }
  Engine engine(session.world(), model, collectives_config(options, dtype_of<T>));
  const Plan& plan = engine.plan();
  const int shard_size = plan.layout().shard_size();
  if (shard_size == 1) return;  // nothing is gathered
  const int buffer = plan.flat().buffers_of(units[0]).front();
  if (plan.resident(buffer)) {
    raise<ArgumentError>({.object = "preset " + plan.request().preset,
                          .expected = "one that gathers units when they are used",
                          .found = "one that keeps them gathered",
                          .remedy = "choose zero3 or mics"});
  }
  const layout::FlatLayout& flat = plan.flat().buffer(buffer).flat;
  const layout::Interval shard = flat.shard(plan.layout().place(session.rank()).shard);
  const int shard_bytes = mpi_count(shard.length * static_cast<std::int64_t>(sizeof(T)));

  Arrays arrays = Arrays::of<T>(2, shard.length);
  const std::array sends{arrays.take<T>(shard.length), arrays.take<T>(shard.length)};
  // The engine's one slot. Between leases its bytes are of no use to the engine here: the next
  // gather is always of the other unit.
  T* slot = nullptr;
  engine.begin_evaluation();
  for (std::size_t i = 0; i < 2; ++i) {
    const Lease lease = engine.gather(units[i]);
    const T* values = lease.view<const T*>(weights[i]).data();
    slot = const_cast<T*>(values);
    const std::int64_t used = std::clamp<std::int64_t>(count - shard.offset, 0, shard.length);
    std::copy_n(values + std::min(shard.offset, count), used, sends[i].data());
  }

  const int calls = 2 * static_cast<int>(std::max<std::int64_t>(1, bytes_per_timing / bytes / 2));
  std::vector<Runner> runners{{.name = "mics",
                               .run =
                                   [&] {
                                     for (int call = 0; call < calls; ++call) {
                                       const auto i = static_cast<std::size_t>(call % 2);
                                       const Lease lease = engine.gather(units[i]);
                                       static_cast<void>(lease.view<const T*>(weights[i]));
                                     }
                                   },
                               .calls = calls,
                               .prepare = [&] { engine.begin_evaluation(); }}};
  const std::vector<BareGroup> groups = bare_groups(session, plan.layout());
  const auto gather_bare = [&](const BareGroup& group, std::size_t i, T* received) {
    comm::check(MPI_Allgather(sends[i].data(), shard_bytes, MPI_BYTE, received, shard_bytes,
                              MPI_BYTE, group.comm.native()),
                "MPI_Allgather");
  };
  for (const BareGroup& group : groups) {
    runners.push_back({.name = group.name,
                       .run =
                           [&] {
                             for (int call = 0; call < calls; ++call) {
                               gather_bare(group, static_cast<std::size_t>(call % 2), slot);
                             }
                           },
                       .calls = calls});
  }
  const Times times = race(session.world(), runners, options.pairs);

  std::vector<T> expected(static_cast<std::size_t>(flat.count()));
  engine.begin_evaluation();
  for (std::size_t i = 0; i < 2; ++i) {
    const Lease lease = engine.gather(units[i]);
    gather_bare(groups[0], i, expected.data());
    if (std::memcmp(lease.view<const T*>(weights[i]).data(), expected.data(),
                    static_cast<std::size_t>(count) * sizeof(T)) != 0) {
      raise<StateError>({.object = "gather of " + bytes_text(bytes),
                         .expected = "the bytes of MPI_Allgather",
                         .found = "others"});
    }
  }
  const bool judged = bytes >= gather_bar_from;
  report(results, "gather", dtype_of<T>, bytes, shard_size, runners, times,
         judged ? gather_bar : 0);
}

// Gradients that sum exactly in fp32.
template <class View>
void fill(const View& values, int rank) {
  using Value = typename View::non_const_value_type;
  const Kokkos::RangePolicy<Kokkos::DefaultHostExecutionSpace> all(0, values.extent_int(0));
  Kokkos::parallel_for("mics::bench::fill", all, [=](std::int64_t i) {
    values(i) = static_cast<Value>(static_cast<float>(i % 5 + rank));
  });
  Kokkos::fence("mics::bench: gradients are filled before the time is taken");
}

/// Timed: `reduce()` of a scope that is open and filled, so neither the clearing of the slot (which
/// overwrite avoids) nor the kernel that fills it; beside it MPI_Reduce_scatter_block of a buffer
/// of as many fp32 elements filled just before in the same way: MPI cannot add 16-bit floats.
template <class T>
void race_reduce(const Session& session, const Options& options, std::int64_t bytes,
                 Results& results) {
  const std::int64_t count =
      std::max<std::int64_t>(1, bytes / static_cast<std::int64_t>(sizeof(float)));
  Model model;
  const UnitId unit = model.unit("unit");
  const ParameterId weight = model.parameter(unit, "weight", {count});
  Engine engine(session.world(), model, collectives_config(options, dtype_of<T>));
  const Plan& plan = engine.plan();
  const int shard_size = plan.layout().shard_size();
  const layout::FlatLayout& flat = plan.flat().buffer(plan.flat().buffers_of(unit).front()).flat;
  const int shard_count = mpi_count(flat.shard_count());

  double norm = 0;
  std::optional<GradientScope> scope;
  std::vector<Runner> runners{
      {.name = "mics",
       .run = [&] { scope->reduce(); },
       .prepare =
           [&] {
             engine.begin_micro_step({.samples = 1, .last = false});
             // The order of units is what a pass gathers; with it ranks need not check each call.
             engine.gather(unit).end();
             scope.emplace(engine.gradient(unit, GradientMode::overwrite));
             fill(scope->view<T*>(weight), session.rank());
           },
       // Not in the last micro-step, so that hop 2 and the update stay out of the time.
       .finish =
           [&] {
             scope.reset();
             engine.begin_micro_step({.samples = 0, .last = true});
             norm = engine.step().get().gradient_norm;
           }}};
  const std::vector<BareGroup> groups = bare_groups(session, plan.layout());
  Arrays arrays = Arrays::of<float>(2, flat.count());
  const auto send = arrays.take<float>(flat.count());
  const auto result = arrays.take<float>(flat.shard_count());
  for (const BareGroup& group : groups) {
    runners.push_back({.name = group.name,
                       .run =
                           [&] {
                             comm::check(
                                 MPI_Reduce_scatter_block(send.data(), result.data(), shard_count,
                                                          MPI_FLOAT, MPI_SUM, group.comm.native()),
                                 "MPI_Reduce_scatter_block");
                           },
                       .prepare = [&] { fill(send, session.rank()); }});
  }
  const Times times = race(session.world(), runners, options.pairs);

  // The mean over W ranks of (i % 5 + rank) is i % 5 + (W - 1)/2.
  double squares = 0;
  for (std::int64_t i = 0; i < 5; ++i) {
    const auto times_used = static_cast<double>(count / 5 + (i < count % 5 ? 1 : 0));
    const double mean = static_cast<double>(i) + (session.size() - 1) * 0.5;
    squares += times_used * mean * mean;
  }
  if (std::abs(norm - std::sqrt(squares)) > 1e-12 * std::sqrt(squares)) {
    raise<StateError>({.object = "norm of the gradient of " + bytes_text(bytes),
                       .expected = std::to_string(std::sqrt(squares)),
                       .found = std::to_string(norm)});
  }
  const bool is_fp32 = dtype_of<T> == DType::fp32;
  const bool judged =
      shard_size > 1 && (is_fp32 ? bytes == reduce_bar_at : bytes >= gather_bar_from);
  report(results, "reduce", dtype_of<T>, count * bytes_of(dtype_of<T>), shard_size, runners, times,
         judged ? (is_fp32 ? reduce_bar : reduce_16_bit_bar) : 0);
}

}  // namespace

int run_collectives(const Session& session, const Options& options) {
  share_cores_evenly(session.world());
  Results results(session, "collectives", options.json);
  results.line("mics beside MPI_Allgather and MPI_Reduce_scatter_block, " +
               std::to_string(session.size()) + " rank(s), median of " +
               std::to_string(options.pairs) + " pairs in turn, each the slowest rank's time.");
  results.line(
      "ratio: bare / mics with quartiles, above 1 mics is faster; GB/s: bytes that a rank "
      "gets from others.");
  results.line(
      "                buffer      mics      bare  ratio (quartiles)  mics    bare"
      "  GB/s");
  for (const std::uint64_t size : options.sizes) {
    const auto bytes = static_cast<std::int64_t>(size);
    race_gather<float>(session, options, bytes, results);
    race_gather<bf16>(session, options, bytes, results);
    race_reduce<float>(session, options, bytes, results);
    race_reduce<bf16>(session, options, bytes, results);
  }
  return results.finish(options.check);
}

}  // namespace mics::apps::bench
