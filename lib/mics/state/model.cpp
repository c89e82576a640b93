// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/base/json_reader.hpp>
#include <mics/state/model.hpp>

#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numbers>
#include <source_location>
#include <utility>

namespace mics {
namespace {

std::string show(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

// Hexadecimal: values that differ in the last bit differ here.
std::string exact(double value) {
  std::array<char, 40> text{};
  std::snprintf(text.data(), text.size(), "%a", value);
  return text.data();
}

std::int64_t product(const std::vector<std::int64_t>& shape, const std::string& object) {
  constexpr std::size_t max_rank = 8;  // Kokkos'
  if (shape.size() > max_rank) {
    raise<ArgumentError>(
        {.object = object, .expected = "at most 8 extents", .found = std::to_string(shape.size())});
  }
  std::int64_t count = 1;
  for (const std::int64_t extent : shape) {
    if (extent < 0 ||
        (extent > 0 && count > std::numeric_limits<std::int64_t>::max() / 16 / extent)) {
      raise<ArgumentError>({.object = object,
                            .expected = "extents of 0 or more whose product fits 59 bits",
                            .found = show(shape)});
    }
    count *= extent;
  }
  return count;
}

// Names become those of a checkpoint, and JSON, HDF5 and safetensors hold no others.
void require_utf8(const std::string& object, std::string_view name,
                  std::source_location where = std::source_location::current()) {
  if (is_utf8(name)) return;
  std::string shown;
  for (const char c : name) shown += c < ' ' || c > '~' ? '?' : c;
  raise<ArgumentError>({.object = object, .expected = "a name in UTF-8", .found = in_quotes(shown)},
                       where);
}

template <class Function>
Function not_empty(Function function,
                   std::source_location where = std::source_location::current()) {
  if (function) return function;
  raise<ArgumentError>(
      {.object = "initial values", .expected = "a function", .found = "an empty one"}, where);
}

}  // namespace

Init Init::constant(double value) {
  Init init;
  init.draw_ = {.kind = Draw::Kind::constant, .a = value};
  return init;
}

Init Init::normal(double standard_deviation) {
  Init init;
  init.draw_ = {.kind = Draw::Kind::normal, .a = standard_deviation};
  return init;
}

Init Init::uniform(double low, double high) {
  Init init;
  init.draw_ = {.kind = Draw::Kind::uniform, .a = low, .b = high - low};
  return init;
}

Init Init::function(std::function<double(std::int64_t)> value) {
  Init init;
  init.function_ = not_empty(std::move(value));
  return init;
}

Init Init::complex_function(std::function<std::complex<double>(std::int64_t)> value) {
  Init init;
  init.complex_function_ = not_empty(std::move(value));
  return init;
}

std::optional<Draw> Init::draw(bool complex) const {
  if (function_ || complex_function_) return std::nullopt;
  Draw draw = draw_;
  if (complex && draw.kind == Draw::Kind::constant) draw.kind = Draw::Kind::real;
  if (complex && draw.kind == Draw::Kind::normal) draw.a *= std::numbers::sqrt2 / 2;
  return draw;
}

double Init::operator()(std::uint64_t seed, ParameterId parameter, std::int64_t index) const {
  if (function_) return function_(index);
  if (complex_function_) return complex_function_(index).real();
  return draw_(initial_stream(seed, parameter), static_cast<std::uint64_t>(index));
}

std::complex<double> Init::complex_value(std::uint64_t seed, ParameterId parameter,
                                         std::int64_t index) const {
  if (complex_function_) return complex_function_(index);
  if (function_) return function_(index);
  const Draw parts = *draw(true);
  const RandomStream stream = initial_stream(seed, parameter);
  const std::uint64_t real = 2 * static_cast<std::uint64_t>(index);
  return {parts(stream, real), parts(stream, real + 1)};
}

std::string Init::describe() const {
  if (function_ || complex_function_) return "function";
  switch (draw_.kind) {
    case Draw::Kind::normal:
      return "normal " + exact(draw_.a);
    case Draw::Kind::uniform:
      return "uniform " + exact(draw_.a) + " " + exact(draw_.b);
    case Draw::Kind::constant:
    case Draw::Kind::real:
      break;
  }
  return "constant " + exact(draw_.a);
}

const Model::Unit& Model::unit_of(UnitId unit) const {
  if (unit.value < 0 || unit.value >= units()) {
    raise<ArgumentError>({.object = "unit",
                          .expected = "one of the " + std::to_string(units()) + " of this model",
                          .found = "number " + std::to_string(unit.value)});
  }
  return units_[static_cast<std::size_t>(unit.value)];
}

const ParameterSpec& Model::spec(ParameterId parameter) const {
  if (parameter.value < 0 || parameter.value >= parameters()) {
    raise<ArgumentError>(
        {.object = "parameter",
         .expected = "one of the " + std::to_string(parameters()) + " of this model",
         .found = "number " + std::to_string(parameter.value)});
  }
  return parameters_[static_cast<std::size_t>(parameter.value)];
}

UnitId Model::unit(std::string_view name) {
  require_utf8("unit", name);
  const bool taken = unit_names_.contains(std::string(name));
  if (name.empty() || taken) {
    raise<ArgumentError>({.object = "unit",
                          .expected = "a name that is new",
                          .found = in_quotes(name) + (taken ? ", declared before" : "")});
  }
  unit_names_.emplace(name);
  units_.push_back({std::string(name), {}});
  return {units() - 1};
}

ParameterId Model::parameter(UnitId unit, std::string_view name, std::vector<std::int64_t> shape,
                             ParameterOptions options) {
  require_utf8("parameter of unit " + in_quotes(unit_of(unit).name), name);
  const std::string full = unit_of(unit).name + '/' + std::string(name);
  const std::string object = "parameter " + in_quotes(full);
  const auto twin = parameter_names_.find(full);
  const bool taken = twin != parameter_names_.end();
  // "b/c" of unit "a" is "c" of unit "a/b".
  if (taken && twin->second != unit) {
    raise<ArgumentError>(
        {.object = object,
         .expected = "a name that is new in the model",
         .found = "one of unit " + in_quotes(unit_of(twin->second).name) + ", declared before"});
  }
  if (name.empty() || taken) {
    raise<ArgumentError>({.object = object,
                          .expected = "a name that is new in its unit",
                          .found = in_quotes(name) + (taken ? ", declared before" : "")});
  }
  for (const double factor : {options.weight_decay_factor, options.learning_rate_factor}) {
    if (std::isfinite(factor) && factor >= 0) continue;
    raise<ArgumentError>({.object = object,
                          .expected = "finite factors of at least 0",
                          .found = std::to_string(factor)});
  }
  if (options.complex && options.dtype && bytes_of(*options.dtype) < 4) {
    raise<ArgumentError>({.object = object,
                          .expected = "fp32 or fp64 for a complex parameter",
                          .found = std::string(mics::name(*options.dtype))});
  }
  const std::int64_t count = product(shape, object);
  const ParameterId id{parameters()};
  parameter_names_.emplace(full, unit);
  parameters_.push_back({full, unit, std::move(shape), count, std::move(options)});
  units_[static_cast<std::size_t>(unit.value)].parameters.push_back(id);
  return id;
}

std::int64_t Model::count() const {
  std::int64_t total = 0;
  for (const ParameterSpec& spec : parameters_) total += spec.count;
  return total;
}

Model Model::frozen() const {
  Model model = *this;
  for (ParameterSpec& spec : model.parameters_) spec.options.trainable = false;
  return model;
}

std::string Model::describe() const {
  std::string text;
  for (const Unit& unit : units_) text += "unit " + unit.name + '\n';
  for (const ParameterSpec& spec : parameters_) {
    const ParameterOptions& o = spec.options;
    text += spec.name + ' ' + show(spec.shape) + ' ' +
            std::string(o.dtype ? mics::name(*o.dtype) : "default") +
            (o.complex ? " complex" : "") + (o.trainable ? " trainable " : " frozen ") +
            exact(o.weight_decay_factor) + ' ' + exact(o.learning_rate_factor) +
            (o.layout == MemoryLayout::right ? " right " : " left ") + o.init.describe() + '\n';
  }
  return text;
}

}  // namespace mics
