// SPDX-License-Identifier: Apache-2.0
#include <mics/base/device.hpp>

#include <Kokkos_Core.hpp>
#include <gpt/device/block.hpp>
#include <gpt/device/check.hpp>
#include <gpt/device/passes.hpp>
#include <gpt/layers.hpp>

#include <array>
#include <cstddef>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

namespace gpt::device {

namespace {

void require_multiple(const char* what, int found, int of) {
  if (found % of == 0) return;
  throw std::invalid_argument(std::string("gpt::Gpt: ") + what +
                              " on a device: expected a multiple of " + std::to_string(of) +
                              ", found " + std::to_string(found));
}

void require_shape(const GptShape& shape, mics::DType compute) {
  if (compute != mics::DType::bf16) {
    throw std::invalid_argument("gpt::Gpt: compute dtype on a device: expected bf16, found " +
                                std::string(mics::name(compute)));
  }
  require_multiple("width", shape.width, lane_elements);
  require_multiple("vocabulary", shape.vocabulary, lane_elements);
  if (shape.width > most_width) {
    throw std::invalid_argument("gpt::Gpt: width on a device: expected at most " +
                                std::to_string(most_width) + ", found " +
                                std::to_string(shape.width));
  }
  if (!is_fused_head_width(shape.width / shape.heads)) {
    require_multiple("width of a head", shape.width / shape.heads, lane_elements);
    require_multiple("positions", shape.positions, lane_elements);
  }
}

// Tokens of a batch, and its rows sorted by token, on their way to the device. Several batches may
// be under way: the host is ahead of it.
class TokenUploads {
 public:
  TokenUploads(const GptShape& shape, int batch)
      : shape_(shape),
        windows_("gpt::device::windows", static_cast<std::size_t>(batch) * window_tokens()),
        order_("gpt::device::order", static_cast<std::size_t>(batch) * (window_tokens() - 1)) {
    for (Slot& slot : slots_) {
      slot.windows = HostTokens("gpt::device::windows", windows_.size());
      slot.order = HostOrder("gpt::device::order", order_.size());
    }
  }

  void load(const mics::Execution& exec, std::span<const Gpt::Window> windows) {
    Slot& slot = slots_[next_];
    next_ = (next_ + 1) % slots_.size();
    slot.copied.wait("gpt::device: the tokens of a batch long ago are on the device");
    batch_ = windows.size();
    copy_windows(shape_, windows, slot.windows.data());
    using Host = Kokkos::DefaultHostExecutionSpace;
    const Matrix<const Token, Host> tokens(slot.windows.data(), batch_, window_tokens());
    const Vector<std::int32_t, Host> order(slot.order.data(), batch_ * (window_tokens() - 1));
    sort_by_token(tokens, order);
    mics::device::copy(exec, windows_.data(), tokens.data(),
                       static_cast<std::int64_t>(tokens.size() * sizeof(Token)));
    mics::device::copy(exec, order_.data(), order.data(),
                       static_cast<std::int64_t>(order.size() * sizeof(std::int32_t)));
    slot.copied = exec.mark();
  }

  [[nodiscard]] Rows<const Token> windows() const {
    return Rows<const Token>(windows_.data(), batch_, window_tokens());
  }
  [[nodiscard]] Array<const std::int32_t> order() const {
    return Array<const std::int32_t>(order_.data(), batch_ * (window_tokens() - 1));
  }
  [[nodiscard]] std::size_t bytes() const {
    return windows_.size() * sizeof(Token) + order_.size() * sizeof(std::int32_t);
  }

 private:
  using HostTokens = Kokkos::View<Token*, mics::device::PinnedSpace>;
  using HostOrder = Kokkos::View<std::int32_t*, mics::device::PinnedSpace>;
  struct Slot {
    HostTokens windows;
    HostOrder order;
    mics::Marker copied;
  };
  [[nodiscard]] std::size_t window_tokens() const {
    return static_cast<std::size_t>(shape_.positions) + 1;
  }

  GptShape shape_;
  std::array<Slot, 4> slots_;
  std::size_t next_ = 0;
  std::size_t batch_ = 0;
  Kokkos::View<Token*, Exec::memory_space> windows_;
  Kokkos::View<std::int32_t*, Exec::memory_space> order_;
};

class DevicePasses final : public Passes {
 public:
  DevicePasses(const GptShape& shape, GptIds ids, int batch, Recompute recompute)
      : shape_(shape),
        ids_(std::move(ids)),
        execution_(exec_),
        activations_(shape, batch, recompute),
        uploads_(shape, batch),
        products_(activations_.scratch().products.data()) {}

  void load(std::span<const Gpt::Window> windows) override {
    activations_.resize(static_cast<int>(std::min<std::size_t>(windows.size(), INT32_MAX)));
    uploads_.load(execution_, windows);
  }

  void train(mics::Engine& engine) override {
    forward_blocks(engine);
    mics::GradientScope embedding_scope = train_head(engine);
    for (int layer = shape_.layers - 1; layer >= 0; --layer) {
      const GptIds::Unit& unit = ids_.block(layer);
      const mics::Lease lease = engine.gather(unit.id, execution_);
      mics::GradientScope scope = engine.gradient(unit.id, execution_, gradient_mode());
      if (activations_.batch() > 0) {
        const auto p = unit_views<BlockParameters, const bf16, Exec>(lease, unit);
        const auto g = unit_views<BlockParameters, bf16, Exec>(scope, unit);
        const BlockActivations& saved = activations_.layer(layer);
        if (!activations_.is_kept(layer)) {
          block_activations(machine(), p, saved, activations_.scratch());
        }
        block_backward(machine(), p, saved, g, activations_.scratch());
      }
      scope.reduce();
    }
    if (activations_.batch() > 0) {
      const auto g = unit_views<EmbeddingParameters, bf16, Exec>(embedding_scope, ids_.embedding());
      embedding_backward(exec_, uploads_.windows(), uploads_.order(), activations_.scratch().d_x,
                         g.token, g.position);
    }
    embedding_scope.reduce();
  }

  double evaluate(mics::Engine& engine) override {
    forward_blocks(engine);
    const Array<double>& loss = activations_.scratch().loss;
    mics::device::clear(execution_, loss.data(), sizeof(double));
    const mics::Lease embedding_lease = engine.gather(ids_.embedding().id, execution_);
    const mics::Lease final_lease = engine.gather(ids_.final().id, execution_);
    run_head(embedding_lease, final_lease, Scalar<double, Exec>(loss.data()), nullptr);
    double result = 0;
    Kokkos::deep_copy(result, Scalar<const double, Exec>(loss.data()));
    return result;
  }

  [[nodiscard]] std::vector<double> logits(std::size_t position) const override {
    const auto columns = static_cast<std::size_t>(shape_.vocabulary);
    const Array<const bf16> row(activations_.scratch().logits.data() + position * columns, columns);
    const auto copy = Kokkos::create_mirror_view_and_copy(Kokkos::HostSpace(), row);
    std::vector<double> result(columns);
    for (std::size_t i = 0; i < columns; ++i) result[i] = static_cast<double>(copy(i));
    return result;
  }

  [[nodiscard]] std::size_t bytes() const override {
    return activations_.bytes() + uploads_.bytes();
  }

 private:
  [[nodiscard]] Machine machine() { return {exec_, products_, shape_}; }

  /// Kernels write all elements of the gradients, but for a rank without samples, which has zeros.
  [[nodiscard]] mics::GradientMode gradient_mode() const {
    return activations_.batch() > 0 ? mics::GradientMode::overwrite : mics::GradientMode::add;
  }

  void forward_blocks(mics::Engine& engine) {
    {
      const mics::Lease lease = engine.gather(ids_.embedding().id, execution_);
      const auto p = unit_views<EmbeddingParameters, const bf16, Exec>(lease, ids_.embedding());
      embedding_forward(exec_, uploads_.windows(), p.token, p.position, activations_.layer(0).x);
    }
    for (int layer = 0; layer < shape_.layers; ++layer) {
      const GptIds::Unit& unit = ids_.block(layer);
      const mics::Lease lease = engine.gather(unit.id, execution_);
      block_forward(machine(), unit_views<BlockParameters, const bf16, Exec>(lease, unit),
                    activations_.layer(layer), activations_.scratch(), activations_.output(layer));
    }
  }

  void run_head(const mics::Lease& embedding_lease, const mics::Lease& final_lease,
                Scalar<double, Exec> loss, const HeadGradients* gradients) {
    const auto embedding =
        unit_views<EmbeddingParameters, const bf16, Exec>(embedding_lease, ids_.embedding());
    const auto norm = unit_views<FinalParameters, const bf16, Exec>(final_lease, ids_.final());
    head(machine(), norm, embedding.token, uploads_.windows(), activations_, loss, gradients);
  }

  /// Head, loss and their gradients. Returns the embedding's scope, to which the embedding's own
  /// backward adds at the end of the pass.
  mics::GradientScope train_head(mics::Engine& engine) {
    const mics::Lease embedding_lease = engine.gather(ids_.embedding().id, execution_);
    const mics::Lease final_lease = engine.gather(ids_.final().id, execution_);
    mics::GradientScope embedding_scope =
        engine.gradient(ids_.embedding().id, execution_, gradient_mode());
    mics::GradientScope final_scope = engine.gradient(ids_.final().id, execution_, gradient_mode());
    if (activations_.batch() > 0) {
      const auto d_embedding =
          unit_views<EmbeddingParameters, bf16, Exec>(embedding_scope, ids_.embedding());
      const HeadGradients gradients{
          engine.loss_scale<Exec::memory_space>(),
          unit_views<FinalParameters, bf16, Exec>(final_scope, ids_.final()), d_embedding.token};
      run_head(embedding_lease, final_lease, engine.loss<Exec::memory_space>(), &gradients);
    }
    final_scope.reduce();
    return embedding_scope;
  }

  Exec exec_;
  GptShape shape_;
  GptIds ids_;
  mics::Execution execution_;
  Activations activations_;
  TokenUploads uploads_;
  Products products_;
};

}  // namespace

std::unique_ptr<Passes> make_passes(const GptShape& shape, GptIds ids, mics::DType compute,
                                    int batch, Recompute recompute) {
  require_shape(shape, compute);
  return std::make_unique<DevicePasses>(shape, std::move(ids), batch, recompute);
}

}  // namespace gpt::device
