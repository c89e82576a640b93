// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/base/error.hpp>
#include <mics/base/execution.hpp>
#include <mics/base/log.hpp>
#include <mics/comm/operation_log.hpp>
#include <mics/engine/checkpointing.hpp>
#include <mics/engine/config.hpp>
#include <mics/plan/plan.hpp>
#include <mics/state/model.hpp>

#include <Kokkos_Core.hpp>
#include <mpi.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace mics {

namespace detail {

class EngineState;

/// Splits a Kokkos data type into element type and rank: `const float**` is (const float, 2).
template <class DataType>
struct DataTypeTraits {
  static_assert(!std::is_array_v<DataType>, "mics views have run-time extents: write float**");
  using value_type = DataType;
  static constexpr int rank = 0;
};
template <class T>
struct DataTypeTraits<T*> {
  using value_type = typename DataTypeTraits<T>::value_type;
  static constexpr int rank = DataTypeTraits<T>::rank + 1;
};

struct RawView {
  void* data = nullptr;
  std::array<std::size_t, 8> extents{};
};

struct ViewRequest {
  ParameterId parameter;
  DType dtype = DType::fp32;
  bool complex = false;
  int rank = 0;
  MemoryLayout layout = MemoryLayout::right;
  bool host = true;
  std::string_view space;
};

template <class DataType, class Layout, class Space>
using ParameterView =
    Kokkos::View<DataType, Layout, Space, Kokkos::MemoryTraits<Kokkos::Unmanaged>>;

/// Splits an element type into the dtype of its parts and whether there are two of them.
template <class T>
struct ElementTraits {
  static_assert(is_element_type<T>,
                "element type must be double, float, mics::bf16, mics::fp16 or a Kokkos::complex");
  static constexpr DType dtype = dtype_of<T>;
  static constexpr bool complex = false;
};
template <class T>
struct ElementTraits<Kokkos::complex<T>> {
  static constexpr DType dtype = dtype_of<T>;
  static constexpr bool complex = true;
};

template <class DataType, class Layout, class Space>
ViewRequest view_request(ParameterId parameter) {
  using Traits = DataTypeTraits<DataType>;
  using Value = std::remove_const_t<typename Traits::value_type>;
  static_assert(
      std::is_same_v<Layout, Kokkos::LayoutRight> || std::is_same_v<Layout, Kokkos::LayoutLeft>,
      "layout must be LayoutRight or LayoutLeft");
  return {parameter,
          ElementTraits<Value>::dtype,
          ElementTraits<Value>::complex,
          Traits::rank,
          std::is_same_v<Layout, Kokkos::LayoutRight> ? MemoryLayout::right : MemoryLayout::left,
          Kokkos::SpaceAccessibility<Space, Kokkos::HostSpace>::accessible,
          Space::name()};
}

template <class DataType, class Layout, class Space>
ParameterView<DataType, Layout, Space> make_view(const RawView& raw) {
  using Value = typename DataTypeTraits<DataType>::value_type;
  const auto& e = raw.extents;
  Layout layout;
  for (int i = 0; i < DataTypeTraits<DataType>::rank; ++i) layout.dimension[i] = e[i];
  return ParameterView<DataType, Layout, Space>(static_cast<Value*>(raw.data), layout);
}

}  // namespace detail

/// One number that the engine owns, in the memory that holds its state.
template <class T, class Space = Kokkos::DefaultExecutionSpace::memory_space>
using ScalarView = Kokkos::View<T, Space, Kokkos::MemoryTraits<Kokkos::Unmanaged>>;

/// How long a gathered unit is wanted.
enum class Keep : std::uint8_t {
  no,   ///< its slot may be reused as soon as the lease ends
  yes,  ///< the same unit is gathered again at once: do not give its slot away
};

/// What a gradient scope finds in its slot.
enum class GradientMode : std::uint8_t {
  add,        ///< zeros: kernels add
  overwrite,  ///< anything: the caller writes every element of every parameter; only gaps are
              ///< cleared
};

/// The right to read a gathered unit. Views are valid until `end()` or destruction, which waits for
/// nothing on the host: the slot is reused after the work of every instance that the lease was used
/// on. Move-only. One that is destroyed by an exception marks the engine failed.
class Lease {
 public:
  Lease(Lease&& other) noexcept;
  Lease& operator=(Lease&&) = delete;
  Lease(const Lease&) = delete;
  ~Lease();

  /// The parameter as a read-only view of its own shape, e.g. `lease.view<const float**>(weight)`,
  /// for kernels of the lease's instances. Local; no copy; does not block.
  /// \tparam DataType  const element type and one `*` per extent
  /// \tparam Space     of the engine's memory: the default execution space's, or Kokkos::HostSpace
  /// \throws ArgumentError if dtype, rank, layout, space or unit do not fit; StateError after the
  /// end
  template <class DataType, class Layout = Kokkos::LayoutRight,
            class Space = Kokkos::DefaultExecutionSpace::memory_space>
  [[nodiscard]] auto view(ParameterId parameter) const {
    static_assert(std::is_const_v<typename detail::DataTypeTraits<DataType>::value_type>,
                  "gathered parameters are read-only: write const");
    return detail::make_view<DataType, Layout, Space>(
        raw(detail::view_request<DataType, Layout, Space>(parameter)));
  }

  /// Says that kernels of another instance read the views too, which they may from now on. Local.
  void also_on(const Execution& exec);
  /// Ends the lease now. Local; does not block.
  void end();

 private:
  friend class Engine;
  Lease(detail::EngineState& engine, UnitId unit, const Execution& exec);
  [[nodiscard]] detail::RawView raw(const detail::ViewRequest& request) const;

  detail::EngineState* engine_;
  UnitId unit_;
  std::vector<Execution> users_;
  int exceptions_;  // in flight when the lease began
};

/// The right to add to a unit's gradient. Ends with `reduce()`, or with `defer()` if another scope
/// of the unit follows in this micro-step; hop 1 starts once, when the last open scope reduces.
/// Scopes of one unit may nest (tied weights). Destroyed without either, it marks the engine failed
/// and the other ranks learn of it. Move-only.
class GradientScope {
 public:
  GradientScope(GradientScope&& other) noexcept;
  GradientScope& operator=(GradientScope&&) = delete;
  GradientScope(const GradientScope&) = delete;
  ~GradientScope();

  /// The parameter's gradient, e.g. `scope.view<float**>(weight)`, in the gradient dtype (the
  /// parameter's, unless the configuration sets another) and the parameter's shape. That of a
  /// complex parameter is d(loss)/d(real) + i d(loss)/d(imaginary). Local; no copy.
  /// \throws as Lease::view, and ArgumentError for a frozen parameter
  template <class DataType, class Layout = Kokkos::LayoutRight,
            class Space = Kokkos::DefaultExecutionSpace::memory_space>
  [[nodiscard]] auto view(ParameterId parameter) const {
    return detail::make_view<DataType, Layout, Space>(
        raw(detail::view_request<DataType, Layout, Space>(parameter)));
  }

  void also_on(const Execution& exec);
  /// Adds the slot to the local shard's accumulator over the shard group, after all work of the
  /// scope's instances, once no other scope of the unit is open.
  /// Collective over the shard group (and the replica group in the last micro-step).
  void reduce();
  /// Ends the scope and leaves its sums in the slot for a later scope of the unit. Local.
  void defer();

 private:
  friend class Engine;
  GradientScope(detail::EngineState& engine, UnitId unit, const Execution& exec);
  [[nodiscard]] detail::RawView raw(const detail::ViewRequest& request) const;

  detail::EngineState* engine_;
  UnitId unit_;
  std::vector<Execution> users_;
};

/// What this rank brings to a micro-step.
struct MicroStep {
  std::int64_t samples = 0;  ///< of this rank; 0 is fine, ranks may differ
  bool last = true;          ///< the last one before `step()`
};

/// What one step did; the same on every rank.
struct StepResult {
  std::int64_t step = 0;     ///< optimizer steps taken, this one included unless skipped
  std::int64_t samples = 0;  ///< of all ranks and micro-steps
  double loss = 0;           ///< sum of `Engine::loss()` over ranks / samples
  double gradient_norm = 0;  ///< 2-norm of the mean gradient before clipping
  double learning_rate = 0;
  double loss_scale = 1;  ///< of this step's gradients
  bool skipped = false;   ///< the state was left as it was: non-finite norm, or no samples
  bool overflow = false;  ///< a gradient was not finite
  std::vector<std::string> untouched;  ///< buffers that no rank contributed to: left as they were
};

namespace detail {

/// A step's result, there or on its way.
class StepOutcome {
 public:
  virtual ~StepOutcome() = default;
  [[nodiscard]] virtual bool ready() = 0;
  [[nodiscard]] virtual const StepResult& get() = 0;
};

}  // namespace detail

/// Names a step whose result can be read without waiting for it. It may outlive the engine if it
/// was ready before.
class StepHandle {
 public:
  /// True if `get()` would not wait. Local.
  [[nodiscard]] bool ready() const { return outcome_->ready(); }
  /// The result; blocks the host until the step is done. Local.
  /// \throws StateError if gradients were not finite at the lowest loss scale, where that was not
  /// known when `step()` returned; CommError if a rank failed meanwhile
  [[nodiscard]] const StepResult& get() const { return outcome_->get(); }

 private:
  friend class Engine;
  explicit StepHandle(std::shared_ptr<detail::StepOutcome> outcome)
      : outcome_(std::move(outcome)) {}
  std::shared_ptr<detail::StepOutcome> outcome_;
};

/// Trains a model whose state is sharded over the ranks of a communicator.
///
/// A step, the same sequence of calls on every rank of a shard group (ranks with 0 samples too):
///
///   engine.begin_micro_step({.samples = n, .last = true});
///   {
///     auto lease = engine.gather(layer);
///     auto w = lease.view<const float**>(weight);    // forward kernels read w
///   }
///   {
///     auto lease = engine.gather(layer);
///     auto scope = engine.gradient(layer);
///     auto dw = scope.view<float**>(weight);         // backward kernels add to dw
///     scope.reduce();
///   }
///   auto result = engine.step();
///
/// The application writes d(loss_scale * sum of the loss over its samples); the engine divides by
/// the number of samples of all ranks. Not thread-safe: one thread calls an engine.
///
/// With `Config::forward_only` an engine holds weights alone: load(), then begin_evaluation() and
/// gather(); micro-steps, gradients, steps and saves are StateErrors.
///
/// Failures that ranks agree on throw the same error on every rank; after a CommError the engine is
/// dead (every call throws) and may only be destroyed, while the application goes on.
class Engine {
 public:
  /// Lays out, allocates and initializes the state. Collective over `comm`, which may hold any
  /// subset of the application's ranks and is left as it is; blocks.
  /// \param exec  instance on which the application's kernels run by default; if left out, the
  ///              default instance of the space that computes where the state lives
  /// \throws ConfigError, ArgumentError on every rank alike: p that does not fit, a plan over the
  ///         memory budget, configurations or models that differ between ranks
  Engine(MPI_Comm comm, const Model& model, const Config& config, const Execution& exec = {},
         LogSink log = {});
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) = delete;
  Engine(const Engine&) = delete;
  /// Collective over the communicator unless the engine failed (it frees communicators). With NCCL
  /// it waits for all ranks, at most the time limit.
  ~Engine();

  /// Opens a micro-step. Ends the one before. Collective over the shard group if small parameters
  /// are persistent, else local.
  void begin_micro_step(const MicroStep& micro_step);
  /// Opens a pass that only gathers. Ends the one before. Its order of units is remembered apart
  /// from training's. Local.
  void begin_evaluation();

  /// Gathers a unit. Collective over the shard group; later work of `exec` sees the parameters.
  /// Cost: one all-gather per buffer, none if the unit is still in a slot or was prefetched.
  /// \throws StateError if all slots hold open leases, naming them
  [[nodiscard]] Lease gather(UnitId unit, Keep keep = Keep::no);
  [[nodiscard]] Lease gather(UnitId unit, const Execution& exec, Keep keep = Keep::no);

  /// Opens a scope on the unit's gradient. Collective over the shard group by its `reduce()`.
  /// \throws StateError outside a micro-step, if the unit was reduced in it, without a free slot,
  /// or
  ///         in an engine that is forward only
  [[nodiscard]] GradientScope gradient(UnitId unit, GradientMode mode = GradientMode::add);
  [[nodiscard]] GradientScope gradient(UnitId unit, const Execution& exec,
                                       GradientMode mode = GradientMode::add);

  /// Reduces over the replicas what is not reduced yet, clips, updates or skips, and writes the
  /// parameters. Collective over all ranks; blocks with the MPI transport. With NCCL it enqueues
  /// the step on the engine's instance and waits only for the step before the last. \throws
  /// StateError if the last micro-step was not announced, a lease or scope is open, a scope is
  /// deferred, or gradients are not finite at the lowest loss scale (the state is then as it was,
  /// and the engine goes on); CommError if replicas differ and are not to be repaired
  StepHandle step();

  /// Where the application adds the sum of its samples' losses in a micro-step, on a device by
  /// kernels of the engine's instance. Local. \throws ArgumentError for a space of other memory
  template <class Space = Kokkos::DefaultExecutionSpace::memory_space>
  [[nodiscard]] ScalarView<double, Space> loss() const {
    return ScalarView<double, Space>(loss_in(in_host_memory<Space>, Space::name()));
  }
  /// The factor that the application puts on its loss. As loss().
  template <class Space = Kokkos::DefaultExecutionSpace::memory_space>
  [[nodiscard]] ScalarView<const double, Space> loss_scale() const {
    return ScalarView<const double, Space>(loss_scale_in(in_host_memory<Space>, Space::name()));
  }

  /// Learning rates of the coming steps, entry i for step i from the beginning; the last one stays.
  /// They replace the configuration's schedule. The same on every rank. Local.
  /// \throws ConfigError for an empty table or a value that is not finite or negative
  void set_learning_rates(std::span<const double> table);

  /// Tells the other order recorded in the first pass beforehand: units in the order of `gather`
  /// calls of one micro-step. Collective over the shard group by the check that all agree.
  void declare_order(std::span<const UnitId> order);

  /// Sums values over all ranks in a fixed order: the same bits on every rank. Collective; blocks.
  void sum(std::span<double> values);

  /// Copies one array of a parameter, in row-major order and as fp64, to `values` on every rank:
  /// "master_weights", "compute" (what leases show) or a state of the optimizer such as "exp_avg";
  /// a frozen parameter has only its compute values. Collective over the shard group; blocks. For
  /// tests and small tools: it needs the memory of the parameter. `values` has the spec's
  /// scalars(): a complex element is its real part, then its imaginary one.
  void read(ParameterId parameter, std::span<double> values,
            std::string_view array = "master_weights");

  /// Makes `directory` the one that this engine saves to, as its first save would: makes it, keeps
  /// other jobs out and clears what a job that was killed left there. To be called at the start, so
  /// that a directory that will not do is known before there is something to lose. Collective over
  /// all ranks, between steps; blocks.
  /// \throws on every rank alike: StateError if another job saves there; IoError if it cannot be
  ///         made or written to
  void claim_directory(const std::string& directory);

  /// Saves the whole state as `directory`/step-<n>: every rank writes its share of its shard, then
  /// the step is committed at once or not at all. To be called between steps, without an open
  /// lease. Collective over all ranks, whose calls ask for the same; blocks until the step
  /// is durable or, asynchronously, until what this rank writes is copied. One job saves to a
  /// directory at a time. An asynchronous save is committed by poll_save() or wait_for_save(); an
  /// engine that ends before gives it up, and earlier steps stay.
  /// Format: lib/mics/checkpoint/FORMAT.md.
  /// \throws on every rank alike: IoError if a rank could not write (earlier steps are as they
  ///         were, and the engine goes on); FormatError if replicas differ, naming shard and ranks;
  ///         StateError within a micro-step, or while another save is under way; ArgumentError if
  ///         the ranks' directories, requests or blobs differ
  void save(const std::string& directory, const SaveRequest& request = {});

  /// Takes an asynchronous save further without waiting for disks; tells `committed` or `failed`
  /// once. To be called once a step. Collective over all ranks.
  checkpoint::SaveProgress poll_save();
  /// Blocks until the save under way is committed. Collective over all ranks. \throws as save()
  checkpoint::SaveProgress wait_for_save();

  /// Replaces the state by a saved one, in whatever layout, preset and dtypes it was saved: the
  /// newest step that verifies, or the one asked for. A damaged step costs a warning, and the next
  /// older one is taken. To be called between steps, or between the passes of an engine that is
  /// forward only, where a newer step replaces the weights in place. Collective over all ranks;
  /// blocks.
  /// \return nothing if the directory holds no step and none was asked for: the state is as it was
  /// \throws on every rank alike: FormatError if model or optimizer are others (the state is as it
  /// was) or
  ///         every step is damaged (the state is then undefined until a load succeeds), IoError;
  ///         ArgumentError if the ranks ask for different ones
  std::optional<LoadResult> load(const std::string& directory, const LoadRequest& request = {});

  /// Finishes everything that mics has under way; nothing is in flight until the next call, so that
  /// the application may communicate on the same devices. Local; blocks the host.
  void quiet(const Execution& exec);

  /// Tells all ranks that this one cannot go on; their next waits throw CommError with this text.
  /// Local; does not block. The engine is dead afterwards.
  void fail(std::string_view text) noexcept;

  /// Runs `action`; if it throws, tells the other ranks the exception's text and rethrows.
  template <class Action>
  decltype(auto) guard(Action&& action) {
    try {
      return std::forward<Action>(action)();
    } catch (const std::exception& error) {
      fail(error.what());
      throw;
    } catch (...) {
      fail("an exception that is no std::exception");
      throw;
    }
  }

  /// False after a failure of this or another rank that this rank knows of. Local.
  [[nodiscard]] bool alive() const;
  /// The rank that failed first; -1 if none is known. Local.
  [[nodiscard]] int failed_rank() const;

  [[nodiscard]] const Plan& plan() const;
  [[nodiscard]] const Model& model() const;
  [[nodiscard]] const Config& config() const;
  /// Collectives of this rank so far. Local.
  [[nodiscard]] const comm::OperationLog& operations() const;
  /// This rank's number and the number of ranks of the engine. Local.
  [[nodiscard]] int rank() const;
  [[nodiscard]] int size() const;
  /// Bytes of the arena, equal to the plan's. Local.
  [[nodiscard]] std::int64_t arena_bytes() const;

 private:
  template <class Space>
  static constexpr bool in_host_memory =
      Kokkos::SpaceAccessibility<Space, Kokkos::HostSpace>::accessible;
  [[nodiscard]] double* loss_in(bool host, std::string_view space) const;
  [[nodiscard]] const double* loss_scale_in(bool host, std::string_view space) const;

  std::unique_ptr<detail::EngineState> state_;
};

}  // namespace mics
