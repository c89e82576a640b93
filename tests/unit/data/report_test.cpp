// SPDX-License-Identifier: Apache-2.0
// Progress on a stream and metrics in a file.

#include <gtest/gtest.h>
#include <report/metrics.hpp>
#include <report/progress.hpp>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

namespace {

using report::MetricsMode;
using report::MetricsWriter;
using report::Progress;
using report::ProgressStyle;
using std::chrono::milliseconds;
namespace fs = std::filesystem;

TEST(ProgressTest, WritesALineEveryFewStepsAndAtTheEnd) {
  std::ostringstream stream;
  const Progress::Clock::time_point start{};
  {
    Progress progress(stream, {.last_step = 5, .every = 2}, start);
    for (int step = 1; step <= 5; ++step) {
      progress.update(step, 8.0 - step, 500, start + milliseconds(100 * step));
    }
  }

  EXPECT_EQ(stream.str(),
            "step 2/5  loss 6.000 bits/byte  5.00k tokens/s  ETA 0:00\n"
            "step 4/5  loss 4.000 bits/byte  5.00k tokens/s  ETA 0:00\n"
            "step 5/5  loss 3.000 bits/byte  5.00k tokens/s  ETA 0:00\n");
}

TEST(ProgressTest, RemainingTimeCountsStepsOfThisRunOnly) {
  std::ostringstream stream;
  const Progress::Clock::time_point start{};
  Progress progress(stream, {.first_step = 100, .last_step = 160, .every = 1}, start);

  progress.update(101, 3, 10, start + milliseconds(2000));

  EXPECT_NE(stream.str().find("ETA 1:58"), std::string::npos) << stream.str();
}

TEST(ProgressTest, ShowsTheShareOfThePeakAndTheUnitOfTheLoss) {
  std::ostringstream stream;
  const Progress::Clock::time_point start{};
  Progress progress(
      stream, {.last_step = 2, .every = 1, .loss_unit = "nats/token", .peak_rate = 8000}, start);

  progress.update(1, 6.5, 500, start + milliseconds(500));

  EXPECT_EQ(stream.str(),
            "step 1/2  loss 6.500 nats/token  1.00k tokens/s  12.5% of peak  ETA 0:01\n");
}

TEST(ProgressTest, DrawsTheBarOverItself) {
  std::ostringstream stream;
  const Progress::Clock::time_point start{};
  {
    Progress progress(stream, {.style = ProgressStyle::bar, .last_step = 4}, start);
    progress.update(1, 5, 100, start + milliseconds(1000));
    progress.update(2, 5, 100, start + milliseconds(1050));  // too soon to draw
    progress.message("validation 4.500 bits/byte");
    progress.update(4, 4, 100, start + milliseconds(2000));
  }

  const std::string first = "[=====>              ] 1/4  5.000 bits/byte  100 tokens/s  ETA 0:03";
  EXPECT_EQ(stream.str(), "\r" + first + "\r" + std::string(first.size(), ' ') +
                              "\rvalidation 4.500 bits/byte\n"
                              "\r[====================] 4/4  4.000 bits/byte  200 tokens/s  ETA "
                              "0:00\n");
}

TEST(ProgressTest, WritesNumbersThatPeopleRead) {
  EXPECT_EQ(report::duration_text(25.4), "0:25");
  EXPECT_EQ(report::duration_text(187), "3:07");
  EXPECT_EQ(report::duration_text(3723), "1:02:03");
  EXPECT_EQ(report::duration_text(-1), "--:--");
  EXPECT_EQ(report::duration_text(std::numeric_limits<double>::infinity()), "--:--");
  EXPECT_EQ(report::rate_text(0), "0.00");
  EXPECT_EQ(report::rate_text(999.4), "999");
  EXPECT_EQ(report::rate_text(999.6), "1.00k");
  EXPECT_EQ(report::rate_text(21345), "21.3k");
  EXPECT_EQ(report::rate_text(2.5e9), "2.50G");
}

TEST(ProgressTest, APipeIsNoTerminal) {
  std::FILE* file = std::tmpfile();
  ASSERT_NE(file, nullptr);

  EXPECT_FALSE(report::is_terminal(file));

  std::fclose(file);
}

class MetricsTest : public testing::Test {
 protected:
  void SetUp() override {
    folder = fs::temp_directory_path() / ("mics_metrics_" + std::to_string(getpid()));
    fs::remove_all(folder);
  }
  void TearDown() override { fs::remove_all(folder); }

  static std::vector<nlohmann::json> read(const fs::path& path) {
    std::vector<nlohmann::json> records;
    std::ifstream stream(path);
    for (std::string line; std::getline(stream, line);)
      records.push_back(nlohmann::json::parse(line));
    return records;
  }
  MetricsWriter::ErrorHandler collect() {
    return [this](const std::string& message) { errors.push_back(message); };
  }

  fs::path folder;
  std::vector<std::string> errors;
};

TEST_F(MetricsTest, EachLineIsCompleteAtOnce) {
  const fs::path path = folder / "run/metrics.jsonl";
  MetricsWriter writer(path, MetricsMode::replace, collect());

  writer.write({{"step", 1}, {"loss", 2.5}});
  EXPECT_EQ(read(path).size(), 1U);
  writer.write({{"step", 2}, {"loss", std::numeric_limits<double>::quiet_NaN()}});

  const auto records = read(path);
  ASSERT_EQ(records.size(), 2U);
  EXPECT_EQ(records[0].at("loss"), 2.5);
  EXPECT_TRUE(records[1].at("loss").is_null());
  EXPECT_TRUE(errors.empty());
}

TEST_F(MetricsTest, AppendsAfterARestart) {
  const fs::path path = folder / "metrics.jsonl";
  { MetricsWriter(path, MetricsMode::replace, collect()).write({{"step", 1}}); }
  { MetricsWriter(path, MetricsMode::append, collect()).write({{"step", 2}}); }
  EXPECT_EQ(read(path).size(), 2U);

  { MetricsWriter(path, MetricsMode::replace, collect()).write({{"step", 3}}); }

  EXPECT_EQ(read(path).size(), 1U);
}

TEST_F(MetricsTest, TextThatIsNotUtf8IsReplaced) {
  const fs::path path = folder / "metrics.jsonl";
  MetricsWriter writer(path, MetricsMode::replace, collect());

  writer.write({{"text", "caf\xe9"}});

  EXPECT_EQ(read(path).at(0).at("text"), "caf\xef\xbf\xbd");
}

TEST_F(MetricsTest, AFullDiskIsReportedOnceAndDoesNotThrow) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full";
  MetricsWriter writer("/dev/full", MetricsMode::append, collect());

  for (int step = 0; step < 3; ++step) writer.write({{"step", step}});

  EXPECT_TRUE(writer.has_failed());
  ASSERT_EQ(errors.size(), 1U);
  EXPECT_EQ(errors[0],
            "metrics file /dev/full: writing: expected success, found \"No space left on device\"; "
            "training goes on without it");
}

TEST_F(MetricsTest, AFolderThatCannotBeMadeIsReportedOnce) {
  fs::create_directories(folder);
  std::ofstream(folder / "file") << "x";
  MetricsWriter writer(folder / "file/metrics.jsonl", MetricsMode::replace, collect());

  writer.write({{"step", 1}});

  EXPECT_TRUE(writer.has_failed());
  EXPECT_EQ(errors.size(), 1U);
}

TEST_F(MetricsTest, WithoutAPathNothingIsWritten) {
  MetricsWriter writer({}, MetricsMode::replace, collect());

  writer.write({{"step", 1}});

  EXPECT_FALSE(writer.has_failed());
  EXPECT_TRUE(errors.empty());
}

}  // namespace
