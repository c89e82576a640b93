// SPDX-License-Identifier: Apache-2.0
// Pitfalls of parameters that stay gathered.
#include "pitfall.hpp"
#include <mics/mics.hpp>
#include <support/shared_folder.hpp>

#include <gtest/gtest.h>

#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace mics::test {
namespace {

/// Expects leases to show the biases, which are persistent, and the weights, which are not, changed
/// by the same amount.
void expect_gathered(Engine& engine, const Toy& toy, double change, const std::string& when) {
  engine.begin_evaluation();
  for (std::size_t u = 0; u < toy.units.size(); ++u) {
    const Lease lease = engine.gather(toy.units[u]);
    for (const ParameterId id : {toy.weight[u], toy.bias[u]}) {
      EXPECT_EQ(count_differences(toy.model, lease, id, engine.config(),
                                  [&](std::int64_t i) { return toy.initial(id, i) + change; }),
                0)
          << toy.model.spec(id).name << " " << when;
    }
  }
}

Config persistent_config(const Layout& layout) {
  Config config = toy_config();
  layout.apply(config);
  config.persistence_threshold = 17;  // the biases
  return config;
}

// Guards the gathers after an update: what stays gathered shows the new values at once, keeps the
// old ones through a skipped step, and is gathered once a step whatever uses it. Seen to fail with
// the gather after the update left out.
TEST(Pitfall, P27PersistentParametersAreRefreshedAfterEveryStep) {
  const Toy toy(3);
  for (const Layout& layout : pitfall_layouts()) {
    SCOPED_TRACE(layout.text());
    Engine engine(MPI_COMM_WORLD, toy.model, persistent_config(layout));
    EXPECT_EQ(engine.plan().flat().persistent_buffers().size(), 1U);
    expect_gathered(engine, toy, 0, "at the start");
    for (int step = 0; step < 3; ++step) {
      EXPECT_FALSE(toy_step(engine, toy, 0.5F).skipped);
      expect_gathered(engine, toy, -0.5 * (step + 1), "after step " + std::to_string(step));
    }

    EXPECT_TRUE(toy_step(engine, toy, job_rank() == 0 ? NAN : 0.5F).skipped);
    expect_gathered(engine, toy, -1.5, "after a skipped step");

    // A step that lacks the unit with a persistent parameter leaves it, but not the others of its
    // buffer.
    engine.begin_micro_step({.samples = 1, .last = true});
    backward_unit(engine, toy, 1, 1);
    (void)engine.step();
    engine.begin_evaluation();
    const Lease lease = engine.gather(toy.units[1]);
    EXPECT_EQ(host_view<const float*>(lease, toy.bias[1])(3),
              static_cast<float>(toy.initial(toy.bias[1], 3) - 2.5));
  }
}

/// SGD of rate 1 that writes nonsense to one rank's shards, once, as bad memory would.
class BadMemory final : public optim::Optimizer {
 public:
  BadMemory(bool bad, std::int64_t step)
      : inner_(optim::make_optimizer({.kind = OptimizerKind::sgd})), bad_(bad), step_(step) {}

  [[nodiscard]] std::string_view name() const override { return inner_->name(); }
  [[nodiscard]] std::vector<optim::StateSpec> states() const override { return {}; }
  [[nodiscard]] std::string describe() const override { return inner_->describe(); }
  void update(const optim::Slice& slice, const optim::StepInfo& info) const override {
    inner_->update(slice, info);
    if (!bad_ || info.step != step_) return;
    for (const auto& part : slice.tensors) write_nonsense({}, slice, part);
  }
  [[nodiscard]] bool runs_on_device() const override { return true; }
  void enqueue_update(const Execution& exec, const optim::Slice& slice,
                      const optim::DeviceStepInfo* info) const override {
    inner_->enqueue_update(exec, slice, info);
    if (!bad_ || fetched(info, 1, exec)[0].step != step_) return;
    for (const auto& part : fetched(slice.tensors.data(), std::ssize(slice.tensors), exec)) {
      write_nonsense(exec, slice, part);
    }
  }

 private:
  static void write_nonsense(const Execution& exec, const optim::Slice& slice,
                             const state::TensorSegment& part) {
    const float nonsense = 1e9F;
    device::copy(exec, static_cast<float*>(slice.master_weights) + part.begin, &nonsense,
                 sizeof(nonsense));
    exec.fence("nonsense is written");
  }

  std::unique_ptr<optim::Optimizer> inner_;
  bool bad_;
  std::int64_t step_;
};

// Guards the gathers after a repair: what a replica was given by the others shows in everything
// that stays gathered, on every rank of its shard group. Seen to fail with only updated steps
// gathered anew, and with the shard group not told of a repair.
TEST(Pitfall, P27PersistentParametersAreRefreshedAfterARepair) {
  const Toy toy(2);
  for (const Layout& layout : pitfall_layouts()) {
    const int replicas = layout.shape.world / layout.shape.p;
    if (replicas == 1) continue;  // nobody to repair from
    SCOPED_TRACE(layout.text());
    Config config = persistent_config(layout);
    config.replica_check_every = 3;
    config.replica_action = ReplicaCheck::repair;
    // One shard of the last replica, in the step in which all are compared and in the one before.
    std::vector<int> nodes;
    for (int r = 0; r < job_size(); ++r) nodes.push_back(r / layout.shape.node_size);
    const auto groups = layout::GroupLayout::make(nodes, layout.shape.p);
    const layout::Place here = groups.place(job_rank());
    const bool bad = here.group == replicas - 1 && here.shard == 0;
    for (const std::int64_t step : {2, 3}) {
      config.custom_optimizer = std::make_shared<BadMemory>(bad, step);
      Engine engine(MPI_COMM_WORLD, toy.model, config);
      for (int i = 0; i < 2; ++i) (void)toy_step(engine, toy, 1);

      // The third step is skipped in the first round: nothing but the repair gathers then.
      const bool skip = step == 2;
      EXPECT_EQ(toy_step(engine, toy, skip ? NAN : 1.0F).skipped, skip);

      expect_gathered(engine, toy, skip ? -2 : -3, "after the repair");
      expect_same_on_all_ranks(state_of(engine), "state");
    }
  }
}

// Guards the gathers after a load: what stays gathered shows the values of the file at once, in the
// engine that saved them and in one that never held them. Seen to fail with the gather after a load
// left out.
TEST(Pitfall, P27PersistentParametersAreRefreshedAfterALoad) {
  const Toy toy(2);
  for (const Layout& layout : pitfall_layouts()) {
    SCOPED_TRACE(layout.text());
    const SharedFolder folder;
    Engine engine(MPI_COMM_WORLD, toy.model, persistent_config(layout));
    for (int step = 0; step < 2; ++step) (void)toy_step(engine, toy, 0.5F);
    engine.save(folder.in("checkpoints"));
    (void)toy_step(engine, toy, 0.5F);
    expect_gathered(engine, toy, -1.5, "before the load");

    (void)engine.load(folder.in("checkpoints"));
    expect_gathered(engine, toy, -1, "after the load");

    Engine other(MPI_COMM_WORLD, toy.model, persistent_config(layout));
    (void)other.load(folder.in("checkpoints"));
    expect_gathered(other, toy, -1, "after the load into another engine");
    EXPECT_FALSE(toy_step(other, toy, 0.5F).skipped);
    expect_gathered(other, toy, -1.5, "a step later");
  }
}

}  // namespace
}  // namespace mics::test
