// SPDX-License-Identifier: Apache-2.0
#include <mics/base/device.hpp>
#include <mics/base/hash.hpp>
#include <mics/base/vendor.hpp>
#include <mics/comm/detail/device_sum.hpp>
#include <mics/comm/device_watch.hpp>
#include <mics/comm/nccl_transport.hpp>

#include <nccl.h>

#include <source_location>
#include <string>
#include <utility>
#include <vector>

namespace mics::comm {
namespace {

using Stream = MICS_VENDOR(Stream_t);

ncclDataType_t nccl_type(DType dtype) {
  switch (dtype) {
    case DType::fp64:
      return ncclFloat64;
    case DType::fp32:
      return ncclFloat32;
    case DType::bf16:
      return ncclBfloat16;
    case DType::fp16:
      break;
  }
  return ncclFloat16;
}

std::byte* at(void* base, std::int64_t bytes) { return static_cast<std::byte*>(base) + bytes; }
const std::byte* at(const void* base, std::int64_t bytes) {
  return static_cast<const std::byte*>(base) + bytes;
}
std::size_t counted(std::int64_t count) { return static_cast<std::size_t>(count); }
// The first that is no success.
ncclResult_t both(ncclResult_t a, ncclResult_t b) { return a != ncclSuccess ? a : b; }

}  // namespace

/// One use of the communicator: known to the watch from its beginning in the stream to its end.
/// In an instance of the transport's own only the end has a marker: one more between two small
/// collectives would cost a fiftieth of their time. Converting kernels before the use count as part
/// of it. An application's kernels, which may be long, do not.
class NcclTransport::Watched {
 public:
  Watched(NcclTransport& transport, const Operation& operation)
      : transport_(transport),
        operation_(operation),
        call_(transport.comm_),
        before_(transport.own_exec_ ? transport.exec_.gates() : std::vector<Marker>{}) {
    if (before_.empty()) before_.push_back(transport.exec_.mark());
  }

  [[nodiscard]] ncclComm_t comm() const { return call_.native(); }
  [[nodiscard]] Stream stream() const { return static_cast<Stream>(transport_.stream()); }
  [[nodiscard]] const Operation& operation() const { return operation_; }

  // To be called after the last call of NCCL. Returns the end.
  Marker end() {
    transport_.end_ = transport_.exec_.mark();
    transport_.context_.device->record(transport_.member_, operation_, std::move(before_),
                                       *transport_.end_);
    return *transport_.end_;
  }

 private:
  NcclTransport& transport_;
  const Operation& operation_;
  NcclCall call_;
  std::vector<Marker> before_;
};

class NcclTransport::PendingGather final : public PendingCollective {
 public:
  PendingGather(DeviceWatch& watch, const Execution& order, Marker end)
      : watch_(watch), order_(order), end_(std::move(end)) {}
  void wait(const Execution& exec) override {
    watch_.check();
    if (exec.same_as(order_)) return;
    // An instance of the host would wait without looking for failures.
    if (exec.stream() == nullptr && exec.reaches_host()) watch_.wait(end_);
    exec.wait_for(end_);
  }

 private:
  DeviceWatch& watch_;
  Execution order_;
  Marker end_;
};

NcclTransport::NcclTransport(NcclCommunicator comm, std::unique_ptr<MpiTransport> small,
                             Execution exec, TransportContext context, DeviceSums sums,
                             std::span<std::byte> staging, const NcclCommunicator::Uses& uses,
                             bool own_exec)
    : comm_(std::move(comm)),
      small_(std::move(small)),
      exec_(std::move(exec)),
      context_(context),
      sums_(sums),
      staging_(staging),
      own_exec_(own_exec) {
  if (size() == 1) return;
  if (comm_.size() != size() || comm_.rank() != rank()) {
    raise<ArgumentError>(
        {.object = "communicator of NCCL",
         .expected = "rank " + std::to_string(rank()) + " of " + std::to_string(size()) +
                     " as in the one of MPI",
         .found = "rank " + std::to_string(comm_.rank()) + " of " + std::to_string(comm_.size())});
  }
  comm_.warm_up(exec_, uses);
  member_ = context_.device->add({.ranks = small_->world_ranks(),
                                  .abort = comm_.abort_handle(),
                                  .error = comm_.async_error_handle()});
}

NcclTransport::~NcclTransport() {
  if (member_ >= 0) context_.device->remove(member_);
  // Freeing it would wait for collectives that other ranks may never join.
  if (context_.failures->failed()) comm_.abort();
}

void NcclTransport::enter(const Operation& operation, const Execution& exec) {
  context_.device->check();
  history_ = hash_combine(history_, operation.fingerprint());
  end_.reset();
  exec_.wait_for(exec);
}

Marker NcclTransport::end() const {
  if (!end_) end_ = exec_.mark();
  return *end_;
}

std::uint64_t NcclTransport::fingerprint() const {
  return hash_combine(history_, small_->fingerprint());
}

void NcclTransport::require_staging(std::int64_t bytes, const Operation& operation) const {
  if (bytes <= static_cast<std::int64_t>(staging_.size())) return;
  raise<ArgumentError>({.object = "staging memory for " + operation.text(),
                        .expected = std::to_string(bytes) + " bytes",
                        .found = std::to_string(staging_.size()),
                        .remedy = "ask NcclTransport::staging_bytes for the largest reduction"});
}

void NcclTransport::check(int status, const Watched& watched, std::string_view call) {
  if (status == ncclSuccess) return;
  try {
    detail::check_nccl(status, watched.comm(), call);
  } catch (const CommError& error) {
    const std::string line = watched.operation().text() + " on rank " +
                             std::to_string(context_.failures->rank()) + ": " + error.what() +
                             "; last operations here: " + context_.log->tail(8);
    context_.failures->fail(line, FailureKind::consequence);
  }
  context_.device->check();  // throws
}

std::unique_ptr<PendingCollective> NcclTransport::start_all_gather(const void* send, void* receive,
                                                                   std::int64_t bytes,
                                                                   const Operation& operation,
                                                                   const Execution& exec) {
  enter(operation, exec);
  if (size() == 1) {
    if (send != receive) device::copy(exec_, receive, send, bytes);
    return std::make_unique<PendingGather>(*context_.device, exec_, end());
  }
  Watched watched(*this, operation);
  check(ncclAllGather(send, receive, counted(bytes), ncclInt8, watched.comm(), watched.stream()),
        watched, "ncclAllGather");
  return std::make_unique<PendingGather>(*context_.device, exec_, watched.end());
}

const void* NcclTransport::on_the_wire(const void* elements, std::int64_t count,
                                       const Reduction& reduction) {
  if (!reduction.converts()) return elements;
  detail::convert_on_device(exec_, elements, reduction.source, reduction.factor, staging_.data(),
                            reduction.wire, count);
  return staging_.data();
}

void NcclTransport::reduce_scatter(const void* send, void* result, std::int64_t count,
                                   const Reduction& reduction, const Operation& operation,
                                   const Execution& exec) {
  enter(operation, exec);
  if (size() == 1) {
    detail::sum_on_device(exec_, {.own = send}, reduction.source, reduction.factor, result,
                          reduction.result, count, reduction.mode);
    return;
  }
  require_staging(staging_bytes(size(), count, reduction, sums_), operation);
  if (sums_ == DeviceSums::wire) {
    reduce_scatter_by_nccl(send, result, count, reduction, operation);
  } else {
    reduce_scatter_in_order(send, result, count, reduction, operation);
  }
}

void NcclTransport::reduce_scatter_by_nccl(const void* send, void* result, std::int64_t count,
                                           const Reduction& reduction, const Operation& operation) {
  const void* const out = on_the_wire(send, size() * count, reduction);
  const bool direct = reduction.mode == SumMode::assign && reduction.wire == reduction.result;
  void* sum = staging_.data();
  if (direct) {
    sum = result;
  } else if (reduction.converts()) {
    sum = at(staging_.data(), rank() * count * bytes_of(reduction.wire));  // in place
  }
  Watched watched(*this, operation);
  check(ncclReduceScatter(out, sum, counted(count), nccl_type(reduction.wire), ncclSum,
                          watched.comm(), watched.stream()),
        watched, "ncclReduceScatter");
  watched.end();
  if (direct) return;
  end_.reset();
  detail::sum_on_device(exec_, {.own = sum}, reduction.wire, 1, result, reduction.result, count,
                        reduction.mode);
}

// A group of sends and receives is closed in any case: an abort in an open one would wait for it.
template <class SendAndReceive>
void NcclTransport::exchange(const Operation& operation, const SendAndReceive& with) {
  Watched watched(*this, operation);
  check(ncclGroupStart(), watched, "ncclGroupStart");
  ncclResult_t status = ncclSuccess;
  for (int step = 1; step < size() && status == ncclSuccess; ++step) {
    status = with(watched, (rank() + step) % size(), (rank() - step + size()) % size());
  }
  check(both(status, ncclGroupEnd()), watched, "grouped ncclSend and ncclRecv");
  watched.end();
}

void NcclTransport::reduce_scatter_in_order(const void* send, void* result, std::int64_t count,
                                            const Reduction& reduction,
                                            const Operation& operation) {
  const std::int64_t wire_bytes = bytes_of(reduction.wire);
  const void* const out = on_the_wire(send, size() * count, reduction);
  const std::int64_t stride = detail::padded_count(count);
  std::byte* const received =
      staging_.data() +
      (reduction.converts() ? detail::padded_count(size() * count) * wire_bytes : 0);
  const ncclDataType_t type = nccl_type(reduction.wire);
  if (count > 0) {
    exchange(operation, [&](const Watched& watched, int to, int from) {
      const int slot = from < rank() ? from : from - 1;
      return both(ncclSend(at(out, to * count * wire_bytes), counted(count), type, to,
                           watched.comm(), watched.stream()),
                  ncclRecv(received + slot * stride * wire_bytes, counted(count), type, from,
                           watched.comm(), watched.stream()));
    });
  }
  end_.reset();
  detail::sum_on_device(exec_,
                        {.own = at(out, rank() * count * wire_bytes),
                         .others = received,
                         .stride = stride,
                         .rank = rank(),
                         .size = size()},
                        reduction.wire, 1, result, reduction.result, count, reduction.mode);
}

void NcclTransport::all_reduce(void* data, std::int64_t count, const Reduction& reduction,
                               const Operation& operation, const Execution& exec) {
  enter(operation, exec);
  if (size() == 1) {
    if (reduction.factor == 1) return;
    detail::convert_on_device(exec_, data, reduction.source, reduction.factor, data,
                              reduction.result, count);
    return;
  }
  require_staging(all_reduce_staging_bytes(size(), count, reduction, sums_), operation);
  if (sums_ == DeviceSums::wire) {
    all_reduce_by_nccl(data, count, reduction, operation);
  } else {
    all_reduce_in_order(data, count, reduction, operation);
  }
}

void NcclTransport::all_reduce_by_nccl(void* data, std::int64_t count, const Reduction& reduction,
                                       const Operation& operation) {
  static_cast<void>(on_the_wire(data, count, reduction));
  void* const sums = reduction.converts() ? staging_.data() : data;
  Watched watched(*this, operation);
  check(ncclAllReduce(sums, sums, counted(count), nccl_type(reduction.wire), ncclSum,
                      watched.comm(), watched.stream()),
        watched, "ncclAllReduce");
  watched.end();
  if (sums == data) return;
  end_.reset();
  detail::convert_on_device(exec_, sums, reduction.wire, 1, data, reduction.result, count);
}

// Every rank sums its piece in rank order and sends the sum to all, in the wire dtype as well.
void NcclTransport::all_reduce_in_order(void* data, std::int64_t count, const Reduction& reduction,
                                        const Operation& operation) {
  const std::int64_t wire_bytes = bytes_of(reduction.wire);
  const std::int64_t bytes = bytes_of(reduction.result);
  const ncclDataType_t type = nccl_type(reduction.wire);
  const auto piece = [&](int member) { return detail::all_reduce_piece(count, member, size()); };
  const detail::ElementRange mine = piece(rank());
  const void* const out = on_the_wire(data, count, reduction);
  std::byte* const received =
      staging_.data() + (reduction.converts() ? detail::padded_count(count) * wire_bytes : 0);
  const std::int64_t stride = detail::padded_count(mine.count);
  const auto send = [&](const Watched& watched, const void* from, std::int64_t elements, int to) {
    if (elements == 0) return ncclSuccess;
    return ncclSend(from, counted(elements), type, to, watched.comm(), watched.stream());
  };
  const auto receive = [&](const Watched& watched, void* into, std::int64_t elements, int from) {
    if (elements == 0) return ncclSuccess;
    return ncclRecv(into, counted(elements), type, from, watched.comm(), watched.stream());
  };

  exchange(operation, [&](const Watched& watched, int to, int from) {
    const int slot = from < rank() ? from : from - 1;
    return both(send(watched, at(out, piece(to).offset * wire_bytes), piece(to).count, to),
                receive(watched, received + slot * stride * wire_bytes, mine.count, from));
  });
  std::byte* const sum = at(data, mine.offset * bytes);
  detail::sum_on_device(exec_,
                        {.own = at(out, mine.offset * wire_bytes),
                         .others = received,
                         .stride = stride,
                         .rank = rank(),
                         .size = size()},
                        reduction.wire, 1, sum, reduction.result, mine.count, SumMode::assign);
  // What has been sent is free for the sums in the wire dtype.
  const bool narrowed = reduction.wire != reduction.result;
  void* const sums = narrowed ? staging_.data() : data;
  if (narrowed) {
    detail::convert_on_device(exec_, sum, reduction.result, 1, at(sums, mine.offset * wire_bytes),
                              reduction.wire, mine.count);
  }
  exchange(operation, [&](const Watched& watched, int to, int from) {
    return both(
        send(watched, at(sums, mine.offset * wire_bytes), mine.count, to),
        receive(watched, at(sums, piece(from).offset * wire_bytes), piece(from).count, from));
  });
  if (!narrowed) return;
  end_.reset();
  detail::convert_on_device(exec_, sums, reduction.wire, 1, data, reduction.result, count);
}

void NcclTransport::all_gather_small(const void* send, void* receive, std::int64_t bytes,
                                     const Operation& operation) {
  context_.device->check();
  small_->all_gather_small(send, receive, bytes, operation);
}

void NcclTransport::broadcast(void* data, std::int64_t bytes, int root,
                              const Operation& operation) {
  context_.device->check();
  small_->broadcast(data, bytes, root, operation);
}

void NcclTransport::barrier(const Operation& operation) {
  context_.device->check();
  small_->barrier(operation);
}

}  // namespace mics::comm
