// SPDX-License-Identifier: Apache-2.0
#include <mics/engine/detail/config_section.hpp>

// The section `zero_optimization`.

namespace mics::detail {

void read_zero(Section& zero, Config& config, const Deck& deck) {
  JsonReader& json = zero.json();
  std::int64_t stage = 0;
  zero.honour("stage", [&]() -> std::string {
    const std::optional<std::int64_t> of_deck =
        deck.of("zero_optimization.stage", [](const Config& c) -> std::int64_t {
          return c.preset == Preset::ddp ? 0 : c.preset == Preset::zero2 ? 2 : 3;
        });
    stage = json.is_auto("stage") ? of_deck.value_or(0) : json.integer("stage", {}, 0, 3);
    if (stage == 1) {
      refuse(zero.where("stage"), "0, 2 or 3", "1",
             "stage 2 gives the same numbers with less memory a rank");
    }
    return stage == 0   ? "preset ddp: everything on every rank"
           : stage == 2 ? "preset zero2: parameters gathered once a step"
                        : "parameters gathered when used";
  });
  config.preset = stage == 3 ? Preset::zero3 : stage == 2 ? Preset::zero2 : Preset::ddp;

  zero.honour("mics_shard_size", [&]() -> std::string {
    const std::string key = "mics_shard_size";
    std::int64_t size = -1;
    if (json.is_auto(key)) {
      size = deck.of("zero_optimization.mics_shard_size",
                     [](const Config& c) -> std::int64_t {
                       return c.preset == Preset::mics ? c.shard_size : -1;
                     })
                 .value_or(-1);
    } else {
      size = json.integer(key);
    }
    if (size == 0 || size < -1) {
      refuse(zero.where(key), "1 or more ranks, or -1 for all", std::to_string(size));
    }
    if (size == -1) return "off: shards over all ranks";
    if (stage != 3) refuse(zero.where(key), "stage 3", "stage " + std::to_string(stage));
    if (size > INT32_MAX) refuse(zero.where(key), "at most 2147483647", std::to_string(size));
    config.preset = Preset::mics;
    config.shard_size = static_cast<int>(size);
    return "preset mics: ranks that share one copy of the state";
  });
  zero.honour("mics_hierarchical_params_gather", [&]() -> std::string {
    // Without it the library decides; DeepSpeed's false is the default of a key seldom set.
    const std::string key = "mics_hierarchical_params_gather";
    if (!json.is_auto(key) && json.boolean(key)) {
      // One node has no second stage: the plan then says so and gathers flat.
      config.two_stage = Switch::automatic;
    }
    return "two stages where the nodes allow it";
  });
  for (const char* prefix : {"stage3_", ""}) {
    const std::string parameter = std::string(prefix) + "param_persistence_threshold";
    const std::string model = std::string(prefix) + "model_persistence_threshold";
    zero.integer(parameter, config.persistence_threshold,
                 "parameters of at most so many elements stay gathered", 0, INT64_MAX,
                 deck.of("zero_optimization." + parameter,
                         [](const Config& c) { return c.persistence_threshold; }));
    zero.integer(model, config.persistence_model_threshold,
                 "elements of all parameters that stay gathered", 0, INT64_MAX,
                 deck.of("zero_optimization." + model,
                         [](const Config& c) { return c.persistence_model_threshold; }));
  }

  for (const char* key : {"offload_optimizer", "offload_param"}) {
    zero.section(key, [&](Section& offload) {
      offload.honour("device", [&]() -> std::string {
        const std::string device = offload.json().text("device");
        if (device != "none" && device != "auto") {
          refuse(offload.where("device"), "\"none\"", in_quotes(device.substr(0, 60)),
                 "nothing is offloaded yet: more ranks or a larger shard size lower the memory of "
                 "a rank");
        }
        return "nothing is offloaded";
      });
      offload.rest_without_effect("nothing is offloaded");
    });
  }
  for (const char* key : {"cpu_offload", "cpu_offload_params", "cpu_offload_use_pin_memory"}) {
    zero.must_be_off(key, "nothing is offloaded yet; remove it");
  }
  zero.honour("zero_hpz_partition_size", [&]() -> std::string {
    const std::string key = "zero_hpz_partition_size";
    if (!json.is_auto(key) && json.integer(key, {}, 1) != 1) {
      refuse(zero.where(key), "1", json.shown(key),
             "mics_shard_size of as many ranks keeps gathers inside that group");
    }
    return "no second shards";
  });
  for (const char* key : {"zero_quantized_weights", "zero_quantized_nontrainable_weights",
                          "zero_quantized_gradients"}) {
    zero.must_be_off(key, "what is sent is never quantized; remove it");
  }
  for (const char* key : {"zeropp_loco_param", "zenflow"}) {
    zero.honour(key, [&]() -> std::string {
      refuse(zero.where(key), "no such key", json.shown(key),
             "it changes when and how gradients are applied; remove it");
    });
  }

  static constexpr std::string_view schedule =
      "mics.slots and mics.prefetch bound what is gathered";
  static constexpr std::string_view buffers =
      "a unit's buffer is one collective: there are no buckets";
  static constexpr std::string_view units = "the application declares the units";
  static constexpr std::array<Idle, 35> idle{
      {{"overlap_comm", "gathers start ahead and reductions go on while kernels run, if they can"},
       {"contiguous_gradients", "gradients of a unit always lie in one buffer"},
       {"reduce_scatter", "gradients are always reduce-scattered; the sums are the same"},
       {"reduce_bucket_size", buffers},
       {"allgather_partitions", buffers},
       {"allgather_bucket_size", buffers},
       {"use_multi_rank_bucket_allreduce", buffers},
       {"round_robin_gradients", buffers},
       {"legacy_stage1", "there is one implementation"},
       {"stage3_prefetch_bucket_size", schedule},
       {"prefetch_bucket_size", schedule},
       {"stage3_max_live_parameters", schedule},
       {"max_live_parameters", schedule},
       {"stage3_max_reuse_distance", schedule},
       {"max_reuse_distance", schedule},
       {"sub_group_size", "the update is one pass over the shard"},
       {"load_from_fp32_weights", "master weights never come from 16-bit copies"},
       {"elastic_checkpoint", "nothing of a run depends on it"},
       {"ignore_unused_parameters", "a unit without gradients keeps its values"},
       {"stage3_gather_16bit_weights_on_model_save", "no gathered 16-bit copy is saved"},
       {"gather_16bit_weights_on_model_save", "no gathered 16-bit copy is saved"},
       {"stage3_gather_fp16_weights_on_model_save", "no gathered 16-bit copy is saved"},
       {"stage3_module_granularity_threshold", units},
       {"module_granularity_threshold", units},
       {"leaf_module", units},
       {"stage3_use_all_reduce_for_fetch_params", "a gather gives the same bytes"},
       {"use_all_reduce_for_fetch_params", "a gather gives the same bytes"},
       {"stage3_allgather_sequential", "a gather gives the same bytes"},
       {"allgather_sequential", "a gather gives the same bytes"},
       {"memory_efficient_linear", "kernels are the application's"},
       {"override_module_apply", "initial values come from a generator, the same on every rank"},
       {"pipeline_loading_checkpoint", "nothing of a run depends on it"},
       {"log_trace_cache_warnings", "a changed order of units is always reported"},
       {"enable_sanity_checks", "mics.debug checks every collective"},
       {"save_muon_momentum_buffer_in_memory", "there is no Muon"}}};
  zero.without_effect(idle);
}

}  // namespace mics::detail
