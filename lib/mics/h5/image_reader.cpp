// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/h5/image_reader.hpp>

namespace mics::h5 {

ImageReader::ImageReader(std::string name, std::span<const std::byte> bytes)
    : name_(std::move(name)) {
  const PropertyList access(H5Pcreate(H5P_FILE_ACCESS), "create a list for", name_);
  check(H5Pset_fapl_core(access.id(), std::size_t{1} << 16, 0), "keep in memory", name_);
  // The list keeps a copy; libhdf5's signature forgets that it does not change the original.
  check(H5Pset_file_image(access.id(), const_cast<std::byte*>(bytes.data()), bytes.size()),
        "take the bytes of", name_);
  file_ = File(H5Fopen(name_.c_str(), H5F_ACC_RDONLY, access.id()), "open", name_);
}

template <class T>
std::vector<T> ImageReader::read(const std::string& path, hid_t type) const {
  const Dataset dataset(H5Dopen2(file_.id(), path.c_str(), H5P_DEFAULT), "open", path);
  const Datatype stored(H5Dget_type(dataset.id()), "tell the type of", path);
  if (check(H5Tequal(stored.id(), type), "compare the type of", path) == 0) {
    raise<FormatError>({.object = "dataset " + in_quotes(path) + " of " + name_,
                        .expected = "unsigned integers of " + std::to_string(sizeof(T)) + " bytes",
                        .found = "another type"});
  }
  const Dataspace space(H5Dget_space(dataset.id()), "tell the shape of", path);
  const hssize_t count = H5Sget_simple_extent_npoints(space.id());
  check(count, "tell the size of", path);
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
