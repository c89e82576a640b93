// SPDX-License-Identifier: Apache-2.0
#include <mics/base/hash.hpp>
#include <mics/comm/operation_log.hpp>

#include <algorithm>

namespace mics::comm {

std::string_view name(Purpose purpose) {
  switch (purpose) {
    case Purpose::gather:
      return "gather";
    case Purpose::hop1:
      return "hop 1";
    case Purpose::hop2:
      return "hop 2";
    case Purpose::norm:
      return "norm";
    case Purpose::agreement:
      return "agreement";
  }
  return "?";
}

std::uint64_t Operation::fingerprint() const {
  std::uint64_t text = 0xcbf29ce484222325ULL;  // FNV-1a
  for (const char c : object) text = (text ^ static_cast<unsigned char>(c)) * 0x100000001b3ULL;
  return hash_combine(hash_combine(static_cast<std::uint64_t>(purpose), text),
                      static_cast<std::uint64_t>(bytes));
}

std::string Operation::text() const {
  return std::string(name(purpose)) + " of " + std::string(object) + " (" + std::to_string(bytes) +
         " bytes)";
}

void OperationLog::record(const Operation& operation) {
  know(operation);
  ++counts_[static_cast<std::size_t>(operation.purpose)];
  ring_[static_cast<std::size_t>(total_) % capacity] = operation;
  ++total_;
}

std::string OperationLog::tail(std::size_t n) const {
  const auto shown =
      static_cast<std::int64_t>(std::min({n, capacity, static_cast<std::size_t>(total_)}));
  std::string line;
  for (std::int64_t i = total_ - shown; i < total_; ++i) {
    const Operation& operation = ring_[static_cast<std::size_t>(i) % capacity];
    line += (line.empty() ? "" : ", ") + ("#" + std::to_string(i)) + ' ' +
            std::string(name(operation.purpose)) + ' ' + std::string(operation.object);
  }
  return line;
}

std::string OperationLog::dump() const {
  const auto kept = std::min(total_, static_cast<std::int64_t>(capacity));
  std::string lines;
  for (std::int64_t i = total_ - kept; i < total_; ++i) {
    lines +=
        '#' + std::to_string(i) + ' ' + ring_[static_cast<std::size_t>(i) % capacity].text() + '\n';
  }
  return lines;
}

std::optional<Operation> OperationLog::find(std::uint64_t bits, std::uint64_t mask) const {
  for (const auto& [fingerprint, operation] : kinds_) {
    if (((fingerprint ^ bits) & mask) == 0) return operation;
  }
  return {};
}

}  // namespace mics::comm
