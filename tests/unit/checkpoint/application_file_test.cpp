// SPDX-License-Identifier: Apache-2.0
// An application that writes an HDF5 file of its own, a parallel one where libhdf5 has them, while
// a checkpoint is saved: neither notices the other.
#include "stored_model.hpp"
#include <mics/checkpoint/loader.hpp>
#include <mics/checkpoint/saver.hpp>
#include <mics/comm/communicator.hpp>
#include <mics/h5/handle.hpp>

#include <gtest/gtest.h>
#include <hdf5.h>
#include <mpi.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

namespace mics::checkpoint::test {
namespace {

herr_t application_printer(hid_t, void* calls) {
  ++*static_cast<int*>(calls);
  return 0;
}

// What of libhdf5 is the whole process's, as the application sees it.
struct Settings {
  H5E_auto2_t printer = nullptr;
  void* printer_data = nullptr;
  ssize_t errors = 0;
  ssize_t objects = 0;
  unsigned plugins = 0;
  std::string working_directory = std::filesystem::current_path().string();

  static Settings now() {
    Settings now;
    // Most calls clear the stack.
    const hid_t stack = H5Eget_current_stack();
    EXPECT_GE(H5Eget_auto2(H5E_DEFAULT, &now.printer, &now.printer_data), 0);
    now.errors = H5Eget_num(stack);
    now.objects = H5Fget_obj_count(static_cast<hid_t>(H5F_OBJ_ALL), H5F_OBJ_ALL);
    EXPECT_GE(H5PLget_loading_state(&now.plugins), 0);
    EXPECT_GE(H5Eset_current_stack(stack), 0);
    return now;
  }
  friend bool operator==(const Settings&, const Settings&) = default;
};

// A dataset with a row for each round and a column for each rank.
class ApplicationFile {
 public:
  static constexpr int rounds = 24;
  static constexpr int width = 4096;  // elements of a rank in a row

  ApplicationFile(MPI_Comm comm, const std::string& path) {
    MPI_Comm_rank(comm, &rank_);
    MPI_Comm_size(comm, &ranks_);
    const hid_t access = H5Pcreate(H5P_FILE_ACCESS);
    transfer_ = H5Pcreate(H5P_DATASET_XFER);
#ifdef H5_HAVE_PARALLEL
    EXPECT_GE(H5Pset_fapl_mpio(access, comm, MPI_INFO_NULL), 0);
    EXPECT_GE(H5Pset_dxpl_mpio(transfer_, H5FD_MPIO_COLLECTIVE), 0);
    file_ = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access);
#else
    // A file a rank, of which the others' columns stay empty.
    file_ = H5Fcreate((path + std::to_string(rank_)).c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access);
#endif
    EXPECT_GE(file_, 0);
    H5Pclose(access);
    const hsize_t dims[] = {rounds, static_cast<hsize_t>(ranks_) * width};
    space_ = H5Screate_simple(2, dims, nullptr);
    dataset_ = H5Dcreate2(file_, "field", H5T_NATIVE_DOUBLE, space_, H5P_DEFAULT, H5P_DEFAULT,
                          H5P_DEFAULT);
    EXPECT_GE(dataset_, 0);
  }
  ApplicationFile(const ApplicationFile&) = delete;
  ApplicationFile& operator=(const ApplicationFile&) = delete;
  ~ApplicationFile() {
    H5Dclose(dataset_);
    H5Sclose(space_);
    H5Pclose(transfer_);
    EXPECT_GE(H5Fclose(file_), 0);
  }

  void write(int round) {
    const std::vector<double> values(width, value(round, rank_));
    EXPECT_GE(transferred(round, rank_, const_cast<double*>(values.data()), true), 0);
  }

  void expect_written() {
    for (int round = 0; round < rounds; ++round) {
      std::vector<double> values(width);
      EXPECT_GE(transferred(round, rank_, values.data(), false), 0);
      EXPECT_EQ(values, std::vector<double>(width, value(round, rank_))) << "round " << round;
    }
  }

 private:
  static double value(int round, int rank) { return round + rank / 16.0; }

  // Collective where the file is parallel.
  herr_t transferred(int round, int column, double* values, bool write) {
    const hsize_t start[] = {static_cast<hsize_t>(round), static_cast<hsize_t>(column) * width};
    const hsize_t count[] = {1, width};
    H5Sselect_hyperslab(space_, H5S_SELECT_SET, start, nullptr, count, nullptr);
    const hid_t memory = H5Screate_simple(2, count, nullptr);
    const herr_t status =
        write ? H5Dwrite(dataset_, H5T_NATIVE_DOUBLE, memory, space_, transfer_, values)
              : H5Dread(dataset_, H5T_NATIVE_DOUBLE, memory, space_, transfer_, values);
    H5Sclose(memory);
    return status;
  }

  int rank_ = 0;
  int ranks_ = 1;
  hid_t transfer_ = H5I_INVALID_HID;
  hid_t file_ = H5I_INVALID_HID;
  hid_t space_ = H5I_INVALID_HID;
  hid_t dataset_ = H5I_INVALID_HID;
};

TEST(ApplicationFileTest, NoticesNothingOfASave) {
  const comm::Communicator world = comm::Communicator::duplicate(MPI_COMM_WORLD);
  std::optional<ScratchFolder> scratch;
  std::string path(4096, '\0');
  if (world.rank() == 0) {
    scratch.emplace();
    path.replace(0, scratch->path().string().size(), scratch->path().string());
  }
  MPI_Bcast(path.data(), 4096, MPI_CHAR, 0, world.native());
  path.resize(path.find('\0'));

  // The application's own handling of errors, and an error that it has not looked at.
  H5open();
  H5E_auto2_t printer = nullptr;
  void* printer_data = nullptr;
  H5Eget_auto2(H5E_DEFAULT, &printer, &printer_data);
  int printed = 0;
  H5Eset_auto2(H5E_DEFAULT, application_printer, &printed);
  {
    ApplicationFile file(world.native(), path + "/application.h5");
    const int shard = world.size() % 2 == 0 ? 2 : 1;
    StoredState state = describe(odd_model(), {world.size(), shard});
    Memory memory(state);
    memory.fill();
    const std::vector<int> nodes(static_cast<std::size_t>(world.size()), 0);
    const layout::Place place = layout::GroupLayout::make(nodes, shard).place(world.rank());
    const auto sources = memory.parts<const std::byte>(place.shard, place.group, 1);

    EXPECT_LT(H5Gclose(H5I_INVALID_HID), 0);
    EXPECT_EQ(printed, 1);
    const Settings before = Settings::now();
    EXPECT_GT(before.errors, 0);
    comm::FailureChannel failures(world);
    comm::OperationLog operations;
    comm::MpiTransport group(comm::Communicator::duplicate(world.native()), nodes,
                             {.failures = &failures, .log = &operations});
    Saver saver(group, path + "/run", {.size = {.min_bytes = 0}}, {});
    EXPECT_EQ(Settings::now(), before);
    saver.start(state, place, sources);
    EXPECT_EQ(Settings::now(), before);
    SavePhase phase = SavePhase::staged;
    for (int round = 0; round < ApplicationFile::rounds; ++round) {
      file.write(round);
      const Settings now = Settings::now();
      // Not all ranks learn of the commit in the same round; a poll is local.
      if (phase == SavePhase::staged) phase = saver.poll().phase;
      EXPECT_EQ(Settings::now(), now);
    }
    while (phase == SavePhase::staged) phase = saver.poll().phase;
    EXPECT_EQ(phase, SavePhase::committed);

    EXPECT_LT(H5Gclose(H5I_INVALID_HID), 0);
    const Settings after = Settings::now();
    const comm::Communicator replicas = world.split(place.shard, place.group);
    Memory loaded(state);
    const auto checkpoint = load(
        group, path + "/run", state, place, loaded.parts<std::byte>(place.shard, place.group, 1),
        [&](void* data, std::int64_t bytes, int root) {
          MPI_Bcast(data, static_cast<int>(bytes), MPI_BYTE, root, replicas.native());
        },
        {}, {});
    EXPECT_TRUE(checkpoint);
    EXPECT_EQ(Settings::now(), after);
    EXPECT_EQ(printed, 2);
    const auto want = memory.parts<std::byte>(place.shard, place.group, 1);
    const auto have = loaded.parts<std::byte>(place.shard, place.group, 1);
    for (std::size_t i = 0; i < want.size(); ++i) {
      const DType dtype =
          state.buffer(want[i].buffer).arrays[static_cast<std::size_t>(want[i].array)].dtype;
      EXPECT_TRUE(std::equal(want[i].data, want[i].data + want[i].range.length * bytes_of(dtype),
                             have[i].data))
          << "array " << i;
    }
    file.expect_written();
  }
  H5Eset_auto2(H5E_DEFAULT, printer, printer_data);
  H5Eclear2(H5E_DEFAULT);
  MPI_Barrier(world.native());
}

}  // namespace
}  // namespace mics::checkpoint::test
