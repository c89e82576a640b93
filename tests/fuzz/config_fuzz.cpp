// SPDX-License-Identifier: Apache-2.0
#include "fuzz.hpp"
#include <mics/base/error.hpp>
#include <mics/base/json_reader.hpp>
#include <mics/engine/config.hpp>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace {

using mics::Config;
using mics::JsonReader;
using mics::fuzz::require;

// What is promised of every error: one line that names the source.
void check(const mics::ConfigError& error) {
  const std::string_view what = error.what();
  mics::fuzz::require_one_line(what);
  require(what.find("fuzz.json") != std::string_view::npos ||
          what.find("argument") != std::string_view::npos);
}

// A configuration that was accepted works as far as that can be said without ranks.
void use(const Config& config) {
  config.validate();
  require(config.report.usable());
  require(!config.describe().empty());
  static_cast<void>(config.plan_request(6));
  for (const int ranks : {1, 3, 2'000'000'000}) {
    try {
      const mics::Batch batch = config.solve_batch(ranks);
      require(batch.global >= 1 && batch.micro_steps >= 1);
      const auto last = batch.samples(batch.micro_steps - 1, ranks - 1, ranks);
      require(last.end == batch.global && last.count() >= 0);
      require(batch.largest(ranks) >= last.count());
    } catch (const mics::ConfigError& error) {
      check(error);
    }
  }
}

void read(std::string_view text, const std::vector<std::string>& overrides) {
  bool accepted = false;
  try {
    use(Config::read(JsonReader::parse(text, "fuzz.json", overrides)));
    accepted = true;
  } catch (const mics::ConfigError& error) {
    check(error);
  }
  try {
    // Explained in full it is usable if and only if it was accepted; "auto" may stand for more.
    JsonReader json = JsonReader::parse(text, "fuzz.json", overrides);
    const auto keys = json.keys();
    const Config config = Config::explain(std::move(json), {});
    require(config.report.usable() == accepted);
    require(keys.empty() || !config.report.keys.empty());
    for (const mics::KeyNote& note : config.report.keys) {
      require(note.key.find_first_of("\r\n") == std::string::npos);
      require(note.value.find_first_of("\r\n") == std::string::npos);
    }
    mics::DeckValues deck{.engine = config, .steps = 100, .warmup_steps = 10};
    static_cast<void>(
        Config::explain(JsonReader::parse(text, "fuzz.json", overrides), deck).describe());
  } catch (const mics::ConfigError& error) {
    require(!accepted);
    check(error);
  }
}

}  // namespace

// The bytes are JSON text; behind each byte 0xFF, which no JSON holds, stands an override.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::vector<std::string> parts = mics::fuzz::parts_of(data, size);
  const std::string text = parts.front();
  parts.erase(parts.begin());
  read(text, parts);
  return 0;
}
