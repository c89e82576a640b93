// SPDX-License-Identifier: Apache-2.0
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

void OperationLog::record(const Operation& operation) {
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

}  // namespace mics::comm
