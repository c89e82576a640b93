// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace mics::checkpoint::detail {

/// memcpy to memory that is not read again soon: where the processor can, without reading the
/// target first and without putting it in the caches. Other threads may read it afterwards. Local.
void copy_past_caches(std::byte* to, const std::byte* from, std::int64_t bytes);

}  // namespace mics::checkpoint::detail
