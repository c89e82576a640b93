// SPDX-License-Identifier: Apache-2.0
// Steps whose checksums are right and whose contents are forged.
#include "stored_model.hpp"
#include <mics/base/error.hpp>
#include <mics/checkpoint/crc32c.hpp>
#include <mics/h5/file_builder.hpp>

#include <gtest/gtest.h>

#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <vector>

namespace mics::checkpoint::test {
namespace {

class Forged : public testing::Test {
 protected:
  Forged() {
    state_ = describe(odd_model(), {2, 2});
    Memory memory(state_);
    memory.fill();
    DirectoryWriter directory(SystemCalls::native(), scratch_.path(), {});
    folder_ = save(SystemCalls::native(), directory, state_, memory);
    commit_ = Checkpoint::open(SystemCalls::native(), folder_).commit();
    std::ifstream file(folder_ / "manifest.h5", std::ios::binary);
    manifest_ = {std::istreambuf_iterator<char>(file), {}};
  }

  void write(const std::string& manifest) {
    std::ofstream(folder_ / "manifest.h5", std::ios::binary) << manifest;
    Commit commit = commit_;
    commit.files[0].bytes = std::ssize(manifest);
    commit.files[0].crc = crc32c(std::as_bytes(std::span(manifest.data(), manifest.size())));
    std::ofstream(folder_ / commit_name, std::ios::binary) << to_text(commit);
  }

  // Replaces /index/description by what `forge` makes in its place.
  void replace_description(const std::function<void(hid_t file)>& forge) {
    const std::filesystem::path path = folder_ / "manifest.h5";
    {
      const h5::Session session;
      const h5::File file(H5Fopen(path.c_str(), H5F_ACC_RDWR, H5P_DEFAULT), "open", "");
      h5::check(H5Ldelete(file.id(), "/index/description", H5P_DEFAULT), "delete", "");
      forge(file.id());
    }
    std::ifstream stream(path, std::ios::binary);
    write({std::istreambuf_iterator<char>(stream), {}});
  }

  // Changes the text of the description, its length kept.
  void edit(const std::string& from, const std::string& to) {
    ASSERT_EQ(from.size(), to.size());
    std::string manifest = manifest_;
    const auto at = manifest.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    manifest.replace(at, from.size(), to);
    write(manifest);
  }

  void expect_refused(const std::string& found) {
    try {
      const Checkpoint checkpoint = Checkpoint::open(SystemCalls::native(), folder_);
      Memory memory(state_);
      for (int tau = 0; tau < 2; ++tau) {
        checkpoint.read(state_, memory.parts<std::byte>(tau, 0, 1));
      }
      ADD_FAILURE() << "it was read";
    } catch (const FormatError& error) {
      const std::string line = error.what();
      EXPECT_NE(line.find(found), std::string::npos) << line;
      EXPECT_EQ(line.find('\n'), std::string::npos) << line;
    }
  }

  ScratchFolder scratch_;
  StoredState state_;
  std::filesystem::path folder_;
  Commit commit_;
  std::string manifest_;
};

TEST_F(Forged, AnIndexInAnotherFileIsNotRead) {
  replace_description([&](hid_t file) {
    H5Lcreate_external(commit_.files[1].name.c_str(), "/master_weights/fp32", file,
                       "/index/description", H5P_DEFAULT, H5P_DEFAULT);
  });
  expect_refused("found a link to another file");
}

TEST_F(Forged, AnIndexOfAnotherFilesElementsIsNotRead) {
  replace_description([&](hid_t file) {
    const h5::PropertyList creation(H5Pcreate(H5P_DATASET_CREATE), "create", "");
    H5Pset_external(creation.id(), "/etc/passwd", 0, 64);
    const hsize_t count = 64;
    const h5::Dataspace space(H5Screate_simple(1, &count, nullptr), "create", "");
    const h5::Dataset dataset(H5Dcreate2(file, "/index/description", H5T_STD_U8LE, space.id(),
                                         H5P_DEFAULT, creation.id(), H5P_DEFAULT),
                              "create", "");
  });
  expect_refused("found elements in other files");
}

TEST_F(Forged, AViewForAnIndexIsNotRead) {
  replace_description([&](hid_t file) {
    const h5::PropertyList creation(H5Pcreate(H5P_DATASET_CREATE), "create", "");
    const hsize_t count = 64;
    const h5::Dataspace space(H5Screate_simple(1, &count, nullptr), "create", "");
    H5Pset_virtual(creation.id(), space.id(), commit_.files[1].name.c_str(), "/weights/fp16",
                   space.id());
    const h5::Dataset dataset(H5Dcreate2(file, "/index/description", H5T_STD_U8LE, space.id(),
                                         H5P_DEFAULT, creation.id(), H5P_DEFAULT),
                              "create", "");
  });
  expect_refused("found a view of other datasets");
}

TEST_F(Forged, AManifestThatIsAnotherHdf5File) {
  std::filesystem::copy_file(folder_ / commit_.files[1].name, folder_ / "manifest.h5",
                             std::filesystem::copy_options::overwrite_existing);
  std::ifstream stream(folder_ / "manifest.h5", std::ios::binary);
  write({std::istreambuf_iterator<char>(stream), {}});
  expect_refused("manifest.h5");
}

TEST_F(Forged, AManifestThatIsNoHdf5File) {
  write("\x89HDF\r\n\x1a\n and nothing more");
  expect_refused("manifest.h5");
}

TEST_F(Forged, SizesThatNoFileHas) {
  edit(R"("count":1536)", R"("count":9e99)");
  expect_refused("\"count\" of the description");
  edit(R"("count":1536,"name":"first:fp32")", R"("count":1073741824,"name":"fp32")");
  expect_refused("arrays that fit into pieces");
}

TEST_F(Forged, ShapesAndPlaces) {
  edit(R"("shape":[37,29])", R"("shape":[37,30])");
  expect_refused("tensor \"first/matrix\"");
  edit(R"("segments":[[0,0,1073])", R"("segments":[[1,0,1073])");
  expect_refused("buffer");
  edit(R"("shard_size":2)", R"("shard_size":3)");
  expect_refused("layout");
}

TEST_F(Forged, APieceElsewhere) {
  const std::string name = commit_.files[1].name;
  edit("\"file\":\"" + name, "\"file\":\"" + ("../" + name).substr(0, name.size()));
  expect_refused("the step, save and files of COMMIT");
}

TEST_F(Forged, LevelsWithoutEnd) {
  const std::size_t length = manifest_.find(R"(,"grid")") - manifest_.find(R"({"blobs")");
  edit(manifest_.substr(manifest_.find(R"({"blobs")"), length), std::string(length, '['));
  expect_refused("levels");
}

}  // namespace
}  // namespace mics::checkpoint::test
