// SPDX-License-Identifier: Apache-2.0
#include <mics/mics.hpp>

#include <data/bigram.hpp>
#include <data/token_corpus.hpp>
#include <gpt/device/peak.hpp>
#include <gpt/model.hpp>
#include <gpt/peak.hpp>
#include <nlohmann/json.hpp>
#include <program/last_words.hpp>
#include <program/one_line.hpp>
#include <program/whole_number.hpp>
#include <report/metrics.hpp>
#include <report/progress.hpp>
#include <train/deck.hpp>
#include <train/stop_signal.hpp>
#include <train/train.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <deque>
#include <fstream>
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

// Bytes as they print: control bytes and those that are no ASCII as a dot. Tokens as numbers.
std::string printable(std::span<const gpt::Token> tokens, data::TokenFormat format) {
  std::string result;
  for (const gpt::Token token : tokens) {
    if (format == data::TokenFormat::bytes) {
      const bool plain = (token >= ' ' && token <= '~') || token == '\n' || token == '\t';
      result += plain ? static_cast<char>(token) : '.';
    } else {
      result += (result.empty() ? "" : " ") + std::to_string(token);
    }
  }
  return result;
}

// In what a loss is told, and its key in the metrics: bits of a byte, nats of a token.
struct LossUnit {
  const char* text;
  const char* key;
  double per_nat;

  [[nodiscard]] double of_nats(double nats) const { return nats * per_nat; }
};

LossUnit loss_unit(data::TokenFormat format) {
  if (format == data::TokenFormat::bytes) {
    return {"bits/byte", "bits_per_byte", gpt::bits_of_nats(1)};
  }
  return {"nats/token", "nats_per_token", 1};
}

// What the command line says.
struct Arguments {
  std::string deck;
  std::string deepspeed;
  std::vector<std::string> overrides;
  bool resume = false;
  std::optional<std::int64_t> step = {};  // of the checkpoint; none: the newest
};

// Everything that a run reads, the same on every rank.
struct Inputs {
  Deck deck;
  Batch batch;
  std::unique_ptr<data::TokenCorpus> corpus;
};

data::TokenSequence read_tokens(const Deck& deck) {
  const data::SequenceOptions options{.format = deck.format, .vocabulary = deck.shape.vocabulary};
  if (deck.synthetic_tokens == 0) return {deck.files, options};
  std::vector<data::Token> tokens(static_cast<std::size_t>(deck.synthetic_tokens));
  const RandomStream random{deck.data_seed, 0x70CE25};
  std::uint64_t index = 0;
  for (data::Token& token : tokens) {
    token = static_cast<data::Token>(random.uniform(index++) * deck.shape.vocabulary);
  }
  return {std::move(tokens), options};
}

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
    data::TokenSequence tokens = read_tokens(inputs.deck);
    // The ranks look at all tokens together before any of them is used.
    const std::int64_t count = tokens.count();
    const std::int64_t ranks = session.size();
    const auto share = [&](std::int64_t rank) {
      return rank * (count / ranks) + rank * (count % ranks) / ranks;
    };
    const std::int64_t begin = share(session.rank());
    tokens.check({begin, share(session.rank() + 1) - begin});
    inputs.corpus = std::make_unique<data::TokenCorpus>(
        std::move(tokens),
        data::CorpusOptions{.positions = inputs.deck.shape.positions,
                            .validation_fraction = inputs.deck.validation_fraction,
                            .validation_window_limit = inputs.deck.validation_windows,
                            .seed = inputs.deck.data_seed});
  });
  std::uint64_t hash = 0;
  comm::agree(world, [&] { hash = inputs.corpus->tokens().fingerprint(); });
  const data::TokenSequence& tokens = inputs.corpus->tokens();
  comm::require_same(
      world,
      std::to_string(tokens.count()) + " " + tokens.unit() + ", hash " + std::to_string(hash),
      "text of the input files");
  return inputs;
}

// One training run on one engine.
class Trainer {
 public:
  Trainer(const Session& session, const Inputs& inputs, const Arguments& arguments)
      : session_(session),
        deck_(inputs.deck),
        batch_(inputs.batch),
        corpus_(*inputs.corpus),
        unit_(loss_unit(deck_.format)),
        ids_(gpt::declare(model_, deck_.shape)),
        engine_(session.world(), model_, deck_.engine, {},
                [this](LogLevel level, std::string_view text) { hear(level, text); }),
        metrics_(session.is_root() ? deck_.metrics : std::string(),
                 arguments.resume ? report::MetricsMode::append : report::MetricsMode::replace,
                 [this](const std::string& line) { say("note: " + line); }) {
    // One rank may be short of memory; then all of them end here.
    comm::agree(comm::Communicator::duplicate(session.world()), [&] {
      gpt_.emplace(deck_.shape, ids_, deck_.engine.compute,
                   static_cast<int>(std::max<std::int64_t>(1, batch_.largest(session.size()))),
                   deck_.recompute, engine_.plan().request().memory);
    });
    comm::agree(comm::Communicator::duplicate(session.world()), [&] {
      peak_flops_ = deck_.peak_flops;
      if (peak_flops_ == 0) {
        if (on_device()) {
          peak_flops_ = gpt::device::measured_peak();
        } else {
          peak_flops_ = deck_.engine.compute == DType::fp64 ? gpt::measured_peak<double>()
                                                            : gpt::measured_peak<float>();
        }
      }
    });
    engine_.sum({&peak_flops_, 1});
    // A schedule of the configuration takes the place of the deck's own.
    if (deck_.engine.schedule.kind == ScheduleKind::constant) {
      engine_.set_learning_rates(learning_rates(deck_));
    }
    engine_.declare_order(gpt::training_order(ids_));
    if (!deck_.checkpoint_directory.empty()) claim_directory();
    if (arguments.resume) load(arguments.step);
    // Newer steps than the newest that could be taken are damaged, which was told.
    const bool took_newest = arguments.resume && !arguments.step;
    if (!deck_.checkpoint_directory.empty() && !took_newest) warn_of_newer_steps();
  }

  [[nodiscard]] Engine& engine() { return engine_; }

  /// Returns false if the run ended with a loss that is no number; the same on every rank.
  /// \param stop  null where nothing is saved
  [[nodiscard]] bool run(const StopSignal* stop) {
    print_start();
    if (stop != nullptr && first_step_ < deck_.steps && on_any_rank(stop->came())) {
      say_once("stopped by a signal before step " + std::to_string(first_step_ + 1) +
               "; go on with --resume");
      return true;
    }
    const auto start = Clock::now();
    if (session_.is_root()) {
      progress_.emplace(std::cout,
                        report::ProgressOptions{
                            .style = report::is_terminal(stdout) ? report::ProgressStyle::bar
                                                                 : report::ProgressStyle::lines,
                            .first_step = first_step_,
                            .last_step = deck_.steps,
                            .every = deck_.print_every,
                            .loss_unit = unit_.text,
                            .peak_rate = peak_flops_ / deck_.shape.flops_per_position()});
    }
    for (std::int64_t step = first_step_; step < deck_.steps; ++step) {
      train_step(step);
      const bool last = step + 1 == deck_.steps;
      if (stop != nullptr) {
        follow_save(engine_.poll_save());
        const bool asked_to_stop = on_any_rank(stop->came());
        const bool save_due =
            deck_.checkpoint_every > 0 && (step + 1) % deck_.checkpoint_every == 0;
        if (asked_to_stop || last || save_due) report_steps();
        bool saved = false;
        if (asked_to_stop || last) {
          saved = save(step + 1, false);
        } else if (save_due) {
          static_cast<void>(save(step + 1, deck_.checkpoint_asynchronous));
        }
        if (asked_to_stop && !last) {
          say_once("stopped by a signal after step " + std::to_string(step + 1) +
                   (saved ? "; go on with --resume"
                          : ", which is not saved; --resume goes on from an older one"));
          return true;
        }
      }
      const bool due = deck_.validate_every > 0 && (step + 1) % deck_.validate_every == 0;
      if (due && !last) {
        report_steps();
        report_validation(step + 1, validate());
      }
    }
    report_steps();
    const double training_seconds = seconds_since(start);
    const double nats = validate();
    report_validation(deck_.steps, nats);
    progress_.reset();
    finish(nats, training_seconds);
    return std::isfinite(nats);
  }

 private:
  // True if the model's passes run on a device that is not the host.
  [[nodiscard]] bool on_device() const {
    return mics::device::separate && engine_.plan().request().memory == Memory::device;
  }

  // A directory in which another job saves, or where nothing can be saved, is known at the start.
  void claim_directory() {
    try {
      engine_.claim_directory(deck_.checkpoint_directory);
    } catch (const IoError& error) {
      if (deck_.stop_on_checkpoint_error) throw;
      say_once("warning: no checkpoint can be saved now: " + std::string(error.what()));
    }
  }

  // Goes on where a checkpoint ends, with the same order of the data.
  void load(std::optional<std::int64_t> step) {
    if (deck_.checkpoint_directory.empty()) {
      raise<ConfigError>(
          {.object = "--resume", .expected = "checkpoint.directory in the deck", .found = "none"});
    }
    const auto loaded = engine_.load(deck_.checkpoint_directory, {.step = step});
    if (!loaded) {
      say_once("note: no checkpoint in " + deck_.checkpoint_directory + " yet: a new run");
      return;
    }
    const std::optional<std::int64_t> position = number_of(loaded->blobs, position_blob);
    if (!position) {
      raise<FormatError>({.object = deck_.checkpoint_directory,
                          .expected = "a checkpoint of mics train",
                          .found = "one without the position in the data"});
    }
    const std::optional<std::int64_t> batch = number_of(loaded->blobs, batch_blob);
    if (batch && *batch != batch_.global) {
      raise<ConfigError>({.object = deck_.engine.source + "train_batch_size",
                          .expected = std::to_string(*batch) + " samples of all ranks, as before",
                          .found = std::to_string(batch_.global) + " on " +
                                   std::to_string(session_.size()) + " ranks",
                          .remedy = "give train_batch_size " + std::to_string(*batch) +
                                    " and no size a rank: other samples would come in each step"});
    }
    if (*position > deck_.steps) {
      raise<ConfigError>({.object = deck_.path + ": training.steps",
                          .expected = "at least the " + std::to_string(*position) +
                                      " that the checkpoint has behind it",
                          .found = std::to_string(deck_.steps),
                          .remedy = "raise it, or name an older checkpoint with --step"});
    }
    first_step_ = *position;
    loaded_step_ = loaded->step;
    say_once("resumed after step " + std::to_string(first_step_) + " from " +
             deck_.checkpoint_directory);
  }

  // Steps that this run will not have made are the newest ones for the next --resume.
  void warn_of_newer_steps() {
    if (!session_.is_root()) return;
    std::vector<std::int64_t> steps;
    try {
      steps = checkpoint::list_steps(deck_.checkpoint_directory);
    } catch (const IoError&) {  // told of when the directory was claimed
    }
    if (steps.empty() || steps.front() <= loaded_step_) return;
    say("warning: " + deck_.checkpoint_directory + " holds step " + std::to_string(steps.front()) +
        " of another run, where --resume would go on until this run is beyond it; use another "
        "directory, or remove what is newer than step " +
        std::to_string(loaded_step_));
  }

  // True if nothing failed so far.
  bool save(std::int64_t steps_done, bool asynchronous) {
    wait_for_save();
    saving_step_ = steps_done;
    try {
      engine_.save(deck_.checkpoint_directory, {.retention = deck_.retention,
                                                .asynchronous = asynchronous,
                                                .blobs = {{position_blob, bytes_of(steps_done)},
                                                          {batch_blob, bytes_of(batch_.global)}}});
      return true;
    } catch (const IoError& error) {
      if (deck_.stop_on_checkpoint_error) throw;
      say_once("warning: step " + std::to_string(steps_done) + " is not saved: " + error.what());
      return false;
    }
  }

  // The save before is still under way if disks are slow: it is not given up. If it fails, the next
  // may succeed.
  void wait_for_save() {
    try {
      engine_.wait_for_save();
    } catch (const IoError& error) {
      if (deck_.stop_on_checkpoint_error) throw;
      say_once("warning: step " + std::to_string(saving_step_) + " is not saved: " + error.what());
    }
  }

  static std::vector<std::byte> bytes_of(std::int64_t number) {
    std::vector<std::byte> bytes(sizeof(number));
    std::memcpy(bytes.data(), &number, sizeof(number));
    return bytes;
  }
  static std::optional<std::int64_t> number_of(const Blobs& blobs, const char* name) {
    const auto blob = blobs.find(name);
    std::int64_t number = 0;
    if (blob == blobs.end() || blob->second.size() != sizeof(number)) return {};
    std::memcpy(&number, blob->second.data(), sizeof(number));
    return number;
  }

  void follow_save(const checkpoint::SaveProgress& progress) {
    if (progress.phase != checkpoint::SavePhase::failed) return;
    if (deck_.stop_on_checkpoint_error) throw IoError(progress.error);
    say_once("warning: step " + std::to_string(saving_step_) + " is not saved: " + progress.error);
  }

  [[nodiscard]] bool on_any_rank(bool here) {
    double count = here ? 1 : 0;
    engine_.sum({&count, 1});
    return count > 0;
  }

  void say_once(const std::string& line) {
    if (session_.is_root()) say(line);
  }

  // What the library has to say.
  void hear(LogLevel level, std::string_view text) {
    if (level == LogLevel::stuck) {
      // Another thread calls: the one that MPI holds cannot end the process.
      std::cerr << "mics train: " << text << std::endl;
      session_.leave(1);
    }
    if (level == LogLevel::trace) {
      if (deck_.metrics.empty()) return;
      std::ofstream(deck_.metrics + ".rank" + std::to_string(session_.rank()) + ".operations")
          << text;
      return;
    }
    say_once((level == LogLevel::warning ? "warning: " : "note: ") + std::string(text));
  }

  void say(const std::string& text) {
    const std::string line = one_line(text);
    if (progress_) {
      progress_->message(line);
    } else {
      std::cout << line << std::endl;
    }
  }

  void print_start() {
    if (!session_.is_root()) return;
    const data::TokenSequence& tokens = corpus_.tokens();
    const gpt::GptShape& shape = deck_.shape;
    const bool is_text = deck_.format == data::TokenFormat::bytes;
    std::cout << "model\n  GPT over " << tokens.unit();
    if (!is_text) std::cout << " of a vocabulary of " << shape.vocabulary;
    std::cout << ": " << shape.layers << " layers, " << shape.heads << " heads, width "
              << shape.width << ", " << shape.positions << " positions, " << shape.parameter_count()
              << " parameters\n"
              << "text\n  " << tokens.files().size() << " files, " << tokens.count() << " "
              << tokens.unit() << ": " << corpus_.training_tokens() << " for training, "
              << corpus_.validation_window_count() << " validation windows of " << shape.positions
              << " positions\n"
              << engine_.plan().text(gpt::training_leases(ids_)) << "batch\n  " << batch_.global
              << " samples a step in " << batch_.micro_steps << " micro-step"
              << (batch_.micro_steps == 1 ? "" : "s") << ", at most "
              << batch_.largest(session_.size()) << " a rank at once; activations "
              << gpt_->bytes() / 1024 << " KiB a rank"
              << (deck_.recompute == gpt::Recompute::yes ? ", blocks recomputed" : "") << "\n"
              << "peak\n  " << report::rate_text(peak_flops_ / session_.size())
              << " FLOP/s a rank, ";
    if (deck_.peak_flops > 0) {
      std::cout << "given by training.peak_flops\n";
    } else {
      const int n = on_device() ? gpt::device::peak_extent : gpt::peak_extent;
      std::cout << "measured: products of " << n << " x " << n << " matrices of "
                << (on_device()                           ? "bf16"
                    : deck_.engine.compute == DType::fp64 ? "fp64"
                                                          : "fp32")
                << "\n";
    }
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

  // The tokens of `count` intervals, each the length of a window; valid until the next call.
  template <class IntervalOf>
  std::vector<Window> read_windows(std::int64_t count, const IntervalOf& interval_of) {
    const auto length = static_cast<std::size_t>(corpus_.window_tokens());
    window_tokens_.resize(static_cast<std::size_t>(count) * length);
    std::vector<Window> windows;
    for (std::int64_t i = 0; i < count; ++i) {
      const auto window =
          std::span(window_tokens_).subspan(static_cast<std::size_t>(i) * length, length);
      corpus_.tokens().read(interval_of(i).offset, window);
      windows.push_back(window);
    }
    return windows;
  }

  // A rate of tokens as floating-point operations over the peak of all ranks.
  [[nodiscard]] double utilization(double tokens_per_second) const {
    return tokens_per_second * deck_.shape.flops_per_position() / peak_flops_;
  }

  void train_step(std::int64_t step) {
    const auto start = Clock::now();
    for (std::int64_t m = 0; m < batch_.micro_steps; ++m) {
      const Batch::Range range = batch_.samples(m, session_.rank(), session_.size());
      const std::vector<Window> windows = read_windows(range.count(), [&](std::int64_t i) {
        return corpus_.sample(static_cast<std::uint64_t>(step * batch_.global + range.begin + i));
      });
      gpt_->micro_step(engine_, windows, m + 1 == batch_.micro_steps);
    }
    pending_.push_back({step + 1, start, engine_.step()});
    while (!pending_.empty() && (pending_.front().handle.ready() || pending_.size() > most_pending))
      report_step();
  }

  // Tells of the oldest step that was not told of. Blocks until it is done.
  void report_step() {
    const PendingStep pending = std::move(pending_.front());
    pending_.pop_front();
    const StepResult& result = pending.handle.get();
    if (!session_.is_root()) return;
    const std::int64_t tokens = result.samples * deck_.shape.positions;
    const double loss = unit_.of_nats(result.loss);
    progress_->update(pending.step, loss, tokens);
    if (result.skipped)
      say("note: step " + std::to_string(pending.step) + " skipped: gradient norm " +
          fixed(result.gradient_norm, 3));
    // A step on a device ends while the host is steps ahead: it took the time since the one before.
    const auto now = Clock::now();
    const double seconds =
        std::chrono::duration<double>(now - std::max(pending.start, last_report_)).count();
    last_report_ = now;
    const double rate = static_cast<double>(tokens) / seconds;
    metrics_.write({{"event", "step"},
                    {"step", pending.step},
                    {std::string("loss_") + unit_.key, loss},
                    {"gradient_norm", result.gradient_norm},
                    {"learning_rate", result.learning_rate},
                    {"skipped", result.skipped},
                    {"samples", result.samples},
                    {"tokens_per_second", rate},
                    {"utilization", utilization(rate)},
                    {"seconds", seconds}});
  }

  // Blocks until all steps are done and told of.
  void report_steps() {
    while (!pending_.empty()) report_step();
  }

  // Mean nats a token over all validation windows, shared out among the ranks.
  double validate() {
    const std::int64_t all = corpus_.validation_window_count();
    const std::int64_t ranks = session_.size();
    const std::int64_t capacity = std::max<std::int64_t>(1, batch_.largest(session_.size()));
    const std::int64_t most = (all + ranks - 1) / ranks;
    // Every rank makes the same number of calls, the last ones perhaps with fewer windows.
    double nats = 0;
    for (std::int64_t begin = 0; begin < most; begin += capacity) {
      const std::int64_t end = std::min(most, begin + capacity);
      const bool lacks_last = (end - 1) * ranks + session_.rank() >= all;
      nats += gpt_->evaluate(
          engine_, read_windows(end - begin - (lacks_last ? 1 : 0), [&](std::int64_t i) {
            return corpus_.validation_window((begin + i) * ranks + session_.rank());
          }));
    }
    engine_.sum({&nats, 1});
    return nats / static_cast<double>(all);
  }

  // "2.871 bits/byte", "6.012 nats/token (8.673 bits)".
  [[nodiscard]] std::string loss_text(double nats) const {
    std::string text = fixed(unit_.of_nats(nats), 3) + " " + unit_.text;
    if (unit_.per_nat == 1) text += " (" + fixed(gpt::bits_of_nats(nats), 3) + " bits)";
    return text;
  }

  void report_validation(std::int64_t step, double nats) {
    if (!session_.is_root()) return;
    say("validation after step " + std::to_string(step) + ": " + loss_text(nats));
    metrics_.write({{"event", "validation"}, {"step", step}, {unit_.key, unit_.of_nats(nats)}});
  }

  // Text in the model's words: every rank computes the same tokens, since gathers are collective.
  std::vector<gpt::Token> sample() {
    std::vector<gpt::Token> text = deck_.sample_prompt;
    const RandomStream random{deck_.engine.seed, 0x5A3D1E};
    const auto context = static_cast<std::size_t>(deck_.shape.positions);
    for (std::int64_t i = 0; i < deck_.sample_length; ++i) {
      const auto prefix = std::span(text).last(std::min(text.size(), context));
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
      text.push_back(static_cast<gpt::Token>(chosen - cumulative.begin()));
    }
    return text;
  }

  void finish(double nats, double seconds) {
    std::vector<gpt::Token> text;
    if (deck_.sample_length > 0) text = sample();
    if (!session_.is_root()) return;
    const data::TokenSequence& sequence = corpus_.tokens();
    const std::int64_t most = data::BigramModel::most_tokens(sequence.vocabulary());
    const auto bigram = data::BigramModel::fit(sequence, corpus_.training_runs(most));
    const double bigram_nats = bigram.nats_per_token(sequence, corpus_.validation_windows());
    const double tokens = static_cast<double>(deck_.steps - first_step_) *
                          static_cast<double>(batch_.global) * deck_.shape.positions;
    const double rate = tokens / seconds;
    const double flops = rate * deck_.shape.flops_per_position();
    std::cout << "result\n  " << deck_.steps << " steps in " << fixed(seconds, 1) << " s, "
              << report::rate_text(rate) << " tokens/s, " << report::rate_text(flops) << " FLOP/s, "
              << fixed(100 * utilization(rate), 1) << "% of peak; by 6 x parameters x tokens "
              << report::rate_text(6 * rate * static_cast<double>(deck_.shape.parameter_count()) /
                                   session_.size())
              << " FLOP/s a rank\n  validation: GPT " << loss_text(nats) << ", bigram model ";
    if (bigram.total() < corpus_.training_tokens()) {
      std::cout << "of " << bigram.total() << " " << sequence.unit() << " ";
    }
    std::cout << loss_text(bigram_nats) << "\n";
    nlohmann::json of_device = nlohmann::json::object();
    if (on_device()) {
      // Nothing is allocated or freed between the first step and here, so that it is the peak, too.
      const mics::device::Capacity memory = mics::device::capacity();
      const std::int64_t used = memory.total - memory.free;
      constexpr double gib = std::int64_t{1} << 30;
      std::cout << "  memory of rank 0's device in use, by all processes: "
                << fixed(static_cast<double>(used) / gib, 2) << " GiB of "
                << fixed(static_cast<double>(memory.total) / gib, 2) << "\n";
      of_device["device_bytes_in_use"] = used;
    }
    if (!text.empty()) std::cout << "sample\n" << printable(text, deck_.format) << "\n";
    std::cout << std::flush;
    nlohmann::json record{{"event", "result"},
                          {"steps", deck_.steps},
                          {"seconds", seconds},
                          {"tokens_per_second", rate},
                          {"flops_per_second", flops},
                          {"peak_flops_per_second", peak_flops_},
                          {"utilization", utilization(rate)},
                          {std::string("validation_") + unit_.key, unit_.of_nats(nats)},
                          {std::string("bigram_") + unit_.key, unit_.of_nats(bigram_nats)}};
    record.update(of_device);
    metrics_.write(record);
  }

  // Steps whose results the host has not waited for; the engine itself waits for older ones.
  struct PendingStep {
    std::int64_t step;  // 1, 2, ...
    Clock::time_point start;
    StepHandle handle;
  };
  static constexpr std::size_t most_pending = 1;
  std::deque<PendingStep> pending_;
  Clock::time_point last_report_ = Clock::now();

  // Steps of the deck that are done, which the data's order follows; skipped ones count.
  static constexpr const char* position_blob = "mics_train_position";
  // Samples of a step, which the order follows too.
  static constexpr const char* batch_blob = "mics_train_batch";
  std::int64_t first_step_ = 0;
  // The checkpoint's own number, which skipped steps do not raise.
  std::int64_t loaded_step_ = 0;
  // Steps of the deck behind the save that began last.
  std::int64_t saving_step_ = 0;

  const Session& session_;
  const Deck& deck_;
  Batch batch_;
  const data::TokenCorpus& corpus_;
  LossUnit unit_;
  std::vector<gpt::Token> window_tokens_;
  Model model_;
  gpt::GptIds ids_;
  std::optional<report::Progress> progress_;
  Engine engine_;
  std::optional<gpt::Gpt> gpt_;
  double peak_flops_ = 0;  // of all ranks
  report::MetricsWriter metrics_;
};

int train(const Session& session, const Arguments& arguments) {
  const auto tell = [](const std::exception& error) {
    std::cerr << "mics train: " << one_line(error.what()) << std::endl;
  };
  // What fails up to here fails on all ranks alike, so one of them says so.
  std::optional<Inputs> inputs;
  std::optional<Trainer> trainer;
  std::optional<LastWords> last_words;
  // Without checkpoints a signal ends the process, as it does any.
  std::optional<StopSignal> stop;
  try {
    last_words.emplace(session.world());
    inputs.emplace(read_inputs(session, arguments));
    if (!inputs->deck.checkpoint_directory.empty()) stop.emplace();
    trainer.emplace(session, *inputs, arguments);
  } catch (const std::exception& error) {
    if (session.is_root()) tell(error);
    return 1;
  }
  try {
    if (trainer->run(stop ? &*stop : nullptr)) return 0;
    if (session.is_root()) {
      std::cerr << "mics train: validation: expected a finite loss, found another; lower the "
                   "learning rate\n";
    }
    return 1;
  } catch (const std::exception& error) {
    // The rank where it happened tells the others, who end in silence, and speaks; of ranks that
    // all met the same one, the lowest.
    const int failed = trainer->engine().failed_rank();
    trainer->engine().fail(error.what());
    if (failed >= 0 && failed != session.rank()) {
      last_words->heard();
    } else if (last_words->should_print(error.what())) {
      tell(error);
    }
    last_words->wait_for_others();
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
  CLI::Option* const resume = command->add_flag(
      "--resume", arguments->resume,
      "Go on from the newest checkpoint in checkpoint.directory, if there is one");
  command
      ->add_option("--step", arguments->step, "With --resume: go on from this step, not the newest")
      ->check(whole_number(0))
      ->needs(resume);
  command->add_option("overrides", arguments->overrides,
                      "key.inner=value: replaces a value of the deck");
  command->callback([&session, &action, arguments] {
    action.run = [&session, arguments] { return train(session, *arguments); };
  });
}

}  // namespace mics::apps
