// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/engine/config.hpp>
#include <mics/state/model.hpp>

#include <bench/commands.hpp>
#include <gpt/model.hpp>
#include <gpt/shape.hpp>

namespace mics::apps::bench {

/// The parameters of a GPT of 24 layers, 16 heads, 1024 positions and 50304 tokens, of which a
/// step's benches train as many as the width gives: 1.31e9 at 2048.
struct StepModel {
  explicit StepModel(int width);
  gpt::GptShape shape;
  Model model;
  gpt::GptIds ids;
};

/// An engine on device memory whose buffers are bf16 on the wire and in the accumulator: with one
/// micro-step reductions end in the accumulator itself.
[[nodiscard]] Config device_config(const Options& options);

}  // namespace mics::apps::bench
