// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>
#include <program/session.hpp>

namespace mics::apps {

/// Adds `bench collectives|optimizer|memory`. The command's exit status is written to `status`.
void add_bench(CLI::App& app, const Session& session, int& status);

}  // namespace mics::apps
