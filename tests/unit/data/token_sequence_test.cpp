// SPDX-License-Identifier: Apache-2.0
#include "data_files.hpp"

#include <data/file_bytes.hpp>
#include <data/token_sequence.hpp>
#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

namespace {

using data::Token;
using data::TokenFormat;
using data::TokenSequence;
using mics::test::message_of;
using mics::test::npy;
using mics::test::raw;
namespace fs = std::filesystem;

class TokenSequenceTest : public mics::test::DataFiles {};

std::vector<Token> all_of(const TokenSequence& sequence) {
  std::vector<Token> tokens(static_cast<std::size_t>(sequence.count()));
  sequence.read(0, tokens);
  return tokens;
}

TEST_F(TokenSequenceTest, ReadsFoldersSortedWithoutHiddenBinaryAndLinkedFiles) {
  write("b.txt", "bb");
  write("a/z.txt", "zz");
  write("a/.hidden", "hhhhh");
  write(".git/config", "ggggg");
  write("binary.bin", std::string("ab\0cd", 5));
  write("empty.txt", "");
  fs::create_symlink(folder / "b.txt", folder / "link.txt");

  const TokenSequence sequence({folder}, {});

  EXPECT_EQ(sequence.files(),
            (std::vector<fs::path>{folder / "a/z.txt", folder / "b.txt", folder / "empty.txt"}));
  EXPECT_EQ(all_of(sequence), (std::vector<Token>{'z', 'z', 'b', 'b'}));
  EXPECT_STREQ(sequence.unit(), "bytes");
}

TEST_F(TokenSequenceTest, ReadsNamedFilesInTheOrderGivenWhateverTheyHold) {
  const fs::path second = write("second.txt", "2");
  const fs::path binary = write(".binary", std::string("1\0\xff", 3));

  const TokenSequence sequence({binary, second}, {});

  EXPECT_EQ(sequence.files(), (std::vector<fs::path>{binary, second}));
  EXPECT_EQ(all_of(sequence), (std::vector<Token>{'1', 0, 255, '2'}));
}

TEST_F(TokenSequenceTest, ReadsEachFormat) {
  const std::vector<Token> expected = {0, 1, 300, 50303};
  const std::string npy_tail = "', 'fortran_order': False, 'shape': (4,), }";
  const std::vector<std::pair<std::string, TokenFormat>> table = {
      {raw<std::uint16_t>({0, 1, 300, 50303}), TokenFormat::uint16},
      {raw<std::uint32_t>({0, 1, 300, 50303}), TokenFormat::uint32},
      {npy("{'descr': '<u2" + npy_tail, raw<std::uint16_t>({0, 1, 300, 50303})), TokenFormat::npy},
      {npy("{'descr': '<u4" + npy_tail, raw<std::uint32_t>({0, 1, 300, 50303})), TokenFormat::npy},
      {npy("{'descr': '<i4" + npy_tail, raw<std::int32_t>({0, 1, 300, 50303})), TokenFormat::npy},
      {npy("{'descr': '<i8" + npy_tail, raw<std::int64_t>({0, 1, 300, 50303})), TokenFormat::npy}};

  for (const auto& [content, format] : table) {
    const fs::path path = write("tokens", content);
    const TokenSequence sequence({path}, {.format = format, .vocabulary = 50304});
    EXPECT_EQ(all_of(sequence), expected) << name(format);
    EXPECT_STREQ(sequence.unit(), "tokens");
  }
}

TEST_F(TokenSequenceTest, FoldersOfTokensHoldFilesOfTheFormatOnly) {
  write("a.bin", raw<std::uint16_t>({1, 2}));
  write("b/c.bin", raw<std::uint16_t>({3}));
  write("readme.txt", "three");
  write("d.npy", npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1,), }", "\7"));

  const TokenSequence numbers({folder}, {.format = TokenFormat::uint16, .vocabulary = 10});
  const TokenSequence arrays({folder}, {.format = TokenFormat::npy, .vocabulary = 10});

  EXPECT_EQ(all_of(numbers), (std::vector<Token>{1, 2, 3}));
  EXPECT_EQ(all_of(arrays), (std::vector<Token>{7}));
}

TEST_F(TokenSequenceTest, ReadsAcrossFilesFromEveryPosition) {
  std::vector<fs::path> files;
  std::vector<Token> expected;
  for (std::uint16_t f = 0; f < 5; ++f) {
    std::vector<std::uint16_t> part;
    for (std::uint16_t i = 0; i < f; ++i) part.push_back(static_cast<std::uint16_t>(10 * f + i));
    expected.insert(expected.end(), part.begin(), part.end());
    files.push_back(write(std::to_string(f) + ".bin", raw(part)));
  }
  files.erase(files.begin());  // alone it is an error to name an empty file
  const TokenSequence sequence(files, {.format = TokenFormat::uint16, .vocabulary = 100});

  ASSERT_EQ(sequence.count(), 10);
  for (std::size_t begin = 0; begin <= 10; ++begin) {
    for (std::size_t length = 0; begin + length <= 10; ++length) {
      std::vector<Token> part(length);
      sequence.read(static_cast<std::int64_t>(begin), part);
      EXPECT_TRUE(std::equal(part.begin(), part.end(), expected.begin() + std::ptrdiff_t(begin)));
    }
  }
}

TEST_F(TokenSequenceTest, ATokenOutsideTheVocabularyIsNamedWithFileAndPosition) {
  const fs::path first = write("first.bin", raw<std::uint16_t>({1, 2, 3}));
  const fs::path second = write("second.bin", raw<std::uint16_t>({4, 5, 1000, 999}));
  const TokenSequence sequence({first, second},
                               {.format = TokenFormat::uint16, .vocabulary = 1000});
  std::vector<Token> part(2);

  sequence.read(3, part);
  sequence.check({6, 1});

  const std::string expected = second.string() +
                               ": element 2: expected a token below the vocabulary of 1000, found "
                               "1000; raise model.vocabulary, or correct data.format";
  EXPECT_EQ(message_of([&] { sequence.check({0, 7}); }), expected);
  EXPECT_EQ(message_of([&] { sequence.read(4, part); }), expected);
}

TEST_F(TokenSequenceTest, NegativeAndHugeElementsAreNoTokens) {
  const std::string header = "{'descr': '<i8', 'fortran_order': False, 'shape': (2,), }";
  for (const std::int64_t bad :
       {std::int64_t{-1}, INT64_MIN, std::int64_t{1} << 32, INT64_MAX, std::int64_t{256}}) {
    const fs::path path = write("a.npy", npy(header, raw<std::int64_t>({255, bad})));
    const TokenSequence sequence({path}, {.format = TokenFormat::npy, .vocabulary = 256});
    EXPECT_NE(message_of([&] {
                sequence.check({0, 2});
              })
                  .find("element 1: expected a token below the vocabulary of 256, found " +
                        std::to_string(bad)),
              std::string::npos);
  }
}

TEST_F(TokenSequenceTest, LargeFilesAreMappedAndReachBeyondTwoToThe31) {
  constexpr std::int64_t count = (std::int64_t{1} << 31) + 1000;  // holes of a sparse file: zeros
  const fs::path path = folder / "large.bin";
  {
    std::ofstream file(path, std::ios::binary);
    file.seekp((count - 3) * 2);
    file << raw<std::uint16_t>({7, 8, 9});
  }
  TokenSequence moved({path}, {.format = TokenFormat::uint16, .vocabulary = 10});
  const TokenSequence sequence(std::move(moved));
  std::vector<Token> tail(5);

  sequence.read(count - 5, tail);

  EXPECT_EQ(sequence.count(), count);
  EXPECT_EQ(tail, (std::vector<Token>{0, 0, 7, 8, 9}));
  EXPECT_NE(sequence.fingerprint(), 0U);  // by places: the whole would take seconds
}

TEST_F(TokenSequenceTest, FilesOfBothKindsKeepTheirBytesWhenMoved) {
  for (const std::size_t size : {std::size_t{5}, data::FileBytes::mapped_from}) {
    const fs::path path = write("file", std::string(size, 'a'));
    data::FileBytes first(path);
    const data::FileBytes second(std::move(first));

    EXPECT_EQ(second.bytes().size(), size);
    EXPECT_EQ(second.bytes().back(), std::byte{'a'});
    EXPECT_TRUE(first.bytes().empty());  // NOLINT(bugprone-use-after-move)
  }
}

TEST_F(TokenSequenceTest, FingerprintTellsTokensApartWhateverTheirFormat) {
  const fs::path path = write("a.bin", raw<std::uint16_t>({1, 2, 3}));
  const data::SequenceOptions options{.format = TokenFormat::uint16, .vocabulary = 10};
  const auto of = [&](std::vector<Token> tokens) {
    return TokenSequence(std::move(tokens), options).fingerprint();
  };

  EXPECT_EQ(TokenSequence({path}, options).fingerprint(), of({1, 2, 3}));
  EXPECT_NE(of({1, 2, 3}), of({1, 2, 4}));
  EXPECT_NE(of({1, 2, 3}), of({1, 2}));
  EXPECT_NE(of({0, 0}), of({0}));
}

TEST_F(TokenSequenceTest, InputsThatCannotBeUsedAreNamed) {
  const fs::path empty = write("empty.txt", "");
  const fs::path odd = write("odd.bin", "123");
  fs::create_directories(folder / "none");
  const auto refusal = [](const std::vector<fs::path>& inputs, TokenFormat format) {
    return message_of([&] { TokenSequence(inputs, {.format = format, .vocabulary = 10}); });
  };

  EXPECT_EQ(refusal({folder / "absent"}, TokenFormat::bytes),
            (folder / "absent").string() +
                ": expected a file or folder, found nothing there; check the path");
  EXPECT_EQ(refusal({}, TokenFormat::bytes),
            "inputs: expected at least one file or folder, found none; name the text to read");
  EXPECT_NE(refusal({empty}, TokenFormat::bytes).find("expected text, found an empty file"),
            std::string::npos);
  EXPECT_NE(refusal({empty}, TokenFormat::uint16).find("expected tokens, found an empty file"),
            std::string::npos);
  EXPECT_NE(refusal({folder / "none"}, TokenFormat::bytes)
                .find("expected text, found no text file below it"),
            std::string::npos);
  EXPECT_NE(refusal({folder / "none"}, TokenFormat::npy)
                .find("expected tokens, found no npy file below it"),
            std::string::npos);
  EXPECT_EQ(refusal({odd}, TokenFormat::uint16),
            odd.string() +
                ": expected a multiple of 2 bytes, found 3; the file was cut, or data.format is "
                "another");
  EXPECT_NE(refusal({odd}, TokenFormat::npy).find("expected a NumPy array"), std::string::npos);
}

}  // namespace
