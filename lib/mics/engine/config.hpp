// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/device.hpp>
#include <mics/base/dtype.hpp>
#include <mics/base/json_reader.hpp>
#include <mics/comm/device_sums.hpp>
#include <mics/engine/batch.hpp>
#include <mics/engine/config_report.hpp>
#include <mics/optim/loss_scaler.hpp>
#include <mics/optim/optimizer.hpp>
#include <mics/optim/optimizer_config.hpp>
#include <mics/optim/schedule.hpp>
#include <mics/plan/plan.hpp>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
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

/// What is done about a replica whose state differs from the others'.
enum class ReplicaCheck : std::uint8_t {
  abort,   ///< the engine fails on all ranks
  repair,  ///< what most replicas hold replaces it, in a draw what the lowest of them holds
};

struct DeckValues;

/// Everything that an Engine can be told. The same on every rank (checked).
struct Config {
  Preset preset = Preset::zero3;
  /// p of preset mics, or `one_node`; the other presets set it themselves.
  int shard_size = 0;
  /// As a shard size: the ranks of a node, or the most that divide the world where nodes differ.
  static constexpr int one_node = INT32_MIN;
  Switch two_stage = Switch::automatic;    ///< gather and reduce inside and between nodes apart
  std::optional<int> ranks_per_node = {};  ///< overrides the discovered nodes
  std::int64_t persistence_threshold = 0;  ///< parameters of at most so many elements stay gathered
  std::int64_t persistence_model_threshold = INT64_MAX;

  /// Weights alone, in their compute dtypes: gathered and loaded, not trained. No memory for
  /// gradients, master weights and optimizer state.
  bool forward_only = false;

  DType compute = DType::fp32;         ///< of parameters that name none
  std::optional<DType> master = {};    ///< fp32 or fp64; default: fp64 for fp64, else fp32
  std::optional<DType> gradient = {};  ///< of the Views that kernels add to; default: compute
  /// Of gradients on the network. Default: hop 1 the gradient's, hop 2 the accumulator's.
  std::optional<DType> wire = {};
  std::optional<DType> accumulate = {};  ///< default: fp64 for fp64, else fp32

  OptimizerConfig optimizer = {};
  /// Instead of `optimizer`: the application's own formula. Of `optimizer`, only the learning rate
  /// is still read.
  std::shared_ptr<const optim::Optimizer> custom_optimizer = {};
  ScheduleConfig schedule = {};
  LossScaleConfig loss_scale = {};
  /// Largest global norm; 0: off. Gradients are scaled by 1 / max(1, (norm + 1e-6) / clipping).
  double gradient_clipping = 0;
  /// Gradients are divided by it before they are summed and multiplied after, if
  /// `prescale_gradients` says so.
  double gradient_predivide_factor = 1;
  bool prescale_gradients = false;

  /// Steps between comparisons of what replicas hold in common; 0: never. One comparison reads the
  /// state once: about the time of an optimizer's step.
  std::int64_t replica_check_every = 1000;
  ReplicaCheck replica_action = ReplicaCheck::abort;

  /// Where the state lives; default: where kernels of the engine's instance compute.
  std::optional<Memory> memory = {};
  Switch nccl = Switch::automatic;  ///< for device memory; off: through pinned memory and MPI
  bool share_device = false;        ///< several ranks may use one device, which NCCL cannot
  comm::DeviceSums device_sums = comm::DeviceSums::wire;

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

  /// Where it was read, before every key in messages: `deck.json: engine.`; empty: not from a file.
  std::string source = {};
  /// What became of every key that was read.
  ConfigReport report = {};

  /// Reads DeepSpeed's keys from JSON with comments; mics' own keys stand under "mics". A value
  /// "auto" stands for the deck's, and where the deck has none for the default.
  /// \param text    a JSON object
  /// \param source  its name in messages: a file, or a file and a section
  /// \throws ConfigError for a syntax error, an unknown key (with a suggestion), a wrong type or
  ///         value, or a key that asks for what this version does not do
  [[nodiscard]] static Config parse(std::string_view text, std::string_view source);
  /// The same from an object that was read already: a section of a larger deck.
  [[nodiscard]] static Config read(JsonReader json);
  [[nodiscard]] static Config read(JsonReader json, const DeckValues& deck);
  /// `read` to the end whatever is refused: `report` lists all of it. If it is not usable, neither
  /// is the configuration. Throws nothing of its own.
  [[nodiscard]] static Config explain(JsonReader json, const DeckValues& deck);

  /// \throws ConfigError for values that can never work: a NaN, no slots, a 16-bit master
  void validate() const;
  /// What `validate` would throw, all of it: the keys, and expected, found and remedy.
  [[nodiscard]] std::vector<KeyNote> problems() const;

  /// The batch of a step on `world_size` ranks from the sizes that are given, as DeepSpeed solves
  /// it: train = micro x accumulation steps x ranks. A global batch that stands without a micro
  /// batch may be any number of at least one sample a micro-step, whatever the ranks.
  /// \throws ConfigError if the three contradict each other, or there is no size of a batch
  [[nodiscard]] Batch solve_batch(int world_size) const;

  /// The shard size that the preset means for ranks on these nodes; it may not fit them.
  /// \param node_of_rank  labels of any kind, as many as ranks
  [[nodiscard]] int shard_size_for(std::span<const int> node_of_rank) const;
  [[nodiscard]] DType master_for(DType compute_dtype) const;
  [[nodiscard]] DType accumulate_for(DType compute_dtype) const;
  /// What a plan needs to know of this configuration.
  [[nodiscard]] PlanRequest plan_request(int world_size) const;
  /// One line a field: what all ranks must agree on.
  [[nodiscard]] std::string describe() const;
};

/// What "auto" stands for: values that a deck holds beside the configuration that is read.
struct DeckValues {
  std::optional<Config> engine = {};  ///< of its `engine` section
  std::optional<std::int64_t> steps = {};
  std::optional<std::int64_t> warmup_steps = {};
};

}  // namespace mics
