// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/comm/mpi_transport.hpp>
#include <mics/comm/staged_transport.hpp>
#include <mics/parallel/shard_channel.hpp>
#include <mics/parallel/slot_schedule.hpp>
#include <mics/plan/plan.hpp>
#include <mics/state/arena.hpp>
#include <mics/state/for_blocks.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <string_view>

namespace mics {
namespace {

std::string human(std::int64_t bytes) {
  static constexpr std::array<const char*, 5> units{"B", "KiB", "MiB", "GiB", "TiB"};
  auto value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 1024 && unit + 1 < units.size()) {
    value /= 1024;
    ++unit;
  }
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), unit == 0 ? "%.0f %s" : "%.2f %s", value, units[unit]);
  return text.data();
}

std::string plural(std::int64_t n, const std::string& noun) {
  return std::to_string(n) + ' ' + noun + (n == 1 ? "" : "s");
}

// 2^-ceil(log2 n).
double power_of_two_below(double n) { return std::exp2(-std::ceil(std::log2(n))); }

}  // namespace

Plan::Plan(const Model& model, const layout::GroupLayout& layout, const PlanRequest& request)
    : layout_(layout),
      request_(request),
      flat_(request.forward_only ? model.frozen() : model, request.compute, layout.shard_size(), 1,
            request.persistence),
      model_count_(model.count()),
      unit_needs_slot_(static_cast<std::size_t>(model.units())) {
  if (request.require_two_stage && !layout.two_stage_possible()) {
    raise<ArgumentError>({.object = "two-stage gather",
                          .expected = "groups that span the same nodes with the same ranks on each",
                          .found = layout.two_stage_obstacle(),
                          .remedy = "use \"auto\", or another shard size"});
  }
  two_stage_ = request.want_two_stage && layout.two_stage_possible();

  std::int64_t longest_shard = 0;
  std::int64_t partials = 0;
  std::int64_t tensors = 0;
  std::int64_t most_tensors = 0;
  bool convert1 = false;
  bool convert_between = false;
  bool convert2 = false;
  for (int b = 0; b < flat_.buffer_count(); ++b) {
    const state::FlatBuffer& buffer = flat_.buffer(b);
    const std::int64_t shard = buffer.flat.shard_count();
    const std::int64_t element = bytes_of(buffer.dtype);
    memory_.compute_shards += state::arena_bytes(shard * element);
    const bool whole = layout.shard_size() == 1;
    if (resident(b) && !whole) {
      memory_.resident += state::arena_bytes(buffer.flat.count() * element);
    }
    if (!buffer.trainable) continue;
    const std::int64_t master = bytes_of(master_dtype(b));
    const std::int64_t sum = bytes_of(sum_dtype(b));
    if (!master_is_compute(b)) memory_.master_weights += state::arena_bytes(shard * master);
    memory_.optimizer_states += request.states * state::arena_bytes(shard * master);
    memory_.accumulators += state::arena_bytes(shard * sum);
    if (has_resident_gradient(b)) {
      memory_.resident += state::arena_bytes(buffer.flat.count() * bytes_of(gradient_dtype(b)));
    }
    longest_shard = std::max(
        longest_shard, parallel::ShardChannel::scratch_bytes(two_stage_, layout.nodes_per_group(),
                                                             shard, hop1_wire(b), sum_dtype(b)));
    convert1 = convert1 || gradient_dtype(b) != hop1_wire(b) || hop1_factor(b) != 1;
    convert_between = convert_between || between_wire(b) != parallel::ShardChannel::scratch_dtype(
                                                                hop1_wire(b), sum_dtype(b));
    convert2 = convert2 || sum_dtype(b) != hop2_wire(b) || hop2_factor(b) != 1;
    partials = std::max(partials, state::blocks_of(shard));
    tensors += std::ssize(buffer.parameters);
    most_tensors = std::max(most_tensors, std::ssize(buffer.parameters));
    plan_conversions(b);
  }
  if (request.transport == comm::TransportKind::staged) {
    for (const state::FlatBuffer& buffer : flat_.buffers()) {
      staged_.gather =
          std::max(staged_.gather,
                   comm::StagedTransport::all_gather_bytes(
                       layout.shard_size(), buffer.flat.shard_count() * bytes_of(buffer.dtype)));
    }
  }
  // A device's norm has its own place; norms of tensors stand one after another there.
  norm_partials_ = request.memory == Memory::host
                       ? partials
                       : request.norms_per_tensor * (tensors + partials + most_tensors);
  reduce_scratch_bytes_ = state::arena_bytes(longest_shard);
  memory_.scratch = reduce_scratch_bytes_ +
                    state::arena_bytes(norm_partials_ * static_cast<std::int64_t>(sizeof(double)));

  for (int u = 0; u < model.units(); ++u) {
    for (const int b : flat_.buffers_of(UnitId{u})) {
      if (!resident(b)) unit_needs_slot_[static_cast<std::size_t>(u)] = true;
    }
    if (unit_needs_slot_[static_cast<std::size_t>(u)]) {
      gather_slot_bytes_ = std::max(gather_slot_bytes_, flat_.gathered_bytes(UnitId{u}));
    }
    gradient_slot_bytes_ = std::max(gradient_slot_bytes_, gradient_bytes(UnitId{u}));
  }
  memory_.gather_slots = request.slots * gather_slot_bytes_;
  memory_.gradient_slots = request.slots * gradient_slot_bytes_;
  memory_.arena = memory_.compute_shards + memory_.master_weights + memory_.optimizer_states +
                  memory_.accumulators + memory_.gather_slots + memory_.gradient_slots +
                  memory_.resident + memory_.scratch;
  if (request.memory == Memory::device) {
    if (request.step_bytes) {
      const auto trainable = std::count_if(flat_.buffers().begin(), flat_.buffers().end(),
                                           [](const auto& buffer) { return buffer.trainable; });
      memory_.step = state::arena_bytes(
          request.step_bytes(static_cast<int>(trainable), layout.shard_size(), layout.replicas()));
    }
    // The small exchanges of a step: of its own numbers, and norms of whole tensors.
    const std::int64_t doubles = 8 * (layout.world_size() + flat_.buffer_count()) + 64;
    if (request.transport == comm::TransportKind::nccl) {
      const comm::Reduction numbers{
          .source = DType::fp64, .wire = DType::fp64, .result = DType::fp64};
      conversions_.hop2 =
          std::max(conversions_.hop2, state::arena_bytes(comm::all_reduce_staging_bytes(
                                          layout.replicas(), doubles, numbers, request.sums)));
    }
    memory_.conversions = conversions_.hop1 + conversions_.between + conversions_.hop2;
    memory_.arena += memory_.conversions + memory_.step;
    staged_.small =
        state::arena_bytes(8 * std::max<std::int64_t>(doubles, request.norms_per_tensor * tensors));
    staged_.replica = std::max(staged_.replica, staged_.small);
  }

  if (request.forward_only) return;

  // Hop 1 and hop 2 stage what arrives; each transport that reduces has its own.
  using comm::MpiTransport;
  memory_.staging = MpiTransport::staging_bytes(layout.replicas(), convert2);
  memory_.staging +=
      two_stage_ ? MpiTransport::staging_bytes(layout.lanes(), convert1) +
                       MpiTransport::staging_bytes(layout.nodes_per_group(), convert_between)
                 : MpiTransport::staging_bytes(layout.shard_size(), convert1);

  if (request.transport == comm::TransportKind::staged) {
    const int stages = two_stage_ ? 2 : 1;
    memory_.staging += stages * (staged_.gather + staged_.reduce) + staged_.replica + staged_.small;
  }
  if (request.norms_per_tensor > 0) {
    memory_.staging += MpiTransport::staging_bytes(layout.shard_size(), false);
  }

  for (int b = flat_.buffer_count() - 1; b >= 0; --b) {
    if (flat_.buffer(b).trainable && !flat_.buffer(b).persistent()) hop2_order_.push_back(b);
  }
  for (const int b : flat_.persistent_buffers()) {
    if (flat_.buffer(b).trainable) hop2_order_.push_back(b);
  }
}

// What the transports of a device keep beside their buffers while they reduce this one.
void Plan::plan_conversions(int buffer) {
  if (request_.memory != Memory::device) return;
  const auto grow = [](std::int64_t& bytes, std::int64_t needed) {
    bytes = std::max(bytes, state::arena_bytes(needed));
  };
  const int nodes = layout_.nodes_per_group();
  const std::int64_t shard = flat_.buffer(buffer).flat.shard_count();
  const DType sum = sum_dtype(buffer);
  // Sums of later micro-steps are added to those of the first.
  comm::Reduction inside{.source = gradient_dtype(buffer),
                         .wire = hop1_wire(buffer),
                         .result = sum,
                         .factor = hop1_factor(buffer),
                         .mode = comm::SumMode::add};
  comm::Reduction between = inside;
  if (two_stage_) {
    inside.result = parallel::ShardChannel::scratch_dtype(inside.wire, sum);
    inside.mode = comm::SumMode::assign;
    between.source = inside.result;
    between.wire = between_wire(buffer);
    between.factor = 1;
  }
  const comm::Reduction hop2{
      .source = sum, .wire = hop2_wire(buffer), .result = sum, .factor = hop2_factor(buffer)};
  const int lanes = two_stage_ ? layout_.lanes() : layout_.shard_size();
  const std::int64_t lane_count = two_stage_ ? nodes * shard : shard;
  if (request_.transport == comm::TransportKind::nccl) {
    using comm::reduce_scatter_staging_bytes;
    grow(conversions_.hop1, reduce_scatter_staging_bytes(lanes, lane_count, inside, request_.sums));
    if (two_stage_) {
      grow(conversions_.between,
           reduce_scatter_staging_bytes(nodes, shard, between, request_.sums));
    }
    grow(conversions_.hop2,
         comm::all_reduce_staging_bytes(layout_.replicas(), shard, hop2, request_.sums));
    return;
  }
  using comm::StagedTransport;
  grow(staged_.reduce, StagedTransport::reduce_scatter_bytes(lanes, lane_count, inside));
  if (two_stage_) {
    grow(staged_.reduce, StagedTransport::reduce_scatter_bytes(nodes, shard, between));
  }
  grow(staged_.replica, StagedTransport::all_reduce_bytes(layout_.replicas(), shard, hop2));
}

bool Plan::resident(int buffer) const {
  return flat_.buffer(buffer).persistent() || request_.keep_gathered || layout_.shard_size() == 1;
}

bool Plan::has_resident_gradient(int buffer) const {
  return flat_.buffer(buffer).persistent() && flat_.buffer(buffer).trainable;
}

DType Plan::master_dtype(int buffer) const {
  return flat_.buffer(buffer).dtype == DType::fp64 ? DType::fp64 : request_.master;
}

DType Plan::gradient_dtype(int buffer) const {
  const DType own = flat_.buffer(buffer).dtype;
  return own == DType::fp64 ? own : request_.gradient.value_or(own);
}

DType Plan::sum_dtype(int buffer) const {
  if (flat_.buffer(buffer).dtype == DType::fp64) return DType::fp64;
  return request_.accumulate.value_or(DType::fp32);
}

DType Plan::hop1_wire(int buffer) const { return request_.wire.value_or(gradient_dtype(buffer)); }

DType Plan::between_wire(int buffer) const {
  return request_.wire.value_or(
      parallel::ShardChannel::scratch_dtype(hop1_wire(buffer), sum_dtype(buffer)));
}

DType Plan::hop2_wire(int buffer) const { return request_.wire.value_or(sum_dtype(buffer)); }

// Sums are taken in fp32 whatever travels, so only what is rounded to fp16 can overflow: gradients
// of a wider dtype on an fp16 wire, sums of a node's ranks on one between nodes, and sums in an
// fp16 accumulator.
double Plan::hop1_addends(int buffer) const {
  const bool narrows = hop1_wire(buffer) == DType::fp16 && gradient_dtype(buffer) != DType::fp16;
  const bool between = two_stage_ && between_wire(buffer) == DType::fp16;
  const bool narrow_sum = sum_dtype(buffer) == DType::fp16;
  double addends = 1;
  if (narrows || between || narrow_sum) addends *= layout_.shard_size();
  if (narrow_sum) addends *= request_.micro_steps;
  return addends;
}

double Plan::hop1_factor(int buffer) const {
  return power_of_two_below(hop1_addends(buffer)) / request_.predivide;
}

// A wide accumulator holds the sums of the shard group and of the micro-steps, which hop 2 rounds
// to its wire: what hop 1 did not divide out of them is divided out here.
double Plan::hop2_factor(int buffer) const {
  const bool narrow = hop2_wire(buffer) == DType::fp16 || sum_dtype(buffer) == DType::fp16;
  if (!narrow || layout_.replicas() == 1) return 1;
  const double addends = static_cast<double>(layout_.shard_size()) * request_.micro_steps;
  return power_of_two_below(layout_.replicas() * addends / hop1_addends(buffer));
}

std::int64_t Plan::gradient_bytes(UnitId unit) const {
  std::int64_t bytes = 0;
  for (const int b : flat_.buffers_of(unit)) {
    if (!flat_.buffer(b).trainable) continue;
    bytes += state::arena_bytes(flat_.buffer(b).flat.count() * bytes_of(gradient_dtype(b)));
  }
  return bytes;
}

bool Plan::master_is_compute(int buffer) const {
  return master_dtype(buffer) == flat_.buffer(buffer).dtype;
}

CollectiveCounts Plan::count(std::span<const LeaseCall> calls, int micro_steps) const {
  CollectiveCounts counts;
  const int units = static_cast<int>(unit_needs_slot_.size());
  parallel::SlotSchedule schedule(units, request_.slots, request_.prefetch, !request_.debug);
  const auto fetched = [&](int unit) {
    for (const int b : flat_.buffers_of(UnitId{unit})) {
      if (!resident(b) && flat_.buffer(b).flat.count() > 0) ++counts.gather;
    }
  };
  const auto one_pass = [&] {
    schedule.begin(parallel::Pass::training);
    for (const auto [unit, begins] : calls) {
      if (!unit_needs_slot_[static_cast<std::size_t>(unit.value)]) continue;
      if (!begins) {
        schedule.release(unit.value, false);
        continue;
      }
      const auto acquired = schedule.acquire(unit.value);
      if (acquired.slot < 0) {
        raise<ArgumentError>({.object = "leases of a pass",
                              .expected = "at most " + plural(request_.slots, "unit") + " at once",
                              .found = "one more",
                              .remedy = "set \"slots\" to as many as are open together"});
      }
      if (acquired.fetch) fetched(unit.value);
      for (auto next = schedule.next_prefetch(); next.unit >= 0; next = schedule.next_prefetch()) {
        fetched(next.unit);
      }
    }
    schedule.end();
    if (schedule.has_unconfirmed()) schedule.confirm();
  };
  one_pass();  // records the order
  schedule.invalidate();
  counts = {};
  for (int micro_step = 0; micro_step < micro_steps; ++micro_step) one_pass();
  if (request_.forward_only) return counts;

  const bool sharded = layout_.shard_size() > 1;
  for (int b = 0; b < flat_.buffer_count(); ++b) {
    const state::FlatBuffer& buffer = flat_.buffer(b);
    if (buffer.flat.count() == 0 || !buffer.trainable) continue;
    if (sharded && resident(b)) ++counts.gather;
    if (sharded) counts.hop1 += micro_steps;
    if (layout_.replicas() > 1) ++counts.hop2;
  }
  counts.norm = (sharded ? 1 : 0) + (layout_.replicas() > 1 ? 1 : 0) +
                (sharded && request_.norms_per_tensor > 0 ? 1 : 0);
  return counts;
}

CollectiveCounts Plan::count(std::span<const UnitId> order, int micro_steps) const {
  std::vector<LeaseCall> calls;
  for (const UnitId unit : order) {
    calls.push_back({unit});
    calls.push_back({.unit = unit, .begins = false});
  }
  return count(calls, micro_steps);
}

CollectiveCounts Plan::count(int micro_steps) const {
  std::vector<UnitId> order;
  const int units = static_cast<int>(unit_needs_slot_.size());
  for (int u = 0; u < units; ++u) order.push_back({u});
  if (request_.forward_only) return count(order, micro_steps);
  for (int u = units - 1; u >= 0; --u) order.push_back({u});
  return count(order, micro_steps);
}

std::string Plan::text(std::span<const LeaseCall> calls) const {
  const int p = layout_.shard_size();
  const int replicas = layout_.replicas();
  std::string out;
  const auto line = [&](const std::string& key, const std::string& value) {
    out += "  " + key +
           std::string(std::max<std::size_t>(1, 18 - std::min<std::size_t>(17, key.size())), ' ') +
           value + '\n';
  };
  // The dtypes that trainable buffers have, mostly one.
  const auto dtypes = [&](std::string_view what) {
    std::string names;
    for (const int b : hop2_order_) {
      const DType dtype = what == "gradient" ? gradient_dtype(b)
                          : what == "hop 1"  ? hop1_wire(b)
                          : what == "hop 2"  ? hop2_wire(b)
                          : what == "sum"    ? sum_dtype(b)
                                             : master_dtype(b);
      const std::string word(name(dtype));
      if (names.find(word) == std::string::npos) names += (names.empty() ? "" : "/") + word;
    }
    return names.empty() ? std::string("none") : names;
  };
  const std::string of_a_device =
      request_.memory == Memory::host
          ? ""
          : ", conversions " + human(memory_.conversions) + ", step " + human(memory_.step);
  out += "plan\n";
  line("placement", request_.preset + ": " + plural(layout_.world_size(), "rank") + " on " +
                        plural(layout_.nodes(), "node") + ", " + plural(replicas, "shard group") +
                        " of " + std::to_string(p) + ", " + plural(p, "replica group") + " of " +
                        std::to_string(replicas));
  if (p <= 16 && replicas <= 8) {
    std::string groups;
    for (int group = 0; group < replicas; ++group) {
      groups += groups.empty() ? "" : " ";
      for (int tau = 0; tau < p; ++tau) {
        groups += (tau == 0 ? "[" : " ") + std::to_string(layout_.rank_of(group, tau));
      }
      groups += ']';
    }
    line("shard owners", groups + " (ranks in shard order)");
  }
  line("model", std::to_string(model_count_) + " elements in " +
                    plural(static_cast<std::int64_t>(unit_needs_slot_.size()), "unit") + ", " +
                    plural(flat_.buffer_count(), "buffer") + " (" +
                    std::to_string(flat_.persistent_buffers().size()) + " persistent)");
  if (request_.forward_only) {
    line("use", "forward only: weights, of dtype " + std::string(name(request_.compute)) +
                    " unless declared; no gradients, master weights or optimizer state");
    line("bytes a rank", human(memory_.total()) + " = shards " + human(memory_.compute_shards) +
                             ", gather slots " + human(memory_.gather_slots) + ", resident " +
                             human(memory_.resident) + of_a_device);
    const CollectiveCounts counts = calls.empty() ? count(1) : count(calls, 1);
    line("a pass",
         std::to_string(counts.gather) + " gathers, units in " +
             (calls.empty() ? "order of declaration, one lease at a time" : "the declared order"));
  } else {
    line("dtypes", "compute " + std::string(name(request_.compute)) + ", gradient " +
                       dtypes("gradient") + ", wire " + dtypes("hop 1") + " (hop 1), " +
                       dtypes("hop 2") + " (hop 2), accumulate " + dtypes("sum") + ", master " +
                       dtypes("master"));
    line("optimizer", request_.optimizer + ", state over the shard group");
    line("bytes a rank", human(memory_.total()) + " = shards " + human(memory_.compute_shards) +
                             ", master " + human(memory_.master_weights) + ", optimizer " +
                             human(memory_.optimizer_states) + ", accumulators " +
                             human(memory_.accumulators) + ",");
    line("", "gather slots " + human(memory_.gather_slots) + ", gradient slots " +
                 human(memory_.gradient_slots) + ", resident " + human(memory_.resident) +
                 ", scratch " + human(memory_.scratch) + of_a_device + ", staging " +
                 human(memory_.staging) + (request_.memory == Memory::host ? "" : " of the host"));
    const CollectiveCounts counts =
        calls.empty() ? count(request_.micro_steps) : count(calls, request_.micro_steps);
    line("a step", std::to_string(counts.gather) + " gathers, " + std::to_string(counts.hop1) +
                       " reduce-scatters (hop 1), " + std::to_string(counts.hop2) +
                       " replica reductions (hop 2), " + std::to_string(counts.norm) +
                       " small exchanges; " + plural(request_.micro_steps, "micro-step") +
                       (calls.empty() ? ", forward in order of declaration, backward in reverse, "
                                        "one lease at a time"
                                      : ", leases as declared"));
  }
  std::string transport = std::string(comm::name(request_.transport)) + ", " +
                          std::string(name(request_.memory)) + " memory; ";
  if (request_.transport == comm::TransportKind::nccl) {
    transport += request_.sums == comm::DeviceSums::wire ? "sums in the wire dtype"
                                                         : "sums in rank order in fp32";
  } else {
    transport += std::string(request_.forward_only ? "" : "reductions block the caller, ") +
                 "prefetched gathers progress inside mics calls";
  }
  if (!request_.transport_reason.empty()) transport += "; " + request_.transport_reason;
  line("transport", transport);
  if (two_stage_) {
    line("gather", "two stages: " + std::to_string(layout_.nodes_per_group()) + " nodes, then " +
                       std::to_string(layout_.lanes()) + " lanes");
  } else {
    line("gather", "one stage: " + (layout_.two_stage_possible() ? "two stages are switched off"
                                                                 : layout_.two_stage_obstacle()));
  }
  line("prefetch", request_.keep_gathered || p == 1
                       ? "none: buffers stay gathered"
                       : std::to_string(request_.prefetch) + " ahead in " +
                             plural(request_.slots, "slot") + ", from the second pass on");
  return out;
}

}  // namespace mics
