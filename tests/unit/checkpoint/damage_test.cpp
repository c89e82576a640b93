// SPDX-License-Identifier: Apache-2.0
// Damage of every kind at every byte, found by name before anything is used.
#include "stored_model.hpp"
#include <mics/base/error.hpp>
#include <mics/checkpoint/verify.hpp>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace mics::checkpoint::test {
namespace {

// Shows a file other than it is on the disk.
class LyingDisk : public SystemCalls {
 public:
  std::string name;               // of the file
  std::int64_t flip = -1;         // the byte of which a bit is flipped
  std::int64_t end = INT64_MAX;   // where the file ends
  std::int64_t zero = INT64_MAX;  // where 4 KiB of zeros begin

  int open(const char* path, int flags, mode_t mode) override {
    const int descriptor = SystemCalls::open(path, flags & ~O_DIRECT, mode);
    const std::lock_guard lock(mutex_);
    lying_[descriptor] = std::string_view(path).ends_with('/' + name);
    return descriptor;
  }
  int fstat(int descriptor, struct ::stat* status) override {
    const int result = SystemCalls::fstat(descriptor, status);
    if (lies(descriptor)) status->st_size = std::min<off_t>(status->st_size, end);
    return result;
  }
  ssize_t pread(int descriptor, void* data, std::size_t bytes, off_t offset) override {
    if (!lies(descriptor)) return SystemCalls::pread(descriptor, data, bytes, offset);
    const std::int64_t most = std::max<std::int64_t>(0, end - offset);
    const ssize_t done = SystemCalls::pread(
        descriptor, data, std::min(bytes, static_cast<std::size_t>(most)), offset);
    auto* const text = static_cast<unsigned char*>(data);
    for (std::int64_t i = 0; i < done; ++i) {
      const std::int64_t at = offset + i;
      if (at == flip) text[i] = static_cast<unsigned char>(text[i] ^ (1 << (at % 8)));
      if (at >= zero && at < zero + 4096) text[i] = 0;
    }
    return done;
  }

 private:
  bool lies(int descriptor) {
    const std::lock_guard lock(mutex_);
    return lying_[descriptor];
  }
  std::mutex mutex_;
  std::map<int, bool> lying_;
};

// The bytes that are damaged, one after the other: every one where time allows (MICS_EXHAUSTIVE is
// 1), or those of slice I of N (it is I/N), else some: still all of HDF5's structures.
struct Bytes {
  std::int64_t first = 0;
  std::int64_t stride = 1;

  static Bytes chosen() {
    if (const char* const slice = std::getenv("MICS_EXHAUSTIVE")) {
      Bytes bytes;
      char end = '\0';
      const int words = std::sscanf(slice, "%ld/%ld%c", &bytes.first, &bytes.stride, &end);
      if (words == 2 && bytes.stride > 0 && bytes.first >= 0) return bytes;
      return {};
    }
#ifdef __SANITIZE_ADDRESS__
    return {.stride = 53};
#else
    return {.stride = 13};
#endif
  }
};

std::string contents(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void put(const std::filesystem::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

class Damage : public testing::Test {
 protected:
  Damage() {
    Model model;
    const UnitId unit = model.unit("unit");
    model.parameter(unit, "a", {31, 17});
    model.parameter(unit, "b", {40}, {.dtype = DType::bf16, .trainable = false});
    state_ = describe(model, {2, 2});
    Memory memory(state_);
    memory.fill();
    DirectoryWriter directory(SystemCalls::native(), scratch_.path(), {});
    folder_ = save(SystemCalls::native(), directory, state_, memory);
    state_.step = 13;
    other_ = save(SystemCalls::native(), directory, state_, memory);
    const Checkpoint checkpoint = Checkpoint::open(SystemCalls::native(), folder_);
    for (const CommittedFile& file : checkpoint.commit().files) {
      files_.push_back(file.name);
    }
    files_.emplace_back(commit_name);
  }

  // Loads everything; true if nothing was wrong with it.
  bool loads(SystemCalls& calls, std::string& what) {
    try {
      const Checkpoint checkpoint = Checkpoint::open(calls, folder_);
      Memory memory(state_);
      for (int tau = 0; tau < 2; ++tau) checkpoint.read(state_, memory.parts<std::byte>(tau, 0, 1));
      return true;
    } catch (const Error& error) {
      what = error.what();
      return false;
    }
  }

  void expect_found(LyingDisk& disk) {
    std::string what;
    EXPECT_FALSE(loads(disk, what)) << disk.name << ' ' << disk.flip << ' ' << disk.end;
    EXPECT_NE(what.find(disk.name), std::string::npos) << what;
    EXPECT_EQ(what.find("libhdf5"), std::string::npos) << "it was parsed: " << what;
    const std::vector<std::string> problems = verify(disk, folder_);
    ASSERT_FALSE(problems.empty());
    EXPECT_NE(problems.front().find(disk.name), std::string::npos) << problems.front();
  }

  // The same for files that are damaged on the disk.
  void expect_found(const std::string& name, const std::string& why) {
    std::string what;
    EXPECT_FALSE(loads(SystemCalls::native(), what)) << name << ' ' << why;
    EXPECT_NE(what.find(name), std::string::npos) << why << ": " << what;
    EXPECT_EQ(what.find("libhdf5"), std::string::npos) << "it was parsed: " << what;
    const std::vector<std::string> found = problems();
    ASSERT_FALSE(found.empty()) << name << ' ' << why;
    EXPECT_NE(found.front().find(name), std::string::npos) << found.front();
  }

  std::vector<std::string> problems() { return verify(SystemCalls::native(), folder_); }

  ScratchFolder scratch_;
  StoredState state_;
  std::filesystem::path folder_;
  std::filesystem::path other_;  // the next step
  std::vector<std::string> files_;
};

TEST_F(Damage, ASoundStepHasNone) {
  EXPECT_EQ(problems(), std::vector<std::string>{});
  std::string what;
  EXPECT_TRUE(loads(SystemCalls::native(), what)) << what;
}

TEST_F(Damage, AFlippedBitAnywhereIsFoundByName) {
  const auto [first, stride] = Bytes::chosen();
  for (const std::string& name : files_) {
    LyingDisk disk;
    disk.name = name;
    const auto bytes = static_cast<std::int64_t>(std::filesystem::file_size(folder_ / name));
    for (disk.flip = first; disk.flip < bytes && !HasFailure(); disk.flip += stride)
      expect_found(disk);
  }
}

TEST_F(Damage, ACutAnywhereIsFoundByName) {
  const auto [first, stride] = Bytes::chosen();
  for (const std::string& name : files_) {
    LyingDisk disk;
    disk.name = name;
    const auto bytes = static_cast<std::int64_t>(std::filesystem::file_size(folder_ / name));
    for (disk.end = first; disk.end < bytes && !HasFailure(); disk.end += stride)
      expect_found(disk);
  }
}

TEST_F(Damage, AWindowOfZerosIsFoundByName) {
  for (const std::string& name : files_) {
    LyingDisk disk;
    disk.name = name;
    const std::string text = contents(folder_ / name);
    for (disk.zero = 0; disk.zero < std::ssize(text); disk.zero += 512) {
      const std::string window = text.substr(static_cast<std::size_t>(disk.zero), 4096);
      if (window.find_first_not_of('\0') == std::string::npos) continue;  // no change
      expect_found(disk);
    }
  }
}

// As the disk has it, past the page cache: flips, cuts, what was appended, pages in each other's
// place, and a page that the other save left there.
TEST_F(Damage, DamageOnTheDiskIsFoundByName) {
  constexpr std::size_t page = 4096;
  const Commit other = Checkpoint::open(SystemCalls::native(), other_).commit();
  for (std::size_t f = 0; f < files_.size(); ++f) {
    const std::string& name = files_[f];
    const std::string sound = contents(folder_ / name);
    const auto expect_text_found = [&](const std::string& text, const std::string& why) {
      if (text == sound) return;
      put(folder_ / name, text);
      expect_found(name, why);
    };
    for (std::size_t at = f; at < sound.size(); at += sound.size() / 7 + 1) {
      std::string text = sound;
      text[at] = static_cast<char>(text[at] ^ 0x10);
      expect_text_found(text, "bit of byte " + std::to_string(at));
      expect_text_found(sound.substr(0, at), "cut at " + std::to_string(at));
    }
    expect_text_found(sound + '\0', "a byte more");
    expect_text_found("", "empty");
    const bool is_commit = name == commit_name;
    const std::string stale =
        contents(other_ / (is_commit ? name : other.files[f].name)).substr(0, sound.size());
    for (std::size_t at = 0; at + 2 * page <= sound.size(); at += page) {
      std::string text = sound;
      text.replace(at, page, sound, at + page, page);
      text.replace(at + page, page, sound, at, page);
      expect_text_found(text, "pages exchanged at " + std::to_string(at));
      text = sound;
      text.replace(at, page, stale, at, page);
      expect_text_found(text, "a stale page at " + std::to_string(at));
    }
    put(folder_ / name, sound);
  }
  EXPECT_EQ(problems(), std::vector<std::string>{});
}

// Any file of this step or the next in the place of any other.
TEST_F(Damage, AFileInThePlaceOfAnotherIsNamed) {
  const Commit other = Checkpoint::open(SystemCalls::native(), other_).commit();
  std::map<std::string, std::string> texts;
  for (const std::string& name : files_) texts[name] = contents(folder_ / name);
  texts["the next COMMIT"] = contents(other_ / commit_name);
  for (const CommittedFile& file : other.files) {
    texts["the next " + file.name] = contents(other_ / file.name);
  }
  int tried = 0;
  for (const std::string& name : files_) {
    for (const auto& [from, text] : texts) {
      if (text == texts[name]) continue;
      put(folder_ / name, text);
      expect_found(name, from);
      ++tried;
    }
    put(folder_ / name, texts[name]);
  }
  EXPECT_EQ(tried, 4 * 7);
  EXPECT_EQ(problems(), std::vector<std::string>{});
}

// COMMIT and manifest of one step, pieces of another.
TEST_F(Damage, StepsThatAreMixedAreRefused) {
  const Commit other = Checkpoint::open(SystemCalls::native(), other_).commit();
  for (const char* name : {"COMMIT", "manifest.h5"}) {
    std::filesystem::copy_file(folder_ / name, other_ / name,
                               std::filesystem::copy_options::overwrite_existing);
  }
  std::filesystem::rename(other_, folder_.parent_path() / "copy");
  try {
    static_cast<void>(Checkpoint::open(SystemCalls::native(), folder_.parent_path() / "copy"));
    ADD_FAILURE() << "it was opened";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(files_[1]), std::string::npos) << error.what();
  }
}

// What is no file: nothing waits for a pipe's writer or follows a link for ever.
TEST_F(Damage, WhatIsNoFileIsNamed) {
  for (const std::string& name : files_) {
    const auto path = folder_ / name;
    const auto away = scratch_.path() / "away";
    std::filesystem::rename(path, away);
    ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
    expect_found(name, "a pipe");
    std::filesystem::remove(path);
    std::filesystem::create_directory(path);
    expect_found(name, "a folder");
    std::filesystem::remove(path);
    std::filesystem::create_symlink(path, path);
    expect_found(name, "a link to itself");
    std::filesystem::remove(path);
    std::filesystem::create_symlink("/dev/zero", path);
    expect_found(name, "a device");
    std::filesystem::remove(path);
    std::filesystem::rename(away, path);
  }
}

TEST_F(Damage, ADamagedStepCostsAWarningAndTheOneBeforeIsTaken) {
  const Commit other = Checkpoint::open(SystemCalls::native(), other_).commit();
  for (const char* name : {"COMMIT", "manifest.h5"}) {
    std::string text = contents(other_ / name);
    text[text.size() / 2] = static_cast<char>(text[text.size() / 2] ^ 1);
    put(other_ / name, text);
    std::vector<std::string> warnings;
    const auto taken =
        open_newest(SystemCalls::native(), other_.parent_path(),
                    [&](LogLevel, std::string_view line) { warnings.emplace_back(line); });
    ASSERT_TRUE(taken);
    EXPECT_EQ(taken->state().step, 12);
    ASSERT_EQ(warnings.size(), 1U);
    EXPECT_NE(warnings[0].find(name), std::string::npos) << warnings[0];
    text[text.size() / 2] = static_cast<char>(text[text.size() / 2] ^ 1);
    put(other_ / name, text);
  }
}

TEST_F(Damage, AMissingFileIsNamed) {
  for (const std::string& name : files_) {
    const auto away = scratch_.path() / "away";
    std::filesystem::rename(folder_ / name, away);
    std::string what;
    EXPECT_FALSE(loads(SystemCalls::native(), what));
    EXPECT_NE(what.find(name), std::string::npos) << what;
    EXPECT_NE(problems().front().find(name), std::string::npos);
    std::filesystem::rename(away, folder_ / name);
  }
}

TEST_F(Damage, ExchangedPiecesAreNamed) {
  const auto away = scratch_.path() / "away";
  std::filesystem::rename(folder_ / files_[1], away);
  std::filesystem::rename(folder_ / files_[2], folder_ / files_[1]);
  std::filesystem::rename(away, folder_ / files_[2]);
  std::string what;
  EXPECT_FALSE(loads(SystemCalls::native(), what));
  const std::vector<std::string> found = problems();
  ASSERT_EQ(found.size(), 2U);
  EXPECT_NE(found[0].find("which is what " + files_[2] + " holds"), std::string::npos) << found[0];
  EXPECT_NE(found[1].find("which is what " + files_[1] + " holds"), std::string::npos) << found[1];
}

TEST_F(Damage, ADuplicatedPieceIsNamed) {
  std::filesystem::copy_file(folder_ / files_[1], folder_ / files_[2],
                             std::filesystem::copy_options::overwrite_existing);
  std::string what;
  EXPECT_FALSE(loads(SystemCalls::native(), what));
  ASSERT_EQ(problems().size(), 1U);
  EXPECT_NE(problems()[0].find("which is what " + files_[1] + " holds"), std::string::npos);
}

TEST_F(Damage, AForeignPieceIsNamed) {
  // The same state, another save: only names in its metadata differ.
  const Commit other = Checkpoint::open(SystemCalls::native(), other_).commit();
  std::filesystem::copy_file(other_ / other.files[1].name, folder_ / files_[1],
                             std::filesystem::copy_options::overwrite_existing);
  std::string what;
  EXPECT_FALSE(loads(SystemCalls::native(), what));
  EXPECT_NE(what.find(files_[1]), std::string::npos) << what;
  ASSERT_EQ(problems().size(), 1U);
  EXPECT_NE(problems()[0].find(files_[1]), std::string::npos);
}

TEST_F(Damage, AFileTooManyIsNamed) {
  std::ofstream(folder_ / "notes.txt") << "mine";
  std::string what;
  EXPECT_TRUE(loads(SystemCalls::native(), what)) << what;
  ASSERT_EQ(problems().size(), 1U);
  EXPECT_NE(problems()[0].find("notes.txt"), std::string::npos);
}

TEST_F(Damage, AnotherStepsFilesUnderThisNameAreRefused) {
  std::filesystem::remove_all(folder_);
  std::filesystem::copy(other_, folder_);
  std::string what;
  EXPECT_FALSE(loads(SystemCalls::native(), what));
  EXPECT_NE(what.find("expected step 12, found step 13"), std::string::npos) << what;
}

}  // namespace
}  // namespace mics::checkpoint::test
