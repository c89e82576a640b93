// SPDX-License-Identifier: Apache-2.0
// Gradients of whole GPTs against central differences in double, and what follows from sums over
// samples: no samples, split batches, other types.

#include "small_gpt.hpp"

#include <Kokkos_Core.hpp>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

using mics::test::SmallGpt;

double largest_magnitude(const auto& values, std::int64_t begin, std::int64_t count) {
  double result = 0;
  for (std::int64_t i = begin; i < begin + count; ++i) {
    result = std::max(result, std::abs(static_cast<double>(values[static_cast<std::size_t>(i)])));
  }
  return result;
}

/// Derivative of the loss by parameter `index`: central differences of fourth order.
double numerical_derivative(SmallGpt<double>& model, std::int64_t index) {
  double& value = model.parameters[static_cast<std::size_t>(index)];
  const double start = value;
  const double step = 1e-3;
  const auto loss_at = [&](double offset) {
    value = start + offset;
    return model.loss();
  };
  const double result =
      (8 * (loss_at(step) - loss_at(-step)) - (loss_at(2 * step) - loss_at(-2 * step))) /
      (12 * step);
  value = start;
  return result;
}

/// Compares at most `most` elements of each parameter, evenly spread.
void expect_gradients_match(const gpt::GptShape& shape, int batch, std::int64_t most) {
  SmallGpt<double> model(shape, batch);
  model.loss_and_gradients();
  for (const auto& range : model.ranges()) {
    const double largest = largest_magnitude(model.gradients, range.begin, range.count);
    EXPECT_GT(largest, 1e-5) << range.name << " has no gradient";
    double worst = 0;
    const std::int64_t stride = std::max<std::int64_t>(1, range.count / most);
    for (std::int64_t i = 0; i < range.count; i += stride) {
      const std::int64_t index = range.begin + i;
      const double analytic = model.gradients[static_cast<std::size_t>(index)];
      worst = std::max(worst, std::abs(analytic - numerical_derivative(model, index)));
    }
    EXPECT_LE(worst, 1e-6 * largest) << range.name;
    testing::Test::RecordProperty(range.name, std::to_string(worst / largest));
  }
}

TEST(GradientTest, MatchesCentralDifferencesInEveryElement) {
  expect_gradients_match({.layers = 2, .heads = 2, .width = 8, .positions = 6, .vocabulary = 11}, 3,
                         1 << 20);
}

TEST(GradientTest, MatchesCentralDifferencesForOddExtents) {
  expect_gradients_match({.layers = 1, .heads = 3, .width = 15, .positions = 7, .vocabulary = 13},
                         5, 40);
  expect_gradients_match({.layers = 3, .heads = 1, .width = 9, .positions = 5, .vocabulary = 3}, 1,
                         40);
}

TEST(GradientTest, MatchesCentralDifferencesAcrossRowBlocks) {
  // 70 rows: more than one partial sum of a column.
  expect_gradients_match({.layers = 1, .heads = 2, .width = 10, .positions = 14, .vocabulary = 17},
                         5, 12);
}

TEST(GradientTest, MatchesCentralDifferencesForAVocabularyBeyondBytes) {
  expect_gradients_match({.layers = 1, .heads = 2, .width = 8, .positions = 6, .vocabulary = 1000},
                         2, 40);
}

TEST(GradientTest, MatchesCentralDifferencesWithOnePosition) {
  const gpt::GptShape shape{.layers = 1, .heads = 2, .width = 8, .positions = 1, .vocabulary = 11};
  SmallGpt<double> model(shape, 4);
  model.loss_and_gradients();
  for (const auto& range : model.ranges()) {
    const double largest = largest_magnitude(model.gradients, range.begin, range.count);
    for (std::int64_t i = range.begin; i < range.begin + range.count; i += 7) {
      // Scores do not matter where each query sees one key: queries and keys have gradient zero.
      EXPECT_NEAR(model.gradients[static_cast<std::size_t>(i)], numerical_derivative(model, i),
                  1e-6 * largest + 1e-11)
          << range.name;
    }
  }
}

TEST(GradientTest, LossOfTrainingAndValidationAgree) {
  SmallGpt<double> model({.layers = 2, .heads = 2, .width = 8, .positions = 6, .vocabulary = 11},
                         3);

  const double trained = model.loss_and_gradients();
  const double validated = model.loss();

  EXPECT_NEAR(trained, validated, 1e-12);
}

TEST(GradientTest, NoSamplesAddNothing) {
  SmallGpt<double> model({.layers = 2, .heads = 2, .width = 8, .positions = 6, .vocabulary = 11},
                         3);
  model.activations().resize(0);
  std::ranges::fill(model.gradients, 5);

  const double loss = model.loss_and_gradients();

  EXPECT_EQ(loss, 0);
  EXPECT_EQ(model.loss(), 0);
  for (const double value : model.gradients) ASSERT_EQ(value, 5);
}

TEST(GradientTest, CapacityOfZeroSamplesIsAModelToo) {
  SmallGpt<float> model({.layers = 1, .heads = 1, .width = 4, .positions = 3, .vocabulary = 5}, 0);

  EXPECT_EQ(model.loss_and_gradients(), 0);
}

TEST(GradientTest, MoreSamplesThanCapacityAreRefused) {
  SmallGpt<double> model({.layers = 1, .heads = 1, .width = 4, .positions = 3, .vocabulary = 5}, 2);

  EXPECT_THROW(model.activations().resize(3), std::invalid_argument);
}

TEST(GradientTest, SecondCallAddsTheSameAgainWithTheSameBits) {
  const gpt::GptShape shape{.layers = 2, .heads = 2, .width = 8, .positions = 6, .vocabulary = 11};
  SmallGpt<double> once(shape, 3);
  SmallGpt<double> twice(shape, 3);

  once.loss_and_gradients();
  twice.loss_and_gradients();
  EXPECT_EQ(once.gradients, twice.gradients);
  twice.loss_and_gradients();

  for (const auto& range : once.ranges()) {
    const double largest = largest_magnitude(once.gradients, range.begin, range.count);
    for (std::int64_t i = range.begin; i < range.begin + range.count; ++i) {
      const auto index = static_cast<std::size_t>(i);
      ASSERT_NEAR(twice.gradients[index], 2 * once.gradients[index], 1e-12 * largest) << range.name;
    }
  }
}

TEST(GradientTest, IsTheSumOverSamples) {
  const gpt::GptShape shape{.layers = 2, .heads = 2, .width = 8, .positions = 6, .vocabulary = 11};
  SmallGpt<double> all(shape, 3);
  SmallGpt<double> first(shape, 3);
  first.activations().resize(2);  // the first two of the three windows

  const double loss_of_all = all.loss_and_gradients();
  const double loss_of_first = first.loss_and_gradients();

  EXPECT_GT(loss_of_all, loss_of_first);
  SmallGpt<double> pair(shape, 2);
  EXPECT_NEAR(pair.loss_and_gradients(), loss_of_first, 1e-12);
  EXPECT_EQ(pair.gradients, first.gradients);
}

TEST(GradientTest, LossScaleMultipliesGradientsAndNotTheLoss) {
  const gpt::GptShape shape{.layers = 1, .heads = 2, .width = 8, .positions = 6, .vocabulary = 11};
  SmallGpt<double> plain(shape, 3);
  SmallGpt<double> scaled(shape, 3);

  const double loss = plain.loss_and_gradients();
  const double loss_of_scaled = scaled.loss_and_gradients(1024);

  EXPECT_EQ(loss, loss_of_scaled);
  for (std::size_t i = 0; i < plain.gradients.size(); ++i) {
    ASSERT_NEAR(scaled.gradients[i], 1024 * plain.gradients[i],
                1e-12 * std::abs(scaled.gradients[i]) + 1e-12);
  }
}

/// |found - expected| relative to the largest expected value of each parameter.
template <class P>
double worst_deviation(const SmallGpt<double>& expected, const std::vector<P>& found) {
  double worst = 0;
  for (const auto& range : expected.ranges()) {
    const double largest = largest_magnitude(expected.gradients, range.begin, range.count);
    for (std::int64_t i = range.begin; i < range.begin + range.count; ++i) {
      const auto index = static_cast<std::size_t>(i);
      const double deviation = std::abs(static_cast<double>(static_cast<float>(found[index])) -
                                        expected.gradients[index]);
      worst = std::max(worst, deviation / largest);
    }
  }
  return worst;
}

TEST(GradientTest, SinglePrecisionFollowsDouble) {
  const gpt::GptShape shape{
      .layers = 2, .heads = 4, .width = 32, .positions = 24, .vocabulary = 60};
  SmallGpt<double> in_double(shape, 4);
  SmallGpt<float> in_float(shape, 4);

  const double expected = in_double.loss_and_gradients();
  const double found = in_float.loss_and_gradients();

  EXPECT_NEAR(found / expected, 1, 2e-6);
  EXPECT_LE(worst_deviation(in_double, in_float.gradients), 5e-5);
}

TEST(GradientTest, FloatParametersUnderDoubleActivations) {
  const gpt::GptShape shape{.layers = 2, .heads = 2, .width = 8, .positions = 6, .vocabulary = 11};
  SmallGpt<double> plain(shape, 3);  // its parameters are representable in float
  SmallGpt<double, float> mixed(shape, 3);

  EXPECT_EQ(plain.loss_and_gradients(), mixed.loss_and_gradients());

  EXPECT_LE(worst_deviation(plain, mixed.gradients), 1.2e-7);
}

/// A two-byte float as a library would have it: explicit conversions from and to float, in kernels.
struct Half {
  std::uint16_t bits = 0;
  Half() = default;
  KOKKOS_FUNCTION explicit Half(float value) {
    const auto u = Kokkos::bit_cast<std::uint32_t>(value);
    bits = static_cast<std::uint16_t>((u + 0x7fffU + (u >> 16 & 1U)) >> 16);
  }
  KOKKOS_FUNCTION explicit operator float() const {
    return Kokkos::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }
};

TEST(GradientTest, TwoByteParametersUnderFloatActivations) {
  const gpt::GptShape shape{.layers = 2, .heads = 2, .width = 8, .positions = 6, .vocabulary = 11};
  SmallGpt<float, Half> stored_short(shape, 3);
  SmallGpt<double> same_values(shape, 3);
  for (std::size_t i = 0; i < same_values.parameters.size(); ++i) {
    same_values.parameters[i] = static_cast<double>(static_cast<float>(stored_short.parameters[i]));
  }

  const double expected = same_values.loss_and_gradients();
  const double found = stored_short.loss_and_gradients();

  EXPECT_NEAR(found / expected, 1, 1e-5);
  // One rounding to 8 bits, two for the token embedding, which is stored at the head and at the
  // end.
  EXPECT_LE(worst_deviation(same_values, stored_short.gradients), 1.0 / 256);
}

TEST(GptShapeTest, CountsParametersAsTheTableDoes) {
  const gpt::GptShape shape;

  const auto units = shape.units();

  ASSERT_EQ(units.size(), 6U);
  EXPECT_EQ(units[0].count(), 256 * 128 + 128 * 128);
  EXPECT_EQ(units[1].parameters.size(),
            static_cast<std::size_t>(gpt::BlockParameters<int, SmallGpt<float>::Exec>::count));
  EXPECT_EQ(units[1].count(), 12 * 128 * 128 + 12 * 128);
  EXPECT_EQ(shape.parameter_count(), 841984);
}

TEST(GptShapeTest, DecaysMatricesOnlyAndScalesResidualProjections) {
  const gpt::GptShape shape{.layers = 8, .heads = 2, .width = 8, .positions = 4, .vocabulary = 11};

  for (const auto& unit : shape.units()) {
    for (const auto& parameter : unit.parameters) {
      const bool is_matrix = parameter.shape.size() == 2;
      EXPECT_EQ(parameter.weight_decay == gpt::WeightDecay::yes, is_matrix) << parameter.name;
      EXPECT_EQ(parameter.initial.kind == gpt::InitialKind::normal, is_matrix) << parameter.name;
      if (parameter.name == "attn.proj.weight" || parameter.name == "mlp.down.weight") {
        EXPECT_DOUBLE_EQ(parameter.initial.spread, 0.02 / 4);
      }
    }
  }
}

TEST(GptShapeTest, NamesTheExtentThatCannotBe) {
  const gpt::GptShape shape{.layers = 2, .heads = 3, .width = 8, .positions = 4, .vocabulary = 11};

  try {
    shape.validate();
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "gpt::GptShape: width: expected a multiple of heads (3), found 8");
  }
}

TEST(ActivationsTest, BytesAreThoseThatTheDocumentationStates) {
  const gpt::Activations<float, SmallGpt<float>::Exec> activations({}, 6);

  const double rows = 6 * 128;
  const double per_layer = 16 * 128 + 4 * 128 + 4;
  const double once = 8 * 128 + 256 + 4 * 128 + 3 + 4 * 128 / 64.0;
  const double expected = 4 * rows * (4 * per_layer + once);
  EXPECT_NEAR(static_cast<double>(activations.bytes()), expected, 1e-3 * expected);
}

TEST(ActivationsTest, RecomputedBytesAreThoseThatTheDocumentationStates) {
  using Activations = gpt::Activations<float, SmallGpt<float>::Exec>;
  const Activations kept({}, 6);
  const Activations recomputed({}, 6, gpt::Recompute::yes);

  const double rows = 6 * 128;
  const double once = 15 * 128 + 4 * 128 + 4 + 8 * 128 + 256 + 4 * 128 + 3 + 4 * 128 / 64.0;
  const double expected = 4 * rows * (4 * 128 + once);
  EXPECT_NEAR(static_cast<double>(recomputed.bytes()), expected, 1e-3 * expected);
  EXPECT_LT(recomputed.bytes(), kept.bytes() / 2);
  RecordProperty("bytes_kept", static_cast<int>(kept.bytes()));
  RecordProperty("bytes_recomputed", static_cast<int>(recomputed.bytes()));
}

TEST(RecomputeTest, GradientsHaveTheSameBits) {
  for (const int layers : {1, 2, 5}) {
    const gpt::GptShape shape{
        .layers = layers, .heads = 2, .width = 8, .positions = 6, .vocabulary = 11};
    SmallGpt<float> kept(shape, 3);
    SmallGpt<float> recomputed(shape, 3, gpt::Recompute::yes);

    const double loss = kept.loss_and_gradients();

    EXPECT_EQ(recomputed.loss_and_gradients(), loss);
    EXPECT_EQ(recomputed.gradients, kept.gradients);
  }
}

}  // namespace
