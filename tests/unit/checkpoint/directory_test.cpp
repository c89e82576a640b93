// SPDX-License-Identifier: Apache-2.0
#include "stored_model.hpp"
#include <mics/base/error.hpp>

#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <vector>

namespace mics::checkpoint::test {
namespace {

using Steps = std::vector<std::int64_t>;

TEST(Directory, StepNamesComeBack) {
  EXPECT_EQ(step_name(1200), "step-000001200");
  for (const std::int64_t step : {std::int64_t{0}, std::int64_t{7}, std::int64_t{12345678901}}) {
    EXPECT_EQ(parse_step_name(step_name(step)), step);
  }
  for (const char* other : {"step-12", "step-", "step--00000001", "step-0000000012",
                            "step-00000000x", ".tmp-step-000000001", "step-+00000001"}) {
    EXPECT_FALSE(parse_step_name(other)) << other;
  }
}

TEST(Directory, RetentionKeepsTheNewestAndMilestones) {
  const Steps steps{10, 20, 30, 40, 50};
  EXPECT_EQ(steps_to_remove(steps, 50, {}), Steps{});
  EXPECT_EQ(steps_to_remove(steps, 50, {.keep = 2}), (Steps{10, 20, 30}));
  EXPECT_EQ(steps_to_remove(steps, 50, {.keep = 2, .keep_every = 20}), (Steps{10, 30}));
  EXPECT_EQ(steps_to_remove(steps, 50, {.keep = 9}), Steps{});
  // What was just committed stays, also where an abandoned run left later steps.
  EXPECT_EQ(steps_to_remove(steps, 20, {.keep = 1}), (Steps{10}));
}

class DirectoryTest : public testing::Test {
 protected:
  std::filesystem::path save_step(DirectoryWriter& directory, std::int64_t step) {
    StoredState state = describe(odd_model(), {2, 2});
    state.step = step;
    Memory memory(state);
    memory.fill();
    return save(calls_, directory, state, memory);
  }
  SystemCalls& calls_ = SystemCalls::native();
  ScratchFolder scratch_;
  std::vector<std::string> warnings_;
  LogSink log_ = [this](LogLevel, std::string_view line) { warnings_.emplace_back(line); };
};

TEST_F(DirectoryTest, ASecondJobIsRefused) {
  DirectoryWriter first(calls_, scratch_.path(), log_);
  try {
    DirectoryWriter second(calls_, scratch_.path(), log_);
    FAIL();
  } catch (const StateError& error) {
    EXPECT_NE(std::string(error.what()).find("process " + std::to_string(::getpid())),
              std::string::npos)
        << error.what();
  }
}

// Fails if two jobs save there once a user has removed what looked like a leftover.
TEST_F(DirectoryTest, ALockThatWasRemovedIsTakenAgainOrIsAnothers) {
  DirectoryWriter first(calls_, scratch_.path(), log_);
  save_step(first, 1);
  std::filesystem::remove(scratch_.path() / ".lock");
  save_step(first, 2);
  EXPECT_THROW(DirectoryWriter(calls_, scratch_.path(), log_), StateError);

  std::filesystem::remove(scratch_.path() / ".lock");
  {
    DirectoryWriter second(calls_, scratch_.path(), log_);
    save_step(second, 3);
    try {
      save_step(first, 4);
      FAIL();
    } catch (const IoError& error) {
      EXPECT_NE(std::string(error.what()).find("one job that saves there"), std::string::npos)
          << error.what();
    }
    save_step(second, 4);
  }
  save_step(first, 5);
  EXPECT_EQ(list_steps(scratch_.path()), (Steps{5, 4, 3, 2, 1}));
  EXPECT_TRUE(warnings_.empty());
}

TEST_F(DirectoryTest, LeftoversOfAKilledJobAreCleared) {
  {
    DirectoryWriter directory(calls_, scratch_.path(), log_);
    save_step(directory, 3);
    const auto folder = directory.begin(4, "0123456789abcdef");
    std::ofstream(folder / "s0000_r00-01234567.h5") << "half";
  }
  const DirectoryWriter directory(calls_, scratch_.path(), log_);
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(scratch_.path())) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  EXPECT_EQ(names, (std::vector<std::string>{".lock", "step-000000003"}));
  EXPECT_TRUE(warnings_.empty());
}

TEST_F(DirectoryTest, AStepOfTheSameNumberIsReplaced) {
  DirectoryWriter directory(calls_, scratch_.path(), log_);
  const auto before = Checkpoint::open(calls_, save_step(directory, 3)).commit().id;
  const auto after = Checkpoint::open(calls_, save_step(directory, 3)).commit().id;
  EXPECT_NE(before, after);
  EXPECT_EQ(list_steps(scratch_.path()), Steps{3});
}

TEST_F(DirectoryTest, RetentionRemovesOldSteps) {
  DirectoryWriter directory(calls_, scratch_.path(), log_);
  for (const std::int64_t step : {1, 2, 3, 4}) save_step(directory, step);
  directory.retain(4, {.keep = 2});
  EXPECT_EQ(list_steps(scratch_.path()), (Steps{4, 3}));
}

// Fails if removing a step or a leftover removes what a link in its place leads to.
TEST_F(DirectoryTest, LinksAreNotFollowedByWhatRemoves) {
  const std::filesystem::path elsewhere = scratch_.path() / "elsewhere";
  std::filesystem::create_directory(elsewhere);
  {
    DirectoryWriter directory(calls_, scratch_.path(), log_);
    for (const std::int64_t step : {1, 2, 3}) save_step(directory, step);
    for (const std::int64_t step : {1, 2}) {
      const std::filesystem::path here = scratch_.path() / step_name(step);
      std::filesystem::rename(here, elsewhere / step_name(step));
      std::filesystem::create_symlink(elsewhere / step_name(step), here);
    }
    save_step(directory, 2);
    directory.retain(3, {.keep = 1});
  }
  EXPECT_EQ(list_steps(scratch_.path()), Steps{3});
  std::filesystem::create_symlink(elsewhere / step_name(1), scratch_.path() / ".trash-1");
  std::filesystem::create_symlink("nowhere", scratch_.path() / ".tmp-2");
  std::ofstream(scratch_.path() / ".tmp-3") << "a file";
  static_cast<void>(DirectoryWriter(calls_, scratch_.path(), log_));
  for (const char* name : {".trash-1", ".tmp-2", ".tmp-3"}) {
    EXPECT_FALSE(std::filesystem::is_symlink(scratch_.path() / name)) << name;
    EXPECT_FALSE(std::filesystem::exists(scratch_.path() / name)) << name;
  }
  for (const std::int64_t step : {1, 2}) {
    EXPECT_NO_THROW(static_cast<void>(Checkpoint::open(calls_, elsewhere / step_name(step))));
  }
  EXPECT_TRUE(warnings_.empty()) << warnings_.front();
}

TEST_F(DirectoryTest, AStepIsNoDirectoryOfSteps) {
  const auto step = [&] {
    DirectoryWriter directory(calls_, scratch_.path(), log_);
    return save_step(directory, 3);
  }();
  EXPECT_THROW(DirectoryWriter(calls_, step, log_), FormatError);
  EXPECT_FALSE(std::filesystem::exists(step / ".lock"));
}

TEST_F(DirectoryTest, StepsThatAreThereAreNamed) {
  DirectoryWriter directory(calls_, scratch_.path(), log_);
  for (const std::int64_t step : {1, 3}) save_step(directory, step);
  EXPECT_EQ(find_step(scratch_.path(), 3), scratch_.path() / step_name(3));
  try {
    static_cast<void>(find_step(scratch_.path(), 2));
    FAIL();
  } catch (const IoError& error) {
    EXPECT_TRUE(std::string(error.what()).ends_with("there are 3, 1")) << error.what();
  }
}

TEST_F(DirectoryTest, TheNewestStepThatVerifiesIsOpened) {
  DirectoryWriter directory(calls_, scratch_.path(), log_);
  for (const std::int64_t step : {1, 2, 3, 4}) save_step(directory, step);
  std::filesystem::remove(scratch_.path() / step_name(4) / commit_name);
  std::filesystem::resize_file(scratch_.path() / step_name(3) / "manifest.h5", 100);
  const auto checkpoint = open_newest(calls_, scratch_.path(), log_);
  ASSERT_TRUE(checkpoint);
  EXPECT_EQ(checkpoint->state().step, 2);
  ASSERT_EQ(warnings_.size(), 2U);
  EXPECT_NE(warnings_[0].find("step-000000004/COMMIT"), std::string::npos) << warnings_[0];
  EXPECT_NE(warnings_[1].find("step-000000003/manifest.h5"), std::string::npos) << warnings_[1];
}

TEST_F(DirectoryTest, AWatchTellsWhatBecameOfAStep) {
  using Fate = StepWatch::Fate;
  DirectoryWriter directory(calls_, scratch_.path(), log_);
  const auto folder = save_step(directory, 3);
  const StepWatch watch(calls_, folder);
  EXPECT_EQ(watch.fate(), Fate::same);
  save_step(directory, 3);
  EXPECT_EQ(watch.fate(), Fate::replaced);
  const StepWatch again(calls_, folder);
  std::filesystem::resize_file(folder / "manifest.h5", 100);
  EXPECT_EQ(again.fate(), Fate::same);
  std::filesystem::remove(folder / commit_name);
  EXPECT_EQ(again.fate(), Fate::same);
  directory.remove(3);
  EXPECT_EQ(again.fate(), Fate::removed);
  EXPECT_EQ(StepWatch(calls_, folder).fate(), Fate::removed);
  std::filesystem::create_symlink("nowhere", folder);
  EXPECT_EQ(again.fate(), Fate::same);
}

TEST_F(DirectoryTest, ADirectoryWithoutStepsHasNone) {
  EXPECT_FALSE(open_newest(calls_, scratch_.path() / "nowhere", log_));
  EXPECT_FALSE(open_newest(calls_, scratch_.path(), log_));
}

}  // namespace
}  // namespace mics::checkpoint::test
