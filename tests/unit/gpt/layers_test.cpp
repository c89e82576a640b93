// SPDX-License-Identifier: Apache-2.0
// Each layer's forward pass against loops in double that share no code with it, and the contracts
// of the backward passes: they add, they take no samples, they do not depend on threads.

#include <Kokkos_Core.hpp>
#include <gpt/gemm.hpp>
#include <gpt/layers.hpp>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

using gpt::Token;
using Exec = Kokkos::DefaultHostExecutionSpace;
using Doubles = std::vector<double>;

/// Numbers that look random, the same on every machine: fractional parts of a quadratic sequence.
double wave(std::int64_t index, double scale = 1) {
  const double x = 0.5 + 0.6180339887 * static_cast<double>(index) +
                   0.0137 * static_cast<double>(index % 977) * static_cast<double>(index % 977);
  return scale * (2 * (x - std::floor(x)) - 1);
}

template <class Real>
struct Array {
  std::vector<Real> data;
  int rows, columns;

  Array(int row_count, int column_count, std::int64_t seed = -1, double scale = 1)
      : data(static_cast<std::size_t>(row_count) * column_count),
        rows(row_count),
        columns(column_count) {
    for (std::size_t i = 0; i < data.size(); ++i) {
      data[i] = seed < 0
                    ? Real(std::numeric_limits<Real>::quiet_NaN())
                    : static_cast<Real>(wave(seed * 1009 + static_cast<std::int64_t>(i), scale));
    }
  }
  void fill(double value) { std::fill(data.begin(), data.end(), static_cast<Real>(value)); }
  gpt::Matrix<Real, Exec> matrix() {
    return gpt::Matrix<Real, Exec>(data.data(), static_cast<std::size_t>(rows),
                                   static_cast<std::size_t>(columns));
  }
  gpt::Vector<Real, Exec> vector() { return gpt::Vector<Real, Exec>(data.data(), data.size()); }
  double operator()(int i, int j) const {
    return static_cast<double>(data[static_cast<std::size_t>(i) * columns + j]);
  }
  double operator[](int i) const { return static_cast<double>(data[static_cast<std::size_t>(i)]); }
};

struct Windows {
  std::vector<Token> data;
  int batch, positions;

  Windows(int batch_size, int position_count, int vocabulary)
      : data(static_cast<std::size_t>(batch_size) * (position_count + 1)),
        batch(batch_size),
        positions(position_count) {
    for (std::size_t i = 0; i < data.size(); ++i) {
      data[i] =
          static_cast<Token>((i * i * 7 + i * 3 + i / 5) % static_cast<std::size_t>(vocabulary));
    }
  }
  gpt::Matrix<const Token, Exec> matrix() const {
    return gpt::Matrix<const Token, Exec>(data.data(), static_cast<std::size_t>(batch),
                                          static_cast<std::size_t>(positions + 1));
  }
  Token operator()(int b, int t) const {
    return data[static_cast<std::size_t>(b) * (positions + 1) + t];
  }
};

template <class Real>
constexpr double tolerance = std::is_same_v<Real, float> ? 3e-6 : 1e-14;

/// |found - expected| within `factor` roundings of the larger of 1 and |expected|.
template <class Real>
void expect_close(double found, double expected, double factor = 1) {
  EXPECT_NEAR(found, expected, factor * tolerance<Real> * std::max(1.0, std::abs(expected)));
}

template <class Real>
class LayersTest : public testing::Test {
 protected:
  Exec exec;
};
using Reals = testing::Types<float, double>;
TYPED_TEST_SUITE(LayersTest, Reals);

/// Extents around the lanes, tiles and row blocks of the kernels.
const std::vector<std::pair<int, int>> extents = {{1, 1},   {2, 7},   {5, 16},  {63, 31},
                                                  {64, 32}, {65, 33}, {130, 65}};

TYPED_TEST(LayersTest, ExponentialMatchesTheLibraryOverItsWholeRange) {
  for (int i = -8700; i <= 8700; ++i) {
    const auto x = static_cast<TypeParam>(i * 0.01);
    const double expected = std::exp(static_cast<double>(x));

    const auto found = static_cast<double>(gpt::exponential(x));

    const double bound = sizeof(TypeParam) == sizeof(float) ? 2e-7 : 1e-15;
    ASSERT_NEAR(found / expected, 1, bound) << "x = " << x;
  }
  EXPECT_TRUE(std::isnan(gpt::exponential(std::numeric_limits<TypeParam>::quiet_NaN())));
}

TYPED_TEST(LayersTest, GemmOfStridedBatchMatchesThePortableKernel) {
  using gpt::Transpose;
  const gpt::GemmShape shape{5, 7, 3, 2, 3};
  for (const Transpose ta : {Transpose::no, Transpose::yes}) {
    for (const Transpose tb : {Transpose::no, Transpose::yes}) {
      Array<TypeParam> a(20, 40, 1);
      Array<TypeParam> b(20, 40, 2);
      Array<TypeParam> by_blas(20, 40, 3);
      Array<TypeParam> by_loops(20, 40, 3);
      const auto in = [](Array<TypeParam>& m) {
        return gpt::Operand<const TypeParam>{m.data.data(), 40, 400, 10};
      };
      const auto out = [](Array<TypeParam>& m) {
        return gpt::Operand<TypeParam>{m.data.data(), 40, 400, 10};
      };

      gpt::gemm<TypeParam>(this->exec, ta, tb, shape, 2, in(a), in(b), 0.5, out(by_blas));
      gpt::plain_gemm<TypeParam>(this->exec, ta, tb, shape, 2, in(a), in(b), 0.5, out(by_loops));

      for (int i = 0; i < 800; ++i) expect_close<TypeParam>(by_blas[i], by_loops[i], 4);
    }
  }
}

TYPED_TEST(LayersTest, GemmOfDepthZeroScalesItsTarget) {
  Array<TypeParam> c(2, 2, 4);
  const double before = c[3];

  gpt::gemm<TypeParam>(this->exec, gpt::Transpose::no, gpt::Transpose::no, {2, 2, 0}, 1,
                       {nullptr, 0}, {nullptr, 2}, 0.5, {c.data.data(), 2});

  expect_close<TypeParam>(c[3], before / 2);
}

TYPED_TEST(LayersTest, LayerNormMatchesReference) {
  for (const auto& [rows, width] : extents) {
    Array<TypeParam> x(rows, width, 1, 3);
    Array<TypeParam> weight(1, width, 2);
    Array<TypeParam> bias(1, width, 3);
    Array<TypeParam> y(rows, width);
    Array<TypeParam> mean(1, rows);
    Array<TypeParam> rstd(1, rows);

    gpt::layer_norm_forward<TypeParam>(this->exec, x.matrix(), weight.vector(), bias.vector(),
                                       y.matrix(), mean.vector(), rstd.vector());

    for (int i = 0; i < rows; ++i) {
      double center = 0;
      for (int j = 0; j < width; ++j) center += x(i, j) / width;
      double variance = 0;
      for (int j = 0; j < width; ++j) variance += std::pow(x(i, j) - center, 2) / width;
      const double scale = 1 / std::sqrt(variance + 1e-5);
      expect_close<TypeParam>(mean[i], center);
      expect_close<TypeParam>(rstd[i], scale, 4);
      for (int j = 0; j < width; ++j) {
        // With one column the result is rounding times 1/sqrt(epsilon).
        expect_close<TypeParam>(y(i, j), (x(i, j) - center) * scale * weight[j] + bias[j],
                                width == 1 ? 400 : 4);
      }
    }
  }
}

TYPED_TEST(LayersTest, LayerNormOfLargeOffsetKeepsItsDigits) {
  Array<TypeParam> x(1, 64, 1);
  for (auto& value : x.data) value = static_cast<TypeParam>(std::round(value * 8) + 1000);
  Array<TypeParam> weight(1, 64);
  weight.fill(1);
  Array<TypeParam> bias(1, 64);
  bias.fill(0);
  Array<TypeParam> y(1, 64);
  Array<TypeParam> mean(1, 1);
  Array<TypeParam> rstd(1, 1);

  gpt::layer_norm_forward<TypeParam>(this->exec, x.matrix(), weight.vector(), bias.vector(),
                                     y.matrix(), mean.vector(), rstd.vector());

  double sum_of_squares = 0;
  for (int j = 0; j < 64; ++j) sum_of_squares += y[j] * y[j] / 64;
  EXPECT_NEAR(sum_of_squares, 1, 1e-4);
}

TYPED_TEST(LayersTest, LinearMatchesReferenceWithAndWithoutBiasAndResidual) {
  for (const auto& [rows, inputs] : extents) {
    const int outputs = inputs + 3;
    Array<TypeParam> x(rows, inputs, 1);
    Array<TypeParam> weight(outputs, inputs, 2);
    Array<TypeParam> bias(1, outputs, 3);
    Array<TypeParam> residual(rows, outputs, 4);
    for (const bool with_bias : {false, true}) {
      for (const bool with_residual : {false, true}) {
        Array<TypeParam> y(rows, outputs);
        if (!with_bias && !with_residual) y.fill(7);  // overwritten: CBLAS reads no NaN with beta 0

        gpt::linear_forward<TypeParam>(
            this->exec, x.matrix(), weight.matrix(),
            with_bias ? bias.vector() : gpt::Vector<TypeParam, Exec>(),
            with_residual ? residual.matrix() : gpt::Matrix<TypeParam, Exec>(), y.matrix());

        for (int i = 0; i < rows; ++i) {
          for (int o = 0; o < outputs; ++o) {
            double expected = (with_bias ? bias[o] : 0) + (with_residual ? residual(i, o) : 0);
            for (int k = 0; k < inputs; ++k) expected += x(i, k) * weight(o, k);
            expect_close<TypeParam>(y(i, o), expected, 4);
          }
        }
      }
    }
  }
}

TYPED_TEST(LayersTest, LinearMayWriteOverItsResidual) {
  Array<TypeParam> x(4, 3, 1);
  Array<TypeParam> weight(5, 3, 2);
  Array<TypeParam> bias(1, 5, 3);
  Array<TypeParam> apart(4, 5);
  Array<TypeParam> residual(4, 5, 4);

  gpt::linear_forward<TypeParam>(this->exec, x.matrix(), weight.matrix(), bias.vector(),
                                 residual.matrix(), apart.matrix());
  gpt::linear_forward<TypeParam>(this->exec, x.matrix(), weight.matrix(), bias.vector(),
                                 residual.matrix(), residual.matrix());

  EXPECT_EQ(residual.data, apart.data);
}

TYPED_TEST(LayersTest, QkvHasBiasForQueriesAndValuesOnly) {
  for (const auto& [rows, width] : extents) {
    Array<TypeParam> x(rows, width, 1);
    Array<TypeParam> weight(3 * width, width, 2);
    Array<TypeParam> query_bias(1, width, 3);
    Array<TypeParam> value_bias(1, width, 4);
    Array<TypeParam> qkv(rows, 3 * width);

    gpt::qkv_forward<TypeParam>(this->exec, x.matrix(), weight.matrix(), query_bias.vector(),
                                value_bias.vector(), qkv.matrix());

    for (int i = 0; i < rows; ++i) {
      for (int o = 0; o < 3 * width; ++o) {
        double expected = 0;
        if (o < width) expected = query_bias[o];
        if (o >= 2 * width) expected = value_bias[o - 2 * width];
        for (int k = 0; k < width; ++k) expected += x(i, k) * weight(o, k);
        expect_close<TypeParam>(qkv(i, o), expected, 4);
      }
    }
  }
}

struct AttentionCase {
  int batch, positions, heads, head_width;
};

TYPED_TEST(LayersTest, AttentionMatchesReference) {
  for (const auto [batch, positions, heads, head_width] :
       {AttentionCase{1, 1, 1, 1}, {2, 5, 3, 7}, {3, 6, 2, 8}, {1, 33, 1, 16}, {2, 17, 4, 3}}) {
    const int width = heads * head_width;
    Array<TypeParam> qkv(batch * positions, 3 * width, 1, 2);
    Array<TypeParam> probabilities(batch * heads * positions, positions);
    Array<TypeParam> y(batch * positions, width);
    probabilities.fill(9);

    gpt::attention_forward<TypeParam>(this->exec, heads, qkv.matrix(), probabilities.matrix(),
                                      y.matrix());

    for (int b = 0; b < batch; ++b) {
      for (int h = 0; h < heads; ++h) {
        for (int t = 0; t < positions; ++t) {
          Doubles weight(static_cast<std::size_t>(t) + 1);
          double total = 0;
          for (int s = 0; s <= t; ++s) {
            double dot = 0;
            for (int k = 0; k < head_width; ++k) {
              dot += qkv(b * positions + t, h * head_width + k) *
                     qkv(b * positions + s, width + h * head_width + k);
            }
            total += weight[s] = std::exp(dot / std::sqrt(static_cast<double>(head_width)));
          }
          for (int s = 0; s < positions; ++s) {
            expect_close<TypeParam>(probabilities((b * heads + h) * positions + t, s),
                                    s <= t ? weight[s] / total : 0, 4);
          }
          for (int k = 0; k < head_width; ++k) {
            double expected = 0;
            for (int s = 0; s <= t; ++s) {
              expected +=
                  weight[s] / total * qkv(b * positions + s, 2 * width + h * head_width + k);
            }
            expect_close<TypeParam>(y(b * positions + t, h * head_width + k), expected, 8);
          }
        }
      }
    }
  }
}

TYPED_TEST(LayersTest, GeluIsTheTanhForm) {
  for (const auto& [rows, width] : extents) {
    Array<TypeParam> x(rows, width, 1, 6);
    Array<TypeParam> y(rows, width);

    gpt::gelu_forward<TypeParam>(this->exec, x.matrix(), y.matrix());

    for (int i = 0; i < rows * width; ++i) {
      const double inner =
          std::sqrt(2 / 3.14159265358979323846) * (x[i] + 0.044715 * std::pow(x[i], 3));
      expect_close<TypeParam>(y[i], 0.5 * x[i] * (1 + std::tanh(inner)));
    }
  }
}

TYPED_TEST(LayersTest, GeluSaturatesWithoutOverflow) {
  Array<TypeParam> x(1, 4, 0);
  x.data = {-1000, 1000, -30, 0};
  Array<TypeParam> y(1, 4);
  Array<TypeParam> d_y(1, 4);
  d_y.fill(1);
  Array<TypeParam> d_x(1, 4);

  gpt::gelu_forward<TypeParam>(this->exec, x.matrix(), y.matrix());
  gpt::gelu_backward<TypeParam>(this->exec, d_y.matrix(), x.matrix(), d_x.matrix());

  const Doubles values = {0, 1000, 0, 0};
  const Doubles slopes = {0, 1, 0, 0.5};
  for (int i = 0; i < 4; ++i) {
    EXPECT_NEAR(y[i], values[i], 1e-25);
    EXPECT_NEAR(d_x[i], slopes[i], 1e-25);
  }
}

TYPED_TEST(LayersTest, ResidualAddAdds) {
  Array<TypeParam> x(3, 5, 1);
  Array<TypeParam> y(3, 5, 2);
  const Array<TypeParam> before = y;

  gpt::residual_add<TypeParam>(this->exec, x.matrix(), y.matrix());

  for (int i = 0; i < 15; ++i) expect_close<TypeParam>(y[i], before[i] + x[i]);
}

TYPED_TEST(LayersTest, EmbeddingIsTokenPlusPosition) {
  const Windows windows(3, 7, 11);
  Array<TypeParam> token(11, 9, 1);
  Array<TypeParam> position(8, 9, 2);  // one more than the windows use
  Array<TypeParam> x(21, 9);

  gpt::embedding_forward<TypeParam>(this->exec, windows.matrix(), token.matrix(), position.matrix(),
                                    x.matrix());

  for (int b = 0; b < 3; ++b) {
    for (int t = 0; t < 7; ++t) {
      for (int c = 0; c < 9; ++c) {
        expect_close<TypeParam>(x(b * 7 + t, c), token(windows(b, t), c) + position(t, c));
      }
    }
  }
}

TYPED_TEST(LayersTest, EmbeddingBackwardAddsTheRowsOfEachTokenAndPosition) {
  for (const int vocabulary : {1, 4, 1000}) {  // of the last most are not in the batch
    const Windows windows(3, 7, vocabulary);
    std::vector<std::int32_t> order(21);
    Array<TypeParam> d_x(21, 9, 1);
    Array<TypeParam> d_token(vocabulary, 9, 2);
    Array<TypeParam> d_position(8, 9, 3);
    const Array<TypeParam> token_before = d_token;
    const Array<TypeParam> position_before = d_position;

    gpt::sort_by_token(windows.matrix(), gpt::Vector<std::int32_t, Exec>(order.data(), 21));
    gpt::embedding_backward<TypeParam>(this->exec, windows.matrix(),
                                       gpt::Vector<const std::int32_t, Exec>(order.data(), 21),
                                       d_x.matrix(), d_token.matrix(), d_position.matrix());

    for (int c = 0; c < 9; ++c) {
      for (int v = 0; v < vocabulary; ++v) {
        double expected = token_before(v, c);
        for (int b = 0; b < 3; ++b) {
          for (int t = 0; t < 7; ++t) {
            expected += windows(b, t) == static_cast<Token>(v) ? d_x(b * 7 + t, c) : 0;
          }
        }
        expect_close<TypeParam>(d_token(v, c), expected, 16);
      }
      for (int t = 0; t < 8; ++t) {
        double expected = position_before(t, c);
        for (int b = 0; t < 7 && b < 3; ++b) expected += d_x(b * 7 + t, c);
        expect_close<TypeParam>(d_position(t, c), expected, 4);
      }
    }
  }
}

TEST(SortByTokenTest, RowsOfOneTokenStayInTheirOrder) {
  const std::vector<Token> tokens = {5, 2, 5, 9, 2, 5, 70000, 0};  // two windows of 3 + 1
  std::vector<std::int32_t> order(6);

  gpt::sort_by_token(gpt::Matrix<const Token, Exec>(tokens.data(), 2, 4),
                     gpt::Vector<std::int32_t, Exec>(order.data(), 6));

  // Rows 0 to 5 hold 5, 2, 5 and 2, 5, 70000; 9 and 0 are targets only.
  EXPECT_EQ(order, (std::vector<std::int32_t>{1, 3, 0, 2, 4, 5}));
}

TYPED_TEST(LayersTest, CrossEntropyAndItsGradientMatchReference) {
  for (const double spread : {1.0, 30.0}) {
    for (const int vocabulary : {1, 2, 11, 67, 256, 1031}) {
      const Windows windows(3, 5, vocabulary);
      const double scale = 2;
      Array<TypeParam> logits(15, vocabulary, 1, spread);
      const Array<TypeParam> before = logits;
      Array<TypeParam> row_losses(1, 15);
      Doubles losses(3, -1);
      Doubles losses_alone(3, -2);

      gpt::cross_entropy_forward<TypeParam>(this->exec, logits.matrix(), windows.matrix(),
                                            row_losses.vector(),
                                            gpt::Vector<double, Exec>(losses_alone.data(), 3));
      gpt::cross_entropy_forward_backward<TypeParam>(
          this->exec, logits.matrix(), windows.matrix(), gpt::Scalar<const double, Exec>(&scale),
          row_losses.vector(), gpt::Vector<double, Exec>(losses.data(), 3));

      for (int b = 0; b < 3; ++b) {
        double loss = 0;
        for (int t = 0; t < 5; ++t) {
          const int i = b * 5 + t;
          double total = 0;
          for (int v = 0; v < vocabulary; ++v) total += std::exp(before(i, v));
          loss += (std::log(total) - before(i, windows(b, t + 1))) / 5;
          for (int v = 0; v < vocabulary; ++v) {
            const double hit = static_cast<Token>(v) == windows(b, t + 1) ? 1 : 0;
            expect_close<TypeParam>(logits(i, v),
                                    scale / 5.0 * (std::exp(before(i, v)) / total - hit));
          }
        }
        expect_close<TypeParam>(losses[b], loss, 4);
        EXPECT_NEAR(losses_alone[b], losses[b], tolerance<TypeParam> * std::max(1.0, losses[b]));
      }
    }
  }
}

TYPED_TEST(LayersTest, CrossEntropyOfHugeLogitsStaysFinite) {
  Windows windows(1, 2, 3);
  windows.data = {0, 1, 2};
  Array<TypeParam> logits(2, 3, 0);
  logits.data = {10000, -10000, 0, -5e4, -5e4, 5e4};
  Array<TypeParam> row_losses(1, 2);
  Doubles losses(1);
  const double scale = 1;

  gpt::cross_entropy_forward_backward<TypeParam>(
      this->exec, logits.matrix(), windows.matrix(), gpt::Scalar<const double, Exec>(&scale),
      row_losses.vector(), gpt::Vector<double, Exec>(losses.data(), 1));

  EXPECT_NEAR(row_losses[0], 20000, 1e-2);
  EXPECT_NEAR(row_losses[1], 0, 1e-6);
  EXPECT_NEAR(losses[0], 10000, 1e-2);
  const Doubles gradient = {0.5, -0.5, 0, 0, 0, 0};
  for (int i = 0; i < 6; ++i) EXPECT_NEAR(logits[i], gradient[i], 1e-6);
}

TYPED_TEST(LayersTest, NotANumberReachesTheLoss) {
  const Windows windows(1, 1, 3);
  Array<TypeParam> logits(1, 3);  // NaN
  Array<TypeParam> row_losses(1, 1);
  Doubles losses(1);

  gpt::cross_entropy_forward<TypeParam>(this->exec, logits.matrix(), windows.matrix(),
                                        row_losses.vector(),
                                        gpt::Vector<double, Exec>(losses.data(), 1));

  EXPECT_TRUE(std::isnan(losses[0]));
}

TYPED_TEST(LayersTest, BackwardOfLayerNormAddsIntoAllItsTargets) {
  Array<TypeParam> d_y(70, 9, 1);
  Array<TypeParam> x(70, 9, 2);
  Array<TypeParam> weight(1, 9, 3);
  Array<TypeParam> y(70, 9);
  Array<TypeParam> mean(1, 70);
  Array<TypeParam> rstd(1, 70);
  Array<TypeParam> partial(1, static_cast<int>(gpt::column_sum_workspace(70, 9)));
  Array<TypeParam> d_x(70, 9);
  Array<TypeParam> d_weight(1, 9);
  Array<TypeParam> d_bias(1, 9);
  gpt::layer_norm_forward<TypeParam>(this->exec, x.matrix(), weight.vector(), weight.vector(),
                                     y.matrix(), mean.vector(), rstd.vector());
  const auto run_on = [&](double start) {
    d_x.fill(start);
    d_weight.fill(start);
    d_bias.fill(start);
    gpt::layer_norm_backward<TypeParam>(this->exec, d_y.matrix(), x.matrix(), mean.vector(),
                                        rstd.vector(), weight.vector(), d_x.matrix(),
                                        d_weight.vector(), d_bias.vector(), partial.vector());
  };

  run_on(0);
  const auto from_zero = std::vector{d_x[5], d_weight[5], d_bias[5]};
  run_on(1);

  expect_close<TypeParam>(d_x[5], from_zero[0] + 1, 4);
  expect_close<TypeParam>(d_weight[5], from_zero[1] + 1, 4);
  expect_close<TypeParam>(d_bias[5], from_zero[2] + 1, 4);
}

TYPED_TEST(LayersTest, LinearBackwardMatchesReferenceAndAdds) {
  for (const auto& [rows, inputs] : extents) {
    const int outputs = inputs + 2;
    Array<TypeParam> d_y(rows, outputs, 1);
    Array<TypeParam> x(rows, inputs, 2);
    Array<TypeParam> weight(outputs, inputs, 3);
    Array<TypeParam> d_x(rows, inputs, 4);
    Array<TypeParam> d_weight(outputs, inputs, 5);
    Array<TypeParam> d_bias(1, outputs, 6);
    Array<TypeParam> partial(1, static_cast<int>(gpt::column_sum_workspace(rows, outputs)));
    const Array<TypeParam> weight_before = d_weight;
    const Array<TypeParam> bias_before = d_bias;

    gpt::linear_backward<TypeParam>(this->exec, d_y.matrix(), x.matrix(), weight.matrix(),
                                    d_x.matrix(), d_weight.matrix(), d_bias.vector(),
                                    partial.vector());

    for (int o = 0; o < outputs; ++o) {
      double of_bias = bias_before[o];
      for (int i = 0; i < rows; ++i) of_bias += d_y(i, o);
      expect_close<TypeParam>(d_bias[o], of_bias, 8);
      for (int k = 0; k < inputs; ++k) {
        double of_weight = weight_before(o, k);
        for (int i = 0; i < rows; ++i) of_weight += d_y(i, o) * x(i, k);
        expect_close<TypeParam>(d_weight(o, k), of_weight, 8);
      }
    }
    for (int i = 0; i < rows; ++i) {
      for (int k = 0; k < inputs; ++k) {
        double expected = 0;
        for (int o = 0; o < outputs; ++o) expected += d_y(i, o) * weight(o, k);
        expect_close<TypeParam>(d_x(i, k), expected, 8);
      }
    }
  }
}

}  // namespace
