// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>
#include <program/session.hpp>

namespace mics::apps {

/// Adds `bench collectives|optimizer|checks|memory|checkpoint`, in a build with CUDA `gpt|overlap`
/// and with NCCL `device|step`, each of which sets `action` when it is chosen.
void add_bench(CLI::App& app, const Session& session, Action& action);

}  // namespace mics::apps
