// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the implementations of a GPT's passes, on the host and on a device, have in common.

#include <mics/engine/engine.hpp>

#include <Kokkos_Core.hpp>
#include <gpt/block.hpp>
#include <gpt/model.hpp>

#include <cstddef>
#include <span>
#include <type_traits>
#include <vector>

namespace gpt {

/// Forward and backward passes over one batch of windows.
class Passes {
 public:
  Passes() = default;
  Passes(const Passes&) = delete;
  Passes& operator=(const Passes&) = delete;
  virtual ~Passes() = default;
  /// The batch of the next pass. \throws std::invalid_argument as Gpt::micro_step
  virtual void load(std::span<const Gpt::Window> windows) = 0;
  virtual void train(mics::Engine& engine) = 0;
  virtual double evaluate(mics::Engine& engine) = 0;
  /// Logits of the position after `position` of the first window, as an evaluation of one window
  /// left them.
  [[nodiscard]] virtual std::vector<double> logits(std::size_t position) const = 0;
  [[nodiscard]] virtual std::size_t bytes() const = 0;
};

/// Views of a unit's parameters from a lease (T is const) or a gradient scope, in the memory of
/// Exec.
template <template <class, class> class Unit, class T, class Exec, class Source>
Unit<T, Exec> unit_views(const Source& source, const GptIds::Unit& ids) {
  using Space = typename Exec::memory_space;
  Unit<T, Exec> result;
  auto id = ids.parameters.begin();
  result.visit([&](auto& view) {
    if constexpr (std::decay_t<decltype(view)>::rank() == 1) {
      view = source.template view<T*, Kokkos::LayoutRight, Space>(*id++);
    } else {
      view = source.template view<T**, Kokkos::LayoutRight, Space>(*id++);
    }
  });
  return result;
}

/// Copies the tokens of windows, one after another, to `target`.
/// \throws std::invalid_argument for a window of another length than positions + 1, or a token that
/// is not below the vocabulary
void copy_windows(const GptShape& shape, std::span<const Gpt::Window> windows, Token* target);

}  // namespace gpt
