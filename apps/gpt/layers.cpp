// SPDX-License-Identifier: Apache-2.0
#include <Kokkos_Core.hpp>
#include <gpt/gemm.hpp>
#include <gpt/layers.hpp>

#include <algorithm>
#include <numeric>
#include <type_traits>

namespace gpt {

namespace {

/// The operand that holds all of a matrix.
template <class MatrixType>
auto whole(const MatrixType& matrix) {
  return Operand<typename MatrixType::value_type>{matrix.data(), matrix.extent_int(1)};
}

/// d_weight += d_y^T x and, where d_x is wanted, d_x = d_y weight.
template <class Real, class Exec>
void product_backward(const Exec& exec, const Matrix<const Real, Exec>& d_y,
                      const Matrix<const Real, Exec>& x, const Matrix<const Real, Exec>& weight,
                      const Matrix<Real, Exec>& d_x, const Matrix<Real, Exec>& d_weight) {
  const int rows = x.extent_int(0);
  const int inputs = weight.extent_int(1);
  const int outputs = weight.extent_int(0);
  gemm<Real>(exec, Transpose::yes, Transpose::no, GemmShape{outputs, inputs, rows}, Real(1),
             Operand<const Real>{d_y.data(), outputs}, Operand<const Real>{x.data(), inputs},
             Real(1), whole(d_weight));
  if (d_x.data() != nullptr) {
    gemm<Real>(exec, Transpose::no, Transpose::no, GemmShape{rows, inputs, outputs}, Real(1),
               Operand<const Real>{d_y.data(), outputs}, whole(weight), Real(0), whole(d_x));
  }
}

}  // namespace

template <class Real, class Exec>
void layer_norm_forward(const Exec& exec, Matrix<const Real, Exec> x,
                        Vector<const Real, Exec> weight, Vector<const Real, Exec> bias,
                        Matrix<Real, Exec> y, Vector<Real, Exec> mean, Vector<Real, Exec> rstd) {
  const int width = x.extent_int(1);
  for_rows(
      "gpt::layer_norm_forward", exec, x.extent_int(0),
      KOKKOS_LAMBDA(const Row<Exec>& row, const int i) {
        const Real* in = &x(i, 0);
        Real* out = &y(i, 0);
        const Real* w = weight.data();
        const Real* b = bias.data();
        const Real center =
            row_sum<Real>(row, width, [&](const int j) { return in[j]; }) / Real(width);
        const Real variance = row_sum<Real>(row, width,
                                            [&](const int j) {
                                              const Real d = in[j] - center;
                                              return d * d;
                                            }) /
                              Real(width);
        const Real scale = Real(1) / Kokkos::sqrt(variance + Real(layer_norm_epsilon));
        row_for(row, width, [&](const int j) { out[j] = (in[j] - center) * scale * w[j] + b[j]; });
        row_once(row, [&] {
          mean(i) = center;
          rstd(i) = scale;
        });
      });
}

template <class Real, class Exec>
void layer_norm_backward(const Exec& exec, Matrix<const Real, Exec> d_y, Matrix<const Real, Exec> x,
                         Vector<const Real, Exec> mean, Vector<const Real, Exec> rstd,
                         Vector<const Real, Exec> weight, Matrix<Real, Exec> d_x,
                         Vector<Real, Exec> d_weight, Vector<Real, Exec> d_bias,
                         Vector<Real, Exec> partial) {
  const int rows = x.extent_int(0);
  const int width = x.extent_int(1);
  for_rows(
      "gpt::layer_norm_backward", exec, rows, KOKKOS_LAMBDA(const Row<Exec>& row, const int i) {
        const Real* in = &x(i, 0);
        const Real* d_out = &d_y(i, 0);
        Real* d_in = &d_x(i, 0);
        const Real* w = weight.data();
        const Real center = mean(i);
        const Real scale = rstd(i);
        const Real d_mean =
            row_sum<Real>(row, width, [&](const int j) { return d_out[j] * w[j]; }) / Real(width);
        const Real d_projection =
            row_sum<Real>(row, width,
                          [&](const int j) { return d_out[j] * w[j] * (in[j] - center) * scale; }) /
            Real(width);
        row_for(row, width, [&](const int j) {
          const Real normalized = (in[j] - center) * scale;
          d_in[j] += scale * (d_out[j] * w[j] - d_mean - normalized * d_projection);
        });
      });
  add_column_sums<Real>(
      "gpt::layer_norm_backward weight", exec, rows,
      KOKKOS_LAMBDA(const int i, const int j) {
        return d_y(i, j) * ((x(i, j) - mean(i)) * rstd(i));
      },
      partial, d_weight);
  add_column_sums<Real>(
      "gpt::layer_norm_backward bias", exec, rows,
      KOKKOS_LAMBDA(const int i, const int j) { return d_y(i, j); }, partial, d_bias);
}

template <class Real, class Exec>
void linear_forward(const Exec& exec, Matrix<const Real, Exec> x, Matrix<const Real, Exec> weight,
                    Vector<const Real, Exec> bias, Matrix<const Real, Exec> residual,
                    Matrix<Real, Exec> y) {
  const int rows = x.extent_int(0);
  const int inputs = weight.extent_int(1);
  const int outputs = weight.extent_int(0);
  const bool has_bias = bias.data() != nullptr;
  const bool has_residual = residual.data() != nullptr;
  if (has_bias || has_residual) {  // the product is added to what is written here
    for_rows(
        "gpt::linear_forward", exec, rows, KOKKOS_LAMBDA(const Row<Exec>& row, const int i) {
          Real* out = &y(i, 0);
          const Real* b = bias.data();
          const Real* in = has_residual ? &residual(i, 0) : nullptr;
          if (has_bias && has_residual) {
            row_for(row, outputs, [&](const int j) { out[j] = in[j] + b[j]; });
          } else if (has_bias) {
            row_for(row, outputs, [&](const int j) { out[j] = b[j]; });
          } else {
            row_for(row, outputs, [&](const int j) { out[j] = in[j]; });
          }
        });
  }
  gemm<Real>(exec, Transpose::no, Transpose::yes, GemmShape{rows, outputs, inputs}, Real(1),
             Operand<const Real>{x.data(), inputs}, whole(weight),
             has_bias || has_residual ? Real(1) : Real(0), whole(y));
}

template <class Real, class Exec>
void linear_backward(const Exec& exec, Matrix<const Real, Exec> d_y, Matrix<const Real, Exec> x,
                     Matrix<const Real, Exec> weight, Matrix<Real, Exec> d_x,
                     Matrix<Real, Exec> d_weight, Vector<Real, Exec> d_bias,
                     Vector<Real, Exec> partial) {
  product_backward<Real>(exec, d_y, x, weight, d_x, d_weight);
  if (d_bias.data() != nullptr) {
    add_column_sums<Real>(
        "gpt::linear_backward bias", exec, d_y.extent_int(0),
        KOKKOS_LAMBDA(const int i, const int j) { return d_y(i, j); }, partial, d_bias);
  }
}

template <class Real, class Exec>
void qkv_forward(const Exec& exec, Matrix<const Real, Exec> x, Matrix<const Real, Exec> weight,
                 Vector<const Real, Exec> query_bias, Vector<const Real, Exec> value_bias,
                 Matrix<Real, Exec> qkv) {
  const int rows = x.extent_int(0);
  const int width = x.extent_int(1);
  for_rows(
      "gpt::qkv_forward", exec, rows, KOKKOS_LAMBDA(const Row<Exec>& row, const int i) {
        Real* query = &qkv(i, 0);
        Real* key = query + width;
        Real* value = key + width;
        const Real* q_bias = query_bias.data();
        const Real* v_bias = value_bias.data();
        row_for(row, width, [&](const int j) { query[j] = q_bias[j]; });
        row_for(row, width, [&](const int j) { key[j] = 0; });
        row_for(row, width, [&](const int j) { value[j] = v_bias[j]; });
      });
  gemm<Real>(exec, Transpose::no, Transpose::yes, GemmShape{rows, 3 * width, width}, Real(1),
             whole(x), whole(weight), Real(1), whole(qkv));
}

template <class Real, class Exec>
void qkv_backward(const Exec& exec, Matrix<const Real, Exec> d_qkv, Matrix<const Real, Exec> x,
                  Matrix<const Real, Exec> weight, Matrix<Real, Exec> d_x,
                  Matrix<Real, Exec> d_weight, Vector<Real, Exec> d_query_bias,
                  Vector<Real, Exec> d_value_bias, Vector<Real, Exec> partial) {
  const int rows = x.extent_int(0);
  const int width = x.extent_int(1);
  product_backward<Real>(exec, d_qkv, x, weight, d_x, d_weight);
  add_column_sums<Real>(
      "gpt::qkv_backward query bias", exec, rows,
      KOKKOS_LAMBDA(const int i, const int j) { return d_qkv(i, j); }, partial, d_query_bias);
  add_column_sums<Real>(
      "gpt::qkv_backward value bias", exec, rows,
      KOKKOS_LAMBDA(const int i, const int j) { return d_qkv(i, 2 * width + j); }, partial,
      d_value_bias);
}

namespace {

/// How one head's queries, keys, values lie in (N, 3C), its output in (N, C) and its scores in
/// (B*H*T, T).
struct HeadLayout {
  int positions, heads, batch, width, head_width;

  template <class T>
  [[nodiscard]] Operand<T> part_of_qkv(T* qkv, int part) const {
    return {qkv + static_cast<std::int64_t>(part) * width, 3 * width,
            std::int64_t{positions} * 3 * width, head_width};
  }
  template <class T>
  [[nodiscard]] Operand<T> output(T* y) const {
    return {y, width, std::int64_t{positions} * width, head_width};
  }
  template <class T>
  [[nodiscard]] Operand<T> scores(T* data) const {
    const std::int64_t square = std::int64_t{positions} * positions;
    return {data, positions, heads * square, square};
  }
  [[nodiscard]] GemmShape product(int rows, int columns, int depth) const {
    return {rows, columns, depth, batch, heads};
  }
};

template <class Real, class Exec>
HeadLayout head_layout(int heads, const Matrix<const Real, Exec>& qkv, int positions) {
  const int width = qkv.extent_int(1) / 3;
  const int batch = positions == 0 ? 0 : qkv.extent_int(0) / positions;
  return {positions, heads, batch, width, width / heads};
}

}  // namespace

template <class Real, class Exec>
void attention_forward(const Exec& exec, const int heads, Matrix<const Real, Exec> qkv,
                       Matrix<Real, Exec> probabilities, Matrix<Real, Exec> y) {
  const int positions = probabilities.extent_int(1);
  const HeadLayout layout = head_layout<Real, Exec>(heads, qkv, positions);
  const int head_width = layout.head_width;
  const Real scale = Real(1) / Kokkos::sqrt(Real(head_width));
  const auto scores = layout.scores(probabilities.data());

  gemm<Real>(exec, Transpose::no, Transpose::yes, layout.product(positions, positions, head_width),
             scale, layout.part_of_qkv(qkv.data(), 0), layout.part_of_qkv(qkv.data(), 1), Real(0),
             scores);
  for_rows(
      "gpt::attention_forward softmax", exec, layout.batch * heads * positions,
      KOKKOS_LAMBDA(const Row<Exec>& row, const int i) {
        const int visible = i % positions + 1;
        Real* p = &probabilities(i, 0);
        const Real largest = row_max<Real>(row, visible, [&](const int j) { return p[j]; });
        row_for(row, visible, [&](const int j) { p[j] = exponential(p[j] - largest); });
        row_sync(row);
        const Real total = row_sum<Real>(row, visible, [&](const int j) { return p[j]; });
        const Real inverse = Real(1) / total;
        row_for(row, visible, [&](const int j) { p[j] *= inverse; });
        row_for(row, positions - visible, [&](const int j) { p[visible + j] = 0; });
      });
  gemm<Real>(exec, Transpose::no, Transpose::no, layout.product(positions, head_width, positions),
             Real(1), layout.scores(static_cast<const Real*>(probabilities.data())),
             layout.part_of_qkv(qkv.data(), 2), Real(0), layout.output(y.data()));
}

template <class Real, class Exec>
void attention_backward(const Exec& exec, const int heads, Matrix<const Real, Exec> d_y,
                        Matrix<const Real, Exec> qkv, Matrix<const Real, Exec> probabilities,
                        Matrix<Real, Exec> d_qkv, Matrix<Real, Exec> d_scores) {
  const int positions = probabilities.extent_int(1);
  const HeadLayout layout = head_layout<Real, Exec>(heads, qkv, positions);
  const int head_width = layout.head_width;
  const Real scale = Real(1) / Kokkos::sqrt(Real(head_width));
  const auto p = layout.scores(probabilities.data());
  const auto d_s = layout.scores(static_cast<const Real*>(d_scores.data()));
  const auto d_out = layout.output(d_y.data());

  // d_values = P^T d_y and d_P = d_y values^T
  gemm<Real>(exec, Transpose::yes, Transpose::no, layout.product(positions, head_width, positions),
             Real(1), p, d_out, Real(0), layout.part_of_qkv(d_qkv.data(), 2));
  gemm<Real>(exec, Transpose::no, Transpose::yes, layout.product(positions, positions, head_width),
             Real(1), d_out, layout.part_of_qkv(qkv.data(), 2), Real(0),
             layout.scores(d_scores.data()));
  for_rows(
      "gpt::attention_backward softmax", exec, layout.batch * heads * positions,
      KOKKOS_LAMBDA(const Row<Exec>& row, const int i) {
        const int visible = i % positions + 1;
        const Real* probability = &probabilities(i, 0);
        Real* d = &d_scores(i, 0);
        const Real mean =
            row_sum<Real>(row, visible, [&](const int j) { return probability[j] * d[j]; });
        row_sync(row);
        row_for(row, visible, [&](const int j) { d[j] = probability[j] * (d[j] - mean); });
        row_for(row, positions - visible, [&](const int j) { d[visible + j] = 0; });
      });
  gemm<Real>(exec, Transpose::no, Transpose::no, layout.product(positions, head_width, positions),
             scale, d_s, layout.part_of_qkv(qkv.data(), 1), Real(0),
             layout.part_of_qkv(d_qkv.data(), 0));
  gemm<Real>(exec, Transpose::yes, Transpose::no, layout.product(positions, head_width, positions),
             scale, d_s, layout.part_of_qkv(qkv.data(), 0), Real(0),
             layout.part_of_qkv(d_qkv.data(), 1));
}

namespace {

// 2 sqrt(2/pi) and the cubic term: 1/2 (1 + tanh(u)) = 1 / (1 + exp(-2u)), one exponential and no
// tanh.
constexpr double gelu_slope = 1.5957691216057308;
constexpr double gelu_cubic = 0.044715;

}  // namespace

template <class Real, class Exec>
void gelu_forward(const Exec& exec, Matrix<const Real, Exec> x, Matrix<Real, Exec> y) {
  const int width = x.extent_int(1);
  for_rows(
      "gpt::gelu_forward", exec, x.extent_int(0), KOKKOS_LAMBDA(const Row<Exec>& row, const int i) {
        const Real* in = &x(i, 0);
        Real* out = &y(i, 0);
        row_for(row, width, [&](const int j) {
          const Real value = in[j];
          const Real u = Real(gelu_slope) * value * (1 + Real(gelu_cubic) * value * value);
          out[j] = value / (1 + exponential(-u));
        });
      });
}

template <class Real, class Exec>
void gelu_backward(const Exec& exec, Matrix<const Real, Exec> d_y, Matrix<const Real, Exec> x,
                   Matrix<Real, Exec> d_x) {
  const int width = x.extent_int(1);
  for_rows(
      "gpt::gelu_backward", exec, x.extent_int(0),
      KOKKOS_LAMBDA(const Row<Exec>& row, const int i) {
        const Real* in = &x(i, 0);
        const Real* d_out = &d_y(i, 0);
        Real* d_in = &d_x(i, 0);
        row_for(row, width, [&](const int j) {
          const Real value = in[j];
          const Real square = value * value;
          const Real u = Real(gelu_slope) * value * (1 + Real(gelu_cubic) * square);
          const Real d_u = Real(gelu_slope) * (1 + Real(3 * gelu_cubic) * square);
          const Real gate = 1 / (1 + exponential(-u));
          d_in[j] = d_out[j] * (gate + value * gate * (1 - gate) * d_u);
        });
      });
}

template <class Real, class Exec>
void residual_add(const Exec& exec, Matrix<const Real, Exec> x, Matrix<Real, Exec> y) {
  const int width = x.extent_int(1);
  for_rows(
      "gpt::residual_add", exec, x.extent_int(0), KOKKOS_LAMBDA(const Row<Exec>& row, const int i) {
        const Real* in = &x(i, 0);
        Real* out = &y(i, 0);
        row_for(row, width, [&](const int j) { out[j] += in[j]; });
      });
}

template <class Real, class Exec>
void embedding_forward(const Exec& exec, Matrix<const Token, Exec> windows,
                       Matrix<const Real, Exec> token, Matrix<const Real, Exec> position,
                       Matrix<Real, Exec> x) {
  const int positions = windows.extent_int(1) - 1;
  const int width = x.extent_int(1);
  for_rows(
      "gpt::embedding_forward", exec, x.extent_int(0),
      KOKKOS_LAMBDA(const Row<Exec>& row, const int i) {
        const int t = i % positions;
        const Real* of_token = &token(windows(i / positions, t), 0);
        const Real* of_position = &position(t, 0);
        Real* out = &x(i, 0);
        row_for(row, width, [&](const int j) { out[j] = of_token[j] + of_position[j]; });
      });
}

void sort_by_token(const Matrix<const Token, Kokkos::DefaultHostExecutionSpace>& windows,
                   const Vector<std::int32_t, Kokkos::DefaultHostExecutionSpace>& order) {
  const int positions = windows.extent_int(1) - 1;
  std::int32_t* begin = order.data();
  std::int32_t* end = begin + order.size();
  std::iota(begin, end, 0);
  const auto token = [&](std::int32_t i) { return windows(i / positions, i % positions); };
  std::sort(begin, end, [&](std::int32_t a, std::int32_t b) {
    return token(a) != token(b) ? token(a) < token(b) : a < b;
  });
}

template <class Real, class Exec>
void embedding_backward(const Exec& exec, Matrix<const Token, Exec> windows,
                        Vector<const std::int32_t, Exec> order, Matrix<const Real, Exec> d_x,
                        Matrix<Real, Exec> d_token, Matrix<Real, Exec> d_position) {
  const int batch = windows.extent_int(0);
  const int positions = windows.extent_int(1) - 1;
  const int rows = d_x.extent_int(0);
  const int width = d_x.extent_int(1);
  for_rows(
      "gpt::embedding_backward token", exec, rows,
      KOKKOS_LAMBDA(const Row<Exec>& row, const int k) {
        // The first row of a token adds all of them.
        const auto token = [&](int i) {
          return windows(order(i) / positions, order(i) % positions);
        };
        const Token v = token(k);
        if (k > 0 && token(k - 1) == v) return;
        Real* sum = &d_token(v, 0);
        for (int i = k; i < rows && token(i) == v; ++i) {
          const Real* d = &d_x(order(i), 0);
          row_for(row, width, [&](const int j) { sum[j] += d[j]; });
        }
      });
  for_rows(
      "gpt::embedding_backward position", exec, positions,
      KOKKOS_LAMBDA(const Row<Exec>& row, const int t) {
        Real* sum = &d_position(t, 0);
        for (int b = 0; b < batch; ++b) {
          const Real* d = &d_x(b * positions + t, 0);
          row_for(row, width, [&](const int j) { sum[j] += d[j]; });
        }
      });
}

namespace {

/// losses(b) = mean of sample b's row losses, added in order in double.
template <class Real, class Exec>
void mean_of_rows(const Exec& exec, const int positions, const Vector<const Real, Exec>& row_losses,
                  const Vector<double, Exec>& losses) {
  Kokkos::parallel_for(
      "gpt::cross_entropy mean", Kokkos::RangePolicy<Exec>(exec, 0, losses.extent_int(0)),
      KOKKOS_LAMBDA(const int b) {
        double sum = 0;
        for (int t = 0; t < positions; ++t)
          sum += static_cast<double>(row_losses(b * positions + t));
        losses(b) = sum / positions;
      });
}

}  // namespace

template <class Real, class Exec>
void cross_entropy_forward(const Exec& exec, Matrix<const Real, Exec> logits,
                           Matrix<const Token, Exec> windows, Vector<Real, Exec> row_losses,
                           Vector<double, Exec> losses) {
  const int positions = windows.extent_int(1) - 1;
  const int vocabulary = logits.extent_int(1);
  for_rows(
      "gpt::cross_entropy_forward", exec, logits.extent_int(0),
      KOKKOS_LAMBDA(const Row<Exec>& row, const int i) {
        const Real* z = &logits(i, 0);
        const auto target = windows(i / positions, i % positions + 1);
        const Real largest = row_max<Real>(row, vocabulary, [&](const int j) { return z[j]; });
        const Real total = row_sum<Real>(row, vocabulary,
                                         [&](const int j) { return exponential(z[j] - largest); });
        row_once(row, [&] { row_losses(i) = Kokkos::log(total) - (z[target] - largest); });
      });
  mean_of_rows<Real>(exec, positions, Vector<const Real, Exec>(row_losses), losses);
}

template <class Real, class Exec>
void cross_entropy_forward_backward(const Exec& exec, Matrix<Real, Exec> logits,
                                    Matrix<const Token, Exec> windows,
                                    Scalar<const double, Exec> loss_scale,
                                    Vector<Real, Exec> row_losses, Vector<double, Exec> losses) {
  const int positions = windows.extent_int(1) - 1;
  const int vocabulary = logits.extent_int(1);
  for_rows(
      "gpt::cross_entropy_forward_backward", exec, logits.extent_int(0),
      KOKKOS_LAMBDA(const Row<Exec>& row, const int i) {
        Real* z = &logits(i, 0);
        const auto target = windows(i / positions, i % positions + 1);
        const Real largest = row_max<Real>(row, vocabulary, [&](const int j) { return z[j]; });
        const Real of_target = z[target] - largest;
        row_sync(row);
        row_for(row, vocabulary, [&](const int j) { z[j] = exponential(z[j] - largest); });
        row_sync(row);
        const Real total = row_sum<Real>(row, vocabulary, [&](const int j) { return z[j]; });
        const Real weight = static_cast<Real>(loss_scale()) / Real(positions);
        const Real factor = weight / total;
        row_for(row, vocabulary, [&](const int j) { z[j] *= factor; });
        row_sync(row);
        row_once(row, [&] {
          z[target] -= weight;
          row_losses(i) = Kokkos::log(total) - of_target;
        });
      });
  mean_of_rows<Real>(exec, positions, Vector<const Real, Exec>(row_losses), losses);
}

#define MICS_GPT_INSTANTIATE(Real, Exec)                                                           \
  template void layer_norm_forward<Real, Exec>(                                                    \
      const Exec&, Matrix<const Real, Exec>, Vector<const Real, Exec>, Vector<const Real, Exec>,   \
      Matrix<Real, Exec>, Vector<Real, Exec>, Vector<Real, Exec>);                                 \
  template void layer_norm_backward<Real, Exec>(                                                   \
      const Exec&, Matrix<const Real, Exec>, Matrix<const Real, Exec>, Vector<const Real, Exec>,   \
      Vector<const Real, Exec>, Vector<const Real, Exec>, Matrix<Real, Exec>, Vector<Real, Exec>,  \
      Vector<Real, Exec>, Vector<Real, Exec>);                                                     \
  template void linear_forward<Real, Exec>(const Exec&, Matrix<const Real, Exec>,                  \
                                           Matrix<const Real, Exec>, Vector<const Real, Exec>,     \
                                           Matrix<const Real, Exec>, Matrix<Real, Exec>);          \
  template void linear_backward<Real, Exec>(                                                       \
      const Exec&, Matrix<const Real, Exec>, Matrix<const Real, Exec>, Matrix<const Real, Exec>,   \
      Matrix<Real, Exec>, Matrix<Real, Exec>, Vector<Real, Exec>, Vector<Real, Exec>);             \
  template void qkv_forward<Real, Exec>(const Exec&, Matrix<const Real, Exec>,                     \
                                        Matrix<const Real, Exec>, Vector<const Real, Exec>,        \
                                        Vector<const Real, Exec>, Matrix<Real, Exec>);             \
  template void qkv_backward<Real, Exec>(                                                          \
      const Exec&, Matrix<const Real, Exec>, Matrix<const Real, Exec>, Matrix<const Real, Exec>,   \
      Matrix<Real, Exec>, Matrix<Real, Exec>, Vector<Real, Exec>, Vector<Real, Exec>,              \
      Vector<Real, Exec>);                                                                         \
  template void attention_forward<Real, Exec>(const Exec&, int, Matrix<const Real, Exec>,          \
                                              Matrix<Real, Exec>, Matrix<Real, Exec>);             \
  template void attention_backward<Real, Exec>(const Exec&, int, Matrix<const Real, Exec>,         \
                                               Matrix<const Real, Exec>, Matrix<const Real, Exec>, \
                                               Matrix<Real, Exec>, Matrix<Real, Exec>);            \
  template void gelu_forward<Real, Exec>(const Exec&, Matrix<const Real, Exec>,                    \
                                         Matrix<Real, Exec>);                                      \
  template void gelu_backward<Real, Exec>(const Exec&, Matrix<const Real, Exec>,                   \
                                          Matrix<const Real, Exec>, Matrix<Real, Exec>);           \
  template void residual_add<Real, Exec>(const Exec&, Matrix<const Real, Exec>,                    \
                                         Matrix<Real, Exec>);                                      \
  template void embedding_forward<Real, Exec>(const Exec&, Matrix<const Token, Exec>,              \
                                              Matrix<const Real, Exec>, Matrix<const Real, Exec>,  \
                                              Matrix<Real, Exec>);                                 \
  template void embedding_backward<Real, Exec>(                                                    \
      const Exec&, Matrix<const Token, Exec>, Vector<const std::int32_t, Exec>,                    \
      Matrix<const Real, Exec>, Matrix<Real, Exec>, Matrix<Real, Exec>);                           \
  template void cross_entropy_forward<Real, Exec>(const Exec&, Matrix<const Real, Exec>,           \
                                                  Matrix<const Token, Exec>, Vector<Real, Exec>,   \
                                                  Vector<double, Exec>);                           \
  template void cross_entropy_forward_backward<Real, Exec>(                                        \
      const Exec&, Matrix<Real, Exec>, Matrix<const Token, Exec>, Scalar<const double, Exec>,      \
      Vector<Real, Exec>, Vector<double, Exec>);

MICS_GPT_INSTANTIATE(float, Kokkos::DefaultHostExecutionSpace)
MICS_GPT_INSTANTIATE(double, Kokkos::DefaultHostExecutionSpace)
#if defined(KOKKOS_ENABLE_CUDA) || defined(KOKKOS_ENABLE_HIP) || defined(KOKKOS_ENABLE_SYCL)
MICS_GPT_INSTANTIATE(float, Kokkos::DefaultExecutionSpace)
MICS_GPT_INSTANTIATE(double, Kokkos::DefaultExecutionSpace)
#endif

}  // namespace gpt
