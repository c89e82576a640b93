// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/base/random.hpp>

#include <Kokkos_Macros.hpp>
#include <Kokkos_MathematicalFunctions.hpp>

#include <complex>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace mics {

/// Names a unit of a Model.
struct UnitId {
  int value = -1;
  friend bool operator==(const UnitId&, const UnitId&) = default;
};

/// Names a parameter of a Model.
struct ParameterId {
  int value = -1;
  friend bool operator==(const ParameterId&, const ParameterId&) = default;
};

/// How the elements of a multi-dimensional parameter follow each other in memory: `right` is
/// row-major, on every platform the default; `left` is column-major.
enum class MemoryLayout : std::uint8_t { right, left };

/// A random or constant initial value as a function that kernels can evaluate: the same bits on
/// every host and device.
struct Draw {
  /// `real`: a constant of a complex parameter, whose imaginary parts are 0.
  enum class Kind : std::uint8_t { constant, real, normal, uniform };

  Kind kind = Kind::constant;
  double a = 0;  ///< the constant, the standard deviation or the lower end
  double b = 0;  ///< the upper end less the lower one

  /// Value of number `index` of the stream of a parameter: a row-major index, of a complex
  /// parameter of its real and imaginary parts in turn.
  [[nodiscard]] KOKKOS_FORCEINLINE_FUNCTION double operator()(const RandomStream& stream,
                                                              std::uint64_t index) const {
    switch (kind) {
      case Kind::normal:
        return a * stream.normal(index);
      case Kind::uniform:
        return Kokkos::fma(b, stream.uniform(index), a);
      case Kind::real:
        return index % 2 == 0 ? a : 0;
      case Kind::constant:
        break;
    }
    return a;
  }
};

/// The value of each element as a function of its row-major index, so that every rank computes its
/// own elements, whatever the layout, and nothing is broadcast.
class Init {
 public:
  [[nodiscard]] static Init zeros() { return constant(0); }
  [[nodiscard]] static Init ones() { return constant(1); }
  [[nodiscard]] static Init constant(double value);
  /// Normal with mean 0, from the counter-based generator keyed by (seed, parameter, element).
  [[nodiscard]] static Init normal(double standard_deviation);
  /// Uniform in [low, high), from the same generator.
  [[nodiscard]] static Init uniform(double low, double high);
  /// Any function of the row-major element index: the same on every rank, called from any thread
  /// of the host. \throws ArgumentError if it is empty
  [[nodiscard]] static Init function(std::function<double(std::int64_t)> value);
  /// The same for complex parameters.
  [[nodiscard]] static Init complex_function(
      std::function<std::complex<double>(std::int64_t)> value);

  /// Value of element `index` of parameter `parameter`.
  [[nodiscard]] double operator()(std::uint64_t seed, ParameterId parameter,
                                  std::int64_t index) const;
  /// Value of an element of a complex parameter. `normal` has its standard deviation over both
  /// parts together, `uniform` draws each part, the others are real.
  [[nodiscard]] std::complex<double> complex_value(std::uint64_t seed, ParameterId parameter,
                                                   std::int64_t index) const;
  /// The values of a parameter, complex or not, as one that kernels can evaluate; nothing for
  /// functions.
  [[nodiscard]] std::optional<Draw> draw(bool complex) const;
  /// One line that tells two initializers apart, as far as they can be: a function is opaque.
  [[nodiscard]] std::string describe() const;

 private:
  Draw draw_;  // of a parameter that is not complex, where there is no function
  std::function<double(std::int64_t)> function_;
  std::function<std::complex<double>(std::int64_t)> complex_function_;
};

/// What may be said of a parameter beside its name and shape.
struct ParameterOptions {
  Init init = Init::zeros();
  std::optional<DType> dtype = {};  ///< of the gathered parameter; default: the engine's
  /// Elements are `Kokkos::complex<float>` or `<double>`: pairs of fp32 or fp64, fp32 where the
  /// engine's dtype has 16 bits. Gradients, sums and optimizers treat the two parts as two numbers.
  bool complex = false;
  bool trainable = true;            ///< frozen parameters have no gradient and no optimizer state
  double weight_decay_factor = 1;   ///< multiplies the optimizer's weight decay
  double learning_rate_factor = 1;  ///< multiplies the optimizer's learning rate
  MemoryLayout layout = MemoryLayout::right;
};

/// A declared parameter.
struct ParameterSpec {
  std::string name;  ///< `unit/parameter`
  UnitId unit;
  std::vector<std::int64_t> shape;  ///< up to 8 extents, 0 allowed; empty: a scalar
  std::int64_t count = 1;           ///< product of the shape
  ParameterOptions options;

  /// Real numbers in the parameter: two an element if it is complex.
  [[nodiscard]] std::int64_t scalars() const { return options.complex ? 2 * count : count; }
};

/// The parameters of a model, grouped into units that are gathered and reduced together. A plain
/// description: it holds no values. Every rank declares the same.
///
///   mics::Model model;
///   const auto layer = model.unit("layer0");
///   const auto weight = model.parameter(layer, "weight", {64, 32}, {.init =
///   mics::Init::normal(0.02)});
class Model {
 public:
  /// A new unit. \throws ArgumentError if the name is taken, empty or not UTF-8.
  UnitId unit(std::string_view name);
  /// A new parameter of `unit`. \throws ArgumentError for a bad shape, a name that is taken, empty
  /// or not UTF-8, or no such unit.
  ParameterId parameter(UnitId unit, std::string_view name, std::vector<std::int64_t> shape,
                        ParameterOptions options = {});

  [[nodiscard]] int units() const { return static_cast<int>(units_.size()); }
  [[nodiscard]] int parameters() const { return static_cast<int>(parameters_.size()); }
  [[nodiscard]] const std::string& name(UnitId unit) const { return unit_of(unit).name; }
  [[nodiscard]] const ParameterSpec& spec(ParameterId parameter) const;
  /// The unit's parameters in the order of declaration.
  [[nodiscard]] const std::vector<ParameterId>& parameters(UnitId unit) const {
    return unit_of(unit).parameters;
  }
  /// Elements of all parameters.
  [[nodiscard]] std::int64_t count() const;
  /// The same parameters, none of them trainable.
  [[nodiscard]] Model frozen() const;
  /// One line a unit and a parameter: what all ranks must agree on, to the last bit.
  [[nodiscard]] std::string describe() const;

 private:
  struct Unit {
    std::string name;
    std::vector<ParameterId> parameters;
  };
  [[nodiscard]] const Unit& unit_of(UnitId unit) const;

  std::vector<Unit> units_;
  std::vector<ParameterSpec> parameters_;
  std::unordered_set<std::string> unit_names_;
  std::unordered_map<std::string, UnitId> parameter_names_;  // whole names
};

/// The stream that a parameter's initial values are drawn from.
[[nodiscard]] constexpr RandomStream initial_stream(std::uint64_t seed, ParameterId parameter) {
  return {seed, static_cast<std::uint64_t>(parameter.value)};
}

/// Row-major index of the element at `position` in the memory of a parameter.
[[nodiscard]] KOKKOS_INLINE_FUNCTION std::int64_t element_index(const std::int64_t* shape, int rank,
                                                                MemoryLayout layout,
                                                                std::int64_t position) {
  if (layout == MemoryLayout::right) return position;
  // Column-major: the first index runs fastest.
  std::int64_t index = 0;
  std::int64_t rest = position;
  std::int64_t stride = 1;
  for (int i = 0; i < rank; ++i) stride *= shape[i];
  for (int i = 0; i < rank; ++i) {
    stride /= shape[i];
    index += rest % shape[i] * stride;
    rest /= shape[i];
  }
  return index;
}
[[nodiscard]] inline std::int64_t element_index(const std::vector<std::int64_t>& shape,
                                                MemoryLayout layout, std::int64_t position) {
  return element_index(shape.data(), static_cast<int>(shape.size()), layout, position);
}

}  // namespace mics
