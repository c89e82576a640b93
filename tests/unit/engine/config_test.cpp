// SPDX-License-Identifier: Apache-2.0
#include "toy.hpp"
#include <mics/engine/config.hpp>

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace mics::test {
namespace {

Config parse(const std::string& text) { return Config::parse(text, "deck.json"); }

TEST(ConfigTest, ShardSizeNodeIsTheRanksOfANodeOrTheMostThatDivideTheWorld) {
  const Config config = parse(R"({"mics": {"preset": "mics", "shard_size": "node"}})");
  const auto size = [&](std::vector<int> nodes) { return config.shard_size_for(nodes); };

  EXPECT_EQ(size({0}), 1);
  EXPECT_EQ(size({4, 4, 9, 9}), 2);
  EXPECT_EQ(size({0, 1, 0, 1, 0, 1}), 3);
  EXPECT_EQ(size({0, 0, 0}), 3);
  EXPECT_EQ(size({0, 0, 1}), 1);
  EXPECT_EQ(size({0, 0, 0, 1, 1, 1, 1, 1}), 2);  // 3 does not divide 8
}

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
  EXPECT_EQ(config.two_stage, Switch::automatic);
  EXPECT_EQ(config.persistence_threshold, 10'000);
  EXPECT_EQ(config.report.with(KeyFate::without_effect).size(), 3U)
      << "overlap_comm, reduce_bucket_size, steps_per_print";
}

TEST(ConfigTest, StagesAreThePresets) {
  EXPECT_EQ(parse(R"({"zero_optimization": {"stage": 0}})").preset, Preset::ddp);
  EXPECT_EQ(parse(R"({"zero_optimization": {"stage": 2}})").preset, Preset::zero2);
  EXPECT_EQ(parse(R"({"zero_optimization": {"stage": 3}})").preset, Preset::zero3);
  const std::vector<int> one_node_of_8(8, 0);
  EXPECT_EQ(parse(R"({"mics": {"preset": "mics", "shard_size": 2}})").shard_size_for(one_node_of_8),
            2);
  EXPECT_EQ(parse(R"({"mics": {"preset": "ddp"}})").shard_size_for(one_node_of_8), 1);
  EXPECT_EQ(parse(R"({"mics": {"preset": "zero2"}})").shard_size_for(one_node_of_8), 8);
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

const KeyNote* note_of(const Config& config, const std::string& key) {
  for (const KeyNote& note : config.report.keys) {
    if (note.key == key) return &note;
  }
  return nullptr;
}

Config explain(const std::string& text, const DeckValues& deck = {}) {
  return Config::explain(JsonReader::parse(text, "deck.json"), deck);
}

// Text of an optimizer section.
Config with_optimizer(const std::string& section) {
  return parse(R"({"optimizer": )" + section + "}");
}

TEST(ConfigTest, OptimizersTakeTheDefaultsOfDeepSpeedsClasses) {
  const auto kind = [](const std::string& type) {
    return with_optimizer(R"({"type": ")" + type + "\"}").optimizer.kind;
  };
  EXPECT_EQ(kind("AdamW"), OptimizerKind::adamw);
  EXPECT_EQ(kind("ADAMW"), OptimizerKind::adamw);
  EXPECT_EQ(kind("adam"), OptimizerKind::adamw);
  EXPECT_EQ(kind("SGD"), OptimizerKind::sgd);
  EXPECT_EQ(kind("Lion"), OptimizerKind::lion);
  EXPECT_EQ(kind("adagrad"), OptimizerKind::adagrad);
  EXPECT_EQ(kind("LAMB"), OptimizerKind::lamb);

  EXPECT_EQ(with_optimizer(R"({"type": "Lion"})").optimizer.betas, (std::array{0.9, 0.99}));
  EXPECT_EQ(with_optimizer(R"({"type": "Adagrad"})").optimizer.epsilon, 1e-10);
  EXPECT_EQ(with_optimizer(R"({"type": "Adagrad"})").optimizer.learning_rate, 1e-2);
  EXPECT_EQ(with_optimizer(R"({"type": "Lamb"})").optimizer.max_coefficient, 10);
  const Config sgd =
      with_optimizer(R"({"type": "SGD", "params": {"momentum": 0.9, "nesterov": true}})");
  EXPECT_EQ(sgd.optimizer.momentum, 0.9);
  EXPECT_TRUE(sgd.optimizer.nesterov);
}

TEST(ConfigTest, TheTypeAdamIsAdamWUnlessAdamWModeIsFalse) {
  const auto optimizer = [](const std::string& type, const std::string& params) {
    return with_optimizer(R"({"type": ")" + type + R"(", "params": {)" + params + "}}").optimizer;
  };
  EXPECT_EQ(optimizer("Adam", "").kind, OptimizerKind::adamw);
  EXPECT_EQ(optimizer("Adam", R"("adam_w_mode": true)").kind, OptimizerKind::adamw);
  EXPECT_EQ(optimizer("Adam", R"("adam_w_mode": false)").kind, OptimizerKind::adam);
  EXPECT_EQ(optimizer("AdamW", R"("adam_w_mode": false)").kind, OptimizerKind::adamw);
  // PyTorch's AdamW decays by 0.01 unless told otherwise, DeepSpeed's by 0.
  EXPECT_EQ(optimizer("Adam", "").weight_decay, 0);
  EXPECT_EQ(optimizer("Adam", R"("torch_adam": true)").kind, OptimizerKind::adamw);
  EXPECT_EQ(optimizer("Adam", R"("torch_adam": true)").weight_decay, 0.01);
  EXPECT_EQ(optimizer("Adam", R"("torch_adam": true, "weight_decay": 0.2)").weight_decay, 0.2);
  EXPECT_EQ(optimizer("Adam", R"("torch_adam": true, "adam_w_mode": false)").weight_decay, 0);
}

TEST(ConfigTest, ParametersOfAnotherOptimizerAreUnknown) {
  for (const char* section : {R"({"type": "AdamW", "params": {"momentum": 0.9}})",
                              R"({"type": "SGD", "params": {"betas": [0.9, 0.99]}})",
                              R"({"type": "Lion", "params": {"eps": 1e-8}})",
                              R"({"type": "Adagrad", "params": {"max_coeff": 1}})"}) {
    expect_error<ConfigError>([&] { (void)with_optimizer(section); }, {"a known key"});
  }
  expect_error<ConfigError>(
      [] { (void)with_optimizer(R"({"type": "AdamW", "params": {"max_grad_norm": 1}})"); },
      {"optimizer.params.max_grad_norm", "gradient_clipping"});
}

TEST(ConfigTest, SchedulesAreDeepSpeeds) {
  const auto schedule = [](const std::string& type, const std::string& params) {
    return parse(
               R"({"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}, "scheduler": {"type": ")" +
               type + R"(", "params": {)" + params + "}}}")
        .schedule;
  };
  EXPECT_EQ(schedule("WarmupLR", "").kind, ScheduleKind::warmup);
  EXPECT_EQ(schedule("WarmupLR", "").warmup_max_lr, 0.5) << "the optimizer's";
  EXPECT_EQ(schedule("WarmupLR", "").warmup_num_steps, 1000);
  EXPECT_EQ(schedule("WarmupDecayLR", R"("total_num_steps": 9)").warmup_max_lr, 1e-3);
  EXPECT_EQ(
      schedule("WarmupDecayLR", R"("total_num_steps": 9, "warmup_max_lr": "auto")").warmup_max_lr,
      0.5);
  const ScheduleConfig cosine =
      schedule("WarmupCosineLR", R"("total_num_steps": 1e4, "warmup_type": "linear")");
  EXPECT_EQ(cosine.total_num_steps, 10'000);
  EXPECT_EQ(cosine.warmup_type, WarmupShape::linear);
  EXPECT_EQ(cosine.cos_min_ratio, 1e-4);
  EXPECT_EQ(schedule("LRRangeTest", R"("lr_range_test_staircase": true)").range_staircase, true);
  const ScheduleConfig cycle = schedule(
      "OneCycle", R"("cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_second_step_size": 7)");
  EXPECT_EQ(cycle.cycle_max_lr, 0.2);
  EXPECT_EQ(cycle.cycle_second_step_size, 7);

  for (const auto& [type, params, key] : std::vector<std::array<std::string, 3>>{
           {"WarmupDecayLR", "", "total_num_steps"},
           {"WarmupCosineLR", "", "total_num_steps"},
           {"WarmupDecayLR", R"("total_num_steps": "auto")", "total_num_steps"},
           {"OneCycle", R"("cycle_min_lr": 0.1)", "cycle_max_lr"},
           {"OneCycle", R"("cycle_min_lr": 3, "cycle_max_lr": 2)", "cycle_min_lr"},
           {"WarmupLR", R"("warmup_type": "cubic")", "warmup_type"},
           {"WarmupLR", R"("warmup_num_steps": -1)", "warmup_num_steps"},
           {"LRRangeTest", R"("lr_range_test_step_size": 0)", "lr_range_test_step_size"},
           {"WarmupLR", R"("last_batch_iteration": 5)", "last_batch_iteration"},
           {"warmuplr", "", "scheduler.type"}}) {
    expect_error<ConfigError>([&, t = type, p = params] { (void)schedule(t, p); }, {key});
  }
}

TEST(ConfigTest, Fp16BringsALossScale) {
  const Config dynamic = parse(R"({"fp16": {"enabled": true}})");
  EXPECT_EQ(dynamic.compute, DType::fp16);
  EXPECT_TRUE(dynamic.loss_scale.dynamic);
  EXPECT_EQ(dynamic.loss_scale.initial, 65536);
  EXPECT_EQ(dynamic.loss_scale.window, 1000);
  EXPECT_EQ(dynamic.loss_scale.hysteresis, 2);

  const Config set = parse(R"({"fp16": {"enabled": true, "loss_scale": 0, "initial_scale_power": 10,
    "loss_scale_window": 5, "hysteresis": 3, "consecutive_hysteresis": true, "min_loss_scale": 2}})");
  EXPECT_EQ(set.loss_scale.initial, 1024);
  EXPECT_EQ(set.loss_scale.window, 5);
  EXPECT_EQ(set.loss_scale.hysteresis, 3);
  EXPECT_TRUE(set.loss_scale.consecutive_hysteresis);
  EXPECT_EQ(set.loss_scale.minimum, 2);

  const Config fixed = parse(R"({"fp16": {"enabled": true, "loss_scale": 128}})");
  EXPECT_FALSE(fixed.loss_scale.dynamic);
  EXPECT_EQ(fixed.loss_scale.initial, 128);

  for (const char* text : {"{}", R"({"bf16": {"enabled": true}})",
                           R"({"fp16": {"enabled": false, "loss_scale": 128}})"}) {
    EXPECT_FALSE(parse(text).loss_scale.dynamic) << text;
    EXPECT_EQ(parse(text).loss_scale.initial, 1) << text;
  }
  EXPECT_TRUE(parse(R"({"mics": {"compute_dtype": "fp16"}})").loss_scale.dynamic);

  for (const char* key :
       {R"("loss_scale": -1)", R"("loss_scale": true)", R"("loss_scale_window": 0)",
        R"("hysteresis": 0)", R"("min_loss_scale": 0)", R"("initial_scale_power": 200)",
        R"("min_loss_scale": 1e9)", R"("fp16_master_weights_and_grads": true)"}) {
    EXPECT_THROW((void)parse(R"({"fp16": {"enabled": true, )" + std::string(key) + "}}"),
                 ConfigError)
        << key;
  }
}

TEST(ConfigTest, DtypesComeFromTheirSections) {
  const Config config = parse(R"({"bf16": {"enabled": true}, "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "bf16"}, "mics": {"gradient_dtype": "fp32"}})");
  EXPECT_EQ(config.compute, DType::bf16);
  EXPECT_EQ(config.wire, DType::fp32);
  EXPECT_EQ(config.accumulate, DType::bf16);
  EXPECT_EQ(config.accumulate_for(DType::bf16), DType::bf16);
  EXPECT_EQ(config.gradient, DType::fp32);

  const Config silent = parse(R"({"bf16": {"enabled": true}})");
  EXPECT_EQ(silent.wire, std::nullopt);
  EXPECT_EQ(silent.gradient, std::nullopt);
  EXPECT_EQ(silent.accumulate_for(DType::bf16), DType::fp32);
  EXPECT_EQ(silent.accumulate_for(DType::fp64), DType::fp64);

  for (const char* text :
       {R"({"bf16": {"enabled": true}, "fp16": {"enabled": true}})",
        R"({"bf16": {"enabled": true}, "mics": {"compute_dtype": "fp32"}})",
        R"({"mics": {"compute_dtype": "fp64"}, "data_types": {"grad_accum_dtype": "fp32"}})",
        R"({"data_types": {"param_dtype": "bf16"}})", R"({"communication_data_type": "int8"})"}) {
    EXPECT_THROW((void)parse(text), ConfigError) << text;
  }
}

TEST(ConfigTest, OwnKeysAreRead) {
  const Config config = parse(R"({"mics": {"ema_decay": 0.99, "timeout": 5,
    "replica_check_every": 10, "replica_check_action": "repair"},
    "prescale_gradients": true, "gradient_predivide_factor": 4})");
  EXPECT_EQ(config.optimizer.ema_decay, 0.99);
  EXPECT_EQ(config.timeout, 5);
  EXPECT_EQ(config.replica_check_every, 10);
  EXPECT_EQ(config.replica_action, ReplicaCheck::repair);
  EXPECT_TRUE(config.prescale_gradients);
  EXPECT_EQ(config.gradient_predivide_factor, 4);
}

TEST(ConfigTest, AutoTakesTheDecksValueWhereItGivesOne) {
  const Config engine = parse(R"({"train_batch_size": 24, "bf16": {"enabled": true},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.25, "weight_decay": "auto"}}})");
  const DeckValues deck{.engine = engine, .steps = 900, .warmup_steps = 20};
  const Config config = Config::read(JsonReader::parse(R"({"train_batch_size": "auto",
    "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": "auto",
      "warmup_num_steps": "auto", "total_num_steps": "auto"}}})",
                                                       "ds.json"),
                                     deck);

  EXPECT_EQ(config.train_batch_size, 24);
  EXPECT_EQ(config.compute, DType::bf16);
  EXPECT_EQ(config.optimizer.learning_rate, 0.25);
  EXPECT_EQ(config.schedule.warmup_max_lr, 0.25);
  EXPECT_EQ(config.schedule.warmup_num_steps, 20);
  EXPECT_EQ(config.schedule.total_num_steps, 900);
  EXPECT_EQ(note_of(config, "optimizer.params.lr")->text, "learning rate: 0.25, the deck's");
  EXPECT_EQ(note_of(config, "optimizer.params.weight_decay")->text, "weight decay: 0, the default");
  EXPECT_EQ(config.gradient_clipping, 0);
}

TEST(ConfigTest, EveryKeyIsAccountedFor) {
  const Config config = explain(R"({"train_batch_size": 4, "wandb": {"enabled": true, "team": "t"},
    "aio": {}, "steps_per_print": 1, "bf16": {}, "gradient_clipping": null, "typo": 1,
    "zero_optimization": {"stage": 1, "overlap_comm": true, "offload_param": {"device": "nvme"}}})");

  EXPECT_FALSE(config.report.usable());
  EXPECT_EQ(config.report.with(KeyFate::refused).size(), 3U);
  for (const auto& [key, fate] : std::vector<std::pair<std::string, KeyFate>>{
           {"train_batch_size", KeyFate::honoured},
           {"wandb.enabled", KeyFate::without_effect},
           {"wandb.team", KeyFate::without_effect},
           {"aio", KeyFate::without_effect},
           {"steps_per_print", KeyFate::without_effect},
           {"bf16", KeyFate::honoured},
           {"gradient_clipping", KeyFate::honoured},
           {"typo", KeyFate::refused},
           {"zero_optimization.stage", KeyFate::refused},
           {"zero_optimization.overlap_comm", KeyFate::without_effect},
           {"zero_optimization.offload_param.device", KeyFate::refused}}) {
    const KeyNote* note = note_of(config, key);
    ASSERT_NE(note, nullptr) << key;
    EXPECT_EQ(note->fate, fate) << key;
    EXPECT_FALSE(note->text.empty()) << key;
  }
}

TEST(ConfigTest, AFileOfUnknownKeysEndsSoon) {
  std::string text = "{";
  for (int i = 0; i < 100'000; ++i) text += "\"key" + std::to_string(i) + "\": 1, ";

  const Config config = explain(text + "\"end\": 1}");

  EXPECT_EQ(config.report.with(KeyFate::refused).size(), 1001U);
  EXPECT_NE(config.report.keys.back().text.find("99001 keys"), std::string::npos)
      << config.report.keys.back().text;
}

TEST(ConfigTest, SectionsThatAreOffChangeNothingAndOnAreRefused) {
  for (const char* key :
       {"amp", "torch_autocast", "elasticity", "data_efficiency", "curriculum_learning",
        "progressive_layer_drop", "quantize_training", "compression_training"}) {
    const std::string section = "{\"" + std::string(key) + "\": {\"enabled\": ";
    EXPECT_EQ(parse(section + "false, \"x\": 1}}").report.with(KeyFate::without_effect).size(), 2U);
    expect_error<ConfigError>([&] { (void)parse(section + "true}}"); },
                              {std::string(key) + ".enabled"});
  }
  expect_error<ConfigError>(
      [] {
        (void)parse(R"({"compression_training": {"sparse_pruning": {"shared_parameters":
                        {"enabled": true}}}})");
      },
      {"compression_training"});
}

TEST(ConfigTest, DefaultsThatMovedAreNamedUnlessTheFileDecides) {
  const auto named = [](const std::string& text) {
    for (const DefaultNote& note : parse(text).report.defaults) {
      if (note.key == "gradient_clipping") return note.taken + "; " + note.elsewhere;
    }
    return std::string();
  };
  EXPECT_EQ(named("{}"), "0, off; 1.0; 0.0 before 2026-06-23");
  EXPECT_EQ(named(R"({"gradient_clipping": null})"), named("{}"));
  EXPECT_EQ(named(R"({"gradient_clipping": "auto"})"), named("{}"));
  EXPECT_EQ(named(R"({"gradient_clipping": 0.5})"), "");
}

TEST(ConfigTest, MessagesNameTheFileTheSectionAndTheFullKey) {
  auto deck = JsonReader::parse(
      R"({"engine": {"optimizer": {"type": "AdamW", "params": {"lr": -1}}}})", "deck.json");
  expect_error<ConfigError>([&] { (void)Config::read(deck.object("engine")); },
                            {"deck.json: engine.optimizer.params.lr: expected", "found -1"});
  Config config = Config::read(JsonReader::parse(R"({"train_batch_size": 5})", "ds.json"));
  config.gradient_clipping = -1;
  expect_error<ConfigError>([&] { config.validate(); }, {"ds.json: gradient_clipping"});
}

Batch solved(const std::string& text, int ranks) { return parse(text).solve_batch(ranks); }

TEST(ConfigTest, TheBatchTripleIsSolvedAsDeepSpeedDoes) {
  const auto expect = [](const std::string& text, std::int64_t global, std::int64_t steps) {
    EXPECT_EQ(solved(text, 4).global, global) << text;
    EXPECT_EQ(solved(text, 4).micro_steps, steps) << text;
  };
  const std::string micro = R"("train_micro_batch_size_per_gpu": 2)";
  const std::string steps = R"("gradient_accumulation_steps": 3)";
  expect("{" + micro + ", " + steps + "}", 24, 3);
  expect("{" + micro + R"(, "train_batch_size": 24})", 24, 3);
  expect("{" + steps + R"(, "train_batch_size": 24})", 24, 3);
  expect(R"({"train_batch_size": 24})", 24, 1);
  expect("{" + micro + "}", 8, 1);
  expect("{" + micro + ", " + steps + R"(, "train_batch_size": 24})", 24, 3);
  // Any number can be shared where no micro batch is given.
  expect(R"({"train_batch_size": 10})", 10, 1);
  expect("{" + steps + R"(, "train_batch_size": 10})", 10, 3);

  for (const std::string& text :
       {std::string("{}"), "{" + steps + "}", "{" + micro + R"(, "train_batch_size": 12})",
        "{" + micro + R"(, "train_batch_size": 4})", "{" + steps + R"(, "train_batch_size": 2})",
        "{" + micro + ", " + steps + R"(, "train_batch_size": 16})",
        std::string(R"({"train_micro_batch_size_per_gpu": 2147483647,
                        "gradient_accumulation_steps": 2147483647})")}) {
    EXPECT_THROW((void)solved(text, 4), ConfigError) << text;
  }
  // What no number of ranks solves is refused without knowing it.
  EXPECT_NO_THROW((void)parse("{" + micro + ", " + steps + R"(, "train_batch_size": 18})"));
  expect_error<ConfigError>(
      [&] { (void)parse("{" + micro + ", " + steps + R"(, "train_batch_size": 25})"); },
      {"train_batch_size", "a multiple of 2 a micro-step x 3 micro-steps", "25"});
}

TEST(BatchTest, EverySampleIsSeenOnce) {
  for (const std::int64_t global : {1, 7, 10, 24}) {
    for (const std::int64_t steps : {1, 2, 3, 7}) {
      for (const int ranks : {1, 3, 4}) {
        const Batch batch{.global = global, .micro_steps = steps};
        std::int64_t next = 0;
        for (std::int64_t m = 0; m < steps; ++m) {
          for (int rank = 0; rank < ranks; ++rank) {
            const Batch::Range range = batch.samples(m, rank, ranks);
            EXPECT_EQ(range.begin, next);
            EXPECT_LE(range.count(), batch.largest(ranks));
            next = range.end;
          }
        }
        EXPECT_EQ(next, global);
      }
    }
  }
  const Batch huge{.global = INT64_MAX, .micro_steps = INT32_MAX};
  EXPECT_EQ(huge.samples(INT32_MAX - 1, INT32_MAX - 1, INT32_MAX).end, INT64_MAX);
}

TEST(BatchTest, SharesTheExampleOfItsComment) {
  const Batch batch{.global = 10, .micro_steps = 2};
  const auto counts = [&](std::int64_t m) {
    return std::array{batch.samples(m, 0, 3).count(), batch.samples(m, 1, 3).count(),
                      batch.samples(m, 2, 3).count()};
  };
  EXPECT_EQ(counts(0), (std::array<std::int64_t, 3>{1, 2, 2}));
  EXPECT_EQ(counts(1), (std::array<std::int64_t, 3>{1, 2, 2}));
  EXPECT_EQ(batch.largest(3), 2);
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
  refused([](Config& c) { c.compute = DType::fp64, c.accumulate = DType::fp32; });
  refused([](Config& c) { c.preset = Preset::mics; });
  refused([](Config& c) { c.gradient_predivide_factor = 0; });
  refused([](Config& c) { c.gradient_predivide_factor = nan; });
  refused([](Config& c) { c.optimizer.momentum = 1; });
  refused([](Config& c) { c.optimizer.nesterov = true; });
  refused([](Config& c) { c.optimizer.ema_decay = 1; });
  refused([](Config& c) { c.optimizer.min_coefficient = 11; });
  refused([](Config& c) { c.loss_scale.initial = 0; });
  refused([](Config& c) { c.loss_scale.initial = nan; });
  refused([](Config& c) { c.loss_scale.dynamic = true, c.loss_scale.window = 0; });
  refused([](Config& c) { c.loss_scale.dynamic = true, c.loss_scale.factor = 1; });
  refused([](Config& c) { c.schedule.kind = ScheduleKind::warmup_decay; });
  refused([](Config& c) { c.replica_check_every = -1; });
  refused([](Config& c) { c.accumulation_steps = 0; });
  refused([](Config& c) { c.train_batch_size = 0; });
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
  add([](Config& c) { c.forward_only = true; });
  add([](Config& c) { c.compute = DType::bf16; });
  add([](Config& c) { c.master = DType::fp64; });
  add([](Config& c) { c.memory_budget = 7; });
  add([](Config& c) { c.ranks_per_node = 2; });
  add([](Config& c) { c.debug = true; });
  add([](Config& c) { c.persistence_threshold = 1; });
  add([](Config& c) { c.gradient_clipping = 1; });

  add([](Config& c) { c.gradient = DType::bf16; });
  add([](Config& c) { c.wire = DType::bf16; });
  add([](Config& c) { c.accumulate = DType::bf16; });
  add([](Config& c) { c.gradient_predivide_factor = 2; });
  add([](Config& c) { c.prescale_gradients = true; });
  add([](Config& c) { c.loss_scale.initial = 2; });
  add([](Config& c) { c.loss_scale.hysteresis = 1; });
  add([](Config& c) { c.schedule.kind = ScheduleKind::warmup; });
  add([](Config& c) { c.schedule.cycle_max_mom = 0.95; });
  add([](Config& c) { c.optimizer.momentum = 0.5; });
  add([](Config& c) { c.optimizer.bias_correction = false; });
  add([](Config& c) { c.optimizer.ema_decay = 0.5; });
  add([](Config& c) { c.replica_check_every = 1; });
  add([](Config& c) { c.replica_action = ReplicaCheck::repair; });
  add([](Config& c) { c.memory = Memory::device; });
  add([](Config& c) { c.nccl = Switch::off; });
  add([](Config& c) { c.share_device = true; });
  add([](Config& c) { c.device_sums = comm::DeviceSums::fp32; });

  EXPECT_EQ(texts.size(), 35U);
}

}  // namespace
}  // namespace mics::test
