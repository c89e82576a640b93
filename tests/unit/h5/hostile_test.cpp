// SPDX-License-Identifier: Apache-2.0
// Files that ask libhdf5 to read others, or to load code.
#include <mics/base/error.hpp>
#include <mics/h5/file_builder.hpp>
#include <mics/h5/image_reader.hpp>

#include <gtest/gtest.h>
#include <sys/inotify.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace mics::h5 {
namespace {

// An HDF5 file with eight bytes at /index/secret and an empty one to be made hostile, in a folder
// that is the working directory meanwhile.
class Hostile : public testing::Test {
 protected:
  Hostile() : before_(std::filesystem::current_path()) {
    std::string pattern = (std::filesystem::temp_directory_path() / "mics-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no scratch folder");
    folder_ = pattern;
    std::filesystem::current_path(folder_);
    const File victim(H5Fcreate("victim.h5", H5F_ACC_EXCL, H5P_DEFAULT, H5P_DEFAULT), "create", "");
    const Object group(H5Gcreate2(victim.id(), "index", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT),
                       "create", "");
    write(dataset(victim.id(), "index/secret", H5P_DEFAULT));
    std::ofstream("victim.raw") << "12345678";
    file_ = File(H5Fcreate("hostile.h5", H5F_ACC_EXCL, H5P_DEFAULT, H5P_DEFAULT), "create", "");
  }
  ~Hostile() override {
    std::filesystem::current_path(before_);
    std::error_code error;
    std::filesystem::remove_all(folder_, error);
  }

  static Dataset dataset(hid_t file, const char* path, hid_t creation) {
    const hsize_t count = 8;
    const Dataspace space(H5Screate_simple(1, &count, nullptr), "create", "");
    return {H5Dcreate2(file, path, H5T_STD_U8LE, space.id(), H5P_DEFAULT, creation, H5P_DEFAULT),
            "create", path};
  }
  static void write(const Dataset& dataset) {
    const std::array<unsigned char, 8> bytes{1, 2, 3, 4, 5, 6, 7, 8};
    check(H5Dwrite(dataset.id(), H5T_STD_U8LE, H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes.data()),
          "write", "");
  }
  static PropertyList creation_list() { return {H5Pcreate(H5P_DATASET_CREATE), "create", ""}; }
  static PropertyList chunked() {
    PropertyList list = creation_list();
    const hsize_t chunk = 8;
    check(H5Pset_chunk(list.id(), 1, &chunk), "chunk", "");
    return list;
  }

  std::vector<std::byte> finish() {
    file_.close("hostile.h5");
    std::ifstream stream("hostile.h5", std::ios::binary);
    const std::string text((std::istreambuf_iterator<char>(stream)), {});
    const auto bytes = std::as_bytes(std::span(text.data(), text.size()));
    return {bytes.begin(), bytes.end()};
  }

  // What plain libhdf5 reads at that path: the bytes, or nothing if it cannot.
  static std::vector<unsigned char> read_plainly(const char* path) {
    const Session session;
    const File file(H5Fopen("hostile.h5", H5F_ACC_RDONLY, H5P_DEFAULT), "open", "");
    std::vector<unsigned char> bytes(8);
    try {
      const Dataset dataset(H5Dopen2(file.id(), path, H5P_DEFAULT), "open", path);
      check(H5Dread(dataset.id(), H5T_STD_U8LE, H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes.data()),
            "read", path);
    } catch (const IoError&) {
      return {};
    }
    return bytes;
  }

  // Expects a refusal with that text, and that no other file was so much as opened.
  void expect_refused(const std::string& path, const std::string& found) {
    const std::vector<std::byte> bytes = finish();
    const int watch = ::inotify_init1(IN_NONBLOCK);
    ASSERT_GE(watch, 0);
    for (const char* victim : {"victim.h5", "victim.raw"}) {
      ASSERT_GE(::inotify_add_watch(watch, victim, IN_OPEN | IN_ACCESS), 0);
    }
    {
      const Session session;
      const ImageReader reader("hostile.h5", bytes);
      try {
        static_cast<void>(reader.read_bytes(path));
        ADD_FAILURE() << "it was read";
      } catch (const FormatError& error) {
        const std::string line = error.what();
        EXPECT_NE(line.find(found), std::string::npos) << line;
        EXPECT_NE(line.find("of hostile.h5"), std::string::npos) << line;
      }
    }
    std::array<char, 4096> events{};
    EXPECT_LT(::read(watch, events.data(), events.size()), 0) << "another file was opened";
    // The watch sees what there is to see.
    std::ifstream("victim.h5").get();
    EXPECT_GT(::read(watch, events.data(), events.size()), 0);
    ::close(watch);
  }

  std::filesystem::path before_;
  std::filesystem::path folder_;
  File file_;
};

const std::vector<unsigned char> secret{1, 2, 3, 4, 5, 6, 7, 8};

TEST_F(Hostile, ALinkToAnotherFilesDataset) {
  H5Lcreate_external("victim.h5", "/index/secret", file_.id(), "description", H5P_DEFAULT,
                     H5P_DEFAULT);
  expect_refused("/description", "found a link to another file");
  EXPECT_EQ(read_plainly("/description"), secret);
}

TEST_F(Hostile, ALinkToAnotherFilesGroup) {
  H5Lcreate_external("victim.h5", "/index", file_.id(), "index", H5P_DEFAULT, H5P_DEFAULT);
  expect_refused("/index/secret", "found a link to another file");
  EXPECT_EQ(read_plainly("/index/secret"), secret);
}

TEST_F(Hostile, ASoftLinkThatLeadsToOne) {
  H5Lcreate_external("victim.h5", "/index", file_.id(), "out", H5P_DEFAULT, H5P_DEFAULT);
  H5Lcreate_soft("/out", file_.id(), "index", H5P_DEFAULT, H5P_DEFAULT);
  expect_refused("/index/secret", "found a soft link");
  EXPECT_EQ(read_plainly("/index/secret"), secret);
}

TEST_F(Hostile, ElementsInAnotherFile) {
  const PropertyList creation = creation_list();
  H5Pset_external(creation.id(), "victim.raw", 0, 8);
  dataset(file_.id(), "description", creation.id());
  expect_refused("/description", "found elements in other files");
  EXPECT_EQ(read_plainly("/description").at(0), '1');
}

TEST_F(Hostile, AViewOfAnotherFile) {
  const PropertyList creation = creation_list();
  const hsize_t count = 8;
  const Dataspace space(H5Screate_simple(1, &count, nullptr), "create", "");
  H5Pset_virtual(creation.id(), space.id(), "victim.h5", "/index/secret", space.id());
  dataset(file_.id(), "description", creation.id());
  expect_refused("/description", "found a view of other datasets");
  EXPECT_EQ(read_plainly("/description"), secret);
}

TEST_F(Hostile, MoreElementsThanTheFileHas) {
  const hsize_t count = hsize_t{1} << 50;
  const Dataspace space(H5Screate_simple(1, &count, nullptr), "create", "");
  static_cast<void>(Dataset(H5Dcreate2(file_.id(), "description", H5T_STD_U8LE, space.id(),
                                       H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT),
                            "create", ""));
  expect_refused("/description", "found 1125899906842624 elements");
}

TEST_F(Hostile, AnotherType) {
  const hsize_t count = 8;
  const Dataspace space(H5Screate_simple(1, &count, nullptr), "create", "");
  static_cast<void>(Dataset(H5Dcreate2(file_.id(), "description", H5T_STD_REF_OBJ, space.id(),
                                       H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT),
                            "create", ""));
  expect_refused("/description", "found another type");
}

size_t same(unsigned, std::size_t, const unsigned*, std::size_t bytes, std::size_t*, void**) {
  return bytes;
}

// The folder of a library that sets a variable of the environment when it is loaded, as a filter's
// plugin could do anything.
TEST_F(Hostile, AFilterWhoseCodeIsElsewhere) {
  constexpr H5Z_filter_t number = 32100;
  const H5Z_class2_t filter{H5Z_CLASS_T_VERS, number, 1, 1, "hostile", nullptr, nullptr, same};
  ASSERT_GE(H5Zregister(&filter), 0);
  const PropertyList creation = chunked();
  H5Pset_filter(creation.id(), number, H5Z_FLAG_MANDATORY, 0, nullptr);
  write(dataset(file_.id(), "description", creation.id()));
  ASSERT_GE(H5Fflush(file_.id(), H5F_SCOPE_GLOBAL), 0);
  file_.close("hostile.h5");
  ASSERT_GE(H5Zunregister(number), 0);
  ASSERT_GE(H5PLappend(MICS_TEST_PLUGINS), 0);

  expect_refused("/description", "found chunks");
  EXPECT_EQ(std::getenv("MICS_TEST_PLUGIN"), nullptr);
  EXPECT_TRUE(read_plainly("/description").empty());  // within a session
  EXPECT_EQ(std::getenv("MICS_TEST_PLUGIN"), nullptr);
  // The application's own reading is as before: it would have been loaded.
  const File file(H5Fopen("hostile.h5", H5F_ACC_RDONLY, H5P_DEFAULT), "open", "");
  const Dataset dataset(H5Dopen2(file.id(), "/description", H5P_DEFAULT), "open", "");
  std::array<unsigned char, 8> bytes{};
  testing::internal::CaptureStderr();  // it is no filter after all
  EXPECT_LT(H5Dread(dataset.id(), H5T_STD_U8LE, H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes.data()), 0);
  testing::internal::GetCapturedStderr();
  EXPECT_STREQ(std::getenv("MICS_TEST_PLUGIN"), "loaded");
  H5Eclear2(H5E_DEFAULT);
}

TEST_F(Hostile, FilteredElements) {
  const PropertyList creation = chunked();
  ASSERT_GE(H5Pset_deflate(creation.id(), 6), 0);
  write(dataset(file_.id(), "description", creation.id()));
  expect_refused("/description", "found chunks");
}

// libhdf5 looks at the disk first, even for a file that shall be in memory.
TEST_F(Hostile, AFileOfTheSameNameInTheWorkingDirectory) {
  file_.close("hostile.h5");
  const Session session;
  FileBuilder builder("hostile.h5", 4096);
  static_cast<void>(builder.create_bytes("/a", 1));
  FileBuilder other("hostile.h5", 4096);
  static_cast<void>(other.create_bytes("/b", 1));
  const std::vector<std::byte> bytes = builder.finish().head;
  static_cast<void>(other.finish());
  const ImageReader one("hostile.h5", bytes);
  const ImageReader two("hostile.h5", bytes);
  EXPECT_EQ(one.read_bytes("/a").size(), 1U);
  EXPECT_EQ(two.read_bytes("/a").size(), 1U);
}

// What belongs to the application is as it was.
TEST(SessionTest, PutsBackWhatItChanges) {
  H5open();
  unsigned before = 0;
  ASSERT_GE(H5PLget_loading_state(&before), 0);
  ASSERT_NE(before, 0U);
  const ssize_t objects = H5Fget_obj_count(static_cast<hid_t>(H5F_OBJ_ALL), H5F_OBJ_ALL);
  // An error of the application's. Most calls would clear it.
  testing::internal::CaptureStderr();
  EXPECT_LT(H5Gclose(H5I_INVALID_HID), 0);
  testing::internal::GetCapturedStderr();
  const ssize_t errors = H5Eget_num(H5E_DEFAULT);
  EXPECT_GT(errors, 0);
  {
    const Session session;
    const Session nested;
    EXPECT_EQ(H5Eget_num(H5E_DEFAULT), 0);
    EXPECT_LT(H5Gclose(H5I_INVALID_HID), 0);
    FileBuilder builder("a.h5", 4096);
    static_cast<void>(builder.create_bytes("/a", 1));
    const std::vector<std::byte> bytes = builder.finish().head;
    EXPECT_EQ(ImageReader("a.h5", bytes).read_bytes("/a").size(), 1U);
  }
  EXPECT_EQ(H5Eget_num(H5E_DEFAULT), errors);
  EXPECT_EQ(H5Fget_obj_count(static_cast<hid_t>(H5F_OBJ_ALL), H5F_OBJ_ALL), objects);
  unsigned after = 0;
  ASSERT_GE(H5PLget_loading_state(&after), 0);
  EXPECT_EQ(after, before);
  H5Eclear2(H5E_DEFAULT);
}

}  // namespace
}  // namespace mics::h5
