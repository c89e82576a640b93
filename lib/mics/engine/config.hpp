// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/base/json_reader.hpp>
#include <mics/optim/optimizer_config.hpp>
#include <mics/plan/plan.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace mics {

/// Where state lives, as one word.
enum class Preset : std::uint8_t {
  ddp,    ///< p = 1: everything on every rank
  zero2,  ///< p = W, parameters gathered once a step and kept
  zero3,  ///< p = W, parameters gathered when used
  mics,   ///< p = shard_size, parameters gathered when used
};

/// `ddp`, `zero2`, `zero3` or `mics`.
[[nodiscard]] std::string_view name(Preset preset);

/// A choice that the library may make.
enum class Switch : std::uint8_t { automatic, on, off };

/// Everything that an Engine can be told. The same on every rank (checked).
struct Config {
  Preset preset = Preset::zero3;
  int shard_size = 0;                      ///< p of preset mics; the others set it themselves
  Switch two_stage = Switch::automatic;    ///< gather and reduce inside and between nodes apart
  std::optional<int> ranks_per_node = {};  ///< overrides the discovered nodes
  std::int64_t persistence_threshold = 0;  ///< parameters of at most so many elements stay gathered
  std::int64_t persistence_model_threshold = INT64_MAX;

  DType compute = DType::fp32;       ///< of parameters that name none
  std::optional<DType> master = {};  ///< fp32 or fp64; default: fp64 for fp64, else fp32

  OptimizerConfig optimizer = {};
  /// Largest global norm; 0: off. Gradients are scaled by 1 / max(1, (norm + 1e-6) / clipping).
  double gradient_clipping = 0;

  std::uint64_t seed = 42;
  int slots = 2;                     ///< units that can be gathered, and reduced, at a time
  std::optional<int> prefetch = {};  ///< gathers started ahead; default slots - 1
  std::optional<std::int64_t> memory_budget = {};  ///< bytes a rank that the plan may not exceed
  double timeout = 60;                             ///< seconds that a rank waits for a peer
  bool debug = false;  ///< checks every collective; ended leases read as NaN

  /// What the deck says of the batch: for the application, which makes the micro-steps.
  std::optional<std::int64_t> train_batch_size = {};
  std::optional<std::int64_t> micro_batch_size = {};
  std::optional<std::int64_t> accumulation_steps = {};

  /// Keys of the JSON text that were understood and change nothing here.
  std::vector<std::string> without_effect = {};

  /// Reads DeepSpeed's keys from JSON with comments; mics' own keys stand under "mics".
  /// \param text    a JSON object
  /// \param source  its name in messages: a file, or a file and a section
  /// \throws ConfigError for a syntax error, an unknown key (with a suggestion), a wrong type or
  ///         value, or a key that asks for what this version does not do
  [[nodiscard]] static Config parse(std::string_view text, std::string_view source);
  /// The same from an object that was read already: a section of a larger deck.
  [[nodiscard]] static Config read(JsonReader json);

  /// \throws ConfigError for values that can never work: a NaN, no slots, a 16-bit master
  void validate() const;

  /// The shard size that the preset means for `world_size` ranks; it may not fit them.
  [[nodiscard]] int shard_size_for(int world_size) const;
  [[nodiscard]] DType master_for(DType compute_dtype) const;
  /// What a plan needs to know of this configuration.
  [[nodiscard]] PlanRequest plan_request() const;
  /// One line a field: what all ranks must agree on.
  [[nodiscard]] std::string describe() const;
};

}  // namespace mics
