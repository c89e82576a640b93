// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "transport_fixture.hpp"
#include <mics/base/device.hpp>
#include <mics/comm/device_watch.hpp>
#include <mics/comm/nccl_transport.hpp>
#include <mics/comm/staged_transport.hpp>

#include <Kokkos_Core.hpp>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace mics::comm::test {

/// The transports that have one meaning.
enum class Kind {
  mpi,
  staged,
  nccl_fp32,  // sums of mics: the bits of the others
  nccl_wire,  // sums of NCCL, rounded to the wire dtype
};
[[nodiscard]] inline std::string name_of(const testing::TestParamInfo<Kind>& info) {
  switch (info.param) {
    case Kind::mpi:
      return "mpi";
    case Kind::staged:
      return "staged";
    case Kind::nccl_fp32:
      return "nccl_fp32";
    case Kind::nccl_wire:
      return "nccl_wire";
  }
  return "unknown";
}
[[nodiscard]] inline std::vector<Kind> kinds() {
#ifdef MICS_HAS_NCCL
  return {Kind::mpi, Kind::staged, Kind::nccl_fp32, Kind::nccl_wire};
#else
  return {Kind::mpi, Kind::staged};
#endif
}
[[nodiscard]] inline bool is_nccl(Kind kind) {
  return kind == Kind::nccl_fp32 || kind == Kind::nccl_wire;
}

#ifdef MICS_HAS_NCCL
/// The parent of all communicators of NCCL in this program: making one takes long, splitting it
/// does not.
class NcclParent : public testing::Environment {
 public:
  static const NcclCommunicator& get() {
    if (!instance()) {
      instance() = std::make_unique<NcclCommunicator>(
          NcclCommunicator::create(Communicator::duplicate(MPI_COMM_WORLD)));
    }
    return *instance();
  }
  void TearDown() override { instance().reset(); }

 private:
  static std::unique_ptr<NcclCommunicator>& instance() {
    static std::unique_ptr<NcclCommunicator> parent;
    return parent;
  }
};
inline testing::Environment* const nccl_parent = testing::AddGlobalTestEnvironment(new NcclParent);
#endif

/// Gives a transport of device memory the host memory of a test: copies what goes in and what comes
/// out, in the order of an instance of its own, as an application's kernels are.
class OnHostMemory final : public Transport {
 public:
  explicit OnHostMemory(std::unique_ptr<Transport> device) : device_(std::move(device)) {}

  [[nodiscard]] int rank() const override { return device_->rank(); }
  [[nodiscard]] int size() const override { return device_->size(); }
  [[nodiscard]] Memory memory() const override { return device_->memory(); }
  [[nodiscard]] const Execution& execution() const override { return device_->execution(); }

  [[nodiscard]] std::unique_ptr<PendingCollective> start_all_gather(
      const void* send, void* receive, std::int64_t bytes, const Operation& what,
      const Execution& /*exec*/) override {
    auto pending = std::make_unique<Gather>(*this, send, receive, bytes);
    pending->start(what);
    return pending;
  }
  void reduce_scatter(const void* send, void* result, std::int64_t count,
                      const Reduction& reduction, const Operation& what,
                      const Execution& /*exec*/) override {
    const Buffer sent(*this, send, size() * count * bytes_of(reduction.source));
    const Buffer sums(*this, result, count * bytes_of(reduction.result));
    device_->reduce_scatter(sent.data(), sums.data(), count, reduction, what, app_);
    app_.wait_for(device_->execution());
    sums.copy_to(result);
  }
  void all_reduce(void* data, std::int64_t count, const Reduction& reduction, const Operation& what,
                  const Execution& /*exec*/) override {
    const Buffer sums(*this, data, count * bytes_of(reduction.source));
    device_->all_reduce(sums.data(), count, reduction, what, app_);
    app_.wait_for(device_->execution());
    sums.copy_to(data);
  }
  void all_gather_small(const void* send, void* receive, std::int64_t bytes,
                        const Operation& what) override {
    device_->all_gather_small(send, receive, bytes, what);
  }
  void broadcast(void* data, std::int64_t bytes, int root, const Operation& what) override {
    device_->broadcast(data, bytes, root, what);
  }
  void barrier(const Operation& what) override { device_->barrier(what); }
  [[nodiscard]] std::uint64_t fingerprint() const override { return device_->fingerprint(); }

 private:
  class Buffer {
   public:
    Buffer(const OnHostMemory& owner, const void* from, std::int64_t bytes)
        : owner_(owner),
          bytes_(bytes),
          memory_(Kokkos::view_alloc(Kokkos::WithoutInitializing, "test::Buffer"),
                  static_cast<std::size_t>(bytes)) {
      device::copy(owner_.app_, memory_.data(), from, bytes);
    }
    [[nodiscard]] std::byte* data() const { return memory_.data(); }
    void copy_to(void* to) const {
      device::copy(owner_.app_, to, memory_.data(), bytes_);
      owner_.app_.fence("test: the result is there");
    }

   private:
    const OnHostMemory& owner_;
    std::int64_t bytes_;
    Kokkos::View<std::byte*, device::MemorySpace> memory_;
  };
  class Gather final : public PendingCollective {
   public:
    Gather(const OnHostMemory& owner, const void* send, void* receive, std::int64_t bytes)
        : owner_(owner),
          to_(static_cast<std::byte*>(receive)),
          in_place_(send == to_ + owner.rank() * bytes),
          bytes_(bytes),
          send_(owner, send, in_place_ ? 0 : bytes),
          receive_(owner, receive, owner.size() * bytes) {}
    void start(const Operation& what) {
      std::byte* const own = receive_.data() + owner_.rank() * bytes_;
      pending_ = owner_.device_->start_all_gather(in_place_ ? own : send_.data(), receive_.data(),
                                                  bytes_, what, owner_.app_);
    }
    void wait(const Execution& /*exec*/) override {
      pending_->wait(owner_.app_);
      receive_.copy_to(to_);
    }

   private:
    const OnHostMemory& owner_;
    std::byte* to_;
    bool in_place_;
    std::int64_t bytes_;
    Buffer send_;
    Buffer receive_;
    std::unique_ptr<PendingCollective> pending_;
  };

  std::unique_ptr<Transport> device_;
  Execution app_ = device::make_instance(false);
};

/// A transport over all ranks of the job with what it shares.
class AnyWorld {
 public:
  explicit AnyWorld(Kind kind) : AnyWorld(kind, node_patterns().front().label) {}
  AnyWorld(Kind kind, const std::vector<int>& node_of_rank)
      : transport_(make(kind, node_of_rank)), transport(*transport_) {}

 private:
  // Of the largest call in these tests.
  static constexpr std::int64_t staging = std::int64_t{64} << 20;

  std::unique_ptr<Transport> make(Kind kind, const std::vector<int>& node_of_rank) {
    const TransportContext context{.failures = &failures_, .log = &log_, .device = &watch_};
    auto host = std::make_unique<MpiTransport>(Communicator::duplicate(MPI_COMM_WORLD),
                                               node_of_rank, context);
    if (kind == Kind::mpi) return host;
    const Execution order = device::make_instance(true);
    if (kind == Kind::staged) {
      return std::make_unique<OnHostMemory>(
          std::make_unique<StagedTransport>(std::move(host), order, staging));
    }
#ifdef MICS_HAS_NCCL
    staging_ = Kokkos::View<std::byte*, device::MemorySpace>(
        Kokkos::view_alloc(Kokkos::WithoutInitializing, "test::staging"), staging);
    return std::make_unique<OnHostMemory>(std::make_unique<NcclTransport>(
        NcclParent::get().split(0, job_rank()), std::move(host), order, context,
        kind == Kind::nccl_fp32 ? DeviceSums::fp32 : DeviceSums::wire,
        std::span(staging_.data(), staging_.size())));
#else
    return nullptr;
#endif
  }

  Communicator comm_ = Communicator::duplicate(MPI_COMM_WORLD);
  FailureChannel failures_{comm_};
  OperationLog log_;
  DeviceWatch watch_{failures_, log_, std::chrono::seconds(60)};
  Kokkos::View<std::byte*, device::MemorySpace> staging_;
  std::unique_ptr<Transport> transport_;

 public:
  Transport& transport;
};

/// Runs a test over each kind of transport that this build has, and skips it where two ranks would
/// share a device that NCCL wants for one.
class OverTransports : public testing::TestWithParam<Kind> {
 protected:
  void SetUp() override {
    if (is_nccl(GetParam()) && Kokkos::num_devices() < job_size()) {
      GTEST_SKIP() << "NCCL wants a device a rank: " << job_size() << " ranks, "
                   << Kokkos::num_devices() << " devices";
    }
  }
  [[nodiscard]] static Kind kind() { return GetParam(); }
  /// Pretended nodes matter to messages of MPI only.
  [[nodiscard]] static std::vector<Nodes> nodes() {
    if (is_nccl(kind())) return {node_patterns().front()};
    return node_patterns();
  }
};

}  // namespace mics::comm::test
