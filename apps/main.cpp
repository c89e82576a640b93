// SPDX-License-Identifier: Apache-2.0
#include <mics/mics.hpp>

#include <CLI/CLI.hpp>
#include <bench/bench.hpp>
#include <checkpoint/checkpoint.hpp>
#include <config/config.hpp>
#include <program/one_line.hpp>
#include <program/session.hpp>
#include <train/train.hpp>

#include <cstdlib>
#include <exception>
#include <iostream>
#include <optional>
#include <string>
#include <string_view>

namespace {

using mics::apps::Action;
using mics::apps::one_line;
using mics::apps::Session;

// CLI11 asks for a command before it says that a word is none.
void require_known_command(const CLI::App& app, int argc, char** argv) {
  const CLI::App* parent = &app;
  std::string path = "mics";
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    std::string names;
    const CLI::App* command = nullptr;
    for (const CLI::App* known : parent->get_subcommands([](const CLI::App*) { return true; })) {
      names += (names.empty() ? "" : ", ") + known->get_name();
      if (known->check_name(word)) command = known;
    }
    if (names.empty() || word.starts_with('-')) return;
    if (command == nullptr) {
      mics::raise<mics::ArgumentError>(
          {.object = "command of " + path, .expected = names, .found = mics::in_quotes(word)});
    }
    parent = command;
    path += ' ' + word;
  }
}

// True in one process of a job that the usual launchers started, and without one. Known without
// MPI.
bool is_first_process() {
  for (const char* const variable :
       {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID", "PALS_RANKID"}) {
    if (const char* const rank = std::getenv(variable)) return std::string_view(rank) == "0";
  }
  return true;
}

// What was printed may not have arrived: a full disk.
void require_printed() {
  if (std::cout.flush()) return;
  mics::raise<mics::Error>({.object = "standard output",
                            .expected = "all that was printed to be written",
                            .found = "an error",
                            .remedy = "free space where it goes"});
}

// Reads the command line; none where it asks for help or the version, which is printed then. Throws
// what is wrong with it. Needs neither MPI nor a device: the session has not started.
std::optional<Action> read_command_line(const Session& session, int argc, char** argv) {
  CLI::App app("mics: sharded training state for C++ codes", "mics");
  app.set_version_flag("--version", MICS_VERSION_STRING);
  app.require_subcommand(1);
  Action action;
  mics::apps::add_train(app, session, action);
  mics::apps::add_bench(app, session, action);
  mics::apps::add_config(app, session, action);
  mics::apps::add_checkpoint(app, session, action);
  try {
    app.parse(argc, argv);
  } catch (const CLI::RequiredError&) {
    require_known_command(app, argc, argv);
    throw;
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() != 0) throw;
    if (is_first_process()) app.exit(error);  // help or version
    return {};
  }
  return action;
}

}  // namespace

int main(int argc, char** argv) {
  Session session;
  std::optional<Action> action;
  std::exception_ptr wrong;
  try {
    action = read_command_line(session, argc, argv);
  } catch (...) {
    wrong = std::current_exception();
  }
  if (!action && !wrong) {
    try {
      require_printed();
    } catch (const std::exception& error) {
      std::cerr << "mics: " << one_line(error.what()) << std::endl;
      return 1;
    }
    return 0;
  }
  session.start(argc, argv);
  try {
    // Ranks may be given different words; then none of them goes on.
    mics::comm::agree(mics::comm::Communicator::duplicate(session.world()), [&] {
      if (wrong) std::rethrow_exception(wrong);
    });
  } catch (const std::exception& error) {
    if (session.is_root())
      std::cerr << "mics: " << one_line(error.what()) << "; try mics --help" << std::endl;
    return 2;
  }
  try {
    const int status = action->run();
    require_printed();
    return status;
  } catch (const std::exception& error) {
    std::cerr << "mics: rank " << session.rank() << ": " << one_line(error.what()) << std::endl;
    session.leave(action->status_of_error);
  }
}
