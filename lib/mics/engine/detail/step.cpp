// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/base/hash.hpp>
#include <mics/engine/detail/engine_state.hpp>
#include <mics/optim/norm.hpp>
#include <mics/state/for_blocks.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

// The step: norm, clip, skip, update.

namespace mics::detail {

using comm::Operation;
using comm::Purpose;

// The ranks of a group have done the same operations in the same order, if their hashes agree.
void EngineState::require_same_history(std::span<const std::uint64_t> all, const char* group,
                                       const comm::Transport& transport) {
  const std::uint64_t mine = all[static_cast<std::size_t>(transport.rank())];
  const auto other =
      std::find_if(all.begin(), all.end(), [=](std::uint64_t theirs) { return theirs != mine; });
  if (other == all.end()) return;
  const layout::GroupLayout& layout = plan_.layout();
  const layout::Place& here = layout.place(world_.rank());
  const auto member = static_cast<int>(other - all.begin());
  const int rank = &transport == &groups_.shard() ? layout.rank_of(here.group, member)
                                                  : layout.rank_of(member, here.shard);
  failures_.fail(format_error(
      {.object = "operations of this step on rank " + std::to_string(world_.rank()),
       .expected = std::string("the same in the same order on every rank of the ") + group,
       .found = "others on rank " + std::to_string(rank),
       .remedy = "make the same calls on all ranks; last operations here: " + operations_.tail(8)},
      std::source_location::current()));
  failures_.poll();
}

// Norm, samples and loss of the shard group, then of the replicas; added in rank order, so that
// every rank has the same bits. Replicas hold the same sums, so their squares count once.
EngineState::Totals EngineState::exchange_totals(std::vector<std::uint8_t>& contributed) {
  struct Message {
    Totals totals;
    std::uint64_t history = 0;
  };
  Message local{.totals = {.loss = loss_, .samples = samples_}};
  for (const int b : plan_.hop2_order()) {
    const double factor = plan_.hop1_factor(b) * plan_.hop2_factor(b);
    local.totals.squares += optim::sum_of_squares(at(b).sum, plan_.sum_dtype(b),
                                                  flat(b).flat.shard_count(), norm_partials_) /
                            (factor * factor);
  }
  Totals group = local.totals;
  if (sharded()) {
    comm::Transport& shard = groups_.shard();
    const Operation operation{Purpose::norm, "gradient norm", sizeof(Message)};
    local.history =
        hash_combine(hash_combine(groups_.gather().fingerprint(), groups_.reduce().fingerprint()),
                     hash_combine(shard.fingerprint(), static_cast<std::uint64_t>(micro_steps_)));
    operations_.record(operation);
    std::vector<Message> all(static_cast<std::size_t>(shard.size()));
    shard.all_gather_small(&local, all.data(), sizeof(Message), operation);
    group = {};
    std::vector<std::uint64_t> histories;
    for (const Message& message : all) {
      group.squares += message.totals.squares;
      group.loss += message.totals.loss;
      group.samples += message.totals.samples;
      histories.push_back(message.history);
    }
    require_same_history(histories, "shard group", shard);
  }

  for (const int b : plan_.hop2_order()) contributed.push_back(at(b).contributed ? 1 : 0);
  if (plan_.layout().replicas() == 1) return group;
  comm::Transport& replica = groups_.replica();
  const std::size_t bytes = sizeof(Message) + contributed.size();
  const Operation operation{Purpose::norm, "samples and loss", static_cast<std::int64_t>(bytes)};
  const Message own{.totals = group, .history = replica.fingerprint()};
  operations_.record(operation);
  std::vector<std::byte> mine(bytes);
  std::memcpy(mine.data(), &own, sizeof(Message));
  std::memcpy(mine.data() + sizeof(Message), contributed.data(), contributed.size());
  std::vector<std::byte> all(bytes * static_cast<std::size_t>(replica.size()));
  replica.all_gather_small(mine.data(), all.data(), static_cast<std::int64_t>(bytes), operation);
  Totals total{.squares = group.squares};
  std::vector<std::uint64_t> histories;
  for (int r = 0; r < replica.size(); ++r) {
    const std::byte* from = all.data() + static_cast<std::size_t>(r) * bytes;
    Message theirs;
    std::memcpy(&theirs, from, sizeof(Message));
    total.loss += theirs.totals.loss;
    total.samples += theirs.totals.samples;
    histories.push_back(theirs.history);
    for (std::size_t i = 0; i < contributed.size(); ++i) {
      contributed[i] |= std::to_integer<std::uint8_t>(from[sizeof(Message) + i]);
    }
  }
  require_same_history(histories, "replica group", replica);
  return total;
}

optim::Rates EngineState::rates(std::int64_t step) const {
  if (learning_rates_.empty()) return rate_schedule_.rates(step);
  const auto last = static_cast<std::int64_t>(learning_rates_.size()) - 1;
  return {.learning_rate = learning_rates_[static_cast<std::size_t>(std::min(step, last))]};
}

std::vector<optim::Slice> EngineState::slices(const std::vector<std::uint8_t>& contributed) {
  std::vector<optim::Slice> result;
  for (std::size_t i = 0; i < contributed.size(); ++i) {
    const int b = plan_.hop2_order()[i];
    Buffer& buffer = at(b);
    const std::span<const state::HyperRun> runs = buffer.runs;
    const std::span<const state::TensorSegment> tensors = buffer.tensors;
    result.push_back({.gradient = buffer.sum,
                      .master_weights = buffer.master_weights,
                      .states = buffer.states,
                      .compute = plan_.master_is_compute(b) ? nullptr : buffer.compute,
                      .gradient_dtype = plan_.sum_dtype(b),
                      .master_dtype = plan_.master_dtype(b),
                      .compute_dtype = flat(b).dtype,
                      .count = contributed[i] != 0 ? flat(b).flat.shard_count() : 0,
                      .runs = on_device() ? buffer.device_runs.rows() : runs,
                      .tensors = on_device() ? buffer.device_tensors.rows() : tensors});
  }
  return result;
}

void EngineState::update(const std::vector<std::uint8_t>& contributed, optim::StepInfo info,
                         double gradient_scale) {
  std::vector<optim::Slice> all = slices(contributed);
  const auto info_of = [&](std::size_t i) {
    const int b = plan_.hop2_order()[i];
    optim::StepInfo own = info;
    own.step = at(b).updates + 1;
    own.gradient_scale = gradient_scale / (plan_.hop1_factor(b) * plan_.hop2_factor(b));
    return own;
  };

  // Norms of whole tensors, of all buffers in one exchange.
  const int per_tensor = optimizer_->norms_per_tensor();
  std::vector<double> norms;
  if (per_tensor > 0) {
    std::vector<std::size_t> offsets;
    std::vector<double> partials;
    for (const int b : plan_.hop2_order()) {
      offsets.push_back(norms.size());
      norms.resize(norms.size() + flat(b).parameters.size() * static_cast<std::size_t>(per_tensor));
    }
    offsets.push_back(norms.size());
    const auto part = [&](std::size_t i) {
      return std::span(norms).subspan(offsets[i], offsets[i + 1] - offsets[i]);
    };
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (all[i].count == 0) continue;
      const std::int64_t needed =
          optimizer_->norm_partials(all[i].count, static_cast<std::int64_t>(all[i].tensors.size()));
      partials.resize(std::max(partials.size(), static_cast<std::size_t>(needed)));
      optimizer_->add_norms(all[i], info_of(i), part(i), partials);
    }
    if (sharded() && !norms.empty()) {
      const auto count = static_cast<std::int64_t>(norms.size());
      const Operation operation{Purpose::norm, "norms of tensors",
                                count * static_cast<std::int64_t>(sizeof(double))};
      operations_.record(operation);
      groups_.shard().all_reduce(
          norms.data(), count, {.source = DType::fp64, .wire = DType::fp64, .result = DType::fp64},
          operation, exec_);
    }
    for (std::size_t i = 0; i < all.size(); ++i) all[i].norms = part(i);
  }
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (all[i].count == 0) continue;
    optimizer_->update(all[i], info_of(i));
    ++at(plan_.hop2_order()[i]).updates;
  }
}

void EngineState::forget_gradients() {
  for (Buffer& buffer : buffers_) buffer.contributed = false;
  samples_ = 0;
  loss_ = 0;
  loss_scale_ = scaler_.scale();
}

namespace {

// A step that was done when step() returned.
class FinishedStep final : public StepOutcome {
 public:
  explicit FinishedStep(StepResult result) : result_(std::move(result)) {}
  [[nodiscard]] bool ready() override { return true; }
  [[nodiscard]] const StepResult& get() override { return result_; }

 private:
  StepResult result_;
};

}  // namespace

std::shared_ptr<StepOutcome> EngineState::step() {
  require_alive();
  require_training("step");
  if (phase_ != Phase::micro_step || !last_announced_) {
    raise<StateError>({.object = "step",
                       .expected = "a micro-step opened with last = true",
                       .found = phase_ == Phase::micro_step ? "one with last = false" : "none"});
  }
  if (const std::string names = open_leases(); !names.empty()) {
    raise<StateError>(
        {.object = "step", .expected = "no open lease", .found = "leases on " + names});
  }
  end_pass();
  advance_hop2(true);
  next_hop2_ = 0;
  last_announced_ = false;
  ++calls_;
  return on_device() ? enqueue_step() : run_step();
}

std::shared_ptr<StepOutcome> EngineState::run_step() {
  std::vector<std::uint8_t> contributed;
  const Totals total = exchange_totals(contributed);
  const optim::Rates now = rates(steps_);
  const double divisor = loss_scale_ * static_cast<double>(total.samples);
  StepResult result;
  result.samples = total.samples;
  result.loss_scale = loss_scale_;
  result.learning_rate = now.learning_rate;
  result.loss = total.loss / static_cast<double>(total.samples);
  result.gradient_norm = std::sqrt(total.squares) / divisor;
  result.overflow = !std::isfinite(total.squares);
  result.skipped = total.samples == 0 || !std::isfinite(result.gradient_norm);
  for (std::size_t i = 0; i < contributed.size(); ++i) {
    const int b = plan_.hop2_order()[i];
    if (contributed[i] == 0 && flat(b).flat.count() > 0) result.untouched.push_back(flat(b).name);
  }

  if (total.samples > 0) {
    try {
      scaler_.update(result.skipped);
    } catch (const Error&) {
      // The same on every rank: the scale cannot fall further. The state is as before the step.
      forget_gradients();
      throw;
    }
  }
  const bool check_due =
      config_.replica_check_every > 0 && calls_ % config_.replica_check_every == 0;
  if (!result.skipped || check_due) {
    resident_readers_.order_before(exec_);
    resident_readers_.clear();
    for (std::size_t slot = 0; slot < gather_slots_.size(); ++slot) {
      vacate(static_cast<int>(slot));
    }
  }
  if (!result.skipped) {
    ++steps_;
    // Exactly 1 while the norm stays below the limit.
    const double clip =
        config_.gradient_clipping > 0
            ? 1 / std::max(1.0, (result.gradient_norm + 1e-6) / config_.gradient_clipping)
            : 1.0;
    update(contributed, {.learning_rate = now.learning_rate, .betas = now.betas}, clip / divisor);
  }
  const bool repaired = check_due && check_replicas();
  if (!result.skipped || repaired) {
    schedule_.invalidate();
    gather_resident(!repaired);
  }
  result.step = steps_;
  forget_gradients();
  return std::make_shared<FinishedStep>(std::move(result));
}

void EngineState::set_learning_rates(std::span<const double> table) {
  if (table.empty()) {
    raise<ConfigError>({.object = "learning rates", .expected = "at least one", .found = "none"});
  }
  for (std::size_t i = 0; i < table.size(); ++i) {
    if (!std::isfinite(table[i]) || table[i] < 0) {
      raise<ConfigError>({.object = "learning rate of step " + std::to_string(i),
                          .expected = "a finite number of 0 or more",
                          .found = std::to_string(table[i])});
    }
  }
  learning_rates_.assign(table.begin(), table.end());
  if (on_device()) {
    rates_end_ = steps_;
    upload_rates();
  }
}

}  // namespace mics::detail
