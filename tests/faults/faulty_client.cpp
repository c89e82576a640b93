// SPDX-License-Identifier: Apache-2.0
// A small client of mics in which one rank misbehaves at one of its calls. faults_test.py starts
// it.
//
//   faulty_client FOLDER SHARD_SIZE TIMEOUT FAULT...      FAULT = kind:index:rank
//
// The state is in the memory of the default execution space, and in a build without a device with
// MICS_TEST_MEMORY=device as if there were one.
//
// Every fault gets an engine of its own and two steps, of two micro-steps and of one. Rank `rank`
// does as `kind` says at its `index`-th call that communicates; kind `none` is an undisturbed run.
// Each rank writes what became of the run to FOLDER/<number of the fault>.<rank>, one line:
//
//   <seconds> ok|CommError|StateError|...  <text>
//
// and the misbehaving one to FOLDER/<number>.fault the time of its fault. Times are of the
// monotonic clock, which all processes of a machine share. Kinds that end the process must come
// last.
#include <mics/mics.hpp>

#include <Kokkos_Core.hpp>
#include <mpi.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
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

struct Accident : std::runtime_error {
  Accident() : std::runtime_error("negative density in cell 4711") {}
};

// -- what is run

enum class Kind {
  none,
  kill,
  stop,
  quick_exit,
  exit,
  leave,
  absent,  // never builds the engine
  guarded,
  unguarded,
  loop,
  skip,
  twice,
  swap,
  resize
};

constexpr std::array<std::string_view, 14> kind_names{
    "none",  "kill",      "stop", "_exit", "exit",  "return", "absent",
    "throw", "unguarded", "loop", "skip",  "twice", "swap",   "resize"};

struct Fault {
  Kind kind = Kind::none;
  int index = 0;
  int rank = 0;
  std::string file;  // without the rank

  [[nodiscard]] bool mine() const { return kind != Kind::none && job(MPI_Comm_rank) == rank; }
  [[nodiscard]] bool ends_process() const { return kind >= Kind::kill && kind <= Kind::absent; }
};

Fault parse(const std::string& text, std::string file) {
  const auto colon = text.find(':');
  const auto name = std::find(kind_names.begin(), kind_names.end(), text.substr(0, colon));
  Fault fault;
  if (name == kind_names.end() ||
      (colon != std::string::npos &&
       std::sscanf(text.c_str() + colon, ":%d:%d", &fault.index, &fault.rank) != 2)) {
    throw std::runtime_error("no fault: " + text);
  }
  fault.kind = static_cast<Kind>(name - kind_names.begin());
  fault.file = std::move(file);
  return fault;
}

/// One call that communicates.
struct Call {
  enum Type { micro_step, gather, reduce, step, sum } type = sum;
  std::size_t argument = 0;  // unit; whether the last micro-step; number of values
};

constexpr std::size_t units = 3;  // in two slots: gathers at once, ahead of time, and not at all

// The first micro-step records the order of units, the others follow it; the second step starts
// from updated parameters.
std::vector<Call> two_steps() {
  std::vector<Call> calls;
  const auto micro_step = [&](bool last) {
    calls.push_back({Call::micro_step, last ? 1U : 0U});
    for (std::size_t u = 0; u < units; ++u) calls.push_back({Call::gather, u});
    for (std::size_t u = units; u-- > 0;) {
      calls.push_back({Call::gather, u});
      calls.push_back({Call::reduce, u});
    }
  };
  micro_step(false);
  micro_step(true);
  calls.push_back({Call::step, 0});
  calls.push_back({Call::sum, 3});
  micro_step(true);
  calls.push_back({Call::step, 0});
  calls.push_back({Call::sum, 3});
  return calls;
}

// The wrong sequence of calls of a rank that misbehaves within mics.
void mutate(std::vector<Call>& calls, const Fault& fault) {
  const auto here = calls.begin() + fault.index;
  switch (fault.kind) {
    case Kind::skip:
      calls.erase(here);
      break;
    case Kind::twice:
      calls.insert(here, *here);
      break;
    case Kind::swap:
      if (here + 1 < calls.end()) std::swap(here[0], here[1]);
      break;
    case Kind::resize:
      if (here->type == Call::micro_step) here->argument = 1 - here->argument;
      if (here->type == Call::gather || here->type == Call::reduce) {
        here->argument = (here->argument + 1) % units;
      }
      if (here->type == Call::step || here->type == Call::sum) *here = {Call::sum, 5};
      break;
    default:
      break;
  }
}

/// Units a, b, c of different sizes: a sharded weight and a persistent bias each, so that every
/// purpose of communication occurs.
struct Client {
  mics::Model model;
  std::vector<mics::UnitId> unit;
  std::vector<mics::ParameterId> weight, bias;

  Client() {
    for (std::size_t u = 0; u < units; ++u) {
      const auto rows = static_cast<std::int64_t>(200 + 150 * u);
      unit.push_back(model.unit(std::string(1, static_cast<char>('a' + u))));
      const auto init = mics::Init::function(
          [=](std::int64_t i) { return static_cast<double>((i + 7 * static_cast<int>(u)) % 64); });
      weight.push_back(model.parameter(unit.back(), "weight", {rows, 3}, {.init = init}));
      bias.push_back(model.parameter(unit.back(), "bias", {5}, {.init = init}));
    }
  }
};

mics::Config config_of(int shard_size, double timeout) {
  mics::Config config;
  config.preset = mics::Preset::mics;
  config.shard_size = shard_size;
  config.persistence_threshold = 5;
  config.optimizer = {.kind = mics::OptimizerKind::sgd, .learning_rate = 1};
  config.timeout = timeout;
  const char* const memory = std::getenv("MICS_TEST_MEMORY");
  if (memory != nullptr && std::string_view(memory) == "device") {
    config.memory = mics::Memory::device;
  }
  config.share_device = true;
  return config;
}

// A kernel: the gradient may be in a device's memory.
template <class View>
struct Add {
  View to;
  float value;
  KOKKOS_FUNCTION void operator()(int i) const {
    if constexpr (View::rank() == 1) {
      to(i) += value;
    } else {
      for (std::size_t j = 0; j < to.extent(1); ++j) to(i, j) += value;
    }
  }
};
template <class View>
void add(const View& to, float value) {
  Kokkos::parallel_for("faulty_client::add", to.extent(0), Add<View>{to, value});
}

void make(mics::Engine& engine, const Client& client, const Call& call) {
  switch (call.type) {
    case Call::micro_step:
      engine.begin_micro_step({.samples = 1, .last = call.argument == 1});
      return;
    case Call::gather:
      (void)engine.gather(client.unit[call.argument]);
      return;
    case Call::reduce: {
      auto scope = engine.gradient(client.unit[call.argument]);
      const auto dw = scope.view<float**>(client.weight[call.argument]);
      const auto db = scope.view<float*>(client.bias[call.argument]);
      const auto value = static_cast<float>(engine.rank() + 1);
      add(dw, value);
      add(db, value);
      scope.reduce();
      return;
    }
    case Call::step:
      (void)engine.step();
      return;
    case Call::sum: {
      std::vector<double> values(call.argument, engine.rank());
      engine.sum(values);
      const int ranks = engine.size();
      if (values[0] != ranks * (ranks - 1) / 2) throw std::logic_error("a wrong sum");
      return;
    }
  }
}

// Two steps of the mean gradient of ranks 1 ... W. All ranks meet once more, so that none goes
// before the last fault is known.
void require_trained(mics::Engine& engine, const Client& client) {
  const double change = engine.size() + 1;  // 2 steps x (W + 1) / 2
  for (const auto& parameters : {client.weight, client.bias}) {
    for (const mics::ParameterId id : parameters) {
      const auto& spec = client.model.spec(id);
      std::vector<double> values(static_cast<std::size_t>(spec.count));
      engine.read(id, values);
      for (std::int64_t i = 0; i < spec.count; ++i) {
        if (values[static_cast<std::size_t>(i)] != spec.options.init(0, id, i) - change) {
          throw std::logic_error("a wrong value of " + spec.name);
        }
      }
    }
  }
  make(engine, client, {Call::sum, 1});
}

// -- misbehaviour outside mics

void write(const std::string& file, const std::string& text) {
  // Renamed when it is complete: others wait for the name.
  std::ofstream(file + ".part") << text << '\n';
  fs::rename(file + ".part", file);
}

bool others_have_reported(const Fault& fault) {
  for (int r = 0; r < job(MPI_Comm_size); ++r) {
    if (r != fault.rank && !fs::exists(fault.file + std::to_string(r))) return false;
  }
  return true;
}

/// Leaves main through its return; engines are destroyed on the way, and MPI is finalized.
struct Leave {};

void misbehave(const Fault& fault) {
  write(fault.file + "fault", std::to_string(now()));
  switch (fault.kind) {
    case Kind::kill:
      std::raise(SIGKILL);
      break;
    case Kind::stop:
      std::raise(SIGSTOP);
      break;
    case Kind::quick_exit:
      _exit(0);
    case Kind::exit:
      std::exit(0);
    case Kind::leave:
      throw Leave();
    case Kind::guarded:
    case Kind::unguarded:
      throw Accident();
    case Kind::loop:
    case Kind::absent:
      // Endless as far as mics can know; asleep, to leave the cores to the ranks that are watched.
      while (!others_have_reported(fault)) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      break;
    default:
      break;
  }
}

// Nobody to finalize MPI with; the others may still want this rank's answers.
[[noreturn]] void end_process(const Fault& fault) {
  const auto start = Clock::now();
  while (!others_have_reported(fault) && Clock::now() - start < std::chrono::seconds(10)) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  std::_Exit(3);
}

// -- a run

void train(mics::Engine& engine, const Client& client, const Fault& fault) {
  std::vector<Call> calls = two_steps();
  if (fault.mine()) mutate(calls, fault);
  for (std::size_t i = 0; i <= calls.size(); ++i) {
    if (fault.mine() && static_cast<int>(i) == fault.index) misbehave(fault);
    if (i < calls.size()) make(engine, client, calls[i]);  // the last one may be left out
  }
  require_trained(engine, client);
}

std::string run(const Fault& fault, int shard_size, double timeout) {
  const int rank = job(MPI_Comm_rank);
  const auto line = [](const char* kind, const std::exception& error) {
    return std::to_string(now()) + ' ' + kind + ' ' + error.what();
  };
  try {
    const Client client;
    const mics::Config config = config_of(shard_size, timeout);
    const auto log = [&](mics::LogLevel level, std::string_view text) {
      if (level != mics::LogLevel::stuck) return;
      write(fault.file + std::to_string(rank),
            std::to_string(now()) + " stuck " + std::string(text));
      end_process(fault);
    };
    if (fault.kind == Kind::absent && fault.mine()) misbehave(fault);
    mics::Engine engine(MPI_COMM_WORLD, client.model, config, {}, log);
    if (fault.kind == Kind::unguarded) {
      train(engine, client, fault);
    } else {
      // Leaving is no exception of a computation: nobody is told.
      bool leaves = false;
      engine.guard([&] {
        try {
          train(engine, client, fault);
        } catch (const Leave&) {
          leaves = true;
        }
      });
      if (leaves) throw Leave();
    }
    return std::to_string(now()) + " ok";
  } catch (const mics::CommError& error) {
    return line("CommError", error);
  } catch (const mics::StateError& error) {
    return line("StateError", error);
  } catch (const mics::Error& error) {
    return line("Error", error);
  } catch (const Accident& error) {
    return line("Accident", error);
  } catch (const std::exception& error) {
    return line("exception", error);
  }
}

int run_all(const std::string& folder, int shard_size, double timeout,
            const std::vector<std::string>& faults) {
  bool failed = false;
  for (std::size_t n = 0; n < faults.size(); ++n) {
    const Fault fault = parse(faults[n], folder + '/' + std::to_string(n) + '.');
    if (fault.index >= static_cast<int>(two_steps().size()))
      throw std::runtime_error("no such call");
    MPI_Barrier(MPI_COMM_WORLD);
    const std::string report = run(fault, shard_size, timeout);
    write(fault.file + std::to_string(job(MPI_Comm_rank)), report);
    failed = failed || report.find(" ok") == std::string::npos;
    if (fault.ends_process()) end_process(fault);
  }
  if (job(MPI_Comm_rank) == 0) std::printf("%zu runs\n", faults.size());
  return failed ? 3 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string_view(argv[1]) == "--calls") {
    for (const Call& call : two_steps()) std::printf("%d %zu\n", call.type, call.argument);
    return 0;
  }
  int provided = MPI_THREAD_SINGLE;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_SERIALIZED, &provided);
  int status = 2;
  {
    const Kokkos::ScopeGuard kokkos(argc, argv);
    try {
      if (argc < 5) throw std::runtime_error("faulty_client FOLDER SHARD_SIZE TIMEOUT FAULT...");
      status = run_all(argv[1], std::atoi(argv[2]), std::atof(argv[3]), {argv + 4, argv + argc});
    } catch (const Leave&) {
      status = 0;
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      MPI_Abort(MPI_COMM_WORLD, 2);
    }
  }
  MPI_Finalize();
  return status;
}
