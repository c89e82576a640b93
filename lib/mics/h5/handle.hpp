// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <hdf5.h>

#include <source_location>
#include <string>
#include <string_view>
#include <utility>

namespace mics::h5 {

/// Keeps libhdf5 from printing its errors while it lives, and from loading plugins, which an
/// untrusted file could ask for. In the end it puts back what the application had set, and the
/// errors that were on its stack. Every function of this layer must be called within one, on one
/// thread at a time; sessions nest. Local.
class Session {
 public:
  Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session();

 private:
  void silence();
  void restore();

  unsigned version_ = 2;  // of the application's setting
  H5E_auto2_t print_ = nullptr;
#ifndef H5_NO_DEPRECATED_SYMBOLS
  H5E_auto1_t print_v1_ = nullptr;
#endif
  void* data_ = nullptr;
  hid_t errors_ = H5I_INVALID_HID;  // the application's stack
  unsigned plugins_ = 0;            // kinds that it lets libhdf5 load
  bool has_plugins_ = false;        // libhdf5 was built with them
};

/// Returns `status`, or throws IoError with the text of libhdf5's error stack if it is negative.
hid_t check(hid_t status, std::string_view operation, std::string_view object,
            std::source_location where = std::source_location::current());

/// The name by which libhdf5 knows a file in memory. It tells such files apart by their names, and
/// looks for a file of that name on the disk first: no two are the same and none can be there.
[[nodiscard]] std::string name_in_memory(std::string_view name);

/// Owns one identifier of libhdf5. Move-only. The destructor closes it and ignores the result:
/// where it matters, call close() before.
template <herr_t (*Close)(hid_t)>
class Handle {
 public:
  Handle() = default;
  /// Takes over an identifier. \throws IoError if it is negative, that is, an error
  Handle(hid_t id, std::string_view operation, std::string_view object,
         std::source_location where = std::source_location::current())
      : id_(check(id, operation, object, where)) {}
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, H5I_INVALID_HID)) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(id_, other.id_);
    return *this;
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() {
    if (id_ >= 0) Close(id_);
  }

  /// Closes the identifier now. \throws IoError if libhdf5 could not
  void close(std::string_view object) {
    if (id_ >= 0) check(Close(std::exchange(id_, H5I_INVALID_HID)), "close", object);
  }
  [[nodiscard]] hid_t id() const noexcept { return id_; }

 private:
  hid_t id_ = H5I_INVALID_HID;
};

using File = Handle<H5Fclose>;
using Object = Handle<H5Oclose>;
using Dataset = Handle<H5Dclose>;
using Dataspace = Handle<H5Sclose>;
using Datatype = Handle<H5Tclose>;
using PropertyList = Handle<H5Pclose>;
using Attribute = Handle<H5Aclose>;

}  // namespace mics::h5
