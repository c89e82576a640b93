// SPDX-License-Identifier: Apache-2.0
#include <gpt/shape.hpp>

#include <cmath>
#include <stdexcept>

namespace gpt {

namespace {

constexpr double initial_spread = 0.02;  // GPT-2

void require(bool ok, const char* extent, const std::string& expected, int found) {
  if (!ok) {
    throw std::invalid_argument("gpt::GptShape: " + std::string(extent) + ": expected " + expected +
                                ", found " + std::to_string(found));
  }
}

ParameterSpec matrix(std::string name, std::int64_t rows, std::int64_t columns, double spread) {
  return {std::move(name), {rows, columns}, {InitialKind::normal, spread}, WeightDecay::yes};
}

ParameterSpec vector(std::string name, std::int64_t count, double value) {
  return {std::move(name), {count}, {InitialKind::constant, value}, WeightDecay::no};
}

}  // namespace

std::int64_t ParameterSpec::count() const {
  std::int64_t product = 1;
  for (const std::int64_t extent : shape) product *= extent;
  return product;
}

std::int64_t UnitSpec::count() const {
  std::int64_t sum = 0;
  for (const ParameterSpec& parameter : parameters) sum += parameter.count();
  return sum;
}

void GptShape::validate() const {
  require(layers >= 1, "layers", "at least 1", layers);
  require(heads >= 1, "heads", "at least 1", heads);
  require(width >= 1, "width", "at least 1", width);
  require(width % heads == 0, "width", "a multiple of heads (" + std::to_string(heads) + ")",
          width);
  require(positions >= 1, "positions", "at least 1", positions);
  require(vocabulary >= 1, "vocabulary", "at least 1", vocabulary);
}

std::vector<UnitSpec> GptShape::units() const {
  validate();
  const std::int64_t c = width;
  const double residual_spread = initial_spread / std::sqrt(2.0 * layers);
  std::vector<UnitSpec> result;
  result.push_back({"embedding",
                    {matrix("token.weight", vocabulary, c, initial_spread),
                     matrix("position.weight", positions, c, initial_spread)}});
  for (int layer = 0; layer < layers; ++layer) {
    result.push_back(
        {"block" + std::to_string(layer),
         {vector("ln1.weight", c, 1), vector("ln1.bias", c, 0),
          matrix("attn.qkv.weight", 3 * c, c, initial_spread), vector("attn.query.bias", c, 0),
          vector("attn.value.bias", c, 0), matrix("attn.proj.weight", c, c, residual_spread),
          vector("attn.proj.bias", c, 0), vector("ln2.weight", c, 1), vector("ln2.bias", c, 0),
          matrix("mlp.up.weight", 4 * c, c, initial_spread), vector("mlp.up.bias", 4 * c, 0),
          matrix("mlp.down.weight", c, 4 * c, residual_spread), vector("mlp.down.bias", c, 0)}});
  }
  result.push_back({"final", {vector("ln_f.weight", c, 1), vector("ln_f.bias", c, 0)}});
  return result;
}

std::int64_t GptShape::parameter_count() const {
  std::int64_t sum = 0;
  for (const UnitSpec& unit : units()) sum += unit.count();
  return sum;
}

double GptShape::flops_per_position() const {
  const double block_weights = 12.0 * width * width;
  const double attention = 2.0 * positions * width;  // scores and weighted sum, whole squares
  return 6.0 * (layers * (block_weights + attention) + static_cast<double>(vocabulary) * width);
}

}  // namespace gpt
