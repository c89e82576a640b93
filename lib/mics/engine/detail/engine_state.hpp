// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/comm/communicator.hpp>
#include <mics/comm/failure_channel.hpp>
#include <mics/comm/mpi_transport.hpp>
#include <mics/comm/operation_log.hpp>
#include <mics/comm/transport.hpp>
#include <mics/comm/watchdog.hpp>
#include <mics/engine/engine.hpp>
#include <mics/optim/loss_scaler.hpp>
#include <mics/optim/optimizer.hpp>
#include <mics/optim/schedule.hpp>
#include <mics/parallel/process_groups.hpp>
#include <mics/parallel/slot_schedule.hpp>
#include <mics/plan/plan.hpp>
#include <mics/state/arena.hpp>

#include <cstdint>
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
  [[nodiscard]] RawView parameter_view(UnitId unit, const ViewRequest& request) const;

  void open_gradient(UnitId unit, const Execution& exec, GradientMode mode);
  void close_gradient(UnitId unit, const std::vector<Execution>& users, bool reduce);
  [[nodiscard]] RawView gradient_view(UnitId unit, const ViewRequest& request) const;

  std::shared_ptr<const StepResult> step();
  void set_learning_rates(std::span<const double> table);
  void sum(std::span<double> values);
  void read(ParameterId parameter, std::span<double> values, std::string_view array);
  void quiet(const Execution& exec);

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
  [[nodiscard]] double* loss() { return &loss_; }
  [[nodiscard]] const double* loss_scale() const { return &loss_scale_; }
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
    std::int64_t updates = 0;  // steps that changed it: what bias corrections count
    bool touched = false;      // persistent only: a scope of this micro-step could write to it
    bool contributed = false;  // `sum` holds a gradient of this step
    bool hop2_done = false;
  };
  struct GatherSlot {
    std::byte* data = nullptr;
    std::vector<std::unique_ptr<comm::PendingCollective>> pending;
    std::vector<Execution> readers;  // of the unit that lies here
    bool keep = false;
  };
  struct GradientSlot {
    std::byte* data = nullptr;
    int unit = -1;
    int open = 0;  // scopes
    std::vector<Execution> writers;
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
  static const Execution& require_host(const Execution& exec);
  void leave_behind();
  void allocate();
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
  void finish_fetch(int slot);
  void vacate(int slot);
  void gather_resident(bool trainable_only);
  [[nodiscard]] int gradient_slot_of(int unit) const;
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
  [[nodiscard]] optim::Rates rates() const;

  // One array of the state that replicas hold in common.
  struct Replicated {
    int buffer = -1;
    std::string array;  // compute, master_weights or a name of the optimizer's
    std::byte* data = nullptr;
    std::int64_t bytes = 0;
  };
  [[nodiscard]] std::vector<Replicated> replicated() const;
  // True if something was repaired.
  bool check_replicas();
  void repair_or_fail(const std::vector<Replicated>& arrays,
                      const std::vector<std::uint64_t>& all_checksums);
  [[nodiscard]] checkpoint::StoredState stored_state() const;
  // Shards of the arrays that a checkpoint holds, as it numbers them.
  template <class Part>
  [[nodiscard]] std::vector<Part> stored_arrays(bool weights_only) const;
  void require_idle(const char* call) const;
  void round_masters();
  [[nodiscard]] std::byte* array_of(int buffer, std::string_view array, DType& dtype) const;
  [[nodiscard]] RawView resolve(UnitId unit, const ViewRequest& request, bool gradient) const;
  void wait_for(std::vector<Execution>& users, const char* reason);

  LogSink log_;
  int exceptions_ = std::uncaught_exceptions();  // in flight when the engine was built
  std::unique_ptr<comm::Watchdog> watchdog_;     // during construction
  comm::Communicator world_;
  comm::FailureChannel failures_;
  comm::OperationLog operations_;
  Model model_;
  Config config_;
  Execution exec_;
  std::vector<int> nodes_;
  std::shared_ptr<const optim::Optimizer> optimizer_;
  std::vector<optim::StateSpec> state_specs_;
  Plan plan_;
  state::Arena arena_;
  parallel::ProcessGroups groups_;
  comm::MpiTransport all_;  // every rank, for checkpoints
  parallel::SlotSchedule schedule_;

  std::vector<Buffer> buffers_;
  std::vector<Unit> units_;
  std::vector<GatherSlot> gather_slots_;
  std::vector<GradientSlot> gradient_slots_;
  std::vector<Execution> resident_readers_;
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
  std::string save_directory_;
  std::unique_ptr<checkpoint::Saver> saver_;  // of save_directory_
};

}  // namespace mics::detail
