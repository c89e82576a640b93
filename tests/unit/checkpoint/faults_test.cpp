// SPDX-License-Identifier: Apache-2.0
// Every system call of save, retention and load fails in every way, or the process dies there: a
// committed step stays, nothing crashes, and the next save works.
#include "stored_model.hpp"
#include <mics/base/error.hpp>
#include <mics/checkpoint/verify.hpp>

#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

namespace mics::checkpoint::test {
namespace {

enum class Fault {
  none,
  kill_before,
  kill_after,
  io_error,
  disk_full,            // this call
  disk_full_from_here,  // and all later ones that write
  short_transfer,
  interrupted,
};

constexpr int killed = 77;

// Fails, or ends the process, at one call.
class FaultyCalls : public SystemCalls {
 public:
  FaultyCalls(Fault fault, int at) : fault_(fault), at_(at) {}
  [[nodiscard]] int count() const { return next_; }

  int open(const char* path, int flags, mode_t mode) override {
    return at_call(true, [&] { return SystemCalls::open(path, flags, mode); });
  }
  int close(int descriptor) override {
    // The descriptor is closed whatever the call says.
    return at_call(
        false, [&] { return SystemCalls::close(descriptor); }, true);
  }
  ssize_t pwrite(int descriptor, const void* data, std::size_t bytes, off_t offset) override {
    // Past the page cache the kernel stops at sectors.
    if (fault_ == Fault::short_transfer && next_ == at_ && bytes > 1) {
      bytes = bytes >= 4096 ? bytes / 2 / 512 * 512 : bytes / 2;
    }
    return at_call(true, [&] { return SystemCalls::pwrite(descriptor, data, bytes, offset); });
  }
  ssize_t pread(int descriptor, void* data, std::size_t bytes, off_t offset) override {
    if (fault_ == Fault::short_transfer && next_ == at_ && bytes > 8192) bytes = 4096;
    return at_call(false, [&] { return SystemCalls::pread(descriptor, data, bytes, offset); });
  }
  int fsync(int descriptor) override {
    return at_call(true, [&] { return SystemCalls::fsync(descriptor); });
  }
  int ftruncate(int descriptor, off_t bytes) override {
    return at_call(true, [&] { return SystemCalls::ftruncate(descriptor, bytes); });
  }
  int fallocate(int descriptor, off_t bytes) override {
    return at_call(true, [&] { return SystemCalls::fallocate(descriptor, bytes); });
  }
  int flock(int descriptor, int operation) override {
    return at_call(false, [&] { return SystemCalls::flock(descriptor, operation); });
  }
  int fstat(int descriptor, struct ::stat* status) override {
    return at_call(false, [&] { return SystemCalls::fstat(descriptor, status); });
  }
  int stat(const char* path, struct ::stat* status) override {
    return at_call(false, [&] { return SystemCalls::stat(path, status); });
  }
  int mkdir(const char* path, mode_t mode) override {
    return at_call(true, [&] { return SystemCalls::mkdir(path, mode); });
  }
  int rename(const char* from, const char* to) override {
    return at_call(true, [&] { return SystemCalls::rename(from, to); });
  }
  int rename_new(const char* from, const char* to) override {
    return at_call(true, [&] { return SystemCalls::rename_new(from, to); });
  }
  int exchange(const char* from, const char* to) override {
    return at_call(true, [&] { return SystemCalls::exchange(from, to); });
  }
  int unlink(const char* path) override {
    return at_call(false, [&] { return SystemCalls::unlink(path); });
  }
  int rmdir(const char* path) override {
    return at_call(false, [&] { return SystemCalls::rmdir(path); });
  }

 private:
  template <class Call>
  auto at_call(bool writes, Call&& call, bool always = false) -> decltype(call()) {
    const int here = next_++;
    const bool hit = here == at_ || (fault_ == Fault::disk_full_from_here && here > at_ && writes);
    if (!hit || fault_ == Fault::none || fault_ == Fault::short_transfer) return call();
    if (fault_ == Fault::kill_before) ::_exit(killed);
    if (fault_ == Fault::kill_after || always) {
      const auto result = call();
      if (fault_ == Fault::kill_after) ::_exit(killed);
      if (result != 0) return result;
    }
    errno = fault_ == Fault::io_error ? EIO : fault_ == Fault::interrupted ? EINTR : ENOSPC;
    return -1;
  }
  Fault fault_;
  int at_;
  std::atomic<int> next_ = 0;
};

// Every call where time allows (MICS_EXHAUSTIVE), else every 4th, each fault beginning at another.
int stride() { return std::getenv("MICS_EXHAUSTIVE") != nullptr ? 1 : 4; }

class Faults : public testing::Test {
 protected:
  Faults() {
    Model model;
    const UnitId unit = model.unit("unit");
    model.parameter(unit, "a", {31, 170});
    model.parameter(unit, "b", {40}, {.dtype = DType::bf16, .trainable = false});
    state_ = describe(model, {2, 2});
  }

  void save_step(SystemCalls& calls, const std::filesystem::path& path, std::int64_t step,
                 const Retention& retention = {}) {
    StoredState state = state_;
    state.step = step;
    Memory memory(state);
    memory.fill();
    DirectoryWriter directory(calls, path, {});
    save(calls, directory, state, memory);
    directory.retain(step, retention);
  }

  // The newest step that loads, with every byte as it was saved.
  std::int64_t loaded_step(SystemCalls& calls, const std::filesystem::path& path) {
    const auto checkpoint = open_newest(calls, path, {});
    if (!checkpoint) return -1;
    Memory expected(state_);
    expected.fill();
    Memory loaded(state_);
    for (int tau = 0; tau < 2; ++tau) {
      checkpoint->read(state_, loaded.parts<std::byte>(tau, 0, 1));
    }
    EXPECT_TRUE(loaded == expected);
    return checkpoint->state().step;
  }

  // Exit status of a child that runs `action`: 0, 1 if it threw an Error, or what else it came to.
  static int in_child(const std::function<void()>& action) {
    const pid_t child = ::fork();
    if (child == 0) {
      try {
        action();
      } catch (const Error&) {
        ::_exit(1);
      } catch (...) {
        ::_exit(2);
      }
      ::_exit(0);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
  }

  ScratchFolder scratch_;
  StoredState state_;
};

TEST_F(Faults, AtEveryCallOfASaveTheStepBeforeStays) {
  const auto trial = scratch_.path() / "trial";
  save_step(SystemCalls::native(), trial, 1);
  FaultyCalls counting(Fault::none, 0);
  save_step(counting, trial, 2, {.keep = 1});
  const int calls = counting.count();
  EXPECT_GT(calls, 40);
  int runs = 0;
  for (const Fault fault :
       {Fault::kill_before, Fault::kill_after, Fault::io_error, Fault::disk_full,
        Fault::disk_full_from_here, Fault::short_transfer, Fault::interrupted}) {
    for (int at = static_cast<int>(fault) % stride(); at < calls; at += stride(), ++runs) {
      SCOPED_TRACE("fault " + std::to_string(static_cast<int>(fault)) + " at call " +
                   std::to_string(at));
      std::filesystem::remove_all(trial);
      save_step(SystemCalls::native(), trial, 1);
      const int status = in_child([&] {
        FaultyCalls faulty(fault, at);
        save_step(faulty, trial, 2, {.keep = 1});
      });
      const bool kill = fault == Fault::kill_before || fault == Fault::kill_after;
      ASSERT_TRUE(status == 0 || status == (kill ? killed : 1)) << status;
      if (fault == Fault::interrupted || fault == Fault::short_transfer) {
        ASSERT_EQ(status, 0);
      }
      const std::int64_t step = loaded_step(SystemCalls::native(), trial);
      ASSERT_TRUE(step == 1 || step == 2) << step;
      if (status == 0) {
        ASSERT_EQ(step, 2);
      }
      // What is left does not stand in the way, and is cleared.
      save_step(SystemCalls::native(), trial, 3);
      ASSERT_EQ(loaded_step(SystemCalls::native(), trial), 3);
      for (const std::int64_t left : list_steps(trial)) {
        ASSERT_TRUE(verify(SystemCalls::native(), trial / step_name(left)).empty());
      }
      for (const auto& entry : std::filesystem::directory_iterator(trial)) {
        const std::string name = entry.path().filename().string();
        ASSERT_TRUE(name == ".lock" || parse_step_name(name)) << name;
      }
    }
  }
  RecordProperty("runs", runs);
}

TEST_F(Faults, AtEveryCallOfReplacingAStepOneOfTheTwoIsThere) {
  const auto trial = scratch_.path() / "trial";
  FaultyCalls counting(Fault::none, 0);
  save_step(SystemCalls::native(), trial, 2);
  save_step(counting, trial, 2);
  for (const Fault fault : {Fault::kill_before, Fault::kill_after, Fault::io_error}) {
    for (int at = static_cast<int>(fault) % stride(); at < counting.count(); at += stride()) {
      SCOPED_TRACE("fault " + std::to_string(static_cast<int>(fault)) + " at call " +
                   std::to_string(at));
      const int status = in_child([&] {
        FaultyCalls faulty(fault, at);
        save_step(faulty, trial, 2);
      });
      ASSERT_LE(status, killed);
      ASSERT_EQ(loaded_step(SystemCalls::native(), trial), 2);
    }
  }
}

TEST_F(Faults, AtEveryCallOfALoadItIsRightOrAnError) {
  const auto trial = scratch_.path() / "trial";
  save_step(SystemCalls::native(), trial, 1);
  save_step(SystemCalls::native(), trial, 2);
  FaultyCalls counting(Fault::none, 0);
  ASSERT_EQ(loaded_step(counting, trial), 2);
  for (const Fault fault :
       {Fault::io_error, Fault::disk_full, Fault::short_transfer, Fault::interrupted}) {
    for (int at = 0; at < counting.count(); ++at) {
      SCOPED_TRACE("fault " + std::to_string(static_cast<int>(fault)) + " at call " +
                   std::to_string(at));
      FaultyCalls faulty(fault, at);
      try {
        const std::int64_t step = loaded_step(faulty, trial);
        EXPECT_TRUE(step == 1 || step == 2) << step;
        if (fault == Fault::interrupted || fault == Fault::short_transfer) {
          EXPECT_EQ(step, 2);
        }
      } catch (const Error& error) {
        EXPECT_TRUE(fault == Fault::io_error || fault == Fault::disk_full) << error.what();
      }
    }
  }
}

TEST_F(Faults, AFullFileSystemIsACleanError) {
  const auto mount = scratch_.path() / "small";
  std::filesystem::create_directory(mount);
  int failed = 0;
  int saved = 0;
  for (int pages = 20; pages <= 140; pages += 4) {
    if (::mount("tmpfs", mount.c_str(), "tmpfs", 0,
                ("size=" + std::to_string(pages * 4) + "k").c_str()) != 0) {
      GTEST_SKIP() << "mounting a small tmpfs is not allowed here";
    }
    const auto trial = mount / "run";
    int first = 1;
    int second = 1;
    std::int64_t step = -1;
    first = in_child([&] { save_step(SystemCalls::native(), trial, 1); });
    if (first == 0) second = in_child([&] { save_step(SystemCalls::native(), trial, 2); });
    if (first == 0) step = loaded_step(SystemCalls::native(), trial);
    const int unmounted = ::umount2(mount.c_str(), MNT_DETACH);
    EXPECT_EQ(unmounted, 0);
    ASSERT_LE(first, 1);
    ASSERT_LE(second, 1);
    if (first == 0) {
      ASSERT_EQ(step, second == 0 ? 2 : 1);
    }
    ++(second == 0 ? saved : failed);
  }
  EXPECT_GT(failed, 0);
  EXPECT_GT(saved, 0);
}

TEST_F(Faults, AReadOnlyFileSystemIsACleanErrorThatNamesTheDirectory) {
  const auto mount = scratch_.path() / "readonly";
  std::filesystem::create_directory(mount);
  if (::mount("tmpfs", mount.c_str(), "tmpfs", MS_RDONLY, nullptr) != 0) {
    GTEST_SKIP() << "mounting a read-only tmpfs is not allowed here";
  }
  try {
    save_step(SystemCalls::native(), mount / "run", 1);
    ADD_FAILURE() << "it was saved";
  } catch (const IoError& error) {
    EXPECT_NE(std::string(error.what()).find("readonly/run"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("Read-only"), std::string::npos) << error.what();
  }
  ::umount2(mount.c_str(), MNT_DETACH);
}

TEST_F(Faults, LimitsOfTheProcessAreCleanErrors) {
  const auto trial = scratch_.path() / "trial";
  save_step(SystemCalls::native(), trial, 1);
  const auto limited = [&](auto resource, rlim_t limit) {
    return in_child([&] {
      std::signal(SIGXFSZ, SIG_IGN);  // an application that does not ignore it is ended by it
      const rlimit limits{limit, limit};
      if (::setrlimit(resource, &limits) != 0) ::_exit(3);
      save_step(SystemCalls::native(), trial, 2);
    });
  };
  EXPECT_EQ(limited(RLIMIT_FSIZE, 5000), 1);
  EXPECT_EQ(limited(RLIMIT_NOFILE, 4), 1);
  EXPECT_EQ(loaded_step(SystemCalls::native(), trial), 1);
}

TEST_F(Faults, ADirectoryThatVanishesIsACleanError) {
  const auto trial = scratch_.path() / "trial";
  Memory memory(state_);
  memory.fill();
  DirectoryWriter directory(SystemCalls::native(), trial, {});
  std::filesystem::remove_all(trial);
  EXPECT_THROW(static_cast<void>(save(SystemCalls::native(), directory, state_, memory)), IoError);
}

}  // namespace
}  // namespace mics::checkpoint::test
