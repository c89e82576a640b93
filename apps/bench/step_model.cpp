// SPDX-License-Identifier: Apache-2.0
#include <bench/step_model.hpp>

namespace mics::apps::bench {

StepModel::StepModel(int width)
    : shape{.layers = 24, .heads = 16, .width = width, .positions = 1024, .vocabulary = 50304},
      ids(gpt::declare(model, shape)) {}

Config device_config(const Options& options) {
  Config config = engine_config(options);
  config.memory = Memory::device;
  config.compute = DType::bf16;
  config.accumulate = DType::bf16;
  config.replica_check_every = 0;
  return config;
}

}  // namespace mics::apps::bench
