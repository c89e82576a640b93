// SPDX-License-Identifier: Apache-2.0
#include "any_transport.hpp"
#include <mics/base/dtype.hpp>

#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

namespace mics::comm::test {
namespace {

class AllGather : public OverTransports {};
class ReduceScatter : public OverTransports {};
class AllReduce : public OverTransports {};
class AllGatherSmall : public OverTransports {};
class Broadcast : public OverTransports {};
class Barrier : public OverTransports {};
class AnyTransport : public OverTransports {};
INSTANTIATE_TEST_SUITE_P(Over, AllGather, testing::ValuesIn(kinds()), name_of);
INSTANTIATE_TEST_SUITE_P(Over, ReduceScatter, testing::ValuesIn(kinds()), name_of);
INSTANTIATE_TEST_SUITE_P(Over, AllReduce, testing::ValuesIn(kinds()), name_of);
INSTANTIATE_TEST_SUITE_P(Over, AllGatherSmall, testing::ValuesIn(kinds()), name_of);
INSTANTIATE_TEST_SUITE_P(Over, Broadcast, testing::ValuesIn(kinds()), name_of);
INSTANTIATE_TEST_SUITE_P(Over, Barrier, testing::ValuesIn(kinds()), name_of);
INSTANTIATE_TEST_SUITE_P(Over, AnyTransport, testing::ValuesIn(kinds()), name_of);

std::uint64_t scramble(std::uint64_t x) {
  x = (x + 0x9E3779B97F4A7C15ULL) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 29)) * 0x94D049BB133111EBULL;
  return x ^ (x >> 32);
}

std::byte byte_of(int rank, std::int64_t i) {
  return static_cast<std::byte>(
      scramble(static_cast<std::uint64_t>(i) * 64 + static_cast<std::uint64_t>(rank)));
}

std::vector<std::byte> bytes_of_rank(int rank, std::int64_t count) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) bytes[static_cast<std::size_t>(i)] = byte_of(rank, i);
  return bytes;
}

/// Rank after rank.
std::vector<std::byte> bytes_of_all(std::int64_t count) {
  std::vector<std::byte> all;
  for (int rank = 0; rank < job_size(); ++rank) {
    const auto bytes = bytes_of_rank(rank, count);
    all.insert(all.end(), bytes.begin(), bytes.end());
  }
  return all;
}

/// Nothing, little, a prime, a power of two, and around the sizes at which transports cut messages.
std::vector<std::int64_t> byte_counts() {
  std::vector<std::int64_t> counts{0, 1, 2, 13, 64, 4093, 4096, 65536};
  constexpr std::int64_t chunk = std::int64_t{256} << 10;
  counts.insert(counts.end(), {chunk - 1, chunk, chunk + 1, 2 * chunk + 3});
  return counts;
}

TEST_P(AllGather, PutsEveryRanksBytesInRankOrder) {
  for (const Nodes& nodes : OverTransports::nodes()) {
    AnyWorld world(kind(), nodes.label);
    for (const std::int64_t count : byte_counts()) {
      SCOPED_TRACE(std::string(nodes.name) + ", " + std::to_string(count) + " bytes");
      const auto send = bytes_of_rank(job_rank(), count);
      const auto expected = bytes_of_all(count);
      std::vector<std::byte> receive(expected.size(), std::byte{0xEE});

      world.transport.all_gather(send.data(), receive.data(), count, operation, {});

      EXPECT_TRUE(receive == expected);
      EXPECT_TRUE(send == bytes_of_rank(job_rank(), count)) << "the send buffer was changed";
    }
  }
}

TEST_P(AllGather, WorksInPlace) {
  for (const Nodes& nodes : OverTransports::nodes()) {
    AnyWorld world(kind(), nodes.label);
    for (const std::int64_t count : byte_counts()) {
      SCOPED_TRACE(std::string(nodes.name) + ", " + std::to_string(count) + " bytes");
      const auto expected = bytes_of_all(count);
      std::vector<std::byte> receive(expected.size(), std::byte{0xEE});
      std::byte* const own = receive.data() + job_rank() * count;
      if (count > 0) {
        std::memcpy(own, bytes_of_rank(job_rank(), count).data(), static_cast<std::size_t>(count));
      }

      world.transport.all_gather(own, receive.data(), count, operation, {});

      EXPECT_TRUE(receive == expected);
    }
  }
}

TEST_P(AllGather, SeveralMayBeUnderWayAndBeWaitedForInAnyOrder) {
  for (const Nodes& nodes : OverTransports::nodes()) {
    SCOPED_TRACE(nodes.name);
    AnyWorld world(kind(), nodes.label);
    const std::vector<std::int64_t> counts{1000, 70'000, 3, 300'001};
    std::vector<std::vector<std::byte>> send, receive;
    std::vector<std::unique_ptr<PendingCollective>> pending;
    for (const auto count : counts) {
      send.push_back(bytes_of_rank(job_rank(), count));
      receive.emplace_back(static_cast<std::size_t>(count * job_size()));
    }

    for (std::size_t i = 0; i < counts.size(); ++i) {
      pending.push_back(world.transport.start_all_gather(send[i].data(), receive[i].data(),
                                                         counts[i], operation, {}));
    }
    for (const std::size_t i : {2U, 3U, 0U, 1U}) pending[i]->wait({});

    for (std::size_t i = 0; i < counts.size(); ++i) {
      EXPECT_TRUE(receive[i] == bytes_of_all(counts[i])) << counts[i] << " bytes";
    }
  }
}

// -- reductions
// ------------------------------------------------------------------------------------

/// Element `i` of what `rank` sends: around 1, both signs, with digits in all places of the dtype.
double value_of(int rank, std::int64_t i) {
  const auto bits =
      scramble(static_cast<std::uint64_t>(i) * 131 + static_cast<std::uint64_t>(rank));
  return static_cast<double>(static_cast<std::int64_t>(bits >> 11)) * 0x1p-52 - 1.0;
}
/// A small integer, with sums that every dtype holds exactly.
double integer_of(int rank, std::int64_t i) {
  return static_cast<double>(
             scramble(static_cast<std::uint64_t>(i) * 17 + static_cast<std::uint64_t>(rank)) % 15) -
         7;
}

template <class T, class Value>
std::vector<T> elements_of(int rank, std::int64_t count, const Value& value) {
  std::vector<T> elements(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    elements[static_cast<std::size_t>(i)] = static_cast<T>(value(rank, i));
  }
  return elements;
}

/// Small counts, and with `large` those around what a staging buffer holds of one peer.
std::vector<std::int64_t> element_counts(DType wire, bool large) {
  std::vector<std::int64_t> counts{0, 1, 5, 127, 256, 1021};
  if (large && job_size() > 1) {
    const std::int64_t chunk =
        MpiTransport::staging_bytes(job_size(), false) / (2 * (job_size() - 1)) / bytes_of(wire);
    counts.insert(counts.end(), {chunk - 1, chunk, chunk + 1, 2 * chunk + 7});
  }
  return counts;
}

/// Every wire dtype with each type that sums may have.
template <class F>
void for_each_pair_of_types(const F& f) {
  for (const DType wire : {DType::fp64, DType::fp32, DType::bf16, DType::fp16}) {
    for (const DType sum : {DType::fp32, DType::fp64}) {
      if (wire == DType::fp64 && sum == DType::fp32) continue;
      SCOPED_TRACE("wire " + std::string(name(wire)) + ", sum " + std::string(name(sum)));
      visit(wire, [&](auto w) {
        visit_arithmetic(
            sum, [&](auto s) { f(typename decltype(w)::type{}, typename decltype(s)::type{}); });
      });
    }
  }
}

double epsilon(DType dtype) {
  switch (dtype) {
    case DType::fp64:
      return 0x1p-52;
    case DType::fp32:
      return 0x1p-23;
    case DType::bf16:
      return 0x1p-7;
    case DType::fp16:
      break;
  }
  return 0x1p-10;
}
/// How far a sum of addends up to `magnitude` may be from the one in rank order: not at all, but
/// where NCCL sums, one rounding of a partial sum an addend.
double allowed(Kind kind, DType wire, DType result, double magnitude) {
  if (kind != Kind::nccl_wire || job_size() == 1) return 0;
  const double ranks = job_size();
  return std::max(epsilon(wire), epsilon(result)) * magnitude * ranks * ranks;
}
bool is_near(double value, double expected, double distance) {
  return value == expected || std::abs(value - expected) <= distance;
}

constexpr DType default_sum(DType wire) { return wire == DType::fp64 ? DType::fp64 : DType::fp32; }

TEST_P(ReduceScatter, AssignsTheSumInRankOrderWithTheBitsOfAPlainLoop) {
  const auto patterns = OverTransports::nodes();
  for (const Nodes& nodes : patterns) {
    AnyWorld world(kind(), nodes.label);
    for_each_pair_of_types([&](auto wire, auto sum) {
      using Wire = decltype(wire);
      using Sum = decltype(sum);
      // Nodes matter to gathers only, and the type of sums not to how pieces are cut.
      const bool large =
          &nodes == &patterns.front() && dtype_of<Sum> == default_sum(dtype_of<Wire>);
      for (const std::int64_t count : element_counts(dtype_of<Wire>, large)) {
        SCOPED_TRACE(std::string(nodes.name) + ", " + std::to_string(count) + " elements");
        const auto send = elements_of<Wire>(job_rank(), count * job_size(), value_of);
        std::vector<Sum> result(static_cast<std::size_t>(count), Sum{99});

        world.transport.reduce_scatter(send.data(), result.data(), count,
                                       {.source = dtype_of<Wire>,
                                        .wire = dtype_of<Wire>,
                                        .result = dtype_of<Sum>,
                                        .factor = 1,
                                        .mode = SumMode::assign},
                                       operation, {});

        std::int64_t differences = 0;
        for (std::int64_t i = 0; i < count; ++i) {
          const std::int64_t at = job_rank() * count + i;
          Sum expected = static_cast<Sum>(static_cast<Wire>(value_of(0, at)));
          for (int rank = 1; rank < job_size(); ++rank) {
            expected += static_cast<Sum>(static_cast<Wire>(value_of(rank, at)));
          }
          differences += is_near(result[static_cast<std::size_t>(i)], expected,
                                 allowed(kind(), dtype_of<Wire>, dtype_of<Sum>, 1))
                             ? 0
                             : 1;
        }
        EXPECT_EQ(differences, 0);
      }
    });
  }
}

TEST_P(ReduceScatter, AddsToWhatIsThere) {
  AnyWorld world(kind());
  for_each_pair_of_types([&](auto wire, auto sum) {
    using Wire = decltype(wire);
    using Sum = decltype(sum);
    const bool large = dtype_of<Sum> == default_sum(dtype_of<Wire>);
    for (const std::int64_t count : element_counts(dtype_of<Wire>, large)) {
      SCOPED_TRACE(std::to_string(count) + " elements");
      const auto send = elements_of<Wire>(job_rank(), count * job_size(), integer_of);
      std::vector<Sum> result(static_cast<std::size_t>(count));
      std::iota(result.begin(), result.end(), Sum{-3});

      world.transport.reduce_scatter(send.data(), result.data(), count,
                                     {.source = dtype_of<Wire>,
                                      .wire = dtype_of<Wire>,
                                      .result = dtype_of<Sum>,
                                      .factor = 1,
                                      .mode = SumMode::add},
                                     operation, {});

      std::int64_t differences = 0;
      for (std::int64_t i = 0; i < count; ++i) {
        double expected = static_cast<double>(i - 3);
        for (int rank = 0; rank < job_size(); ++rank) {
          expected += integer_of(rank, job_rank() * count + i);
        }
        differences += result[static_cast<std::size_t>(i)] == static_cast<Sum>(expected) ? 0 : 1;
      }
      EXPECT_EQ(differences, 0);
    }
  });
}

TEST_P(ReduceScatter, IsWithinOneRoundingAnAddendOfAnFp64Sum) {
  AnyWorld world(kind());
  constexpr std::int64_t count = 1031;
  const auto send = elements_of<bf16>(job_rank(), count * job_size(), value_of);
  std::vector<float> result(count, 0.5F);

  world.transport.reduce_scatter(send.data(), result.data(), count,
                                 {.source = DType::bf16,
                                  .wire = DType::bf16,
                                  .result = DType::fp32,
                                  .factor = 1,
                                  .mode = SumMode::add},
                                 operation, {});

  for (std::int64_t i = 0; i < count; ++i) {
    double expected = 0.5;
    for (int rank = 0; rank < job_size(); ++rank) {
      expected += static_cast<double>(bf16(value_of(rank, job_rank() * count + i)));
    }
    EXPECT_NEAR(result[static_cast<std::size_t>(i)], expected,
                0x1p-23 * 2 * job_size() + allowed(kind(), DType::bf16, DType::fp32, 1));
  }
}

TEST_P(ReduceScatter, KeepsNonFiniteValuesWhereTheyAre) {
  AnyWorld world(kind());
  constexpr std::int64_t count = 10;
  std::vector<float> send(static_cast<std::size_t>(count * job_size()), 1.0F);
  if (job_rank() == job_size() - 1) {
    send[3] = std::numeric_limits<float>::quiet_NaN();
    send[5] = -std::numeric_limits<float>::infinity();
  }
  std::vector<float> result(count);

  world.transport.reduce_scatter(send.data(), result.data(), count,
                                 {.source = DType::fp32,
                                  .wire = DType::fp32,
                                  .result = DType::fp32,
                                  .factor = 1,
                                  .mode = SumMode::assign},
                                 operation, {});

  for (std::int64_t i = 0; i < count; ++i) {
    const float value = result[static_cast<std::size_t>(i)];
    if (job_rank() == 0 && i == 3) {
      EXPECT_TRUE(std::isnan(value));
    } else if (job_rank() == 0 && i == 5) {
      EXPECT_EQ(value, -std::numeric_limits<float>::infinity());
    } else {
      EXPECT_EQ(value, static_cast<float>(job_size()));
    }
  }
}

TEST_P(AllReduce, GivesEveryRankTheBitsOfTheSumInRankOrder) {
  for (const Nodes& nodes : OverTransports::nodes()) {
    AnyWorld world(kind(), nodes.label);
    for (const DType dtype : {DType::fp64, DType::fp32}) {
      for (const std::int64_t count : element_counts(dtype, true)) {
        SCOPED_TRACE(std::string(nodes.name) + ", " + std::string(name(dtype)) + ", " +
                     std::to_string(count) + " elements");
        visit_arithmetic(dtype, [&](auto tag) {
          using T = typename decltype(tag)::type;
          auto data = elements_of<T>(job_rank(), count, value_of);

          world.transport.all_reduce(
              data.data(), count, {.source = dtype, .wire = dtype, .result = dtype}, operation, {});

          std::int64_t differences = 0;
          for (std::int64_t i = 0; i < count; ++i) {
            T expected = static_cast<T>(value_of(0, i));
            for (int rank = 1; rank < job_size(); ++rank) {
              expected += static_cast<T>(value_of(rank, i));
            }
            differences += is_near(data[static_cast<std::size_t>(i)], expected,
                                   allowed(kind(), dtype, dtype, 1))
                               ? 0
                               : 1;
          }
          EXPECT_EQ(differences, 0);
        });
      }
    }
  }
}

/// Every combination of dtypes that a gradient, the network and an accumulator may have.
template <class F>
void for_each_reduction(const F& f) {
  constexpr std::array all{DType::fp64, DType::fp32, DType::bf16, DType::fp16};
  for (const DType source : all) {
    for (const DType wire : all) {
      for (const DType result : all) {
        for (const double factor : {1.0, 0.25}) {
          SCOPED_TRACE(std::string(name(source)) + " over " + std::string(name(wire)) + " into " +
                       std::string(name(result)) + ", factor " + std::to_string(factor));
          f(Reduction{.source = source, .wire = wire, .result = result, .factor = factor});
        }
      }
    }
  }
}

/// An array whose element type is known at run time.
class Elements {
 public:
  Elements(DType dtype, std::int64_t count)
      : dtype_(dtype), bytes_(static_cast<std::size_t>(count * bytes_of(dtype))) {}
  void set(std::int64_t i, double value) {
    visit(dtype_, [&](auto tag) {
      using T = typename decltype(tag)::type;
      reinterpret_cast<T*>(bytes_.data())[i] = static_cast<T>(value);
    });
  }
  [[nodiscard]] double get(std::int64_t i) const {
    return visit(dtype_, [&](auto tag) {
      using T = typename decltype(tag)::type;
      return static_cast<double>(reinterpret_cast<const T*>(bytes_.data())[i]);
    });
  }
  [[nodiscard]] void* data() { return bytes_.data(); }

 private:
  DType dtype_;
  std::vector<std::byte> bytes_;
};

double round_to(DType dtype, double value) {
  return visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return static_cast<double>(static_cast<T>(value));
  });
}

// Numbers with so few bits that sums are exact in fp32, so that only the roundings to the wire and
// to the result show.
double addend(int rank, std::int64_t i) {
  return static_cast<double>((i * 37 + rank * 101) % 8191 - 4095) * 0x1p-4;
}
double expected_sum(const Reduction& r, std::int64_t i, double before) {
  double sum = 0;
  for (int rank = 0; rank < job_size(); ++rank) {
    const double source = round_to(r.source, addend(rank, i)) * r.factor;
    sum += job_size() > 1 ? round_to(r.wire, source) : source;
  }
  return round_to(r.result, before + sum);
}

// Fails if the own piece is not rounded as those of others are, or a sum is rounded twice.
TEST_P(ReduceScatter, RoundsEachAddendToTheWireAndTheSumOnce) {
  AnyWorld world(kind());
  for_each_reduction([&](Reduction reduction) {
    const std::int64_t chunk = MpiTransport::staging_bytes(2, false) / 2 / 8;
    for (const std::int64_t count : {std::int64_t{1}, std::int64_t{1021}, chunk + 3}) {
      if (count > 1021 && (reduction.source != DType::fp32 || job_size() > 4)) continue;
      Elements send(reduction.source, count * job_size());
      Elements result(reduction.result, count);
      for (std::int64_t i = 0; i < count * job_size(); ++i) send.set(i, addend(job_rank(), i));
      for (std::int64_t i = 0; i < count; ++i) result.set(i, 2);
      reduction.mode = count == 1 ? SumMode::assign : SumMode::add;

      world.transport.reduce_scatter(send.data(), result.data(), count, reduction, operation, {});

      std::int64_t differences = 0;
      for (std::int64_t i = 0; i < count; ++i) {
        const double expected =
            expected_sum(reduction, job_rank() * count + i, reduction.mode == SumMode::add ? 2 : 0);
        differences +=
            is_near(result.get(i), expected, allowed(kind(), reduction.wire, reduction.result, 256))
                ? 0
                : 1;
      }
      EXPECT_EQ(differences, 0) << count << " elements";
    }
  });
}

// Fails if the rank that computed a sum keeps bits of it that the others never see.
TEST_P(AllReduce, GivesEveryRankTheSameBitsInEveryWireDtype) {
  AnyWorld world(kind());
  for_each_reduction([&](const Reduction& reduction) {
    if (reduction.source != reduction.result) return;
    for (const std::int64_t count : {0, 1, 1021, 70'001}) {
      Elements data(reduction.source, count);
      for (std::int64_t i = 0; i < count; ++i) data.set(i, addend(job_rank(), i));

      world.transport.all_reduce(data.data(), count, reduction, operation, {});

      std::int64_t differences = 0;
      for (std::int64_t i = 0; i < count; ++i) {
        double expected = expected_sum(reduction, i, 0);
        if (job_size() > 1) expected = round_to(reduction.wire, expected);
        differences += is_near(data.get(i), round_to(reduction.result, expected),
                               allowed(kind(), reduction.wire, reduction.result, 256))
                           ? 0
                           : 1;
      }
      // Whatever the sums are, they are the same on all ranks.
      const std::int64_t bytes = count * bytes_of(reduction.result);
      std::vector<std::byte> first(static_cast<std::size_t>(bytes));
      if (bytes > 0) std::memcpy(first.data(), data.data(), first.size());
      MPI_Bcast(first.data(), static_cast<int>(bytes), MPI_BYTE, 0, MPI_COMM_WORLD);
      EXPECT_TRUE(bytes == 0 || std::memcmp(first.data(), data.data(), first.size()) == 0);
      EXPECT_EQ(differences, 0) << count << " elements";
    }
  });
}

// Fails if fp16 addends are sent without the factor: 40000 + 40000 is infinite in fp16.
TEST_P(ReduceScatter, DoesNotOverflowWhereTheMeanWouldNot) {
  AnyWorld world(kind());
  constexpr std::int64_t count = 3;
  const double parts = job_size();
  std::vector<float> send(static_cast<std::size_t>(count * job_size()), 100'000.0F);
  std::vector<fp16> result(count);
  const Reduction reduction{
      .source = DType::fp32, .wire = DType::fp16, .result = DType::fp16, .factor = 0.25 / parts};

  world.transport.reduce_scatter(send.data(), result.data(), count, reduction, operation, {});

  for (const fp16 value : result) {
    EXPECT_NEAR(static_cast<double>(value), 25'000.0,
                25'000.0 * 0x1p-9 + allowed(kind(), DType::fp16, DType::fp16, 25'000.0 / parts));
  }
}

TEST_P(AllGatherSmall, PutsEveryRanksBytesInRankOrder) {
  for (const Nodes& nodes : OverTransports::nodes()) {
    AnyWorld world(kind(), nodes.label);
    for (const std::int64_t count : {0, 1, 3, 8, 40, 1001}) {
      SCOPED_TRACE(std::string(nodes.name) + ", " + std::to_string(count) + " bytes");
      const auto send = bytes_of_rank(job_rank(), count);
      const auto expected = bytes_of_all(count);
      std::vector<std::byte> receive(expected.size(), std::byte{0xEE});

      world.transport.all_gather_small(send.data(), receive.data(), count, operation);

      EXPECT_TRUE(receive == expected);
    }
  }
}

TEST_P(Broadcast, CopiesFromEveryRoot) {
  AnyWorld world(kind());
  for (const std::int64_t count : byte_counts()) {
    for (int root = 0; root < job_size(); ++root) {
      SCOPED_TRACE(std::to_string(count) + " bytes from rank " + std::to_string(root));
      auto data = bytes_of_rank(job_rank(), count);

      world.transport.broadcast(data.data(), count, root, operation);

      EXPECT_TRUE(data == bytes_of_rank(root, count));
    }
  }
}

TEST_P(Barrier, IsLeftByNoRankBeforeAllHaveEntered) {
  AnyWorld world(kind());
  for (int late = 0; late < job_size(); ++late) {
    if (job_rank() == late) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    const auto now = [] {
      return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
          .count();
    };
    double entered = now();

    world.transport.barrier(operation);

    const double left = now();
    MPI_Allreduce(MPI_IN_PLACE, &entered, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    EXPECT_GE(left, entered) << "rank " << late << " was late";
  }
}

TEST_P(AnyTransport, KnowsItsPlace) {
  const AnyWorld world(kind());

  EXPECT_EQ(world.transport.rank(), job_rank());
  EXPECT_EQ(world.transport.size(), job_size());
  EXPECT_EQ(world.transport.memory(), kind() == Kind::mpi ? Memory::host : Memory::device);
}

}  // namespace
}  // namespace mics::comm::test
