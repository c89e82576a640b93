// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/optim/detail/device_sweep.hpp>
#include <mics/optim/detail/lanes.hpp>
#include <mics/optim/detail/packs.hpp>
#include <mics/optim/device_step.hpp>
#include <mics/state/for_blocks.hpp>

#include <algorithm>
#include <bit>
#include <cstring>

namespace mics::optim {

using detail::Member;
using detail::StepMemory;
using detail::StepRate;

// What is kept from step to step, and from one kernel of a step to the next.
struct detail::StepMemory {
  std::int64_t steps = 0;
  LossScaleState scaler;
  double group_squares = 0;
  double learning_rate = 0;  // of the decision
  double beta1 = 0;
  double beta2 = 0;
  double scale = 0;
  std::int32_t desync_shard = -1;
  std::int32_t update = 0;
};

namespace {

using Single = Kokkos::RangePolicy<device::Space>;

// Sums of squares of a buffer beside each other; a team makes one, of every so many-th block.
constexpr std::int64_t columns = 512;

// Doubles of one rank in the vectors: hashes travel as two halves, which a double holds exactly.
constexpr std::int64_t group_slot = 5;    // squares, loss, samples, halves of the history
constexpr std::int64_t replica_slot = 4;  // loss, samples, halves of the history

KOKKOS_INLINE_FUNCTION void put_hash(double* halves, std::uint64_t hash) {
  halves[0] = static_cast<double>(hash & 0xffffffffU);
  halves[1] = static_cast<double>(hash >> 32);
}

// The first slot whose hash is not that of slot `own`; -1 if all agree.
KOKKOS_INLINE_FUNCTION std::int32_t first_other(const double* halves, std::int64_t stride,
                                                int slots, int own) {
  const double low = halves[own * stride];
  const double high = halves[own * stride + 1];
  for (int s = 0; s < slots; ++s) {
    if (halves[s * stride] != low || halves[s * stride + 1] != high) return s;
  }
  return -1;
}

// A team adds up one column of blocks. The order: blocks of the column one after the other, in each
// the packs of a lane, a pack being 16 bytes.
template <class T>
struct SquaresKernel {
  const T* values;
  std::int64_t count;
  double* partials;
  bool packed;

  static constexpr int width = 16 / sizeof(T);

  KOKKOS_FUNCTION void operator()(const Member& team) const {
    double* const lanes = detail::team_lanes(team, 1);
    for (int lane = team.team_rank(); lane < detail::sum_lanes; lane += team.team_size()) {
      lanes[lane] = column_of(team.league_rank(), lane);
    }
    detail::fold_lanes(team, lanes, 1);
    if (team.team_rank() == 0) partials[team.league_rank()] = lanes[0];
  }

 private:
  static constexpr int stride = detail::sum_lanes * width;
  // Packs that are loaded at once: of the next part of a block while those of one are added. More
  // of them would take registers that four teams on a processor need.
  static constexpr int packs = 2;
  static constexpr int parts = static_cast<int>(state::block_count) / (packs * stride);
  static_assert(parts * packs * stride == state::block_count);

  KOKKOS_INLINE_FUNCTION double column_of(std::int64_t first, int lane) const {
    const std::int64_t blocks = (count + state::block_count - 1) / state::block_count;
    const std::int64_t whole = packed ? count / state::block_count : 0;
    const std::int64_t mine = first < whole ? (whole - first + columns - 1) / columns : 0;
    double sum = 0;
    T elements[packs][width];
    T next[packs][width];
    if (mine > 0) load(first, 0, lane, elements);
    for (std::int64_t i = 1; i <= mine * parts; ++i) {
      // The last part once more at the end: a load under a condition would wait for the one before.
      const std::int64_t at = i < mine * parts ? i : i - 1;
      load(first + at / parts * columns, at % parts, lane, next);
      for (int j = 0; j < packs; ++j) {
        for (int k = 0; k < width; ++k) add(elements[j][k], sum);
      }
      for (int j = 0; j < packs; ++j) {
        for (int k = 0; k < width; ++k) elements[j][k] = next[j][k];
      }
    }
    for (std::int64_t block = first + mine * columns; block < blocks; block += columns) {
      for (int j = 0; j < parts * packs; ++j) {
        for (int k = 0; k < width; ++k) {
          const std::int64_t i = block * state::block_count + j * stride + lane * width + k;
          if (i < count) add(values[i], sum);
        }
      }
    }
    return sum;
  }

  KOKKOS_INLINE_FUNCTION void load(std::int64_t block, std::int64_t part, int lane,
                                   T (&elements)[packs][width]) const {
    const std::int64_t begin = block * state::block_count + part * packs * stride + lane * width;
    for (int j = 0; j < packs; ++j) {
      detail::load_pack<T>(values, begin + j * stride, elements[j]);
    }
  }

  KOKKOS_INLINE_FUNCTION static void add(T element, double& sum) {
    const auto x = static_cast<double>(element);
    sum += x * x;
  }
};

// Flags of so many buffers travel as arguments of a kernel: there is nothing to wait for before the
// next step writes its own.
constexpr std::size_t flags_a_launch = 2048;

// A team adds up the columns of one buffer.
struct FoldSquaresKernel {
  std::int64_t first;  // buffer
  const double* partials;
  const double* factors;
  double* squares;
  double* contributed;
  std::uint64_t flags[flags_a_launch / 64];

  KOKKOS_FUNCTION void operator()(const Member& team) const {
    double* const lanes = detail::team_lanes(team, 1);
    const auto at = static_cast<std::uint64_t>(team.league_rank());
    const std::int64_t buffer = first + team.league_rank();
    for (int lane = team.team_rank(); lane < detail::sum_lanes; lane += team.team_size()) {
      double sum = 0;
      for (std::int64_t c = lane; c < columns; c += detail::sum_lanes) {
        sum += partials[buffer * columns + c];
      }
      lanes[lane] = sum;
    }
    detail::fold_lanes(team, lanes, 1);
    if (team.team_rank() == 0) {
      squares[buffer] = lanes[0] / (factors[buffer] * factors[buffer]);
      contributed[buffer] = static_cast<double>(flags[at / 64] >> (at % 64) & 1U);
    }
  }
};
static_assert(sizeof(FoldSquaresKernel) <= detail::most_functor_bytes);

// One thread writes this rank's slot.
struct PublishKernel {
  const double* squares;
  int buffers;
  const double* loss;
  double samples;
  std::uint64_t history;
  double* slot;

  KOKKOS_FUNCTION void operator()(int /*one*/) const {
    double sum = 0;
    for (int i = 0; i < buffers; ++i) sum += squares[i];
    slot[0] = sum;
    slot[1] = *loss;
    slot[2] = samples;
    put_hash(slot + 3, history);
  }
};

// Regions of the memory, each aligned as the arena's are.
class Regions {
 public:
  explicit Regions(std::byte* base) : base_(base) {}
  template <class T>
  T* take(std::int64_t count) {
    constexpr std::int64_t alignment = 256;
    std::byte* const region = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count * static_cast<std::int64_t>(sizeof(T)) + alignment - 1) / alignment * alignment;
    return reinterpret_cast<T*>(region);
  }
  [[nodiscard]] std::int64_t used() const { return used_; }

 private:
  std::byte* base_;
  std::int64_t used_ = 0;
};

struct Memory {
  StepMemory* kept;
  double* scalars;  // loss, loss scale
  double* factors;
  std::int64_t* updates;
  DeviceStepInfo* infos;
  StepRate* rates;
  double* group;  // what begin() clears lies together, from here on
  double* replica;
  double* squares;
  double* partials;
  std::int64_t bytes;

  Memory(std::byte* base, std::int64_t buffers, std::int64_t shards, std::int64_t replicas) {
    Regions regions(base);
    kept = regions.take<StepMemory>(1);
    scalars = regions.take<double>(2);
    factors = regions.take<double>(buffers);
    updates = regions.take<std::int64_t>(buffers);
    infos = regions.take<DeviceStepInfo>(buffers);
    rates = regions.take<StepRate>(DeviceStep::rate_capacity);
    group = regions.take<double>(shards * group_slot);
    replica = regions.take<double>(replicas * replica_slot + buffers);
    squares = regions.take<double>(buffers);
    partials = regions.take<double>(buffers * columns);
    bytes = regions.used();
  }
};

// One thread.
struct FoldGroupKernel {
  const double* group;
  int shards;
  int shard;
  std::uint64_t history;
  double* slot;
  StepMemory* kept;

  KOKKOS_FUNCTION void operator()(int /*one*/) const {
    double squares = 0;
    double loss = 0;
    double samples = 0;
    for (int s = 0; s < shards; ++s) {
      squares += group[s * group_slot];
      loss += group[s * group_slot + 1];
      samples += group[s * group_slot + 2];
    }
    kept->group_squares = squares;
    kept->desync_shard = first_other(group + 3, group_slot, shards, shard);
    slot[0] = loss;
    slot[1] = samples;
    put_hash(slot + 2, history);
  }
};

// One team: its first thread decides, all of them tell the buffers.
struct DecideKernel {
  const double* replica;
  int replicas;
  int own_replica;
  int buffers;
  std::int64_t rates_end;
  const StepRate* rates;
  LossScaleConfig scaling;
  double gradient_clipping;
  const double* factors;
  std::int64_t* updates;
  DeviceStepInfo* infos;
  double* loss;
  double* loss_scale;
  StepMemory* kept;
  StepOutcome* outcome;
  std::uint8_t* contributed;
  bool bias_correction;

  KOKKOS_FUNCTION void operator()(const Member& team) const {
    if (team.team_rank() == 0) decide();
    team.team_barrier();
    const double* const flags = replica + replicas * replica_slot;
    for (int i = team.team_rank(); i < buffers; i += team.team_size()) {
      const bool touched = flags[i] > 0;
      contributed[i] = touched ? 1 : 0;
      DeviceStepInfo info;
      info.update = touched ? kept->update : 0;
      if (info.update != 0) ++updates[i];
      info.step = updates[i] + (info.update != 0 ? 0 : 1);
      info.learning_rate = kept->learning_rate;
      info.beta1 = kept->beta1;
      info.beta2 = kept->beta2;
      if (bias_correction) {
        info.correction1 = 1 - Kokkos::pow(info.beta1, static_cast<double>(info.step));
        info.correction2 = 1 - Kokkos::pow(info.beta2, static_cast<double>(info.step));
      }
      info.gradient_scale = kept->scale / factors[i];
      infos[i] = info;
    }
  }

 private:
  KOKKOS_INLINE_FUNCTION void decide() const {
    double total_loss = 0;
    double samples = 0;
    for (int r = 0; r < replicas; ++r) {
      total_loss += replica[r * replica_slot];
      samples += replica[r * replica_slot + 1];
    }
    const std::int64_t position = kept->steps < rates_end ? kept->steps : rates_end - 1;
    const StepRate rate = rates[position % DeviceStep::rate_capacity];
    const double scale = kept->scaler.scale;
    const double divisor = scale * samples;
    const double norm = Kokkos::sqrt(kept->group_squares) / divisor;

    StepOutcome result;
    result.samples = static_cast<std::int64_t>(samples);
    result.loss = total_loss / samples;
    result.gradient_norm = norm;
    result.learning_rate = rate.learning_rate;
    result.loss_scale = scale;
    result.overflow = Kokkos::isfinite(kept->group_squares) ? 0 : 1;
    result.skipped = samples == 0 || !Kokkos::isfinite(norm) ? 1 : 0;
    result.desync_shard = kept->desync_shard;
    result.desync_replica = first_other(replica + 2, replica_slot, replicas, own_replica);
    const bool agreed = result.desync_shard < 0 && result.desync_replica < 0;
    const bool betas_fit = rate.beta1 >= 0 && rate.beta1 < 1 && rate.beta2 >= 0 && rate.beta2 < 1;
    result.betas_out_of_range = betas_fit ? 0 : 1;

    if (agreed && samples > 0 && !optim::advance(scaling, kept->scaler, result.skipped != 0)) {
      result.scale_exhausted = 1;
    }
    if (!agreed || (!betas_fit && result.skipped == 0)) result.skipped = 1;
    kept->update = result.skipped == 0 ? 1 : 0;
    if (kept->update != 0) {
      ++kept->steps;
      // Exactly 1 while the norm stays below the limit.
      double clip = 1;
      if (gradient_clipping > 0) {
        const double excess = (norm + 1e-6) / gradient_clipping;
        clip = 1 / (excess > 1 ? excess : 1.0);
      }
      kept->learning_rate = rate.learning_rate;
      kept->beta1 = rate.beta1;
      kept->beta2 = rate.beta2;
      kept->scale = clip / divisor;
    }
    result.step = kept->steps;
    *outcome = result;
    *loss = 0;
    *loss_scale = kept->scaler.scale;
  }
};

}  // namespace

OutcomeRing::OutcomeRing(int buffers, int slots)
    : buffers_(static_cast<std::size_t>(buffers)),
      outcomes_("mics::optim::OutcomeRing::outcomes", static_cast<std::size_t>(slots)),
      contributed_("mics::optim::OutcomeRing::contributed",
                   static_cast<std::size_t>(slots) * buffers_) {}

std::int64_t DeviceStep::bytes(int buffers, int shards, int replicas) {
  return Memory(nullptr, buffers, shards, replicas).bytes;
}

DeviceStep::DeviceStep(std::span<std::byte> memory, const Execution& exec,
                       const DeviceStepSettings& settings)
    : exec_(exec),
      settings_(settings),
      counts_(settings.factors.size()),
      staged_rates_("mics::optim::DeviceStep::rates", static_cast<std::size_t>(rate_capacity)) {
  static_assert(sizeof(DecideKernel) <= detail::most_functor_bytes);
  const Memory regions(memory.data(), std::ssize(settings.factors), settings.shards,
                       settings.replicas);
  if (std::ssize(memory) < regions.bytes) {
    raise<ArgumentError>({.object = "memory of a device step",
                          .expected = std::to_string(regions.bytes) + " bytes",
                          .found = std::to_string(memory.size())});
  }
  kept_ = regions.kept;
  loss_ = regions.scalars;
  loss_scale_ = regions.scalars + 1;
  factors_ = regions.factors;
  updates_ = regions.updates;
  infos_ = regions.infos;
  rates_ = regions.rates;
  group_ = regions.group;
  replica_ = regions.replica;
  squares_ = regions.squares;
  partials_ = regions.partials;
  device::clear(exec_, memory.data(), regions.bytes);
  device::copy(exec_, factors_, settings.factors.data(),
               std::ssize(settings.factors) * static_cast<std::int64_t>(sizeof(double)));
  restore({.steps = 0,
           .scaler = LossScaler(settings.loss_scale).state(),
           .updates = std::vector<std::int64_t>(settings.factors.size())});
}

std::int64_t DeviceStep::group_count() const { return settings_.shards * group_slot; }

std::int64_t DeviceStep::replica_count() const {
  return settings_.replicas * replica_slot + std::ssize(settings_.factors);
}

void DeviceStep::begin() {
  const auto buffers = static_cast<int>(settings_.factors.size());
  const std::byte* const end = reinterpret_cast<std::byte*>(partials_ + buffers * columns);
  device::clear(exec_, group_, end - reinterpret_cast<std::byte*>(group_));
  std::fill(counts_.begin(), counts_.end(), 0);
}

void DeviceStep::add_squares(int buffer, const void* sums, DType dtype, std::int64_t count) {
  counts_[static_cast<std::size_t>(buffer)] = count;
  if (count == 0) return;
  const std::int64_t teams = std::min(columns, state::blocks_of(count));
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Kernel = SquaresKernel<T>;
    Kokkos::parallel_for("mics::optim::squares", detail::team_policy(exec_, teams, 1),
                         Kernel{.values = static_cast<const T*>(sums),
                                .count = count,
                                .partials = partials_ + buffer * columns,
                                .packed = detail::fits_packs(sums, dtype, Kernel::width)});
  });
}

void DeviceStep::publish_group(std::int64_t samples, std::uint64_t history,
                               std::span<const std::uint8_t> contributed) {
  if (contributed.size() != counts_.size()) {
    raise<ArgumentError>({.object = "contributed buffers of a step",
                          .expected = std::to_string(counts_.size()),
                          .found = std::to_string(contributed.size())});
  }
  for (std::size_t first = 0; first < counts_.size(); first += flags_a_launch) {
    const std::size_t teams = std::min(flags_a_launch, counts_.size() - first);
    FoldSquaresKernel kernel{.first = static_cast<std::int64_t>(first),
                             .partials = partials_,
                             .factors = factors_,
                             .squares = squares_,
                             .contributed = replica_ + settings_.replicas * replica_slot,
                             .flags = {}};
    for (std::size_t i = 0; i < teams; ++i) {
      const bool set = contributed[first + i] != 0 && counts_[first + i] > 0;
      kernel.flags[i / 64] |= static_cast<std::uint64_t>(set ? 1 : 0) << (i % 64);
    }
    Kokkos::parallel_for("mics::optim::fold_squares",
                         detail::team_policy(exec_, static_cast<std::int64_t>(teams), 1), kernel);
  }
  Kokkos::parallel_for("mics::optim::publish_group", Single(exec_.as<device::Space>(), 0, 1),
                       PublishKernel{.squares = squares_,
                                     .buffers = static_cast<int>(counts_.size()),
                                     .loss = loss_,
                                     .samples = static_cast<double>(samples),
                                     .history = history,
                                     .slot = group_ + settings_.shard * group_slot});
}

void DeviceStep::fold_group(std::uint64_t history) {
  Kokkos::parallel_for("mics::optim::fold_group", Single(exec_.as<device::Space>(), 0, 1),
                       FoldGroupKernel{.group = group_,
                                       .shards = settings_.shards,
                                       .shard = settings_.shard,
                                       .history = history,
                                       .slot = replica_ + settings_.replica * replica_slot,
                                       .kept = kept_});
}

void DeviceStep::decide(const OutcomeRing& outcomes, int slot) {
  if (rates_end_ == 0) {
    raise<StateError>({.object = "step on a device",
                       .expected = "rates of at least one step",
                       .found = "none",
                       .remedy = "call set_rates()"});
  }
  Kokkos::parallel_for("mics::optim::decide",
                       detail::TeamPolicy(exec_.as<device::Space>(), 1, detail::team_threads),
                       DecideKernel{.replica = replica_,
                                    .replicas = settings_.replicas,
                                    .own_replica = settings_.replica,
                                    .buffers = static_cast<int>(counts_.size()),
                                    .rates_end = rates_end_,
                                    .rates = rates_,
                                    .scaling = settings_.loss_scale,
                                    .gradient_clipping = settings_.gradient_clipping,
                                    .factors = factors_,
                                    .updates = updates_,
                                    .infos = infos_,
                                    .loss = loss_,
                                    .loss_scale = loss_scale_,
                                    .kept = kept_,
                                    .outcome = outcomes.outcomes_.data() + slot,
                                    .contributed = outcomes.contributed_.data() +
                                                   static_cast<std::size_t>(slot) * counts_.size(),
                                    .bias_correction = settings_.bias_correction});
}

void DeviceStep::set_rates(std::int64_t first, std::span<const Rates> rates) {
  const std::int64_t count = std::ssize(rates);
  if (first < 0 || count == 0 || count > rate_capacity) {
    raise<ArgumentError>(
        {.object = "rates of the steps from " + std::to_string(first),
         .expected = "a step of 0 or later, and 1 to " + std::to_string(rate_capacity) + " rates",
         .found = std::to_string(count)});
  }
  if (!staged_.done()) staged_.wait("mics::optim::DeviceStep: earlier rates are copied");
  for (std::int64_t i = 0; i < count; ++i) {
    const Rates& own = rates[static_cast<std::size_t>(i)];
    const auto [beta1, beta2] = own.betas.value_or(settings_.betas);
    staged_rates_(static_cast<std::size_t>((first + i) % rate_capacity)) = {own.learning_rate,
                                                                            beta1, beta2};
  }
  // The ring's end may lie between them.
  const std::int64_t at = first % rate_capacity;
  const std::int64_t before_end = std::min(count, rate_capacity - at);
  const auto copy = [&](std::int64_t from, std::int64_t part) {
    device::copy(exec_, rates_ + from, staged_rates_.data() + from,
                 part * static_cast<std::int64_t>(sizeof(StepRate)));
  };
  copy(at, before_end);
  copy(0, count - before_end);
  staged_ = exec_.mark();
  rates_end_ = first + count;
}

DeviceStepState DeviceStep::state() const {
  StepMemory kept;
  DeviceStepState result;
  result.updates.resize(counts_.size());
  device::copy(exec_, &kept, kept_, sizeof(StepMemory));
  device::copy(exec_, result.updates.data(), updates_,
               std::ssize(result.updates) * static_cast<std::int64_t>(sizeof(std::int64_t)));
  exec_.fence("mics::optim::DeviceStep::state");
  result.steps = kept.steps;
  result.scaler = kept.scaler;
  return result;
}

void DeviceStep::restore(const DeviceStepState& state) {
  if (state.updates.size() != counts_.size()) {
    raise<ArgumentError>({.object = "state of a device step",
                          .expected = std::to_string(counts_.size()) + " counts of updates",
                          .found = std::to_string(state.updates.size())});
  }
  StepMemory kept;
  kept.steps = state.steps;
  kept.scaler = state.scaler;
  device::copy(exec_, kept_, &kept, sizeof(StepMemory));
  device::copy(exec_, loss_scale_, &kept.scaler.scale, sizeof(double));
  device::copy(exec_, updates_, state.updates.data(),
               std::ssize(state.updates) * static_cast<std::int64_t>(sizeof(std::int64_t)));
  exec_.fence("mics::optim::DeviceStep::restore");
}

}  // namespace mics::optim
