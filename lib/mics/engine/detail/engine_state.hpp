// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/comm/communicator.hpp>
#include <mics/comm/device_watch.hpp>
#include <mics/comm/failure_channel.hpp>
#include <mics/comm/mpi_transport.hpp>
#include <mics/comm/operation_log.hpp>
#include <mics/comm/transport.hpp>
#include <mics/comm/watchdog.hpp>
#include <mics/engine/engine.hpp>
#include <mics/optim/device_step.hpp>
#include <mics/optim/loss_scaler.hpp>
#include <mics/optim/optimizer.hpp>
#include <mics/optim/schedule.hpp>
#include <mics/parallel/process_groups.hpp>
#include <mics/parallel/slot_schedule.hpp>
#include <mics/plan/plan.hpp>
#include <mics/state/arena.hpp>
#include <mics/state/device_table.hpp>

#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace mics::detail {

/// What an Engine holds and does. Leases and scopes point here, so it does not move.
class EngineState {
 public:
  EngineState(MPI_Comm comm, const Model& model, const Config& config, const Execution& exec,
              LogSink log);
  ~EngineState();
  EngineState(const EngineState&) = delete;
  EngineState& operator=(const EngineState&) = delete;

  void begin_micro_step(const MicroStep& micro_step);
  void begin_evaluation();
  void declare_order(std::span<const UnitId> order);

  void acquire(UnitId unit, const Execution& exec, Keep keep);
  void release(UnitId unit, const std::vector<Execution>& users) noexcept;
  // Kernels of `exec` may read, or add to, what an open lease, or scope, shows.
  void share_parameters(UnitId unit, const Execution& exec);
  void share_gradient(UnitId unit, const Execution& exec);
  [[nodiscard]] RawView parameter_view(UnitId unit, const ViewRequest& request) const;

  void open_gradient(UnitId unit, const Execution& exec, GradientMode mode);
  void close_gradient(UnitId unit, const std::vector<Execution>& users, bool reduce);
  [[nodiscard]] RawView gradient_view(UnitId unit, const ViewRequest& request) const;

  std::shared_ptr<StepOutcome> step();
  void set_learning_rates(std::span<const double> table);
  void sum(std::span<double> values);
  void read(ParameterId parameter, std::span<double> values, std::string_view array);
  void quiet(const Execution& exec);

  void claim_directory(const std::string& directory);
  void save(const std::string& directory, const SaveRequest& request);
  checkpoint::SaveProgress poll_save();
  checkpoint::SaveProgress wait_for_save();
  std::optional<LoadResult> load(const std::string& directory, const LoadRequest& request);

  void require_alive();
  /// Never throws: for destructors. \see comm::FailureChannel::fail
  void fail(const std::string& text, comm::FailureKind kind) noexcept {
    failures_.fail(text, kind);
  }

  [[nodiscard]] const comm::FailureChannel& failures() const { return failures_; }
  [[nodiscard]] const Execution& execution() const { return exec_; }
  [[nodiscard]] const Plan& plan() const { return plan_; }
  [[nodiscard]] const Model& model() const { return model_; }
  [[nodiscard]] const Config& config() const { return config_; }
  [[nodiscard]] const comm::OperationLog& operations() const { return operations_; }
  [[nodiscard]] const comm::Communicator& world() const { return world_; }
  [[nodiscard]] const state::Arena& arena() const { return arena_; }
  // \throws ArgumentError if `host` is not where the state lives
  [[nodiscard]] double* loss(bool host, std::string_view space);
  [[nodiscard]] const double* loss_scale(bool host, std::string_view space) const;
  void require_space(const std::string& object, bool host, std::string_view space) const;
  [[nodiscard]] std::string unit_name(UnitId unit) const;

 private:
  enum class Phase : std::uint8_t { idle, micro_step, evaluation };

  // One flat buffer on this rank.
  struct Buffer {
    std::byte* compute = nullptr;            // (shard) local
    std::byte* master_weights = nullptr;     // (shard) local; the compute shard where dtypes agree
    std::vector<void*> states;               // (shard) local each, as the optimizer lists them
    std::byte* sum = nullptr;                // (shard) local; gradients of this step so far
    std::byte* full = nullptr;               // (buffer) gathered; null if it uses a slot
    std::byte* resident_gradient = nullptr;  // (buffer) of persistent buffers, zero between uses
    std::vector<state::HyperRun> runs;
    std::vector<state::TensorSegment> tensors;
    state::DeviceTable<state::HyperRun>
        device_runs;  // on a device, of the two above and of the gaps
    state::DeviceTable<state::TensorSegment> device_tensors;
    state::DeviceTable<layout::Interval> device_gaps;
    double* norms = nullptr;   // on a device, where the optimizer needs norms of whole tensors
    std::int64_t updates = 0;  // steps that changed it: what bias corrections count
    bool touched = false;      // persistent only: a scope of this micro-step could write to it
    bool contributed = false;  // `sum` holds a gradient of this step
    bool hop2_done = false;
  };
  struct GatherSlot {
    std::byte* data = nullptr;
    std::vector<std::unique_ptr<comm::PendingCollective>> pending;
    Markers readers;  // of the unit that lies here
    bool keep = false;
  };
  struct GradientSlot {
    std::byte* data = nullptr;
    int unit = -1;
    Markers writers;
    Marker free;                  // the reduction has read what lay here before
    std::int64_t reductions = 0;  // all that had begun when that one did
    Marker opened;                // the slot is clear
  };
  struct Unit {
    bool needs_slot = false;           // has a buffer that is not resident
    bool needs_gradient_slot = false;  // has a trainable buffer of its own
    int open_leases = 0;
    int open_scopes = 0;
    bool deferred = false;
    bool reduced = false;  // in this micro-step
  };

  [[nodiscard]] const state::FlatBuffer& flat(int buffer) const {
    return plan_.flat().buffer(buffer);
  }
  [[nodiscard]] Buffer& at(int buffer) { return buffers_[static_cast<std::size_t>(buffer)]; }
  [[nodiscard]] Unit& at(UnitId unit) { return units_[static_cast<std::size_t>(unit.value)]; }
  [[nodiscard]] bool sharded() const { return plan_.layout().shard_size() > 1; }
  // Of a whole buffer, gathered and as gradients.
  [[nodiscard]] std::int64_t buffer_bytes(int buffer) const {
    return flat(buffer).flat.count() * bytes_of(flat(buffer).dtype);
  }
  [[nodiscard]] std::int64_t gradient_bytes(int buffer) const {
    return flat(buffer).flat.count() * bytes_of(plan_.gradient_dtype(buffer));
  }
  [[nodiscard]] std::string open_leases() const;

  [[nodiscard]] std::unique_ptr<comm::Watchdog> watch(const char* what, const Config& config,
                                                      MPI_Comm comm) const;
  // An instance whose kernels reach the state.
  void require_reach(const Execution& exec) const;
  [[nodiscard]] bool on_device() const { return memory_ == Memory::device; }
  void leave_behind();
  [[nodiscard]] Execution agreed_instance(const Execution& given) const;
  void require_capacity() const;
  // Of the optimizer's states: names that a checkpoint can hold.
  void require_state_names() const;
  [[nodiscard]] std::unique_ptr<comm::DeviceWatch> make_device_watch();
  [[nodiscard]] parallel::Wiring make_wiring();
  void allocate();
  void allocate_step();
  void initialize();
  void check_unit(UnitId unit) const;
  void warn(std::string_view line) const;
  // What this rank did before it failed, for the log.
  void tell_history() const;
  // All ranks of the shard group are at the same operation on the same unit.
  void require_same_unit(const char* call, UnitId unit);
  void agree_on_order();
  void end_pass();
  void start_fetch(int slot, int unit);
  // Work of `exec` sees what was gathered into the slot.
  void finish_fetch(int slot, const Execution& exec);
  void vacate(int slot);
  void gather_resident(bool trainable_only);
  [[nodiscard]] int gradient_slot_of(int unit) const;
  [[nodiscard]] int free_gradient_slot() const;  // -1: none
  void hop1(int buffer, const void* gradient);
  void hop2(int buffer);
  void advance_hop2(bool all);
  void finish_micro_step();

  // Of a step, over all ranks and micro-steps.
  struct Totals {
    double squares = 0;  // of gradients, with the hops' factors divided out
    double loss = 0;
    std::int64_t samples = 0;
  };
  [[nodiscard]] Totals exchange_totals(std::vector<std::uint8_t>& contributed);
  void require_same_history(std::span<const std::uint64_t> all, const char* group,
                            const comm::Transport& transport);
  [[nodiscard]] std::vector<optim::Slice> slices(const std::vector<std::uint8_t>& contributed);
  void update(const std::vector<std::uint8_t>& contributed, optim::StepInfo info,
              double gradient_scale);
  void forget_gradients();
  [[nodiscard]] optim::Rates rates(std::int64_t step) const;

  // One array of the state that replicas hold in common.
  struct Replicated {
    int buffer = -1;
    std::string array;  // compute, master_weights or a name of the optimizer's
    std::byte* data = nullptr;
    std::int64_t bytes = 0;
  };
  [[nodiscard]] std::vector<Replicated> replicated() const;
  [[nodiscard]] std::vector<std::uint64_t> block_checksums_of(const Replicated& array) const;
  // True if something was repaired.
  bool check_replicas();
  void repair_or_fail(const std::vector<Replicated>& arrays,
                      const std::vector<std::uint64_t>& all_checksums);
  [[nodiscard]] checkpoint::StoredState stored_state() const;
  // Shards of the arrays that a checkpoint holds, as it numbers them, where the engine has them.
  struct StoredShard {
    int buffer = -1;
    int array = -1;
    layout::Interval range;  // of the buffer
    std::byte* data = nullptr;
    std::int64_t width = 0;  // bytes an element
    [[nodiscard]] std::int64_t bytes() const { return range.length * width; }
  };
  [[nodiscard]] std::vector<StoredShard> stored_shards(bool weights_only) const;
  // Copies what this rank writes to the host, and the bits of all are hashed where they lie.
  [[nodiscard]] std::vector<checkpoint::Source> stage(const checkpoint::StoredState& state,
                                                      checkpoint::SourceInfo& info);
  // Collective; of a directory that all ranks have agreed on.
  [[nodiscard]] checkpoint::Saver& saver_of(const std::string& directory,
                                            const checkpoint::Retention& retention);
  void require_idle(const char* call) const;
  // An engine that is forward only has nothing to train.
  void require_training(const std::string& call) const;
  void round_masters();
  [[nodiscard]] std::byte* array_of(int buffer, std::string_view array, DType& dtype) const;
  [[nodiscard]] RawView resolve(UnitId unit, const ViewRequest& request, bool gradient) const;
  // Memory of the state, in the order of `exec`.
  void clear(const Execution& exec, void* data, std::int64_t bytes) const;
  void clear_gaps(const Execution& exec, int buffer, std::byte* gradient) const;
  void poison(const Execution& exec, void* data, DType dtype, std::int64_t count) const;
  void copy_out(void* host, const std::byte* data, std::int64_t bytes) const;
  void copy_in(std::byte* data, const void* host, std::int64_t bytes) const;
  // From one array of the state to another; on a device in the order of exec_.
  void copy_within(void* to, const void* from, std::int64_t bytes) const;

  // A step whose result is on its way from the device. Two are at most, when the next begins.
  class EnqueuedStep;
  static constexpr int outcome_slots = 4;

  [[nodiscard]] std::shared_ptr<StepOutcome> run_step();
  [[nodiscard]] std::shared_ptr<StepOutcome> enqueue_step();
  // Until at most `most` steps are under way.
  void retire(std::size_t most);
  void retire_until(const EnqueuedStep& step);
  void retire_first();
  void abandon_steps();
  void enqueue_update(const std::vector<std::uint8_t>& contributed);
  void report_desync(const optim::StepOutcome& found);
  void upload_rates();
  void wait_for(const Marker& marker);
  // Nothing of mics is under way on the device.
  void drain();
  void read_device_step();
  void write_device_step();

  LogSink log_;
  int exceptions_ = std::uncaught_exceptions();  // in flight when the engine was built
  std::unique_ptr<comm::Watchdog> watchdog_;     // during construction
  comm::Communicator world_;
  comm::FailureChannel failures_;
  comm::OperationLog operations_;
  Model model_;
  Config config_;
  Memory memory_;
  Execution exec_;
  std::vector<int> nodes_;
  std::shared_ptr<const optim::Optimizer> optimizer_;
  std::vector<optim::StateSpec> state_specs_;
  parallel::Choice transport_;
  Plan plan_;
  state::Arena arena_;
  std::unique_ptr<comm::DeviceWatch> device_watch_;  // where NCCL is used
  parallel::ProcessGroups groups_;
  comm::MpiTransport all_;  // every rank, for checkpoints
  parallel::SlotSchedule schedule_;

  std::vector<Buffer> buffers_;
  std::vector<Unit> units_;
  std::vector<GatherSlot> gather_slots_;
  std::vector<GradientSlot> gradient_slots_;
  std::int64_t reductions_ = 0;  // of gradient slots, begun so far
  Markers resident_readers_;
  Markers resident_writers_;  // of persistent gradients, in this micro-step
  Marker parameters_ready_;   // the update has written the shards
  Marker resident_ready_;     // and what stays gathered is gathered
  Marker resident_cleared_;   // persistent gradients are zero
  void* scratch_ = nullptr;
  std::span<double> norm_partials_;
  optim::Schedule rate_schedule_;
  std::vector<double> learning_rates_;  // empty: the configuration's schedule
  optim::LossScaler scaler_;

  Phase phase_ = Phase::idle;
  bool last_announced_ = false;
  bool reported_departure_ = false;
  std::size_t next_hop2_ = 0;     // position in the plan's order
  std::int64_t samples_ = 0;      // local, of this step
  std::int64_t micro_steps_ = 0;  // opened so far; same in the shard group
  double loss_ = 0;               // local, of this step
  double loss_scale_ = 1;
  std::int64_t steps_ = 0;  // taken, without skipped ones; same on all ranks
  std::int64_t calls_ = 0;  // of step()
  // On a device, which runs behind: `steps_` is then what the last finished step says.
  std::unique_ptr<optim::DeviceStep> device_step_;
  optim::OutcomeRing outcomes_;
  std::deque<std::shared_ptr<EnqueuedStep>> in_flight_;
  std::int64_t rates_end_ = 0;  // position up to which learning rates are there
  double* norm_partials_of_tensors_ = nullptr;

  using PinnedBytes = Kokkos::View<std::byte*, device::PinnedSpace>;
  PinnedBytes staged_;  // what this rank writes of a device's memory; kept for the next save

  std::string save_directory_;
  std::unique_ptr<checkpoint::Saver> saver_;  // of save_directory_
};

}  // namespace mics::detail
