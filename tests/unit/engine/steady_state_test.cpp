// SPDX-License-Identifier: Apache-2.0
// A steady-state step on a device allocates nothing and lets the host go on. The MPI transport,
// which stages through the host, is excepted.
#include "kernel_client.hpp"
#include "layouts.hpp"
#include <mics/mics.hpp>
#include <support/cuda_calls.hpp>

#include <Kokkos_Core.hpp>
#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace mics::test {
namespace {

static_assert(device::separate, "this test is of a device");

std::string text_of(const std::map<std::string, std::int64_t>& calls) {
  std::string text;
  for (const auto& [name, count] : calls) text += ' ' + std::to_string(count) + " x " + name;
  return text;
}

struct Case {
  std::string name;
  Config config;
  int micro_steps = 1;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  all.push_back({"fp32, SGD", {}});
  all.back().config.optimizer = {.kind = OptimizerKind::sgd, .learning_rate = 0.125};
  all.push_back({"bf16, AdamW, clipping, three slots", {}});
  all.back().config.compute = DType::bf16;
  all.back().config.gradient_clipping = 1;
  all.back().config.slots = 3;
  all.push_back({"fp16, dynamic loss scale, clipping, two micro-steps, persistent biases", {}, 2});
  all.back().config.compute = DType::fp16;
  all.back().config.loss_scale = {.dynamic = true, .initial = 64, .window = 5};
  all.back().config.gradient_clipping = 1;
  all.back().config.accumulation_steps = 2;
  all.back().config.persistence_threshold = 17;
  all.push_back({"bf16, LAMB, a 16-bit wire for hop 2", {}});
  all.back().config.compute = DType::bf16;
  all.back().config.accumulate = DType::bf16;
  all.back().config.optimizer.kind = OptimizerKind::lamb;
  return all;
}

bool uses_nccl(const Engine& engine) {
  return engine.plan().request().transport == comm::TransportKind::nccl;
}

/// Steps before everything has been used once; the loss scale grows meanwhile.
constexpr int warm_up_steps = 8;
constexpr int counted_steps = 25;

void expect_nothing(const Layout& layout, const Case& of, comm::DeviceSums sums) {
  SCOPED_TRACE(layout.text() + ", " + of.name + ", sums in " +
               (sums == comm::DeviceSums::wire ? "the wire dtype" : "fp32"));
  const KernelClient client;
  Config config = of.config;
  layout.apply(config);
  config.device_sums = sums;
  CudaCalls calls;
  Engine engine(MPI_COMM_WORLD, client.model, config);
  for (int i = 0; i < warm_up_steps; ++i) (void)client.step(engine, of.micro_steps);
  engine.quiet({});
  std::vector<StepHandle> handles;
  static_cast<void>(calls.take());

  for (int i = 0; i < counted_steps; ++i) handles.push_back(client.step(engine, of.micro_steps));

  auto found = calls.take();
  if (!uses_nccl(engine)) {
    // Back-pressure is the one wait: once a step, for the step before the last.
    for (const char* name : {"cudaEventSynchronize_v3020", "cuEventSynchronize"}) {
      EXPECT_LE(found[name], counted_steps);
      found.erase(name);
    }
  }
  EXPECT_TRUE(found.empty()) << "in " << counted_steps << " steps:" << text_of(found);
  for (const StepHandle& handle : handles) EXPECT_FALSE(handle.get().skipped);
}

TEST(SteadyStateTest, AllocatesNothingAndNeverMakesTheHostWait) {
  const auto layouts = layouts_of_job();
  ASSERT_FALSE(layouts.empty()) << "no layout is listed for " << job_size() << " ranks";
  for (const Layout& layout : layouts) {
    for (const Case& of : cases()) {
      const bool first = &layout == &layouts.front();
      expect_nothing(layout, of, comm::DeviceSums::wire);
      if (first) expect_nothing(layout, of, comm::DeviceSums::fp32);
    }
  }
}

/// Runs until the host opens the gate, or for seconds where it never does.
struct Gate {
  Kokkos::View<int, device::PinnedSpace> open;
  KOKKOS_FUNCTION void operator()(int) const {
    const volatile int* const word = &open();
    for (std::int64_t turn = 0; turn < 20'000'000 && *word == 0; ++turn) {
    }
  }
};

// No list of calls can forget a way to wait: the device cannot go on before the host has.
TEST(SteadyStateTest, TwoStepsAreEnqueuedWhileTheDeviceStandsStill) {
  const KernelClient client;
  for (const Layout& layout : layouts_of_job()) {
    SCOPED_TRACE(layout.text());
    const Case of = cases()[2];
    Config config = of.config;
    layout.apply(config);
    Engine engine(MPI_COMM_WORLD, client.model, config);
    const Kokkos::View<int, device::PinnedSpace> open("open");
    const auto launch_gate = [&] {
      Kokkos::parallel_for("gate", Kokkos::RangePolicy<device::Space>(device::Space(), 0, 1),
                           Gate{open});
    };
    open() = 1;
    for (int i = 0; i < warm_up_steps; ++i) {
      launch_gate();
      (void)client.step(engine, of.micro_steps);
    }
    for (int round = 0; round < 3; ++round) {
      engine.quiet({});
      *static_cast<volatile int*>(&open()) = 0;
      launch_gate();

      const StepHandle first = client.step(engine, of.micro_steps);
      const StepHandle second = client.step(engine, of.micro_steps);

      EXPECT_FALSE(first.ready()) << "the host waited for the step, or the gate is none";
      EXPECT_FALSE(second.ready());
      *static_cast<volatile int*>(&open()) = 1;
      EXPECT_FALSE(first.get().skipped);
      EXPECT_FALSE(second.get().skipped);
    }
  }
}

struct Nothing {
  KOKKOS_FUNCTION void operator()(int) const {}
};

// The count itself, so that an empty one says something.
TEST(CudaCallsTest, SeesAllocationsWaitsAndPageableCopiesAndNothingElse) {
  const Execution exec;
  const Kokkos::View<int[64], device::MemorySpace> there("there");
  const Kokkos::View<int[64], device::PinnedSpace> pinned("pinned");
  std::vector<int> pageable(64);
  const auto launch = [] {
    Kokkos::parallel_for("nothing", Kokkos::RangePolicy<device::Space>(device::Space(), 0, 1),
                         Nothing());
  };
  launch();
  Kokkos::fence();
  CudaCalls calls;

  launch();
  device::copy(exec, there.data(), pinned.data(), sizeof(int) * 64);
  const Marker marker = exec.mark();
  (void)marker.done();
  EXPECT_EQ(text_of(calls.take()), "");

  const auto expect_seen = [&](const char* what, const char* part) {
    const std::string text = text_of(calls.take());
    EXPECT_NE(text.find(part), std::string::npos) << what << ":" << text;
  };
  {
    const Kokkos::View<int*, device::MemorySpace> more("more", 1 << 20);
    expect_seen("an allocation", "lloc");  // cudaMalloc or cudaMallocAsync
  }
  expect_seen("its end", "Free");
  device::copy(exec, there.data(), pageable.data(), sizeof(int) * 64);
  expect_seen("a pageable copy", "pageable");
  exec.fence("test");
  expect_seen("a fence", "Synchronize");
  exec.mark().wait("test");
  expect_seen("a wait for an event", "EventSynchronize");
}

}  // namespace
}  // namespace mics::test
