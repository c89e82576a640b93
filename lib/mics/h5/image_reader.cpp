// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/h5/image_reader.hpp>

namespace mics::h5 {

ImageReader::ImageReader(std::string name, std::span<const std::byte> bytes)
    : name_(std::move(name)), bytes_(bytes.size()) {
  const PropertyList access(H5Pcreate(H5P_FILE_ACCESS), "create a list for", name_);
  check(H5Pset_fapl_core(access.id(), std::size_t{1} << 16, 0), "keep in memory", name_);
  // The list keeps a copy; libhdf5's signature forgets that it does not change the original.
  check(H5Pset_file_image(access.id(), const_cast<std::byte*>(bytes.data()), bytes.size()),
        "take the bytes of", name_);
  file_ = File(H5Fopen(name_in_memory(name_).c_str(), H5F_ACC_RDONLY, access.id()), "open", name_);
}

void ImageReader::refuse(const std::string& path, const std::string& expected,
                         const std::string& found) const {
  raise<FormatError>({.object = in_quotes(path) + " of " + name_,
                      .expected = expected,
                      .found = found,
                      .remedy = "mics did not write this file; it is not read"});
}

void ImageReader::require_hard_links(const std::string& path) const {
  // From the root on: libhdf5 follows the links before the one that it is asked about.
  for (auto end = path.find('/', 1);; end = path.find('/', end + 1)) {
    const std::string link = path.substr(0, end);
    H5L_info_t info;
    check(H5Lget_info(file_.id(), link.c_str(), &info, H5P_DEFAULT), "tell the kind of", link);
    if (info.type != H5L_TYPE_HARD) {
      refuse(link, "an object of the file itself",
             info.type == H5L_TYPE_SOFT       ? "a soft link"
             : info.type == H5L_TYPE_EXTERNAL ? "a link to another file"
                                              : "a link of an unknown kind");
    }
    if (end == std::string::npos) return;
  }
}

void ImageReader::require_contiguous(const std::string& path, const Dataset& dataset) const {
  const PropertyList creation(H5Dget_create_plist(dataset.id()), "tell the layout of", path);
  const H5D_layout_t layout = H5Pget_layout(creation.id());
  check(layout, "tell the layout of", path);
  const std::string expected = "elements in the file itself, end to end";
  if (layout == H5D_VIRTUAL) refuse(path, expected, "a view of other datasets");
  if (layout != H5D_CONTIGUOUS) refuse(path, expected, "chunks or a compact dataset");
  if (check(H5Pget_external_count(creation.id()), "tell the files of", path) != 0) {
    refuse(path, expected, "elements in other files");
  }
  if (check(H5Pget_nfilters(creation.id()), "tell the filters of", path) != 0) {
    refuse(path, expected, "filtered ones");
  }
}

template <class T>
std::vector<T> ImageReader::read(const std::string& path, hid_t type) const {
  require_hard_links(path);
  const Dataset dataset(H5Dopen2(file_.id(), path.c_str(), H5P_DEFAULT), "open", path);
  require_contiguous(path, dataset);
  const Datatype stored(H5Dget_type(dataset.id()), "tell the type of", path);
  if (check(H5Tequal(stored.id(), type), "compare the type of", path) == 0) {
    raise<FormatError>({.object = "dataset " + in_quotes(path) + " of " + name_,
                        .expected = "unsigned integers of " + std::to_string(sizeof(T)) + " bytes",
                        .found = "another type"});
  }
  const Dataspace space(H5Dget_space(dataset.id()), "tell the shape of", path);
  const hssize_t count = H5Sget_simple_extent_npoints(space.id());
  check(count, "tell the size of", path);
  // Before memory is taken for it.
  if (static_cast<std::size_t>(count) > bytes_ / sizeof(T)) {
    refuse(path, "at most the " + std::to_string(bytes_) + " bytes of the file",
           std::to_string(count) + " elements");
  }
  std::vector<T> values(static_cast<std::size_t>(count));
  if (count == 0) return values;
  check(H5Dread(dataset.id(), type, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()), "read", path);
  return values;
}

std::vector<std::byte> ImageReader::read_bytes(const std::string& path) const {
  return read<std::byte>(path, H5T_STD_U8LE);
}

std::vector<std::uint32_t> ImageReader::read_words(const std::string& path) const {
  return read<std::uint32_t>(path, H5T_STD_U32LE);
}

}  // namespace mics::h5
