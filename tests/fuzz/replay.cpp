// SPDX-License-Identifier: Apache-2.0
// Runs a fuzzer without libFuzzer: each file of a corpus as it is, and changed in ways that depend
// on nothing but its bytes. Usage: PROGRAM MUTATIONS FILE...
#include "fuzz.hpp"

#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <string_view>
#include <vector>

namespace {

using namespace std::string_view_literals;

std::string current;  // what is running, for the last words

extern "C" void tell(int signal) {
  const ssize_t ignored = ::write(STDERR_FILENO, current.data(), current.size());
  static_cast<void>(ignored);
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

using Random = std::mt19937_64;

std::size_t below(Random& random, std::size_t limit) { return random() % limit; }

// One change: of a bit, of a byte to one that grammars care for, of a number's digits; a stretch
// left out, said twice, or taken from another input.
void mutate(std::string& text, const std::vector<std::string>& others, Random& random) {
  static constexpr std::string_view telling = "\xff\0\n \"{}[],:-0123456789eE.%/\\"sv;
  const std::string& other = others[below(random, others.size())];
  const std::size_t at = text.empty() ? 0 : below(random, text.size());
  const std::size_t length =
      text.empty() ? 0 : below(random, std::min<std::size_t>(64, text.size() - at)) + 1;
  switch (below(random, 6)) {
    case 0:
      if (!text.empty()) text[at] = static_cast<char>(text[at] ^ (1 << below(random, 8)));
      break;
    case 1:
      if (!text.empty()) text[at] = telling[below(random, telling.size())];
      break;
    case 2:
      text.insert(at, 1, telling[below(random, telling.size())]);
      break;
    case 3:
      text.erase(at, length);
      break;
    case 4:
      text.insert(at, text.substr(at, length));
      break;
    default:
      if (!other.empty()) {
        const std::size_t from = below(random, other.size());
        text.insert(at, other.substr(from, below(random, 64) + 1));
      }
  }
}

void run(const std::string& text) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(text.data()), text.size());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s MUTATIONS FILE...\n", argv[0]);
    return 2;
  }
  const long mutations = std::atol(argv[1]);
  std::vector<std::string> inputs{""};
  for (int i = 2; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    if (!file) {
      std::fprintf(stderr, "%s: no such file\n", argv[i]);
      return 2;
    }
    inputs.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  for (const int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE}) std::signal(signal, tell);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const std::string name = i == 0 ? "nothing" : argv[i + 1];
    current = "replay: failed on " + name + '\n';
    run(inputs[i]);
    Random random(0);
    std::string text = inputs[i];
    for (long m = 0; m < mutations; ++m) {
      current = "replay: failed on mutation " + std::to_string(m) + " of " + name + '\n';
      // Up to four changes on top of one another, then from the start again.
      if (m % 4 == 0) text = inputs[i];
      mutate(text, inputs, random);
      run(text);
    }
  }
  std::printf("%zu inputs, %ld mutations of each\n", inputs.size(), mutations);
  return 0;
}
