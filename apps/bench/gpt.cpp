// SPDX-License-Identifier: Apache-2.0
#include <Kokkos_Core.hpp>
#include <bench/commands.hpp>
#include <bench/device_arrays.hpp>
#include <gpt/device/activations.hpp>
#include <gpt/device/block.hpp>
#include <gpt/device/check.hpp>
#include <gpt/device/peak.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

namespace mics::apps::bench {
namespace {

namespace device = gpt::device;
using device::bf16;
using Exec = device::Exec;

struct Times {
  double device = 0;  // seconds, median
  double host = 0;    // seconds to enqueue it
};

template <class F>
Times measure(const Exec& exec, int repetitions, const F& work) {
  using Clock = std::chrono::steady_clock;
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  device::check(cudaEventCreate(&begin), "cudaEventCreate");
  device::check(cudaEventCreate(&end), "cudaEventCreate");
  for (int i = 0; i < 3; ++i) work();
  std::vector<double> times;
  std::vector<double> host;
  for (int i = 0; i < repetitions; ++i) {
    device::check(cudaEventRecord(begin, exec.cuda_stream()), "cudaEventRecord");
    const auto start = Clock::now();
    work();
    host.push_back(std::chrono::duration<double>(Clock::now() - start).count());
    device::check(cudaEventRecord(end, exec.cuda_stream()), "cudaEventRecord");
    device::check(cudaEventSynchronize(end), "a part of the GPT");
    float milliseconds = 0;
    device::check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
    times.push_back(1e-3 * milliseconds);
  }
  cudaEventDestroy(end);
  cudaEventDestroy(begin);
  const auto median = [](std::vector<double>& values) {
    std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
    return values[values.size() / 2];
  };
  return {median(times), median(host)};
}

// One row of the table; a rate of operations, or of bytes, or none.
struct Work {
  double operations = 0;
  double bytes = 0;
};

class Table {
 public:
  Table(const Exec& exec, int repetitions) : exec_(exec), repetitions_(repetitions) {
    std::printf("  %-44s %10s %10s %12s\n", "part", "device us", "host us", "rate");
  }
  template <class F>
  void row(const std::string& name, const Work& work, const F& f) const {
    const Times times = measure(exec_, repetitions_, f);
    std::printf("  %-44s %10.1f %10.1f ", name.c_str(), 1e6 * times.device, 1e6 * times.host);
    if (work.operations > 0) {
      std::printf("%7.1f TFLOP/s\n", 1e-12 * work.operations / times.device);
    } else if (work.bytes > 0) {
      std::printf("%7.0f GB/s\n", 1e-9 * work.bytes / times.device);
    } else {
      std::printf("\n");
    }
    std::fflush(stdout);
  }

 private:
  const Exec& exec_;
  int repetitions_;
};

void time_parts(const Exec& exec, const gpt::GptShape& shape, int samples, int repetitions) {
  DeviceArrays memory;
  const device::Activations activations(shape, samples, gpt::Recompute::no);
  const device::Scratch& scratch = activations.scratch();
  const device::BlockActivations& layer = activations.layer(0);
  device::Products products(scratch.products.data());
  const device::Machine machine{exec, products, shape};
  const auto units = shape.units();
  using gpt::Token;
  const auto p = memory.unit<device::BlockViews<bf16>>(units[1]);
  const auto g = memory.unit<device::BlockViews<bf16>>(units[1]);
  const auto embedding = memory.unit<device::EmbeddingViews<bf16>>(units.front());
  const auto d_embedding = memory.unit<device::EmbeddingViews<bf16>>(units.front());
  const auto norm = memory.unit<device::FinalViews<bf16>>(units.back());
  const auto d_norm = memory.unit<device::FinalViews<bf16>>(units.back());
  const auto constant = [](const auto& views) {
    if constexpr (requires { views.qkv_weight; }) {
      const auto& v = views;
      return device::BlockViews<const bf16>{
          v.ln1_weight,  v.ln1_bias,    v.qkv_weight, v.query_bias, v.value_bias,
          v.proj_weight, v.proj_bias,   v.ln2_weight, v.ln2_bias,   v.up_weight,
          v.up_bias,     v.down_weight, v.down_bias};
    } else {
      return device::FinalViews<const bf16>{views.weight, views.bias};
    }
  };
  const auto block = constant(p);
  const int n = activations.rows();
  const int c = shape.width;
  const int v = shape.vocabulary;
  std::vector<Token> tokens(static_cast<std::size_t>(samples) * (shape.positions + 1));
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = static_cast<Token>(i * 2654435761U % static_cast<unsigned>(v));
  }
  std::vector<std::int32_t> order(static_cast<std::size_t>(n));
  using Host = Kokkos::DefaultHostExecutionSpace;
  gpt::sort_by_token(gpt::Matrix<const Token, Host>(tokens.data(), samples, shape.positions + 1),
                     gpt::Vector<std::int32_t, Host>(order.data(), order.size()));
  const auto upload = [](const auto& from, const auto& to) {
    using T = typename std::decay_t<decltype(from)>::value_type;
    Kokkos::deep_copy(
        to, Kokkos::View<const T*, Kokkos::HostSpace, Kokkos::MemoryTraits<Kokkos::Unmanaged>>(
                from.data(), from.size()));
  };
  const Kokkos::View<Token*, Exec::memory_space> tokens_there("mics bench gpt", tokens.size());
  const Kokkos::View<std::int32_t*, Exec::memory_space> order_there("mics bench gpt", order.size());
  upload(tokens, tokens_there);
  upload(order, order_there);
  const device::Rows<const Token> windows(tokens_there.data(), samples, shape.positions + 1);
  const Kokkos::View<double, Exec::memory_space> one("mics bench gpt");
  const Kokkos::View<double, Exec::memory_space> loss("mics bench gpt");
  Kokkos::deep_copy(one, 1.0);
  const auto fill = [&](const device::Rows<bf16>& view) {
    fill_randomly(exec, view.data(), static_cast<std::int64_t>(view.size()));
  };
  fill(layer.x);
  fill(activations.head().x);

  std::printf("GPT on the device: %d rows of width %d, %d heads, %d positions, vocabulary %d\n", n,
              c, shape.heads, shape.positions, v);
  const Table table(exec, repetitions);
  const double nc = static_cast<double>(n) * c;
  const double pairs = 0.5 * n * (shape.positions + 1.0);  // positions that see each other
  table.row("block, forward", {.operations = 24.0 * nc * c + 4 * pairs * c},
            [&] { device::block_forward(machine, block, layer, scratch, activations.output(0)); });
  fill(scratch.d_x);
  table.row("block, backward", {.operations = 48.0 * nc * c + 10 * pairs * c},
            [&] { device::block_backward(machine, block, layer, g, scratch); });
  const device::HeadGradients gradients{one, d_norm, d_embedding.token};
  table.row("head with gradients", {.operations = 6.0 * nc * v}, [&] {
    device::head(machine, constant(norm), embedding.token, windows, activations, loss, &gradients);
  });
  table.row("embedding, forward", {.bytes = 6 * nc}, [&] {
    device::embedding_forward(exec, windows, embedding.token, embedding.position, layer.x);
  });
  table.row("embedding, backward", {.bytes = 10 * nc}, [&] {
    device::embedding_backward(exec, windows,
                               device::Array<const std::int32_t>(order_there.data(), order.size()),
                               scratch.d_x, d_embedding.token, d_embedding.position);
  });
  fill(layer.qkv);
  fill(scratch.d_narrow);
  const bool fused = device::is_fused_head_width(c / shape.heads);
  if (fused) {
    table.row("attention, forward", {.operations = 4 * pairs * c}, [&] {
      device::attention_forward(exec, shape.heads, shape.positions, layer.qkv, layer.attention,
                                layer.log_sums);
    });
    table.row("attention, backward (of 10 operations a pair)", {.operations = 10 * pairs * c}, [&] {
      device::attention_backward(exec, shape.heads, shape.positions, scratch.d_narrow,
                                 layer.attention, layer.qkv, layer.log_sums, scratch.d_qkv,
                                 scratch.row_dots);
    });
  }
  fill(layer.x);
  table.row("layer norm, forward", {.bytes = 4 * nc}, [&] {
    device::layer_norm_forward(exec, layer.x, p.ln1_weight, p.ln1_bias, scratch.normal,
                               layer.ln1_mean, layer.ln1_rstd);
  });
  table.row("layer norm, backward", {.bytes = 8 * nc}, [&] {
    device::layer_norm_backward(exec, scratch.d_narrow, layer.x, layer.ln1_mean, layer.ln1_rstd,
                                p.ln1_weight, device::Residual::add, scratch.d_x, g.ln1_weight,
                                g.ln1_bias, scratch.partial);
  });
  table.row("GELU", {.bytes = 16 * nc},
            [&] { device::gelu_forward(exec, layer.up, scratch.gelu); });
  const int logit_rows = std::min(n, activations.logits_rows());
  const device::Rows<bf16> logits(scratch.logits.data(), static_cast<std::size_t>(logit_rows),
                                  static_cast<std::size_t>(v));
  table.row("cross entropy of " + std::to_string(logit_rows) + " rows",
            {.bytes = 4.0 * logit_rows * v}, [&] {
              device::cross_entropy_forward_backward(exec, logits, windows, 0, one,
                                                     scratch.row_losses);
            });

  // The products as the block runs them, and the best of several algorithms.
  struct Named {
    const char* name;
    device::Product product;
    device::ProductArguments arguments;
  };
  using device::Epilogue;
  using gpt::Transpose;
  const bf16* narrow = scratch.normal.data();
  bf16* wide = scratch.gelu.data();
  const std::vector<Named> products_of_block{
      {"qkv",
       {n, 3 * c, c, Transpose::no, Transpose::yes, Epilogue::bias},
       {.a = narrow,
        .b = p.qkv_weight.data(),
        .d = layer.qkv.data(),
        .vector = scratch.qkv_bias.data()}},
      {"up + GELU",
       {n, 4 * c, c, Transpose::no, Transpose::yes, Epilogue::gelu},
       {.a = narrow,
        .b = p.up_weight.data(),
        .d = wide,
        .vector = p.up_bias.data(),
        .auxiliary = layer.up.data()}},
      {"down + residual",
       {n, c, 4 * c, Transpose::no, Transpose::yes, Epilogue::bias, true},
       {.a = wide,
        .b = p.down_weight.data(),
        .d = scratch.d_narrow.data(),
        .c = layer.middle.data(),
        .vector = p.down_bias.data()}},
      {"proj + residual",
       {n, c, c, Transpose::no, Transpose::yes, Epilogue::bias, true},
       {.a = narrow,
        .b = p.proj_weight.data(),
        .d = scratch.d_narrow.data(),
        .c = layer.middle.data(),
        .vector = p.proj_bias.data()}},
      {"down, input gradient through GELU",
       {n, 4 * c, c, Transpose::no, Transpose::no, Epilogue::gelu_backward},
       {.a = scratch.d_x.data(),
        .b = p.down_weight.data(),
        .d = scratch.d_wide.data(),
        .vector = g.up_bias.data(),
        .auxiliary = layer.up.data()}},
      {"up, input gradient",
       {n, c, 4 * c},
       {.a = scratch.d_wide.data(), .b = p.up_weight.data(), .d = scratch.d_narrow.data()}},
      {"proj, input gradient",
       {n, c, c},
       {.a = scratch.d_x.data(), .b = p.proj_weight.data(), .d = scratch.d_narrow.data()}},
      {"qkv, input gradient",
       {n, c, 3 * c},
       {.a = scratch.d_qkv.data(), .b = p.qkv_weight.data(), .d = scratch.d_narrow.data()}},
      {"down, weight and bias gradient",
       {c, 4 * c, n, Transpose::yes, Transpose::no, Epilogue::bias_gradient},
       {.a = scratch.d_x.data(),
        .b = wide,
        .d = g.down_weight.data(),
        .vector = g.down_bias.data()}},
      {"up, weight gradient",
       {4 * c, c, n, Transpose::yes},
       {.a = scratch.d_wide.data(), .b = narrow, .d = g.up_weight.data()}},
      {"proj, weight and bias gradient",
       {c, c, n, Transpose::yes, Transpose::no, Epilogue::bias_gradient},
       {.a = scratch.d_x.data(),
        .b = narrow,
        .d = g.proj_weight.data(),
        .vector = g.proj_bias.data()}},
      {"qkv, weight and bias gradient",
       {3 * c, c, n, Transpose::yes, Transpose::no, Epilogue::bias_gradient},
       {.a = scratch.d_qkv.data(),
        .b = narrow,
        .d = g.qkv_weight.data(),
        .vector = scratch.qkv_bias.data()}},
  };
  for (const Named& named : products_of_block) {
    const auto run = [&] { products.run(exec, named.product, named.arguments); };
    const Work work{.operations =
                        2.0 * named.product.rows * named.product.columns * named.product.depth};
    table.row(named.name, work, run);
    products.tune(exec, named.product, named.arguments);
    table.row(std::string(named.name) + ", tuned", work, run);
  }
}

}  // namespace

int run_gpt(const Session& session, const Options& options) {
  if (!session.is_root()) return 0;
  std::printf("peak: products of %d: %.0f TFLOP/s\n", device::peak_extent,
              1e-12 * device::measured_peak());
  const Exec exec;
  const gpt::GptShape shape{
      .layers = 1, .heads = 16, .width = 2048, .positions = 1024, .vocabulary = 50304};
  for (const std::uint64_t samples : options.sizes) {
    time_parts(exec, shape, static_cast<int>(samples), options.pairs);
  }
  gpt::GptShape few = shape;
  few.positions = 16;
  time_parts(exec, few, 1, options.pairs);
  return 0;
}

}  // namespace mics::apps::bench
