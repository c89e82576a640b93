// SPDX-License-Identifier: Apache-2.0
// Random sequences of calls, right and wrong ones, against a model of what the engine promises.
//
// All ranks draw the same sequence, from MICS_FUZZ_SEED on (default 1), MICS_FUZZ_SEQUENCES of them
// (default 800). A failing one prints its seed and its calls; MICS_FUZZ_SEED=<seed>
// MICS_FUZZ_SEQUENCES=1 repeats it.
#include "communicator_count.hpp"
#include "toy.hpp"
#include <mics/mics.hpp>

#include <gtest/gtest.h>
#include <mpi.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <list>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace mics::test {
namespace {

std::uint64_t from_environment(const char* name, std::uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

/// Numbers below a bound, the same on every rank and every standard library.
class Dice {
 public:
  explicit Dice(std::uint64_t seed) : engine_(seed) {}
  int below(int bound) { return static_cast<int>(engine_() % static_cast<std::uint64_t>(bound)); }
  bool one_in(int n) { return below(n) == 0; }

 private:
  std::mt19937_64 engine_;
};

enum class Thrown { nothing, argument, config, state, comm, other };

const char* name_of(Thrown thrown) {
  constexpr const char* names[] = {"nothing",    "ArgumentError", "ConfigError",
                                   "StateError", "CommError",     "another exception"};
  return names[static_cast<int>(thrown)];
}

// -- the model that is trained

/// Each weight element i has gradient share(i) times what a scope adds, so that a parameter is
/// known by one number.
double share(std::int64_t i) { return 1.0 + static_cast<double>(i % 3); }
double initial(int parameter, std::int64_t i) {
  return static_cast<double>((i * 5 + parameter * 11) % 97) / 4;
}

constexpr int units = 6;

struct Parameter {
  ParameterId id;
  int unit = 0;
  std::int64_t count = 0;
  bool trainable = true;
  bool small = false;  // persistent where the configuration has a threshold
};

/// a: one weight. b: weight and bias. c: weight, bias, frozen. d: bias and frozen. e: bias only.
/// f: frozen only.
struct Subject {
  Model model;
  std::vector<UnitId> unit;
  std::vector<Parameter> parameters;

  Subject() {
    for (int u = 0; u < units; ++u) unit.push_back(model.unit(std::string(1, "abcdef"[u])));
    const auto add = [&](int u, const char* name, std::int64_t count, bool trainable) {
      const auto number = static_cast<int>(parameters.size());
      const ParameterId id = model.parameter(
          unit[static_cast<std::size_t>(u)], name, {count},
          {.init = Init::function([=](std::int64_t i) { return initial(number, i); }),
           .trainable = trainable});
      parameters.push_back({id, u, count, trainable, count <= 5});
    };
    add(0, "weight", 301, true);
    add(1, "weight", 90, true);
    add(1, "bias", 5, true);
    add(2, "weight", 513, true);
    add(2, "bias", 3, true);
    add(2, "frozen", 70, false);
    add(3, "bias", 4, true);
    add(3, "frozen", 33, false);
    add(4, "bias", 5, true);
    add(5, "frozen", 140, false);
  }
};

// -- what the engine promises, told without its means

enum class Phase { idle, micro_step, evaluation };

struct UnitState {
  bool needs_slot = false;           // has something that is not gathered all the time
  bool needs_gradient_slot = false;  // has something trainable that is not persistent
  int leases = 0;
  int scopes = 0;
  bool deferred = false;
  bool reduced = false;
  [[nodiscard]] bool holds_sums() const { return scopes > 0 || deferred; }
};

struct ParameterState {
  bool persistent = false;
  double change = 0;         // value = initial - change * share
  double local = 0;          // this rank's gradient in the slot, over share
  double all = 0;            // the same summed over ranks
  double sum = 0;            // of this step, all ranks
  bool touched = false;      // persistent: a scope of this micro-step was on its unit
  bool contributed = false;  // in this step
  bool poisoned = false;     // a gradient of this step is not finite
  bool slot_poisoned = false;
};

/// One sequence on one engine.
class Sequence {
 public:
  Sequence(std::uint64_t seed, const Subject& subject) : dice_(seed), subject_(subject) {
    configure();
    engine_ = std::make_unique<Engine>(MPI_COMM_WORLD, subject.model, config_);
    set_up();
  }

  /// The calls so far.
  [[nodiscard]] const std::string& trace() const { return trace_; }
  [[nodiscard]] bool failed() const { return failed_; }
  /// Whether communicators are left behind, which is allowed after a failure only.
  [[nodiscard]] bool died() const { return died_; }

  void run() {
    const std::int64_t bytes = engine_->arena_bytes();
    const int calls = 20 + dice_.below(60);
    for (int i = 0; i < calls && !failed_ && !died_; ++i) draw();
    if (!failed_ && !died_ && job_size() > 1 && dice_.one_in(25)) die();
    if (!failed_ && !died_) finish();
    expect(engine_->arena_bytes() == bytes, "the arena has changed its size");
    expect(engine_->arena_bytes() == engine_->plan().memory().arena, "the plan's arena is another");
    leases_.clear();
    scopes_.clear();
    engine_.reset();
  }

 private:
  struct OpenLease {
    int unit = 0;
    std::optional<Lease> lease;
  };
  struct OpenScope {
    int unit = 0;
    std::optional<HostScope> scope;
  };

  // -- the configuration

  void configure() {
    config_ = toy_config();
    config_.seed = 7;
    config_.timeout = 20;
    const int ranks = job_size();
    switch (dice_.below(5)) {
      case 0:
        config_.preset = Preset::ddp;
        break;
      case 1:
        config_.preset = Preset::zero2;
        break;
      case 2:
        config_.preset = Preset::mics;
        config_.shard_size = ranks % 2 == 0 ? ranks / 2 : ranks;
        break;
      default:
        if (ranks == 4 && dice_.one_in(2)) config_.ranks_per_node = 2;  // two stages
        break;
    }
    config_.slots = 1 + dice_.below(3);
    if (dice_.one_in(2)) config_.prefetch = dice_.below(config_.slots);
    if (dice_.one_in(2)) config_.persistence_threshold = 5;
    config_.debug = dice_.one_in(4);
    if (dice_.one_in(3)) config_.accumulate = DType::fp64;
    trace_ += std::string(name(config_.preset)) + " p=" + std::to_string(config_.shard_size) +
              " slots=" + std::to_string(config_.slots) +
              " prefetch=" + (config_.prefetch ? std::to_string(*config_.prefetch) : "default") +
              " threshold=" + std::to_string(config_.persistence_threshold) +
              (config_.debug ? " debug" : "") + "\n";
  }

  void set_up() {
    const int p = engine_->plan().layout().shard_size();
    const bool gathered = p == 1 || config_.preset == Preset::zero2;
    unit_.resize(units);
    for (const Parameter& parameter : subject_.parameters) {
      ParameterState& here = state_.emplace_back();
      here.persistent = parameter.small && config_.persistence_threshold > 0;
      UnitState& unit = unit_[static_cast<std::size_t>(parameter.unit)];
      if (!here.persistent && !gathered) unit.needs_slot = true;
      if (!here.persistent && parameter.trainable) unit.needs_gradient_slot = true;
    }
  }

  // -- calls and checks

  void expect(bool right, const std::string& what) {
    if (right || failed_) return;
    failed_ = true;
    ADD_FAILURE() << what << "\nafter\n" << trace_;
  }

  void note(const std::string& line) { trace_ += "  " + line + "\n"; }

  template <class Action>
  static Thrown thrown_by(Action&& action, std::string& text) {
    try {
      action();
      return Thrown::nothing;
    } catch (const ArgumentError& error) {
      text = error.what();
      return Thrown::argument;
    } catch (const ConfigError& error) {
      text = error.what();
      return Thrown::config;
    } catch (const StateError& error) {
      text = error.what();
      return Thrown::state;
    } catch (const CommError& error) {
      text = error.what();
      return Thrown::comm;
    } catch (const std::exception& error) {
      text = error.what();
      return Thrown::other;
    }
  }

  /// Makes a call that must throw just this. True if it threw nothing. A call that is refused
  /// communicates nothing and leaves no trace, so that only some ranks may make it.
  template <class Action>
  bool call(const std::string& line, Thrown expected, Action&& action) {
    note(line + (expected == Thrown::nothing ? "" : std::string(" -> ") + name_of(expected)));
    if (expected != Thrown::nothing && dice_.one_in(2) && dice_.below(job_size()) != job_rank()) {
      // The same draws on all ranks, whoever makes the call.
      return false;
    }
    std::string text;
    const Thrown thrown = thrown_by(action, text);
    expect(thrown == expected, std::string("expected ") + name_of(expected) + ", found " +
                                   name_of(thrown) + " " + text);
    expect(engine_->alive(), "the engine died of a call that it may refuse");
    return thrown == Thrown::nothing;
  }

  [[nodiscard]] UnitState& unit(int u) { return unit_[static_cast<std::size_t>(u)]; }
  [[nodiscard]] UnitId id(int u) const { return subject_.unit[static_cast<std::size_t>(u)]; }
  static std::string letter(int u) { return std::string(1, "abcdef"[u]); }

  // What rank `rank` adds in the n-th scope: small integers.
  static double amount(int rank, int n) { return (rank * 3 + n * 5) % 7 - 3; }

  [[nodiscard]] float value(std::size_t k, std::int64_t i) const {
    return static_cast<float>(initial(static_cast<int>(k), i) - state_[k].change * share(i));
  }

  void check_lease(const OpenLease& open) {
    for (std::size_t k = 0; k < state_.size(); ++k) {
      const Parameter& parameter = subject_.parameters[k];
      if (parameter.unit != open.unit) continue;
      const auto view = host_view<const float*>(*open.lease, parameter.id);
      for (std::int64_t i = 0; i < parameter.count; ++i) {
        if (view(i) == value(k, i)) continue;
        expect(false, "lease of " + letter(open.unit) + ", element " + std::to_string(i) + " of " +
                          subject_.model.spec(parameter.id).name + ": expected " +
                          std::to_string(value(k, i)) + ", found " + std::to_string(view(i)));
        return;
      }
    }
  }

  void draw() {
    switch (dice_.below(20)) {
      case 0:
      case 1:
      case 2:
        begin_micro_step();
        break;
      case 3:
      case 4:
      case 5:
      case 6:
        gather();
        break;
      case 7:
      case 8:
      case 9:
        end_lease();
        break;
      case 10:
      case 11:
      case 12:
        open_scope();
        break;
      case 13:
      case 14:
      case 15:
        close_scope();
        break;
      case 16:
        step();
        break;
      case 17:
        whole_backward();
        break;
      case 18:
        misuse();
        break;
      default:
        service();
        break;
    }
  }

  // -- passes

  void begin_micro_step() {
    if (dice_.one_in(6)) {
      const Thrown expected = phase_ == Phase::micro_step ? Thrown::state : Thrown::nothing;
      if (call("begin_evaluation", expected, [&] { engine_->begin_evaluation(); })) {
        phase_ = Phase::evaluation;
      }
      return;
    }
    const bool last = dice_.one_in(2);
    const bool none = dice_.one_in(8);
    // Each rank another number; the last micro-step makes the sum a power of two, so that the mean
    // is exact.
    std::vector<std::int64_t> samples(static_cast<std::size_t>(job_size()));
    std::int64_t sum = samples_;
    for (std::int64_t& mine : samples) {
      mine = none ? 0 : dice_.below(3);
      sum += mine;
    }
    std::int64_t whole = 1;
    while (whole < sum) whole *= 2;
    if (last && sum > 0) samples[0] += whole - sum;
    Thrown expected = Thrown::nothing;
    if (last_announced_ || holds_sums()) expected = Thrown::state;
    if (call(std::string("begin_micro_step") + (last ? " last" : ""), expected, [&] {
          engine_->begin_micro_step(
              {.samples = samples[static_cast<std::size_t>(job_rank())], .last = last});
        })) {
      end_micro_step();
      phase_ = Phase::micro_step;
      last_announced_ = last;
      for (const std::int64_t each : samples) samples_ += each;
    }
  }

  [[nodiscard]] bool holds_sums() const {
    return phase_ == Phase::micro_step &&
           std::any_of(unit_.begin(), unit_.end(),
                       [](const UnitState& u) { return u.holds_sums(); });
  }

  void reduce_parameter(std::size_t k) {
    ParameterState& here = state_[k];
    here.sum += here.all;
    here.poisoned = here.poisoned || here.slot_poisoned;
    here.contributed = true;
    here.local = here.all = 0;
    here.slot_poisoned = here.touched = false;
  }

  void end_micro_step() {
    if (phase_ != Phase::micro_step) return;
    for (UnitState& here : unit_) here.reduced = false;
    for (std::size_t k = 0; k < state_.size(); ++k) {
      if (state_[k].touched) reduce_parameter(k);
    }
  }

  // -- leases

  void gather(int u = -1) {
    if (u < 0) u = dice_.below(units);
    const Keep keep = dice_.one_in(4) ? Keep::yes : Keep::no;
    const auto holding = std::count_if(unit_.begin(), unit_.end(), [](const UnitState& other) {
      return other.needs_slot && other.leases > 0;
    });
    const bool full = unit(u).needs_slot && unit(u).leases == 0 && holding >= config_.slots;
    std::optional<Lease> lease;
    if (call("gather " + letter(u) + (keep == Keep::yes ? " keep" : ""),
             full ? Thrown::state : Thrown::nothing,
             [&] { lease.emplace(engine_->gather(id(u), keep)); })) {
      ++unit(u).leases;
      OpenLease& open = leases_.emplace_back();
      open.unit = u;
      open.lease.emplace(std::move(*lease));
      check_lease(open);
    }
  }

  void end_lease() {
    if (leases_.empty()) return;
    const auto here = std::next(leases_.begin(), dice_.below(static_cast<int>(leases_.size())));
    OpenLease& open = *here;
    check_lease(open);
    const int how = dice_.below(4);
    const int u = open.unit;
    note("end lease of " + letter(u) + " way " + std::to_string(how));
    if (how == 1) open.lease->also_on(Execution());
    if (how == 2) {
      open.lease->end();
      std::string text;
      const Thrown thrown = thrown_by(
          [&] {
            for (const Parameter& p : subject_.parameters) {
              if (p.unit == u) (void)open.lease->view<const float*>(p.id);
            }
          },
          text);
      expect(thrown == Thrown::state, "an ended lease gives a view");
    }
    if (how == 3) {
      Lease moved = std::move(*open.lease);
      moved.end();
      moved.end();
    }
    leases_.erase(here);
    --unit(u).leases;
  }

  // -- scopes

  void open_scope(int u = -1) {
    if (u < 0) u = dice_.below(units);
    UnitState& here = unit(u);
    const GradientMode mode = dice_.one_in(4) ? GradientMode::overwrite : GradientMode::add;
    const auto taken = std::count_if(unit_.begin(), unit_.end(), [](const UnitState& other) {
      return other.needs_gradient_slot && other.holds_sums();
    });
    Thrown expected = Thrown::nothing;
    if (phase_ != Phase::micro_step || here.reduced) expected = Thrown::state;
    if (here.holds_sums() && mode == GradientMode::overwrite) expected = Thrown::state;
    if (here.needs_gradient_slot && !here.holds_sums() && taken >= config_.slots) {
      expected = Thrown::state;
    }
    std::optional<HostScope> scope;
    if (!call("gradient " + letter(u) + (mode == GradientMode::overwrite ? " overwrite" : ""),
              expected, [&] { scope.emplace(engine_->gradient(id(u), mode)); })) {
      return;
    }
    ++here.scopes;
    write_gradients(u, *scope, mode);
    OpenScope& open = scopes_.emplace_back();
    open.unit = u;
    open.scope.emplace(std::move(*scope));
  }

  void write_gradients(int u, HostScope& scope, GradientMode mode) {
    const int n = ++scope_count_;
    const int poisoner = dice_.one_in(40) ? dice_.below(job_size()) : -1;
    if (poisoner >= 0) note("rank " + std::to_string(poisoner) + " writes an infinity");
    for (std::size_t k = 0; k < state_.size(); ++k) {
      const Parameter& parameter = subject_.parameters[k];
      if (parameter.unit != u) continue;
      if (!parameter.trainable) {
        std::string text;
        expect(thrown_by([&] { (void)scope.view<float*>(parameter.id); }, text) == Thrown::argument,
               "the gradient of a frozen parameter");
        continue;
      }
      ParameterState& here = state_[k];
      const double mine = amount(job_rank(), n);
      const auto view = scope.view<float*>(parameter.id);
      for (std::int64_t i = 0; i < parameter.count; ++i) {
        const auto add = static_cast<float>(mine * share(i));
        if (mode == GradientMode::overwrite) {
          view(i) = add;
          continue;
        }
        const auto before = static_cast<float>(here.local * share(i));
        if (view(i) != before && !here.slot_poisoned) {
          expect(false, "gradient slot of " + letter(u) + ": expected " + std::to_string(before) +
                            ", found " + std::to_string(view(i)));
        }
        view(i) += add;
      }
      if (poisoner == job_rank())
        view(parameter.count / 2) = std::numeric_limits<float>::infinity();
      here.local += mine;
      for (int r = 0; r < job_size(); ++r) here.all += amount(r, n);
      here.slot_poisoned = here.slot_poisoned || poisoner >= 0;
      here.touched = here.touched || here.persistent;
    }
    scope.store();  // other scopes of the unit read it and add to it
  }

  void close_scope(bool by_reduce = false) {
    if (scopes_.empty()) return;
    const int last = static_cast<int>(scopes_.size()) - 1;
    const auto at = std::next(scopes_.begin(), by_reduce ? last : dice_.below(last + 1));
    OpenScope& open = *at;
    const int u = open.unit;
    UnitState& here = unit(u);
    const bool reduce = by_reduce || !dice_.one_in(4);
    if (dice_.one_in(6)) open.scope->also_on(Execution());
    if (!call((reduce ? "reduce " : "defer ") + letter(u), Thrown::nothing,
              [&] { reduce ? open.scope->reduce() : open.scope->defer(); })) {
      return;
    }
    --here.scopes;
    here.deferred = here.deferred || !reduce;
    if (reduce && here.scopes == 0) {
      here.deferred = false;
      here.reduced = true;
      for (std::size_t k = 0; k < state_.size(); ++k) {
        const Parameter& parameter = subject_.parameters[k];
        if (parameter.unit == u && parameter.trainable && !state_[k].persistent) {
          reduce_parameter(k);
        }
      }
    }
    if (dice_.one_in(4)) {
      call("once more", Thrown::state, [&] { open.scope->reduce(); });
      call("once more", Thrown::state, [&] { open.scope->defer(); });
      call("a view", Thrown::state, [&] { (void)open.scope->view<float*>({0}); });
    }
    scopes_.erase(at);
  }

  /// What most applications do: units in one order, each gathered and reduced.
  void whole_backward() {
    if (phase_ != Phase::micro_step) begin_micro_step();
    const bool forwards = dice_.one_in(2);
    for (int i = 0; i < units && !failed_; ++i) {
      const int u = forwards ? i : units - 1 - i;
      gather(u);
      const std::size_t before = scopes_.size();
      open_scope(u);
      if (scopes_.size() > before) close_scope(true);
      if (!leases_.empty()) end_lease();
    }
  }

  // -- steps

  void step() {
    Thrown expected = Thrown::nothing;
    if (phase_ != Phase::micro_step || !last_announced_ || holds_sums() || !leases_.empty()) {
      expected = Thrown::state;
    }
    add_loss(*engine_, 0.5 * job_rank());
    loss_ += 0.25 * job_size() * (job_size() - 1);
    std::optional<StepResult> result;
    if (!call("step", expected, [&] { result = engine_->step().get(); })) return;
    end_micro_step();
    phase_ = Phase::idle;
    last_announced_ = false;

    double squares = 0;
    bool finite = true;
    std::size_t untouched = 0;
    bool persistent = false;
    bool persistent_contributed = false;
    for (std::size_t k = 0; k < state_.size(); ++k) {
      const Parameter& parameter = subject_.parameters[k];
      const ParameterState& here = state_[k];
      if (!parameter.trainable) continue;
      finite = finite && !here.poisoned;
      for (std::int64_t i = 0; i < parameter.count; ++i) {
        squares += here.sum * share(i) * here.sum * share(i);
      }
      if (here.persistent) {
        persistent = true;
        persistent_contributed = persistent_contributed || here.contributed;
      }
    }
    // A buffer for the trainable parameters of each unit that are not persistent, one for those.
    for (int u = 0; u < units; ++u) {
      bool has = false;
      bool contributed = false;
      for (std::size_t k = 0; k < state_.size(); ++k) {
        const Parameter& parameter = subject_.parameters[k];
        if (parameter.unit != u || !parameter.trainable || state_[k].persistent) continue;
        has = true;
        contributed = contributed || state_[k].contributed;
      }
      if (has && !contributed) ++untouched;
    }
    if (persistent && !persistent_contributed) ++untouched;
    const bool skipped = samples_ == 0 || !finite;
    expect(result->skipped == skipped, "skipped: expected " + std::to_string(skipped));
    expect(result->overflow == !finite, "overflow: expected " + std::to_string(!finite));
    expect(result->samples == samples_, "samples: expected " + std::to_string(samples_));
    expect(result->untouched.size() == untouched, "untouched: expected " +
                                                      std::to_string(untouched) + ", found " +
                                                      std::to_string(result->untouched.size()));
    if (samples_ > 0) {
      const auto samples = static_cast<double>(samples_);
      expect(result->loss == loss_ / samples, "loss: expected " + std::to_string(loss_ / samples) +
                                                  ", found " + std::to_string(result->loss));
      if (finite) {
        const double norm = std::sqrt(squares) / samples;
        expect(std::abs(result->gradient_norm - norm) <= 1e-12 * norm,
               "norm: expected " + std::to_string(norm) + ", found " +
                   std::to_string(result->gradient_norm));
      }
    }
    if (!skipped) ++steps_;
    expect(result->step == steps_, "step: expected " + std::to_string(steps_));
    for (ParameterState& here : state_) {
      if (!skipped) here.change += here.sum / static_cast<double>(samples_);
      here.sum = 0;
      here.contributed = here.poisoned = false;
    }
    samples_ = 0;
    loss_ = 0;
  }

  // -- what else there is to call

  void service() {
    switch (dice_.below(5)) {
      case 0: {
        std::vector<UnitId> order;
        const int length = dice_.below(2 * units);
        for (int i = 0; i < length; ++i) order.push_back(id(dice_.below(units)));
        call("declare_order of " + std::to_string(length),
             phase_ == Phase::idle ? Thrown::nothing : Thrown::state,
             [&] { engine_->declare_order(order); });
        return;
      }
      case 1: {
        std::vector<double> values{1.0 * job_rank(), 2.0};
        call("sum", Thrown::nothing, [&] { engine_->sum(values); });
        expect(values[0] == job_size() * (job_size() - 1) / 2.0 && values[1] == 2.0 * job_size(),
               "a wrong sum");
        return;
      }
      case 2:
        call("quiet", Thrown::nothing, [&] { engine_->quiet(Execution()); });
        return;
      case 3:
        for (const OpenLease& open : leases_) check_lease(open);
        return;
      default:
        check_parameter(static_cast<std::size_t>(dice_.below(static_cast<int>(state_.size()))));
        return;
    }
  }

  void check_parameter(std::size_t k) {
    const Parameter& parameter = subject_.parameters[k];
    std::vector<double> values(static_cast<std::size_t>(parameter.count));
    for (const char* array : {"master_weights", "compute"}) {
      if (!call(std::string("read ") + array + " " + std::to_string(k), Thrown::nothing,
                [&] { engine_->read(parameter.id, values, array); })) {
        return;
      }
      for (std::int64_t i = 0; i < parameter.count; ++i) {
        if (values[static_cast<std::size_t>(i)] == value(k, i)) continue;
        expect(false, "parameter " + std::to_string(k) + ", element " + std::to_string(i) +
                          ": expected " + std::to_string(value(k, i)) + ", found " +
                          std::to_string(values[static_cast<std::size_t>(i)]));
        return;
      }
    }
  }

  /// Calls that can never be right.
  void misuse() {
    const auto refused = [&](const char* line, Thrown expected, auto&& action) {
      call(line, expected, action);
    };
    switch (dice_.below(9)) {
      case 0:
        refused("gather 99", Thrown::argument, [&] { (void)engine_->gather({99}); });
        return;
      case 1:
        refused("gradient -1", Thrown::argument, [&] { (void)engine_->gradient({-1}); });
        return;
      case 2:
        refused("-1 samples", Thrown::argument,
                [&] { engine_->begin_micro_step({.samples = -1, .last = false}); });
        return;
      case 3:
        refused("no learning rates", Thrown::config, [&] { engine_->set_learning_rates({}); });
        return;
      case 4: {
        std::vector<double> values(2);
        refused("read of another size", Thrown::argument,
                [&] { engine_->read(subject_.parameters[0].id, values); });
        return;
      }
      case 5: {
        std::vector<double> values(301);
        refused("read of an unknown array", Thrown::argument,
                [&] { engine_->read(subject_.parameters[0].id, values, "momentum"); });
        return;
      }
      case 6: {
        const std::vector<UnitId> order{{0}, {17}};
        if (phase_ != Phase::idle) return;
        refused("order with an unknown unit", Thrown::argument,
                [&] { engine_->declare_order(order); });
        return;
      }
      default:
        if (leases_.empty()) return;
        const OpenLease& open = leases_.front();
        for (const Parameter& parameter : subject_.parameters) {
          if (parameter.unit == open.unit) {
            refused("view of another dtype", Thrown::argument,
                    [&] { (void)open.lease->view<const double*>(parameter.id); });
            refused("view of another rank", Thrown::argument,
                    [&] { (void)open.lease->view<const float**>(parameter.id); });
          } else {
            refused("view of another unit", Thrown::argument,
                    [&] { (void)open.lease->view<const float*>(parameter.id); });
          }
        }
        return;
    }
  }

  // -- ends

  /// Closes what is open, steps, and compares everything.
  void finish() {
    while (!scopes_.empty() && !failed_) close_scope(true);
    for (int u = 0; u < units && !failed_; ++u) {
      if (!unit(u).deferred) continue;
      // Opened again until its mode is one that fits.
      while (unit(u).deferred && !failed_) {
        open_scope(u);
        if (!scopes_.empty()) close_scope(true);
      }
    }
    while (!leases_.empty() && !failed_) end_lease();
    if (phase_ == Phase::micro_step && last_announced_ && !failed_) step();
    for (std::size_t k = 0; k < state_.size() && !failed_; ++k) check_parameter(k);
  }

  struct Accident : std::runtime_error {
    Accident() : std::runtime_error("negative density in cell 4711") {}
  };

  /// One rank cannot go on, or all of them: every rank ends with the same blame.
  void die() {
    const int way = dice_.below(4);
    const int rank = dice_.below(job_size());
    const bool mine = job_rank() == rank;
    note("rank " + std::to_string(rank) + " dies in way " + std::to_string(way));
    died_ = true;
    // The others may still be in the call before, which would hear of it.
    MPI_Barrier(MPI_COMM_WORLD);
    std::string text;
    const Thrown thrown = thrown_by(
        [&] {
          switch (way) {
            case 0:
              engine_->guard([&] {
                if (mine) throw Accident();
                go_on();
              });
              return;
            case 1:
              if (mine) engine_->fail("negative density in cell 4711");
              go_on();
              return;
            case 2: {
              // A scope is lost on its way out.
              if (!mine) return go_on();
              engine_->guard([&] {
                const OpenScope lost = scopes_.empty() ? OpenScope() : std::move(scopes_.back());
                throw Accident();
              });
              return;
            }
            default: {
              if (!mine) return go_on();
              engine_->guard([&] {
                std::optional<Lease> lease;
                if (!leases_.empty()) lease.emplace(std::move(*leases_.back().lease));
                throw Accident();
              });
              return;
            }
          }
        },
        text);
    const bool own = mine && way != 1;
    expect(thrown == (own ? Thrown::other : Thrown::comm),
           std::string("found ") + name_of(thrown) + " " + text);
    expect(text.find("negative density in cell 4711") != std::string::npos,
           "another text: " + text);
    expect(!engine_->alive(), "the engine lives");
    expect(engine_->failed_rank() == rank, "another rank is blamed");
    expect(thrown_by([&] { (void)engine_->gather(id(0)); }, text) == Thrown::comm,
           "a dead engine gathers");
    expect(thrown_by([&] { engine_->step(); }, text) == Thrown::comm, "a dead engine steps");
  }

  // Ranks that know of nothing wait for the others sooner or later.
  [[noreturn]] void go_on() {
    for (;;) {
      std::vector<double> values{1};
      engine_->sum(values);
    }
  }

  Dice dice_;
  const Subject& subject_;
  Config config_;
  std::unique_ptr<Engine> engine_;
  std::string trace_;
  bool failed_ = false;
  bool died_ = false;

  Phase phase_ = Phase::idle;
  bool last_announced_ = false;
  std::int64_t samples_ = 0;
  std::int64_t steps_ = 0;
  double loss_ = 0;
  int scope_count_ = 0;
  std::vector<UnitState> unit_;
  std::vector<ParameterState> state_;
  std::list<OpenLease> leases_;
  std::list<OpenScope> scopes_;
};

TEST(FuzzTest, RandomCallsDoWhatTheModelSays) {
  const std::uint64_t first = from_environment("MICS_FUZZ_SEED", 1);
  const std::uint64_t count = from_environment("MICS_FUZZ_SEQUENCES", 800);
  const Subject subject;
  std::uint64_t died = 0;
  for (std::uint64_t seed = first; seed < first + count; ++seed) {
    const int before = communicators;
    SCOPED_TRACE("MICS_FUZZ_SEED=" + std::to_string(seed));
    Sequence sequence(seed, subject);
    sequence.run();
    died += sequence.died() ? 1 : 0;

    int failed = sequence.failed() ? 1 : 0;
    MPI_Allreduce(MPI_IN_PLACE, &failed, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
    ASSERT_EQ(failed, 0) << "on some rank\n" << sequence.trace();
    if (!sequence.died()) {
      ASSERT_EQ(communicators, before) << sequence.trace();
    }
  }
  if (job_size() > 1 && count >= 300) {
    EXPECT_GT(died, 0U);
  }
}

}  // namespace
}  // namespace mics::test
