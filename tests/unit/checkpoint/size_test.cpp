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

/// The tensors of a transformer with `layers` blocks of this width: 13 each, small ones included.
Model transformer(int layers, std::int64_t width, std::int64_t vocabulary) {
  Model model;
  const UnitId embedding = model.unit("embedding");
  model.parameter(embedding, "token.weight", {vocabulary, width});
  model.parameter(embedding, "position.weight", {1024, width});
  for (int i = 0; i < layers; ++i) {
    const UnitId block = model.unit("block" + std::to_string(i));
    for (const char* const vector :
         {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attention.query.bias",
          "attention.value.bias", "attention.projection.bias", "mlp.down.bias"}) {
      model.parameter(block, vector, {width});
    }
    model.parameter(block, "attention.qkv.weight", {3 * width, width});
    model.parameter(block, "attention.projection.weight", {width, width});
    model.parameter(block, "mlp.up.weight", {4 * width, width});
    model.parameter(block, "mlp.up.bias", {4 * width});
    model.parameter(block, "mlp.down.weight", {width, 4 * width});
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
// In one piece of 128 MiB there may therefore be 380 views and the files still be 1.001 of it.
TEST(SizeTest, AViewCostsTheManifestLessThan335Bytes) {
  for (const int layers : {4, 12, 48}) {
    const Model model = transformer(layers, 64, 256);
    constexpr std::int64_t arrays = 3;
    constexpr std::int64_t others = 4096;  // the index, and the last block of selections
    EXPECT_LE(sizes_of(model, {1, 1}).manifest - others, 335 * arrays * model.parameters())
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
  for (const Case& c : {Case{{1, 1}, 4, 384, 12000}, Case{{1, 1}, 9, 256, 15000},
                        Case{{2, 1}, 12, 384, 16000}, Case{{4, 4}, 12, 512, 20000},
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

// Behind them they would make libhdf5 hold all the elements in memory.
TEST(SizeTest, MetadataOfAPieceLieInFrontOfItsElements) {
  for (const int arrays : {1, 3, 40}) {
    StoredState state = describe(transformer(4, 512, 20000), {1, 1});
    for (StoredBuffer& buffer : state.buffers) {
      buffer.arrays.resize(1);
      for (int i = 1; i < arrays; ++i) {
        buffer.arrays.push_back({std::string(60, 'a') + std::to_string(i), DType::fp32});
      }
    }
    const auto contents = detail::piece_contents(state, {0, 0}, 1);
    const h5::Session session;
    detail::Piece piece;
    const h5::Skeleton skeleton =
        detail::make_skeleton(state, contents, {0, 0}, 1, make_save_id(), piece);
    std::int64_t payload = 0;
    for (const detail::PieceDataset& dataset : contents) payload += dataset.bytes();
    EXPECT_LE(std::ssize(skeleton.head), 65536) << arrays;
    EXPECT_LE(piece.bytes - payload, 4096 * (2 * arrays + 1)) << arrays;
  }
}

}  // namespace
}  // namespace mics::checkpoint::test
