// SPDX-License-Identifier: Apache-2.0
#include <mics/state/for_blocks.hpp>
#include <mics/state/initialize.hpp>

namespace mics::state {
namespace {

// The scalar at `position` in the memory of a parameter.
double initial_value(const ParameterSpec& spec, ParameterId id, std::uint64_t seed,
                     std::int64_t position) {
  const MemoryLayout layout = spec.options.layout;
  if (!spec.options.complex) {
    return spec.options.init(seed, id, element_index(spec.shape, layout, position));
  }
  const std::complex<double> value =
      spec.options.init.complex_value(seed, id, element_index(spec.shape, layout, position / 2));
  return position % 2 == 0 ? value.real() : value.imag();
}

}  // namespace

void initialize(const Model& model, const FlatBuffer& buffer, const layout::Interval& range,
                std::uint64_t seed, void* master, DType master_dtype, void* compute) {
  const auto [first, last] = buffer.flat.parameters_in(range);
  for (std::int64_t i = first; i < last; ++i) {
    const layout::Interval whole = buffer.flat.parameter(i);
    const layout::Interval part = intersection(whole, range);
    const ParameterId id = buffer.parameters[static_cast<std::size_t>(i)];
    const ParameterSpec& spec = model.spec(id);
    visit_arithmetic(master_dtype, [&](auto master_tag) {
      using Master = typename decltype(master_tag)::type;
      visit(buffer.dtype, [&](auto compute_tag) {
        using Compute = typename decltype(compute_tag)::type;
        for_blocks("mics::state::initialize", part.length,
                   [&, part](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t k = begin; k < end; ++k) {
                       const std::int64_t position = part.offset + k;
                       const auto value = static_cast<Master>(
                           initial_value(spec, id, seed, position - whole.offset));
                       if (master != nullptr)
                         static_cast<Master*>(master)[position - range.offset] = value;
                       if (compute != nullptr) {
                         static_cast<Compute*>(compute)[position - range.offset] =
                             static_cast<Compute>(value);
                       }
                     }
                   });
      });
    });
  }
}

}  // namespace mics::state
