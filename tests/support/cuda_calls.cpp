// SPDX-License-Identifier: Apache-2.0
#include "cuda_calls.hpp"

#include <cuda_runtime_api.h>
#include <cupti.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace mics::test {
namespace {

constexpr std::array domains{CUPTI_CB_DOMAIN_RUNTIME_API, CUPTI_CB_DOMAIN_DRIVER_API};
constexpr std::array<std::uint32_t, 2> sizes{CUPTI_RUNTIME_TRACE_CBID_SIZE,
                                             CUPTI_DRIVER_TRACE_CBID_SIZE};

void check(CUptiResult result, const char* call) {
  if (result == CUPTI_SUCCESS) return;
  const char* text = nullptr;
  cuptiGetResultString(result, &text);
  throw std::runtime_error(std::string(call) + ": " + (text != nullptr ? text : "unknown error"));
}

bool starts_with_any(std::string_view name, std::initializer_list<std::string_view> starts) {
  return std::any_of(starts.begin(), starts.end(),
                     [&](std::string_view start) { return name.starts_with(start); });
}

// cudaMalloc, cuMemAlloc_v2, cuMemcpyDtoH_v2, ...
bool allocates_or_waits(std::string_view name) {
  if (starts_with_any(
          name, {"cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaHostRegister",
                 "cudaHostUnregister", "cuMemAlloc", "cuMemCreate", "cuMemFree", "cuMemHostAlloc",
                 "cuMemHostRegister", "cuMemHostUnregister", "cuMemMap", "cuMemUnmap",
                 "cuMemRelease", "cuArrayCreate", "cuArrayDestroy"})) {
    return true;
  }
  if (name.find("Synchronize") != std::string_view::npos) return true;
  return starts_with_any(name, {"cudaMemcpy", "cuMemcpy"}) &&
         name.find("Async") == std::string_view::npos;
}

enum class What : std::uint8_t { nothing, counted, allocation, copy };

/// One call of a domain.
struct Call {
  std::string name;
  What what = What::nothing;
  std::atomic<std::int64_t> count = 0;
};

struct Domain {
  std::vector<Call> calls;
};

struct Calls {
  std::array<Domain, domains.size()> domain;
  CUpti_SubscriberHandle subscriber = nullptr;

  Calls() {
    for (std::size_t d = 0; d < domains.size(); ++d) {
      domain[d].calls = std::vector<Call>(sizes[d]);
      for (std::uint32_t id = 1; id < sizes[d]; ++id) {
        const char* text = nullptr;
        if (cuptiGetCallbackName(domains[d], id, &text) != CUPTI_SUCCESS || text == nullptr) {
          continue;
        }
        Call& call = domain[d].calls[id];
        call.name = text;
        if (allocates_or_waits(call.name)) call.what = What::counted;
      }
    }
    for (const auto id : {CUPTI_RUNTIME_TRACE_CBID_cudaMemcpyAsync_v3020,
                          CUPTI_RUNTIME_TRACE_CBID_cudaMemcpyAsync_ptsz_v7000}) {
      domain[0].calls[id].what = What::copy;
    }
    domain[0].calls[CUPTI_RUNTIME_TRACE_CBID_cudaMalloc_v3020].what = What::allocation;
  }
};

Calls& calls() {
  static auto* const kept = new Calls;
  return *kept;
}

bool is_pageable(const void* memory) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, memory) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return true;
  }
  return attributes.type == cudaMemoryTypeUnregistered;
}

void CUPTIAPI on_call(void* /*user*/, CUpti_CallbackDomain domain, CUpti_CallbackId id,
                      const void* data) {
  const auto* const info = static_cast<const CUpti_CallbackData*>(data);
  const std::size_t d = domain == domains[0] ? 0 : 1;
  if (info->callbackSite != CUPTI_API_ENTER || id >= sizes[d]) return;
  Call& call = calls().domain[d].calls[id];
  if (call.what == What::nothing) return;
  if (call.what == What::allocation) {
    // Kokkos asks for the team's scratch memory at every launch of teams, for 0 bytes where it
    // needs none: no allocation. The driver's own call would be counted.
    const auto* const size = static_cast<const cudaMalloc_v3020_params*>(info->functionParams);
    if (size->size == 0) return;
  }
  if (call.what == What::copy) {
    // Both variants have the same parameters.
    const auto* const copy = static_cast<const cudaMemcpyAsync_v3020_params*>(info->functionParams);
    if (!is_pageable(copy->dst) && !is_pageable(copy->src)) return;
  }
  ++call.count;
}

}  // namespace

CudaCalls::CudaCalls() {
  Calls& all = calls();
  check(cuptiSubscribe(&all.subscriber, on_call, nullptr), "cuptiSubscribe");
  for (const CUpti_CallbackDomain domain : domains) {
    check(cuptiEnableDomain(1, all.subscriber, domain), "cuptiEnableDomain");
  }
  static_cast<void>(take());
}

CudaCalls::~CudaCalls() { static_cast<void>(cuptiUnsubscribe(calls().subscriber)); }

std::map<std::string, std::int64_t> CudaCalls::take() {
  std::map<std::string, std::int64_t> found;
  for (Domain& domain : calls().domain) {
    for (Call& call : domain.calls) {
      const std::int64_t count = call.count.exchange(0);
      if (count == 0) continue;
      found[call.what == What::copy ? call.name + " of pageable memory" : call.name] += count;
    }
  }
  return found;
}

}  // namespace mics::test
