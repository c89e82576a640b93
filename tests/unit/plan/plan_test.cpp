// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/plan/plan.hpp>

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

namespace mics {
namespace {

std::vector<int> blocks(int world, int node_size) {
  std::vector<int> node_of_rank;
  for (int rank = 0; rank < world; ++rank) node_of_rank.push_back(rank / node_size);
  return node_of_rank;
}

layout::GroupLayout groups(int world, int p, int node_size) {
  return layout::GroupLayout::make(blocks(world, node_size), p);
}

/// `count` units of one matrix of `elements`.
Model chain(int count, std::int64_t elements) {
  Model model;
  for (int u = 0; u < count; ++u) {
    (void)model.parameter(model.unit("unit" + std::to_string(u)), "weight", {elements});
  }
  return model;
}

PlanRequest request() {
  PlanRequest r;
  r.preset = "mics";
  return r;
}

TEST(PlanTest, CountsTheBytesOfEachPurpose) {
  // 4 units of 1024 elements, p = 4: shards of 256.
  PlanRequest r = request();
  r.compute = DType::bf16;
  const Plan plan(chain(4, 1024), groups(8, 4, 8), r);

  const MemoryPlan& memory = plan.memory();

  EXPECT_EQ(memory.compute_shards, 4 * 256 * 2);
  EXPECT_EQ(memory.master_weights, 4 * 256 * 4);
  EXPECT_EQ(memory.optimizer_states, 4 * 256 * 8);
  EXPECT_EQ(memory.accumulators, 4 * 256 * 4);
  EXPECT_EQ(memory.gather_slots, 2 * 1024 * 2);
  EXPECT_EQ(memory.gradient_slots, 2 * 1024 * 2);
  EXPECT_EQ(memory.resident, 0);
  EXPECT_EQ(memory.arena, memory.compute_shards + memory.master_weights + memory.optimizer_states +
                              memory.accumulators + memory.gather_slots + memory.gradient_slots +
                              memory.resident + memory.scratch);
  EXPECT_EQ(memory.total(), memory.arena + memory.staging);
}

TEST(PlanTest, NeedsNoMasterCopyWhereTheComputeDtypeIsTheMasters) {
  const Plan plan(chain(4, 1024), groups(4, 4, 4), request());

  EXPECT_EQ(plan.memory().master_weights, 0);
  EXPECT_TRUE(plan.master_is_compute(0));
}

TEST(PlanTest, FrozenBuffersHaveNoOptimizerStateAndNoGradient) {
  Model model;
  (void)model.parameter(model.unit("frozen"), "weight", {1024}, {.trainable = false});
  PlanRequest r = request();
  r.compute = DType::bf16;

  const Plan plan(model, groups(2, 2, 2), r);

  EXPECT_EQ(plan.memory().compute_shards, 512 * 2);
  EXPECT_EQ(plan.memory().master_weights, 0);
  EXPECT_EQ(plan.memory().optimizer_states, 0);
  EXPECT_EQ(plan.memory().accumulators, 0);
  EXPECT_EQ(plan.memory().gradient_slots, 0);
  EXPECT_TRUE(plan.hop2_order().empty());
  EXPECT_EQ(plan.count(1).hop1, 0);
}

TEST(PlanTest, SlotsHoldTheLargestUnitWhateverTheOrder) {
  Model model = chain(3, 512);
  (void)model.parameter(model.unit("large"), "weight", {100'000});
  PlanRequest r = request();
  r.slots = 3;

  const Plan plan(model, groups(4, 4, 4), r);

  EXPECT_GE(plan.gather_slot_bytes(), 100'000 * 4);
  EXPECT_LT(plan.gather_slot_bytes(), 110'000 * 4);
  EXPECT_EQ(plan.memory().gather_slots, 3 * plan.gather_slot_bytes());
}

TEST(PlanTest, CountsCollectivesOfAForwardAndABackwardPass) {
  // 4 units in 2 slots. Forward: 4 gathers; backward: the last two units are still there.
  const Plan plan(chain(4, 1024), groups(8, 4, 8), request());

  const CollectiveCounts one = plan.count(1);
  const CollectiveCounts five = plan.count(5);

  EXPECT_EQ(one.hop1, 4);
  EXPECT_EQ(one.hop2, 4);
  EXPECT_EQ(one.norm, 2);
  EXPECT_GE(one.gather, 6);
  EXPECT_LE(one.gather, 8);
  EXPECT_EQ(five.hop1, 20);
  EXPECT_EQ(five.hop2, 4);
  EXPECT_LE(five.gather, 40);
  EXPECT_GE(five.gather, 5 * 4);
}

TEST(PlanTest, MoreSlotsNeverMeanMoreGathers) {
  const Model model = chain(7, 512);
  std::int64_t before = INT64_MAX;
  for (int slots = 1; slots <= 8; ++slots) {
    PlanRequest r = request();
    r.slots = slots;
    r.prefetch = slots - 1;
    const auto gathers = Plan(model, groups(4, 4, 4), r).count(2).gather;
    EXPECT_LE(gathers, before) << slots << " slots";
    before = gathers;
  }
  EXPECT_EQ(before, 7) << "with a slot for each unit, one gather a step";
}

TEST(PlanTest, LeasesThatOverlapKeepTheirSlots) {
  // a, b, a and c together, b in two slots, nothing ahead. In turn: c takes the place of b or of a,
  // whichever is needed last, and b lies there still. With a held open, c can only push out b.
  const Plan plan(chain(3, 512), groups(4, 4, 4), [] {
    PlanRequest r = request();
    r.prefetch = 0;
    return r;
  }());
  const UnitId a{0}, b{1}, c{2};
  const auto end = [](UnitId unit) { return LeaseCall{.unit = unit, .begins = false}; };
  const std::vector<UnitId> in_turn{a, b, a, c, b};
  const std::vector<LeaseCall> held{{a}, end(a), {b},    end(b), {a},
                                    {c}, end(c), end(a), {b},    end(b)};

  EXPECT_EQ(plan.count(in_turn, 1).gather, 3);
  EXPECT_EQ(plan.count(held, 1).gather, 4);
  EXPECT_NE(plan.text(held).find("4 gathers"), std::string::npos);
}

TEST(PlanTest, RefusesMoreLeasesAtOnceThanSlots) {
  const Plan plan(chain(3, 512), groups(4, 4, 4), request());
  const std::vector<LeaseCall> calls{{UnitId{0}}, {UnitId{1}}, {UnitId{2}}};

  try {
    (void)plan.count(calls, 1);
    ADD_FAILURE() << "expected an exception";
  } catch (const ArgumentError& error) {
    EXPECT_NE(std::string(error.what()).find("at most 2 units at once"), std::string::npos)
        << error.what();
  }
}

TEST(PlanTest, OneRankMakesNoCollectives) {
  const Plan plan(chain(4, 1024), groups(1, 1, 1), request());

  EXPECT_EQ(plan.count(3), (CollectiveCounts{}));
}

TEST(PlanTest, KeptAndUnshardedBuffersStayGathered) {
  PlanRequest r = request();
  r.keep_gathered = true;
  const Plan kept(chain(4, 1024), groups(4, 4, 4), r);
  const Plan whole(chain(4, 1024), groups(4, 1, 4), request());

  EXPECT_TRUE(kept.resident(2));
  EXPECT_EQ(kept.count(5).gather, 4) << "once a step";
  EXPECT_TRUE(whole.resident(2));
  EXPECT_EQ(whole.count(5).gather, 0);
  EXPECT_EQ(whole.count(5).hop1, 0);
  EXPECT_EQ(whole.count(5).hop2, 4);
  EXPECT_EQ(whole.memory().gather_slots, 0);
}

TEST(PlanTest, PersistentParametersShareOneBuffer) {
  Model model;
  for (int u = 0; u < 5; ++u) {
    const UnitId unit = model.unit("unit" + std::to_string(u));
    (void)model.parameter(unit, "weight", {5000});
    (void)model.parameter(unit, "bias", {50});
  }
  PlanRequest r = request();
  r.persistence.threshold = 50;

  const Plan plan(model, groups(4, 4, 4), r);

  ASSERT_EQ(plan.flat().persistent_buffers().size(), 1U);
  EXPECT_TRUE(plan.resident(plan.flat().persistent_buffers().front()));
  EXPECT_EQ(plan.count(3).hop1, 3 * 6) << "five units and the persistent buffer";
}

TEST(PlanTest, TwoStagesAreTakenWherePossibleAndRefusedWhereRequiredInVain) {
  const Model model = chain(2, 1024);
  PlanRequest r = request();
  PlanRequest off = request();
  off.want_two_stage = false;
  PlanRequest required = request();
  required.require_two_stage = true;

  EXPECT_TRUE(Plan(model, groups(8, 8, 4), r).two_stage());
  EXPECT_FALSE(Plan(model, groups(8, 8, 4), off).two_stage());
  EXPECT_FALSE(Plan(model, groups(8, 4, 4), r).two_stage());
  EXPECT_NO_THROW(Plan(model, groups(8, 8, 4), required));
  EXPECT_THROW(Plan(model, groups(8, 4, 4), required), ArgumentError);
}

TEST(PlanTest, TextSaysTheGroupsBytesAndCollectivesAndWhatPreventsTwoStages) {
  const Plan plan(chain(4, 1024), groups(8, 4, 8), request());

  const std::string text = plan.text();

  const CollectiveCounts counts = plan.count(1);
  for (const std::string& part :
       {std::to_string(counts.gather) + " gathers",
        std::to_string(counts.hop1) + " reduce-scatters",
        std::to_string(counts.hop2) + " replica reductions", std::string("8 ranks"),
        std::string("mics"), std::string("fp32"), plan.layout().two_stage_obstacle()}) {
    EXPECT_NE(text.find(part), std::string::npos) << "no \"" << part << "\" in\n" << text;
  }
}

TEST(PlanTest, IsMadeFor512And100000RanksWithoutCommunication) {
  const Model model = chain(24, 7'000'001);
  PlanRequest r = request();
  r.compute = DType::bf16;
  std::int64_t before = INT64_MAX;
  for (const int p : {1, 8, 64, 512}) {
    const Plan plan(model, groups(512, p, 8), r);
    EXPECT_LT(plan.memory().total(), before) << "p=" << p;
    EXPECT_EQ(plan.two_stage(), p > 8);
    EXPECT_FALSE(plan.text().empty());
    before = plan.memory().total();
  }

  const Plan huge(model, groups(100'000, 1000, 4), r);

  EXPECT_EQ(huge.layout().replicas(), 100);
  EXPECT_GT(huge.memory().total(), 0);
}

TEST(PlanTest, CountsBeyond32Bits) {
  const std::int64_t big = (std::int64_t{1} << 33) + 7;
  const Plan plan(chain(1, big), groups(2, 2, 2), request());

  EXPECT_GE(plan.gather_slot_bytes(), big * 4);
  EXPECT_GE(plan.memory().compute_shards, big * 2);
  EXPECT_GE(plan.memory().optimizer_states, big * 4);
}

}  // namespace
}  // namespace mics
