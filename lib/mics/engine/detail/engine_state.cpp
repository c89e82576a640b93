// SPDX-License-Identifier: Apache-2.0
#include <mics/base/hash.hpp>
#include <mics/comm/agreement.hpp>
#include <mics/engine/detail/engine_state.hpp>
#include <mics/optim/norm.hpp>
#include <mics/optim/update.hpp>
#include <mics/state/for_blocks.hpp>
#include <mics/state/initialize.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

namespace mics::detail {
namespace {

using comm::Operation;
using comm::Purpose;

// Everything of the constructor that communicates happens in this order on every rank; what can
// differ between ranks is agreed on first, so that all of them throw or none.
comm::Communicator open_world(MPI_Comm parent) {
  int initialized = 0;
  int level = MPI_THREAD_SINGLE;
  if (MPI_Initialized(&initialized) == MPI_SUCCESS && initialized != 0) MPI_Query_thread(&level);
  if (level < MPI_THREAD_SERIALIZED || !Kokkos::is_initialized()) {
    raise<StateError>({.object = "engine",
                       .expected = "MPI_Init_thread with MPI_THREAD_SERIALIZED or more, and "
                                   "Kokkos::initialize, before it",
                       .found = initialized == 0 ? "MPI that is not initialized"
                                : level < MPI_THREAD_SERIALIZED
                                    ? "MPI with less thread support"
                                    : "Kokkos that is not initialized"});
  }
  if (parent == MPI_COMM_NULL) {
    raise<ArgumentError>({.object = "communicator",
                          .expected = "one that holds this rank",
                          .found = "MPI_COMM_NULL",
                          .remedy = "build the engine on member ranks only"});
  }
  return comm::Communicator::duplicate(parent);
}

void check_inputs(const comm::Communicator& world, const Model& model, const Config& config) {
  comm::agree(world, [&] { config.validate(); });
  comm::require_same(world, config.describe(), "configuration");
  comm::require_same(world, model.describe(), "model");
}

layout::GroupLayout make_layout(const std::vector<int>& nodes, const Config& config) {
  return layout::GroupLayout::make(nodes, config.shard_size_for(static_cast<int>(nodes.size())));
}

Plan make_plan(const std::vector<int>& nodes, const Model& model, const Config& config) {
  Plan plan(model, make_layout(nodes, config), config.plan_request());
  if (!config.memory_budget || plan.memory().total() <= *config.memory_budget) return plan;
  std::string remedy = "no shard size fits";
  for (const int p : layout::shard_sizes_that_fit(static_cast<int>(nodes.size()))) {
    PlanRequest request = config.plan_request();
    request.require_two_stage = false;
    const Plan other(model, layout::GroupLayout::make(nodes, p), request);
    if (other.memory().total() > *config.memory_budget) continue;
    remedy = "smallest shard size that fits: " + std::to_string(p);
    break;
  }
  raise<ConfigError>(
      {.object = "memory_budget",
       .expected = "at most " + std::to_string(*config.memory_budget) + " bytes a rank",
       .found = std::to_string(plan.memory().total()) + " in the plan",
       .remedy = remedy});
}

std::chrono::milliseconds to_milliseconds(double seconds) {
  return std::chrono::milliseconds(static_cast<std::int64_t>(seconds * 1000));
}

// Kernels of the library run on the host; the message is for a device instance.
const Execution& require_host(const Execution& exec) {
  if (!exec.reaches_host()) {
    raise<ArgumentError>({.object = "execution-space instance",
                          .expected = "one that reaches host memory",
                          .found = "a device instance",
                          .remedy = "this build of mics keeps its state in host memory"});
  }
  return exec;
}

template <class T>
void fill_nan(void* data, std::int64_t count) {
  const T nan(std::numeric_limits<float>::quiet_NaN());
  T* values = static_cast<T*>(data);
  state::for_blocks("mics::detail::fill_nan", count, [=](std::int64_t begin, std::int64_t end) {
    std::fill(values + begin, values + end, nan);
  });
}

void poison(void* data, DType dtype, std::int64_t count) {
  visit(dtype, [&](auto tag) { fill_nan<typename decltype(tag)::type>(data, count); });
}

std::int64_t buffer_bytes(const state::FlatBuffer& buffer) {
  return buffer.flat.count() * bytes_of(buffer.dtype);
}

}  // namespace

EngineState::EngineState(MPI_Comm comm, const Model& model, const Config& config,
                         const Execution& exec, LogSink log)
    : world_(open_world(comm)),
      failures_((check_inputs(world_, model, config), world_)),
      model_(model),
      config_(config),
      exec_(require_host(exec)),
      log_(std::move(log)),
      nodes_(parallel::nodes_of_ranks(world_, config.ranks_per_node.value_or(0))),
      plan_(make_plan(nodes_, model_, config_)),
      arena_([&] {
        std::optional<state::Arena> arena;
        comm::agree(world_, [&] { arena.emplace(plan_.memory().arena); });
        return *std::move(arena);
      }()),
      groups_(world_, plan_.layout(), nodes_, plan_.two_stage(),
              {&failures_, &operations_, to_milliseconds(config.timeout)}),
      schedule_(model.units(), config.slots, plan_.request().prefetch, !config.debug) {
  learning_rates_ = {config.optimizer.learning_rate};
  allocate();
  comm::agree(world_, [&] { initialize(); });
  gather_resident(false);
}

EngineState::~EngineState() {
  if (failures_.failed()) {
    // A peer may still read from the arena, and freeing communicators needs every rank.
    arena_.leak();
    world_.abandon();
    return;
  }
  for (std::size_t slot = 0; slot < gather_slots_.size(); ++slot) {
    try {
      finish_fetch(static_cast<int>(slot));
    } catch (const Error& error) {
      warn(error.what());
    }
  }
}

void EngineState::warn(std::string_view line) const {
  if (log_) log_(LogLevel::warning, line);
}

std::string EngineState::unit_name(UnitId unit) const { return in_quotes(model_.name(unit)); }

void EngineState::allocate() {
  const state::FlatModel& flat_model = plan_.flat();
  const bool moments = plan_.request().has_moments;
  buffers_.resize(static_cast<std::size_t>(flat_model.buffer_count()));
  for (int b = 0; b < flat_model.buffer_count(); ++b) {
    const state::FlatBuffer& buffer = flat(b);
    Buffer& here = at(b);
    const std::int64_t shard = buffer.flat.shard_count();
    here.compute = arena_.take(shard * bytes_of(buffer.dtype), "compute shard");
    if (plan_.resident(b)) {
      here.full = sharded() ? arena_.take(buffer_bytes(buffer), "resident buffer") : here.compute;
    }
    if (!buffer.trainable) continue;
    const std::int64_t master_bytes = shard * bytes_of(plan_.master_dtype(b));
    here.master_weights =
        plan_.master_is_compute(b) ? here.compute : arena_.take(master_bytes, "master_weights");
    if (moments) {
      here.exp_avg = arena_.take(master_bytes, "exp_avg");
      here.exp_avg_sq = arena_.take(master_bytes, "exp_avg_sq");
    }
    here.sum = arena_.take(shard * bytes_of(plan_.sum_dtype(b)), "accumulator");
    if (plan_.has_resident_gradient(b)) {
      here.resident_gradient = arena_.take(buffer_bytes(buffer), "resident gradient");
    }
    here.runs =
        hyper_runs(model_, buffer, buffer.flat.shard(plan_.layout().place(world_.rank()).shard));
  }

  gather_slots_.resize(static_cast<std::size_t>(config_.slots));
  gradient_slots_.resize(static_cast<std::size_t>(config_.slots));
  for (GatherSlot& slot : gather_slots_) {
    slot.data = arena_.take(plan_.gather_slot_bytes(), "gather slot");
  }
  for (GradientSlot& slot : gradient_slots_) {
    slot.data = arena_.take(plan_.gradient_slot_bytes(), "gradient slot");
  }
  // The rest is the scratch: of the two-stage reduction first, then the norm's partial sums.
  std::int64_t partials = 0;
  for (int b = 0; b < flat_model.buffer_count(); ++b) {
    if (flat(b).trainable) {
      partials = std::max(partials, state::blocks_of(flat(b).flat.shard_count()));
    }
  }
  const std::int64_t partial_bytes =
      state::arena_bytes(partials * static_cast<std::int64_t>(sizeof(double)));
  scratch_ = arena_.take(plan_.scratch_bytes() - partial_bytes, "scratch");
  norm_partials_ = {reinterpret_cast<double*>(arena_.take(partial_bytes, "norm partials")),
                    static_cast<std::size_t>(partials)};

  units_.resize(static_cast<std::size_t>(model_.units()));
  for (int u = 0; u < model_.units(); ++u) {
    for (const int b : flat_model.buffers_of(UnitId{u})) {
      Unit& unit = at(UnitId{u});
      if (!plan_.resident(b)) unit.needs_slot = true;
      if (flat(b).trainable) unit.needs_gradient_slot = true;
    }
  }
}

void EngineState::initialize() {
  const int tau = plan_.layout().place(world_.rank()).shard;
  for (int b = 0; b < plan_.flat().buffer_count(); ++b) {
    const state::FlatBuffer& buffer = flat(b);
    Buffer& here = at(b);
    const bool separate = buffer.trainable && !plan_.master_is_compute(b);
    state::initialize(model_, buffer, buffer.flat.shard(tau), config_.seed,
                      separate ? here.master_weights : nullptr, plan_.master_dtype(b),
                      here.compute);
  }
}

void EngineState::require_alive() {
  if (failures_.failed()) failures_.poll();
}

void EngineState::check_unit(UnitId unit) const {
  static_cast<void>(model_.name(unit));  // throws
}

void EngineState::wait_for(std::vector<Execution>& users, const char* reason) {
  for (const Execution& user : users) user.fence(reason);
  users.clear();
}

void EngineState::require_same_unit(const char* call, UnitId unit) {
  if (!sharded()) return;
  const Operation operation{Purpose::agreement, model_.name(unit), 8};
  operations_.record(operation);
  const std::uint64_t mine =
      (static_cast<std::uint64_t>(call[0]) << 32) | static_cast<std::uint32_t>(unit.value);
  std::vector<std::uint64_t> all(static_cast<std::size_t>(groups_.shard().size()));
  groups_.shard().all_gather_small(&mine, all.data(), sizeof(mine), operation);
  const auto other =
      std::find_if(all.begin(), all.end(), [&](std::uint64_t theirs) { return theirs != mine; });
  if (other == all.end()) return;
  const layout::GroupLayout& layout = plan_.layout();
  const int rank =
      layout.rank_of(layout.place(world_.rank()).group, static_cast<int>(other - all.begin()));
  const UnitId found{static_cast<int>(*other & 0xffffffffU)};
  const std::string line = format_error(
      {.object = std::string(call) + " of unit " + unit_name(unit) + " on rank " +
                 std::to_string(world_.rank()),
       .expected = "the same call on every rank of the shard group",
       .found = std::string((*other >> 32) == 'g' ? "gather" : "reduce") + " of unit " +
                unit_name(found) + " on rank " + std::to_string(rank),
       .remedy = "open the same units in the same order on all ranks; last operations here: " +
                 operations_.tail(8)},
      std::source_location::current());
  failures_.fail(line);
  failures_.poll();
}

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
      const Operation operation{Purpose::gather, buffer.name, buffer_bytes(buffer)};
      operations_.record(operation);
      here.pending.push_back(groups_.gather().start_gather(
          at(b).compute, data, buffer.flat.shard_count() * bytes_of(buffer.dtype), operation,
          exec_));
    }
    data += state::arena_bytes(buffer_bytes(buffer));
  }
}

void EngineState::finish_fetch(int slot) {
  GatherSlot& here = gather_slots_[static_cast<std::size_t>(slot)];
  for (const auto& pending : here.pending) pending->wait(exec_);
  here.pending.clear();
}

// Ends what still happens in a slot before another unit comes to lie there.
void EngineState::vacate(int slot) {
  finish_fetch(slot);
  wait_for(gather_slots_[static_cast<std::size_t>(slot)].readers,
           "mics: the lease's kernels are done before its slot is reused");
}

void EngineState::acquire(UnitId unit, const Execution& exec, Keep keep) {
  require_alive();
  check_unit(unit);
  require_host(exec);
  Unit& here = at(unit);
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
    finish_fetch(acquired.slot);
    GatherSlot& slot = gather_slots_[static_cast<std::size_t>(acquired.slot)];
    slot.keep = keep == Keep::yes;
    for (auto next = schedule_.next_prefetch(); next.unit >= 0; next = schedule_.next_prefetch()) {
      vacate(next.slot);
      start_fetch(next.slot, next.unit);
    }
  }
  ++here.open_leases;
}

void EngineState::release(UnitId unit, const std::vector<Execution>& users) noexcept {
  Unit& here = at(unit);
  --here.open_leases;
  if (!here.needs_slot) {
    resident_readers_.insert(resident_readers_.end(), users.begin(), users.end());
    // Bounded: what many leases of one step leave behind is mostly the same instance.
    constexpr std::size_t many = 64;
    if (resident_readers_.size() > many) {
      wait_for(resident_readers_, "mics: a step's leases are bounded");
    }
    return;
  }
  const int index = schedule_.slot_of(unit.value);
  GatherSlot& slot = gather_slots_[static_cast<std::size_t>(index)];
  slot.readers.insert(slot.readers.end(), users.begin(), users.end());
  const bool last = here.open_leases == 0;
  schedule_.release(unit.value, last && slot.keep);
  if (config_.debug && last && schedule_.slot_of(unit.value) < 0) {
    // A view that outlives its lease reads NaN instead of another unit's parameters.
    wait_for(slot.readers, "mics: the lease's kernels are done before its slot is poisoned");
    std::byte* data = slot.data;
    for (const int b : plan_.flat().buffers_of(unit)) {
      poison(data, flat(b).dtype, flat(b).flat.count());
      data += state::arena_bytes(buffer_bytes(flat(b)));
    }
  }
}

void EngineState::gather_resident(bool trainable_only) {
  if (!sharded()) return;
  for (int b = 0; b < plan_.flat().buffer_count(); ++b) {
    const state::FlatBuffer& buffer = flat(b);
    if (!plan_.resident(b) || buffer.flat.count() == 0) continue;
    if (trainable_only && !buffer.trainable) continue;
    const Operation operation{Purpose::gather, buffer.name, buffer_bytes(buffer)};
    operations_.record(operation);
    groups_.gather()
        .start_gather(at(b).compute, at(b).full, buffer.flat.shard_count() * bytes_of(buffer.dtype),
                      operation, exec_)
        ->wait(exec_);
  }
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
  if (request.dtype != buffer.dtype) {
    refuse("element type " + std::string(name(buffer.dtype)), std::string(name(request.dtype)));
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
  if (!request.host) refuse("a view of host memory", std::string(request.space));
  if (gradient && !buffer.trainable) refuse("a trainable parameter", "a frozen one");

  const Buffer& here = buffers_[static_cast<std::size_t>(place.buffer)];
  std::byte* base = gradient ? here.resident_gradient : here.full;
  if (base == nullptr) {
    base = gradient ? gradient_slots_[static_cast<std::size_t>(gradient_slot_of(unit.value))].data
                    : gather_slots_[static_cast<std::size_t>(schedule_.slot_of(unit.value))].data;
    for (const int b : plan_.flat().buffers_of(unit)) {
      if (b == place.buffer) break;
      if (gradient && !flat(b).trainable) continue;
      base += state::arena_bytes(buffer_bytes(flat(b)));
    }
  }
  RawView view;
  view.data = base + place.range.offset * bytes_of(buffer.dtype);
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

// ---- gradients

int EngineState::gradient_slot_of(int unit) const {
  for (std::size_t i = 0; i < gradient_slots_.size(); ++i) {
    if (gradient_slots_[i].unit == unit) return static_cast<int>(i);
  }
  return -1;
}

void EngineState::open_gradient(UnitId unit, const Execution& exec, GradientMode mode) {
  require_alive();
  check_unit(unit);
  require_host(exec);
  Unit& here = at(unit);
  const std::string object = "gradient of unit " + unit_name(unit);
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
    const int index = gradient_slot_of(-1);
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
    wait_for(slot.writers, "mics: the slot's gradients are done before it is reused");
    slot.unit = unit.value;
    std::byte* data = slot.data;
    for (const int b : plan_.flat().buffers_of(unit)) {
      const state::FlatBuffer& buffer = flat(b);
      if (!buffer.trainable) continue;
      const std::int64_t element = bytes_of(buffer.dtype);
      if (mode == GradientMode::add) {
        state::clear("mics::GradientScope::clear", data, buffer_bytes(buffer));
      } else {
        // In debug an element that the caller forgot shows in the norm.
        if (config_.debug) poison(data, buffer.dtype, buffer.flat.count());
        for (const layout::Interval& gap : buffer.flat.gaps()) {
          std::memset(data + gap.offset * element, 0,
                      static_cast<std::size_t>(gap.length * element));
        }
      }
      data += state::arena_bytes(buffer_bytes(buffer));
    }
  }
  for (const ParameterId parameter : model_.parameters(unit)) {
    Buffer& buffer = at(plan_.flat().place(parameter).buffer);
    if (buffer.resident_gradient != nullptr) buffer.touched = true;
  }
  ++here.open_scopes;
}

void EngineState::close_gradient(UnitId unit, const std::vector<Execution>& users, bool reduce) {
  require_alive();
  Unit& here = at(unit);
  --here.open_scopes;
  const int index = gradient_slot_of(unit.value);
  if (index < 0) {
    // Only persistent parameters: they are reduced at the end of the micro-step.
    for (const Execution& user : users) user.fence("mics: gradients are written");
    here.reduced = here.reduced || (reduce && here.open_scopes == 0);
    return;
  }
  GradientSlot& slot = gradient_slots_[static_cast<std::size_t>(index)];
  slot.writers.insert(slot.writers.end(), users.begin(), users.end());
  here.deferred = here.deferred || !reduce;
  if (here.open_scopes > 0 || !reduce) return;

  here.deferred = false;
  if (config_.debug || !schedule_.following()) require_same_unit("reduce", unit);
  wait_for(slot.writers, "mics: gradients are written before they are reduced");
  const std::byte* data = slot.data;
  for (const int b : plan_.flat().buffers_of(unit)) {
    if (!flat(b).trainable) continue;
    hop1(b, data);
    data += state::arena_bytes(buffer_bytes(flat(b)));
  }
  slot.unit = -1;
  here.reduced = true;
  if (last_announced_) advance_hop2(false);
}

void EngineState::hop1(int buffer, const void* gradient) {
  const state::FlatBuffer& here = flat(buffer);
  if (here.flat.count() == 0) return;
  Buffer& local = at(buffer);
  const Operation operation{Purpose::hop1, here.name, buffer_bytes(here)};
  if (sharded()) operations_.record(operation);
  groups_.reduce().reduce(
      gradient, here.dtype, local.sum, plan_.sum_dtype(buffer), here.flat.shard_count(),
      local.contributed ? comm::SumMode::add : comm::SumMode::assign, scratch_, operation, exec_);
  local.contributed = true;
}

void EngineState::hop2(int buffer) {
  const state::FlatBuffer& here = flat(buffer);
  Buffer& local = at(buffer);
  if (here.flat.count() == 0) return;
  const DType dtype = plan_.sum_dtype(buffer);
  const std::int64_t bytes = here.flat.shard_count() * bytes_of(dtype);
  // Another replica may have a gradient where this one has none.
  if (!local.contributed) state::clear("mics::detail::clear_accumulator", local.sum, bytes);
  if (plan_.layout().replicas() == 1) return;
  const Operation operation{Purpose::hop2, here.name, bytes};
  operations_.record(operation);
  groups_.replica().all_reduce(local.sum, dtype, here.flat.shard_count(), operation, exec_);
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
    Unit& unit = at(UnitId{u});
    if (unit.open_scopes > 0 || unit.deferred) {
      raise<StateError>({.object = "gradient of unit " + unit_name(UnitId{u}),
                         .expected = "reduce() before the micro-step ends",
                         .found = unit.open_scopes > 0 ? "an open scope" : "a deferred one"});
    }
    unit.reduced = false;
  }
  for (const int b : plan_.flat().persistent_buffers()) {
    Buffer& buffer = at(b);
    if (!buffer.touched) continue;
    buffer.touched = false;
    hop1(b, buffer.resident_gradient);
    state::clear("mics::GradientScope::clear", buffer.resident_gradient, buffer_bytes(flat(b)));
  }
}

// ---- the step

std::shared_ptr<const StepResult> EngineState::step() {
  require_alive();
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

  // Norm, samples and loss of the shard group, then of the replicas; added in rank order, so that
  // every rank has the same bits.
  struct Totals {
    double squares = 0;
    double loss = 0;
    std::int64_t samples = 0;
  };
  Totals local{.loss = loss_, .samples = samples_};
  for (const int b : plan_.hop2_order()) {
    local.squares += optim::sum_of_squares(at(b).sum, plan_.sum_dtype(b),
                                           flat(b).flat.shard_count(), norm_partials_);
  }
  Totals group = local;
  if (sharded()) {
    const Operation operation{Purpose::norm, "gradient norm", sizeof(Totals)};
    operations_.record(operation);
    std::vector<Totals> all(static_cast<std::size_t>(groups_.shard().size()));
    groups_.shard().all_gather_small(&local, all.data(), sizeof(Totals), operation);
    group = {};
    for (const Totals& t : all) {
      group.squares += t.squares;
      group.loss += t.loss;
      group.samples += t.samples;
    }
  }
  std::vector<std::uint8_t> contributed(plan_.hop2_order().size());
  for (std::size_t i = 0; i < contributed.size(); ++i) {
    contributed[i] = at(plan_.hop2_order()[i]).contributed ? 1 : 0;
  }
  Totals total = group;
  if (plan_.layout().replicas() > 1) {
    const std::size_t bytes = sizeof(Totals) + contributed.size();
    const Operation operation{Purpose::norm, "samples and loss", static_cast<std::int64_t>(bytes)};
    operations_.record(operation);
    std::vector<std::byte> mine(bytes);
    std::memcpy(mine.data(), &group, sizeof(Totals));
    std::memcpy(mine.data() + sizeof(Totals), contributed.data(), contributed.size());
    std::vector<std::byte> all(bytes * static_cast<std::size_t>(groups_.replica().size()));
    groups_.replica().all_gather_small(mine.data(), all.data(), static_cast<std::int64_t>(bytes),
                                       operation);
    total = {.squares = group.squares};
    for (int r = 0; r < groups_.replica().size(); ++r) {
      const std::byte* from = all.data() + static_cast<std::size_t>(r) * bytes;
      Totals theirs;
      std::memcpy(&theirs, from, sizeof(Totals));
      total.loss += theirs.loss;
      total.samples += theirs.samples;
      for (std::size_t i = 0; i < contributed.size(); ++i) {
        contributed[i] |= std::to_integer<std::uint8_t>(from[sizeof(Totals) + i]);
      }
    }
  }

  StepResult result;
  result.samples = total.samples;
  result.learning_rate =
      learning_rates_[std::min(static_cast<std::size_t>(steps_), learning_rates_.size() - 1)];
  const double divisor = loss_scale_ * static_cast<double>(total.samples);
  result.loss = total.loss / divisor * loss_scale_;
  result.gradient_norm = std::sqrt(total.squares) / divisor;
  result.skipped = total.samples == 0 || !std::isfinite(result.gradient_norm);
  for (std::size_t i = 0; i < contributed.size(); ++i) {
    const int b = plan_.hop2_order()[i];
    if (contributed[i] == 0 && flat(b).flat.count() > 0) result.untouched.push_back(flat(b).name);
  }

  if (!result.skipped) {
    ++steps_;
    beta1_power_ *= config_.optimizer.betas[0];
    beta2_power_ *= config_.optimizer.betas[1];
    // Exactly 1 while the norm stays below the limit.
    const double clip =
        config_.gradient_clipping > 0
            ? 1 / std::max(1.0, (result.gradient_norm + 1e-6) / config_.gradient_clipping)
            : 1.0;
    wait_for(resident_readers_, "mics: leases' kernels are done before parameters change");
    for (std::size_t slot = 0; slot < gather_slots_.size(); ++slot) {
      vacate(static_cast<int>(slot));
    }
    for (std::size_t i = 0; i < contributed.size(); ++i) {
      if (contributed[i] == 0) continue;
      const int b = plan_.hop2_order()[i];
      Buffer& buffer = at(b);
      const optim::Slice slice{.gradient = buffer.sum,
                               .master_weights = buffer.master_weights,
                               .exp_avg = buffer.exp_avg,
                               .exp_avg_sq = buffer.exp_avg_sq,
                               .compute = plan_.master_is_compute(b) ? nullptr : buffer.compute,
                               .gradient_dtype = plan_.sum_dtype(b),
                               .master_dtype = plan_.master_dtype(b),
                               .compute_dtype = flat(b).dtype,
                               .count = flat(b).flat.shard_count(),
                               .runs = buffer.runs};
      const OptimizerConfig& o = config_.optimizer;
      if (o.kind == OptimizerKind::adamw) {
        optim::update(optim::AdamW{.learning_rate = result.learning_rate,
                                   .beta1 = o.betas[0],
                                   .beta2 = o.betas[1],
                                   .epsilon = o.epsilon,
                                   .weight_decay = o.weight_decay,
                                   .bias_correction1 = 1 - beta1_power_,
                                   .bias_correction2 = 1 - beta2_power_,
                                   .gradient_scale = clip / divisor},
                      slice);
      } else {
        optim::update(optim::Sgd{.learning_rate = result.learning_rate,
                                 .weight_decay = o.weight_decay,
                                 .gradient_scale = clip / divisor},
                      slice);
      }
    }
    schedule_.invalidate();
    gather_resident(true);
  }
  result.step = steps_;
  for (Buffer& buffer : buffers_) buffer.contributed = false;
  samples_ = 0;
  loss_ = 0;
  return std::make_shared<const StepResult>(std::move(result));
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
}

// ---- small services

void EngineState::sum(std::span<double> values) {
  require_alive();
  const auto over = [&](comm::Transport& transport) {
    if (transport.size() == 1 || values.empty()) return;
    const auto bytes = static_cast<std::int64_t>(values.size_bytes());
    const Operation operation{Purpose::agreement, "sum of the application's values", bytes};
    operations_.record(operation);
    std::vector<double> all(values.size() * static_cast<std::size_t>(transport.size()));
    transport.all_gather_small(values.data(), all.data(), bytes, operation);
    std::fill(values.begin(), values.end(), 0.0);
    for (std::size_t i = 0; i < all.size(); ++i) values[i % values.size()] += all[i];
  };
  over(groups_.shard());
  over(groups_.replica());
}

void EngineState::read(ParameterId parameter, std::span<double> values, bool master) {
  require_alive();
  const ParameterSpec& spec = model_.spec(parameter);
  if (static_cast<std::int64_t>(values.size()) != spec.count) {
    raise<ArgumentError>({.object = "values of parameter " + in_quotes(spec.name),
                          .expected = std::to_string(spec.count) + " elements",
                          .found = std::to_string(values.size())});
  }
  const state::ParameterPlace& place = plan_.flat().place(parameter);
  const state::FlatBuffer& buffer = flat(place.buffer);
  const Buffer& here = at(place.buffer);
  const bool from_master = master && here.master_weights != nullptr;
  const std::byte* source = from_master ? here.master_weights : here.compute;
  const DType dtype = from_master ? plan_.master_dtype(place.buffer) : buffer.dtype;
  std::vector<double> stored(values.size());
  const Operation operation{Purpose::agreement, spec.name,
                            static_cast<std::int64_t>(values.size_bytes())};
  for (int tau = 0; tau < buffer.flat.shards(); ++tau) {
    const layout::Interval shard = buffer.flat.shard(tau);
    const layout::Interval part = intersection(place.range, shard);
    if (part.empty()) continue;
    double* target = stored.data() + (part.offset - place.range.offset);
    if (tau == groups_.shard().rank()) {
      visit(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const T* from = reinterpret_cast<const T*>(source) + (part.offset - shard.offset);
        for (std::int64_t i = 0; i < part.length; ++i) target[i] = static_cast<double>(from[i]);
      });
    }
    groups_.shard().broadcast(target, part.length * static_cast<std::int64_t>(sizeof(double)), tau,
                              operation);
  }
  for (std::int64_t i = 0; i < spec.count; ++i) {
    values[static_cast<std::size_t>(element_index(spec.shape, spec.options.layout, i))] =
        stored[static_cast<std::size_t>(i)];
  }
}

void EngineState::quiet(const Execution& exec) {
  require_alive();
  for (std::size_t slot = 0; slot < gather_slots_.size(); ++slot) {
    finish_fetch(static_cast<int>(slot));
  }
  exec.fence("mics::Engine::quiet");
  exec_.fence("mics::Engine::quiet");
}

}  // namespace mics::detail
