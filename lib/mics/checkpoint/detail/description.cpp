// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/detail/description.hpp>

#include <nlohmann/json.hpp>

#include <array>
#include <bit>
#include <charconv>
#include <cstdio>

namespace mics::checkpoint::detail {
namespace {

using Json = nlohmann::json;

// Reals as the 16 hexadecimal digits of their bits: exact, and NaN and infinities too.
std::string bits(double value) {
  std::array<char, 17> text{};
  std::snprintf(text.data(), text.size(), "%016llx",
                static_cast<unsigned long long>(std::bit_cast<std::uint64_t>(value)));
  return text.data();
}

double real(const std::string& text) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, 16);
  if (error != std::errc() || end != text.data() + text.size() || text.size() != 16) {
    raise<FormatError>({.object = "a real number of the description",
                        .expected = "16 hexadecimal digits",
                        .found = in_quotes(text)});
  }
  return std::bit_cast<double>(value);
}

Json blob_names(const std::vector<std::pair<std::string, std::int64_t>>& blobs) {
  Json result = Json::array();
  for (const auto& [name, bytes] : blobs) result.push_back({{"name", name}, {"bytes", bytes}});
  return result;
}

std::int64_t integer(const Json& json, const char* key, std::int64_t lowest, std::int64_t highest) {
  const Json& value = json.at(key);
  const bool fits = value.is_number_unsigned()
                        ? value.get<std::uint64_t>() <= static_cast<std::uint64_t>(INT64_MAX)
                        : value.is_number_integer();
  if (!fits || value.get<std::int64_t>() < lowest || value.get<std::int64_t>() > highest) {
    raise<FormatError>({.object = in_quotes(key) + " of the description",
                        .expected = "an integer in [" + std::to_string(lowest) + ", " +
                                    std::to_string(highest) + "]",
                        .found = value.dump(-1, ' ', true).substr(0, 40)});
  }
  return value.get<std::int64_t>();
}

int small(const Json& json, const char* key, std::int64_t lowest) {
  return static_cast<int>(integer(json, key, lowest, std::int64_t{1} << 30));
}

Json to_json(const StoredState& state) {
  Json json;
  json["step"] = state.step;
  json["grid"] = {{"world_size", state.grid.world_size},
                  {"shard_size", state.grid.shard_size},
                  {"slices", state.grid.slices},
                  {"ranks_per_node", state.grid.ranks_per_node}};
  Json& tensors = json["tensors"] = Json::array();
  for (const StoredTensor& tensor : state.tensors) {
    tensors.push_back({{"name", tensor.name},
                       {"shape", tensor.shape},
                       {"complex", tensor.complex},
                       {"layout", tensor.layout == MemoryLayout::left ? "left" : "right"},
                       {"trainable", tensor.trainable}});
  }
  Json& buffers = json["buffers"] = Json::array();
  for (const StoredBuffer& buffer : state.buffers) {
    Json arrays = Json::array();
    for (const StoredArray& array : buffer.arrays) {
      arrays.push_back({{"name", array.name}, {"dtype", name(array.dtype)}});
    }
    Json segments = Json::array();
    for (const StoredSegment& segment : buffer.segments) {
      segments.push_back({segment.tensor, segment.range.offset, segment.range.length});
    }
    buffers.push_back({{"name", buffer.name},
                       {"count", buffer.count},
                       {"updates", buffer.updates},
                       {"arrays", std::move(arrays)},
                       {"segments", std::move(segments)}});
  }
  Json& values = json["values"];
  values["integers"] = state.values.integers;
  values["texts"] = state.values.texts;
  Json& reals = values["reals"] = Json::object();
  for (const auto& [key, numbers] : state.values.reals) {
    Json& list = reals[key] = Json::array();
    for (const double number : numbers) list.push_back(bits(number));
  }
  return json;
}

StoredState state_from(const Json& json) {
  constexpr std::int64_t most = std::int64_t{1} << 62;
  StoredState state;
  state.step = integer(json, "step", 0, most);
  const Json& grid = json.at("grid");
  state.grid = {small(grid, "world_size", 1), small(grid, "shard_size", 1),
                small(grid, "slices", 1), small(grid, "ranks_per_node", 1)};
  for (const Json& item : json.at("tensors")) {
    StoredTensor& tensor = state.tensors.emplace_back();
    tensor.name = item.at("name").get<std::string>();
    tensor.shape = item.at("shape").get<std::vector<std::int64_t>>();
    tensor.complex = item.at("complex").get<bool>();
    tensor.trainable = item.at("trainable").get<bool>();
    const auto layout = item.at("layout").get<std::string>();
    if (layout != "left" && layout != "right") {
      raise<FormatError>({.object = "layout of tensor " + in_quotes(tensor.name),
                          .expected = "left or right",
                          .found = in_quotes(layout)});
    }
    tensor.layout = layout == "left" ? MemoryLayout::left : MemoryLayout::right;
  }
  for (const Json& item : json.at("buffers")) {
    StoredBuffer& buffer = state.buffers.emplace_back();
    buffer.name = item.at("name").get<std::string>();
    buffer.count = integer(item, "count", 0, most);
    buffer.updates = integer(item, "updates", 0, most);
    for (const Json& array : item.at("arrays")) {
      buffer.arrays.push_back(
          {array.at("name").get<std::string>(),
           parse_dtype(array.at("dtype").get<std::string>(), "dtype of an array")});
    }
    for (const Json& segment : item.at("segments")) {
      buffer.segments.push_back(
          {segment.at(0).get<int>(),
           {segment.at(1).get<std::int64_t>(), segment.at(2).get<std::int64_t>()}});
    }
  }
  const Json& values = json.at("values");
  state.values.integers = values.at("integers").get<std::map<std::string, std::int64_t>>();
  state.values.texts = values.at("texts").get<std::map<std::string, std::string>>();
  for (const auto& [key, list] : values.at("reals").items()) {
    std::vector<double>& numbers = state.values.reals[key];
    for (const Json& number : list) numbers.push_back(real(number.get<std::string>()));
  }
  state.validate();
  return state;
}

}  // namespace

std::string to_json(const Description& description) {
  Json json = to_json(description.state);
  json["save"] = description.id;
  json["parts"] = description.parts;
  Json& pieces = json["pieces"] = Json::array();
  for (const Piece& piece : description.pieces) {
    pieces.push_back({{"file", piece.file}, {"bytes", piece.bytes}, {"offsets", piece.offsets}});
  }
  json["blobs"] = blob_names(description.blobs);
  try {
    return json.dump();
  } catch (const Json::exception&) {
    raise<ArgumentError>({.object = "names and texts of the state",
                          .expected = "UTF-8",
                          .found = "bytes that are none"});
  }
}

Description from_json(std::string_view text) {
  try {
    const Json json = Json::parse(text, [](int depth, Json::parse_event_t, const Json&) {
      // Messages and copies of a value recurse into it.
      constexpr int most = 16;
      if (depth <= most) return true;
      raise<FormatError>({.object = "description of the state",
                          .expected = "at most " + std::to_string(most) + " levels",
                          .found = "more"});
    });
    Description description;
    description.state = state_from(json);
    description.id = json.at("save").get<std::string>();
    description.parts = small(json, "parts", 1);
    constexpr std::int64_t most = std::int64_t{1} << 62;
    for (const Json& item : json.at("pieces")) {
      Piece& piece = description.pieces.emplace_back();
      piece.file = item.at("file").get<std::string>();
      piece.bytes = integer(item, "bytes", 0, most);
      piece.offsets = item.at("offsets").get<std::vector<std::int64_t>>();
    }
    for (const Json& item : json.at("blobs")) {
      description.blobs.emplace_back(item.at("name").get<std::string>(),
                                     integer(item, "bytes", 0, most));
    }
    const std::int64_t expected =
        std::int64_t{description.state.grid.shard_size} * description.parts;
    if (std::ssize(description.pieces) != expected) {
      raise<FormatError>({.object = "pieces of the description",
                          .expected = std::to_string(expected),
                          .found = std::to_string(description.pieces.size())});
    }
    return description;
  } catch (const Json::exception& error) {
    raise<FormatError>({.object = "description of the state",
                        .expected = "JSON of format version 1",
                        .found = error.what()});
  } catch (const ConfigError& error) {
    raise<FormatError>({.object = "description of the state", .found = error.what()});
  }
}

}  // namespace mics::checkpoint::detail
