// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/h5/handle.hpp>

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
  H5open();  // the first call of all initializes the error stack itself
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
  H5Eclear2(H5E_DEFAULT);
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

}  // namespace mics::h5
