// SPDX-License-Identifier: Apache-2.0
#include <mics/base/version.hpp>

#include <CLI/CLI.hpp>
#include <bench/bench.hpp>
#include <program/session.hpp>
#include <train/train.hpp>

#include <exception>
#include <iostream>

int main(int argc, char** argv) {
  const mics::apps::Session session(argc, argv);
  int status = 0;
  CLI::App app("mics: sharded training state for C++ codes");
  app.set_version_flag("--version", MICS_VERSION_STRING);
  app.require_subcommand(1);
  mics::apps::add_train(app, session, status);
  mics::apps::add_bench(app, session, status);
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& help) {
    if (session.is_root()) app.exit(help);
  } catch (const CLI::CallForAllHelp& help) {
    if (session.is_root()) app.exit(help);
  } catch (const CLI::CallForVersion& version) {
    if (session.is_root()) app.exit(version);
  } catch (const CLI::ParseError& error) {
    // Every rank has the same command line; one of them says what is wrong with it.
    if (session.is_root())
      std::cerr << "mics: " << error.what() << "; try mics --help" << std::endl;
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "mics: rank " << session.rank() << ": " << error.what() << std::endl;
    session.leave(1);
  }
  return status;
}
