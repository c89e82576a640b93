// SPDX-License-Identifier: Apache-2.0
#include <mics/base/device.hpp>
#include <mics/base/vector_clones.hpp>
#include <mics/state/for_blocks.hpp>
#include <mics/state/initialize.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <vector>

namespace mics::state {
namespace {

// The memory of a parameter: which of its values lies where.
struct ValueOrder {
  std::int64_t extents[8] = {};
  int rank = 0;
  MemoryLayout layout = MemoryLayout::right;
  bool complex = false;

  explicit ValueOrder(const ParameterSpec& spec)
      : rank(static_cast<int>(spec.shape.size())),
        layout(spec.options.layout),
        complex(spec.options.complex) {
    std::copy(spec.shape.begin(), spec.shape.end(), extents);
  }

  // Number, as a Draw counts, of the scalar at `position`.
  KOKKOS_INLINE_FUNCTION std::uint64_t operator()(std::int64_t position) const {
    if (!complex) {
      return static_cast<std::uint64_t>(element_index(extents, rank, layout, position));
    }
    const std::int64_t element = element_index(extents, rank, layout, position / 2);
    return static_cast<std::uint64_t>(2 * element + position % 2);
  }
};

// Values are drawn so many at a time, in first-level cache.
constexpr std::int64_t chunk_count = 256;
using Chunk = std::array<double, chunk_count>;

MICS_VECTOR_CLONES void draw_normal(double deviation, const RandomStream& stream,
                                    const std::uint64_t* numbers, std::int64_t count,
                                    double* values) {
  const RandomStream own = stream;
  for (std::int64_t i = 0; i < count; ++i) values[i] = deviation * own.normal(numbers[i]);
}

void draw_chunk(const Draw& draw, const RandomStream& stream, const ValueOrder& order,
                std::int64_t position, std::int64_t count, Chunk& values) {
  std::array<std::uint64_t, chunk_count> numbers;
  for (std::int64_t i = 0; i < count; ++i) {
    numbers[static_cast<std::size_t>(i)] = order(position + i);
  }
  if (draw.kind == Draw::Kind::normal) {
    draw_normal(draw.a, stream, numbers.data(), count, values.data());
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const auto at = static_cast<std::size_t>(i);
    values[at] = draw(stream, numbers[at]);
  }
}

void call_function(const ParameterSpec& spec, ParameterId id, std::uint64_t seed,
                   std::int64_t position, std::int64_t count, Chunk& values) {
  const auto index = [&](std::int64_t element) {
    return element_index(spec.shape, spec.options.layout, element);
  };
  for (std::int64_t i = 0; i < count; ++i) {
    double& value = values[static_cast<std::size_t>(i)];
    if (!spec.options.complex) {
      value = spec.options.init(seed, id, index(position + i));
      continue;
    }
    const auto parts = spec.options.init.complex_value(seed, id, index((position + i) / 2));
    value = (position + i) % 2 == 0 ? parts.real() : parts.imag();
  }
}

// Calls `body(spec, id, part, whole)` for the parameters that have elements in the range.
template <class Body>
void for_parameters(const Model& model, const FlatBuffer& buffer, const layout::Interval& range,
                    const Body& body) {
  const auto [first, last] = buffer.flat.parameters_in(range);
  for (std::int64_t i = first; i < last; ++i) {
    const layout::Interval whole = buffer.flat.parameter(i);
    const ParameterId id = buffer.parameters[static_cast<std::size_t>(i)];
    body(model.spec(id), id, intersection(whole, range), whole);
  }
}

// Calls `f(TypeTag<master>, TypeTag<compute>)`.
template <class F>
void visit_types(DType master, DType compute, const F& f) {
  visit_arithmetic(master, [&](auto master_tag) {
    visit(compute, [&](auto compute_tag) { f(master_tag, compute_tag); });
  });
}

// Floor: one write.
template <class Master, class Compute>
struct DrawKernel {
  Draw draw;
  RandomStream stream;
  ValueOrder order;
  std::int64_t first;  // position in the parameter
  Master* master;
  Compute* compute;

  KOKKOS_FUNCTION void operator()(std::int64_t i) const {
    const auto value = static_cast<Master>(draw(stream, order(first + i)));
    if (master != nullptr) master[i] = value;
    if (compute != nullptr) compute[i] = static_cast<Compute>(value);
  }
};

template <class T>
T* at(void* data, std::int64_t index) {
  return data == nullptr ? nullptr : static_cast<T*>(data) + index;
}

// Values that only the host can compute, a part at a time.
void copy_initial(const Execution& exec, const Model& model, const FlatBuffer& buffer,
                  const layout::Interval& range, std::uint64_t seed, std::byte* master,
                  DType master_dtype, std::byte* compute) {
  constexpr std::int64_t part_count = std::int64_t{1} << 20;
  const std::int64_t master_bytes = bytes_of(master_dtype);
  const std::int64_t compute_bytes = bytes_of(buffer.dtype);
  const std::int64_t most = std::min(range.length, part_count);
  std::vector<std::byte> host_master(static_cast<std::size_t>(most * master_bytes));
  std::vector<std::byte> host_compute(static_cast<std::size_t>(most * compute_bytes));
  for (std::int64_t done = 0; done < range.length; done += part_count) {
    const std::int64_t count = std::min(part_count, range.length - done);
    initialize(model, buffer, {range.offset + done, count}, seed, host_master.data(), master_dtype,
               host_compute.data());
    if (master != nullptr) {
      device::copy(exec, master + done * master_bytes, host_master.data(), count * master_bytes);
    }
    if (compute != nullptr) {
      device::copy(exec, compute + done * compute_bytes, host_compute.data(),
                   count * compute_bytes);
    }
    exec.fence("mics::state::initialize: the host's memory is free for the next part");
  }
}

}  // namespace

void initialize(const Model& model, const FlatBuffer& buffer, const layout::Interval& range,
                std::uint64_t seed, void* master, DType master_dtype, void* compute) {
  for_parameters(
      model, buffer, range,
      [&](const ParameterSpec& spec, ParameterId id, const layout::Interval& part,
          const layout::Interval& whole) {
        const std::optional<Draw> draw = spec.options.init.draw(spec.options.complex);
        const RandomStream stream = initial_stream(seed, id);
        const ValueOrder order(spec);
        visit_types(master_dtype, buffer.dtype, [&](auto master_tag, auto compute_tag) {
          using Master = typename decltype(master_tag)::type;
          using Compute = typename decltype(compute_tag)::type;
          auto* const masters = at<Master>(master, part.offset - range.offset);
          auto* const computes = at<Compute>(compute, part.offset - range.offset);
          const std::int64_t first = part.offset - whole.offset;
          for_blocks(
              "mics::state::initialize", part.length, [&](std::int64_t begin, std::int64_t end) {
                Chunk values;
                for (; begin < end; begin += chunk_count) {
                  const std::int64_t count = std::min(chunk_count, end - begin);
                  if (draw) {
                    draw_chunk(*draw, stream, order, first + begin, count, values);
                  } else {
                    call_function(spec, id, seed, first + begin, count, values);
                  }
                  for (std::int64_t i = 0; i < count; ++i) {
                    const auto value = static_cast<Master>(values[static_cast<std::size_t>(i)]);
                    if (masters != nullptr) masters[begin + i] = value;
                    if (computes != nullptr) computes[begin + i] = static_cast<Compute>(value);
                  }
                }
              });
        });
      });
}

void initialize(const Execution& exec, const Model& model, const FlatBuffer& buffer,
                const layout::Interval& range, std::uint64_t seed, void* master, DType master_dtype,
                void* compute) {
  using Policy = Kokkos::RangePolicy<device::Space, Kokkos::IndexType<std::int64_t>>;
  for_parameters(
      model, buffer, range,
      [&](const ParameterSpec& spec, ParameterId id, const layout::Interval& part,
          const layout::Interval& whole) {
        if (part.empty()) return;
        const std::int64_t offset = part.offset - range.offset;
        const std::optional<Draw> draw = spec.options.init.draw(spec.options.complex);
        if (!draw) {
          copy_initial(exec, model, buffer, part, seed,
                       at<std::byte>(master, offset * bytes_of(master_dtype)), master_dtype,
                       at<std::byte>(compute, offset * bytes_of(buffer.dtype)));
          return;
        }
        visit_types(master_dtype, buffer.dtype, [&](auto master_tag, auto compute_tag) {
          using Master = typename decltype(master_tag)::type;
          using Compute = typename decltype(compute_tag)::type;
          Kokkos::parallel_for(
              "mics::state::initialize", Policy(exec.as<device::Space>(), 0, part.length),
              DrawKernel<Master, Compute>{.draw = *draw,
                                          .stream = initial_stream(seed, id),
                                          .order = ValueOrder(spec),
                                          .first = part.offset - whole.offset,
                                          .master = at<Master>(master, offset),
                                          .compute = at<Compute>(compute, offset)});
        });
      });
}

}  // namespace mics::state
