// SPDX-License-Identifier: Apache-2.0
#include <report/metrics.hpp>

#include <cerrno>
#include <system_error>
#include <utility>

namespace report {

MetricsWriter::MetricsWriter(std::filesystem::path path, MetricsMode mode, ErrorHandler on_error)
    : path_(std::move(path)), on_error_(std::move(on_error)) {
  if (path_.empty()) return;
  std::error_code error;
  if (path_.has_parent_path()) std::filesystem::create_directories(path_.parent_path(), error);
  if (error) {
    fail("creating its folder", error.message());
    return;
  }
  errno = 0;
  stream_.open(path_, mode == MetricsMode::append ? std::ios::app : std::ios::trunc);
  if (!stream_) fail("opening", std::generic_category().message(errno));
}

void MetricsWriter::write(const nlohmann::json& record) {
  if (path_.empty() || has_failed_) return;
  errno = 0;
  stream_ << record.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << '\n'
          << std::flush;
  if (!stream_) fail("writing", std::generic_category().message(errno));
}

void MetricsWriter::fail(const char* operation, const std::string& reason) {
  has_failed_ = true;
  if (on_error_) {
    on_error_("metrics file " + path_.string() + ": " + operation + ": expected success, found \"" +
              reason + "\"; training goes on without it");
  }
}

}  // namespace report
