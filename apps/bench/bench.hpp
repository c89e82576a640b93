// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>
#include <program/session.hpp>

namespace mics::apps {

/// Adds `bench collectives|optimizer|checks|memory|checkpoint`, which sets `action` when one is
/// chosen.
void add_bench(CLI::App& app, const Session& session, Action& action);

}  // namespace mics::apps
