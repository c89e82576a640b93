// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>
#include <program/session.hpp>

namespace mics::apps {

/// Adds `checkpoint inspect|verify|diff|prune|export`, which sets `action` when one is chosen. They
/// work on rank 0 alone.
void add_checkpoint(CLI::App& app, const Session& session, Action& action);

}  // namespace mics::apps
