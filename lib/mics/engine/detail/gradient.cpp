// SPDX-License-Identifier: Apache-2.0
#include <mics/engine/detail/engine_state.hpp>

// Gradient scopes, hop 1 and hop 2.

namespace mics::detail {

using comm::Operation;
using comm::Purpose;

// ---- gradients

int EngineState::gradient_slot_of(int unit) const {
  for (std::size_t i = 0; i < gradient_slots_.size(); ++i) {
    if (gradient_slots_[i].unit == unit) return static_cast<int>(i);
  }
  return -1;
}

// The one whose reduction began first: the last ones may still be under way, and the kernels of the
// next unit would wait for theirs.
int EngineState::free_gradient_slot() const {
  int found = -1;
  for (std::size_t i = 0; i < gradient_slots_.size(); ++i) {
    const GradientSlot& slot = gradient_slots_[i];
    if (slot.unit >= 0) continue;
    if (found >= 0 &&
        slot.reductions >= gradient_slots_[static_cast<std::size_t>(found)].reductions) {
      continue;
    }
    found = static_cast<int>(i);
  }
  return found;
}

void EngineState::open_gradient(UnitId unit, const Execution& exec, GradientMode mode) {
  require_alive();
  check_unit(unit);
  require_reach(exec);
  Unit& here = at(unit);
  const std::string object = "gradient of unit " + unit_name(unit);
  require_training(object);
  if (phase_ != Phase::micro_step) {
    raise<StateError>({.object = object,
                       .expected = "an open micro-step",
                       .found = phase_ == Phase::evaluation ? "an evaluation" : "none",
                       .remedy = "call begin_micro_step first"});
  }
  if (here.reduced) {
    raise<StateError>({.object = object,
                       .expected = "one reduction a micro-step",
                       .found = "a unit that was reduced already",
                       .remedy = "nest the scopes, or end the first with defer()"});
  }
  const bool holds_sums = here.open_scopes > 0 || here.deferred;
  if (holds_sums && mode == GradientMode::overwrite) {
    raise<StateError>({.object = object,
                       .expected = "mode add",
                       .found = "overwrite of a slot that holds another scope's sums"});
  }
  if (here.needs_gradient_slot && !holds_sums) {
    const int index = free_gradient_slot();
    if (index < 0) {
      std::string holders;
      for (const GradientSlot& slot : gradient_slots_) {
        holders += (holders.empty() ? "" : ", ") + unit_name(UnitId{slot.unit});
      }
      raise<StateError>({.object = object,
                         .expected = "a free slot of the " + std::to_string(config_.slots),
                         .found = "open or deferred scopes on " + holders,
                         .remedy = "reduce one, or set \"slots\" to at least " +
                                   std::to_string(config_.slots + 1)});
    }
    GradientSlot& slot = gradient_slots_[static_cast<std::size_t>(index)];
    slot.writers.order_before(exec);
    slot.writers.clear();
    exec.wait_for(slot.free);
    slot.unit = unit.value;
    std::byte* data = slot.data;
    for (const int b : plan_.flat().buffers_of(unit)) {
      const state::FlatBuffer& buffer = flat(b);
      if (!buffer.trainable) continue;
      if (mode == GradientMode::add) {
        clear(exec, data, gradient_bytes(b));
      } else {
        // In debug an element that the caller forgot shows in the norm.
        if (config_.debug) {
          poison(exec, data, plan_.gradient_dtype(b), buffer.flat.count());
        }
        clear_gaps(exec, b, data);
      }
      data += state::arena_bytes(gradient_bytes(b));
    }
    if (on_device()) slot.opened = exec.mark();
  } else if (here.needs_gradient_slot) {
    exec.wait_for(gradient_slots_[static_cast<std::size_t>(gradient_slot_of(unit.value))].opened);
  }
  exec.wait_for(resident_cleared_);
  for (const ParameterId parameter : model_.parameters(unit)) {
    Buffer& buffer = at(plan_.flat().place(parameter).buffer);
    if (buffer.resident_gradient != nullptr) buffer.touched = true;
  }
  ++here.open_scopes;
}

void EngineState::share_gradient(UnitId unit, const Execution& exec) {
  require_reach(exec);
  exec.wait_for(resident_cleared_);
  const int index = gradient_slot_of(unit.value);
  if (index >= 0) exec.wait_for(gradient_slots_[static_cast<std::size_t>(index)].opened);
}

void EngineState::close_gradient(UnitId unit, const std::vector<Execution>& users, bool reduce) {
  require_alive();
  Unit& here = at(unit);
  --here.open_scopes;
  here.deferred = here.deferred || !reduce;
  const bool ends = reduce && here.open_scopes == 0;
  const int index = gradient_slot_of(unit.value);
  if (!plan_.flat().persistent_buffers().empty()) {
    for (const Execution& user : users) resident_writers_.add(user);
  }
  if (index < 0) {
    // Only persistent parameters: they are reduced at the end of the micro-step.
    if (!ends) return;
    here.deferred = false;
    here.reduced = true;
    return;
  }
  GradientSlot& slot = gradient_slots_[static_cast<std::size_t>(index)];
  for (const Execution& user : users) slot.writers.add(user);
  if (!ends) return;

  here.deferred = false;
  if (config_.debug || !schedule_.following()) require_same_unit("reduce", unit);
  const Execution& reductions = groups_.reduce().start_of_reduce();
  slot.writers.order_before(reductions);
  slot.writers.clear();
  const std::byte* data = slot.data;
  for (const int b : plan_.flat().buffers_of(unit)) {
    if (!flat(b).trainable) continue;
    hop1(b, data);
    data += state::arena_bytes(gradient_bytes(b));
  }
  if (on_device()) slot.free = groups_.reduce().gradients_read();
  slot.unit = -1;
  slot.reductions = ++reductions_;
  here.reduced = true;
  if (last_announced_) advance_hop2(false);
}

void EngineState::hop1(int buffer, const void* gradient) {
  const state::FlatBuffer& here = flat(buffer);
  if (here.flat.count() == 0) return;
  Buffer& local = at(buffer);
  const Operation operation{Purpose::hop1, here.name, gradient_bytes(buffer)};
  if (sharded()) operations_.record(operation);
  const comm::Reduction reduction{
      .source = plan_.gradient_dtype(buffer),
      .wire = plan_.hop1_wire(buffer),
      .result = plan_.sum_dtype(buffer),
      .factor = plan_.hop1_factor(buffer),
      .mode = local.contributed ? comm::SumMode::add : comm::SumMode::assign};
  groups_.reduce().reduce(gradient, local.sum, here.flat.shard_count(), reduction,
                          plan_.between_wire(buffer), scratch_, operation,
                          groups_.reduce().start_of_reduce());
  local.contributed = true;
}

void EngineState::hop2(int buffer) {
  const state::FlatBuffer& here = flat(buffer);
  Buffer& local = at(buffer);
  if (here.flat.count() == 0) return;
  const DType dtype = plan_.sum_dtype(buffer);
  const std::int64_t bytes = here.flat.shard_count() * bytes_of(dtype);
  const Execution& reductions = groups_.replica().execution();
  const bool alone = plan_.layout().replicas() == 1;
  if (alone && local.contributed) return;
  if (!reductions.same_as(groups_.reduce().end_of_reduce())) {
    reductions.wait_for(groups_.reduce().reduced());
  }
  // Another replica may have a gradient where this one has none.
  if (!local.contributed) clear(reductions, local.sum, bytes);
  if (alone) return;
  const Operation operation{Purpose::hop2, here.name, bytes};
  operations_.record(operation);
  groups_.replica().all_reduce(local.sum, here.flat.shard_count(),
                               {.source = dtype,
                                .wire = plan_.hop2_wire(buffer),
                                .result = dtype,
                                .factor = plan_.hop2_factor(buffer)},
                               operation, reductions);
}

// Replicas may reach their units in different orders, or not at all, so hop 2 runs in the plan's
// order: as far as this micro-step's hop 1 has come, and the rest in step().
void EngineState::advance_hop2(bool all) {
  const std::vector<int>& order = plan_.hop2_order();
  for (; next_hop2_ < order.size(); ++next_hop2_) {
    const state::FlatBuffer& buffer = flat(order[next_hop2_]);
    const bool ready = !buffer.persistent() && at(UnitId{buffer.unit}).reduced;
    if (!all && !ready) return;
    hop2(order[next_hop2_]);
  }
}

void EngineState::finish_micro_step() {
  for (int u = 0; u < model_.units(); ++u) {
    const Unit& unit = at(UnitId{u});
    if (unit.open_scopes > 0 || unit.deferred) {
      raise<StateError>({.object = "gradient of unit " + unit_name(UnitId{u}),
                         .expected = "reduce() before the micro-step ends",
                         .found = unit.open_scopes > 0 ? "an open scope" : "a deferred one"});
    }
  }
  for (Unit& unit : units_) unit.reduced = false;
  const Execution& reductions = groups_.reduce().start_of_reduce();
  resident_writers_.order_before(reductions);
  resident_writers_.clear();
  for (const int b : plan_.flat().persistent_buffers()) {
    Buffer& buffer = at(b);
    if (!buffer.touched) continue;
    buffer.touched = false;
    hop1(b, buffer.resident_gradient);
    clear(reductions, buffer.resident_gradient, gradient_bytes(b));
    if (on_device()) resident_cleared_ = reductions.mark();
  }
}

}  // namespace mics::detail
