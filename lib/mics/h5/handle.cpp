// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/h5/handle.hpp>

#include <atomic>
#include <cstdint>
#include <string>

namespace mics::h5 {
namespace {

// The innermost descriptions of the error stack say what went wrong, the outer ones where.
herr_t collect(unsigned number, const H5E_error2_t* error, void* text) {
  auto& line = *static_cast<std::string*>(text);
  constexpr unsigned told = 3;
  if (number >= told) return 0;
  if (!line.empty()) line += ", in ";
  line += error->desc != nullptr && *error->desc != '\0' ? error->desc : "no description";
  if (error->func_name != nullptr) line += " (" + std::string(error->func_name) + ")";
  return 0;
}

}  // namespace

Session::Session() {
  // First of all: most calls clear the stack.
  errors_ = H5Eget_current_stack();
  silence();
  has_plugins_ = H5PLget_loading_state(&plugins_) >= 0;
  if (has_plugins_) H5PLset_loading_state(0);
}

void Session::silence() {
#ifndef H5_NO_DEPRECATED_SYMBOLS
  H5Eauto_is_v2(H5E_DEFAULT, &version_);
  if (version_ == 0) {
    H5Eget_auto1(&print_v1_, &data_);
    H5Eset_auto1(nullptr, nullptr);
    return;
  }
#endif
  H5Eget_auto2(H5E_DEFAULT, &print_, &data_);
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
}

Session::~Session() {
  if (has_plugins_) H5PLset_loading_state(plugins_);
  restore();
  // Last of all. It closes the identifier.
  if (errors_ >= 0) H5Eset_current_stack(errors_);
}

void Session::restore() {
#ifndef H5_NO_DEPRECATED_SYMBOLS
  if (version_ == 0) {
    H5Eset_auto1(print_v1_, data_);
    return;
  }
#endif
  H5Eset_auto2(H5E_DEFAULT, print_, data_);
}

hid_t check(hid_t status, std::string_view operation, std::string_view object,
            std::source_location where) {
  if (status >= 0) return status;
  std::string text;
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, collect, &text);
  H5Eclear2(H5E_DEFAULT);
  raise<IoError>({.object = std::string(object),
                  .expected = "libhdf5 to " + std::string(operation),
                  .found = text.empty() ? "an error without a description" : text},
                 where);
}

std::string name_in_memory(std::string_view name) {
  static std::atomic<std::uint64_t> next{0};
  return "/dev/null/mics-" + std::to_string(next++) + '/' + std::string(name);
}

}  // namespace mics::h5
