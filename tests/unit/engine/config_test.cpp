// SPDX-License-Identifier: Apache-2.0
#include "toy.hpp"
#include <mics/engine/config.hpp>

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace mics::test {
namespace {

Config parse(const std::string& text) { return Config::parse(text, "deck.json"); }

TEST(ConfigTest, ReadsTheKeysOfDeepSpeed) {
  const Config config = parse(R"({
    // a user's file, with comments
    "train_batch_size": 24, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.5,
    "optimizer": {"type": "AdamW",
                  "params": {"lr": 3e-4, "betas": [0.8, 0.95], "eps": 1e-9, "weight_decay": 0.1}},
    "bf16": {"enabled": true},
    "zero_optimization": {"stage": 3, "mics_shard_size": 4,
                          "mics_hierarchical_params_gather": true,
                          "stage3_param_persistence_threshold": 1e4,
                          "overlap_comm": true, "reduce_bucket_size": 5e8},
    "steps_per_print": 10
  })");

  EXPECT_EQ(config.train_batch_size, 24);
  EXPECT_EQ(config.micro_batch_size, 3);
  EXPECT_EQ(config.accumulation_steps, 2);
  EXPECT_EQ(config.gradient_clipping, 1.5);
  EXPECT_EQ(config.optimizer.kind, OptimizerKind::adamw);
  EXPECT_EQ(config.optimizer.learning_rate, 3e-4);
  EXPECT_EQ(config.optimizer.betas, (std::array{0.8, 0.95}));
  EXPECT_EQ(config.optimizer.epsilon, 1e-9);
  EXPECT_EQ(config.optimizer.weight_decay, 0.1);
  EXPECT_EQ(config.compute, DType::bf16);
  EXPECT_EQ(config.preset, Preset::mics);
  EXPECT_EQ(config.shard_size, 4);
  EXPECT_EQ(config.two_stage, Switch::on);
  EXPECT_EQ(config.persistence_threshold, 10'000);
  EXPECT_EQ(config.report.with(KeyFate::without_effect).size(), 3U)
      << "overlap_comm, reduce_bucket_size, steps_per_print";
}

TEST(ConfigTest, StagesAreThePresets) {
  EXPECT_EQ(parse(R"({"zero_optimization": {"stage": 0}})").preset, Preset::ddp);
  EXPECT_EQ(parse(R"({"zero_optimization": {"stage": 2}})").preset, Preset::zero2);
  EXPECT_EQ(parse(R"({"zero_optimization": {"stage": 3}})").preset, Preset::zero3);
  EXPECT_EQ(parse(R"({"mics": {"preset": "mics", "shard_size": 2}})").shard_size_for(8), 2);
  EXPECT_EQ(parse(R"({"mics": {"preset": "ddp"}})").shard_size_for(8), 1);
  EXPECT_EQ(parse(R"({"mics": {"preset": "zero2"}})").shard_size_for(8), 8);
}

TEST(ConfigTest, AutoLeavesTheValueToTheDeckAndNullIsNoValue) {
  const Config config = parse(R"({
    "train_batch_size": "auto", "gradient_clipping": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
    "gradient_accumulation_steps": null})");

  EXPECT_EQ(config.train_batch_size, std::nullopt);
  EXPECT_EQ(config.accumulation_steps, std::nullopt);
  EXPECT_EQ(config.optimizer.learning_rate, Config().optimizer.learning_rate);
}

TEST(ConfigTest, UnknownKeysGetASuggestion) {
  expect_error<ConfigError>([] { (void)parse(R"({"gradient_cliping": 1})"); },
                            {"deck.json", "gradient_cliping", "gradient_clipping"});
  expect_error<ConfigError>([] { (void)parse(R"({"mics": {"slot": 3}})"); },
                            {"mics.slot", "slots"});
  expect_error<ConfigError>(
      [] { (void)parse(R"({"zero_optimization": {"stage": 3, "mics_shard_sise": 4}})"); },
      {"zero_optimization.mics_shard_sise", "mics_shard_size"});
}

TEST(ConfigTest, ValuesThatCanNeverWorkAreRefusedWithTheirKey) {
  expect_error<ConfigError>([] { (void)parse(R"({"zero_optimization": {"mics_shard_size": 0}})"); },
                            {"mics_shard_size", "0"});
  expect_error<ConfigError>([] { (void)parse(R"({"gradient_clipping": -1})"); },
                            {"gradient_clipping", "-1"});
  expect_error<ConfigError>(
      [] { (void)parse(R"({"optimizer": {"type": "AdamW", "params": {"lr": -1}}})"); },
      {"lr", "-1"});
  expect_error<ConfigError>(
      [] { (void)parse(R"({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 1.0]}}})"); },
      {"betas"});
  expect_error<ConfigError>([] { (void)parse(R"({"mics": {"slots": 0}})"); }, {"slots", "0"});
  expect_error<ConfigError>([] { (void)parse(R"({"mics": {"preset": "zero4"}})"); },
                            {"preset", "zero4", "zero3"});
  expect_error<ConfigError>([] { (void)parse(R"({"mics": {"master_dtype": "bf16"}})"); },
                            {"master_dtype"});
  expect_error<ConfigError>([] { (void)parse(R"({"gradient_clipping": "1"})"); },
                            {"gradient_clipping"});
  expect_error<ConfigError>([] { (void)parse(R"({"train_batch_size": 2.5})"); },
                            {"train_batch_size", "2.5"});
}

TEST(ConfigTest, WhatWouldChangeTheNumbersIsRefusedRatherThanIgnored) {
  for (const char* text :
       {R"({"zero_optimization": {"stage": 1}})", R"({"optimizer": {"type": "Muon"}})",
        R"({"optimizer": {"type": "OneBitAdam"}})",
        R"({"optimizer": {"type": "Adam", "params": {"amsgrad": true}}})",
        R"({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}})",
        R"({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}})",
        R"({"zero_optimization": {"stage": 3, "zero_quantized_weights": true}})",
        R"({"bf16": {"enabled": true, "bf16_optimizer_states": true}})",
        R"({"amp": {"enabled": true}})", R"({"elasticity": {"enabled": true}})",
        R"({"scheduler": {"type": "CosineAnnealingLR"}})", R"({"gradient_allreduce_op": "sum"})"}) {
    EXPECT_THROW((void)parse(text), ConfigError) << text;
  }
}

TEST(ConfigTest, ValidateFindsWhatAProgramSetWrongly) {
  const auto refused = [](auto&& change) {
    Config config;
    change(config);
    EXPECT_THROW(config.validate(), ConfigError);
  };
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();

  EXPECT_NO_THROW(Config().validate());
  refused([](Config& c) { c.optimizer.learning_rate = nan; });
  refused([](Config& c) { c.optimizer.betas[1] = nan; });
  refused([](Config& c) { c.optimizer.epsilon = -1; });
  refused([](Config& c) { c.gradient_clipping = nan; });
  refused([](Config& c) { c.timeout = 0; });
  refused([](Config& c) { c.slots = 0; });
  refused([](Config& c) { c.prefetch = -1; });
  refused([](Config& c) { c.ranks_per_node = 0; });
  refused([](Config& c) { c.persistence_threshold = -1; });
  refused([](Config& c) { c.master = DType::bf16; });
  refused([](Config& c) { c.compute = DType::fp64, c.master = DType::fp32; });
}

TEST(ConfigTest, DescriptionsDifferInTheLastBit) {
  std::set<std::string> texts;
  const auto add = [&](auto&& change) {
    Config config;
    change(config);
    texts.insert(config.describe());
  };

  add([](Config&) {});
  add([](Config& c) { c.optimizer.learning_rate = std::nextafter(1e-3, 1.0); });
  add([](Config& c) { c.optimizer.betas[0] = std::nextafter(0.9, 1.0); });
  add([](Config& c) { c.optimizer.epsilon *= 2; });
  add([](Config& c) { c.optimizer.kind = OptimizerKind::sgd; });
  add([](Config& c) { c.seed = 1; });
  add([](Config& c) { c.slots = 3; });
  add([](Config& c) { c.prefetch = 1; });
  add([](Config& c) { c.two_stage = Switch::off; });
  add([](Config& c) { c.compute = DType::bf16; });
  add([](Config& c) { c.master = DType::fp64; });
  add([](Config& c) { c.memory_budget = 7; });
  add([](Config& c) { c.ranks_per_node = 2; });
  add([](Config& c) { c.debug = true; });
  add([](Config& c) { c.persistence_threshold = 1; });
  add([](Config& c) { c.gradient_clipping = 1; });

  EXPECT_EQ(texts.size(), 16U);
}

}  // namespace
}  // namespace mics::test
