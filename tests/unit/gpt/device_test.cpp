// SPDX-License-Identifier: Apache-2.0
// Each layer of the GPT on the device against the layer of the host in fp32, on the same bf16
// numbers; then a whole engine on the device against one on the host. Results are filled with NaN
// before, so that what was not written shows. Errors are norms of the difference over norms of what
// was expected, and are printed.

#include <mics/mics.hpp>

#include <Kokkos_Core.hpp>
#include <gpt/block.hpp>
#include <gpt/device/activations.hpp>
#include <gpt/device/attention.hpp>
#include <gpt/device/block.hpp>
#include <gpt/device/layers.hpp>
#include <gpt/device/products.hpp>
#include <gpt/model.hpp>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

namespace {

namespace device = gpt::device;
using gpt::Token;
using mics::bf16;
using Host = Kokkos::DefaultHostExecutionSpace;
using Device = device::Exec;
using HostMatrix = gpt::Matrix<float, Host>;
using HostVector = gpt::Vector<float, Host>;

// Rounding to bf16 is 2^-9 at most; results are rounded once, and so are some that lie between.
constexpr double once = 4e-3;
constexpr double several = 1.5e-2;

std::uint32_t mixed(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352dU;
  x ^= x >> 15;
  x *= 0x846ca68bU;
  return x ^ (x >> 16);
}

/// A matrix of the host in fp32 and the same one of the device in T.
template <class T>
struct Both {
  int rows, columns;
  std::vector<float> host;
  Kokkos::View<T*, Device::memory_space> memory;

  Both(int row_count, int column_count)
      : rows(row_count),
        columns(column_count),
        host(static_cast<std::size_t>(row_count) * column_count, 0.0F),
        memory("device_test", host.size()) {
    const auto copy = Kokkos::create_mirror_view(memory);
    for (std::size_t i = 0; i < host.size(); ++i) copy(i) = T(std::nanf(""));
    Kokkos::deep_copy(memory, copy);
  }
  /// Numbers between -scale and scale around `center` that both hold exactly.
  static Both random(int rows, int columns, std::uint32_t seed, float scale = 1, float center = 0) {
    Both result(rows, columns);
    for (std::size_t i = 0; i < result.host.size(); ++i) {
      const std::uint32_t bits = mixed(static_cast<std::uint32_t>(i) + seed * 0x9e3779b9U);
      const float value = center + scale * (static_cast<float>(bits >> 8) * 0x1p-23F - 1.0F);
      result.host[i] = static_cast<float>(T(value));
    }
    result.upload();
    return result;
  }
  void upload() const {
    const auto copy = Kokkos::create_mirror_view(memory);
    for (std::size_t i = 0; i < host.size(); ++i) copy(i) = T(host[i]);
    Kokkos::deep_copy(memory, copy);
  }

  HostMatrix matrix() {
    return HostMatrix(host.data(), static_cast<std::size_t>(rows),
                      static_cast<std::size_t>(columns));
  }
  HostVector vector() { return HostVector(host.data(), host.size()); }
  device::Rows<T> on_device() const {
    return device::Rows<T>(memory.data(), static_cast<std::size_t>(rows),
                           static_cast<std::size_t>(columns));
  }
  device::Array<T> line() const { return device::Array<T>(memory.data(), memory.size()); }

  /// The device's elements agree with the host's.
  void expect_agreement(const std::string& what, double bar) const {
    const auto copy = Kokkos::create_mirror_view_and_copy(Kokkos::HostSpace(), memory);
    double difference = 0;
    double norm = 0;
    for (std::size_t i = 0; i < host.size(); ++i) {
      const double d = static_cast<double>(static_cast<float>(copy(i))) - host[i];
      difference += d * d;
      norm += static_cast<double>(host[i]) * host[i];
    }
    const double error = std::sqrt(difference) / (norm > 0 ? std::sqrt(norm) : 1);
    std::printf("  %-58s relative error %.2e, bar %.1e\n", what.c_str(), error, bar);
    EXPECT_TRUE(error <= bar) << what << ": relative error " << error << " over " << bar;
  }
};

using Numbers = Both<bf16>;
using Floats = Both<float>;

struct Windows {
  int batch, positions;
  std::vector<Token> host;
  std::vector<std::int32_t> order;
  Kokkos::View<Token*, Device::memory_space> memory;
  Kokkos::View<std::int32_t*, Device::memory_space> order_memory;

  Windows(int batch_size, int position_count, int vocabulary)
      : batch(batch_size),
        positions(position_count),
        host(static_cast<std::size_t>(batch_size) * (position_count + 1)),
        order(static_cast<std::size_t>(batch_size) * position_count),
        memory("device_test", host.size()),
        order_memory("device_test", order.size()) {
    for (std::size_t i = 0; i < host.size(); ++i) {
      // Some tokens come often.
      const std::uint32_t bits = mixed(static_cast<std::uint32_t>(i));
      host[i] = bits % 4 == 0 ? 3 : (bits >> 2) % static_cast<std::uint32_t>(vocabulary);
    }
    gpt::sort_by_token(matrix(), gpt::Vector<std::int32_t, Host>(order.data(), order.size()));
    copy(host, memory);
    copy(order, order_memory);
  }
  template <class T, class View>
  static void copy(const std::vector<T>& from, const View& to) {
    Kokkos::deep_copy(
        to, Kokkos::View<const T*, Kokkos::HostSpace, Kokkos::MemoryTraits<Kokkos::Unmanaged>>(
                from.data(), from.size()));
  }
  [[nodiscard]] gpt::Matrix<const Token, Host> matrix() const {
    return gpt::Matrix<const Token, Host>(host.data(), static_cast<std::size_t>(batch),
                                          static_cast<std::size_t>(positions) + 1);
  }
  [[nodiscard]] device::Rows<const Token> on_device() const {
    return device::Rows<const Token>(memory.data(), static_cast<std::size_t>(batch),
                                     static_cast<std::size_t>(positions) + 1);
  }
};

struct Machinery {
  Host host;
  Device exec;
  Kokkos::View<std::byte*, Device::memory_space> workspace{"device_test",
                                                           device::Products::workspace_bytes};
  device::Products products{workspace.data()};
};

float gelu(float x) {
  return 0.5F * x * (1 + std::tanh(0.7978845608F * (x + 0.044715F * x * x * x)));
}

std::string text(int rows, int columns, int depth) {
  return std::to_string(rows) + " x " + std::to_string(columns) + " x " + std::to_string(depth);
}

void check_products(int rows, int columns, int depth) {
  using gpt::Transpose;
  Machinery m;
  const std::string size = text(rows, columns, depth);
  const float scale = 1 / std::sqrt(static_cast<float>(depth));
  Numbers x = Numbers::random(rows, depth, 1, scale);
  Numbers weight = Numbers::random(columns, depth, 2);
  Numbers bias = Numbers::random(1, columns, 3);
  Numbers residual = Numbers::random(rows, columns, 4);
  const device::Product product{
      .rows = rows, .columns = columns, .depth = depth, .transpose_b = Transpose::yes};
  Numbers y(rows, columns);

  gpt::linear_forward<float>(m.host, x.matrix(), weight.matrix(), bias.vector(), residual.matrix(),
                             y.matrix());
  device::Product fused = product;
  fused.epilogue = device::Epilogue::bias;
  fused.add = true;
  m.products.run(m.exec, fused,
                 {.a = x.memory.data(),
                  .b = weight.memory.data(),
                  .d = y.memory.data(),
                  .c = residual.memory.data(),
                  .vector = bias.memory.data()});
  m.exec.fence();
  y.expect_agreement("product + bias + residual " + size, once);

  Numbers up(rows, columns);
  Numbers activated(rows, columns);
  gpt::linear_forward<float>(m.host, x.matrix(), weight.matrix(), bias.vector(), HostMatrix(),
                             up.matrix());
  gpt::gelu_forward<float>(m.host, up.matrix(), activated.matrix());
  fused = product;
  fused.epilogue = device::Epilogue::gelu;
  m.products.run(m.exec, fused,
                 {.a = x.memory.data(),
                  .b = weight.memory.data(),
                  .d = activated.memory.data(),
                  .vector = bias.memory.data(),
                  .auxiliary = up.memory.data()});
  m.exec.fence();
  up.expect_agreement("product + bias before GELU " + size, once);
  activated.expect_agreement("GELU(product + bias) " + size, several);
  EXPECT_NEAR(activated.host[0], gelu(up.host[0]), 1e-5);

  // d_x = d_y weight through the GELU's derivative, whose column sums are the bias' gradient.
  Numbers d_y = Numbers::random(rows, columns, 5);
  Numbers before = Numbers::random(rows, depth, 6, 2);
  Numbers d_x(rows, depth);
  Numbers d_bias_x(1, depth);
  Numbers d_weight(columns, depth);
  Numbers d_bias(1, columns);
  std::vector<float> partial(
      static_cast<std::size_t>(gpt::column_sum_workspace(rows, std::max(columns, depth))));
  const HostVector work(partial.data(), partial.size());
  gpt::linear_backward<float>(m.host, d_y.matrix(), x.matrix(), weight.matrix(), d_x.matrix(),
                              d_weight.matrix(), d_bias.vector(), work);
  gpt::gelu_backward<float>(m.host, d_x.matrix(), before.matrix(), d_x.matrix());
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < depth; ++j) {
      d_bias_x.host[static_cast<std::size_t>(j)] += d_x.matrix()(i, j);
    }
  }
  m.products.run(m.exec,
                 {.rows = rows,
                  .columns = depth,
                  .depth = columns,
                  .epilogue = device::Epilogue::gelu_backward},
                 {.a = d_y.memory.data(),
                  .b = weight.memory.data(),
                  .d = d_x.memory.data(),
                  .vector = d_bias_x.memory.data(),
                  .auxiliary = before.memory.data()});
  device::Product of_weight{.rows = columns,
                            .columns = depth,
                            .depth = rows,
                            .transpose_a = Transpose::yes,
                            .epilogue = device::Epilogue::bias_gradient};
  m.products.run(m.exec, of_weight,
                 {.a = d_y.memory.data(),
                  .b = x.memory.data(),
                  .d = d_weight.memory.data(),
                  .vector = d_bias.memory.data()});
  m.exec.fence();
  d_x.expect_agreement("input gradient through GELU " + size, several);
  d_bias_x.expect_agreement("its column sums " + size, several);
  d_weight.expect_agreement("weight gradient " + size, once);
  d_bias.expect_agreement("bias gradient " + size, once);

  // Once more on top.
  of_weight.epilogue = device::Epilogue::none;
  of_weight.add = true;
  m.products.run(m.exec, of_weight,
                 {.a = d_y.memory.data(), .b = x.memory.data(), .d = d_weight.memory.data()});
  m.exec.fence();
  for (float& value : d_weight.host) value *= 2;
  d_weight.expect_agreement("weight gradient, added " + size, several);
}

TEST(DeviceProducts, FuseWhatFollows) {
  check_products(16, 64, 128);
  check_products(200, 264, 72);
  check_products(1024, 512, 256);
}

void check_layer_norm(int rows, int width, device::Residual residual) {
  Machinery m;
  const std::string size = std::to_string(rows) + " x " + std::to_string(width) +
                           (residual == device::Residual::add ? ", added" : ", written");
  Numbers x = Numbers::random(rows, width, 1, 2, 0.5F);
  Numbers weight = Numbers::random(1, width, 2, 0.5F, 1);
  Numbers bias = Numbers::random(1, width, 3);
  Numbers y(rows, width);
  Floats mean(1, rows);
  Floats rstd(1, rows);
  gpt::layer_norm_forward<float>(m.host, x.matrix(), weight.vector(), bias.vector(), y.matrix(),
                                 mean.vector(), rstd.vector());
  device::layer_norm_forward(m.exec, x.on_device(), weight.line(), bias.line(), y.on_device(),
                             mean.line(), rstd.line());
  m.exec.fence();
  y.expect_agreement("layer norm " + size, once);
  mean.expect_agreement("its means", 1e-4);
  rstd.expect_agreement("its deviations", 1e-4);

  Numbers d_y = Numbers::random(rows, width, 4);
  Numbers d_x =
      residual == device::Residual::add ? Numbers::random(rows, width, 5) : Numbers(rows, width);
  Numbers d_weight(1, width);
  Numbers d_bias(1, width);
  std::vector<float> host_partial(static_cast<std::size_t>(gpt::column_sum_workspace(rows, width)));
  gpt::layer_norm_backward<float>(m.host, d_y.matrix(), x.matrix(), mean.vector(), rstd.vector(),
                                  weight.vector(), d_x.matrix(), d_weight.vector(), d_bias.vector(),
                                  HostVector(host_partial.data(), host_partial.size()));
  const Floats partial(1, static_cast<int>(device::layer_norm_workspace(width)));
  device::layer_norm_backward(m.exec, d_y.on_device(), x.on_device(), mean.line(), rstd.line(),
                              weight.line(), residual, d_x.on_device(), d_weight.line(),
                              d_bias.line(), partial.line());
  m.exec.fence();
  d_x.expect_agreement("layer norm, gradient of its input " + size, once);
  d_weight.expect_agreement("of its weight", once);
  d_bias.expect_agreement("of its bias", once);
}

TEST(DeviceLayerNorm, AgreesWithTheHost) {
  check_layer_norm(1, 8, device::Residual::add);
  check_layer_norm(37, 264, device::Residual::none);
  check_layer_norm(1200, 2048, device::Residual::add);
  check_layer_norm(9, 8192, device::Residual::add);
}

TEST(DeviceGelu, AgreesWithTheHost) {
  Machinery m;
  Numbers x = Numbers::random(13, 264, 1, 6);
  Numbers y(13, 264);
  gpt::gelu_forward<float>(m.host, x.matrix(), y.matrix());
  device::gelu_forward(m.exec, x.on_device(), y.on_device());
  m.exec.fence();
  y.expect_agreement("GELU", once);
}

TEST(DeviceEmbedding, AgreesWithTheHost) {
  Machinery m;
  constexpr int batch = 3, positions = 50, width = 136, vocabulary = 40;
  const Windows windows(batch, positions, vocabulary);
  Numbers token = Numbers::random(vocabulary, width, 1);
  Numbers position = Numbers::random(positions, width, 2);
  Numbers x(batch * positions, width);
  gpt::embedding_forward<float>(m.host, windows.matrix(), token.matrix(), position.matrix(),
                                x.matrix());
  device::embedding_forward(m.exec, windows.on_device(), token.on_device(), position.on_device(),
                            x.on_device());
  m.exec.fence();
  x.expect_agreement("embedding", once);

  Numbers d_x = Numbers::random(batch * positions, width, 3);
  Numbers d_token = Numbers::random(vocabulary, width, 4);
  Numbers d_position(positions, width);
  gpt::embedding_backward<float>(
      m.host, windows.matrix(),
      gpt::Vector<const std::int32_t, Host>(windows.order.data(), windows.order.size()),
      d_x.matrix(), d_token.matrix(), d_position.matrix());
  device::embedding_backward(
      m.exec, windows.on_device(),
      device::Array<const std::int32_t>(windows.order_memory.data(), windows.order.size()),
      d_x.on_device(), d_token.on_device(), d_position.on_device());
  m.exec.fence();
  d_token.expect_agreement("embedding, gradient of tokens, added", once);
  d_position.expect_agreement("of positions", once);
}

void check_cross_entropy(int batch, int positions, int vocabulary) {
  Machinery m;
  const int rows = batch * positions;
  const std::string size = std::to_string(rows) + " x " + std::to_string(vocabulary);
  const Windows windows(batch, positions, vocabulary);
  Numbers logits = Numbers::random(rows, vocabulary, 1, 8);
  Floats losses(1, rows);
  std::vector<double> sample_losses(static_cast<std::size_t>(batch));
  const double loss_scale = 4;
  const auto first = logits;  // the host's copy is its own, the device's the same
  gpt::cross_entropy_forward_backward<float>(
      m.host, logits.matrix(), windows.matrix(), gpt::Scalar<const double, Host>(&loss_scale),
      losses.vector(), gpt::Vector<double, Host>(sample_losses.data(), sample_losses.size()));

  // In two parts, as the head does it.
  const int part = rows / 3 + 1;
  const Kokkos::View<double, Device::memory_space> scale("device_test");
  Kokkos::deep_copy(scale, loss_scale);
  const auto rows_from = [&](int begin, int end) {
    return device::Rows<bf16>(logits.memory.data() + std::int64_t{begin} * vocabulary,
                              static_cast<std::size_t>(end - begin),
                              static_cast<std::size_t>(vocabulary));
  };
  device::cross_entropy_forward(m.exec, rows_from(0, rows), windows.on_device(), 0, losses.line());
  m.exec.fence();
  losses.expect_agreement("cross entropy " + size, 1e-4);
  first.expect_agreement("logits, which it leaves", 0);
  device::cross_entropy_forward_backward(m.exec, rows_from(0, part), windows.on_device(), 0, scale,
                                         losses.line());
  device::cross_entropy_forward_backward(m.exec, rows_from(part, rows), windows.on_device(), part,
                                         scale, losses.line());
  const Kokkos::View<double, Device::memory_space> loss("device_test");
  Kokkos::deep_copy(loss, 1.5);
  device::add_losses(m.exec, losses.line(), positions, loss);
  m.exec.fence();
  losses.expect_agreement("cross entropy with gradients " + size, 1e-4);
  logits.expect_agreement("its gradient", once);
  double expected = 1.5;
  for (const double sample : sample_losses) expected += sample;
  double found = 0;
  Kokkos::deep_copy(found, loss);
  EXPECT_NEAR(found, expected, 1e-5 * expected);
}

TEST(DeviceCrossEntropy, AgreesWithTheHost) {
  check_cross_entropy(1, 5, 8);
  check_cross_entropy(2, 33, 264);
  check_cross_entropy(2, 20, 50304);
}

void check_attention(int batch, int positions, int heads, int head_width, bool fused) {
  Machinery m;
  const int width = heads * head_width;
  const int rows = batch * positions;
  const std::string size = std::string(fused ? "fused" : "plain") + " attention, " +
                           std::to_string(positions) + " positions, heads of " +
                           std::to_string(head_width);
  Numbers qkv = Numbers::random(rows, 3 * width, 1, 1.5F);
  Numbers y(rows, width);
  std::vector<float> probabilities(static_cast<std::size_t>(rows) * heads * positions);
  const auto score_rows = static_cast<std::size_t>(rows) * static_cast<std::size_t>(heads);
  const HostMatrix p(probabilities.data(), score_rows, static_cast<std::size_t>(positions));
  gpt::attention_forward<float>(m.host, heads, qkv.matrix(), p, y.matrix());
  const Floats log_sums(1, rows * heads);
  const Floats row_dots(1, rows * heads);
  const Numbers scores(heads * positions, positions);
  const Numbers d_scores(heads * positions, positions);
  if (fused) {
    device::attention_forward(m.exec, heads, positions, qkv.on_device(), y.on_device(),
                              log_sums.line());
  } else {
    device::plain_attention_forward(m.exec, m.products, heads, qkv.on_device(), y.on_device(),
                                    scores.on_device());
  }
  m.exec.fence();
  y.expect_agreement(size, several);

  Numbers d_y = Numbers::random(rows, width, 2);
  Numbers d_qkv(rows, 3 * width);
  std::vector<float> host_scores(probabilities.size());
  gpt::attention_backward<float>(
      m.host, heads, d_y.matrix(), qkv.matrix(), p, d_qkv.matrix(),
      HostMatrix(host_scores.data(), score_rows, static_cast<std::size_t>(positions)));
  if (fused) {
    device::attention_backward(m.exec, heads, positions, d_y.on_device(), y.on_device(),
                               qkv.on_device(), log_sums.line(), d_qkv.on_device(),
                               row_dots.line());
  } else {
    device::plain_attention_backward(m.exec, m.products, heads, d_y.on_device(), qkv.on_device(),
                                     d_qkv.on_device(), scores.on_device(), d_scores.on_device());
  }
  m.exec.fence();
  d_qkv.expect_agreement("gradient of " + size, several);
}

TEST(DeviceAttention, FusedAgreesWithTheHost) {
  for (const int head_width : {64, 128}) {
    for (const int positions : {1, 16, 64, 65, 100, 256, 300}) {
      check_attention(2, positions, 3, head_width, true);
    }
  }
  check_attention(1, 1024, 2, 128, true);
}

TEST(DeviceAttention, PlainAgreesWithTheHost) {
  check_attention(2, 16, 3, 128, false);
  check_attention(2, 104, 3, 40, false);
}

/// A unit's parameters (or gradients) on both sides.
template <template <class, class> class Unit>
struct UnitOnBoth {
  std::vector<Numbers> arrays;
  std::vector<std::string> names;

  UnitOnBoth(const gpt::UnitSpec& unit, bool random) {
    std::uint32_t seed = 100;
    for (const auto& parameter : unit.parameters) {
      const bool matrix = parameter.shape.size() == 2;
      const int rows = matrix ? static_cast<int>(parameter.shape[0]) : 1;
      const int columns = static_cast<int>(parameter.shape.back());
      const bool is_scale =
          parameter.initial.kind == gpt::InitialKind::constant && parameter.initial.spread == 1;
      names.push_back(parameter.name);
      arrays.push_back(random ? Numbers::random(rows, columns, ++seed, matrix ? 0.08F : 0.3F,
                                                is_scale ? 1.0F : 0.0F)
                              : Numbers(rows, columns));
    }
  }
  template <class T>
  Unit<T, Host> host() {
    Unit<T, Host> result;
    auto array = arrays.begin();
    result.visit([&](auto& view) {
      if constexpr (std::decay_t<decltype(view)>::rank() == 1) {
        view = array++->vector();
      } else {
        view = array++->matrix();
      }
    });
    return result;
  }
  template <class T>
  Unit<T, Device> on_device() {
    Unit<T, Device> result;
    auto array = arrays.begin();
    result.visit([&](auto& view) {
      if constexpr (std::decay_t<decltype(view)>::rank() == 1) {
        view = array++->line();
      } else {
        view = array++->on_device();
      }
    });
    return result;
  }
  void expect_agreement(double bar) const {
    for (std::size_t i = 0; i < arrays.size(); ++i) {
      arrays[i].expect_agreement("gradient of " + names[i], bar);
    }
  }
};

/// The device's rows as the host's numbers.
void copy_rows(const device::Rows<bf16>& from, Numbers& to) {
  Kokkos::deep_copy(to.memory, device::Array<const bf16>(from.data(), from.size()));
}
void set_rows(const Numbers& from, const device::Rows<bf16>& to) {
  Kokkos::deep_copy(device::Array<bf16>(to.data(), to.size()), from.memory);
}

void check_model(const gpt::GptShape& shape, int batch) {
  Machinery m;
  const device::Machine machine{m.exec, m.products, shape};
  const int rows = batch * shape.positions;
  gpt::Activations<float, Host> host(shape, batch);
  const device::Activations on_device = [&] {
    device::Activations result(shape, batch, gpt::Recompute::no);
    result.resize(batch);
    return result;
  }();
  const auto units = shape.units();
  const std::string size = "block, heads of " + std::to_string(shape.width / shape.heads);

  UnitOnBoth<gpt::BlockParameters> p(units[1], true);
  UnitOnBoth<gpt::BlockParameters> g(units[1], false);
  Numbers x = Numbers::random(rows, shape.width, 7);
  Kokkos::deep_copy(host.layer(0).x, x.matrix());
  set_rows(x, on_device.layer(0).x);
  gpt::block_forward<float>(m.host, shape.heads, p.host<const float>(), host.layer(0),
                            host.output(0));
  device::block_forward(machine, p.on_device<const bf16>(), on_device.layer(0), on_device.scratch(),
                        on_device.output(0));
  m.exec.fence();
  Numbers y(rows, shape.width);
  Kokkos::deep_copy(y.matrix(), host.output(0));
  copy_rows(on_device.output(0), y);
  y.expect_agreement(size, several);

  Numbers d_x = Numbers::random(rows, shape.width, 8);
  Kokkos::deep_copy(host.workspace().d_x, d_x.matrix());
  set_rows(d_x, on_device.scratch().d_x);
  gpt::block_backward<float>(m.host, shape.heads, p.host<const float>(), host.layer(0),
                             g.host<float>(), host.workspace());
  device::block_backward(machine, p.on_device<const bf16>(), on_device.layer(0),
                         g.on_device<bf16>(), on_device.scratch());
  m.exec.fence();
  Kokkos::deep_copy(d_x.matrix(), host.workspace().d_x);
  copy_rows(on_device.scratch().d_x, d_x);
  d_x.expect_agreement("gradient of its input", several);
  g.expect_agreement(3e-2);

  UnitOnBoth<gpt::EmbeddingParameters> embedding(units.front(), true);
  UnitOnBoth<gpt::EmbeddingParameters> d_embedding(units.front(), false);
  UnitOnBoth<gpt::FinalParameters> final(units.back(), true);
  UnitOnBoth<gpt::FinalParameters> d_final(units.back(), false);
  const Windows windows(batch, shape.positions, shape.vocabulary);
  Kokkos::deep_copy(host.head().x, x.matrix());
  set_rows(x, on_device.head().x);
  const double loss_scale = 2;
  gpt::head_forward<float>(m.host, final.host<const float>(), embedding.host<const float>().token,
                           host.head());
  gpt::cross_entropy_forward_backward<float>(m.host, host.head().logits, windows.matrix(),
                                             gpt::Scalar<const double, Host>(&loss_scale),
                                             host.head().row_losses, host.losses());
  gpt::head_backward<float>(m.host, final.host<const float>(), embedding.host<const float>().token,
                            host.head(), d_final.host<float>(), d_embedding.host<float>().token,
                            host.workspace());
  const Kokkos::View<double, Device::memory_space> scale("device_test");
  const Kokkos::View<double, Device::memory_space> loss("device_test");
  Kokkos::deep_copy(scale, loss_scale);
  const device::HeadGradients gradients{scale, d_final.on_device<bf16>(),
                                        d_embedding.on_device<bf16>().token};
  device::head(machine, final.on_device<const bf16>(), embedding.on_device<const bf16>().token,
               windows.on_device(), on_device, loss, &gradients);
  m.exec.fence();
  double found = 0;
  double expected = 0;
  Kokkos::deep_copy(found, loss);
  for (int b = 0; b < batch; ++b) expected += host.losses()(b);
  EXPECT_NEAR(found, expected, 5e-3 * expected);
  Kokkos::deep_copy(d_x.matrix(), host.workspace().d_x);
  copy_rows(on_device.scratch().d_x, d_x);
  d_x.expect_agreement("gradient of the head's input", several);
  d_final.expect_agreement(several);
  d_embedding.arrays[0].expect_agreement("gradient of token.weight", several);
}

TEST(DeviceBlock, AgreesWithTheHost) {
  check_model({.layers = 1, .heads = 2, .width = 256, .positions = 80, .vocabulary = 264}, 2);
  check_model({.layers = 1, .heads = 4, .width = 256, .positions = 48, .vocabulary = 520}, 1);
  check_model({.layers = 1, .heads = 4, .width = 160, .positions = 48, .vocabulary = 264}, 2);
}

TEST(DeviceBlock, TakesLogitsInParts) {
  const gpt::GptShape shape{
      .layers = 1, .heads = 1, .width = 64, .positions = 1000, .vocabulary = 4096};
  const device::Activations activations(shape, 4, gpt::Recompute::no);
  ASSERT_LT(activations.logits_rows(), 4000);

  check_model(shape, 4);
}

struct Course {
  std::vector<double> losses, norms;
  double evaluated = 0;
  std::vector<double> logits;
};

Course train(mics::Memory memory, gpt::Recompute recompute, const gpt::GptShape& shape,
             int samples) {
  mics::Model model;
  const gpt::GptIds ids = gpt::declare(model, shape);
  mics::Config config;
  config.compute = mics::DType::bf16;
  config.memory = memory;
  mics::Engine engine(MPI_COMM_WORLD, model, config);
  engine.declare_order(gpt::training_order(ids));
  gpt::Gpt gpt(shape, ids, config.compute, 3, recompute, memory);
  const Windows windows(3, shape.positions, shape.vocabulary);
  std::vector<gpt::Gpt::Window> views;
  for (int b = 0; b < samples; ++b) {
    const auto length = static_cast<std::size_t>(shape.positions) + 1;
    views.push_back(std::span(windows.host).subspan(static_cast<std::size_t>(b) * length, length));
  }
  Course course;
  for (int step = 0; step < 4; ++step) {
    gpt.micro_step(engine, views, false);
    gpt.micro_step(engine, {}, true);  // no samples: adds nothing
    const mics::StepHandle handle = engine.step();
    course.losses.push_back(handle.get().loss);
    course.norms.push_back(handle.get().gradient_norm);
  }
  course.evaluated = gpt.evaluate(engine, views);
  course.logits = gpt.next_logits(engine, views.front().first(5));
  return course;
}

TEST(DeviceGpt, TrainsAsTheHostDoes) {
  const gpt::GptShape shape{
      .layers = 3, .heads = 2, .width = 128, .positions = 40, .vocabulary = 264};
  for (const int samples : {3, 2}) {
    const Course expected = train(mics::Memory::host, gpt::Recompute::no, shape, samples);
    for (const auto recompute : {gpt::Recompute::no, gpt::Recompute::yes}) {
      const Course found = train(mics::Memory::device, recompute, shape, samples);
      for (std::size_t i = 0; i < expected.losses.size(); ++i) {
        std::printf("  step %zu: loss %.5f (host %.5f), norm %.5f (host %.5f)\n", i + 1,
                    found.losses[i], expected.losses[i], found.norms[i], expected.norms[i]);
        EXPECT_NEAR(found.losses[i], expected.losses[i], 5e-3 * expected.losses[i]);
        EXPECT_NEAR(found.norms[i], expected.norms[i], 3e-2 * expected.norms[i]);
      }
      EXPECT_NEAR(found.evaluated, expected.evaluated, 5e-3 * expected.evaluated);
      ASSERT_EQ(found.logits.size(), expected.logits.size());
      double difference = 0;
      double norm = 0;
      for (std::size_t i = 0; i < expected.logits.size(); ++i) {
        difference += std::pow(found.logits[i] - expected.logits[i], 2);
        norm += std::pow(expected.logits[i], 2);
      }
      EXPECT_LE(std::sqrt(difference / norm), 5e-2);
    }
  }
}

TEST(DeviceGpt, RefusesWhatItsKernelsDoNotTake) {
  const auto message = [](const gpt::GptShape& shape, mics::DType compute) {
    mics::Model model;
    const gpt::GptIds ids = gpt::declare(model, shape);
    try {
      const gpt::Gpt gpt(shape, ids, compute, 1, gpt::Recompute::no, mics::Memory::device);
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string("none");
  };
  EXPECT_EQ(message({}, mics::DType::fp32),
            "gpt::Gpt: compute dtype on a device: expected bf16, found fp32");
  EXPECT_EQ(message({.vocabulary = 257}, mics::DType::bf16),
            "gpt::Gpt: vocabulary on a device: expected a multiple of 8, found 257");
}

}  // namespace
