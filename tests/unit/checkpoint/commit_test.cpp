// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/commit.hpp>
#include <mics/checkpoint/crc32c.hpp>

#include <gtest/gtest.h>

#include <random>
#include <string>

namespace mics::checkpoint {
namespace {

Commit example() {
  return {.step = 1200,
          .id = "0123456789abcdef",
          .time = "2026-11-22T22:36:50Z",
          .writer = "mics 0.1.0",
          .grid = {8, 4, 1, 4},
          .digest = 0x89abcdefU,
          .files = {{"manifest.h5", 408112, 0x1a2b3c4dU}, {"s0000_r00-01234567.h5", 1 << 30, 7}}};
}

std::string sealed(std::string text) {
  text += "end " + hex(crc32c(std::as_bytes(std::span(text.data(), text.size())))) + '\n';
  return text;
}

TEST(CommitTest, ComesBack) { EXPECT_EQ(parse_commit(to_text(example()), "COMMIT"), example()); }

TEST(CommitTest, ReadsAsWritten) {
  EXPECT_EQ(to_text(example()), sealed("mics-checkpoint 1\n"
                                       "step 1200\n"
                                       "save 0123456789abcdef\n"
                                       "time 2026-11-22T22:36:50Z\n"
                                       "writer mics 0.1.0\n"
                                       "layout world 8 shard 4 slices 1 node 4\n"
                                       "digest 89abcdef\n"
                                       "file manifest.h5 408112 1a2b3c4d\n"
                                       "file s0000_r00-01234567.h5 1073741824 00000007\n"));
}

TEST(CommitTest, EveryFlippedBitAndEveryCutIsFound) {
  const std::string text = to_text(example());
  for (std::size_t i = 0; i < text.size(); ++i) {
    EXPECT_THROW(static_cast<void>(parse_commit(text.substr(0, i), "COMMIT")), FormatError);
    for (int bit = 0; bit < 8; ++bit) {
      std::string flipped = text;
      flipped[i] = static_cast<char>(flipped[i] ^ (1 << bit));
      EXPECT_THROW(static_cast<void>(parse_commit(flipped, "COMMIT")), FormatError) << i;
    }
  }
}

TEST(CommitTest, NothingButItsOwnSpellingIsAccepted) {
  const std::string good = to_text(example());
  const std::string body = good.substr(0, good.rfind("end "));
  const auto refused = [&](const std::string& from, const std::string& to) {
    std::string text = body;
    const auto at = text.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    text.replace(at, from.size(), to);
    EXPECT_THROW(static_cast<void>(parse_commit(sealed(text), "COMMIT")), FormatError) << to;
  };
  refused("step 1200", "step 01200");
  refused("step 1200", "step +1200");
  refused("step 1200", "step -1");
  refused("step 1200", "step 99999999999999999999");
  refused("step 1200", "step");
  refused("save ", "save  ");
  refused("1a2b3c4d", "1A2B3C4D");
  refused("manifest.h5 408112", "../secret 408112");
  refused("manifest.h5 408112", ".hidden 408112");
  refused("manifest.h5 408112", "COMMIT 408112");
  refused("manifest.h5 408112", "s0000_r00-01234567.h5 408112");
  refused("manifest.h5 408112", "manifest.h5 -1");
  refused("digest 89abcdef\n", "");
  refused("digest 89abcdef\n", "digest 89abcdef\ndigest 89abcdef\n");
  refused("\n", "\r\n");
}

TEST(CommitTest, AnotherVersionSaysWhichReleaseReadsIt) {
  const auto refused = [](const std::string& text, const std::string& expected) {
    try {
      static_cast<void>(parse_commit(text, "COMMIT"));
      ADD_FAILURE() << text;
    } catch (const FormatError& error) {
      const std::string line = error.what();
      EXPECT_NE(line.find(expected), std::string::npos) << line;
      EXPECT_NE(line.find("expected format version 1, found "), std::string::npos) << line;
      EXPECT_EQ(line.find('\n'), std::string::npos) << line;
    }
  };
  const std::string releases = "mics 2.5.0 wrote it: that release and later ones read it";
  refused("mics-checkpoint 2\nwhatever\nwriter mics 2.5.0\nmore\n", releases);
  refused("mics-checkpoint 2\nwriter mics 2.5.0", releases);
  refused("mics-checkpoint 2\nwhatever\n", "a later release of mics wrote it and reads it");
  refused("mics-checkpoint 2\nwriter \x1b[31m\n", "a later release of mics wrote it and reads it");
  refused("mics-checkpoint 0\nwriter mics 0.1.0\n", "no release has that version");
}

// Texts that pass the checksum reach every branch of the parser.
TEST(CommitTest, SurvivesRandomTexts) {
  const std::string good = to_text(example());
  const std::string body = good.substr(0, good.rfind("end "));
  std::mt19937_64 random(7);
  int accepted = 0;
  for (int round = 0; round < 50000; ++round) {
    std::string text = body;
    for (std::uint64_t edits = 1 + random() % 4; edits > 0; --edits) {
      const std::size_t at = text.empty() ? 0 : random() % text.size();
      switch (random() % 4) {
        case 0:
          if (!text.empty()) text[at] = static_cast<char>(random());
          break;
        case 1:
          text.erase(at, random() % 9);
          break;
        case 2:
          text.insert(at, text.substr(random() % (text.size() + 1), random() % 40));
          break;
        default:
          text.insert(at, 1, " \n0-9a/."[random() % 8]);
      }
    }
    const std::string whole = sealed(text);
    try {
      const Commit commit = parse_commit(whole, "COMMIT");
      EXPECT_EQ(to_text(commit), whole);
      ++accepted;
    } catch (const FormatError&) {
    }
  }
  EXPECT_GT(accepted, 0);
}

}  // namespace
}  // namespace mics::checkpoint
