// SPDX-License-Identifier: Apache-2.0
#include <mics/checkpoint/detail/copy_past_caches.hpp>

#include <algorithm>
#include <cstring>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace mics::checkpoint::detail {

void copy_past_caches(std::byte* to, const std::byte* from, std::int64_t bytes) {
#ifdef __SSE2__
  constexpr std::int64_t line = 64;
  const auto past_line = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(to) % line);
  const std::int64_t head = std::min(bytes, (line - past_line) % line);
  std::memcpy(to, from, static_cast<std::size_t>(head));
  std::int64_t done = head;
  for (; done + line <= bytes; done += line) {
    const auto* const source = reinterpret_cast<const __m128i*>(from + done);
    auto* const target = reinterpret_cast<__m128i*>(to + done);
    const __m128i a = _mm_loadu_si128(source);
    const __m128i b = _mm_loadu_si128(source + 1);
    const __m128i c = _mm_loadu_si128(source + 2);
    const __m128i d = _mm_loadu_si128(source + 3);
    _mm_stream_si128(target, a);
    _mm_stream_si128(target + 1, b);
    _mm_stream_si128(target + 2, c);
    _mm_stream_si128(target + 3, d);
  }
  _mm_sfence();
  to += done;
  from += done;
  bytes -= done;
#endif
  std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

}  // namespace mics::checkpoint::detail
