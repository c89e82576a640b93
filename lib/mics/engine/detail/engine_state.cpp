// SPDX-License-Identifier: Apache-2.0
#include <mics/base/hash.hpp>
#include <mics/base/json_reader.hpp>
#include <mics/checkpoint/stored_state.hpp>
#include <mics/comm/agreement.hpp>
#include <mics/engine/detail/engine_state.hpp>
#include <mics/state/for_blocks.hpp>
#include <mics/state/initialize.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <set>
#include <string_view>
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

std::shared_ptr<const optim::Optimizer> optimizer_of(const Config& config, Memory memory) {
  if (config.custom_optimizer == nullptr) return optim::make_optimizer(config.optimizer);
  if (memory == Memory::device && !config.custom_optimizer->runs_on_device()) {
    raise<ConfigError>({.object = "optimizer " + std::string(config.custom_optimizer->name()),
                        .expected = "one that runs on a device",
                        .found = "only the functions of the host",
                        .remedy = "override enqueue_update(), or keep the state in host memory"});
  }
  return config.custom_optimizer;
}

layout::GroupLayout make_layout(const std::vector<int>& nodes, const Config& config) {
  const std::string of_deepspeed = "zero_optimization.mics_shard_size";
  const std::string key = config.report.gives(of_deepspeed) ? of_deepspeed : "mics.shard_size";
  return layout::GroupLayout::make(nodes, config.shard_size_for(nodes), config.source + key);
}

Plan make_plan(const std::vector<int>& nodes, const Model& model, const Config& config,
               Memory memory, const parallel::Choice& transport) {
  PlanRequest request = config.plan_request(static_cast<int>(nodes.size()));
  request.memory = memory;
  request.transport = transport.kind;
  request.transport_reason = transport.reason;
  Plan plan(model, make_layout(nodes, config), request);
  if (!config.memory_budget || plan.memory().total() <= *config.memory_budget) return plan;
  std::string remedy = "no shard size fits";
  for (const int p : layout::shard_sizes_that_fit(static_cast<int>(nodes.size()))) {
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
  return std::chrono::milliseconds(static_cast<std::int64_t>(std::min(seconds, 1e9) * 1000));
}

}  // namespace

EngineState::EngineState(MPI_Comm comm, const Model& model, const Config& config,
                         const Execution& exec, LogSink log)
    : log_(std::move(log)),
      watchdog_(watch("construction of the engine", config, comm)),
      world_(open_world(comm)),
      failures_((check_inputs(world_, model, config), world_)),
      model_(model),
      config_(config),
      memory_(config.memory.value_or(exec.reaches_host() ? Memory::host : Memory::device)),
      exec_(agreed_instance(exec)),
      nodes_(parallel::nodes_of_ranks(world_, config.ranks_per_node.value_or(0))),
      optimizer_(optimizer_of(config_, memory_)),
      state_specs_(optimizer_->states()),
      transport_(on_device() ? parallel::choose_device_transport(world_, config.nccl == Switch::on,
                                                                 config.nccl != Switch::off,
                                                                 config.share_device)
                             : parallel::Choice{}),
      plan_(make_plan(nodes_, model_, config_, memory_, transport_)),
      arena_([&] {
        std::optional<state::Arena> arena;
        comm::agree(world_, [&] {
          require_state_names();
          require_capacity();
          arena.emplace(plan_.memory().arena, memory_);
        });
        return *std::move(arena);
      }()),
      device_watch_(make_device_watch()),
      groups_(world_, plan_.layout(), nodes_, plan_.two_stage(),
              {.failures = &failures_,
               .log = &operations_,
               .device = device_watch_.get(),
               .timeout = to_milliseconds(config.timeout)},
              make_wiring()),
      all_(comm::Communicator::duplicate(world_.native()), nodes_,
           {.failures = &failures_,
            .log = &operations_,
            .timeout = to_milliseconds(config.timeout)}),
      schedule_(model.units(), config.slots, plan_.request().prefetch, !config.debug),
      rate_schedule_(config.schedule, config.optimizer.learning_rate),
      scaler_(config.loss_scale),
      loss_scale_(scaler_.scale()) {
  failures_.on_failure([this] {
    // Kernels of collectives that others will not join would spin for ever.
    if (device_watch_ != nullptr) device_watch_->abort_all();
    tell_history();
  });
  allocate();
  comm::agree(world_, [&] { initialize(); });
  watchdog_.reset();
  gather_resident(false);
}

// The library prints nothing: without a sink nobody would hear the dog.
std::unique_ptr<comm::Watchdog> EngineState::watch(const char* what, const Config& config,
                                                   MPI_Comm comm) const {
  if (!log_ || !(config.timeout > 0)) return nullptr;
  int rank = 0;
  int initialized = 0;
  if (MPI_Initialized(&initialized) == MPI_SUCCESS && initialized != 0 && comm != MPI_COMM_NULL) {
    MPI_Comm_rank(comm, &rank);
  }
  return std::make_unique<comm::Watchdog>(
      std::string(what) + " on rank " + std::to_string(rank), to_milliseconds(config.timeout),
      [log = log_](const std::string& line) { log(LogLevel::stuck, line); });
}

// The application's instance; on a device the library's own kernels run there too. All ranks have
// the same kind of memory, or none goes on.
Execution EngineState::agreed_instance(const Execution& given) const {
  // State in host memory in a build whose default is a device.
  const bool other = memory_ == Memory::host && !given.chosen() && !given.reaches_host();
  const Execution exec = other ? Execution(Kokkos::DefaultHostExecutionSpace()) : given;
  comm::require_same(world_, name(memory_), "memory of the engine's instance");
  comm::agree(world_, [&] {
    require_reach(exec);
    if (on_device()) static_cast<void>(exec.as<device::Space>());
  });
  return exec;
}

void EngineState::require_state_names() const {
  std::set<std::string_view> names{checkpoint::master_weights, checkpoint::frozen_weights};
  for (const optim::StateSpec& spec : state_specs_) {
    const bool is_text = is_utf8(spec.name);
    if (!spec.name.empty() && is_text && names.insert(spec.name).second) continue;
    raise<ArgumentError>({.object = "states of optimizer " + in_quotes(optimizer_->name()),
                          .expected = "names in UTF-8 that are new",
                          .found = is_text ? in_quotes(spec.name) : "other bytes",
                          .remedy = "checkpoints hold states by name"});
  }
}

void EngineState::require_capacity() const {
  if (!on_device()) return;
  const device::Capacity capacity = device::capacity();
  if (plan_.memory().arena <= capacity.free) return;
  raise<ConfigError>(
      {.object = "device memory of rank " + std::to_string(world_.rank()),
       .expected = std::to_string(plan_.memory().arena) + " bytes free",
       .found = std::to_string(capacity.free) + " of " + std::to_string(capacity.total),
       .remedy = "use a larger shard size or fewer slots"});
}

std::unique_ptr<comm::DeviceWatch> EngineState::make_device_watch() {
  if (transport_.kind != comm::TransportKind::nccl) return nullptr;
  return std::make_unique<comm::DeviceWatch>(failures_, operations_,
                                             to_milliseconds(config_.timeout));
}

parallel::Wiring EngineState::make_wiring() {
  parallel::Wiring wiring{.kind = transport_.kind, .sums = config_.device_sums, .exec = exec_};
  if (!on_device()) return wiring;
  const auto region = [&](std::int64_t bytes) {
    return std::span(arena_.take(bytes, "conversions"), static_cast<std::size_t>(bytes));
  };
  const Plan::Conversions& sizes = plan_.conversions();
  wiring.hop1 = region(sizes.hop1);
  wiring.between = region(sizes.between);
  wiring.hop2 = region(sizes.hop2);
  wiring.staged_gather = plan_.staged().gather;
  wiring.staged_reduce = plan_.staged().reduce;
  wiring.staged_replica = plan_.staged().replica;
  wiring.staged_small = plan_.staged().small;
  return wiring;
}

EngineState::~EngineState() {
  if (std::uncaught_exceptions() > exceptions_) {
    // The others would wait for this rank; what a lease or a scope announced has no better text.
    fail(failures_.failed() ? failures_.text() : "an exception ended the engine",
         comm::FailureKind::cause);
  }
  if (failures_.failed()) {
    leave_behind();
    return;
  }
  watchdog_ = watch("destruction of the engine", config_, world_.native());
  try {
    drain();
    // Freeing communicators of a device waits for all ranks, whatever became of them: who does not
    // come is found here, and they are aborted instead.
    if (device_watch_ != nullptr) all_.barrier({Purpose::agreement, "end of the engine", 0});
  } catch (const Error& error) {
    warn(error.what());
  }
  if (failures_.failed()) leave_behind();
}

// A peer may still read from the arena, and freeing communicators needs every rank.
void EngineState::leave_behind() {
  abandon_steps();
  arena_.leak();
  world_.abandon();
}

void EngineState::warn(std::string_view line) const {
  if (log_) log_(LogLevel::warning, line);
}

void EngineState::tell_history() const {
  if (!log_) return;
  log_(LogLevel::trace, "rank " + std::to_string(world_.rank()) + ", last of " +
                            std::to_string(operations_.total()) + " operations:\n" +
                            operations_.dump());
}

std::string EngineState::unit_name(UnitId unit) const { return in_quotes(model_.name(unit)); }

void EngineState::allocate() {
  const state::FlatModel& flat_model = plan_.flat();
  buffers_.resize(static_cast<std::size_t>(flat_model.buffer_count()));
  for (int b = 0; b < flat_model.buffer_count(); ++b) {
    const state::FlatBuffer& buffer = flat(b);
    Buffer& here = at(b);
    const std::int64_t shard = buffer.flat.shard_count();
    here.compute = arena_.take(shard * bytes_of(buffer.dtype), "compute shard");
    if (plan_.resident(b)) {
      here.full = sharded() ? arena_.take(buffer_bytes(b), "resident buffer") : here.compute;
    }
    if (!buffer.trainable) continue;
    const std::int64_t master_bytes = shard * bytes_of(plan_.master_dtype(b));
    here.master_weights =
        plan_.master_is_compute(b) ? here.compute : arena_.take(master_bytes, "master_weights");
    for (const optim::StateSpec& spec : state_specs_) {
      here.states.push_back(arena_.take(master_bytes, spec.name.c_str()));
    }
    here.sum = arena_.take(shard * bytes_of(plan_.sum_dtype(b)), "accumulator");
    if (plan_.has_resident_gradient(b)) {
      here.resident_gradient = arena_.take(gradient_bytes(b), "resident gradient");
    }
    const layout::Interval own = buffer.flat.shard(plan_.layout().place(world_.rank()).shard);
    here.runs = hyper_runs(model_, buffer, own);
    here.tensors = tensor_segments(buffer, own);
    if (on_device()) {
      here.device_runs = state::DeviceTable<state::HyperRun>(here.runs);
      here.device_tensors = state::DeviceTable<state::TensorSegment>(here.tensors);
      here.device_gaps = state::DeviceTable<layout::Interval>(buffer.flat.gaps());
    }
  }

  gather_slots_.resize(static_cast<std::size_t>(config_.slots));
  gradient_slots_.resize(static_cast<std::size_t>(config_.slots));
  for (GatherSlot& slot : gather_slots_) {
    slot.data = arena_.take(plan_.gather_slot_bytes(), "gather slot");
  }
  for (GradientSlot& slot : gradient_slots_) {
    slot.data = arena_.take(plan_.gradient_slot_bytes(), "gradient slot");
  }
  scratch_ = arena_.take(plan_.reduce_scratch_bytes(), "scratch");
  norm_partials_ = {
      reinterpret_cast<double*>(arena_.take(plan_.norm_partials() * 8, "norm partials")),
      static_cast<std::size_t>(plan_.norm_partials())};
  if (on_device()) allocate_step();

  // What another rank may be found to do instead of this rank's operation.
  for (int b = 0; b < flat_model.buffer_count(); ++b) {
    const std::string& name = flat(b).name;
    operations_.know({Purpose::gather, name, buffer_bytes(b)});
    if (!flat(b).trainable) continue;
    operations_.know({Purpose::hop1, name, gradient_bytes(b)});
    operations_.know(
        {Purpose::hop2, name, flat(b).flat.shard_count() * bytes_of(plan_.sum_dtype(b))});
  }

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
    const layout::Interval shard = buffer.flat.shard(tau);
    const DType master_dtype = plan_.master_dtype(b);
    void* const master = separate ? here.master_weights : nullptr;
    if (on_device()) {
      state::initialize(exec_, model_, buffer, shard, config_.seed, master, master_dtype,
                        here.compute);
    } else {
      state::initialize(model_, buffer, shard, config_.seed, master, master_dtype, here.compute);
    }
    const void* const weights = separate ? master : here.compute;
    const std::int64_t bytes = shard.length * bytes_of(separate ? master_dtype : buffer.dtype);
    for (std::size_t i = 0; i < here.states.size(); ++i) {
      if (state_specs_[i].initial != optim::InitialState::weights) continue;
      copy_within(here.states[i], weights, bytes);
    }
  }
  if (on_device()) exec_.fence("mics::detail::EngineState::initialize");
}

void EngineState::require_alive() {
  if (failures_.failed()) failures_.poll();
}

void EngineState::require_training(const std::string& call) const {
  if (!config_.forward_only) return;
  raise<StateError>({.object = call,
                     .expected = "an engine with gradients and optimizer state",
                     .found = "one that is forward only",
                     .remedy = "begin_evaluation() opens its passes"});
}

void EngineState::check_unit(UnitId unit) const {
  static_cast<void>(model_.name(unit));  // throws
}

void EngineState::require_same_unit(const char* call, UnitId unit) {
  if (!sharded()) return;
  // Named alike on all ranks, so that they meet here and learn each other's unit.
  const Operation operation{Purpose::agreement, "next unit", 8};
  operations_.record({Purpose::agreement, model_.name(unit), 8});
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

std::byte* EngineState::array_of(int buffer, std::string_view array, DType& dtype) const {
  const Buffer& here = buffers_[static_cast<std::size_t>(buffer)];
  const bool trainable = here.master_weights != nullptr;
  dtype = plan_.master_dtype(buffer);
  if (array == "compute" || (array == "master_weights" && !trainable)) {
    dtype = flat(buffer).dtype;
    return here.compute;
  }
  if (array == "master_weights") return here.master_weights;
  std::string names = "compute, master_weights";
  for (std::size_t i = 0; i < state_specs_.size(); ++i) {
    if (state_specs_[i].name == array && trainable) return static_cast<std::byte*>(here.states[i]);
    if (trainable) names += ", " + state_specs_[i].name;
  }
  raise<ArgumentError>({.object = "array of buffer " + in_quotes(flat(buffer).name),
                        .expected = names,
                        .found = in_quotes(array)});
}

void EngineState::read(ParameterId parameter, std::span<double> values, std::string_view array) {
  require_alive();
  const ParameterSpec& spec = model_.spec(parameter);
  if (static_cast<std::int64_t>(values.size()) != spec.scalars()) {
    raise<ArgumentError>({.object = "values of parameter " + in_quotes(spec.name),
                          .expected = std::to_string(spec.scalars()) + " elements",
                          .found = std::to_string(values.size())});
  }
  const state::ParameterPlace& place = plan_.flat().place(parameter);
  const state::FlatBuffer& buffer = flat(place.buffer);
  DType dtype = DType::fp32;
  const std::byte* source = array_of(place.buffer, array, dtype);
  std::vector<double> stored(values.size());
  const Operation operation{Purpose::agreement, spec.name,
                            static_cast<std::int64_t>(values.size_bytes())};
  for (int tau = 0; tau < buffer.flat.shards(); ++tau) {
    const layout::Interval shard = buffer.flat.shard(tau);
    const layout::Interval part = intersection(place.range, shard);
    if (part.empty()) continue;
    double* target = stored.data() + (part.offset - place.range.offset);
    if (tau == groups_.shard().rank()) {
      const std::int64_t element = bytes_of(dtype);
      std::vector<std::byte> bits(static_cast<std::size_t>(part.length * element));
      copy_out(bits.data(), source + (part.offset - shard.offset) * element, part.length * element);
      visit(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const T* from = reinterpret_cast<const T*>(bits.data());
        for (std::int64_t i = 0; i < part.length; ++i) target[i] = static_cast<double>(from[i]);
      });
    }
    groups_.shard().broadcast(target, part.length * static_cast<std::int64_t>(sizeof(double)), tau,
                              operation);
  }
  const std::int64_t parts = spec.options.complex ? 2 : 1;
  for (std::int64_t i = 0; i < spec.count; ++i) {
    const std::int64_t to = element_index(spec.shape, spec.options.layout, i);
    for (std::int64_t part = 0; part < parts; ++part) {
      values[static_cast<std::size_t>(to * parts + part)] =
          stored[static_cast<std::size_t>(i * parts + part)];
    }
  }
}

void EngineState::quiet(const Execution& exec) {
  require_alive();
  drain();
  exec.fence("mics::Engine::quiet");
  exec_.fence("mics::Engine::quiet");
}

void EngineState::drain() {
  retire(0);
  for (std::size_t slot = 0; slot < gather_slots_.size(); ++slot) {
    finish_fetch(static_cast<int>(slot), groups_.gather().start_of_gather());
  }
  if (!on_device()) return;
  for (const Execution* queue : groups_.queues()) wait_for(queue->mark());
}

}  // namespace mics::detail
