// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/base/hash.hpp>
#include <mics/checkpoint/loader.hpp>
#include <mics/checkpoint/reshard.hpp>
#include <mics/checkpoint/saver.hpp>
#include <mics/comm/agreement.hpp>
#include <mics/engine/detail/engine_state.hpp>
#include <mics/layout/interval.hpp>
#include <mics/state/checksum.hpp>
#include <mics/state/device_fill.hpp>
#include <mics/state/for_blocks.hpp>

#include <algorithm>
#include <bit>
#include <type_traits>
#include <utility>

// The engine's state as checkpoints see it.

namespace mics::detail {

using comm::Operation;
using comm::Purpose;

void EngineState::require_idle(const char* call) const {
  if (phase_ == Phase::micro_step || last_announced_ || samples_ != 0) {
    raise<StateError>({.object = call,
                       .expected = "a call between steps",
                       .found = "a step that is not finished",
                       .remedy = "call step() first"});
  }
  if (const std::string names = open_leases(); !names.empty()) {
    raise<StateError>({.object = call, .expected = "no open lease", .found = "leases on " + names});
  }
}

checkpoint::StoredState EngineState::stored_state() const {
  const layout::GroupLayout& layout = plan_.layout();
  const checkpoint::StoredGrid grid{.world_size = layout.world_size(),
                                    .shard_size = layout.shard_size(),
                                    .slices = 1,
                                    .ranks_per_node = layout.world_size() / layout.nodes()};
  checkpoint::StoredState state =
      checkpoint::describe_state(model_, plan_.flat(), grid, [&](int b) {
        std::vector<checkpoint::StoredArray> arrays;
        if (!flat(b).trainable) {
          arrays.push_back({std::string(checkpoint::frozen_weights), flat(b).dtype});
          return arrays;
        }
        arrays.push_back({std::string(checkpoint::master_weights), plan_.master_dtype(b)});
        for (const optim::StateSpec& spec : state_specs_) {
          arrays.push_back({spec.name, plan_.master_dtype(b)});
        }
        return arrays;
      });
  for (std::size_t b = 0; b < buffers_.size(); ++b) state.buffers[b].updates = buffers_[b].updates;
  state.step = steps_;
  const optim::LossScaleState& scaler = scaler_.state();
  state.values.integers = {{"step_calls", calls_},
                           {"loss_scale_iteration", scaler.iteration},
                           {"loss_scale_last_overflow", scaler.last_overflow},
                           {"loss_scale_hysteresis", scaler.hysteresis},
                           {"seed", std::bit_cast<std::int64_t>(config_.seed)}};
  state.values.reals = {{"loss_scale", {scaler.scale}}};
  state.values.texts = {
      {std::string(checkpoint::compute_dtype_text), std::string(name(config_.compute))},
      {"configuration", config_.describe()},
      {"optimizer", optimizer_->describe()}};
  return state;
}

std::vector<EngineState::StoredShard> EngineState::stored_shards(bool weights_only) const {
  const int tau = plan_.layout().place(world_.rank()).shard;
  std::vector<StoredShard> shards;
  for (int b = 0; b < plan_.flat().buffer_count(); ++b) {
    if (flat(b).flat.count() == 0) continue;
    const Buffer& here = buffers_[static_cast<std::size_t>(b)];
    const layout::Interval own = flat(b).flat.shard(tau);
    std::byte* const weights = flat(b).trainable ? here.master_weights : here.compute;
    const DType dtype = flat(b).trainable ? plan_.master_dtype(b) : flat(b).dtype;
    shards.push_back({b, 0, own, weights, bytes_of(dtype)});
    if (weights_only) continue;
    for (std::size_t i = 0; i < here.states.size(); ++i) {
      shards.push_back({b, static_cast<int>(i) + 1, own, static_cast<std::byte*>(here.states[i]),
                        bytes_of(dtype)});
    }
  }
  return shards;
}

std::vector<checkpoint::Source> EngineState::stage(const checkpoint::StoredState& state,
                                                   checkpoint::SourceInfo& info) {
  const std::vector<StoredShard> shards = stored_shards(false);
  const layout::Place& place = plan_.layout().place(world_.rank());
  std::vector<checkpoint::Source> sources;
  std::int64_t bytes = 0;
  const auto room = [](std::int64_t of) { return layout::round_up(of, std::int64_t{64}); };
  for (const StoredShard& shard : shards) {
    const layout::Interval part = checkpoint::written_range(state, place, shard.buffer);
    if (!part.empty()) bytes += room(part.length * shard.width);
  }
  if (bytes > static_cast<std::int64_t>(staged_.size())) {
    staged_ = {};
    staged_ = PinnedBytes(Kokkos::view_alloc("mics::detail::staged", Kokkos::WithoutInitializing),
                          static_cast<std::size_t>(bytes));
  }
  std::byte* to = staged_.data();
  for (const StoredShard& shard : shards) {
    const layout::Interval part = checkpoint::written_range(state, place, shard.buffer);
    if (part.empty()) continue;
    const std::int64_t size = part.length * shard.width;
    device::copy(exec_, to, shard.data + (part.offset - shard.range.offset) * shard.width, size);
    sources.push_back({shard.buffer, shard.array, part, to});
    to += room(size);
  }
  info.lasting = true;
  if (state.grid.replicas() > 1) {
    std::uint64_t hash = 0;
    for (const StoredShard& shard : shards) {
      hash = hash_combine(
          hash, state::combine_checksums(state::block_checksums(exec_, shard.data, shard.bytes())));
    }
    info.replicated = hash;
  }
  exec_.fence("mics::Engine::save: what this rank writes is on the host");
  return sources;
}

checkpoint::Saver& EngineState::saver_of(const std::string& directory,
                                         const checkpoint::Retention& retention) {
  if (saver_ == nullptr || save_directory_ != directory) {
    if (saver_ != nullptr) saver_->wait();
    saver_.reset();
    saver_ = std::make_unique<checkpoint::Saver>(
        all_, directory, checkpoint::SaveOptions{.retention = retention}, log_);
    save_directory_ = directory;
  }
  return *saver_;
}

void EngineState::claim_directory(const std::string& directory) {
  require_alive();
  require_training("save");
  require_idle("claim_directory");
  quiet(exec_);
  operations_.record({Purpose::agreement, "a directory for checkpoints", 0});
  comm::require_same(all_, directory, "directory to save to");
  static_cast<void>(saver_of(directory, {}));
}

void EngineState::save(const std::string& directory, const SaveRequest& request) {
  require_alive();
  require_training("save");
  require_idle("save");
  quiet(exec_);
  read_device_step();
  operations_.record({Purpose::agreement, "a checkpoint to save", 0});
  const auto [keep, keep_every] = request.retention;
  comm::require_same(all_,
                     directory + (request.asynchronous ? ", asynchronously" : "") + ", keep " +
                         std::to_string(keep) + ", keep every " + std::to_string(keep_every),
                     "directory to save to");
  checkpoint::Saver& saver = saver_of(directory, request.retention);
  saver.retain(request.retention);
  checkpoint::StoredState state = stored_state();
  state.blobs = request.blobs;
  checkpoint::SourceInfo info;
  std::vector<checkpoint::Source> sources;
  if (!on_device()) {
    for (const StoredShard& shard : stored_shards(false)) {
      sources.push_back({shard.buffer, shard.array, shard.range, shard.data});
    }
  } else if (!saver.under_way()) {  // else it refuses, and what it writes must stay
    comm::agree(all_, "the host's copy of a state", [&] { sources = stage(state, info); });
  }
  const layout::Place& place = plan_.layout().place(world_.rank());
  if (request.asynchronous) {
    saver.start(state, place, sources, info);
  } else {
    saver.save(state, place, sources, info);
  }
}

checkpoint::SaveProgress EngineState::poll_save() {
  require_alive();
  return saver_ == nullptr ? checkpoint::SaveProgress{} : saver_->poll();
}

checkpoint::SaveProgress EngineState::wait_for_save() {
  require_alive();
  return saver_ == nullptr ? checkpoint::SaveProgress{} : saver_->wait();
}

// Compute shards from the masters, as the optimizer's kernels round them.
void EngineState::round_masters() {
  for (int b = 0; b < plan_.flat().buffer_count(); ++b) {
    if (!flat(b).trainable || plan_.master_is_compute(b)) continue;
    const Buffer& here = at(b);
    const std::int64_t count = flat(b).flat.shard_count();
    if (on_device()) {
      state::convert(exec_, here.master_weights, plan_.master_dtype(b), here.compute, flat(b).dtype,
                     count);
      continue;
    }
    visit_arithmetic(plan_.master_dtype(b), [&](auto master_tag) {
      using Master = typename decltype(master_tag)::type;
      visit(flat(b).dtype, [&](auto compute_tag) {
        using Compute = typename decltype(compute_tag)::type;
        const auto* const from = reinterpret_cast<const Master*>(here.master_weights);
        auto* const to = reinterpret_cast<Compute*>(here.compute);
        state::for_blocks("mics::detail::round_masters", count,
                          [=](std::int64_t begin, std::int64_t end) {
                            for (std::int64_t i = begin; i < end; ++i) {
                              to[i] = static_cast<Compute>(from[i]);
                            }
                          });
      });
    });
  }
}

std::optional<LoadResult> EngineState::load(const std::string& directory,
                                            const LoadRequest& request) {
  require_alive();
  require_idle("load");
  quiet(exec_);
  operations_.record({Purpose::agreement, "a checkpoint to load", 0});
  comm::require_same(all_,
                     (request.step ? "step " + std::to_string(*request.step) : "newest step") +
                         (request.weights_only ? ", weights only, of " : " of ") + directory,
                     "checkpoint to load");
  resident_readers_.order_before(exec_);
  exec_.fence("mics::Engine::load: leases' kernels are done");
  resident_readers_.clear();
  for (std::size_t slot = 0; slot < gather_slots_.size(); ++slot) vacate(static_cast<int>(slot));
  const checkpoint::StoredState target = stored_state();
  const bool weights_only = request.weights_only || config_.forward_only;
  const std::vector<StoredShard> shards = stored_shards(weights_only);
  // A device's state comes by way of the host.
  PinnedBytes mirror;
  if (on_device()) {
    comm::agree(all_, "the host's copy of a state", [&] {
      std::int64_t bytes = 0;
      for (const StoredShard& shard : shards) bytes += shard.bytes();
      mirror = PinnedBytes(Kokkos::view_alloc("mics::detail::mirror", Kokkos::WithoutInitializing),
                           static_cast<std::size_t>(bytes));
    });
  }
  std::vector<checkpoint::Target> targets;
  std::byte* on_host = mirror.data();
  for (const StoredShard& shard : shards) {
    targets.push_back({shard.buffer, shard.array, shard.range, on_device() ? on_host : shard.data});
    if (on_device()) on_host += shard.bytes();
  }
  const auto share = [&](void* data, std::int64_t bytes, int root) {
    groups_.replica().broadcast(data, bytes, root,
                                {Purpose::agreement, "a part of a checkpoint", bytes});
  };
  const std::optional<checkpoint::Checkpoint> loaded =
      checkpoint::load(all_, directory, target, plan_.layout().place(world_.rank()), targets, share,
                       request.step, log_);
  if (!loaded) return {};
  if (on_device()) {
    for (std::size_t i = 0; i < shards.size(); ++i) {
      device::copy(exec_, shards[i].data, targets[i].data, shards[i].bytes());
    }
    exec_.fence("mics::Engine::load: the host's copy of the state may go");
  }
  const checkpoint::StoredState& stored = loaded->state();
  if (!weights_only) {
    comm::agree(all_, "the values of a checkpoint", [&] {
      std::vector<std::int64_t> updates(buffers_.size());
      for (std::size_t b = 0; b < buffers_.size(); ++b) {
        updates[b] = loaded->updates_for(target, static_cast<int>(b));
      }
      const auto integer = [&](const char* key) {
        const auto value = stored.values.integers.find(key);
        if (value != stored.values.integers.end()) return value->second;
        raise<FormatError>(
            {.object = "value " + in_quotes(key) + " of step " + std::to_string(stored.step),
             .expected = "an integer",
             .found = "none"});
      };
      const auto scale = stored.values.reals.find("loss_scale");
      if (config_.loss_scale.dynamic && scale != stored.values.reals.end() &&
          scale->second.size() == 1) {
        scaler_.restore({.scale = scale->second[0],
                         .iteration = integer("loss_scale_iteration"),
                         .last_overflow = integer("loss_scale_last_overflow"),
                         .hysteresis = integer("loss_scale_hysteresis")});
      }
      calls_ = integer("step_calls");
      for (std::size_t b = 0; b < buffers_.size(); ++b) buffers_[b].updates = updates[b];
      steps_ = stored.step;
      loss_scale_ = scaler_.scale();
    });
  }
  round_masters();
  if (!request.weights_only) write_device_step();
  if (on_device()) {
    parameters_ready_ = exec_.mark();
    for (const Execution* queue : groups_.queues()) queue->wait_for(parameters_ready_);
  }
  schedule_.invalidate();
  gather_resident(false);
  return LoadResult{.step = stored.step, .digest = loaded->commit().digest, .blobs = stored.blobs};
}

}  // namespace mics::detail
