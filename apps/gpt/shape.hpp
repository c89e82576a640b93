// SPDX-License-Identifier: Apache-2.0
#pragma once

// Extents of a GPT and the table of its parameters, as data: what an engine registers, initialises
// and decays.

#include <cstdint>
#include <string>
#include <vector>

namespace gpt {

/// The number of a word of the vocabulary, 0 to V - 1.
using Token = std::uint32_t;

/// Whether a backward pass finds what the forward pass of a block wrote, or computes it again.
enum class Recompute : std::uint8_t {
  no,
  yes,  ///< only the inputs of blocks are kept; the rest of all of them lies in one place
};

/// How elements start: `constant` with value = spread, or `normal` with mean 0 and standard
/// deviation = spread.
enum class InitialKind : std::uint8_t { constant, normal };

struct Initial {
  InitialKind kind = InitialKind::constant;
  double spread = 0;
};

enum class WeightDecay : std::uint8_t { no, yes };

struct ParameterSpec {
  std::string name;                 // within the unit: "attn.qkv.weight"
  std::vector<std::int64_t> shape;  // row-major
  Initial initial;
  WeightDecay weight_decay = WeightDecay::no;

  [[nodiscard]] std::int64_t count() const;
};

/// Parameters that are gathered together.
struct UnitSpec {
  std::string name;  // "embedding", "block0", ..., "final"
  std::vector<ParameterSpec> parameters;

  [[nodiscard]] std::int64_t count() const;
};

/// Extents. Example: layers 4, heads 4, width 128, positions 128, vocabulary 256 has 841,984
/// parameters.
struct GptShape {
  int layers = 4;
  int heads = 4;
  int width = 128;       // a multiple of heads
  int positions = 128;   // context
  int vocabulary = 256;  // tokens that there are; a multiple of 64 suits matrix products

  /// \throws std::invalid_argument naming the extent, if the shape cannot be built
  void validate() const;

  /// Units in the order of the forward pass: "embedding", "block0" ... , "final".
  ///
  /// The order of parameters within a unit is the order of the members of EmbeddingParameters,
  /// BlockParameters and FinalParameters. The token embedding is also the output head. Matrices
  /// decay, norms and biases do not. Initial values are those of GPT-2: normal 0.02, projections
  /// into the residual stream scaled by 1/sqrt(2 layers).
  [[nodiscard]] std::vector<UnitSpec> units() const;

  [[nodiscard]] std::int64_t parameter_count() const;

  /// Floating-point operations of forward and backward for one position: 6 a weight in a product,
  /// and attention.
  [[nodiscard]] double flops_per_position() const;
};

}  // namespace gpt
