// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/mics.hpp>

#include <gtest/gtest.h>
#include <mpi.h>
#include <unit/engine/elements.hpp>
#include <unit/engine/layouts.hpp>
#include <unit/engine/toy.hpp>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mics::test {

/// The worlds of the catalogue of pitfalls, (ranks, p, ranks a node), and the like for other rank
/// counts; nodes of unequal size among them.
[[nodiscard]] inline std::vector<Layout> pitfall_layouts() {
  constexpr std::array shapes_of_pitfalls{
      Shape{1, 1, 1}, Shape{2, 1, 2}, Shape{2, 2, 2}, Shape{2, 2, 1}, Shape{3, 1, 3},
      Shape{3, 3, 2}, Shape{4, 1, 2}, Shape{4, 2, 2}, Shape{4, 4, 2}, Shape{6, 2, 3},
      Shape{6, 3, 3}, Shape{6, 6, 3}, Shape{8, 4, 2}, Shape{8, 4, 4}, Shape{8, 8, 4}};
  std::vector<Layout> layouts;
  for (const Shape& shape : shapes_of_pitfalls) {
    if (shape.world == job_size()) layouts.push_back({shape, Preset::mics, Switch::automatic});
  }
  EXPECT_FALSE(layouts.empty()) << "no shape is listed for " << job_size() << " ranks";
  return layouts;
}

/// The sum of a number over all ranks of the job.
[[nodiscard]] inline std::int64_t sum_over_job(std::int64_t value) {
  MPI_Allreduce(MPI_IN_PLACE, &value, 1, MPI_INT64_T, MPI_SUM, MPI_COMM_WORLD);
  return value;
}

/// Expects the same bits on every rank of the job: what rank 0 has, MPI's own broadcast brings.
/// Collective over the job.
inline void expect_same_on_all_ranks(const std::vector<double>& values, std::string_view what) {
  std::int64_t count = std::ssize(values);
  MPI_Bcast(&count, 1, MPI_INT64_T, 0, MPI_COMM_WORLD);
  std::vector<double> of_first(values);
  of_first.resize(static_cast<std::size_t>(count));
  MPI_Bcast(of_first.data(), static_cast<int>(count), MPI_DOUBLE, 0, MPI_COMM_WORLD);
  ASSERT_EQ(std::ssize(values), count) << what;
  std::int64_t differences = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const bool same =
        std::bit_cast<std::uint64_t>(values[i]) == std::bit_cast<std::uint64_t>(of_first[i]);
    differences += same ? 0 : 1;
  }
  EXPECT_EQ(differences, 0) << "elements of " << what << " differ from rank 0's";
}

/// Expects the same text on every rank of the job. Collective over the job.
inline void expect_same_text_on_all_ranks(const std::string& text) {
  std::vector<double> letters(text.begin(), text.end());
  expect_same_on_all_ranks(letters, "a text");
}

/// One array of a parameter.
[[nodiscard]] inline std::vector<double> array_of(Engine& engine, ParameterId id,
                                                  std::string_view array) {
  std::vector<double> values(static_cast<std::size_t>(engine.model().spec(id).scalars()));
  engine.read(id, values, array);
  return values;
}

/// The named arrays of all trainable parameters, one after another. Collective over shard groups.
[[nodiscard]] inline std::vector<double> state_of(Engine& engine,
                                                  const std::vector<std::string>& arrays = {
                                                      "compute", "master_weights"}) {
  std::vector<double> all;
  for (int i = 0; i < engine.model().parameters(); ++i) {
    if (!engine.model().spec({i}).options.trainable) continue;
    for (const std::string& array : arrays) {
      const auto values = array_of(engine, {i}, array);
      all.insert(all.end(), values.begin(), values.end());
    }
  }
  return all;
}

/// Expects element i of an array to be exactly `value(i)`.
template <class Value>
void expect_elements(const std::vector<double>& values, const Value& value,
                     const std::string& what) {
  std::int64_t differences = 0;
  std::size_t first = 0;
  for (std::size_t i = values.size(); i-- > 0;) {
    if (values[i] == static_cast<double>(value(static_cast<std::int64_t>(i)))) continue;
    ++differences;
    first = i;
  }
  if (differences == 0) return;
  ADD_FAILURE() << what << ": " << differences << " elements differ, first element " << first
                << ": " << values[first] << " instead of "
                << static_cast<double>(value(static_cast<std::int64_t>(first)));
}

}  // namespace mics::test
