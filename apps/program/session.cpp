// SPDX-License-Identifier: Apache-2.0
#include <mics/base/device.hpp>
#include <mics/base/error.hpp>
#include <mics/comm/agreement.hpp>
#include <mics/comm/watchdog.hpp>

#include <Kokkos_Core.hpp>
#include <program/session.hpp>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>

// Weak: the program may be linked with another BLAS.
extern "C" void openblas_set_num_threads(int threads) __attribute__((weak));

namespace mics::apps {

namespace {

// Cores that this rank may use: those it is bound to, or its share of a node that it is not bound
// on.
int cores_of_this_rank() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
  const int cores = CPU_COUNT(&allowed);
  const auto online = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  if (cores < online) return cores;
  MPI_Comm node = MPI_COMM_NULL;
  int ranks = 1;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node);
  MPI_Comm_size(node, &ranks);
  MPI_Comm_free(&node);
  return std::max(1, cores / ranks);
}

// A variable of the environment that holds an integer.
struct NumberVariable {
  const char* name;
  int least;
  bool is_list;  // of which the first counts here, as OpenMP has one number a level
};

constexpr NumberVariable start_limit_variable{"MICS_START_LIMIT", 1, false};

// None where it is unset or empty. Throws where it is no such integer.
std::optional<int> value_of(const NumberVariable& variable) {
  const char* const value = std::getenv(variable.name);
  if (value == nullptr || *value == '\0') return {};
  const std::string_view text(value);
  const std::string_view first = variable.is_list ? text.substr(0, text.find(',')) : text;
  int number = 0;
  const auto [end, error] = std::from_chars(first.data(), first.data() + first.size(), number);
  if (error != std::errc() || end != first.data() + first.size() || number < variable.least) {
    raise<ConfigError>({.object = std::string("environment: ") + variable.name,
                        .expected = "an integer of at least " + std::to_string(variable.least),
                        .found = in_quotes(text),
                        .remedy = "correct or unset it"});
  }
  return number;
}

// How long ranks wait for each other at the start. They agree on a complaint only after that.
std::chrono::milliseconds start_limit() {
  std::optional<int> seconds;
  try {
    seconds = value_of(start_limit_variable);
  } catch (const ConfigError&) {  // check_environment() meets it again
  }
  return std::chrono::seconds(seconds.value_or(600));
}

// Kokkos ends the process over a variable of its own that it cannot read.
void check_environment() {
  constexpr std::array numbers{NumberVariable{"KOKKOS_NUM_THREADS", 1, false},
                               NumberVariable{"OMP_NUM_THREADS", 1, true},
                               NumberVariable{"KOKKOS_DEVICE_ID", 0, false}, start_limit_variable};
  for (const NumberVariable& number : numbers) static_cast<void>(value_of(number));
}

}  // namespace

void Session::start(int& argc, char**& argv) {
  // A launcher may leave the others waiting where a rank ends while the job starts, and no wait of
  // MPI's can be given up. An engine watches its own.
  comm::Watchdog watchdog("start of the program", start_limit(), [](const std::string& line) {
    std::fprintf(stderr, "mics: %s\n", line.c_str());
    std::fflush(nullptr);
    std::_Exit(1);
  });
  watchdog.stage("MPI_Init");
  int provided = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_SERIALIZED, &provided);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
  MPI_Comm_size(MPI_COMM_WORLD, &size_);
  if (provided < MPI_THREAD_SERIALIZED) {
    if (rank_ == 0) std::fputs("mics: expected an MPI with MPI_THREAD_SERIALIZED\n", stderr);
    leave(1);
  }

  watchdog.stage("the first agreement");
  try {
    // Ranks may have different environments; then none of them starts.
    comm::agree(comm::Communicator::duplicate(MPI_COMM_WORLD), [] {
      check_environment();
      device::require_usable();
    });
  } catch (const std::exception& error) {
    if (rank_ == 0) std::cerr << "mics: " << error.what() << std::endl;
    MPI_Finalize();
    std::exit(2);
  }

  // OpenMP and BLAS read their variables before main, and take the whole node for each rank where
  // the user set none. Kokkos warns where OMP_PROC_BIND is unset; binding is the launcher's
  // business.
  Kokkos::InitializationSettings settings;
  settings.set_disable_warnings(true);
  if (std::getenv("OMP_NUM_THREADS") == nullptr && std::getenv("KOKKOS_NUM_THREADS") == nullptr) {
    settings.set_num_threads(cores_of_this_rank());
  }
  Kokkos::initialize(settings);
  if (openblas_set_num_threads != nullptr && std::getenv("OPENBLAS_NUM_THREADS") == nullptr) {
    openblas_set_num_threads(Kokkos::DefaultHostExecutionSpace().concurrency());
  }
  started_ = true;
}

Session::~Session() {
  if (!started_) return;
  Kokkos::finalize();
  MPI_Finalize();
}

void Session::leave(int status) const {
  std::cout.flush();
  std::cerr.flush();
  std::fflush(nullptr);
  std::_Exit(status);
}

}  // namespace mics::apps
