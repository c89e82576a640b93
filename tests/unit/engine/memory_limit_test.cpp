// SPDX-License-Identifier: Apache-2.0
// A model whose training state is 4 times what one process may allocate.
#include "elements.hpp"
#include "layouts.hpp"
#include <mics/mics.hpp>

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

namespace mics::test {
namespace {

/// Bytes of private memory of this process.
std::int64_t data_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmData:")) return std::stoll(line.substr(7)) * 1024;
  }
  return 0;
}

/// Lets this process allocate `more` bytes and no more.
class MemoryLimit {
 public:
  explicit MemoryLimit(std::int64_t more) {
    getrlimit(RLIMIT_DATA, &before_);
    rlimit limit = before_;
    limit.rlim_cur = static_cast<rlim_t>(data_bytes() + more);
    applied_ = setrlimit(RLIMIT_DATA, &limit) == 0;
  }
  ~MemoryLimit() { setrlimit(RLIMIT_DATA, &before_); }
  MemoryLimit(const MemoryLimit&) = delete;
  MemoryLimit& operator=(const MemoryLimit&) = delete;
  [[nodiscard]] bool applied() const { return applied_; }

 private:
  rlimit before_{};
  bool applied_ = false;
};

TEST(MemoryLimitTest, ModelOfFourTimesTheLimitIsBuiltAndTrainedOverEightRanks) {
  ASSERT_EQ(job_size(), 8);
  // fp32 weights, two moments and sums: 16 bytes an element, 1 GiB; 128 MiB a rank and slots.
  constexpr std::int64_t limit = std::int64_t{256} << 20;
  constexpr std::int64_t units = 128;
  constexpr std::int64_t elements = 4 * limit / 16 / units;
  Model model;
  for (std::int64_t u = 0; u < units; ++u) {
    (void)model.parameter(model.unit("unit" + std::to_string(u)), "weight", {elements / 512, 512},
                          {.init = Init::uniform(-1, 1)});
  }
  ASSERT_EQ(model.count() * 16, 4 * limit);
  Config config;
  config.preset = Preset::zero3;
  config.seed = 5;
  const MemoryLimit guard(limit);
  ASSERT_TRUE(guard.applied());

  Engine engine(MPI_COMM_WORLD, model, config);

  engine.begin_micro_step({.samples = 1, .last = true});
  for (const int u : {0, 77, 127}) {
    const Lease lease = engine.gather({u});
    const ParameterId id = model.parameters({u}).front();
    EXPECT_EQ(
        count_differences(model, lease, id, engine.config(),
                          [&](std::int64_t i) { return model.spec(id).options.init(5, id, i); }),
        0);
  }
  for (int u = units; u-- > 0;) {
    auto scope = engine.gradient({u});
    scope.view<float**>(model.parameters({u}).front())(3, 4) += 1;
    scope.reduce();
  }
  const StepResult result = engine.step().get();
  EXPECT_FALSE(result.skipped);
  EXPECT_NEAR(result.gradient_norm, std::sqrt(static_cast<double>(units)), 1e-9);
}

TEST(MemoryLimitTest, TheLimitIsRealAndTooLittleMemoryIsAnErrorOnEveryRank) {
  constexpr std::int64_t limit = std::int64_t{64} << 20;
  Model model;
  (void)model.parameter(model.unit("unit"), "weight", {limit / 4});
  Config config;
  config.preset = Preset::ddp;
  const MemoryLimit guard(limit);
  ASSERT_TRUE(guard.applied());

  EXPECT_ANY_THROW(Engine(MPI_COMM_WORLD, model, config));
}

TEST(MemoryLimitTest, TooLittleMemoryOnOneRankIsAnErrorOnAll) {
  constexpr std::int64_t limit = std::int64_t{64} << 20;
  Model model;
  (void)model.parameter(model.unit("unit"), "weight", {limit / 4});
  Config config;
  config.preset = Preset::ddp;
  const MemoryLimit guard(job_rank() == 3 ? limit : 64 * limit);
  ASSERT_TRUE(guard.applied());

  EXPECT_ANY_THROW(Engine(MPI_COMM_WORLD, model, config));
}

}  // namespace
}  // namespace mics::test
