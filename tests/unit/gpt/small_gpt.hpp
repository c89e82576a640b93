// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Kokkos_Core.hpp>
#include <gpt/block.hpp>
#include <gpt/convert.hpp>

#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace mics::test {

/// A whole GPT on the host with its parameters in one vector: what a program does without mics.
/// \tparam Real  type of the activations
/// \tparam P     type of the parameters and of their gradients
template <class Real, class P = Real>
class SmallGpt {
 public:
  using Exec = Kokkos::DefaultHostExecutionSpace;

  struct Range {
    std::string name;  // "block0.ln1.weight"
    std::int64_t begin, count;
  };

  SmallGpt(const gpt::GptShape& shape, int batch, gpt::Recompute recompute = gpt::Recompute::no)
      : shape_(shape),
        activations_(shape, batch, recompute),
        parameter_scratch_(gpt::conversion_scratch_count(shape)),
        gradient_scratch_(gpt::conversion_scratch_count(shape)) {
    std::int64_t offset = 0;
    for (const auto& unit : shape.units()) {
      for (const auto& parameter : unit.parameters) {
        ranges_.push_back({unit.name + "." + parameter.name, offset, parameter.count()});
        offset += parameter.count();
      }
    }
    parameters.resize(static_cast<std::size_t>(offset));
    gradients.resize(static_cast<std::size_t>(offset));
    // Far from GPT-2's small values: then every path carries a gradient of order 1.
    std::int64_t index = 0;
    for (auto& value : parameters) {
      const double turn = 0.6180339887 * static_cast<double>(++index);
      value = P(static_cast<float>(0.9 * (2 * (turn - std::floor(turn)) - 1)));
    }
    windows_.resize(static_cast<std::size_t>(batch) * (shape.positions + 1));
    for (std::size_t i = 0; i < windows_.size(); ++i) {
      windows_[i] = static_cast<gpt::Token>((i * i * 5 + i * 3 + i / 4) %
                                            static_cast<std::size_t>(shape.vocabulary));
    }
  }

  [[nodiscard]] const std::vector<Range>& ranges() const { return ranges_; }
  [[nodiscard]] gpt::Activations<Real, Exec>& activations() { return activations_; }
  /// The windows of the batch, end to end.
  [[nodiscard]] const std::vector<gpt::Token>& window_data() const { return windows_; }

  /// Sum over the samples of their mean loss in nats.
  double loss() {
    forward();
    gpt::cross_entropy_forward<Real>(exec_, activations_.head().logits, windows(),
                                     activations_.head().row_losses, activations_.losses());
    return sum_of_losses();
  }

  /// The same, and adds d(loss_scale * loss) into `gradients`.
  double loss_and_gradients(double loss_scale = 1) {
    forward();
    const auto& head = activations_.head();
    gpt::cross_entropy_forward_backward<Real>(exec_, head.logits, windows(),
                                              gpt::Scalar<const double, Exec>(&loss_scale),
                                              head.row_losses, activations_.losses());
    const double result = sum_of_losses();
    const auto& work = activations_.workspace();
    {
      reset_scratch();
      const auto final_p = parameters_of<gpt::FinalParameters>(shape_.layers + 1);
      const auto embedding_p = parameters_of<gpt::EmbeddingParameters>(0);
      const auto final_g = gradients_of<gpt::FinalParameters>(shape_.layers + 1);
      const auto embedding_g = gradients_of<gpt::EmbeddingParameters>(0);
      gpt::head_backward<Real>(exec_, final_p, embedding_p.token, head, final_g, embedding_g.token,
                               work);
      add(final_g, shape_.layers + 1);
      add(embedding_g, 0);
    }
    for (int layer = shape_.layers - 1; layer >= 0; --layer) {
      reset_scratch();
      const auto g = gradients_of<gpt::BlockParameters>(layer + 1);
      const auto p = parameters_of<gpt::BlockParameters>(layer + 1);
      if (!activations_.is_kept(layer)) {
        gpt::block_activations<Real>(exec_, shape_.heads, p, activations_.layer(layer));
      }
      gpt::block_backward<Real>(exec_, shape_.heads, p, activations_.layer(layer), g, work);
      add(g, layer + 1);
    }
    reset_scratch();
    const auto g = gradients_of<gpt::EmbeddingParameters>(0);
    std::vector<std::int32_t> order(work.d_x.extent(0));
    const gpt::Vector<std::int32_t, Exec> rows(order.data(), order.size());
    gpt::sort_by_token(windows(), rows);
    gpt::embedding_backward<Real>(exec_, windows(), rows, work.d_x, g.token, g.position);
    add(g, 0);
    return result;
  }

  std::vector<P> parameters;
  std::vector<P> gradients;

 private:
  [[nodiscard]] gpt::Matrix<const gpt::Token, Exec> windows() const {
    return gpt::Matrix<const gpt::Token, Exec>(windows_.data(),
                                               static_cast<std::size_t>(activations_.batch()),
                                               static_cast<std::size_t>(shape_.positions + 1));
  }

  /// Views of unit `unit` over a vector like `parameters`.
  template <template <class, class> class Unit, class T>
  Unit<T, Exec> bind(T* base, int unit) const {
    const auto table = shape_.units();
    for (int u = 0; u < unit; ++u) base += table[static_cast<std::size_t>(u)].count();
    Unit<T, Exec> result;
    auto parameter = table[static_cast<std::size_t>(unit)].parameters.begin();
    result.visit([&](auto& view) {
      using View = std::decay_t<decltype(view)>;
      const auto extent = [&](int d) { return static_cast<std::size_t>(parameter->shape.at(d)); };
      if constexpr (View::rank() == 1) {
        view = View(base, extent(0));
      } else {
        view = View(base, extent(0), extent(1));
      }
      base += parameter->count();
      ++parameter;
    });
    return result;
  }

  template <template <class, class> class Unit>
  Unit<const Real, Exec> parameters_of(int unit) {
    const P* base = parameters.data();
    return gpt::parameters_as<Real>(exec_, bind<Unit>(base, unit), parameter_scratch_);
  }
  template <template <class, class> class Unit>
  Unit<Real, Exec> gradients_of(int unit) {
    return gpt::gradients_as<Real>(exec_, bind<Unit>(gradients.data(), unit), gradient_scratch_);
  }
  template <template <class, class> class Unit>
  void add(const Unit<Real, Exec>& computed, int unit) {
    gpt::add_gradients<Real>(exec_, computed, bind<Unit>(gradients.data(), unit));
  }
  void reset_scratch() {
    parameter_scratch_.reset();
    gradient_scratch_.reset();
  }

  void forward() {
    reset_scratch();
    const auto embedding = parameters_of<gpt::EmbeddingParameters>(0);
    gpt::embedding_forward<Real>(exec_, windows(), embedding.token, embedding.position,
                                 activations_.layer(0).x);
    for (int layer = 0; layer < shape_.layers; ++layer) {
      reset_scratch();
      gpt::block_forward<Real>(exec_, shape_.heads, parameters_of<gpt::BlockParameters>(layer + 1),
                               activations_.layer(layer), activations_.output(layer));
    }
    reset_scratch();
    const auto final_p = parameters_of<gpt::FinalParameters>(shape_.layers + 1);
    gpt::head_forward<Real>(exec_, final_p, parameters_of<gpt::EmbeddingParameters>(0).token,
                            activations_.head());
  }

  [[nodiscard]] double sum_of_losses() const {
    exec_.fence("SmallGpt: losses are complete before the host reads them");
    const auto losses = activations_.losses();
    return std::accumulate(losses.data(), losses.data() + losses.size(), 0.0);
  }

  Exec exec_;
  gpt::GptShape shape_;
  gpt::Activations<Real, Exec> activations_;
  gpt::ConversionScratch<Real, Exec> parameter_scratch_;
  gpt::ConversionScratch<Real, Exec> gradient_scratch_;
  std::vector<Range> ranges_;
  std::vector<gpt::Token> windows_;
};

}  // namespace mics::test
