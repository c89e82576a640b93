// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/h5/file_builder.hpp>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace mics::h5 {
namespace {

// Memory of the core driver. libhdf5 writes metadata only, so that it ends with them; when it gives
// the memory back at the end, the last contents are kept.
void* reallocate(void* memory, std::size_t bytes, H5FD_file_image_op_t, void*) {
  // A size in front of the block, as libhdf5 does not tell it when it frees.
  constexpr std::size_t prefix = alignof(std::max_align_t);
  char* const base = memory == nullptr ? nullptr : static_cast<char*>(memory) - prefix;
  char* const block = static_cast<char*>(std::realloc(base, bytes + prefix));
  if (block == nullptr) return nullptr;
  std::memcpy(block, &bytes, sizeof(bytes));
  return block + prefix;
}

void* allocate(std::size_t bytes, H5FD_file_image_op_t operation, void* data) {
  return reallocate(nullptr, bytes, operation, data);
}

herr_t release(void* memory, H5FD_file_image_op_t operation, void* data) {
  constexpr std::size_t prefix = alignof(std::max_align_t);
  char* const block = static_cast<char*>(memory) - prefix;
  herr_t status = 0;
  if (operation == H5FD_FILE_IMAGE_OP_FILE_CLOSE) {
    std::size_t bytes = 0;
    std::memcpy(&bytes, block, sizeof(bytes));
    const auto* const from = reinterpret_cast<const std::byte*>(memory);
    try {
      static_cast<std::vector<std::byte>*>(data)->assign(from, from + bytes);
    } catch (...) {
      status = -1;  // no memory: an exception must not cross libhdf5
    }
  }
  std::free(block);
  return status;
}

void* same(void* data) { return data; }
herr_t keep(void*) { return 0; }

std::vector<hsize_t> extents(std::span<const std::int64_t> shape) {
  return {shape.begin(), shape.end()};
}

Dataspace make_space(std::span<const std::int64_t> shape, std::string_view object) {
  if (shape.empty()) return {H5Screate(H5S_SCALAR), "create the space of", object};
  const std::vector<hsize_t> dims = extents(shape);
  return {H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr),
          "create the space of", object};
}

// A heap and a tree for the links of a small group are larger than the links.
void keep_links_in_header(const PropertyList& creation, std::string_view object) {
  constexpr unsigned most_links = 200;
  check(H5Pset_link_phase_change(creation.id(), most_links, most_links / 2), "set up links of",
        object);
}

}  // namespace

FileBuilder::FileBuilder(std::string name, std::int64_t metadata_bytes)
    : name_(std::move(name)),
      head_(std::make_unique<std::vector<std::byte>>()),
      links_(H5Pcreate(H5P_LINK_CREATE), "create a list for", name_) {
  check(H5Pset_create_intermediate_group(links_.id(), 1), "set up links of", name_);

  const PropertyList access(H5Pcreate(H5P_FILE_ACCESS), "create a list for", name_);
  constexpr std::size_t increment = std::size_t{1} << 16;
  check(H5Pset_fapl_core(access.id(), increment, 0), "keep in memory", name_);
  H5FD_file_image_callbacks_t callbacks{allocate, nullptr, reallocate, release,
                                        same,     keep,    head_.get()};
  check(H5Pset_file_image_callbacks(access.id(), &callbacks), "keep in memory", name_);
  // 1.10: metadata with checksums, readable by every HDF5 from 1.10 on.
  check(H5Pset_libver_bounds(access.id(), H5F_LIBVER_V110, H5F_LIBVER_V110), "set the version of",
        name_);
  check(H5Pset_meta_block_size(access.id(), static_cast<hsize_t>(metadata_bytes)),
        "set up metadata of", name_);
  check(H5Pset_small_data_block_size(access.id(), 0), "set up small data of", name_);
  // Elements of small datasets need no page of their own.
  check(H5Pset_alignment(access.id(), hsize_t{1} << 16, 4096), "set the alignment of", name_);
  // Of the root and of groups made on the way, which take after it.
  const PropertyList creation(H5Pcreate(H5P_FILE_CREATE), "create a list for", name_);
  keep_links_in_header(creation, name_);
  file_ = File(H5Fcreate(name_in_memory(name_).c_str(), H5F_ACC_EXCL, creation.id(), access.id()),
               "create", name_);
}

FileBuilder::~FileBuilder() = default;

void FileBuilder::create_group(const std::string& path, std::int64_t links,
                               std::int64_t name_bytes) {
  // What libhdf5 takes at most, and more than are kept in a header.
  constexpr std::int64_t most = 65535;
  const PropertyList creation(H5Pcreate(H5P_GROUP_CREATE), "create a list for", path);
  keep_links_in_header(creation, path);
  if (links > 0) {
    const std::int64_t mean = (name_bytes + links - 1) / links;
    check(H5Pset_est_link_info(creation.id(), static_cast<unsigned>(std::min(links, most)),
                               static_cast<unsigned>(std::min(mean, most))),
          "set up links of", path);
  }
  const Object group(H5Gcreate2(file_.id(), path.c_str(), links_.id(), creation.id(), H5P_DEFAULT),
                     "create", path);
}

std::int64_t FileBuilder::create_dataset(const std::string& path, const Datatype& type,
                                         std::span<const std::int64_t> shape) {
  const Dataspace space = make_space(shape, path);
  const PropertyList creation(H5Pcreate(H5P_DATASET_CREATE), "create a list for", path);
  check(H5Pset_layout(creation.id(), H5D_CONTIGUOUS), "lay out", path);
  check(H5Pset_alloc_time(creation.id(), H5D_ALLOC_TIME_EARLY), "lay out", path);
  check(H5Pset_fill_time(creation.id(), H5D_FILL_TIME_NEVER), "lay out", path);
  check(H5Pset_attr_phase_change(creation.id(), 65535, 0), "set up attributes of", path);
  check(H5Pset_obj_track_times(creation.id(), 0), "set up", path);
  const Dataset dataset(H5Dcreate2(file_.id(), path.c_str(), type.id(), space.id(), links_.id(),
                                   creation.id(), H5P_DEFAULT),
                        "create", path);
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
  const haddr_t offset = H5Dget_offset(dataset.id());
  if (offset == HADDR_UNDEF) check(-1, "tell the offset of", path);
  return static_cast<std::int64_t>(offset);
}

Datatype FileBuilder::share(Datatype type) {
  // Without a name: what uses it keeps it.
  check(H5Tcommit_anon(file_.id(), type.id(), H5P_DEFAULT, H5P_DEFAULT), "share a type in", name_);
  return type;
}

std::int64_t FileBuilder::create_bytes(const std::string& path, std::int64_t bytes) {
  const Datatype type(H5Tcopy(H5T_STD_U8LE), "copy a type for", path);
  return create_dataset(path, type, std::span(&bytes, 1));
}

void FileBuilder::create_virtual(const std::string& path, const Datatype& type,
                                 std::span<const std::int64_t> shape,
                                 std::span<const VirtualBlock> blocks,
                                 std::span<const std::byte> fill) {
  const Dataspace space = make_space(shape, path);
  const PropertyList creation(H5Pcreate(H5P_DATASET_CREATE), "create a list for", path);
  check(H5Pset_fill_value(creation.id(), type.id(), fill.data()), "set the fill value of", path);
  check(H5Pset_obj_track_times(creation.id(), 0), "set up", path);
  // No room is left for attributes, which few of many small datasets get.
  check(H5Pset_dset_no_attrs_hint(creation.id(), true), "set up", path);
  const std::vector<hsize_t> all = extents(shape);
  for (const VirtualBlock& block : blocks) {
    // A block that is the whole has the shortest selection.
    if (block.shape == all) {
      check(H5Sselect_all(space.id()), "select", path);
    } else {
      check(H5Sselect_hyperslab(space.id(), H5S_SELECT_SET, block.start.data(), nullptr,
                                block.shape.data(), nullptr),
            "select in", path);
    }
    const Dataspace source(H5Screate_simple(1, &block.source_count, nullptr), "create the space of",
                           block.dataset);
    hsize_t count = 1;
    for (const hsize_t extent : block.shape) count *= extent;
    check(H5Sselect_hyperslab(source.id(), H5S_SELECT_SET, &block.source_start, nullptr, &count,
                              nullptr),
          "select in", block.dataset);
    check(H5Pset_virtual(creation.id(), space.id(), block.file.c_str(), block.dataset.c_str(),
                         source.id()),
          "map a block of", path);
  }
  check(H5Sselect_all(space.id()), "select", path);
  const Dataset dataset(H5Dcreate2(file_.id(), path.c_str(), type.id(), space.id(), links_.id(),
                                   creation.id(), H5P_DEFAULT),
                        "create", path);
}

void FileBuilder::create_attribute(const std::string& object, const std::string& name, hid_t type,
                                   const Dataspace& space, const void* data) {
  const Object owner(H5Oopen(file_.id(), object.c_str(), H5P_DEFAULT), "open", object);
  const Attribute attribute(
      H5Acreate2(owner.id(), name.c_str(), type, space.id(), H5P_DEFAULT, H5P_DEFAULT),
      "create attribute " + name + " of", object);
  check(H5Awrite(attribute.id(), type, data), "write attribute " + name + " of", object);
}

void FileBuilder::attribute(const std::string& object, const std::string& name,
                            const std::string& text) {
  const Datatype type(H5Tcopy(H5T_C_S1), "copy a type for", name);
  check(H5Tset_size(type.id(), text.size() + 1), "resize the type of", name);
  check(H5Tset_cset(type.id(), H5T_CSET_UTF8), "set the characters of", name);
  create_attribute(object, name, type.id(), make_space({}, name), text.c_str());
}

void FileBuilder::attribute(const std::string& object, const std::string& name,
                            std::int64_t value) {
  create_attribute(object, name, H5T_STD_I64LE, make_space({}, name), &value);
}

void FileBuilder::attribute(const std::string& object, const std::string& name,
                            std::span<const std::int64_t> values) {
  const auto count = static_cast<std::int64_t>(values.size());
  create_attribute(object, name, H5T_STD_I64LE, make_space(std::span(&count, 1), name),
                   values.data());
}

Skeleton FileBuilder::finish() {
  file_.close(name_);
  // Closing may still have allocated metadata. The size of the file as a reader will demand it is
  // in the superblock: version 2 or 3, 8-byte offsets, the end of file at byte 28.
  const std::vector<std::byte>& head = *head_;
  constexpr std::size_t version_at = 8;
  constexpr std::size_t offset_bytes_at = 9;
  constexpr std::size_t end_at = 28;
  std::uint64_t end = 0;
  if (head.size() < end_at + sizeof(end) || head[version_at] < std::byte{2} ||
      head[version_at] > std::byte{3} || head[offset_bytes_at] != std::byte{8}) {
    raise<IoError>({.object = name_,
                    .expected = "libhdf5 to write a superblock of version 2 or 3",
                    .found = "another"});
  }
  std::memcpy(&end, head.data() + end_at, sizeof(end));
  Skeleton result{std::move(*head_), static_cast<std::int64_t>(end)};
  if (std::ssize(result.head) > result.bytes) {
    result.head.resize(static_cast<std::size_t>(result.bytes));
  }
  return result;
}

}  // namespace mics::h5
