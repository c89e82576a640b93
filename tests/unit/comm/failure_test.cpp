// SPDX-License-Identifier: Apache-2.0
#include "transport_fixture.hpp"
#include <mics/base/error.hpp>

#include <gtest/gtest.h>
#include <mpi.h>

#include <chrono>
#include <functional>
#include <list>
#include <string>
#include <thread>
#include <vector>

namespace mics::comm::test {
namespace {

/// Every way to wait in a transport.
struct Wait {
  const char* name;
  std::function<void(Transport&)> enter;
};
const std::vector<Wait>& waits() {
  static std::vector<std::byte> a(1 << 20), b(static_cast<std::size_t>(job_size()) << 17);
  static const std::vector<Wait> all{
      {"all_gather", [](Transport& t) { t.all_gather(a.data(), b.data(), 1000, operation, {}); }},
      {"all_gather of 128 KiB",
       [](Transport& t) { t.all_gather(a.data(), b.data(), 1 << 17, operation, {}); }},
      {"reduce_scatter",
       [](Transport& t) {
         t.reduce_scatter(a.data(), b.data(), 100,
                          {.source = DType::fp32,
                           .wire = DType::fp32,
                           .result = DType::fp32,
                           .factor = 1,
                           .mode = SumMode::add},
                          operation, {});
       }},
      {"all_reduce",
       [](Transport& t) {
         t.all_reduce(a.data(), 1000,
                      {.source = DType::fp64, .wire = DType::fp64, .result = DType::fp64},
                      operation, {});
       }},
      {"all_gather_small",
       [](Transport& t) { t.all_gather_small(a.data(), b.data(), 8, operation); }},
      {"barrier", [](Transport& t) { t.barrier(operation); }},
  };
  return all;
}

TEST(Failure, EndsTheWaitOfTheOthersWithItsText) {
  if (job_size() == 1) return;  // nobody waits
  const int failing = job_size() - 1;
  for (const Nodes& nodes : node_patterns()) {
    for (const Wait& wait : waits()) {
      SCOPED_TRACE(std::string(wait.name) + ", " + nodes.name);
      World world(nodes.label);
      const auto start = Clock::now();

      if (job_rank() == failing) {
        world.failures.fail("the disk of this rank is full");
      } else {
        try {
          wait.enter(world.transport);
          ADD_FAILURE() << "no error";
        } catch (const CommError& error) {
          EXPECT_NE(std::string(error.what()).find("the disk of this rank is full"),
                    std::string::npos)
              << error.what();
          EXPECT_NE(std::string(error.what()).find("rank " + std::to_string(failing)),
                    std::string::npos)
              << error.what();
        }
      }

      EXPECT_LT(seconds_since(start), 5);
      EXPECT_TRUE(world.failures.failed());
      EXPECT_EQ(world.failures.failed_rank(), failing);
      meet();
    }
  }
}

TEST(Failure, StaysAndIsThrownByEveryLaterCall) {
  if (job_size() == 1) return;  // nobody waits
  World world;

  if (job_rank() == 0) world.failures.fail("first text");
  meet();
  const auto start = Clock::now();
  while (!world.failures.failed() && seconds_since(start) < 5) {
    try {
      world.failures.poll();
    } catch (const CommError&) {
    }
  }
  world.failures.fail("a later text");

  EXPECT_THROW(world.failures.poll(), CommError);
  EXPECT_THROW(world.transport.barrier(operation), CommError);
  EXPECT_NE(world.failures.text().find("first text"), std::string::npos) << world.failures.text();
  EXPECT_EQ(world.failures.text().find("a later text"), std::string::npos) << world.failures.text();
  EXPECT_EQ(world.failures.failed_rank(), 0);
  meet();
}

TEST(Failure, WaitsForTheBetterTextThatFollows) {
  if (job_size() == 1) return;  // nobody waits
  World world;

  if (job_rank() == 0) {
    world.failures.fail("a scope ended", FailureKind::text_follows);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    world.failures.fail("negative temperature in cell 7");
  } else {
    try {
      world.transport.barrier(operation);
      ADD_FAILURE() << "no error";
    } catch (const CommError& error) {
      EXPECT_NE(std::string(error.what()).find("negative temperature in cell 7"), std::string::npos)
          << error.what();
    }
  }
  meet();
}

TEST(Failure, DoesNotWaitForeverForATextThatNeverFollows) {
  if (job_size() == 1) return;  // nobody waits
  World world;
  const auto start = Clock::now();

  if (job_rank() == 0) {
    world.failures.fail("a scope ended", FailureKind::text_follows);
  } else {
    try {
      world.transport.barrier(operation);
      ADD_FAILURE() << "no error";
    } catch (const CommError& error) {
      EXPECT_NE(std::string(error.what()).find("a scope ended"), std::string::npos) << error.what();
    }
  }

  EXPECT_LT(seconds_since(start), 10);
  meet();
}

TEST(Failure, NobodyHasFailedAtTheStart) {
  World world;

  EXPECT_NO_THROW(world.failures.poll());
  EXPECT_FALSE(world.failures.failed());
  EXPECT_EQ(world.failures.failed_rank(), -1);
  EXPECT_TRUE(world.failures.text().empty());
}

TEST(Timeout, NamesTheRanksThatDidNotCome) {
  if (job_size() == 1) return;  // nobody waits
  const int missing = job_size() - 1;
  for (const Wait& wait : waits()) {
    SCOPED_TRACE(wait.name);
    World world(node_patterns()[0].label, std::chrono::milliseconds(200));
    const auto start = Clock::now();

    if (job_rank() != missing) {
      try {
        wait.enter(world.transport);
        ADD_FAILURE() << "no error";
      } catch (const CommError& error) {
        // A rank that waits for others than the missing one may learn of it from them.
        const std::string text = error.what();
        if (std::string(wait.name) != "all_gather_small" && std::string(wait.name) != "barrier") {
          EXPECT_NE(text.find(std::to_string(missing)), std::string::npos) << text;
        }
      }
      EXPECT_GE(seconds_since(start), 0.15);
      EXPECT_LT(seconds_since(start), 10);
    }
    meet();
  }
}

/// Everybody's error text of `act`, gathered, after this rank's failure was told to all.
template <class Act>
std::vector<std::string> texts_of(World& world, const Act& act) {
  std::string mine;
  try {
    act(world.transport);
  } catch (const std::exception& error) {
    mine = error.what();
    world.failures.fail(mine);
  }
  constexpr int width = 2048;
  mine.resize(width);
  std::string all(static_cast<std::size_t>(width * job_size()), '\0');
  MPI_Allgather(mine.data(), width, MPI_CHAR, all.data(), width, MPI_CHAR, MPI_COMM_WORLD);
  std::vector<std::string> texts;
  for (int rank = 0; rank < job_size(); ++rank) {
    texts.emplace_back(all.data() + rank * width);
  }
  return texts;
}

/// The same diagnosis on every rank, apart from whose it is.
void expect_one_text(const std::vector<std::string>& texts) {
  std::string longest;
  for (const std::string& text : texts) {
    if (text.size() > longest.size()) longest = text;
  }
  for (const std::string& text : texts) {
    ASSERT_FALSE(text.empty()) << "a rank went on; the others: " << longest;
    EXPECT_TRUE(longest.ends_with(text)) << text << "\nbeside\n" << longest;
  }
}

/// What the ranks of a program that has lost its step do: the last rank something else.
struct Desync {
  const char* name;
  std::vector<Operation> most;
  std::vector<Operation> last;
  const char* named;  // operation of the last rank that the diagnosis shows
};
const std::vector<Desync>& desyncs() {
  static constexpr Operation a{Purpose::gather, "layer0", 5000};
  static constexpr Operation b{Purpose::gather, "layer1", 5000};
  static constexpr Operation resized{Purpose::gather, "layer1", 70'000};
  static constexpr Operation c{Purpose::gather, "layer2", 800};
  static const std::vector<Desync> all{
      {"skipped", {a, b, c}, {a, c}, "layer2"},
      {"doubled", {a, b, c}, {a, b, b, c}, "layer1"},
      {"reordered", {a, b, c}, {a, c, b}, "layer2"},
      {"resized", {a, b, c}, {a, resized, c}, "70000"},
  };
  return all;
}

// Fails if tags are numbers alone: messages of other operations are then taken for these.
TEST(Desync, IsFoundLongBeforeTheTimeoutAndNamesBothOperations) {
  if (job_size() == 1) return;  // nobody to differ from
  for (const Nodes& nodes : node_patterns()) {
    for (const Desync& desync : desyncs()) {
      SCOPED_TRACE(std::string(nodes.name) + ", " + desync.name);
      World world(nodes.label, std::chrono::seconds(30));
      const bool is_last = job_rank() == job_size() - 1;
      const auto start = Clock::now();
      // After an error messages may still be under way: their memory stays.
      static std::list<std::vector<std::byte>> kept;

      const auto texts = texts_of(world, [&](Transport& transport) {
        // Every rank knows every operation, as after a first pass.
        for (const Operation& o : desync.most) world.log.record(o);
        for (const Operation& o : desync.last) world.log.record(o);
        for (const Operation& o : is_last ? desync.last : desync.most) {
          auto& send = kept.emplace_back(static_cast<std::size_t>(o.bytes));
          auto& receive = kept.emplace_back(static_cast<std::size_t>(o.bytes * job_size()));
          transport.all_gather(send.data(), receive.data(), o.bytes, o, {});
        }
        transport.barrier({.purpose = Purpose::agreement, .object = "end", .bytes = 1});
      });

      EXPECT_LT(seconds_since(start), 10);
      expect_one_text(texts);
      EXPECT_NE(texts[0].find("layer"), std::string::npos) << texts[0];
      const bool both = texts[0].find(desync.named) != std::string::npos;
      EXPECT_TRUE(both) << texts[0];
      meet();
    }
  }
}

TEST(Fingerprint, IsEqualOnAllRanksAndTellsOrdersApart) {
  const auto run = [](std::initializer_list<const char*> objects) {
    World world;
    for (const char* object : objects) {
      world.transport.barrier({.purpose = Purpose::agreement, .object = object, .bytes = 1});
    }
    return world.transport.fingerprint();
  };
  const std::uint64_t ab = run({"a", "b"});
  std::vector<std::uint64_t> all(static_cast<std::size_t>(job_size()));
  MPI_Allgather(&ab, 1, MPI_UINT64_T, all.data(), 1, MPI_UINT64_T, MPI_COMM_WORLD);

  EXPECT_EQ(all, std::vector<std::uint64_t>(all.size(), ab));
  EXPECT_EQ(run({"a", "b"}), ab);
  EXPECT_NE(run({"b", "a"}), ab);
  EXPECT_NE(run({"a"}), ab);
}

// Fails without the question: the text then says nothing of what the missing rank does.
TEST(Timeout, SaysWhatTheMissingRankWaitsForItself) {
  if (job_size() == 1) return;  // nobody waits
  World world(node_patterns()[0].label, std::chrono::milliseconds(800));
  World elsewhere(node_patterns()[0].label, std::chrono::milliseconds(800));
  const bool is_last = job_rank() == job_size() - 1;

  const auto texts = texts_of(world, [&](Transport& transport) {
    // The last rank waits in a group of its own for something that nobody else does.
    MpiTransport other(Communicator::duplicate(MPI_COMM_WORLD),
                       std::vector<int>(static_cast<std::size_t>(job_size()), 0),
                       {.failures = &world.failures,
                        .log = &world.log,
                        .timeout = std::chrono::milliseconds(5000)});
    if (is_last) {
      other.barrier({.purpose = Purpose::norm, .object = "gradient norm", .bytes = 1});
    } else {
      transport.barrier({.purpose = Purpose::hop1, .object = "layer3", .bytes = 1});
    }
  });

  expect_one_text(texts);
  EXPECT_NE(texts[0].find("layer3"), std::string::npos) << texts[0];
  if (job_size() == 2) {
    EXPECT_NE(texts[0].find("norm of gradient norm"), std::string::npos) << texts[0];
  }
  meet();
}

// Fails if each rank blames the failure that it heard of first.
TEST(Failure, AtOnceOnSeveralRanksIsBlamedOnTheLowest) {
  if (job_size() == 1) return;  // nobody else
  for (int round = 0; round < 20; ++round) {
    World world;
    meet();
    const auto texts = texts_of(world, [&](Transport& transport) {
      if (job_rank() > 0) world.failures.fail("cell " + std::to_string(job_rank()));
      transport.barrier(operation);
    });
    for (const std::string& text : texts) {
      EXPECT_NE(text.find("cell 1"), std::string::npos) << text;
    }
    meet();
  }
}

}  // namespace
}  // namespace mics::comm::test
