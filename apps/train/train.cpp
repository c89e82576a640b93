// SPDX-License-Identifier: Apache-2.0
#include <mics/mics.hpp>

#include <data/bigram.hpp>
#include <data/byte_corpus.hpp>
#include <gpt/model.hpp>
#include <nlohmann/json.hpp>
#include <report/metrics.hpp>
#include <report/progress.hpp>
#include <train/deck.hpp>
#include <train/train.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iomanip>
#include <iostream>
#include <memory>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <vector>

namespace mics::apps {
namespace {

using Clock = std::chrono::steady_clock;
using Window = gpt::Gpt::Window;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::string fixed(double value, int digits) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(digits) << value;
  return text.str();
}

// The text as it prints: control bytes and bytes that are no ASCII as a dot.
std::string printable(const std::string& text) {
  std::string result;
  for (const char c : text) {
    const bool plain = (c >= ' ' && c <= '~') || c == '\n' || c == '\t';
    result += plain ? c : '.';
  }
  return result;
}

// What the command line says.
struct Arguments {
  std::string deck;
  std::string deepspeed;
  std::vector<std::string> overrides;
};

// Everything that a run reads, the same on every rank.
struct Inputs {
  Deck deck;
  Batch batch;
  std::unique_ptr<data::ByteCorpus> corpus;
};

Inputs read_inputs(const Session& session, const Arguments& arguments) {
  const auto world = comm::Communicator::duplicate(session.world());
  Inputs inputs;
  comm::agree(world, [&] {
    inputs.deck = read_deck(arguments.deck, arguments.overrides, arguments.deepspeed);
    inputs.batch = solve_batch(inputs.deck.engine, session.size());
    inputs.deck.engine.accumulation_steps = inputs.batch.micro_steps;
  });
  comm::require_same(world, inputs.deck.text, "deck");
  comm::agree(world, [&] {
    inputs.corpus = std::make_unique<data::ByteCorpus>(
        inputs.deck.files,
        data::CorpusOptions{.positions = inputs.deck.shape.positions,
                            .validation_fraction = inputs.deck.validation_fraction,
                            .validation_window_limit = inputs.deck.validation_windows,
                            .seed = inputs.deck.data_seed});
  });
  std::uint64_t hash = 0;
  for (const auto* parts :
       {&inputs.corpus->training_runs(), &inputs.corpus->validation_windows()}) {
    for (const data::ByteSpan part : *parts) {
      for (const std::uint8_t byte : part) hash = hash_combine(hash, byte);
    }
  }
  comm::require_same(
      world, std::to_string(inputs.corpus->bytes()) + " bytes, hash " + std::to_string(hash),
      "text of the input files");
  return inputs;
}

// One training run on one engine.
class Trainer {
 public:
  Trainer(const Session& session, const Inputs& inputs)
      : session_(session),
        deck_(inputs.deck),
        batch_(inputs.batch),
        corpus_(*inputs.corpus),
        ids_(gpt::declare(model_, deck_.shape)),
        engine_(session.world(), model_, deck_.engine, {},
                [this](LogLevel, std::string_view line) {
                  if (session_.is_root()) say("note: " + std::string(line));
                }),
        metrics_(session.is_root() ? deck_.metrics : std::string(), report::MetricsMode::replace,
                 [this](const std::string& line) { say("note: " + line); }) {
    // One rank may be short of memory; then all of them end here.
    comm::agree(comm::Communicator::duplicate(session.world()), [&] {
      gpt_.emplace(deck_.shape, ids_, deck_.engine.compute,
                   static_cast<int>(std::max<std::int64_t>(1, batch_.largest(session.size()))));
    });
    // A schedule of the configuration takes the place of the deck's own.
    if (deck_.engine.schedule.kind == ScheduleKind::constant) {
      engine_.set_learning_rates(learning_rates(deck_));
    }
    engine_.declare_order(gpt::training_order(ids_));
  }

  [[nodiscard]] Engine& engine() { return engine_; }

  /// Returns false if the run ended with a loss that is no number; the same on every rank.
  [[nodiscard]] bool run() {
    print_start();
    const auto start = Clock::now();
    if (session_.is_root()) {
      progress_.emplace(std::cout,
                        report::ProgressOptions{.style = report::is_terminal(stdout)
                                                             ? report::ProgressStyle::bar
                                                             : report::ProgressStyle::lines,
                                                .last_step = deck_.steps,
                                                .every = deck_.print_every});
    }
    for (std::int64_t step = 0; step < deck_.steps; ++step) {
      train_step(step);
      const bool last = step + 1 == deck_.steps;
      const bool due = deck_.validate_every > 0 && (step + 1) % deck_.validate_every == 0;
      if (due && !last) report_validation(step + 1, validate());
    }
    const double training_seconds = seconds_since(start);
    const double bits = validate();
    report_validation(deck_.steps, bits);
    progress_.reset();
    finish(bits, training_seconds);
    return std::isfinite(bits);
  }

 private:
  void say(const std::string& line) {
    if (progress_) {
      progress_->message(line);
    } else {
      std::cout << line << std::endl;
    }
  }

  void print_start() {
    if (!session_.is_root()) return;
    const std::vector<UnitId> order = gpt::training_order(ids_);
    std::cout << "model\n  GPT over bytes: " << deck_.shape.layers << " layers, "
              << deck_.shape.heads << " heads, width " << deck_.shape.width << ", "
              << deck_.shape.positions << " positions, " << deck_.shape.parameter_count()
              << " parameters\n"
              << "text\n  " << corpus_.files().size() << " files, " << corpus_.bytes()
              << " bytes: " << corpus_.training_bytes() << " for training, "
              << corpus_.validation_windows().size() << " validation windows of "
              << deck_.shape.positions << " positions\n"
              << engine_.plan().text(order) << "batch\n  " << batch_.global << " samples a step in "
              << batch_.micro_steps << " micro-step" << (batch_.micro_steps == 1 ? "" : "s")
              << ", at most " << batch_.largest(session_.size()) << " a rank at once; activations "
              << gpt_->bytes() / 1024 << " KiB a rank\n";
    if (deck_.engine.schedule.kind != ScheduleKind::constant) {
      std::cout << "note: learning rates follow " << deck_.engine.source
                << "scheduler, not the deck's training section\n";
    }
    for (const KeyNote& note : deck_.engine.report.with(KeyFate::without_effect)) {
      std::cout << "note: " << deck_.engine.source << note.key
                << " has no effect here: " << note.text << '\n';
    }
    std::cout << std::flush;
  }

  void train_step(std::int64_t step) {
    const auto start = Clock::now();
    std::vector<Window> windows;
    for (std::int64_t m = 0; m < batch_.micro_steps; ++m) {
      const Batch::Range range = batch_.samples(m, session_.rank(), session_.size());
      windows.clear();
      for (std::int64_t i = range.begin; i < range.end; ++i) {
        windows.push_back(corpus_.sample(static_cast<std::uint64_t>(step * batch_.global + i)));
      }
      gpt_->micro_step(engine_, windows, m + 1 == batch_.micro_steps);
    }
    const StepHandle handle = engine_.step();
    const StepResult& result = handle.get();
    if (!session_.is_root()) return;
    const std::int64_t tokens = result.samples * deck_.shape.positions;
    const double bits = gpt::bits_of_nats(result.loss);
    progress_->update(step + 1, bits, tokens);
    if (result.skipped)
      say("note: step " + std::to_string(step + 1) + " skipped: gradient norm " +
          fixed(result.gradient_norm, 3));
    const double seconds = seconds_since(start);
    metrics_.write({{"event", "step"},
                    {"step", step + 1},
                    {"loss_bits_per_byte", bits},
                    {"gradient_norm", result.gradient_norm},
                    {"learning_rate", result.learning_rate},
                    {"skipped", result.skipped},
                    {"samples", result.samples},
                    {"tokens_per_second", static_cast<double>(tokens) / seconds},
                    {"seconds", seconds}});
  }

  // Mean bits a byte over all validation windows, shared out among the ranks.
  double validate() {
    const std::vector<data::ByteSpan>& all = corpus_.validation_windows();
    const auto ranks = static_cast<std::size_t>(session_.size());
    const auto capacity =
        static_cast<std::size_t>(std::max<std::int64_t>(1, batch_.largest(session_.size())));
    const std::size_t most = (all.size() + ranks - 1) / ranks;
    // Every rank makes the same number of calls, the last ones perhaps with fewer windows.
    double nats = 0;
    std::vector<Window> windows;
    for (std::size_t begin = 0; begin < most; begin += capacity) {
      windows.clear();
      for (std::size_t i = begin; i < std::min(most, begin + capacity); ++i) {
        const std::size_t window = i * ranks + static_cast<std::size_t>(session_.rank());
        if (window < all.size()) windows.push_back(all[window]);
      }
      nats += gpt_->evaluate(engine_, windows);
    }
    engine_.sum({&nats, 1});
    return gpt::bits_of_nats(nats / static_cast<double>(all.size()));
  }

  void report_validation(std::int64_t step, double bits) {
    if (!session_.is_root()) return;
    say("validation after step " + std::to_string(step) + ": " + fixed(bits, 3) + " bits/byte");
    metrics_.write({{"event", "validation"}, {"step", step}, {"bits_per_byte", bits}});
  }

  // Text in the model's words: every rank computes the same bytes, since gathers are collective.
  std::string sample() {
    std::string text = deck_.sample_prompt.empty() ? "\n" : deck_.sample_prompt;
    const RandomStream random{deck_.engine.seed, 0x5A3D1E};
    const auto context = static_cast<std::size_t>(deck_.shape.positions);
    for (std::int64_t i = 0; i < deck_.sample_bytes; ++i) {
      const std::size_t begin = text.size() > context ? text.size() - context : 0;
      const std::vector<std::uint8_t> prefix(text.begin() + static_cast<std::ptrdiff_t>(begin),
                                             text.end());
      const std::vector<double> logits = gpt_->next_logits(engine_, prefix);
      const double highest = *std::max_element(logits.begin(), logits.end());
      std::vector<double> cumulative;
      double total = 0;
      for (const double logit : logits) {
        total += std::exp((logit - highest) / deck_.sample_temperature);
        cumulative.push_back(total);
      }
      const double target = random.uniform(static_cast<std::uint64_t>(i)) * total;
      const auto chosen = std::upper_bound(cumulative.begin(), cumulative.end() - 1, target);
      text += static_cast<char>(chosen - cumulative.begin());
    }
    return text;
  }

  void finish(double bits, double seconds) {
    std::string text;
    if (deck_.sample_bytes > 0) text = sample();
    if (!session_.is_root()) return;
    const auto bigram = data::BigramModel::fit(corpus_.training_runs());
    const double bigram_bits = bigram.bits_per_byte(corpus_.validation_windows());
    const double tokens = static_cast<double>(deck_.steps) * static_cast<double>(batch_.global) *
                          deck_.shape.positions;
    const double rate = tokens / seconds;
    const double efficiency_flops = rate * deck_.shape.flops_per_position();
    std::cout << "result\n  " << deck_.steps << " steps in " << fixed(seconds, 1) << " s, "
              << report::rate_text(rate) << " tokens/s, " << report::rate_text(efficiency_flops)
              << " FLOP/s\n  validation: GPT " << fixed(bits, 3) << " bits/byte, bigram model "
              << fixed(bigram_bits, 3) << " bits/byte\n";
    if (!text.empty()) std::cout << "sample\n" << printable(text) << "\n";
    std::cout << std::flush;
    metrics_.write({{"event", "result"},
                    {"steps", deck_.steps},
                    {"seconds", seconds},
                    {"tokens_per_second", rate},
                    {"validation_bits_per_byte", bits},
                    {"bigram_bits_per_byte", bigram_bits}});
  }

  const Session& session_;
  const Deck& deck_;
  Batch batch_;
  const data::ByteCorpus& corpus_;
  Model model_;
  gpt::GptIds ids_;
  std::optional<report::Progress> progress_;
  Engine engine_;
  std::optional<gpt::Gpt> gpt_;
  report::MetricsWriter metrics_;
};

int train(const Session& session, const Arguments& arguments) {
  const auto tell = [](const std::exception& error) {
    // One line, whatever a name in it holds.
    std::string line = error.what();
    std::replace_if(
        line.begin(), line.end(), [](unsigned char c) { return c < ' ' || c == 0x7f; }, ' ');
    std::cerr << "mics train: " << line << std::endl;
  };
  // What fails up to here fails on all ranks alike, so one of them says so.
  std::optional<Inputs> inputs;
  std::optional<Trainer> trainer;
  try {
    inputs.emplace(read_inputs(session, arguments));
    trainer.emplace(session, *inputs);
  } catch (const std::exception& error) {
    if (session.is_root()) tell(error);
    return 1;
  }
  try {
    if (trainer->run()) return 0;
    if (session.is_root()) {
      std::cerr << "mics train: validation: expected a finite loss, found another; lower the "
                   "learning rate\n";
    }
    return 1;
  } catch (const std::exception& error) {
    // The rank where it happened speaks, then tells the others, who end in silence.
    const int failed = trainer->engine().failed_rank();
    if (failed < 0 || failed == session.rank()) tell(error);
    trainer->engine().fail(error.what());
    session.leave(1);
  }
}

}  // namespace

void add_train(CLI::App& app, const Session& session, Action& action) {
  const auto arguments = std::make_shared<Arguments>();
  CLI::App* command = app.add_subcommand("train", "Train the model that a deck describes");
  command->add_option("deck", arguments->deck, "JSON file with comments")->required();
  command->add_option("--deepspeed", arguments->deepspeed,
                      "DeepSpeed's JSON in place of the deck's engine section");
  command->add_option("overrides", arguments->overrides,
                      "key.inner=value: replaces a value of the deck");
  command->callback([&session, &action, arguments] {
    action = [&session, arguments] { return train(session, *arguments); };
  });
}

}  // namespace mics::apps
