// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>
#include <program/session.hpp>

namespace mics::apps {

/// Adds `config explain FILE`, which sets `action` when it is chosen.
void add_config(CLI::App& app, const Session& session, Action& action);

}  // namespace mics::apps
