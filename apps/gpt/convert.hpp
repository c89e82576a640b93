// SPDX-License-Identifier: Apache-2.0
#pragma once

// Parameters may be stored in another type P than the activations' Real (a bf16 gather under float
// kernels). Here structs of views (EmbeddingParameters, BlockParameters, FinalParameters) go from
// one to the other through a scratch area; where P is Real, views pass through and nothing is
// copied.

#include <Kokkos_Core.hpp>
#include <gpt/block.hpp>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

namespace gpt {

/// A bump allocator over one View that is allocated once, or not at all where P is Real. reset()
/// frees all.
template <class Real, class Exec>
class ConversionScratch {
 public:
  /// \param[in] count  elements of all views that live at once
  explicit ConversionScratch(std::int64_t count)
      : memory_(Kokkos::view_alloc("gpt::ConversionScratch::memory", Kokkos::WithoutInitializing),
                static_cast<std::size_t>(count)) {}

  void reset() { used_ = 0; }

  [[nodiscard]] Vector<Real, Exec> take(std::size_t count) {
    if (used_ + count > memory_.size()) {
      throw std::length_error("gpt::ConversionScratch: elements: expected at most " +
                              std::to_string(memory_.size()) + ", found " +
                              std::to_string(used_ + count));
    }
    const Vector<Real, Exec> result(memory_.data() + used_, count);
    used_ += count;
    return result;
  }

 private:
  Kokkos::View<Real*, typename Exec::memory_space> memory_;
  std::size_t used_ = 0;
};

/// Elements of scratch that one conversion of parameters (and another of gradients) of this shape
/// needs: the head holds the embedding and the final norm at once.
[[nodiscard]] inline std::int64_t conversion_scratch_count(const GptShape& shape) {
  const auto units = shape.units();
  return std::max(units.at(1).count(), units.front().count() + units.back().count());
}

/// Converts one element; small floating types (bf16) convert through float.
template <class To, class From>
KOKKOS_FORCEINLINE_FUNCTION To convert_element(const From& value) {
  if constexpr (std::is_floating_point_v<To> && std::is_floating_point_v<From>) {
    return static_cast<To>(value);
  } else if constexpr (std::is_floating_point_v<To>) {
    return static_cast<To>(static_cast<float>(value));
  } else {
    return static_cast<To>(static_cast<float>(value));
  }
}

namespace detail {

template <class To, class From>
struct CastElements {
  To* to;
  const From* from;
  KOKKOS_FUNCTION void operator()(const std::int64_t i) const {
    to[i] = convert_element<To>(from[i]);
  }
};

template <class To, class From>
struct AddElements {
  To* to;
  const From* from;
  KOKKOS_FUNCTION void operator()(const std::int64_t i) const {
    to[i] = convert_element<To>(convert_element<From>(to[i]) + from[i]);
  }
};

template <class Exec, class F>
void for_elements(const char* label, const Exec& exec, std::size_t count, const F& f) {
  Kokkos::parallel_for(label,
                       Kokkos::RangePolicy<Exec, Kokkos::IndexType<std::int64_t>>(
                           exec, 0, static_cast<std::int64_t>(count)),
                       f);
}

/// A view of the same extents as `like` over other memory.
template <class Target, class Like, class Real>
Target view_like(const Like& like, Real* memory) {
  if constexpr (Like::rank() == 1) {
    return Target(memory, like.extent(0));
  } else {
    return Target(memory, like.extent(0), like.extent(1));
  }
}

/// Calls f(member of a, member of b) for the members of two structs of views in order.
template <class A, class B, class F>
void visit_pairs(A& a, B& b, const F& f) {
  // Members of B are taken by position, since visit walks one struct at a time.
  int position = 0;
  a.visit([&](auto& of_a) {
    int other = 0;
    b.visit([&](auto& of_b) {
      if (other++ == position) {
        if constexpr (std::decay_t<decltype(of_a)>::rank() ==
                      std::decay_t<decltype(of_b)>::rank()) {
          f(of_a, of_b);
        }
      }
    });
    ++position;
  });
}

}  // namespace detail

/// Parameters as Real: the views themselves if P is Real, else converted copies in the scratch.
/// Ordered on exec.
template <class Real, template <class, class> class Unit, class P, class Exec>
Unit<const Real, Exec> parameters_as(const Exec& exec, Unit<const P, Exec> stored,
                                     ConversionScratch<Real, Exec>& scratch) {
  if constexpr (std::is_same_v<Real, P>) {
    return stored;
  } else {
    Unit<const Real, Exec> result;
    detail::visit_pairs(stored, result, [&](const auto& from, auto& to) {
      const Vector<Real, Exec> memory = scratch.take(from.size());
      detail::for_elements("gpt::parameters_as", exec, from.size(),
                           detail::CastElements<Real, P>{memory.data(), from.data()});
      to = detail::view_like<std::decay_t<decltype(to)>>(from, memory.data());
    });
    return result;
  }
}

/// Views of Real that backward functions add into: `stored` itself if P is Real, else zeroed views
/// in the scratch, which add_gradients brings into `stored`.
template <class Real, template <class, class> class Unit, class P, class Exec>
Unit<Real, Exec> gradients_as(const Exec& exec, Unit<P, Exec> stored,
                              ConversionScratch<Real, Exec>& scratch) {
  if constexpr (std::is_same_v<Real, P>) {
    return stored;
  } else {
    Unit<Real, Exec> result;
    detail::visit_pairs(stored, result, [&](const auto& from, auto& to) {
      const Vector<Real, Exec> memory = scratch.take(from.size());
      Kokkos::deep_copy(exec, memory, Real(0));
      to = detail::view_like<std::decay_t<decltype(to)>>(from, memory.data());
    });
    return result;
  }
}

/// stored += computed where the types differ, with one rounding to P an element; nothing where they
/// are the same views.
template <class Real, template <class, class> class Unit, class P, class Exec>
void add_gradients(const Exec& exec, Unit<Real, Exec> computed, Unit<P, Exec> stored) {
  if constexpr (!std::is_same_v<Real, P>) {
    detail::visit_pairs(computed, stored, [&](const auto& from, auto& to) {
      detail::for_elements("gpt::add_gradients", exec, from.size(),
                           detail::AddElements<P, Real>{to.data(), from.data()});
    });
  }
}

}  // namespace gpt
