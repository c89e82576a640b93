// SPDX-License-Identifier: Apache-2.0
#include <mics/base/dtype.hpp>
#include <mics/base/error.hpp>
#include <mics/state/arena.hpp>
#include <mics/state/flat_model.hpp>
#include <mics/state/for_blocks.hpp>
#include <mics/state/initialize.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace mics::state {
namespace {

/// Two units of several dtypes and kinds.
struct Mixed {
  Model model;
  UnitId a = model.unit("a");
  UnitId b = model.unit("b");
  ParameterId w = model.parameter(a, "w", {100});
  ParameterId frozen = model.parameter(a, "frozen", {30}, {.trainable = false});
  ParameterId half = model.parameter(a, "half", {70}, {.dtype = DType::bf16});
  ParameterId small = model.parameter(a, "small", {3});
  ParameterId v = model.parameter(b, "v", {10, 10});
  ParameterId scalar = model.parameter(b, "scalar", {});
};

TEST(FlatModelTest, MakesOneBufferPerUnitDtypeAndKind) {
  const Mixed m;

  const FlatModel flat(m.model, DType::fp32, 2, 1, {});

  ASSERT_EQ(flat.buffer_count(), 4);
  EXPECT_EQ(flat.buffers_of(m.a).size(), 3U);
  EXPECT_EQ(flat.buffers_of(m.b).size(), 1U);
  EXPECT_TRUE(flat.persistent_buffers().empty());
  EXPECT_EQ(flat.place(m.w).buffer, flat.place(m.small).buffer);
  EXPECT_NE(flat.place(m.w).buffer, flat.place(m.frozen).buffer);
  EXPECT_NE(flat.place(m.w).buffer, flat.place(m.half).buffer);
  EXPECT_FALSE(flat.buffer(flat.place(m.frozen).buffer).trainable);
  EXPECT_EQ(flat.buffer(flat.place(m.half).buffer).dtype, DType::bf16);
  EXPECT_EQ(flat.buffer(flat.place(m.v).buffer).name, "b");
  std::set<std::string> names;
  for (const FlatBuffer& buffer : flat.buffers()) names.insert(buffer.name);
  EXPECT_EQ(names.size(), 4U);
}

TEST(FlatModelTest, PlacesAgreeWithTheBuffers) {
  const Mixed m;
  for (const std::int64_t threshold : {0, 50, 1000}) {
    const FlatModel flat(m.model, DType::fp32, 3, 2, {.threshold = threshold});

    std::set<int> seen;
    for (int b = 0; b < flat.buffer_count(); ++b) {
      const FlatBuffer& buffer = flat.buffer(b);
      ASSERT_EQ(buffer.flat.parameters(), std::ssize(buffer.parameters));
      for (std::size_t i = 0; i < buffer.parameters.size(); ++i) {
        const ParameterId id = buffer.parameters[i];
        EXPECT_TRUE(seen.insert(id.value).second);
        EXPECT_EQ(flat.place(id).buffer, b);
        EXPECT_EQ(flat.place(id).position, static_cast<std::int64_t>(i));
        EXPECT_EQ(flat.place(id).range, buffer.flat.parameter(static_cast<std::int64_t>(i)));
        EXPECT_EQ(flat.place(id).range.length, m.model.spec(id).count);
        EXPECT_EQ(buffer.trainable, m.model.spec(id).options.trainable);
        EXPECT_EQ(buffer.dtype, m.model.spec(id).options.dtype.value_or(DType::fp32));
        EXPECT_TRUE(buffer.persistent() || buffer.unit == m.model.spec(id).unit.value);
      }
    }
    EXPECT_EQ(std::ssize(seen), m.model.parameters());
  }
}

TEST(FlatModelTest, TakesSmallParametersGreedilyInOrderUpToTheModelThreshold) {
  const Mixed m;
  const auto persistent = [&](std::int64_t threshold, std::int64_t of_model) {
    const FlatModel flat(m.model, DType::fp32, 2, 1,
                         {.threshold = threshold, .model_threshold = of_model});
    std::set<int> ids;
    for (const int b : flat.persistent_buffers()) {
      EXPECT_TRUE(flat.buffer(b).persistent());
      for (const ParameterId id : flat.buffer(b).parameters) ids.insert(id.value);
    }
    return ids;
  };
  using Ids = std::set<int>;

  EXPECT_EQ(persistent(0, INT64_MAX), Ids{});
  EXPECT_EQ(persistent(3, INT64_MAX), (Ids{m.small.value, m.scalar.value}));
  EXPECT_EQ(persistent(2, INT64_MAX), (Ids{m.scalar.value}));
  EXPECT_EQ(persistent(70, INT64_MAX),
            (Ids{m.frozen.value, m.half.value, m.small.value, m.scalar.value}));
  EXPECT_EQ(persistent(70, 100), (Ids{m.frozen.value, m.half.value}));
  EXPECT_EQ(persistent(70, 34), (Ids{m.frozen.value, m.small.value, m.scalar.value}));
}

TEST(FlatModelTest, CountsTheBytesOfASlot) {
  const Mixed m;

  const FlatModel flat(m.model, DType::fp32, 2, 1, {});

  // Buffers of 512 elements: fp32 trainable and frozen, bf16.
  EXPECT_EQ(flat.gathered_bytes(m.a), 512 * 4 + 512 * 4 + 512 * 2);
  EXPECT_EQ(flat.gathered_bytes(m.b), 512 * 4);
}

TEST(HyperRunsTest, CoverAnyRangeWithTheFactorsOfItsParameters) {
  Model model;
  const UnitId a = model.unit("a");
  const auto add = [&](const char* name, std::int64_t count, double decay, double rate) {
    (void)model.parameter(a, name, {count},
                          {.weight_decay_factor = decay, .learning_rate_factor = rate});
  };
  add("w", 300, 1, 1);
  add("same", 65, 1, 1);
  add("bias", 7, 0, 1);
  add("none", 0, 3, 3);
  add("slow", 200, 0, 0.5);
  add("last", 100, 1, 1);
  const FlatModel flat(model, DType::fp32, 3, 1, {});
  const FlatBuffer& buffer = flat.buffer(0);

  for (std::int64_t offset = 0; offset < buffer.flat.count(); offset += 32) {
    for (const std::int64_t length : {1, 64, 256, 700}) {
      const layout::Interval range{offset, std::min(length, buffer.flat.count() - offset)};

      const auto runs = hyper_runs(model, buffer, range);

      ASSERT_FALSE(runs.empty());
      std::int64_t next = 0;
      for (const HyperRun& run : runs) {
        ASSERT_EQ(run.begin, next);
        ASSERT_GT(run.end, run.begin);
        next = run.end;
        for (std::size_t i = 0; i < buffer.parameters.size(); ++i) {
          const auto& place = buffer.flat.parameter(static_cast<std::int64_t>(i));
          const auto common =
              layout::intersection(place, {range.offset + run.begin, run.end - run.begin});
          if (common.empty()) continue;
          const ParameterOptions& options = model.spec(buffer.parameters[i]).options;
          ASSERT_EQ(run.weight_decay_factor, options.weight_decay_factor);
          ASSERT_EQ(run.learning_rate_factor, options.learning_rate_factor);
        }
      }
      ASSERT_EQ(next, range.length);
    }
  }
  // Neighbours that agree are one run.
  EXPECT_EQ(hyper_runs(model, buffer, {0, 365}).size(), 1U);
}

TEST(TensorSegmentsTest, AreThePartsOfTheTensorsThatLieInARange) {
  Model model;
  const UnitId a = model.unit("a");
  for (const std::int64_t count : {300, 65, 0, 7, 200}) {
    (void)model.parameter(a, "w" + std::to_string(count), {count});
  }
  const FlatModel flat(model, DType::fp32, 3, 1, {});
  const FlatBuffer& buffer = flat.buffer(0);

  for (std::int64_t offset = 0; offset < buffer.flat.count(); offset += 32) {
    for (const std::int64_t length : {0, 1, 64, 256, 700}) {
      const layout::Interval range{offset, std::min(length, buffer.flat.count() - offset)};

      const auto segments = tensor_segments(buffer, range);

      std::int64_t elements = 0;
      std::int64_t end = 0;
      for (const TensorSegment& segment : segments) {
        ASSERT_GE(segment.begin, end);
        ASSERT_GT(segment.end, segment.begin);
        end = segment.end;
        const layout::Interval part{range.offset + segment.begin, segment.end - segment.begin};
        ASSERT_EQ(layout::intersection(buffer.flat.parameter(segment.tensor), part), part);
        elements += part.length;
      }
      ASSERT_LE(end, range.length);
      std::int64_t expected = 0;
      for (std::int64_t i = 0; i < buffer.flat.parameters(); ++i) {
        expected += layout::intersection(buffer.flat.parameter(i), range).length;
      }
      ASSERT_EQ(elements, expected);
    }
  }
}

TEST(InitializeTest, GivesEveryCutOfABufferTheSameBitsAndLeavesGapsAlone) {
  Model model;
  const UnitId a = model.unit("a");
  (void)model.parameter(a, "normal", {13, 7}, {.init = Init::normal(1)});
  (void)model.parameter(
      a, "left", {5, 11},
      {.init = Init::function([](std::int64_t i) { return static_cast<double>(i); }),
       .layout = MemoryLayout::left});
  (void)model.parameter(a, "ones", {200}, {.init = Init::ones()});
  for (const int shards : {1, 2, 3, 7}) {
    const FlatModel flat(model, DType::bf16, shards, 1, {});
    const FlatBuffer& buffer = flat.buffer(0);
    const auto count = static_cast<std::size_t>(buffer.flat.count());
    std::vector<float> master(count, -7.0F);
    std::vector<bf16> compute(count, bf16(-7.0F));

    for (int tau = 0; tau < shards; ++tau) {
      const auto shard = buffer.flat.shard(tau);
      initialize(model, buffer, shard, 11, master.data() + shard.offset, DType::fp32,
                 compute.data() + shard.offset);
    }

    std::vector<bool> covered(count, false);
    for (std::size_t p = 0; p < 3; ++p) {
      const ParameterSpec& spec = model.spec(buffer.parameters[p]);
      const auto& place = buffer.flat.parameter(static_cast<std::int64_t>(p));
      for (std::int64_t i = 0; i < place.length; ++i) {
        const auto at = static_cast<std::size_t>(place.offset + i);
        const auto index = element_index(spec.shape, spec.options.layout, i);
        const auto expected =
            static_cast<float>(spec.options.init(11, buffer.parameters[p], index));
        EXPECT_EQ(master[at], expected) << spec.name << " element " << index;
        EXPECT_EQ(compute[at], bf16(expected)) << spec.name << " element " << index;
        covered[at] = true;
      }
    }
    for (std::size_t i = 0; i < count; ++i) {
      if (covered[i]) continue;
      EXPECT_EQ(master[i], -7.0F);
      EXPECT_EQ(compute[i], bf16(-7.0F));
    }
  }
}

TEST(ArenaTest, HandsOutClearedAlignedRegionsAndNoMoreThanItHas) {
  Arena arena(arena_bytes(10) + arena_bytes(300) + arena_bytes(0));

  std::byte* const first = arena.take(10, "first");
  std::byte* const second = arena.take(300, "second");

  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(first) % arena_alignment, 0U);
  EXPECT_EQ(second - first, 256);
  EXPECT_EQ(arena.used(), 256 + 512);
  for (int i = 0; i < 300; ++i) EXPECT_EQ(second[i], std::byte{0});
  EXPECT_NO_THROW((void)arena.take(0, "nothing"));
  try {
    (void)arena.take(1, "the last straw");
    FAIL() << "no error";
  } catch (const StateError& error) {
    EXPECT_NE(std::string(error.what()).find("the last straw"), std::string::npos) << error.what();
  }
}

TEST(ArenaTest, RoundsUpToItsAlignment) {
  static_assert(arena_bytes(0) == 0 && arena_bytes(1) == 256 && arena_bytes(256) == 256);
  EXPECT_EQ(arena_bytes((std::int64_t{1} << 40) + 1), (std::int64_t{1} << 40) + 256);
}

TEST(ForBlocksTest, VisitsEveryElementOnceInFixedBlocks) {
  for (const std::int64_t count : {std::int64_t{0}, std::int64_t{1}, block_count - 1, block_count,
                                   block_count + 1, 5 * block_count + 77}) {
    auto visits = std::make_unique<std::atomic<int>[]>(static_cast<std::size_t>(count) + 1);
    std::atomic<int> misplaced{0};

    for_blocks("test", count, [&](std::int64_t begin, std::int64_t end) {
      if (begin % block_count != 0 || end - begin > block_count) ++misplaced;
      for (std::int64_t i = begin; i < end; ++i) ++visits[static_cast<std::size_t>(i)];
    });

    EXPECT_EQ(misplaced, 0);
    for (std::int64_t i = 0; i < count; ++i) ASSERT_EQ(visits[static_cast<std::size_t>(i)], 1);
  }
}

TEST(ClearTest, ClearsExactlyTheGivenBytes) {
  for (const std::int64_t bytes :
       {std::int64_t{0}, std::int64_t{1}, std::int64_t{1} << 20, (std::int64_t{3} << 20) + 13}) {
    std::vector<std::byte> data(static_cast<std::size_t>(bytes) + 1, std::byte{9});

    clear("test", data.data(), bytes);

    for (std::int64_t i = 0; i < bytes; ++i) {
      ASSERT_EQ(data[static_cast<std::size_t>(i)], std::byte{0});
    }
    EXPECT_EQ(data.back(), std::byte{9});
  }
}

}  // namespace
}  // namespace mics::state
