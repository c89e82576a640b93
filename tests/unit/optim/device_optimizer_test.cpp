// SPDX-License-Identifier: Apache-2.0
#include "reference.hpp"
#include <mics/base/error.hpp>
#include <mics/base/half.hpp>
#include <mics/optim/optimizer.hpp>
#include <mics/state/for_blocks.hpp>
#include <support/device_array.hpp>

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace mics::optim {
namespace {

using test::DeviceArray;

DeviceStepInfo device_info(const OptimizerConfig& config, const StepInfo& info) {
  const auto betas = info.betas.value_or(config.betas);
  DeviceStepInfo result{.learning_rate = info.learning_rate,
                        .beta1 = betas[0],
                        .beta2 = betas[1],
                        .gradient_scale = info.gradient_scale,
                        .step = info.step,
                        .update = 1};
  if (config.bias_correction) {
    result.correction1 = 1 - std::pow(betas[0], static_cast<double>(info.step));
    result.correction2 = 1 - std::pow(betas[1], static_cast<double>(info.step));
  }
  return result;
}

/// A copy of a shard in device memory.
template <class Master, class Gradient, class Compute>
class DeviceShard {
 public:
  DeviceShard(const Optimizer& optimizer, Shard<Master, Gradient>& shard, std::size_t skipped)
      : optimizer_(optimizer),
        weights(shard.weights, skipped),
        gradients(shard.gradients, skipped),
        compute(std::vector<Compute>(shard.weights.size()), skipped),
        runs_(shard.runs),
        tensors_(shard.tensors),
        norms(shard.norms),
        partials_(std::vector<double>(static_cast<std::size_t>(optimizer.norm_partials(
                                          shard.count(), std::ssize(shard.tensors))),
                                      std::numeric_limits<double>::quiet_NaN())),
        info_(std::vector<DeviceStepInfo>(1)) {
    for (const auto& state : shard.states) {
      states.emplace_back(state, skipped);
      pointers_.push_back(states.back().data());
    }
  }

  [[nodiscard]] Slice slice() const {
    return {.gradient = gradients.data(),
            .master_weights = weights.data(),
            .states = pointers_,
            .compute = compute.data(),
            .gradient_dtype = dtype_of<Gradient>,
            .master_dtype = dtype_of<Master>,
            .compute_dtype = dtype_of<Compute>,
            .count = static_cast<std::int64_t>(weights.size()),
            .runs = {runs_.data(), runs_.size()},
            .tensors = {tensors_.data(), tensors_.size()},
            .norms = {norms.data(), norms.size()}};
  }
  void add_norms(const DeviceStepInfo& info) {
    info_.set({info});
    optimizer_.enqueue_norms(Execution(), slice(), info_.data(), norms.data(), partials_.data());
  }
  void update(const DeviceStepInfo& info) {
    info_.set({info});
    optimizer_.enqueue_update(Execution(), slice(), info_.data());
  }

 private:
  const Optimizer& optimizer_;

 public:
  DeviceArray<Master> weights;
  DeviceArray<Gradient> gradients;
  DeviceArray<Compute> compute;
  std::vector<DeviceArray<Master>> states;

 private:
  std::vector<void*> pointers_;
  DeviceArray<state::HyperRun> runs_;
  DeviceArray<state::TensorSegment> tensors_;

 public:
  DeviceArray<double> norms;

 private:
  DeviceArray<double> partials_;
  DeviceArray<DeviceStepInfo> info_;
};

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

TEST(DeviceOptimizerTest, FollowsPyTorch) {
  for (const Case& c : cases()) {
    const auto optimizer = make_optimizer(c.config);
    SCOPED_TRACE(optimizer->describe());
    Shard<double> host(*optimizer, {start.begin(), start.end()}, {2});
    DeviceShard<double, double, double> shard(*optimizer, host, 0);
    for (std::size_t s = 0; s < steps; ++s) {
      std::vector<double> gradients(n);
      for (std::size_t i = 0; i < n; ++i) gradients[i] = gradient(s, i);
      shard.gradients.set(gradients);
      shard.norms.set(std::vector<double>(shard.norms.size()));
      const DeviceStepInfo info = device_info(c.config, info_of(c.config, s));

      shard.add_norms(info);
      shard.update(info);

      const std::vector<double> weights = shard.weights.get();
      for (std::size_t i = 0; i < n; ++i) {
        EXPECT_NEAR(weights[i], c.expected[s][i], 2e-15 * (std::abs(c.expected[s][i]) + 1))
            << "step " << s << ", element " << i;
      }
    }
  }
}

// Two steps, with the norms that the host has found: the same bits in every array.
template <class Master, class Gradient, class Compute>
void expect_bits_of_the_host(const OptimizerConfig& config, std::size_t count,
                             const std::vector<std::int64_t>& cuts, std::size_t skipped) {
  const auto optimizer = make_optimizer(config);
  SCOPED_TRACE(optimizer->describe() + ", " + std::to_string(count) + " elements, gradient " +
               std::string(name(dtype_of<Gradient>)) + ", master " +
               std::string(name(dtype_of<Master>)) + ", compute " +
               std::string(name(dtype_of<Compute>)));
  std::vector<double> initial(count);
  for (std::size_t i = 0; i < count; ++i) initial[i] = std::sin(static_cast<double>(i));
  Shard<Master, Gradient> host(*optimizer, initial, cuts);
  if (!cuts.empty()) {
    host.runs.clear();
    double factor = 0;
    for (const state::TensorSegment& tensor : host.tensors) {
      host.runs.push_back({tensor.begin, tensor.end, factor, 1 + factor});
      factor += 0.25;
    }
  }
  DeviceShard<Master, Gradient, Compute> shard(*optimizer, host, skipped);
  std::vector<Compute> compute(count);
  for (std::size_t s = 0; s < 2; ++s) {
    for (std::size_t i = 0; i < count; ++i) host.gradients[i] = Gradient(64 * gradient(s, i));
    shard.gradients.set(host.gradients);
    const StepInfo info = info_of(config, s, 1.0 / 64);
    std::fill(host.norms.begin(), host.norms.end(), 0.0);
    host.add_norms(info, host.norms);
    if (optimizer->norms_per_tensor() > 0) {
      shard.norms.set(std::vector<double>(host.norms.size()));
      shard.add_norms(device_info(config, info));
      const std::vector<double> norms = shard.norms.get();
      for (std::size_t i = 0; i < norms.size(); ++i) {
        ASSERT_NEAR(norms[i], host.norms[i], 1e-12 * host.norms[i]) << "sum " << i;
      }
      shard.norms.set(host.norms);
    }

    Slice slice = host.slice();
    slice.compute = compute.data();
    slice.compute_dtype = dtype_of<Compute>;
    optimizer->update(slice, info);
    shard.update(device_info(config, info));

    ASSERT_TRUE(same_bits(shard.weights.get(), host.weights));
    for (std::size_t j = 0; j < host.states.size(); ++j) {
      ASSERT_TRUE(same_bits(shard.states[j].get(), host.states[j])) << "state " << j;
    }
    ASSERT_TRUE(same_bits(shard.compute.get(), compute));
  }
}

template <class Master, class Gradient>
void expect_bits_for_all_copies(const OptimizerConfig& config) {
  const std::vector<std::int64_t> cuts{1, 2, 6, 101};
  expect_bits_of_the_host<Master, Gradient, double>(config, 203, cuts, 0);
  expect_bits_of_the_host<Master, Gradient, float>(config, 203, cuts, 0);
  expect_bits_of_the_host<Master, Gradient, bf16>(config, 203, cuts, 0);
  expect_bits_of_the_host<Master, Gradient, fp16>(config, 203, cuts, 0);
}

TEST(DeviceOptimizerTest, HasTheBitsOfTheHostInEveryDtype) {
  for (Case c : cases()) {
    for (const bool averaged : {false, true}) {
      if (averaged) c.config.ema_decay = 0.875;
      expect_bits_for_all_copies<float, double>(c.config);
      expect_bits_for_all_copies<float, float>(c.config);
      expect_bits_for_all_copies<float, bf16>(c.config);
      expect_bits_for_all_copies<float, fp16>(c.config);
      expect_bits_for_all_copies<double, double>(c.config);
      expect_bits_for_all_copies<double, float>(c.config);
      expect_bits_for_all_copies<double, bf16>(c.config);
      expect_bits_for_all_copies<double, fp16>(c.config);
    }
  }
}

TEST(DeviceOptimizerTest, HasTheBitsOfTheHostAtEveryLengthAndAddress) {
  for (const Case& c : cases()) {
    for (const std::size_t count : {0UL, 1UL, 3UL, 4UL, 5UL, 4095UL, 4097UL, 20'001UL}) {
      for (const std::size_t skipped : {0UL, 1UL, 4UL}) {
        expect_bits_of_the_host<float, bf16, bf16>(c.config, count, {}, skipped);
        if (count < 20'000) continue;
        expect_bits_of_the_host<float, float, fp16>(c.config, count, {7, 4096, 4100, 12'000},
                                                    skipped);
      }
    }
  }
}

TEST(DeviceOptimizerTest, LeavesEverythingWhereTheStepIsSkipped) {
  for (Case c : cases()) {
    c.config.ema_decay = 0.5;
    const auto optimizer = make_optimizer(c.config);
    SCOPED_TRACE(optimizer->describe());
    Shard<float> host(*optimizer, std::vector<double>(100, 1.5), {50});
    host.gradients.assign(100, std::numeric_limits<float>::quiet_NaN());
    DeviceShard<float, float, bf16> shard(*optimizer, host, 0);
    DeviceStepInfo info = device_info(c.config, info_of(c.config, 0));
    info.update = 0;

    shard.add_norms(info);
    shard.update(info);

    EXPECT_TRUE(same_bits(shard.weights.get(), host.weights));
    for (std::size_t j = 0; j < host.states.size(); ++j) {
      EXPECT_TRUE(same_bits(shard.states[j].get(), host.states[j]));
    }
    EXPECT_TRUE(same_bits(shard.compute.get(), std::vector<bf16>(100)));
    EXPECT_TRUE(same_bits(shard.norms.get(), host.norms));
  }
}

TEST(DeviceOptimizerTest, LambLeavesGapsZero) {
  const auto optimizer = make_optimizer({.kind = OptimizerKind::lamb, .weight_decay = 0.1});
  std::vector<double> initial(40, 1.0);
  for (std::size_t i = 10; i < 17; ++i) initial[i] = 0;
  Shard<float> host(*optimizer, initial, {10, 17});
  for (std::size_t i = 0; i < 40; ++i) host.gradients[i] = initial[i] == 0 ? 0.0F : 0.5F;
  host.tensors = {{0, 10, 0}, {17, 40, 1}};  // elements 10 to 16 belong to none
  DeviceShard<float, float, bf16> shard(*optimizer, host, 0);
  const DeviceStepInfo info = device_info({.kind = OptimizerKind::lamb}, {.learning_rate = 0.1});

  shard.add_norms(info);
  shard.update(info);

  const std::vector<float> weights = shard.weights.get();
  for (std::size_t i = 0; i < 40; ++i) {
    if (i >= 10 && i < 17) {
      EXPECT_EQ(weights[i], 0.0F) << i;
    } else {
      EXPECT_LT(weights[i], 1.0F) << i;
    }
  }
}

/// An optimizer of a user who wrote the functions of the host alone.
class HostOnly final : public Optimizer {
 public:
  [[nodiscard]] std::string_view name() const override { return "mine"; }
  [[nodiscard]] std::vector<StateSpec> states() const override { return {}; }
  [[nodiscard]] std::string describe() const override { return "mine"; }
  void update(const Slice& /*slice*/, const StepInfo& /*info*/) const override {}
};

TEST(DeviceOptimizerTest, RefusesOneThatRunsOnTheHostOnly) {
  const HostOnly optimizer;
  EXPECT_FALSE(optimizer.runs_on_device());
  EXPECT_TRUE(make_optimizer({})->runs_on_device());
  try {
    optimizer.enqueue_update(Execution(), {}, nullptr);
    FAIL();
  } catch (const StateError& error) {
    EXPECT_NE(std::string(error.what()).find("optimizer mine: expected one that runs on a device"),
              std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace mics::optim
