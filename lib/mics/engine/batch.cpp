// SPDX-License-Identifier: Apache-2.0
#include <mics/engine/batch.hpp>

namespace mics {
namespace {

// n * part / parts without the product, which may not fit: part <= parts.
std::int64_t share(std::int64_t n, std::int64_t part, std::int64_t parts) {
  return n / parts * part + n % parts * part / parts;
}

}  // namespace

Batch::Range Batch::samples(std::int64_t micro_step, int rank, int ranks) const {
  const std::int64_t begin = share(global, micro_step, micro_steps);
  const std::int64_t count = share(global, micro_step + 1, micro_steps) - begin;
  return {begin + share(count, rank, ranks), begin + share(count, rank + 1, ranks)};
}

std::int64_t Batch::largest(int ranks) const {
  const std::int64_t micro_step = (global - 1) / micro_steps + 1;
  return (micro_step - 1) / ranks + 1;
}

}  // namespace mics
