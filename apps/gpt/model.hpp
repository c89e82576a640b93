// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/engine/engine.hpp>
#include <mics/state/model.hpp>

#include <gpt/shape.hpp>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace gpt {

/// The ids of a GPT's parameters in a mics::Model, unit by unit in the order of GptShape::units().
struct GptIds {
  struct Unit {
    mics::UnitId id;
    std::vector<mics::ParameterId> parameters;
  };
  std::vector<Unit> units;

  [[nodiscard]] const Unit& embedding() const { return units.front(); }
  [[nodiscard]] const Unit& block(int layer) const {
    return units.at(static_cast<std::size_t>(layer) + 1);
  }
  [[nodiscard]] const Unit& final() const { return units.back(); }
};

/// Declares the units and parameters of a GPT. Matrices decay, norms and biases do not.
GptIds declare(mics::Model& model, const GptShape& shape);

/// The leases that a micro-step begins and ends: for Plan::count and Plan::text.
[[nodiscard]] std::vector<mics::LeaseCall> training_leases(const GptIds& ids);

/// The units in the order in which a micro-step gathers them: for Engine::declare_order.
[[nodiscard]] std::vector<mics::UnitId> training_order(const GptIds& ids);

/// Forward and backward passes of a GPT whose parameters an engine holds. Parameters come in the
/// engine's compute dtype; activations are fp64 where that is fp64, else fp32.
///
/// Units are gathered in the order embedding, block0, block1, ..., embedding and final (head,
/// loss and their backward in one lease), and backward from the last block to block0. The scope of
/// the embedding stays open from the head to the end, since the head's weight is the token
/// embedding. At most two leases, and two scopes, are open at a time.
///
/// With Recompute::yes the backward pass of a block first runs its forward pass again, in the lease
/// that it opens anyway: the order of units, and with it the number of gathers, stays the same.
class Gpt {
 public:
  /// Leases, and scopes, that are open at a time.
  static constexpr int slots_needed = 2;
  using Window = std::span<const Token>;  // positions + 1 tokens

  /// Allocates activations and scratch for up to `batch` samples a pass. Local.
  /// \param[in] compute  dtype of the gathered parameters
  Gpt(const GptShape& shape, GptIds ids, mics::DType compute, int batch,
      Recompute recompute = Recompute::no);
  ~Gpt();
  Gpt(Gpt&&) noexcept;
  Gpt& operator=(Gpt&&) noexcept;

  /// One micro-step: opens it with the number of windows, adds the sum of their losses (nats, mean
  /// over the positions of a window) to engine.loss(), and reduces all gradients.
  /// Collective over the shard group: ranks without windows call it with none.
  /// \throws std::invalid_argument for more windows than `batch`, a window of another length, or a
  /// token outside the vocabulary
  void micro_step(mics::Engine& engine, std::span<const Window> windows, bool is_last);

  /// Sum over the windows of their losses in nats, without gradients.
  /// Collective over the shard group: all of its ranks make the same number of calls.
  [[nodiscard]] double evaluate(mics::Engine& engine, std::span<const Window> windows);

  /// Logits of the token that follows `prefix`, 1 to `positions` tokens. Leaves the engine in an
  /// evaluation. Collective over the shard group.
  [[nodiscard]] std::vector<double> next_logits(mics::Engine& engine, Window prefix);

  /// Bytes of activations and scratch. Local.
  [[nodiscard]] std::size_t bytes() const;

 private:
  class Passes;
  template <class Real, class Stored>
  class PassesOf;
  int positions_;
  std::unique_ptr<Passes> passes_;
};

/// Nats to bits.
[[nodiscard]] double bits_of_nats(double nats);

}  // namespace gpt
