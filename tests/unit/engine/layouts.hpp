// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "small_net.hpp"
#include <mics/mics.hpp>
#include <support/job.hpp>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace mics::test {

/// W ranks on nodes of `node_size`, shard groups of p.
struct Shape {
  int world = 1;
  int p = 1;
  int node_size = 1;
};

inline constexpr std::array shapes{Shape{1, 1, 1}, Shape{2, 1, 2}, Shape{2, 2, 2}, Shape{4, 1, 2},
                                   Shape{4, 2, 2}, Shape{4, 4, 2}, Shape{5, 1, 5}, Shape{5, 5, 5},
                                   Shape{6, 2, 3}, Shape{6, 3, 3}, Shape{6, 6, 3}, Shape{8, 4, 2},
                                   Shape{8, 8, 4}};

/// A shape with a preset that gives it, and one or two stages.
struct Layout {
  Shape shape;
  Preset preset = Preset::mics;
  Switch two_stage = Switch::off;

  [[nodiscard]] std::string text() const {
    return "W=" + std::to_string(shape.world) + " p=" + std::to_string(shape.p) +
           " ranks a node=" + std::to_string(shape.node_size) +
           " preset=" + std::string(name(preset)) +
           (two_stage == Switch::off ? " one stage" : " two stages");
  }
  void apply(Config& config) const {
    config.preset = preset;
    config.shard_size = preset == Preset::mics ? shape.p : 0;
    config.ranks_per_node = shape.node_size;
    config.two_stage = two_stage;
  }
};

/// Every layout of the whole job: each shape with every preset that means it, and both ways to
/// gather where the nodes allow it.
[[nodiscard]] inline std::vector<Layout> layouts_of_job() {
  std::vector<Layout> layouts;
  for (const Shape& shape : shapes) {
    if (shape.world != job_size()) continue;
    std::vector<Preset> presets{Preset::mics};
    if (shape.p == 1) presets.push_back(Preset::ddp);
    if (shape.p == shape.world) presets.insert(presets.end(), {Preset::zero2, Preset::zero3});
    const bool spans_nodes =
        shape.p > shape.node_size && shape.p % shape.node_size == 0 && shape.node_size > 1;
    for (const Preset preset : presets) {
      layouts.push_back({shape, preset, Switch::off});
      // `automatic` takes two stages where they are possible: zero3 stands for that.
      if (spans_nodes) {
        layouts.push_back(
            {shape, preset, preset == Preset::zero3 ? Switch::automatic : Switch::on});
      }
    }
  }
  return layouts;
}

/// Deals a global batch out to ranks and micro-steps by chance: uneven, some get nothing. The
/// global batch is the same for any division.
struct Batches {
  std::int64_t batch = 11;

  [[nodiscard]] std::vector<std::int64_t> all(int step) const {
    std::vector<std::int64_t> samples;
    for (std::int64_t i = 0; i < batch; ++i) samples.push_back(step * batch + i);
    return samples;
  }
  [[nodiscard]] std::vector<std::int64_t> part(int step, int micro_step, int micro_steps, int rank,
                                               int ranks) const {
    std::vector<std::int64_t> samples;
    for (const std::int64_t sample : all(step)) {
      const auto owner = static_cast<int>(scramble(static_cast<std::uint64_t>(sample) ^ 0x5EEDULL) %
                                          static_cast<std::uint64_t>(micro_steps * ranks));
      if (owner == micro_step * ranks + rank) samples.push_back(sample);
    }
    return samples;
  }
};

}  // namespace mics::test
