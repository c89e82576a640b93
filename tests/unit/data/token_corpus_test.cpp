// SPDX-License-Identifier: Apache-2.0
#include <data/byte_corpus.hpp>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using data::ByteCorpus;
using data::Bytes;
using data::ByteSpan;
namespace fs = std::filesystem;

/// A folder of its own, removed at the end.
class ByteCorpusTest : public testing::Test {
 protected:
  void SetUp() override {
    folder =
        fs::temp_directory_path() / ("mics_byte_corpus_" + std::to_string(getpid()) + "_" +
                                     testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::create_directories(folder);
  }
  void TearDown() override { fs::remove_all(folder); }

  fs::path write(const std::string& name, const std::string& content) const {
    const fs::path path = folder / name;
    fs::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << content;
    return path;
  }

  fs::path folder;
};

/// Text of `count` bytes in which the byte at i is i mod 251.
Bytes counting_text(std::size_t count) {
  Bytes text(count);
  for (std::size_t i = 0; i < count; ++i) text[i] = static_cast<std::uint8_t>(i % 251);
  return text;
}

std::string message_of(const auto& action) {
  try {
    action();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no exception";
}

TEST_F(ByteCorpusTest, SplitsAsTheDocumentedExample) {
  const Bytes text = counting_text(20);

  const ByteCorpus corpus(text, {.positions = 1, .validation_fraction = 0.2});

  ASSERT_EQ(corpus.training_runs().size(), 2U);
  EXPECT_EQ(corpus.training_runs()[0].size(), 8U);
  EXPECT_EQ(corpus.training_runs()[0].front(), 0);
  EXPECT_EQ(corpus.training_runs()[1].size(), 8U);
  EXPECT_EQ(corpus.training_runs()[1].front(), 10);
  ASSERT_EQ(corpus.validation_windows().size(), 2U);
  EXPECT_EQ(corpus.validation_windows()[0].front(), 8);
  EXPECT_EQ(corpus.validation_windows()[1].front(), 18);
}

TEST_F(ByteCorpusTest, TrainingAndValidationShareNoByteAndCoverTheText) {
  for (const std::size_t count : {90U, 91U, 500U, 5000U, 100003U}) {
    const ByteCorpus corpus(counting_text(count), {.positions = 8});
    std::vector<int> uses(count, 0);
    const std::uint8_t* begin =
        std::min(corpus.training_runs()[0].data(), corpus.validation_windows()[0].data());

    for (const ByteSpan run : corpus.training_runs()) {
      for (std::size_t i = 0; i < run.size(); ++i) ++uses[run.data() - begin + i];
    }
    for (const ByteSpan window : corpus.validation_windows()) {
      EXPECT_EQ(window.size(), 9U);
      for (std::size_t i = 0; i < window.size(); ++i) ++uses[window.data() - begin + i];
    }

    EXPECT_LE(*std::ranges::max_element(uses), 1);
    // Only a last piece of training text that holds no window is left out.
    EXPECT_LT(std::ranges::count(uses, 0), 9);
    const double share =
        9.0 * static_cast<double>(corpus.validation_windows().size()) / static_cast<double>(count);
    EXPECT_NEAR(share, 0.1, count < 1000 ? 0.05 : 0.01) << count;
  }
}

TEST_F(ByteCorpusTest, SamplesLieWithinTrainingRuns) {
  const ByteCorpus corpus(counting_text(5000), {.positions = 8, .seed = 3});

  for (std::uint64_t i = 0; i < 2000; ++i) {
    const ByteSpan window = corpus.sample(i);
    ASSERT_EQ(window.size(), 9U);
    const bool is_inside = std::ranges::any_of(corpus.training_runs(), [&](ByteSpan run) {
      return window.data() >= run.data() &&
             window.data() + window.size() <= run.data() + run.size();
    });
    ASSERT_TRUE(is_inside) << "sample " << i;
  }
}

TEST_F(ByteCorpusTest, SamplesReachEveryStartAboutEquallyOften) {
  const ByteCorpus corpus(counting_text(100), {.positions = 3, .validation_fraction = 0.2});
  std::map<const std::uint8_t*, int> hits;
  std::size_t starts = 0;
  for (const ByteSpan run : corpus.training_runs()) starts += run.size() - 3;

  for (std::uint64_t i = 0; i < 200 * starts; ++i) ++hits[corpus.sample(i).data()];

  EXPECT_EQ(hits.size(), starts);
  for (const auto& [start, count] : hits) {
    EXPECT_GT(count, 130);
    EXPECT_LT(count, 280);
  }
}

TEST_F(ByteCorpusTest, SampleDependsOnSeedAndIndexOnly) {
  const Bytes text = counting_text(5000);
  const ByteCorpus one(text, {.positions = 8, .seed = 7});
  const ByteCorpus same(text, {.positions = 8, .seed = 7});
  const ByteCorpus other(text, {.positions = 8, .seed = 8});
  const auto offset = [](const ByteCorpus& corpus, std::uint64_t index) {
    return corpus.sample(index).data() - corpus.training_runs()[0].data();
  };

  int equal_to_other = 0;
  for (std::uint64_t i = 500; i-- > 0;) {  // backwards: no state is kept between calls
    ASSERT_EQ(offset(one, i), offset(same, i));
    equal_to_other += offset(one, i) == offset(other, i) ? 1 : 0;
  }

  EXPECT_LT(equal_to_other, 10);
  EXPECT_EQ(offset(one, 1ULL << 40), offset(same, 1ULL << 40));
  EXPECT_NE(offset(one, 0), offset(one, 1ULL << 32));
}

TEST_F(ByteCorpusTest, ValidationLimitSpreadsOverTheText) {
  const ByteCorpus all(counting_text(50000), {.positions = 8});
  const ByteCorpus few(counting_text(50000), {.positions = 8, .validation_window_limit = 5});

  ASSERT_EQ(few.validation_windows().size(), 5U);
  const auto count = all.validation_windows().size();
  for (std::size_t i = 0; i < 5; ++i) {
    EXPECT_TRUE(
        std::ranges::equal(few.validation_windows()[i], all.validation_windows()[i * count / 5]));
  }
}

TEST_F(ByteCorpusTest, ReadsFoldersSortedWithoutHiddenBinaryAndLinkedFiles) {
  write("b.txt", "bbbbb");
  write("a/z.txt", "zzzzz");
  write("a/.hidden", "hhhhh");
  write(".git/config", "ggggg");
  write("binary.bin", std::string("ab\0cd", 5));
  write("empty.txt", "");
  fs::create_symlink(folder / "b.txt", folder / "link.txt");

  const ByteCorpus corpus({folder}, {.positions = 1, .validation_fraction = 0.5});

  EXPECT_EQ(corpus.files(),
            (std::vector<fs::path>{folder / "a/z.txt", folder / "b.txt", folder / "empty.txt"}));
  EXPECT_EQ(corpus.bytes(), 10);
}

TEST_F(ByteCorpusTest, ReadsNamedFilesInTheOrderGivenWhateverTheyHold) {
  const fs::path second = write("second.txt", "2222");
  const fs::path binary = write(".binary", std::string("1\0\0\0", 4));

  const ByteCorpus corpus({binary, second}, {.positions = 1, .validation_fraction = 0.5});

  EXPECT_EQ(corpus.files(), (std::vector<fs::path>{binary, second}));
  EXPECT_EQ(corpus.bytes(), 8);
  EXPECT_EQ(corpus.training_runs()[0][0], '1');
}

TEST_F(ByteCorpusTest, MissingInputIsNamed) {
  const auto message = message_of([&] { ByteCorpus({folder / "absent"}, {}); });

  EXPECT_EQ(message, "data::ByteCorpus: " + (folder / "absent").string() +
                         ": expected a file or folder, found nothing there; check the path");
}

TEST_F(ByteCorpusTest, EmptyInputsAreNamed) {
  const fs::path empty = write("empty.txt", "");
  fs::create_directories(folder / "none");

  EXPECT_NE(message_of([&] {
              ByteCorpus({empty}, {});
            }).find("empty.txt: expected text, found an empty file"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              ByteCorpus({folder / "none"}, {});
            }).find("none: expected text, found no text file below it"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              ByteCorpus(std::vector<fs::path>{}, {});
            }).find("expected at least one file or folder, found none"),
            std::string::npos);
}

TEST_F(ByteCorpusTest, TooLittleTextSaysHowMuchIsNeeded) {
  const auto message = message_of([] { ByteCorpus(counting_text(89), {.positions = 8}); });

  EXPECT_EQ(message,
            "data::ByteCorpus: text: expected at least 90 bytes, found 89; give more text, fewer "
            "positions, or a larger validation fraction");
}

TEST_F(ByteCorpusTest, ImpossibleOptionsAreRefused) {
  EXPECT_THROW(ByteCorpus(counting_text(100), {.positions = 0}), std::runtime_error);
  for (const double fraction : {0.0, 0.51, -1.0, 0.0 / 0.0}) {
    EXPECT_THROW(ByteCorpus(counting_text(100), {.positions = 1, .validation_fraction = fraction}),
                 std::runtime_error);
  }
}

}  // namespace
