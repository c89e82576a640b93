// SPDX-License-Identifier: Apache-2.0
// How much larger than the state its files are, from their layout alone: nothing is written.
#include "stored_model.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace mics::checkpoint::test {
namespace {

/// The tensors of a transformer with `layers` blocks of this width: 12 each, small ones included.
Model transformer(int layers, std::int64_t width, std::int64_t vocabulary) {
  Model model;
  const UnitId embedding = model.unit("embedding");
  model.parameter(embedding, "token_embedding.weight", {vocabulary, width});
  model.parameter(embedding, "position_embedding.weight", {1024, width});
  for (int i = 0; i < layers; ++i) {
    const std::string name = "blocks." + std::to_string(i) + '.';
    const UnitId block = model.unit(name);
    for (const char* const norm : {"norm1", "norm2"}) {
      model.parameter(block, name + norm + ".weight", {width});
      model.parameter(block, name + norm + ".bias", {width});
    }
    model.parameter(block, name + "attention.qkv.weight", {3 * width, width});
    model.parameter(block, name + "attention.qkv.bias", {3 * width});
    model.parameter(block, name + "attention.projection.weight", {width, width});
    model.parameter(block, name + "attention.projection.bias", {width});
    model.parameter(block, name + "mlp.up.weight", {4 * width, width});
    model.parameter(block, name + "mlp.up.bias", {4 * width});
    model.parameter(block, name + "mlp.down.weight", {width, 4 * width});
    model.parameter(block, name + "mlp.down.bias", {width});
  }
  const UnitId last = model.unit("last");
  model.parameter(last, "norm.weight", {width});
  model.parameter(last, "norm.bias", {width});
  return model;
}

struct Sizes {
  std::int64_t smallest_piece = 0;
  std::int64_t pieces = 0;
  std::int64_t manifest = 0;
  std::int64_t logical = 0;
};

Sizes sizes_of(const Model& model, const Placement& placement) {
  const StoredState state = describe(model, placement);
  const int parts = parts_of_shard(state, {});
  const std::string id = make_save_id();
  Sizes sizes{.logical = state.logical_bytes()};
  std::vector<detail::Piece> pieces;
  for (int i = 0; i < placement.shard * parts; ++i) {
    pieces.push_back(PieceWriter(state, detail::piece_id(i, parts), parts, id).piece());
    sizes.pieces += pieces.back().bytes;
    sizes.smallest_piece =
        i == 0 ? pieces.back().bytes : std::min(sizes.smallest_piece, pieces.back().bytes);
  }
  sizes.manifest = std::ssize(StepWriter(state, parts, id, pieces).manifest());
  return sizes;
}

// What a view of a tensor in an array costs, whatever its size: its name, header, digest and part
// of the description, and for each piece that it lies in a selection on both sides with two names,
// which HDF5 stores in full. Elements cost nothing but themselves, and their CRCs 4 bytes a MiB.
TEST(SizeTest, AViewCostsTheManifestLessThan400Bytes) {
  for (const int layers : {4, 12, 48}) {
    const Model model = transformer(layers, 64, 256);
    constexpr std::int64_t arrays = 3;
    constexpr std::int64_t aligned = 8192;  // datasets of the index, and the end of the file
    EXPECT_LE(sizes_of(model, {1, 1}).manifest - aligned, 400 * arrays * model.parameters())
        << layers << " layers";
  }
}

TEST(SizeTest, FilesAreHardlyLargerThanTheStateFrom128MiBAPieceOn) {
  struct Case {
    Placement placement;
    int layers;
    std::int64_t width;
    std::int64_t vocabulary;
  };
  for (const Case& c :
       {Case{{1, 1}, 4, 384, 12000}, Case{{2, 1}, 12, 384, 16000}, Case{{4, 4}, 12, 512, 20000},
        Case{{4, 2}, 12, 512, 20000}, Case{{8, 4, true}, 12, 768, 30000}}) {
    const Sizes sizes = sizes_of(transformer(c.layers, c.width, c.vocabulary), c.placement);
    SCOPED_TRACE(std::to_string(c.placement.world) + " ranks, shards of " +
                 std::to_string(c.placement.shard) + ": smallest piece " +
                 std::to_string(sizes.smallest_piece) + ", all pieces " +
                 std::to_string(sizes.pieces) + ", manifest " + std::to_string(sizes.manifest) +
                 ", state " + std::to_string(sizes.logical));
    EXPECT_GE(sizes.smallest_piece, std::int64_t{128} << 20);
    constexpr std::int64_t commit_bytes = 1024;
    EXPECT_LE(static_cast<double>(sizes.pieces + sizes.manifest + commit_bytes),
              1.001 * static_cast<double>(sizes.logical));
  }
}

}  // namespace
}  // namespace mics::checkpoint::test
