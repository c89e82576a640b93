// SPDX-License-Identifier: Apache-2.0
#pragma once

// The public interface of mics.

#include <mics/base/dtype.hpp>
#include <mics/base/error.hpp>
#include <mics/base/execution.hpp>
#include <mics/base/hash.hpp>
#include <mics/base/json_reader.hpp>
#include <mics/base/log.hpp>
#include <mics/base/random.hpp>
#include <mics/base/version.hpp>
#include <mics/comm/agreement.hpp>
#include <mics/engine/config.hpp>
#include <mics/engine/engine.hpp>
#include <mics/optim/loss_scaler.hpp>
#include <mics/optim/optimizer.hpp>
#include <mics/optim/schedule.hpp>
#include <mics/plan/plan.hpp>
#include <mics/state/model.hpp>
