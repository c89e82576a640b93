// SPDX-License-Identifier: Apache-2.0
// Engines that save and load where they cannot: a full disk, a folder that nobody can write to, one
// that vanishes, limits of the process, another job's folder. Every rank throws the same, the
// engine goes on, and what was committed stays.
#include "toy.hpp"
#include <mics/checkpoint/directory.hpp>
#include <mics/checkpoint/file_system.hpp>
#include <mics/checkpoint/verify.hpp>
#include <mics/mics.hpp>
#include <support/shared_folder.hpp>

#include <gtest/gtest.h>
#include <mpi.h>
#include <sys/mount.h>
#include <sys/resource.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace mics::test {
namespace {

namespace fs = std::filesystem;

/// A file system of its own that all ranks of the job see. Collective over the job.
class Mount {
 public:
  Mount(const std::string& path, unsigned long flags, const std::string& options) : path_(path) {
    if (job_rank() == 0) {
      fs::create_directory(path);
      mounted_ = ::mount("tmpfs", path.c_str(), "tmpfs", flags, options.c_str()) == 0 ? 1 : 0;
    }
    MPI_Bcast(&mounted_, 1, MPI_INT, 0, MPI_COMM_WORLD);
  }
  Mount(const Mount&) = delete;
  Mount& operator=(const Mount&) = delete;
  ~Mount() {
    MPI_Barrier(MPI_COMM_WORLD);
    if (job_rank() == 0 && mounted_ == 1) ::umount2(path_.c_str(), MNT_DETACH);
    MPI_Barrier(MPI_COMM_WORLD);
  }
  [[nodiscard]] bool mounted() const { return mounted_ == 1; }

 private:
  std::string path_;
  int mounted_ = 0;
};

/// Fewer files, or smaller ones, than this process has now.
class Limit {
 public:
  using Resource = decltype(RLIMIT_NOFILE);  // an enumeration in glibc, elsewhere an int

  Limit(Resource resource, rlim_t limit) : resource_(resource) {
    signal_ = std::signal(SIGXFSZ, SIG_IGN);  // which ends an application that does not ignore it
    ::getrlimit(resource_, &before_);
    const rlimit lower{limit, before_.rlim_max};
    EXPECT_EQ(::setrlimit(resource_, &lower), 0);
  }
  Limit(const Limit&) = delete;
  Limit& operator=(const Limit&) = delete;
  ~Limit() {
    ::setrlimit(resource_, &before_);
    std::signal(SIGXFSZ, signal_);
  }

 private:
  Resource resource_;
  rlimit before_{};
  void (*signal_)(int) = SIG_DFL;
};

Config environment_config() {
  Config config = toy_config();
  config.optimizer = {.kind = OptimizerKind::sgd, .learning_rate = 0.25, .momentum = 0.5};
  return config;
}

/// The text of what an action throws, an IoError, the same on every rank; empty if nothing.
std::string io_error_of(const std::function<void()>& action) {
  std::string text;
  try {
    action();
  } catch (const IoError& error) {
    text = error.what();
    EXPECT_EQ(text.find('\n'), std::string::npos) << text;
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another class: " << error.what();
  }
  std::array<char, 4096> of_root{};
  text.copy(of_root.data(), of_root.size() - 1);
  MPI_Bcast(of_root.data(), static_cast<int>(of_root.size()), MPI_CHAR, 0, MPI_COMM_WORLD);
  EXPECT_EQ(text, of_root.data());
  return text;
}

void expect_names(const std::string& error, const std::vector<std::string>& parts) {
  for (const std::string& part : parts) {
    EXPECT_NE(error.find(part), std::string::npos) << "no \"" << part << "\" in: " << error;
  }
}

/// All steps of a directory are sound. Collective: nobody reads while others still write.
void expect_sound(const std::string& directory, const std::vector<std::int64_t>& steps) {
  MPI_Barrier(MPI_COMM_WORLD);
  EXPECT_EQ(checkpoint::list_steps(directory), steps);
  for (const std::int64_t step : steps) {
    EXPECT_EQ(checkpoint::verify(checkpoint::SystemCalls::native(),
                                 fs::path(directory) / checkpoint::step_name(step)),
              std::vector<std::string>{});
  }
  MPI_Barrier(MPI_COMM_WORLD);
}

class EngineEnvironment : public testing::Test {
 protected:
  void step() { (void)toy_step(engine_, toy_, 1); }

  void save(bool asynchronous) {
    engine_.save(directory_, {.asynchronous = asynchronous});
    if (asynchronous) (void)engine_.wait_for_save();
  }

  /// A step is saved; then both kinds of save fail as `disturbance` makes them, and the engine goes
  /// on: it holds what it held, saves once the disturbance is over, and loads.
  template <class Disturbance>
  void expect_failures(const Disturbance& disturbance, const std::vector<std::string>& parts) {
    step();
    save(false);
    const std::vector<double> first = all_values(engine_);
    step();
    const std::vector<double> values = all_values(engine_);
    for (const bool asynchronous : {false, true}) {
      SCOPED_TRACE(asynchronous ? "asynchronous" : "synchronous");
      std::string error;
      {
        const auto until_the_end = disturbance();
        error = io_error_of([&] { save(asynchronous); });
        MPI_Barrier(MPI_COMM_WORLD);
      }
      expect_names(error, parts);
      EXPECT_EQ(all_values(engine_), values);
    }
    expect_sound(directory_, {1});
    Engine other(MPI_COMM_WORLD, toy_.model, environment_config());
    EXPECT_EQ(other.load(directory_)->step, 1);
    EXPECT_EQ(all_values(other), first);
    save(false);
    expect_sound(directory_, {2, 1});
    EXPECT_EQ(engine_.load(directory_)->step, 2);
    EXPECT_EQ(all_values(engine_), values);
  }

  Toy toy_;
  SharedFolder folder_;
  Engine engine_{MPI_COMM_WORLD, toy_.model, environment_config()};
  std::string directory_ = folder_.in("run");
};

TEST_F(EngineEnvironment, AFullDiskCostsTheStepThatDoesNotFit) {
  // Room for the manifest and pieces of one save, not of two.
  const Mount mount(folder_.in("small"), 0, "size=512k");
  if (!mount.mounted()) GTEST_SKIP() << "mounting a small file system is not allowed here";
  directory_ = folder_.in("small") + "/run";
  std::vector<std::int64_t> saved;
  std::string error;
  for (int i = 1; i <= 40 && error.empty(); ++i) {
    step();
    error = io_error_of([&] { save(i % 2 == 0); });
    if (error.empty()) saved.insert(saved.begin(), i);
  }
  expect_names(error, {"No space left", "small/run"});
  ASSERT_FALSE(saved.empty());
  expect_sound(directory_, saved);
  const std::vector<double> values = all_values(engine_);
  // Room again: the same state is saved after all.
  MPI_Barrier(MPI_COMM_WORLD);
  if (job_rank() == 0) {
    fs::remove_all(fs::path(directory_) / checkpoint::step_name(saved.back()));
  }
  MPI_Barrier(MPI_COMM_WORLD);
  if (saved.size() > 1) {
    saved.pop_back();
    save(false);
    EXPECT_EQ(engine_.load(directory_)->step, saved.front() + 1);
    EXPECT_EQ(all_values(engine_), values);
  }
}

TEST_F(EngineEnvironment, AReadOnlyFileSystemIsNamedAndLoads) {
  const std::string path = folder_.in("readonly");
  const Mount mount(path, 0, "size=8m");
  if (!mount.mounted()) GTEST_SKIP() << "mounting a small file system is not allowed here";
  directory_ = path + "/run";
  step();
  save(false);
  const std::vector<double> values = all_values(engine_);
  int read_only = 0;
  if (job_rank() == 0) {
    read_only = ::mount("tmpfs", path.c_str(), "tmpfs", MS_REMOUNT | MS_RDONLY, nullptr);
  }
  MPI_Bcast(&read_only, 1, MPI_INT, 0, MPI_COMM_WORLD);
  if (read_only != 0) {
    // A file that is open for writing is in the way: another engine has none.
    step();
    engine_.save(folder_.in("elsewhere"));
    if (job_rank() == 0) {
      read_only = ::mount("tmpfs", path.c_str(), "tmpfs", MS_REMOUNT | MS_RDONLY, nullptr);
    }
    MPI_Bcast(&read_only, 1, MPI_INT, 0, MPI_COMM_WORLD);
  }
  ASSERT_EQ(read_only, 0);
  for (const bool asynchronous : {false, true}) {
    expect_names(io_error_of([&] { save(asynchronous); }), {"readonly/run", "Read-only"});
    expect_names(io_error_of([&] { engine_.claim_directory(path + "/other"); }),
                 {"readonly/other", "Read-only"});
  }
  EXPECT_EQ(engine_.load(directory_)->step, 1);
  EXPECT_EQ(all_values(engine_), values);
  directory_ = folder_.in("run");
  step();
  save(false);
  expect_sound(directory_, {2});
}

TEST_F(EngineEnvironment, ADirectoryThatVanishesIsNamed) {
  step();
  save(false);
  const std::string away = folder_.in("away");
  MPI_Barrier(MPI_COMM_WORLD);
  if (job_rank() == 0) fs::rename(directory_, away);
  MPI_Barrier(MPI_COMM_WORLD);
  step();
  const std::vector<double> values = all_values(engine_);
  for (const bool asynchronous : {false, true}) {
    expect_names(io_error_of([&] { save(asynchronous); }), {"/run", "No such file"});
  }
  EXPECT_FALSE(engine_.load(directory_).has_value());
  EXPECT_EQ(all_values(engine_), values);
  expect_sound(away, {1});
  if (job_rank() == 0) fs::rename(away, directory_);
  MPI_Barrier(MPI_COMM_WORLD);
  save(false);
  expect_sound(directory_, {2, 1});
}

// The undefined-behaviour sanitizer looks at objects through a pipe, which it cannot open here.
#ifndef __SANITIZE_ADDRESS__
// One rank alone has the limit.
TEST_F(EngineEnvironment, NoMoreFilesIsAnErrorOnEveryRank) {
  const bool mine = job_rank() == job_size() - 1;
  rlimit now{};
  ::getrlimit(RLIMIT_NOFILE, &now);
  expect_failures([&] { return Limit(RLIMIT_NOFILE, mine ? 3 : now.rlim_cur); },
                  {"Too many open files"});
}

TEST_F(EngineEnvironment, NoMoreFilesToLoadWithIsAnErrorOnEveryRank) {
  step();
  save(false);
  const std::vector<double> values = all_values(engine_);
  const bool mine = job_rank() == std::min(1, job_size() - 1);  // the last has gaps alone
  rlimit now{};
  ::getrlimit(RLIMIT_NOFILE, &now);
  {
    const Limit limit(RLIMIT_NOFILE, mine ? 3 : now.rlim_cur);
    expect_names(io_error_of([&] { (void)engine_.load(directory_); }), {"Too many open files"});
    MPI_Barrier(MPI_COMM_WORLD);
  }
  EXPECT_EQ(engine_.load(directory_)->step, 1);
  EXPECT_EQ(all_values(engine_), values);
}
#endif

TEST_F(EngineEnvironment, ALimitOfFileSizeIsAnErrorOnEveryRank) {
  const bool mine = job_rank() == 0;
  rlimit now{};
  ::getrlimit(RLIMIT_FSIZE, &now);
  expect_failures([&] { return Limit(RLIMIT_FSIZE, mine ? 5000 : now.rlim_cur); },
                  {"File too large"});
}

TEST_F(EngineEnvironment, ASecondEngineIsRefusedBeforeItHasSomethingToSave) {
  engine_.claim_directory(directory_);
  engine_.claim_directory(directory_);  // the same engine's
  Engine other(MPI_COMM_WORLD, toy_.model, environment_config());
  expect_error<StateError>([&] { other.claim_directory(directory_); },
                           {directory_, "one job that saves there"});
  expect_error<StateError>([&] { other.save(directory_); }, {"one job that saves there"});
  step();
  save(false);
  EXPECT_EQ(other.load(directory_)->step, 1);
  // The first gives the directory up for another one.
  engine_.claim_directory(folder_.in("second"));
  MPI_Barrier(MPI_COMM_WORLD);
  other.claim_directory(directory_);
}

}  // namespace
}  // namespace mics::test
