// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/base/hash.hpp>
#include <mics/engine/detail/engine_state.hpp>

#include <algorithm>
#include <exception>
#include <span>
#include <string>
#include <utility>
#include <vector>

// The step on a device: everything is enqueued, and what depends on the outcome is decided there.
// The host hears of it when it next waits, at the latest two steps later.

namespace mics::detail {

using comm::Operation;
using comm::Purpose;

class EngineState::EnqueuedStep final : public StepOutcome {
 public:
  EnqueuedStep(EngineState& engine, Marker done, int slot)
      : engine_(&engine), done_(std::move(done)), slot_(slot) {}

  [[nodiscard]] bool ready() override {
    if (engine_ != nullptr && done_.done()) engine_->retire_until(*this);
    return engine_ == nullptr;
  }
  [[nodiscard]] const StepResult& get() override {
    if (engine_ != nullptr) engine_->retire_until(*this);
    if (error_ != nullptr) std::rethrow_exception(error_);
    return result_;
  }

  [[nodiscard]] const Marker& done() const { return done_; }
  [[nodiscard]] int slot() const { return slot_; }
  void finish(StepResult result, std::exception_ptr error) {
    engine_ = nullptr;
    result_ = std::move(result);
    error_ = std::move(error);
  }

 private:
  EngineState* engine_;  // null: finished
  Marker done_;
  int slot_;  // of the ring of outcomes
  StepResult result_;
  std::exception_ptr error_;
};

void EngineState::allocate_step() {
  const layout::Place& place = plan_.layout().place(world_.rank());
  std::vector<double> factors;
  double* norms = norm_partials_.data();
  for (const int b : plan_.hop2_order()) {
    factors.push_back(plan_.hop1_factor(b) * plan_.hop2_factor(b));
    at(b).norms = norms;
    norms += std::ssize(flat(b).parameters) * optimizer_->norms_per_tensor();
  }
  norm_partials_of_tensors_ = norms;
  const std::int64_t bytes = plan_.memory().step;
  device_step_ = std::make_unique<optim::DeviceStep>(
      std::span(arena_.take(bytes, "step"), static_cast<std::size_t>(bytes)), exec_,
      optim::DeviceStepSettings{.factors = factors,
                                .shards = plan_.layout().shard_size(),
                                .shard = place.shard,
                                .replicas = plan_.layout().replicas(),
                                .replica = place.group,
                                .loss_scale = config_.loss_scale,
                                .gradient_clipping = config_.gradient_clipping,
                                .betas = config_.optimizer.betas,
                                .bias_correction = config_.optimizer.bias_correction});
  outcomes_ = optim::OutcomeRing(static_cast<int>(factors.size()), outcome_slots);
  upload_rates();
}

// Positions that the coming steps may take, well ahead of them.
void EngineState::upload_rates() {
  constexpr std::int64_t ahead = optim::DeviceStep::rate_capacity / 4;
  const std::int64_t latest = steps_ + std::ssize(in_flight_) + 1;
  if (latest < rates_end_) return;
  std::vector<optim::Rates> window;
  for (std::int64_t i = rates_end_; i < latest + ahead; ++i) window.push_back(rates(i));
  device_step_->set_rates(rates_end_, window);
  rates_end_ = latest + ahead;
}

void EngineState::wait_for(const Marker& marker) {
  if (device_watch_ != nullptr) {
    device_watch_->wait(marker);
  } else {
    marker.wait("mics: a step before the last is done");
  }
}

std::shared_ptr<StepOutcome> EngineState::enqueue_step() {
  // Back-pressure: this step's outcome, and its place in every ring, need those of the last but
  // two to be done.
  retire(2);
  upload_rates();

  // Sums are complete, and nothing reads the shards any more.
  for (const Execution* queue : groups_.queues()) exec_.wait_for(*queue);
  resident_readers_.order_before(exec_);
  resident_readers_.clear();

  const std::vector<int>& order = plan_.hop2_order();
  std::vector<std::uint8_t> contributed;
  for (const int b : order) contributed.push_back(at(b).contributed ? 1 : 0);
  device_step_->begin();
  for (std::size_t i = 0; i < order.size(); ++i) {
    const int b = order[i];
    device_step_->add_squares(static_cast<int>(i), at(b).sum, plan_.sum_dtype(b),
                              flat(b).flat.shard_count());
  }
  std::uint64_t history = 0;
  if (sharded()) {
    history = hash_combine(
        hash_combine(groups_.gather().fingerprint(), groups_.reduce().fingerprint()),
        hash_combine(groups_.shard().fingerprint(), static_cast<std::uint64_t>(micro_steps_)));
  }
  device_step_->publish_group(samples_, history, contributed);
  const auto exchange = [&](comm::Transport& transport, double* values, std::int64_t count,
                            std::string_view object) {
    const Operation operation{Purpose::norm, object,
                              count * static_cast<std::int64_t>(sizeof(double))};
    operations_.record(operation);
    transport.all_reduce(values, count,
                         {.source = DType::fp64, .wire = DType::fp64, .result = DType::fp64},
                         operation, exec_);
    exec_.wait_for(transport.execution());
  };
  if (sharded()) {
    exchange(groups_.shard(), device_step_->group_vector(), device_step_->group_count(),
             "gradient norm");
  }
  device_step_->fold_group(groups_.replica().fingerprint());
  if (plan_.layout().replicas() > 1) {
    exchange(groups_.replica(), device_step_->replica_vector(), device_step_->replica_count(),
             "samples and loss");
  }
  const auto slot = static_cast<int>(calls_ % outcome_slots);
  device_step_->decide(outcomes_, slot);

  const bool check_due =
      config_.replica_check_every > 0 && calls_ % config_.replica_check_every == 0;
  for (std::size_t i = 0; i < gather_slots_.size(); ++i) vacate(static_cast<int>(i));
  enqueue_update(contributed);
  Marker done = exec_.mark();
  parameters_ready_ = done;
  for (const Execution* queue : groups_.queues()) queue->wait_for(parameters_ready_);

  auto outcome = std::make_shared<EnqueuedStep>(*this, std::move(done), slot);
  in_flight_.push_back(outcome);
  if (check_due) retire(0);  // the comparison waits for the device, and names the step
  const bool repaired = check_due && check_replicas();
  schedule_.invalidate();
  gather_resident(!repaired);
  forget_gradients();
  return outcome;
}

void EngineState::enqueue_update(const std::vector<std::uint8_t>& contributed) {
  // Who contributed elsewhere is known on the device only: buffers that nobody contributed to are
  // left alone there.
  std::vector<optim::Slice> all = slices(std::vector<std::uint8_t>(contributed.size(), 1));
  const int per_tensor = optimizer_->norms_per_tensor();
  if (per_tensor > 0) {
    const auto count = norm_partials_of_tensors_ - norm_partials_.data();
    device::clear(exec_, norm_partials_.data(), count * static_cast<std::int64_t>(sizeof(double)));
    for (std::size_t i = 0; i < all.size(); ++i) {
      const int b = plan_.hop2_order()[i];
      if (all[i].count == 0) continue;
      optimizer_->enqueue_norms(exec_, all[i], device_step_->info(static_cast<int>(i)), at(b).norms,
                                norm_partials_of_tensors_);
    }
    if (sharded() && count > 0) {
      const Operation operation{Purpose::norm, "norms of tensors",
                                count * static_cast<std::int64_t>(sizeof(double))};
      operations_.record(operation);
      groups_.shard().all_reduce(
          norm_partials_.data(), count,
          {.source = DType::fp64, .wire = DType::fp64, .result = DType::fp64}, operation, exec_);
      exec_.wait_for(groups_.shard().execution());
    }
    for (std::size_t i = 0; i < all.size(); ++i) {
      const int b = plan_.hop2_order()[i];
      all[i].norms = {at(b).norms,
                      flat(b).parameters.size() * static_cast<std::size_t>(per_tensor)};
    }
  }
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (all[i].count == 0) continue;
    optimizer_->enqueue_update(exec_, all[i], device_step_->info(static_cast<int>(i)));
  }
}

void EngineState::retire(std::size_t most) {
  while (in_flight_.size() > most) retire_first();
}

void EngineState::retire_until(const EnqueuedStep& step) {
  while (!in_flight_.empty()) {
    const bool last = in_flight_.front().get() == &step;
    retire_first();
    if (last) return;
  }
}

void EngineState::retire_first() {
  const std::shared_ptr<EnqueuedStep> step = in_flight_.front();
  wait_for(step->done());
  in_flight_.pop_front();
  const optim::StepOutcome& found = outcomes_.outcome(step->slot());
  StepResult result;
  result.step = found.step;
  result.samples = found.samples;
  result.loss = found.loss;
  result.gradient_norm = found.gradient_norm;
  result.learning_rate = found.learning_rate;
  result.loss_scale = found.loss_scale;
  result.skipped = found.skipped != 0;
  result.overflow = found.overflow != 0;
  const std::vector<int>& order = plan_.hop2_order();
  const std::span<const std::uint8_t> contributed = outcomes_.contributed(step->slot());
  for (std::size_t i = 0; i < order.size(); ++i) {
    if (contributed[i] == 0 && flat(order[i]).flat.count() > 0) {
      result.untouched.push_back(flat(order[i]).name);
    }
  }
  steps_ = found.step;
  std::exception_ptr error;
  if (found.scale_exhausted != 0) {
    error = std::make_exception_ptr(StateError(format_error(
        {.object = "loss scale",
         .expected =
             "finite gradients at its minimum of " + std::to_string(config_.loss_scale.minimum),
         .found = "an overflow in the step after step " + std::to_string(found.step),
         .remedy = "lower min_loss_scale or the learning rate, or train in bf16"},
        std::source_location::current())));
  }
  if (found.betas_out_of_range != 0) {
    error = std::make_exception_ptr(ArgumentError(
        format_error({.object = "betas of the step after step " + std::to_string(found.step),
                      .expected = "numbers of at least 0 and below 1",
                      .found = "others in its rates",
                      .remedy = "a schedule may raise the momentum too far: decay_mom_rate"},
                     std::source_location::current())));
  }
  step->finish(std::move(result), error);
  if (found.desync_shard >= 0 || found.desync_replica >= 0) report_desync(found);
}

// Handles may outlive an engine that failed.
void EngineState::abandon_steps() {
  for (const auto& step : in_flight_) {
    step->finish({}, std::make_exception_ptr(CommError(failures_.text())));
  }
  in_flight_.clear();
}

// The ranks of a group have done the same operations in the same order, if their hashes agree.
void EngineState::report_desync(const optim::StepOutcome& found) {
  const layout::GroupLayout& layout = plan_.layout();
  const layout::Place& here = layout.place(world_.rank());
  const bool in_shard = found.desync_shard >= 0;
  const int rank = in_shard ? layout.rank_of(here.group, found.desync_shard)
                            : layout.rank_of(found.desync_replica, here.shard);
  failures_.fail(format_error(
      {.object = "operations of a step on rank " + std::to_string(world_.rank()),
       .expected = std::string("the same in the same order on every rank of the ") +
                   (in_shard ? "shard group" : "replica group"),
       .found = "others on rank " + std::to_string(rank),
       .remedy = "make the same calls on all ranks; last operations here: " + operations_.tail(8)},
      std::source_location::current()));
  failures_.poll();
}

// For checkpoints: what the device knows of the steps.
void EngineState::read_device_step() {
  if (!on_device()) return;
  const optim::DeviceStepState state = device_step_->state();
  steps_ = state.steps;
  scaler_.restore(state.scaler);
  for (std::size_t i = 0; i < plan_.hop2_order().size(); ++i) {
    at(plan_.hop2_order()[i]).updates = state.updates[i];
  }
}

void EngineState::write_device_step() {
  if (!on_device()) return;
  optim::DeviceStepState state{.steps = steps_, .scaler = scaler_.state(), .updates = {}};
  for (const int b : plan_.hop2_order()) state.updates.push_back(at(b).updates);
  device_step_->restore(state);
  rates_end_ = steps_;
  upload_rates();
}

}  // namespace mics::detail
