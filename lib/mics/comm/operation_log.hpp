// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>

namespace mics::comm {

/// The collectives of a step, by purpose.
enum class Purpose : std::uint8_t {
  gather,     ///< all-gather of a buffer over the shard group (both stages count as one)
  hop1,       ///< reduce-scatter of a buffer over the shard group
  hop2,       ///< reduction of a buffer over the replica group
  norm,       ///< exchange of norm, samples and loss
  agreement,  ///< small checks that ranks do the same thing
};
inline constexpr int purposes = 5;

[[nodiscard]] std::string_view name(Purpose purpose);

/// What a collective is for: shown in messages, counted in the log, compared between ranks.
struct Operation {
  Purpose purpose = Purpose::agreement;
  std::string_view object;  ///< unit or buffer, lives as long as the engine
  std::int64_t bytes = 0;   ///< of the whole result

  /// Tells two operations apart by all three fields, alike on every rank.
  [[nodiscard]] std::uint64_t fingerprint() const;
  /// `gather of layer0 (1024 bytes)`.
  [[nodiscard]] std::string text() const;
};

/// Counts of every purpose, the last 256 operations of this rank and each kind of operation once.
/// Local.
class OperationLog {
 public:
  static constexpr std::size_t capacity = 256;

  void record(const Operation& operation);
  /// Lets `find` know an operation that has not been recorded yet.
  void know(const Operation& operation) { kinds_.try_emplace(operation.fingerprint(), operation); }
  [[nodiscard]] std::int64_t count(Purpose purpose) const {
    return counts_[static_cast<std::size_t>(purpose)];
  }
  [[nodiscard]] std::int64_t total() const { return total_; }
  /// The newest `n` operations, oldest first, in one line.
  [[nodiscard]] std::string tail(std::size_t n = capacity) const;
  /// The same, a line each.
  [[nodiscard]] std::string dump() const;
  /// A known operation whose fingerprint agrees with `bits` in the bits of `mask`.
  [[nodiscard]] std::optional<Operation> find(std::uint64_t bits, std::uint64_t mask) const;

 private:
  std::array<std::int64_t, purposes> counts_{};
  std::array<Operation, capacity> ring_{};
  std::int64_t total_ = 0;
  std::unordered_map<std::uint64_t, Operation> kinds_;
};

}  // namespace mics::comm
