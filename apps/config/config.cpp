// SPDX-License-Identifier: Apache-2.0
#include <mics/base/json_reader.hpp>

#include <config/config.hpp>
#include <config/explanation.hpp>
#include <train/deck.hpp>

#include <exception>
#include <iostream>
#include <memory>
#include <string>
#include <utility>

namespace mics::apps {
namespace {

Config read(const std::string& file, const std::string& deck) {
  JsonReader json = JsonReader::parse_file(file);
  DeckValues values;
  if (!deck.empty()) {
    JsonReader other = JsonReader::parse_file(deck);
    values = deck_values(other);
  } else if (json.is_object("engine")) {
    // A deck of `mics train`: its own section is meant.
    DeckValues own = training_values(json);
    return Config::explain(json.object("engine"), own);
  }
  return Config::explain(std::move(json), values);
}

int explain(const Session& session, const std::string& file, const std::string& deck) {
  try {
    const Config config = read(file, deck);
    if (session.is_root()) std::cout << explanation(config, file) << std::flush;
    return config.report.usable() ? 0 : 1;
  } catch (const std::exception& error) {
    if (session.is_root()) std::cerr << "mics config explain: " << error.what() << std::endl;
    return 1;
  }
}

}  // namespace

void add_config(CLI::App& app, const Session& session, Action& action) {
  struct Arguments {
    std::string file;
    std::string deck;
  };
  const auto arguments = std::make_shared<Arguments>();
  CLI::App* command = app.add_subcommand("config", "Say what mics makes of a configuration");
  command->require_subcommand(1);
  CLI::App* explain_command = command->add_subcommand(
      "explain", "List what becomes of every key; status 1 if one is refused");
  explain_command->add_option("file", arguments->file, "DeepSpeed's JSON, or a deck")->required();
  explain_command->add_option("--deck", arguments->deck, "Deck whose values \"auto\" stands for");
  explain_command->callback([&session, &action, arguments] {
    action.run = [&session, arguments] {
      return explain(session, arguments->file, arguments->deck);
    };
  });
}

}  // namespace mics::apps
