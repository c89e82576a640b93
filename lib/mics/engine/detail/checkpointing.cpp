// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/loader.hpp>
#include <mics/checkpoint/saver.hpp>
#include <mics/comm/agreement.hpp>
#include <mics/engine/detail/engine_state.hpp>
#include <mics/state/for_blocks.hpp>

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
  state.values.texts = {{"configuration", config_.describe()},
                        {"optimizer", optimizer_->describe()}};
  return state;
}

template <class Part>
std::vector<Part> EngineState::stored_arrays(bool weights_only) const {
  const int tau = plan_.layout().place(world_.rank()).shard;
  std::vector<Part> parts;
  for (int b = 0; b < plan_.flat().buffer_count(); ++b) {
    if (flat(b).flat.count() == 0) continue;
    const Buffer& here = buffers_[static_cast<std::size_t>(b)];
    const layout::Interval own = flat(b).flat.shard(tau);
    std::byte* const weights = flat(b).trainable ? here.master_weights : here.compute;
    parts.push_back({b, 0, own, weights});
    if (weights_only) continue;
    for (std::size_t i = 0; i < here.states.size(); ++i) {
      parts.push_back({b, static_cast<int>(i) + 1, own, static_cast<std::byte*>(here.states[i])});
    }
  }
  return parts;
}

void EngineState::save(const std::string& directory, const SaveRequest& request) {
  require_alive();
  require_idle("save");
  quiet(exec_);
  operations_.record({Purpose::agreement, "a checkpoint to save", 0});
  if (saver_ == nullptr || save_directory_ != directory) {
    if (saver_ != nullptr) saver_->wait();
    saver_.reset();
    saver_ = std::make_unique<checkpoint::Saver>(
        all_, directory, checkpoint::SaveOptions{.retention = request.retention}, log_);
    save_directory_ = directory;
  }
  saver_->retain(request.retention);
  checkpoint::StoredState state = stored_state();
  state.blobs = request.blobs;
  const std::vector<checkpoint::Source> sources = stored_arrays<checkpoint::Source>(false);
  const layout::Place& place = plan_.layout().place(world_.rank());
  if (request.asynchronous) {
    saver_->start(state, place, sources);
  } else {
    saver_->save(state, place, sources);
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
    visit_arithmetic(plan_.master_dtype(b), [&](auto master_tag) {
      using Master = typename decltype(master_tag)::type;
      visit(flat(b).dtype, [&](auto compute_tag) {
        using Compute = typename decltype(compute_tag)::type;
        const auto* const from = reinterpret_cast<const Master*>(here.master_weights);
        auto* const to = reinterpret_cast<Compute*>(here.compute);
        state::for_blocks("mics::detail::round_masters", flat(b).flat.shard_count(),
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
  wait_for(resident_readers_, "mics: leases' kernels are done before a load");
  for (std::size_t slot = 0; slot < gather_slots_.size(); ++slot) vacate(static_cast<int>(slot));
  const checkpoint::StoredState target = stored_state();
  const std::vector<checkpoint::Target> targets =
      stored_arrays<checkpoint::Target>(request.weights_only);
  const auto share = [&](void* data, std::int64_t bytes, int root) {
    groups_.replica().broadcast(data, bytes, root,
                                {Purpose::agreement, "a part of a checkpoint", bytes});
  };
  const std::optional<checkpoint::Checkpoint> loaded =
      checkpoint::load(all_, directory, target, plan_.layout().place(world_.rank()), targets, share,
                       request.step, log_);
  if (!loaded) return {};
  const checkpoint::StoredState& stored = loaded->state();
  if (!request.weights_only) {
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
  schedule_.invalidate();
  gather_resident(false);
  return LoadResult{.step = stored.step, .digest = loaded->commit().digest, .blobs = stored.blobs};
}

}  // namespace mics::detail
