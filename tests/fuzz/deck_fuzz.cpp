// SPDX-License-Identifier: Apache-2.0
#include "fuzz.hpp"
#include <mics/base/error.hpp>

#include <sys/mman.h>
#include <train/deck.hpp>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace {

using mics::fuzz::require;

// A file in memory, since decks are read from files.
class MemoryFile {
 public:
  explicit MemoryFile(std::string_view text) : descriptor_(::memfd_create("deck", 0)) {
    require(descriptor_ >= 0);
    require(::write(descriptor_, text.data(), text.size()) == static_cast<ssize_t>(text.size()));
  }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  ~MemoryFile() { ::close(descriptor_); }
  [[nodiscard]] std::string path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }

 private:
  int descriptor_;
};

// A deck that was accepted holds what training relies on.
void use(const mics::apps::Deck& deck) {
  require(!deck.text.empty() && !deck.sample_prompt.empty());
  require(deck.files.empty() == (deck.synthetic_tokens > 0));
  require(deck.shape.width % deck.shape.heads == 0 && deck.shape.vocabulary > 0);
  require(deck.steps >= 1 && deck.print_every >= 1 && deck.retention.keep >= 0);
  constexpr std::int64_t few = 10'000;
  if (deck.steps <= few) {
    require(static_cast<std::int64_t>(mics::apps::learning_rates(deck).size()) == deck.steps);
  }
  try {
    require(mics::apps::solve_batch(deck.engine, 6).global >= 1);
  } catch (const mics::ConfigError& error) {
    mics::fuzz::require_one_line(error.what());
  }
}

void read(const std::string& deck, const std::vector<std::string>& overrides,
          const std::string& deepspeed) {
  try {
    use(mics::apps::read_deck(deck, overrides, deepspeed));
  } catch (const mics::ConfigError& error) {
    mics::fuzz::require_one_line(error.what());
  }
}

}  // namespace

// The bytes are a deck; behind the first byte 0xFF stands a file of DeepSpeed's keys, behind each
// further one an override.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::vector<std::string> parts = mics::fuzz::parts_of(data, size);
  const MemoryFile deck(parts.front());
  parts.erase(parts.begin());
  if (parts.empty()) {
    read(deck.path(), {}, {});
    return 0;
  }
  const MemoryFile deepspeed(parts.front());
  parts.erase(parts.begin());
  read(deck.path(), parts, {});
  read(deck.path(), parts, deepspeed.path());
  return 0;
}
