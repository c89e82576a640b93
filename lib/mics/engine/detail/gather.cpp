// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/base/hash.hpp>
#include <mics/engine/detail/engine_state.hpp>
#include <mics/state/arena.hpp>

#include <algorithm>
#include <string>
#include <utility>

// Passes and their order, gathers, and the views of both kinds of slots.

namespace mics::detail {

using comm::Operation;
using comm::Purpose;

// ---- passes and their order

void EngineState::agree_on_order() {
  if (!schedule_.has_unconfirmed()) return;
  if (sharded()) {
    const Operation operation{Purpose::agreement, "order of units", 8};
    operations_.record(operation);
    const std::uint64_t mine = schedule_.unconfirmed_hash();
    std::vector<std::uint64_t> all(static_cast<std::size_t>(groups_.shard().size()));
    groups_.shard().all_gather_small(&mine, all.data(), sizeof(mine), operation);
    if (std::any_of(all.begin(), all.end(), [&](std::uint64_t theirs) { return theirs != mine; })) {
      schedule_.reject();
      warn(
          "the ranks of a shard group opened units in different orders; gathers are not "
          "prefetched");
      return;
    }
  }
  schedule_.confirm();
}

void EngineState::end_pass() {
  if (phase_ == Phase::micro_step) finish_micro_step();
  phase_ = Phase::idle;
  schedule_.end();
  agree_on_order();
  if (schedule_.take_departure() && !reported_departure_) {
    reported_departure_ = true;
    warn("units were opened in another order than before: gathered on demand, order recorded anew");
  }
}

void EngineState::begin_micro_step(const MicroStep& micro_step) {
  require_alive();
  require_training("micro-step");
  if (micro_step.samples < 0) {
    raise<ArgumentError>({.object = "micro-step",
                          .expected = "0 or more samples",
                          .found = std::to_string(micro_step.samples)});
  }
  if (last_announced_) {
    raise<StateError>({.object = "micro-step",
                       .expected = "step() after the micro-step that was announced as the last",
                       .found = "another micro-step"});
  }
  end_pass();
  phase_ = Phase::micro_step;
  last_announced_ = micro_step.last;
  samples_ += micro_step.samples;
  ++micro_steps_;
  schedule_.begin(parallel::Pass::training);
}

void EngineState::begin_evaluation() {
  require_alive();
  if (phase_ == Phase::micro_step) {
    raise<StateError>(
        {.object = "evaluation", .expected = "step() first", .found = "a micro-step that is open"});
  }
  end_pass();
  phase_ = Phase::evaluation;
  schedule_.begin(parallel::Pass::evaluation);
}

void EngineState::declare_order(std::span<const UnitId> order) {
  require_alive();
  if (phase_ != Phase::idle) {
    raise<StateError>({.object = "order of units",
                       .expected = "a declaration between steps",
                       .found = "an open pass"});
  }
  std::vector<int> units;
  for (const UnitId unit : order) {
    check_unit(unit);
    if (at(unit).needs_slot) units.push_back(unit.value);
  }
  schedule_.declare(parallel::Pass::training, std::move(units));
  agree_on_order();
}

// ---- gathers

std::string EngineState::open_leases() const {
  std::string names;
  for (int u = 0; u < model_.units(); ++u) {
    if (units_[static_cast<std::size_t>(u)].open_leases > 0) {
      names += (names.empty() ? "" : ", ") + unit_name(UnitId{u});
    }
  }
  return names;
}

void EngineState::start_fetch(int slot, int unit) {
  GatherSlot& here = gather_slots_[static_cast<std::size_t>(slot)];
  std::byte* data = here.data;
  for (const int b : plan_.flat().buffers_of(UnitId{unit})) {
    const state::FlatBuffer& buffer = flat(b);
    if (!plan_.resident(b) && buffer.flat.count() > 0) {
      const Operation operation{Purpose::gather, buffer.name, buffer_bytes(b)};
      operations_.record(operation);
      here.pending.push_back(groups_.gather().start_gather(
          at(b).compute, data, buffer.flat.shard_count() * bytes_of(buffer.dtype), operation,
          groups_.gather().start_of_gather()));
    }
    data += state::arena_bytes(buffer_bytes(b));
  }
}

void EngineState::finish_fetch(int slot, const Execution& exec) {
  GatherSlot& here = gather_slots_[static_cast<std::size_t>(slot)];
  for (const auto& pending : here.pending) pending->wait(exec);
  // On a device other instances may still come to wait.
  if (!on_device()) here.pending.clear();
}

// Ends what still happens in a slot before another unit comes to lie there.
void EngineState::vacate(int slot) {
  GatherSlot& here = gather_slots_[static_cast<std::size_t>(slot)];
  const Execution& gathers = groups_.gather().start_of_gather();
  finish_fetch(slot, gathers);
  here.pending.clear();
  here.readers.order_before(gathers);
  here.readers.clear();
}

void EngineState::acquire(UnitId unit, const Execution& exec, Keep keep) {
  require_alive();
  check_unit(unit);
  require_reach(exec);
  Unit& here = at(unit);
  exec.wait_for(resident_ready_);
  if (here.needs_slot) {
    const auto acquired = schedule_.acquire(unit.value);
    if (acquired.slot < 0) {
      raise<StateError>(
          {.object = "gather of unit " + unit_name(unit),
           .expected = "a free slot of the " + std::to_string(config_.slots),
           .found = "open leases on " + open_leases(),
           .remedy = "end one, or set \"slots\" to at least " + std::to_string(config_.slots + 1)});
    }
    if (config_.debug || (acquired.fetch && !schedule_.following())) {
      require_same_unit("gather", unit);
    }
    if (acquired.fetch) {
      vacate(acquired.slot);
      start_fetch(acquired.slot, unit.value);
    }
    finish_fetch(acquired.slot, exec);
    GatherSlot& slot = gather_slots_[static_cast<std::size_t>(acquired.slot)];
    slot.keep = keep == Keep::yes;
    for (auto next = schedule_.next_prefetch(); next.unit >= 0; next = schedule_.next_prefetch()) {
      vacate(next.slot);
      start_fetch(next.slot, next.unit);
    }
  }
  ++here.open_leases;
}

void EngineState::share_parameters(UnitId unit, const Execution& exec) {
  require_reach(exec);
  exec.wait_for(resident_ready_);
  if (at(unit).needs_slot) finish_fetch(schedule_.slot_of(unit.value), exec);
}

void EngineState::release(UnitId unit, const std::vector<Execution>& users) noexcept {
  Unit& here = at(unit);
  --here.open_leases;
  // Of a unit in a slot, persistent parameters may have been read too.
  if (!here.needs_slot || !plan_.flat().persistent_buffers().empty()) {
    for (const Execution& user : users) resident_readers_.add(user);
  }
  if (!here.needs_slot) return;
  const int index = schedule_.slot_of(unit.value);
  GatherSlot& slot = gather_slots_[static_cast<std::size_t>(index)];
  for (const Execution& user : users) slot.readers.add(user);
  const bool last = here.open_leases == 0;
  schedule_.release(unit.value, last && slot.keep);
  if (config_.debug && last && schedule_.slot_of(unit.value) < 0) {
    // A view that outlives its lease reads NaN instead of another unit's parameters.
    slot.readers.order_before(exec_);
    std::byte* data = slot.data;
    for (const int b : plan_.flat().buffers_of(unit)) {
      poison(exec_, data, flat(b).dtype, flat(b).flat.count());
      data += state::arena_bytes(buffer_bytes(b));
    }
    slot.readers.add(exec_);
  }
}

void EngineState::gather_resident(bool trainable_only) {
  if (!sharded()) {
    if (on_device()) resident_ready_ = parameters_ready_;
    return;
  }
  const Execution& gathers = groups_.gather().start_of_gather();
  resident_readers_.order_before(gathers);
  std::unique_ptr<comm::PendingCollective> last;
  for (int b = 0; b < plan_.flat().buffer_count(); ++b) {
    const state::FlatBuffer& buffer = flat(b);
    if (!plan_.resident(b) || buffer.flat.count() == 0) continue;
    if (trainable_only && !buffer.trainable) continue;
    const Operation operation{Purpose::gather, buffer.name, buffer_bytes(b)};
    operations_.record(operation);
    last = groups_.gather().start_gather(at(b).compute, at(b).full,
                                         buffer.flat.shard_count() * bytes_of(buffer.dtype),
                                         operation, gathers);
    if (!on_device()) last->wait(gathers);
  }
  if (last == nullptr) return;
  // The last one ends on the instance of the last stage, after all before it.
  last->wait(gathers);
  if (on_device()) resident_ready_ = gathers.mark();
}

// ---- views

RawView EngineState::resolve(UnitId unit, const ViewRequest& request, bool gradient) const {
  const ParameterSpec& spec = model_.spec(request.parameter);
  const std::string object = "view of parameter " + in_quotes(spec.name);
  const auto refuse = [&](const std::string& expected, const std::string& found) {
    raise<ArgumentError>({.object = object, .expected = expected, .found = found});
  };
  if (spec.unit != unit) {
    refuse("a parameter of unit " + unit_name(unit), "one of unit " + unit_name(spec.unit));
  }
  const state::ParameterPlace& place = plan_.flat().place(request.parameter);
  const state::FlatBuffer& buffer = flat(place.buffer);
  const auto type = [](DType dtype, bool complex) {
    return std::string(complex ? "complex " : "") + std::string(name(dtype));
  };
  const DType dtype = gradient ? plan_.gradient_dtype(place.buffer) : buffer.dtype;
  if (request.dtype != dtype || request.complex != spec.options.complex) {
    refuse("element type " + type(dtype, spec.options.complex),
           type(request.dtype, request.complex));
  }
  if (request.rank != static_cast<int>(spec.shape.size())) {
    refuse("rank " + std::to_string(spec.shape.size()), "rank " + std::to_string(request.rank));
  }
  // With fewer than two extents both layouts are the same.
  if (request.rank > 1 && request.layout != spec.options.layout) {
    const auto word = [](MemoryLayout layout) {
      return std::string(layout == MemoryLayout::right ? "LayoutRight" : "LayoutLeft");
    };
    refuse(word(spec.options.layout), word(request.layout));
  }
  require_space(object, request.host, request.space);
  if (gradient && !buffer.trainable) refuse("a trainable parameter", "a frozen one");

  const Buffer& here = buffers_[static_cast<std::size_t>(place.buffer)];
  std::byte* base = gradient ? here.resident_gradient : here.full;
  if (base == nullptr) {
    base = gradient ? gradient_slots_[static_cast<std::size_t>(gradient_slot_of(unit.value))].data
                    : gather_slots_[static_cast<std::size_t>(schedule_.slot_of(unit.value))].data;
    for (const int b : plan_.flat().buffers_of(unit)) {
      if (b == place.buffer) break;
      if (gradient && !flat(b).trainable) continue;
      base += state::arena_bytes(gradient ? gradient_bytes(b) : buffer_bytes(b));
    }
  }
  RawView view;
  view.data = base + place.range.offset * bytes_of(dtype);
  for (std::size_t i = 0; i < spec.shape.size(); ++i) {
    view.extents[i] = static_cast<std::size_t>(spec.shape[i]);
  }
  return view;
}

RawView EngineState::parameter_view(UnitId unit, const ViewRequest& request) const {
  return resolve(unit, request, false);
}

RawView EngineState::gradient_view(UnitId unit, const ViewRequest& request) const {
  return resolve(unit, request, true);
}

}  // namespace mics::detail
