// SPDX-License-Identifier: Apache-2.0
#include <Kokkos_Core.hpp>
#include <gpt/block.hpp>
#include <gpt/convert.hpp>
#include <gpt/model.hpp>

#include <algorithm>
#include <numbers>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace gpt {

namespace {

using Exec = Kokkos::DefaultHostExecutionSpace;  // where the engine's views are

/// Views of a unit's parameters from a lease (T is const) or a gradient scope.
template <template <class, class> class Unit, class T, class Source>
Unit<T, Exec> views(const Source& source, const GptIds::Unit& ids) {
  Unit<T, Exec> result;
  auto id = ids.parameters.begin();
  result.visit([&](auto& view) {
    if constexpr (std::decay_t<decltype(view)>::rank() == 1) {
      view = source.template view<T*>(*id++);
    } else {
      view = source.template view<T**>(*id++);
    }
  });
  return result;
}

}  // namespace

class Gpt::Passes {
 public:
  Passes() = default;
  Passes(const Passes&) = delete;
  Passes& operator=(const Passes&) = delete;
  virtual ~Passes() = default;
  virtual void load(std::span<const Window> windows) = 0;
  virtual void train(mics::Engine& engine) = 0;
  virtual double evaluate(mics::Engine& engine) = 0;
  /// Logits of the position after `position` of the first window, as the last pass left them.
  [[nodiscard]] virtual std::vector<double> logits(std::size_t position) const = 0;
  [[nodiscard]] virtual std::size_t bytes() const = 0;
};

template <class Real, class Stored>
class Gpt::PassesOf final : public Gpt::Passes {
 public:
  PassesOf(const GptShape& shape, GptIds ids, int batch, Recompute recompute)
      : shape_(shape),
        ids_(std::move(ids)),
        activations_(shape, batch, recompute),
        parameter_scratch_(scratch_count(shape)),
        gradient_scratch_(scratch_count(shape)),
        tokens_("gpt::Gpt::tokens", static_cast<std::size_t>(batch) * window_tokens()),
        order_("gpt::Gpt::order", static_cast<std::size_t>(batch) * (window_tokens() - 1)) {}

  void load(std::span<const Window> windows) override {
    activations_.resize(static_cast<int>(std::min<std::size_t>(windows.size(), INT32_MAX)));
    Token* target = tokens_.data();
    for (const Window window : windows) {
      if (window.size() != window_tokens()) {
        throw std::invalid_argument("gpt::Gpt: window: expected " +
                                    std::to_string(window_tokens()) + " tokens, found " +
                                    std::to_string(window.size()));
      }
      for (const Token token : window) {
        if (token >= static_cast<Token>(shape_.vocabulary)) {
          throw std::invalid_argument("gpt::Gpt: window: expected tokens below " +
                                      std::to_string(shape_.vocabulary) + ", found " +
                                      std::to_string(token));
        }
        *target++ = token;
      }
    }
  }

  void train(mics::Engine& engine) override {
    forward_blocks(engine);
    mics::GradientScope embedding_scope = train_head(engine);
    for (int layer = shape_.layers - 1; layer >= 0; --layer) {
      reset_scratch();
      const GptIds::Unit& unit = ids_.block(layer);
      const mics::Lease lease = engine.gather(unit.id, exec_);
      mics::GradientScope scope = engine.gradient(unit.id, exec_);
      const auto p = parameters<BlockParameters>(lease, unit);
      const auto stored = views<BlockParameters, Stored>(scope, unit);
      const auto g = gradients_as<Real>(exec_, stored, gradient_scratch_);
      if (!activations_.is_kept(layer)) {
        block_activations<Real>(exec_, shape_.heads, p, activations_.layer(layer));
      }
      block_backward<Real>(exec_, shape_.heads, p, activations_.layer(layer), g,
                           activations_.workspace());
      add_gradients<Real>(exec_, g, stored);
      scope.reduce();
    }
    reset_scratch();
    const auto stored = views<EmbeddingParameters, Stored>(embedding_scope, ids_.embedding());
    const auto g = gradients_as<Real>(exec_, stored, gradient_scratch_);
    const Vector<std::int32_t, Exec> order(
        order_.data(), static_cast<std::size_t>(activations_.batch()) * (window_tokens() - 1));
    sort_by_token(windows(), order);
    embedding_backward<Real>(exec_, windows(), order, activations_.workspace().d_x, g.token,
                             g.position);
    add_gradients<Real>(exec_, g, stored);
    embedding_scope.reduce();
  }

  double evaluate(mics::Engine& engine) override {
    forward_blocks(engine);
    const Head opened = run_head(engine);
    const auto& head = activations_.head();
    cross_entropy_forward<Real>(exec_, head.logits, windows(), head.row_losses,
                                activations_.losses());
    return sum_of_losses();
  }

  [[nodiscard]] std::vector<double> logits(std::size_t position) const override {
    const auto& all = activations_.head().logits;
    std::vector<double> row(all.extent(1));
    for (std::size_t i = 0; i < row.size(); ++i) row[i] = static_cast<double>(all(position, i));
    return row;
  }

  [[nodiscard]] std::size_t bytes() const override {
    return activations_.bytes() + tokens_.size() * sizeof(Token) +
           order_.size() * sizeof(std::int32_t) +
           2 * static_cast<std::size_t>(scratch_count(shape_)) * sizeof(Real);
  }

 private:
  [[nodiscard]] static std::int64_t scratch_count(const GptShape& shape) {
    return std::is_same_v<Real, Stored> ? 0 : conversion_scratch_count(shape);
  }
  [[nodiscard]] std::size_t window_tokens() const {
    return static_cast<std::size_t>(shape_.positions) + 1;
  }
  [[nodiscard]] Matrix<const Token, Exec> windows() const {
    return Matrix<const Token, Exec>(tokens_.data(), static_cast<std::size_t>(activations_.batch()),
                                     window_tokens());
  }
  void reset_scratch() {
    parameter_scratch_.reset();
    gradient_scratch_.reset();
  }
  template <template <class, class> class Unit>
  Unit<const Real, Exec> parameters(const mics::Lease& lease, const GptIds::Unit& ids) {
    return parameters_as<Real>(exec_, views<Unit, const Stored>(lease, ids), parameter_scratch_);
  }

  void forward_blocks(mics::Engine& engine) {
    {
      reset_scratch();
      const mics::Lease lease = engine.gather(ids_.embedding().id, exec_);
      const auto p = parameters<EmbeddingParameters>(lease, ids_.embedding());
      embedding_forward<Real>(exec_, windows(), p.token, p.position, activations_.layer(0).x);
    }
    for (int layer = 0; layer < shape_.layers; ++layer) {
      reset_scratch();
      const mics::Lease lease = engine.gather(ids_.block(layer).id, exec_);
      block_forward<Real>(exec_, shape_.heads,
                          parameters<BlockParameters>(lease, ids_.block(layer)),
                          activations_.layer(layer), activations_.output(layer));
    }
  }

  /// What the head reads, and the leases that keep it valid.
  struct Head {
    mics::Lease embedding_lease, final_lease;
    Matrix<const Real, Exec> token;
    FinalParameters<const Real, Exec> norm;
  };

  /// Gathers what the head reads, computes its logits, and leaves the leases open.
  Head run_head(mics::Engine& engine) {
    reset_scratch();
    Head opened{
        engine.gather(ids_.embedding().id, exec_), engine.gather(ids_.final().id, exec_), {}, {}};
    opened.token = parameters<EmbeddingParameters>(opened.embedding_lease, ids_.embedding()).token;
    opened.norm = parameters<FinalParameters>(opened.final_lease, ids_.final());
    head_forward<Real>(exec_, opened.norm, opened.token, activations_.head());
    return opened;
  }

  /// Head, loss and their gradients. Returns the embedding's scope, to which the embedding's own
  /// backward adds at the end of the pass.
  mics::GradientScope train_head(mics::Engine& engine) {
    const Head opened = run_head(engine);
    const auto& head = activations_.head();
    cross_entropy_forward_backward<Real>(exec_, head.logits, windows(), engine.loss_scale(),
                                         head.row_losses, activations_.losses());
    engine.loss()() += sum_of_losses();

    mics::GradientScope embedding_scope = engine.gradient(ids_.embedding().id, exec_);
    mics::GradientScope final_scope = engine.gradient(ids_.final().id, exec_);
    const auto stored_embedding =
        views<EmbeddingParameters, Stored>(embedding_scope, ids_.embedding());
    const auto stored_norm = views<FinalParameters, Stored>(final_scope, ids_.final());
    const auto d_embedding = gradients_as<Real>(exec_, stored_embedding, gradient_scratch_);
    const auto d_norm = gradients_as<Real>(exec_, stored_norm, gradient_scratch_);
    head_backward<Real>(exec_, opened.norm, opened.token, head, d_norm, d_embedding.token,
                        activations_.workspace());
    add_gradients<Real>(exec_, d_embedding, stored_embedding);
    add_gradients<Real>(exec_, d_norm, stored_norm);
    final_scope.reduce();
    return embedding_scope;
  }

  [[nodiscard]] double sum_of_losses() const {
    exec_.fence("gpt::Gpt: losses are complete before the host adds them");
    const auto losses = activations_.losses();
    double sum = 0;
    for (std::size_t i = 0; i < losses.size(); ++i) sum += losses(i);
    return sum;
  }

  Exec exec_;
  GptShape shape_;
  GptIds ids_;
  Activations<Real, Exec> activations_;
  ConversionScratch<Real, Exec> parameter_scratch_;
  ConversionScratch<Real, Exec> gradient_scratch_;
  Kokkos::View<Token*, Exec::memory_space> tokens_;        // (batch * (positions + 1))
  Kokkos::View<std::int32_t*, Exec::memory_space> order_;  // (batch * positions) rows by token
};

GptIds declare(mics::Model& model, const GptShape& shape) {
  GptIds ids;
  for (const UnitSpec& unit : shape.units()) {
    GptIds::Unit& declared = ids.units.emplace_back();
    declared.id = model.unit(unit.name);
    for (const ParameterSpec& parameter : unit.parameters) {
      const bool is_normal = parameter.initial.kind == InitialKind::normal;
      mics::ParameterOptions options;
      options.init = is_normal ? mics::Init::normal(parameter.initial.spread)
                               : mics::Init::constant(parameter.initial.spread);
      options.weight_decay_factor = parameter.weight_decay == WeightDecay::yes ? 1 : 0;
      declared.parameters.push_back(
          model.parameter(declared.id, parameter.name, parameter.shape, options));
    }
  }
  return ids;
}

std::vector<mics::LeaseCall> training_leases(const GptIds& ids) {
  std::vector<mics::LeaseCall> calls;
  const auto lease = [&](const GptIds::Unit& unit) {
    calls.push_back({unit.id});
    calls.push_back({.unit = unit.id, .begins = false});
  };
  const auto layers = static_cast<int>(ids.units.size()) - 2;
  lease(ids.embedding());
  for (int layer = 0; layer < layers; ++layer) lease(ids.block(layer));
  // The head reads the embedding and the last norm together.
  calls.push_back({ids.embedding().id});
  lease(ids.final());
  calls.push_back({.unit = ids.embedding().id, .begins = false});
  for (int layer = layers - 1; layer >= 0; --layer) lease(ids.block(layer));
  return calls;
}

std::vector<mics::UnitId> training_order(const GptIds& ids) {
  std::vector<mics::UnitId> order;
  for (const auto [unit, begins] : training_leases(ids)) {
    if (begins) order.push_back(unit);
  }
  return order;
}

Gpt::Gpt(const GptShape& shape, GptIds ids, mics::DType compute, int batch, Recompute recompute)
    : positions_(shape.positions) {
  passes_ = mics::visit(compute, [&](auto tag) -> std::unique_ptr<Passes> {
    using Stored = typename decltype(tag)::type;
    using Real = std::conditional_t<std::is_same_v<Stored, double>, double, float>;
    return std::make_unique<PassesOf<Real, Stored>>(shape, std::move(ids), batch, recompute);
  });
}

Gpt::~Gpt() = default;
Gpt::Gpt(Gpt&&) noexcept = default;
Gpt& Gpt::operator=(Gpt&&) noexcept = default;

void Gpt::micro_step(mics::Engine& engine, std::span<const Window> windows, bool is_last) {
  engine.guard([&] {
    passes_->load(windows);
    engine.begin_micro_step(
        {.samples = static_cast<std::int64_t>(windows.size()), .last = is_last});
    passes_->train(engine);
  });
}

double Gpt::evaluate(mics::Engine& engine, std::span<const Window> windows) {
  return engine.guard([&] {
    passes_->load(windows);
    engine.begin_evaluation();
    return passes_->evaluate(engine);
  });
}

std::vector<double> Gpt::next_logits(mics::Engine& engine, Window prefix) {
  std::vector<Token> window(static_cast<std::size_t>(positions_) + 1);
  if (prefix.empty() || prefix.size() >= window.size()) {
    throw std::invalid_argument("gpt::Gpt: prefix: expected 1 to " + std::to_string(positions_) +
                                " tokens, found " + std::to_string(prefix.size()));
  }
  // Attention is causal: what follows the prefix does not matter.
  std::ranges::copy(prefix, window.begin());
  const Window windows[] = {window};
  static_cast<void>(evaluate(engine, windows));
  return passes_->logits(prefix.size() - 1);
}

std::size_t Gpt::bytes() const { return passes_->bytes(); }

double bits_of_nats(double nats) { return nats / std::numbers::ln2; }

}  // namespace gpt
