// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>
#include <program/session.hpp>

namespace mics::apps {

/// Adds `train DECK [key=value ...]`. The command's exit status is written to `status`.
void add_train(CLI::App& app, const Session& session, int& status);

}  // namespace mics::apps
