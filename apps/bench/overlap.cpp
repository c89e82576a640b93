// SPDX-License-Identifier: Apache-2.0
#include <mics/mics.hpp>

#include <Kokkos_Core.hpp>
#include <bench/commands.hpp>
#include <bench/device_arrays.hpp>
#include <bench/race.hpp>
#include <bench/results.hpp>
#include <bench/step_model.hpp>
#include <gpt/device/block.hpp>
#include <gpt/device/products.hpp>
#include <gpt/passes.hpp>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

// How much longer a step's matrix products take if gathers and reductions run beside them.

namespace mics::apps::bench {
namespace {

using gpt::Transpose;
using gpt::device::Exec;
using gpt::device::Product;
using gpt::device::Rows;
using Weights = gpt::device::BlockViews<const bf16>;
using Gradients = gpt::device::BlockViews<bf16>;

constexpr double share_bar = 0.05;
// The bar is for steps that give the communication this many times its own duration to hide in.
constexpr double least_load = 4;

// The products of a GPT's step over `tokens` rows: nothing else of it, and their results go nowhere
// but for the gradients.
class Load {
 public:
  Load(const gpt::GptShape& shape, int tokens)
      : shape_(shape),
        tokens_(tokens),
        workspace_("mics::bench::workspace", gpt::device::Products::workspace_bytes),
        products_(workspace_.data()),
        narrow_(arrays_.rows(tokens, shape.width)),
        wide_(arrays_.rows(tokens, 4L * shape.width)),
        narrow_result_(arrays_.rows(tokens, shape.width)),
        wide_result_(arrays_.rows(tokens, 4L * shape.width)),
        logits_(arrays_.rows(tokens, shape.vocabulary)),
        token_(arrays_.rows(shape.vocabulary, shape.width, 0.02F)),
        token_gradient_(arrays_.rows(shape.vocabulary, shape.width, 0.02F)),
        gradients_(arrays_.unit<Gradients>(shape.units().at(1))) {
    const auto own = arrays_.unit<Gradients>(shape.units().at(1));
    weights_.qkv_weight = own.qkv_weight;
    weights_.proj_weight = own.proj_weight;
    weights_.up_weight = own.up_weight;
    weights_.down_weight = own.down_weight;
    tuning_ = true;
    forward(weights_);
    backward(weights_, gradients_);
    head();
    tuning_ = false;
    operations_ = 0;
    alone();
    wait();
    operations_of_a_step_ = operations_;
  }

  void forward(const Weights& w) {
    outputs(narrow_, w.qkv_weight, wide_result_);
    outputs(narrow_, w.proj_weight, narrow_result_);
    outputs(narrow_, w.up_weight, wide_result_);
    outputs(wide_, w.down_weight, narrow_result_);
  }
  void backward(const Weights& w, const Gradients& g) {
    inputs(narrow_, w.down_weight, wide_result_);
    weights(narrow_, wide_, g.down_weight);
    inputs(wide_, w.up_weight, narrow_result_);
    weights(wide_, narrow_, g.up_weight);
    inputs(narrow_, w.proj_weight, narrow_result_);
    weights(narrow_, narrow_, g.proj_weight);
    inputs(wide_, w.qkv_weight, narrow_result_);
    weights(wide_, narrow_, g.qkv_weight);
  }
  // Logits and their backward, with a token embedding of the load's own.
  void head() {
    outputs(narrow_, token_, logits_);
    weights(logits_, narrow_, token_gradient_);
    inputs(logits_, token_, narrow_result_);
  }
  // The whole step with weights that are there.
  void alone() {
    for (int layer = 0; layer < shape_.layers; ++layer) forward(weights_);
    head();
    for (int layer = 0; layer < shape_.layers; ++layer) backward(weights_, gradients_);
  }
  void wait() const { exec_.fence("mics bench overlap: the products are done"); }

  [[nodiscard]] const Exec& exec() const { return exec_; }
  // Floating-point operations.
  [[nodiscard]] double operations_of_a_step() const { return operations_of_a_step_; }

 private:
  // y = x weight^T
  void outputs(const Rows<const bf16>& x, const Rows<const bf16>& weight, const Rows<bf16>& y) {
    run({.rows = tokens_,
         .columns = weight.extent_int(0),
         .depth = weight.extent_int(1),
         .transpose_b = Transpose::yes},
        x.data(), weight.data(), y.data());
  }
  // d_x = d_y weight
  void inputs(const Rows<const bf16>& d_y, const Rows<const bf16>& weight, const Rows<bf16>& d_x) {
    run({.rows = tokens_, .columns = weight.extent_int(1), .depth = weight.extent_int(0)},
        d_y.data(), weight.data(), d_x.data());
  }
  // d_weight = d_y^T x
  void weights(const Rows<const bf16>& d_y, const Rows<const bf16>& x, const Rows<bf16>& d_weight) {
    run({.rows = d_weight.extent_int(0),
         .columns = d_weight.extent_int(1),
         .depth = tokens_,
         .transpose_a = Transpose::yes},
        d_y.data(), x.data(), d_weight.data());
  }
  void run(const Product& product, const bf16* a, const bf16* b, bf16* d) {
    operations_ += 2.0 * product.rows * product.columns * product.depth;
    if (tuning_) {
      products_.tune(exec_, product, {.a = a, .b = b, .d = d});
    } else {
      products_.run(exec_, product, {.a = a, .b = b, .d = d});
    }
  }

  gpt::GptShape shape_;
  int tokens_;
  Exec exec_;
  Kokkos::View<std::byte*, Exec::memory_space> workspace_;
  gpt::device::Products products_;
  DeviceArrays arrays_;
  // Arrays of activations and their gradients; qkv's are the first part of the wide ones.
  Rows<bf16> narrow_, wide_, narrow_result_, wide_result_, logits_, token_, token_gradient_;
  Gradients gradients_;
  Weights weights_;
  bool tuning_ = false;
  double operations_ = 0;
  double operations_of_a_step_ = 0;
};

// Gathers forward and backward and reductions, in the order of a step, each unit's products, if
// there is a load, within its leases and scopes.
void run_step_of(Engine& engine, const gpt::GptIds& ids, const Exec& exec, Load* load) {
  const Execution execution(exec);
  const auto is_block = [&](const gpt::GptIds::Unit& unit) {
    return &unit != &ids.embedding() && &unit != &ids.final();
  };
  const auto views = [&](const Lease& lease, const gpt::GptIds::Unit& unit) {
    return gpt::unit_views<gpt::BlockParameters, const bf16, Exec>(lease, unit);
  };
  for (const gpt::GptIds::Unit& unit : ids.units) {
    const Lease lease = engine.gather(unit.id, execution);
    if (load != nullptr && is_block(unit)) load->forward(views(lease, unit));
  }
  for (auto unit = ids.units.rbegin(); unit != ids.units.rend(); ++unit) {
    const Lease lease = engine.gather(unit->id, execution);
    GradientScope scope = engine.gradient(unit->id, execution, GradientMode::overwrite);
    if (load != nullptr && is_block(*unit)) {
      load->backward(views(lease, *unit),
                     gpt::unit_views<gpt::BlockParameters, bf16, Exec>(scope, *unit));
    } else if (load != nullptr && unit == ids.units.rbegin()) {
      load->head();
    }
    scope.reduce();
  }
}

void measure(const Session& session, const Options& options, const StepModel& model, Engine& engine,
             int tokens, Results& results) {
  Load load(model.shape, tokens);
  const Execution execution(load.exec());
  const auto open = [&] {
    engine.begin_micro_step({.samples = 1, .last = true});
    engine.quiet(execution);
  };
  const auto close = [&] {
    engine.step();
    engine.quiet(execution);
  };
  const auto step_with = [&](Load* beside) {
    run_step_of(engine, model.ids, load.exec(), beside);
    engine.quiet(execution);
    load.wait();
  };
  const std::vector<Runner> runners{
      {.name = "together", .run = [&] { step_with(&load); }, .prepare = open, .finish = close},
      {.name = "products",
       .run =
           [&] {
             load.alone();
             load.wait();
           }},
      {.name = "communication",
       .run = [&] { step_with(nullptr); },
       .prepare = open,
       .finish = close}};
  const Times times = race(session.world(), runners, options.pairs);
  const double together = median(times[0]);
  const double products = median(times[1]);
  const double communication = median(times[2]);
  std::vector<double> exposed(times[0].size());
  for (std::size_t i = 0; i < exposed.size(); ++i) exposed[i] = times[0][i] - times[1][i];
  const Ratio share = ratio(exposed, times[0]);
  const double rate = load.operations_of_a_step() / products;
  const bool judged = products >= least_load * communication;
  results.line(padded(std::to_string(tokens), 8) + padded(time_text(products), 11) +
               number_text(1e-12 * rate, 0, 9) + padded(time_text(communication), 15) +
               padded(time_text(together), 11) + padded(time_text(median(exposed)), 11) +
               number_text(100 * share.median, 1, 8) + " % (" + number_text(100 * share.low, 1) +
               "-" + number_text(100 * share.high, 1) + ")" +
               number_text(100 * median(exposed) / communication, 0, 6) + " %  " +
               (judged ? results.judge(share.median <= share_bar, share_bar) : ""));
  nlohmann::json record{{"tokens", tokens},
                        {"parameters", model.model.count()},
                        {"shard_size", engine.plan().layout().shard_size()},
                        {"products_seconds", products},
                        {"products_flops_per_second", rate},
                        {"communication_seconds", communication},
                        {"together_seconds", together},
                        {"exposed_seconds", median(exposed)},
                        {"exposed_share", share.median},
                        {"exposed_share_first_quartile", share.low},
                        {"exposed_share_third_quartile", share.high},
                        {"pairs", exposed.size()}};
  if (judged) record["bar"] = share_bar;
  results.record(std::move(record));
}

}  // namespace

int run_overlap(const Session& session, const Options& options) {
  Results results(session, "overlap", options.json);
  const StepModel model(2048);
  Config config = device_config(options);
  config.optimizer = {.kind = OptimizerKind::adamw, .learning_rate = 1e-4};
  Engine engine(session.world(), model.model, config);
  results.line("Gathers and reductions of " + std::to_string(model.model.count()) +
               " parameters beside a step's matrix products, bf16, p = " +
               std::to_string(engine.plan().layout().shard_size()) + ", " +
               std::to_string(session.size()) + " rank(s), median of " +
               std::to_string(options.pairs) + " rounds in turn.");
  results.line(
      "From the first gather to the end of the last reduction; the optimizer is left out. exposed: "
      "together less products, of the step and of the communication.");
  results.line(
      "  tokens   products  TFLOP/s  communication   together    exposed  of step (quartiles)  of "
      "communication");
  for (const std::uint64_t tokens : options.sizes) {
    measure(session, options, model, engine, static_cast<int>(tokens), results);
  }
  return results.finish(options.check);
}

}  // namespace mics::apps::bench
