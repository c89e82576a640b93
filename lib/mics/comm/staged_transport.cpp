// SPDX-License-Identifier: Apache-2.0
#include <mics/comm/detail/device_sum.hpp>
#include <mics/comm/staged_transport.hpp>

#include <string>
#include <utility>

namespace mics::comm {

class StagedTransport::PendingGather final : public PendingCollective {
 public:
  PendingGather(const Execution& order, Marker end) : order_(order), end_(std::move(end)) {}
  void wait(const Execution& exec) override {
    if (!exec.same_as(order_)) exec.wait_for(end_);
  }

 private:
  Execution order_;
  Marker end_;
};

StagedTransport::StagedTransport(std::unique_ptr<MpiTransport> host, Execution exec,
                                 std::int64_t capacity)
    : host_(std::move(host)),
      exec_(std::move(exec)),
      buffer_(Kokkos::view_alloc("mics::comm::StagedTransport", Kokkos::WithoutInitializing),
              static_cast<std::size_t>(host_->size() == 1 ? 0 : capacity)) {}

std::byte* StagedTransport::enter(std::int64_t bytes, const Operation& operation,
                                  const Execution& exec) {
  if (bytes > static_cast<std::int64_t>(buffer_.size())) {
    raise<ArgumentError>({.object = "pinned memory for " + operation.text(),
                          .expected = std::to_string(bytes) + " bytes",
                          .found = std::to_string(buffer_.size()),
                          .remedy = "make the transport for the largest call"});
  }
  exec_.wait_for(exec);
  last_copy_.wait("mics::comm: the last result has left its pinned buffer");
  return buffer_.data();
}

std::unique_ptr<PendingCollective> StagedTransport::start_all_gather(const void* send,
                                                                     void* receive,
                                                                     std::int64_t bytes,
                                                                     const Operation& operation,
                                                                     const Execution& exec) {
  std::byte* const all = enter(all_gather_bytes(size(), bytes), operation, exec);
  if (size() == 1) {
    if (send != receive) device::copy(exec_, receive, send, bytes);
    return std::make_unique<PendingGather>(exec_, exec_.mark());
  }
  std::byte* const own = all + rank() * bytes;
  device::copy(exec_, own, send, bytes);
  exec_.fence("mics::comm: the shard is on the host before it is sent");
  host_->all_gather(own, all, bytes, operation, Kokkos::DefaultHostExecutionSpace());
  device::copy(exec_, receive, all, size() * bytes);
  last_copy_ = exec_.mark();
  return std::make_unique<PendingGather>(exec_, last_copy_);
}

void StagedTransport::reduce_scatter(const void* send, void* result, std::int64_t count,
                                     const Reduction& reduction, const Operation& operation,
                                     const Execution& exec) {
  std::byte* const pieces = enter(reduce_scatter_bytes(size(), count, reduction), operation, exec);
  if (size() == 1) {
    detail::sum_on_device(exec_, {.own = send}, reduction.source, reduction.factor, result,
                          reduction.result, count, reduction.mode);
    return;
  }
  const std::int64_t send_bytes = size() * count * bytes_of(reduction.source);
  const std::int64_t result_bytes = count * bytes_of(reduction.result);
  std::byte* const sum = pieces + aligned(send_bytes);
  device::copy(exec_, pieces, send, send_bytes);
  if (reduction.mode == SumMode::add) device::copy(exec_, sum, result, result_bytes);
  exec_.fence("mics::comm: gradients are on the host before they are sent");
  host_->reduce_scatter(pieces, sum, count, reduction, operation,
                        Kokkos::DefaultHostExecutionSpace());
  device::copy(exec_, result, sum, result_bytes);
  last_copy_ = exec_.mark();
}

void StagedTransport::all_reduce(void* data, std::int64_t count, const Reduction& reduction,
                                 const Operation& operation, const Execution& exec) {
  std::byte* const sums = enter(all_reduce_bytes(size(), count, reduction), operation, exec);
  if (size() == 1) {
    if (reduction.factor == 1) return;
    detail::convert_on_device(exec_, data, reduction.source, reduction.factor, data,
                              reduction.result, count);
    return;
  }
  const std::int64_t bytes = count * bytes_of(reduction.source);
  device::copy(exec_, sums, data, bytes);
  exec_.fence("mics::comm: sums are on the host before they are sent");
  host_->all_reduce(sums, count, reduction, operation, Kokkos::DefaultHostExecutionSpace());
  device::copy(exec_, data, sums, bytes);
  last_copy_ = exec_.mark();
}

void StagedTransport::all_gather_small(const void* send, void* receive, std::int64_t bytes,
                                       const Operation& operation) {
  host_->all_gather_small(send, receive, bytes, operation);
}

void StagedTransport::broadcast(void* data, std::int64_t bytes, int root,
                                const Operation& operation) {
  host_->broadcast(data, bytes, root, operation);
}

void StagedTransport::barrier(const Operation& operation) { host_->barrier(operation); }

}  // namespace mics::comm
