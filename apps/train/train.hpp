// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>
#include <program/session.hpp>

namespace mics::apps {

/// Adds `train DECK [key=value ...]`, which sets `action` when it is chosen.
void add_train(CLI::App& app, const Session& session, Action& action);

}  // namespace mics::apps
