// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace mics {

/// The global batch of a step as micro-steps of samples: DeepSpeed's triple, solved.
///
/// Micro-step m of s holds samples [G*m/s, G*(m+1)/s) of the global batch G, and rank r of W the
/// part [n*r/W, n*(r+1)/W) of its n: nothing has to divide anything, and every sample is seen once.
/// Example: G = 10, s = 2, W = 3: both micro-steps have 5 samples, the ranks 1, 2 and 2 of them.
struct Batch {
  std::int64_t global = 0;
  std::int64_t micro_steps = 1;

  struct Range {
    std::int64_t begin = 0;
    std::int64_t end = 0;
    [[nodiscard]] std::int64_t count() const { return end - begin; }
  };
  [[nodiscard]] Range samples(std::int64_t micro_step, int rank, int ranks) const;
  /// The most samples that a rank has in a micro-step.
  [[nodiscard]] std::int64_t largest(int ranks) const;
};

}  // namespace mics
