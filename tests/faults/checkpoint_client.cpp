// SPDX-License-Identifier: Apache-2.0
// A small client of mics that saves and loads checkpoints while one of its ranks meets a fault in
// one of its system calls, or while somebody kills it. The files checkpoint_*_test.py start it.
//
//   checkpoint_client sweep FOLDER SHARD_SIZE TIMEOUT TRIAL...   TRIAL = work:fault:rank:index
//   checkpoint_client check RUN...
//   checkpoint_client train RUN SHARD_SIZE TIMEOUT STEPS
//
// sweep: each trial has a folder FOLDER/run<number> with committed steps in it. Rank `rank` meets
// `fault` at its `index`-th system call on files of the run while all ranks do `work`. Each rank
// then writes to FOLDER/<number>.<rank> what became of it, one line:
//
//   <seconds> ok|IoError|CommError|...|wrong <text>
//
// After a fault that the processes survive they go on: what is committed must load, with the right
// values, and the work must succeed when it is done again. The text of `ok` is the number of calls,
// by name where the fault is `none`. Faults that end a process must come last.
//
// check: one rank loads the newest step of each run, whatever was left there, and saves the next.
//
// train: trains to step STEPS from the newest step on, saves every step, and prints digests.
//
// All sums over ranks are exact and all values known beforehand, whatever the number of ranks and
// the shard size, which may change from run to run.
#include "fault_calls.h"
#include <mics/checkpoint/verify.hpp>
#include <mics/comm/watchdog.hpp>
#include <mics/mics.hpp>

#include <Kokkos_Core.hpp>
#include <mpi.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

double now() { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); }

int job(int (*query)(MPI_Comm, int*)) {
  int value = 0;
  query(MPI_COMM_WORLD, &value);
  return value;
}

void write(const std::string& file, const std::string& text) {
  // Renamed when it is complete: others wait for the name.
  std::ofstream(file + ".part") << text << '\n';
  fs::rename(file + ".part", file);
}

/// What must not happen, whatever the fault.
struct Wrong : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// -- the model and its values

constexpr std::array<std::int64_t, 3> rows{600, 350, 40};
constexpr std::int64_t columns = 5;
constexpr int samples_a_step = 64;  // a power of two: means are exact

double initial(std::size_t unit, std::int64_t i) {
  return static_cast<double>((i + 7 * static_cast<std::int64_t>(unit)) % 64);
}
double gradient(std::int64_t position, std::int64_t i) {
  return static_cast<double>((i + position) % 4 + 1);
}

struct Values {
  std::vector<double> weights;
  std::vector<double> momentum;
};

// After `steps` steps of SGD with rate 1 and momentum 1/2: every product is exact, and a sum of two
// is rounded alike everywhere.
Values values_after(std::size_t unit, std::int64_t steps) {
  const auto count = static_cast<std::size_t>(rows[unit] * columns);
  Values values{std::vector<double>(count), std::vector<double>(count)};
  for (std::size_t i = 0; i < count; ++i) {
    const auto element = static_cast<std::int64_t>(i);
    auto weight = static_cast<float>(initial(unit, element));
    float momentum = 0;
    for (std::int64_t s = 0; s < steps; ++s) {
      momentum = momentum / 2 + static_cast<float>(gradient(s, element));
      weight -= momentum;
    }
    values.weights[i] = weight;
    values.momentum[i] = momentum;
  }
  return values;
}

/// An engine, and the position in its data, which the application keeps itself.
class Client {
 public:
  Client(int shard_size, double timeout) {
    for (std::size_t u = 0; u < rows.size(); ++u) {
      units_.push_back(model_.unit(std::string(1, static_cast<char>('a' + u))));
      const auto init = mics::Init::function([u](std::int64_t i) { return initial(u, i); });
      weights_.push_back(model_.parameter(units_[u], "weight", {rows[u], columns}, {.init = init}));
    }
    mics::Config config;
    config.preset = mics::Preset::mics;
    config.shard_size = shard_size;
    config.optimizer = {.kind = mics::OptimizerKind::sgd, .learning_rate = 1, .momentum = 0.5};
    config.timeout = timeout;
    engine_ = std::make_unique<mics::Engine>(MPI_COMM_WORLD, model_, config, mics::Execution{},
                                             [](mics::LogLevel, std::string_view) {});
  }

  void step() {
    const int size = engine_->size();
    const int rank = engine_->rank();
    const int samples = samples_a_step * (rank + 1) / size - samples_a_step * rank / size;
    engine_->begin_micro_step({.samples = samples});
    for (std::size_t u = 0; u < units_.size(); ++u) {
      auto scope = engine_->gradient(units_[u]);
      const auto view = scope.view<float**>(weights_[u]);
      for (std::int64_t i = 0; i < rows[u] * columns; ++i) {
        view(static_cast<std::size_t>(i / columns), static_cast<std::size_t>(i % columns)) +=
            static_cast<float>(samples * gradient(position_, i));
      }
      scope.reduce();
    }
    static_cast<void>(engine_->step());
    ++position_;
  }

  void save(const std::string& run, bool asynchronous = false, std::int64_t keep = 1) {
    std::vector<std::byte> bytes(sizeof(position_));
    std::memcpy(bytes.data(), &position_, sizeof(position_));
    engine_->save(run, {.retention = {.keep = keep},
                        .asynchronous = asynchronous,
                        .blobs = {{"position", std::move(bytes)}}});
  }

  /// The step that was loaded, with all values checked; -1 if there is none.
  std::int64_t load(const std::string& run) {
    const auto loaded = engine_->load(run);
    if (!loaded) return -1;
    std::memcpy(&position_, loaded->blobs.at("position").data(), sizeof(position_));
    if (position_ != loaded->step) throw Wrong("another step's position in the data");
    digest_ = loaded->digest;
    check();
    return loaded->step;
  }

  /// \throws Wrong unless every value is that of the step
  void check() {
    for (std::size_t u = 0; u < units_.size(); ++u) {
      const Values expected = values_after(u, position_);
      std::vector<double> found(expected.weights.size());
      engine_->read(weights_[u], found);
      if (found != expected.weights) throw Wrong("wrong weights");
      engine_->read(weights_[u], found, "momentum_buffer");
      if (found != expected.momentum) throw Wrong("wrong momentum");
    }
  }

  [[nodiscard]] mics::Engine& engine() { return *engine_; }
  [[nodiscard]] std::int64_t position() const { return position_; }
  [[nodiscard]] std::uint32_t digest() const { return digest_; }

 private:
  mics::Model model_;
  std::vector<mics::UnitId> units_;
  std::vector<mics::ParameterId> weights_;
  std::unique_ptr<mics::Engine> engine_;
  std::int64_t position_ = 0;  // steps taken, as the application counts them
  std::uint32_t digest_ = 0;
};

// -- trials

constexpr std::array<std::pair<std::string_view, mics_fault>, 10> fault_names{
    {{"none", mics_fault_none},
     {"kill_before", mics_fault_kill_before},
     {"kill_after", mics_fault_kill_after},
     {"stop", mics_fault_stop},
     {"eio", mics_fault_eio},
     {"enospc", mics_fault_enospc},
     {"edquot", mics_fault_edquot},
     {"short", mics_fault_short},
     {"eintr", mics_fault_eintr},
     {"full", mics_fault_full}}};

struct Trial {
  std::string work;
  mics_fault fault = mics_fault_none;
  int rank = 0;
  long index = 0;
  std::string file;  // of reports, without the rank
  std::string run;

  [[nodiscard]] bool ends_process() const {
    return fault == mics_fault_kill_before || fault == mics_fault_kill_after ||
           fault == mics_fault_stop;
  }
};

Trial parse(const std::string& text, const std::string& folder, std::size_t number) {
  Trial trial;
  std::array<char, 32> work{};
  std::array<char, 32> fault{};
  if (std::sscanf(text.c_str(), "%31[^:]:%31[^:]:%d:%ld", work.data(), fault.data(), &trial.rank,
                  &trial.index) != 4) {
    throw std::runtime_error("no trial: " + text);
  }
  const auto name = std::find_if(fault_names.begin(), fault_names.end(),
                                 [&](const auto& pair) { return pair.first == fault.data(); });
  if (name == fault_names.end()) throw std::runtime_error("no fault: " + text);
  trial.work = work.data();
  trial.fault = name->second;
  trial.file = folder + '/' + std::to_string(number) + '.';
  trial.run = folder + "/run" + std::to_string(number);
  return trial;
}

std::string fault_file;
void about_to_end() { write(fault_file, std::to_string(now())); }

/// The system calls of this rank during its life are watched.
class Watch {
 public:
  explicit Watch(const Trial& trial) {
    fault_file = trial.file + "fault";
    const bool mine = job(MPI_Comm_rank) == trial.rank;
    mics_fault_arm(trial.run.c_str(), mine ? trial.fault : mics_fault_none, trial.index,
                   about_to_end);
  }
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;
  ~Watch() { mics_fault_disarm(); }

  /// `12`, and where nothing is to fail what they were: `12 open pwrite ...`.
  static std::string calls(const Trial& trial) {
    const long count = mics_fault_disarm();
    std::string text = std::to_string(count);
    if (trial.fault != mics_fault_none) return text;
    for (long i = 0; i < count; ++i) text += std::string(" ") + mics_fault_call(i);
    return text;
  }
};

/// Committed steps and leftovers that a trial finds.
struct Scene {
  std::int64_t before;  // newest step
  std::int64_t after;   // newest once the work is done
};

Scene prepare(const Trial& trial, Client& client) {
  client.step();
  client.save(trial.run);
  client.step();
  if (trial.work == "replace" || trial.work == "load") client.save(trial.run, false, 0);
  if (trial.work == "clear" && job(MPI_Comm_rank) == 0) {
    for (const char* name : {"/.tmp-step-000000007-0123456789abcdef", "/.trash-step-000000005"}) {
      fs::create_directory(trial.run + name);
      std::ofstream(trial.run + name + "/s0000_r00-01234567.h5")
          << "bytes of a save that was killed";
      std::ofstream(trial.run + name + "/COMMIT") << "mics-checkpoint 1\n";
    }
  }
  MPI_Barrier(MPI_COMM_WORLD);
  return {trial.work == "replace" || trial.work == "load" ? 2 : 1, 2};
}

// The work itself; `client` has taken two steps, `other` none.
void work(const Trial& trial, Client& client, Client& other) {
  if (trial.work == "load") {
    const std::int64_t step = other.load(trial.run);
    if (step != 1 && step != 2) throw Wrong("loaded step " + std::to_string(step));
    return;
  }
  if (trial.work != "async") {
    client.save(trial.run);
    return;
  }
  client.save(trial.run, true);
  client.step();  // the memory changes
  while (true) {
    const auto progress = client.engine().poll_save();
    if (progress.phase == mics::checkpoint::SavePhase::committed) return;
    if (progress.phase == mics::checkpoint::SavePhase::failed) throw mics::IoError(progress.error);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

// After the work: the newest step has the right values, every committed byte is sound, and the next
// save works and clears up.
void require_sound(const Trial& trial, const Scene& scene, bool succeeded, int shard_size,
                   double timeout) {
  Client fresh(shard_size, timeout);
  const std::int64_t step = fresh.load(trial.run);
  if (step != scene.after && (succeeded || step != scene.before)) {
    throw Wrong("after the fault step " + std::to_string(step) + " is the newest");
  }
  fresh.step();
  fresh.save(trial.run, false, 0);
  Client reader(shard_size, timeout);
  if (reader.load(trial.run) != step + 1) throw Wrong("the next save is not the newest step");
  if (fresh.engine().rank() != 0) return;
  for (const auto& entry : fs::directory_iterator(trial.run)) {
    const std::string name = entry.path().filename().string();
    if (name == ".lock") continue;
    if (!name.starts_with("step-")) throw Wrong("a leftover: " + name);
    const auto damage =
        mics::checkpoint::verify(mics::checkpoint::SystemCalls::native(), entry.path());
    if (!damage.empty()) throw Wrong(damage.front());
  }
}

std::string described(const std::exception& error) {
  const std::string text = error.what();
  if (dynamic_cast<const Wrong*>(&error) != nullptr) return "wrong " + text;
  if (dynamic_cast<const mics::CommError*>(&error) != nullptr) return "CommError " + text;
  if (dynamic_cast<const mics::IoError*>(&error) != nullptr) return "IoError " + text;
  if (dynamic_cast<const mics::FormatError*>(&error) != nullptr) return "FormatError " + text;
  if (dynamic_cast<const mics::StateError*>(&error) != nullptr) return "StateError " + text;
  if (dynamic_cast<const mics::Error*>(&error) != nullptr) return "Error " + text;
  return "exception " + text;
}

// Alike on all ranks, or `wrong`.
std::string run_trial(const Trial& trial, int shard_size, double timeout) {
  std::string result;
  try {
    Scene scene{};
    {
      auto client = std::make_unique<Client>(shard_size, timeout);
      Client other(shard_size, timeout);
      scene = prepare(trial, *client);
      if (trial.work == "clear") {
        // Another job's first save.
        client = std::make_unique<Client>(shard_size, timeout);
        if (client->load(trial.run) != 1) throw Wrong("no step 1 to begin with");
        client->step();
      }
      const Watch watch(trial);
      try {
        work(trial, *client, other);
        result = "ok " + Watch::calls(trial);
      } catch (const mics::CommError&) {
        throw;
      } catch (const mics::Error& error) {
        result = described(error);
      }
    }
    try {
      require_sound(trial, scene, result.starts_with("ok"), shard_size, timeout);
    } catch (const std::exception& error) {
      result = std::string("wrong ") + error.what() + "; the work: " + result;
    }
  } catch (const std::exception& error) {
    result = described(error);
  }
  return std::to_string(now()) + ' ' + result;
}

// Nobody to finalize MPI with; the others may still want this rank's answers.
[[noreturn]] void end_process(const Trial& trial) {
  const auto others_have_reported = [&] {
    for (int r = 0; r < job(MPI_Comm_size); ++r) {
      if (r != trial.rank && !fs::exists(trial.file + std::to_string(r))) return false;
    }
    return true;
  };
  const auto start = Clock::now();
  while (!others_have_reported() && Clock::now() - start < std::chrono::seconds(10)) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  std::_Exit(3);
}

int sweep(const std::string& folder, int shard_size, double timeout,
          const std::vector<std::string>& trials) {
  for (std::size_t n = 0; n < trials.size(); ++n) {
    const Trial trial = parse(trials[n], folder, n);
    MPI_Barrier(MPI_COMM_WORLD);
    const std::string report = run_trial(trial, shard_size, timeout);
    write(trial.file + std::to_string(job(MPI_Comm_rank)), report);
    if (trial.ends_process()) end_process(trial);
    const bool goes_on = report.find(" wrong ") == std::string::npos &&
                         report.find(" CommError ") == std::string::npos;
    int all_go_on = goes_on ? 1 : 0;
    MPI_Allreduce(MPI_IN_PLACE, &all_go_on, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    if (all_go_on == 0) return 3;
    if (job(MPI_Comm_rank) == 0) fs::remove_all(trial.run);
  }
  return 0;
}

// -- what a killed job left

int check(const std::vector<std::string>& runs) {
  for (const std::string& run : runs) {
    std::string line;
    try {
      Client client(1, 60);
      const std::int64_t step = client.load(run);
      line = std::to_string(step) + " ok";
      client.step();
      client.save(run);
      Client reader(1, 60);
      if (reader.load(run) != std::max<std::int64_t>(step, 0) + 1) throw Wrong("the next save");
      for (const auto& entry : fs::directory_iterator(run)) {
        const std::string name = entry.path().filename().string();
        if (name != ".lock" && !name.starts_with("step-")) throw Wrong("a leftover: " + name);
      }
    } catch (const std::exception& error) {
      line += " " + described(error);
    }
    std::printf("%s %s\n", run.c_str(), line.c_str());
  }
  return 0;
}

// -- a run that somebody kills

int train(const std::string& run, int shard_size, double timeout, std::int64_t steps) {
  Client client(shard_size, timeout);
  const bool speaks = client.engine().rank() == 0;
  const auto say = [&](const char* event, std::int64_t step, std::uint32_t digest) {
    if (!speaks) return;
    std::printf("%s %lld %08x\n", event, static_cast<long long>(step), digest);
    std::fflush(stdout);
  };
  if (const std::int64_t step = client.load(run); step >= 0) say("loaded", step, client.digest());
  while (client.position() < steps) {
    client.step();
    // Every kind of save, at different steps in different runs.
    const auto progress = client.engine().wait_for_save();
    if (progress.phase == mics::checkpoint::SavePhase::committed)
      say("committed", progress.step, 0);
    const bool asynchronous = client.position() % 2 == 0 && client.position() != steps;
    client.save(run, asynchronous, 3);
    if (!asynchronous) say("committed", client.position(), 0);
  }
  Client last(shard_size, timeout);
  const std::int64_t step = last.load(run);
  say("final", step, last.digest());
  return 0;
}

int run(const std::vector<std::string>& words) {
  const std::string mode = words.empty() ? "" : words[0];
  if (mode == "sweep" && words.size() > 4) {
    return sweep(words[1], std::stoi(words[2]), std::stod(words[3]),
                 {words.begin() + 4, words.end()});
  }
  if (mode == "check") return check({words.begin() + 1, words.end()});
  if (mode == "train" && words.size() == 5) {
    return train(words[1], std::stoi(words[2]), std::stod(words[3]), std::stoll(words[4]));
  }
  throw std::runtime_error("checkpoint_client sweep|check|train WORDS");
}

// As the program does: where a rank is killed while the job starts, Open MPI's launcher may leave
// the others waiting in MPI_Init for ever.
void start(int& argc, char**& argv) {
  const mics::comm::Watchdog watchdog("start of the client", std::chrono::seconds(60),
                                      [](const std::string& line) {
                                        std::fprintf(stderr, "%s\n", line.c_str());
                                        std::_Exit(2);
                                      });
  int provided = MPI_THREAD_SINGLE;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_SERIALIZED, &provided);
  MPI_Barrier(MPI_COMM_WORLD);
}

}  // namespace

int main(int argc, char** argv) {
  start(argc, argv);
  int status = 2;
  {
    const Kokkos::ScopeGuard kokkos(argc, argv);
    try {
      status = run({argv + 1, argv + argc});
    } catch (const std::exception& error) {
      std::fprintf(stderr, "rank %d: %s\n", job(MPI_Comm_rank), error.what());
      std::_Exit(2);
    }
  }
  MPI_Finalize();
  return status;
}
