// SPDX-License-Identifier: Apache-2.0
#include <mics/checkpoint/detail/copy_past_caches.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace mics::checkpoint::detail {
namespace {

TEST(CopyPastCaches, CopiesAllBytesAndNoOthersAtEveryAlignment) {
  constexpr std::int64_t room = 512;
  std::vector<std::byte> from(room);
  for (std::size_t i = 0; i < from.size(); ++i) from[i] = std::byte(i % 251 + 1);
  for (std::int64_t source = 0; source < 17; ++source) {
    for (std::int64_t target = 0; target < 65; ++target) {
      for (const std::int64_t bytes : {0, 1, 3, 63, 64, 65, 127, 128, 200, 321}) {
        std::vector<std::byte> to(room, std::byte{0});
        std::vector<std::byte> expected = to;
        std::copy_n(from.begin() + source, bytes, expected.begin() + target);

        copy_past_caches(to.data() + target, from.data() + source, bytes);

        ASSERT_EQ(to, expected) << source << ' ' << target << ' ' << bytes;
      }
    }
  }
}

}  // namespace
}  // namespace mics::checkpoint::detail
