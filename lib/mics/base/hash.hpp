// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace mics {

/// Folds `value` into a running 64-bit hash (the finalizer of SplitMix64, Steele et al. 2014). For
/// telling sequences of small integers apart between ranks, not for stored data.
[[nodiscard]] constexpr std::uint64_t hash_combine(std::uint64_t hash, std::uint64_t value) {
  std::uint64_t x = hash + 0x9E3779B97F4A7C15ULL + value;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  return x ^ (x >> 31);
}

}  // namespace mics
