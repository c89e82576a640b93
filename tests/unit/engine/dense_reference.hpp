// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "small_net.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace mics::test {

/// A dense array of up to two extents, row-major.
struct Dense {
  std::int64_t columns = 1;
  std::vector<double> values;

  [[nodiscard]] double& operator()() { return values[0]; }
  [[nodiscard]] double& operator()(std::int64_t i) { return values[static_cast<std::size_t>(i)]; }
  [[nodiscard]] double& operator()(std::int64_t i, std::int64_t j) {
    return values[static_cast<std::size_t>(i * columns + j)];
  }
};

/// Handle with the shallow constness of a View.
struct DenseView {
  Dense* array;
  double& operator()(auto... index) const { return (*array)(index...); }
};

/// Trains SmallNet on one process with whole arrays in fp64: what every layout must reproduce. Its
/// update, clipping and data layout are its own.
class DenseReference {
 public:
  struct Outcome {
    double loss = 0;  ///< mean over the samples
    double norm = 0;  ///< of the mean gradient, before clipping
    bool clipped = false;
  };

  DenseReference(const SmallNet& net, const Config& config) : net_(net), config_(config) {
    for (int i = 0; i < net.model.parameters(); ++i) {
      const ParameterSpec& spec = net.model.spec({i});
      Dense array{.columns = spec.shape.size() == 2 ? spec.shape[1] : 1, .values = {}};
      array.values.resize(static_cast<std::size_t>(spec.count), 0.0);
      first_moment_.push_back(array);
      second_moment_.push_back(array);
      gradient_.push_back(array);
      for (std::int64_t k = 0; k < spec.count; ++k) {
        array.values[static_cast<std::size_t>(k)] = spec.options.init(config.seed, {i}, k);
      }
      weight_.push_back(std::move(array));
    }
  }

  /// One step over all samples of the global batch.
  Outcome step(const std::vector<std::int64_t>& samples) {
    for (auto& array : gradient_) std::ranges::fill(array.values, 0.0);
    Outcome outcome;
    for (const std::int64_t sample : samples) outcome.loss += add_gradient(sample);
    const auto count = static_cast<double>(samples.size());
    outcome.loss /= count;

    double square = 0;
    for (std::size_t i = 0; i < gradient_.size(); ++i) {
      for (double& g : gradient_[i].values) {
        g /= count;
        square += g * g;
      }
    }
    outcome.norm = std::sqrt(square);
    const double limit = config_.gradient_clipping;
    // PyTorch's and DeepSpeed's clipping, with their 1e-6.
    outcome.clipped = limit > 0 && outcome.norm + 1e-6 > limit;
    const double clip = outcome.clipped ? limit / (outcome.norm + 1e-6) : 1.0;

    ++steps_;
    for (std::size_t i = 0; i < weight_.size(); ++i) {
      const ParameterOptions& options = net_.model.spec({static_cast<int>(i)}).options;
      if (options.trainable) update(i, options, clip);
    }
    return outcome;
  }

  [[nodiscard]] const std::vector<double>& weights(ParameterId parameter) const {
    return weight_[static_cast<std::size_t>(parameter.value)].values;
  }

 private:
  double add_gradient(std::int64_t sample) {
    Activations a;
    Backward b;
    forward_embed(sample, w(net_.e), w(net_.shift), a);
    forward_layer0(w(net_.w0), w(net_.b0), a);
    forward_layer1(w(net_.w1), w(net_.b1), w(net_.p), at(w(net_.gain)), a);
    const double loss = forward_head(sample, w(net_.e), w(net_.c), a);
    backward_head(w(net_.e), g(net_.e), g(net_.c), a, b);
    backward_layer1(w(net_.w1), w(net_.p), at(w(net_.gain)), g(net_.w1), g(net_.b1), a, b);
    add_to(g(net_.gain), b.dgain);
    backward_layer0(w(net_.w0), g(net_.w0), g(net_.b0), a, b);
    backward_embed(sample, g(net_.e), b);
    return loss;
  }

  // Written in the form of the papers (decay of the weight first, corrected moments as values of
  // their own), unlike the library's.
  void update(std::size_t i, const ParameterOptions& options, double clip) {
    const OptimizerConfig& o = config_.optimizer;
    const double rate = o.learning_rate * options.learning_rate_factor;
    const double decay = o.weight_decay * options.weight_decay_factor;
    std::vector<double>& weights = weight_[i].values;
    std::vector<double> direction(weights.size());
    for (std::size_t k = 0; k < weights.size(); ++k) {
      double& m = first_moment_[i].values[k];
      double& v = second_moment_[i].values[k];
      double gradient = gradient_[i].values[k] * clip;
      switch (o.kind) {
        case OptimizerKind::sgd:
          gradient += decay * weights[k];
          if (o.momentum != 0) {
            m = steps_ == 1 ? gradient : o.momentum * m + (1 - o.dampening) * gradient;
            gradient = o.nesterov ? gradient + o.momentum * m : m;
          }
          direction[k] = gradient;
          break;
        case OptimizerKind::adam:
          gradient += decay * weights[k];
          direction[k] = adam_direction(gradient, m, v);
          break;
        case OptimizerKind::adamw:
          direction[k] = adam_direction(gradient, m, v) + decay * weights[k];
          break;
        case OptimizerKind::lion: {
          const double c = o.betas[0] * m + (1 - o.betas[0]) * gradient;
          m = o.betas[1] * m + (1 - o.betas[1]) * gradient;
          direction[k] = static_cast<double>((c > 0) - (c < 0)) + decay * weights[k];
          break;
        }
        case OptimizerKind::adagrad:
          gradient += decay * weights[k];
          v += gradient * gradient;
          direction[k] = gradient / (std::sqrt(v) + o.epsilon);
          break;
        case OptimizerKind::lamb:
          m = o.betas[0] * m + (1 - o.betas[0]) * gradient;
          v = o.betas[1] * v + (1 - o.betas[1]) * gradient * gradient;
          direction[k] = m / (std::sqrt(v) + o.epsilon) + decay * weights[k];
          break;
      }
    }
    double factor = rate;
    if (o.kind == OptimizerKind::lamb) {
      const double w = length(weights);
      const double u = length(direction);
      if (w > 0 && u > 0) factor *= std::clamp(w / u, o.min_coefficient, o.max_coefficient);
      if (o.bias_correction) {
        factor *= std::sqrt(1 - std::pow(o.betas[1], steps_)) / (1 - std::pow(o.betas[0], steps_));
      }
    }
    for (std::size_t k = 0; k < weights.size(); ++k) weights[k] -= factor * direction[k];
  }

  [[nodiscard]] double adam_direction(double gradient, double& m, double& v) const {
    const OptimizerConfig& o = config_.optimizer;
    m = o.betas[0] * m + (1 - o.betas[0]) * gradient;
    v = o.betas[1] * v + (1 - o.betas[1]) * gradient * gradient;
    const double correction1 = o.bias_correction ? 1 - std::pow(o.betas[0], steps_) : 1;
    const double correction2 = o.bias_correction ? 1 - std::pow(o.betas[1], steps_) : 1;
    return m / correction1 / (std::sqrt(v / correction2) + o.epsilon);
  }

  [[nodiscard]] static double length(const std::vector<double>& values) {
    double squares = 0;
    for (const double value : values) squares += value * value;
    return std::sqrt(squares);
  }

  [[nodiscard]] DenseView w(ParameterId id) {
    return {&weight_[static_cast<std::size_t>(id.value)]};
  }
  [[nodiscard]] DenseView g(ParameterId id) {
    return {&gradient_[static_cast<std::size_t>(id.value)]};
  }

  const SmallNet& net_;
  Config config_;
  int steps_ = 0;
  std::vector<Dense> weight_, gradient_, first_moment_, second_moment_;
};

/// ||a - b|| / ||b||.
[[nodiscard]] inline double relative_difference(const std::vector<double>& a,
                                                const std::vector<double>& b) {
  double difference = 0;
  double norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

}  // namespace mics::test
