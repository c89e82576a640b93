// SPDX-License-Identifier: Apache-2.0
#include <mics/state/arena.hpp>
#include <mics/state/flat_model.hpp>

#include <algorithm>
#include <map>
#include <utility>

namespace mics::state {

FlatModel::FlatModel(const Model& model, DType dtype, int shards, int slices,
                     Persistence persistence)
    : places_(static_cast<std::size_t>(model.parameters())),
      of_unit_(static_cast<std::size_t>(model.units())) {
  using Kind = std::pair<DType, bool>;
  const auto add = [&](int unit, const std::string& name, const Kind& kind,
                       std::vector<ParameterId> parameters) {
    FlatBuffer buffer{name, unit, kind.first, kind.second, std::move(parameters), {}};
    std::vector<std::int64_t> counts;
    for (const ParameterId id : buffer.parameters) counts.push_back(model.spec(id).scalars());
    buffer.flat = layout::FlatLayout::make(counts, shards, slices);
    const int index = buffer_count();
    for (std::size_t i = 0; i < buffer.parameters.size(); ++i) {
      const auto position = static_cast<std::int64_t>(i);
      places_[static_cast<std::size_t>(buffer.parameters[i].value)] = {
          index, position, buffer.flat.parameter(position)};
    }
    (unit < 0 ? persistent_ : of_unit_[static_cast<std::size_t>(unit)]).push_back(index);
    buffers_.push_back(std::move(buffer));
  };
  const auto add_all = [&](int unit, const std::string& name,
                           std::map<Kind, std::vector<ParameterId>>& kinds) {
    for (auto& [kind, parameters] : kinds) {
      std::string full = name;
      if (kinds.size() > 1) {
        full += ':' + std::string(mics::name(kind.first)) + (kind.second ? "" : ":frozen");
      }
      add(unit, full, kind, std::move(parameters));
    }
  };

  std::map<Kind, std::vector<ParameterId>> persistent;
  std::int64_t persisted = 0;
  for (int u = 0; u < model.units(); ++u) {
    std::map<Kind, std::vector<ParameterId>> kinds;
    for (const ParameterId id : model.parameters(UnitId{u})) {
      const ParameterSpec& spec = model.spec(id);
      const bool widened = spec.options.complex && bytes_of(dtype) < 4;
      const Kind kind{spec.options.dtype.value_or(widened ? DType::fp32 : dtype),
                      spec.options.trainable};
      const bool small = persistence.threshold > 0 && spec.scalars() <= persistence.threshold &&
                         persisted + spec.scalars() <= persistence.model_threshold;
      if (small) persisted += spec.scalars();
      (small ? persistent : kinds)[kind].push_back(id);
    }
    add_all(u, model.name(UnitId{u}), kinds);
  }
  add_all(-1, "persistent", persistent);
}

std::int64_t FlatModel::gathered_bytes(UnitId unit) const {
  std::int64_t bytes = 0;
  for (const int b : buffers_of(unit)) {
    bytes += arena_bytes(buffer(b).flat.count() * bytes_of(buffer(b).dtype));
  }
  return bytes;
}

std::vector<HyperRun> hyper_runs(const Model& model, const FlatBuffer& buffer,
                                 const layout::Interval& range) {
  std::vector<HyperRun> runs;
  const auto [first, last] = buffer.flat.parameters_in(range);
  for (std::int64_t i = first; i < last; ++i) {
    const layout::Interval part = intersection(buffer.flat.parameter(i), range);
    if (part.empty()) continue;
    const ParameterOptions& options =
        model.spec(buffer.parameters[static_cast<std::size_t>(i)]).options;
    const std::int64_t end = part.end() - range.offset;
    if (!runs.empty() && runs.back().weight_decay_factor == options.weight_decay_factor &&
        runs.back().learning_rate_factor == options.learning_rate_factor) {
      runs.back().end = end;
      continue;
    }
    const std::int64_t begin = runs.empty() ? 0 : runs.back().end;
    runs.push_back({begin, end, options.weight_decay_factor, options.learning_rate_factor});
  }
  if (runs.empty()) runs.push_back({});
  runs.back().end = range.length;
  return runs;
}

std::vector<TensorSegment> tensor_segments(const FlatBuffer& buffer,
                                           const layout::Interval& range) {
  std::vector<TensorSegment> segments;
  const auto [first, last] = buffer.flat.parameters_in(range);
  for (std::int64_t i = first; i < last; ++i) {
    const layout::Interval part = intersection(buffer.flat.parameter(i), range);
    if (part.empty()) continue;
    segments.push_back({part.offset - range.offset, part.end() - range.offset, i});
  }
  return segments;
}

}  // namespace mics::state
