// SPDX-License-Identifier: Apache-2.0
#include <mics/engine/detail/engine_state.hpp>
#include <mics/engine/engine.hpp>

#include <exception>
#include <utility>

namespace mics {

Lease::Lease(detail::EngineState& engine, UnitId unit, const Execution& exec)
    : engine_(&engine), unit_(unit), users_{exec}, exceptions_(std::uncaught_exceptions()) {}

Lease::Lease(Lease&& other) noexcept
    : engine_(std::exchange(other.engine_, nullptr)),
      unit_(other.unit_),
      users_(std::move(other.users_)),
      exceptions_(other.exceptions_) {}

Lease::~Lease() {
  if (engine_ == nullptr) return;
  if (std::uncaught_exceptions() > exceptions_) {
    engine_->fail("an exception passed through a lease of unit " + engine_->unit_name(unit_),
                  comm::FailureKind::text_follows);
  }
  end();
}

void Lease::end() {
  if (engine_ == nullptr) return;
  std::exchange(engine_, nullptr)->release(unit_, users_);
}

void Lease::also_on(const Execution& exec) {
  if (engine_ != nullptr) engine_->share_parameters(unit_, exec);
  users_.push_back(exec);
}

detail::RawView Lease::raw(const detail::ViewRequest& request) const {
  if (engine_ == nullptr) {
    raise<StateError>({.object = "lease of unit number " + std::to_string(unit_.value),
                       .expected = "a lease that is open",
                       .found = "one that has ended or was moved from",
                       .remedy = "gather the unit again"});
  }
  return engine_->parameter_view(unit_, request);
}

GradientScope::GradientScope(detail::EngineState& engine, UnitId unit, const Execution& exec)
    : engine_(&engine), unit_(unit), users_{exec} {}

GradientScope::GradientScope(GradientScope&& other) noexcept
    : engine_(std::exchange(other.engine_, nullptr)),
      unit_(other.unit_),
      users_(std::move(other.users_)) {}

GradientScope::~GradientScope() {
  if (engine_ == nullptr) return;
  engine_->fail(
      "gradient scope of unit " + engine_->unit_name(unit_) + " ended without reduce() or defer()",
      std::uncaught_exceptions() > 0 ? comm::FailureKind::text_follows : comm::FailureKind::cause);
}

void GradientScope::also_on(const Execution& exec) {
  if (engine_ != nullptr) engine_->share_gradient(unit_, exec);
  users_.push_back(exec);
}

detail::RawView GradientScope::raw(const detail::ViewRequest& request) const {
  if (engine_ == nullptr) {
    raise<StateError>({.object = "gradient scope of unit number " + std::to_string(unit_.value),
                       .expected = "a scope that is open",
                       .found = "one that was reduced, deferred or moved from"});
  }
  return engine_->gradient_view(unit_, request);
}

void GradientScope::reduce() {
  if (engine_ == nullptr) {
    raise<StateError>({.object = "gradient scope of unit number " + std::to_string(unit_.value),
                       .expected = "one reduce() or defer()",
                       .found = "a second one"});
  }
  std::exchange(engine_, nullptr)->close_gradient(unit_, users_, true);
}

void GradientScope::defer() {
  if (engine_ == nullptr) {
    raise<StateError>({.object = "gradient scope of unit number " + std::to_string(unit_.value),
                       .expected = "one reduce() or defer()",
                       .found = "a second one"});
  }
  std::exchange(engine_, nullptr)->close_gradient(unit_, users_, false);
}

Engine::Engine(MPI_Comm comm, const Model& model, const Config& config, const Execution& exec,
               LogSink log)
    : state_(std::make_unique<detail::EngineState>(comm, model, config, exec, std::move(log))) {}

Engine::Engine(Engine&&) noexcept = default;
Engine::~Engine() = default;

void Engine::begin_micro_step(const MicroStep& micro_step) { state_->begin_micro_step(micro_step); }
void Engine::begin_evaluation() { state_->begin_evaluation(); }

Lease Engine::gather(UnitId unit, Keep keep) { return gather(unit, state_->execution(), keep); }

Lease Engine::gather(UnitId unit, const Execution& exec, Keep keep) {
  state_->acquire(unit, exec, keep);
  return {*state_, unit, exec};
}

GradientScope Engine::gradient(UnitId unit, GradientMode mode) {
  return gradient(unit, state_->execution(), mode);
}

GradientScope Engine::gradient(UnitId unit, const Execution& exec, GradientMode mode) {
  state_->open_gradient(unit, exec, mode);
  return {*state_, unit, exec};
}

StepHandle Engine::step() { return StepHandle(state_->step()); }

double* Engine::loss_in(bool host, std::string_view space) const {
  return state_->loss(host, space);
}
const double* Engine::loss_scale_in(bool host, std::string_view space) const {
  return state_->loss_scale(host, space);
}

void Engine::set_learning_rates(std::span<const double> table) {
  state_->set_learning_rates(table);
}
void Engine::declare_order(std::span<const UnitId> order) { state_->declare_order(order); }
void Engine::sum(std::span<double> values) { state_->sum(values); }
void Engine::read(ParameterId parameter, std::span<double> values, std::string_view array) {
  state_->read(parameter, values, array);
}
void Engine::claim_directory(const std::string& directory) { state_->claim_directory(directory); }
void Engine::save(const std::string& directory, const SaveRequest& request) {
  state_->save(directory, request);
}
checkpoint::SaveProgress Engine::poll_save() { return state_->poll_save(); }
checkpoint::SaveProgress Engine::wait_for_save() { return state_->wait_for_save(); }
std::optional<LoadResult> Engine::load(const std::string& directory, const LoadRequest& request) {
  return state_->load(directory, request);
}
void Engine::quiet(const Execution& exec) { state_->quiet(exec); }
void Engine::fail(std::string_view text) noexcept {
  state_->fail(std::string(text), comm::FailureKind::cause);
}

bool Engine::alive() const { return !state_->failures().failed(); }
int Engine::failed_rank() const { return state_->failures().failed_rank(); }
const Plan& Engine::plan() const { return state_->plan(); }
const Model& Engine::model() const { return state_->model(); }
const Config& Engine::config() const { return state_->config(); }
const comm::OperationLog& Engine::operations() const { return state_->operations(); }
int Engine::rank() const { return state_->world().rank(); }
int Engine::size() const { return state_->world().size(); }
std::int64_t Engine::arena_bytes() const { return state_->arena().bytes(); }

}  // namespace mics
