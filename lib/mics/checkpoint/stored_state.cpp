// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/stored_state.hpp>

#include <algorithm>
#include <set>

namespace mics::checkpoint {
namespace {

[[noreturn]] void refuse(const std::string& object, const std::string& expected,
                         const std::string& found) {
  raise<FormatError>({.object = object, .expected = expected, .found = found});
}

// Elements of a shape; -1 if there is no such number.
std::int64_t product(const std::vector<std::int64_t>& shape) {
  std::int64_t count = 1;
  for (const std::int64_t extent : shape) {
    if (extent < 0) return -1;
    if (__builtin_mul_overflow(count, extent, &count)) return -1;
  }
  return count;
}

}  // namespace

std::int64_t StoredTensor::count() const { return product(shape); }

std::int64_t StoredState::logical_bytes() const {
  std::int64_t bytes = 0;
  for (const StoredBuffer& buffer : buffers) {
    std::int64_t scalars = 0;
    for (const StoredSegment& segment : buffer.segments) scalars += segment.range.length;
    for (const StoredArray& array : buffer.arrays) bytes += scalars * bytes_of(array.dtype);
  }
  return bytes;
}

void StoredState::validate() const {
  constexpr std::int64_t most = std::int64_t{1}
                                << 56;  // 64-bit byte offsets stay far from overflow
  if (grid.world_size < 1 || grid.shard_size < 1 || grid.world_size % grid.shard_size != 0 ||
      (grid.slices != 1 && grid.slices != grid.replicas()) || grid.ranks_per_node < 1) {
    refuse("layout", "a shard size that divides the world, and 1 slice or one a replica",
           std::to_string(grid.world_size) + " ranks, shard size " +
               std::to_string(grid.shard_size) + ", " + std::to_string(grid.slices) + " slices");
  }
  if (step < 0) refuse("step", "0 or more", std::to_string(step));
  std::set<std::string_view> names;
  for (const StoredTensor& tensor : tensors) {
    const std::string object = "tensor " + in_quotes(tensor.name);
    if (!names.insert(tensor.name).second) refuse(object, "to be there once", "it twice");
    if (tensor.shape.size() > 31) {
      refuse(object, "at most 31 extents", std::to_string(tensor.shape.size()));
    }
    if (tensor.count() < 0 || tensor.count() > most) {
      refuse(object, "a shape of non-negative extents", "one without a size");
    }
  }
  std::vector<bool> seen(tensors.size());
  for (const StoredBuffer& buffer : buffers) {
    const std::string object = "buffer " + in_quotes(buffer.name);
    if (buffer.count < 0 || buffer.count > most ||
        buffer.count % (std::int64_t{256} * grid.shard_size) != 0) {
      refuse(object, "a multiple of 256 times the shard size", std::to_string(buffer.count));
    }
    std::set<std::string_view> arrays;
    for (const StoredArray& array : buffer.arrays) {
      if (array.name.empty() || !arrays.insert(array.name).second) {
        refuse(object, "arrays with names of their own", in_quotes(array.name));
      }
    }
    std::int64_t end = 0;
    for (const StoredSegment& segment : buffer.segments) {
      if (segment.tensor < 0 || segment.tensor >= std::ssize(tensors) ||
          seen[static_cast<std::size_t>(segment.tensor)]) {
        refuse(object, "each tensor in one place", "tensor " + std::to_string(segment.tensor));
      }
      seen[static_cast<std::size_t>(segment.tensor)] = true;
      const StoredTensor& tensor = this->tensor(segment.tensor);
      const layout::Interval& range = segment.range;
      if (range.length != tensor.scalars() || range.offset < end || range.offset > buffer.count ||
          range.length > buffer.count - range.offset || range.offset % 64 != 0) {
        refuse("tensor " + in_quotes(tensor.name) + " of " + object,
               std::to_string(tensor.scalars()) + " scalars inside it, after the tensor before",
               std::to_string(range.length) + " at " + std::to_string(range.offset));
      }
      end = range.end();
    }
  }
  for (std::size_t i = 0; i < seen.size(); ++i) {
    if (!seen[i]) refuse("tensor " + in_quotes(tensors[i].name), "to lie in a buffer", "none");
  }
}

StoredState describe_state(const Model& model, const state::FlatModel& flat, const StoredGrid& grid,
                           const std::function<std::vector<StoredArray>(int buffer)>& arrays) {
  StoredState stored;
  stored.grid = grid;
  for (int i = 0; i < model.parameters(); ++i) {
    const ParameterSpec& spec = model.spec(ParameterId{i});
    stored.tensors.push_back({.name = spec.name,
                              .shape = spec.shape,
                              .complex = spec.options.complex,
                              .layout = spec.options.layout,
                              .trainable = spec.options.trainable,
                              .dtype = spec.options.dtype});
  }
  for (int b = 0; b < flat.buffer_count(); ++b) {
    const state::FlatBuffer& buffer = flat.buffer(b);
    StoredBuffer& to = stored.buffers.emplace_back();
    to.name = buffer.name;
    to.count = buffer.flat.count();
    to.arrays = arrays(b);
    for (std::size_t i = 0; i < buffer.parameters.size(); ++i) {
      to.segments.push_back(
          {buffer.parameters[i].value, buffer.flat.parameter(static_cast<std::int64_t>(i))});
    }
  }
  return stored;
}

}  // namespace mics::checkpoint
