// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/base/json_reader.hpp>
#include <mics/state/model.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

namespace mics {
namespace {

TEST(ModelTest, HoldsWhatWasDeclaredInOrder) {
  Model model;
  const UnitId a = model.unit("a");
  const UnitId b = model.unit("b");
  const ParameterId w = model.parameter(a, "weight", {3, 5});
  const ParameterId s = model.parameter(b, "scale", {});
  const ParameterId z = model.parameter(a, "nothing", {4, 0, 2});

  EXPECT_EQ(model.units(), 2);
  EXPECT_EQ(model.parameters(), 3);
  EXPECT_EQ(model.name(b), "b");
  EXPECT_EQ(model.spec(w).name, "a/weight");
  EXPECT_EQ(model.spec(w).count, 15);
  EXPECT_EQ(model.spec(s).count, 1);
  EXPECT_EQ(model.spec(z).count, 0);
  EXPECT_EQ(model.spec(z).unit, a);
  EXPECT_EQ(model.parameters(a), (std::vector<ParameterId>{w, z}));
  EXPECT_EQ(model.count(), 16);
}

TEST(ModelTest, RefusesNamesAndShapesThatDoNotFit) {
  Model model;
  const UnitId a = model.unit("a");
  (void)model.parameter(a, "weight", {3});

  EXPECT_THROW((void)model.unit("a"), ArgumentError);
  EXPECT_THROW((void)model.unit(""), ArgumentError);
  EXPECT_THROW((void)model.parameter(a, "weight", {4}), ArgumentError);
  EXPECT_THROW((void)model.parameter(a, "", {4}), ArgumentError);
  EXPECT_THROW((void)model.parameter(a, "negative", {4, -1}), ArgumentError);
  EXPECT_THROW((void)model.parameter(a, "deep", {1, 1, 1, 1, 1, 1, 1, 1, 1}), ArgumentError);
  EXPECT_THROW((void)model.parameter({7}, "lost", {1}), ArgumentError);
  EXPECT_THROW((void)model.spec({9}), ArgumentError);
  EXPECT_THROW((void)model.name(UnitId{-1}), ArgumentError);
  EXPECT_EQ(model.units(), 1);
  EXPECT_EQ(model.parameters(), 1);
}

TEST(ModelTest, RefusesNamesThatAreNotUtf8) {
  Model model;
  const UnitId unit = model.unit("\xc3\xbc");
  (void)model.parameter(unit, "\xe2\x88\x82", {1});
  for (const char* name : {"\xff", "w\xe4gt", "\xc3", "\xed\xa0\x80", "\xc0\xaf"}) {
    EXPECT_THROW((void)model.unit(name), ArgumentError);
    try {
      (void)model.parameter(unit, name, {1});
      FAIL();
    } catch (const ArgumentError& error) {
      const std::string text = error.what();
      EXPECT_NE(text.find("parameter of unit \"\xc3\xbc\": expected a name in UTF-8, found \""),
                std::string::npos)
          << text;
      EXPECT_TRUE(is_utf8(text)) << text;
    }
  }
  EXPECT_EQ(model.units(), 1);
  EXPECT_EQ(model.parameters(), 1);
}

TEST(ModelTest, RefusesAWholeNameOfAnotherUnit) {
  Model model;
  (void)model.parameter(model.unit("a/b"), "c", {1});
  const UnitId a = model.unit("a");
  (void)model.parameter(a, "c", {1});
  try {
    (void)model.parameter(a, "b/c", {1});
    FAIL();
  } catch (const ArgumentError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("parameter \"a/b/c\""), std::string::npos) << text;
    EXPECT_NE(text.find("one of unit \"a/b\""), std::string::npos) << text;
  }
}

TEST(ModelTest, RefusesAShapeOfMoreElementsThan64BitsCount) {
  Model model;
  const UnitId a = model.unit("a");

  EXPECT_THROW((void)model.parameter(a, "huge", {std::int64_t{1} << 32, std::int64_t{1} << 32}),
               ArgumentError);
}

TEST(ModelTest, DescriptionsOfDifferentModelsDiffer) {
  const auto describe = [](auto&& change) {
    std::string name = "weight";
    std::vector<std::int64_t> shape{3, 5};
    ParameterOptions options;
    change(name, shape, options);
    Model model;
    const UnitId a = model.unit("a");
    (void)model.parameter(a, name, shape, options);
    return model.describe();
  };
  using Shape = std::vector<std::int64_t>;
  using Options = ParameterOptions;
  const std::vector<std::string> texts{
      describe([](std::string&, Shape&, Options&) {}),
      describe([](std::string& name, Shape&, Options&) { name = "weights"; }),
      describe([](std::string&, Shape& shape, Options&) {
        shape = {5, 3};
      }),
      describe([](std::string&, Shape& shape, Options&) { shape = {15}; }),
      describe([](std::string&, Shape&, Options& o) { o.trainable = false; }),
      describe([](std::string&, Shape&, Options& o) { o.dtype = DType::bf16; }),
      describe([](std::string&, Shape&, Options& o) { o.layout = MemoryLayout::left; }),
      describe([](std::string&, Shape&, Options& o) { o.weight_decay_factor = 1 + 1e-15; }),
      describe([](std::string&, Shape&, Options& o) { o.learning_rate_factor = 0.5; }),
      describe([](std::string&, Shape&, Options& o) { o.init = Init::normal(0.02); }),
      describe([](std::string&, Shape&, Options& o) { o.init = Init::normal(0.021); }),
      describe([](std::string&, Shape&, Options& o) { o.init = Init::uniform(0, 0.02); })};

  EXPECT_EQ(std::set<std::string>(texts.begin(), texts.end()).size(), texts.size());
}

TEST(ModelTest, DescriptionsTellTheOrderOfUnitsAndEmptyOnesApart) {
  const auto describe = [](const std::vector<std::string>& units) {
    Model model;
    for (const auto& unit : units) (void)model.unit(unit);
    return model.describe();
  };

  EXPECT_NE(describe({"a", "b"}), describe({"b", "a"}));
  EXPECT_NE(describe({"a", "b"}), describe({"a"}));
}

TEST(ModelTest, RefusesFactorsThatAreNoNumbers) {
  Model model;
  const UnitId a = model.unit("a");
  const double nan = std::nan("");

  EXPECT_THROW((void)model.parameter(a, "w", {3}, {.weight_decay_factor = nan}), ArgumentError);
  EXPECT_THROW((void)model.parameter(a, "w", {3}, {.learning_rate_factor = nan}), ArgumentError);
  EXPECT_THROW((void)model.parameter(a, "w", {3}, {.learning_rate_factor = -1}), ArgumentError);
}

TEST(ElementIndexTest, IsTheRowMajorIndexOfEveryPositionInEitherLayout) {
  const std::vector<std::int64_t> shape{3, 4, 5};

  for (std::int64_t i = 0; i < 3; ++i) {
    for (std::int64_t j = 0; j < 4; ++j) {
      for (std::int64_t k = 0; k < 5; ++k) {
        const std::int64_t row_major = (i * 4 + j) * 5 + k;
        const std::int64_t column_major = i + 3 * (j + 4 * k);
        EXPECT_EQ(element_index(shape, MemoryLayout::right, row_major), row_major);
        EXPECT_EQ(element_index(shape, MemoryLayout::left, column_major), row_major);
      }
    }
  }
  EXPECT_EQ(element_index({}, MemoryLayout::left, 0), 0);
  EXPECT_EQ(element_index({7}, MemoryLayout::left, 6), 6);
  // Position 1 of a column-major array is one row down.
  EXPECT_EQ(element_index({std::int64_t{1} << 20, std::int64_t{1} << 20}, MemoryLayout::left, 1),
            std::int64_t{1} << 20);
}

TEST(InitTest, GivesConstantsAndFunctionsAsTheyAre) {
  EXPECT_EQ(Init::zeros()(1, {2}, 3), 0);
  EXPECT_EQ(Init::ones()(1, {2}, 3), 1);
  EXPECT_EQ(Init::constant(-2.5)(1, {2}, 3), -2.5);
  EXPECT_EQ(Init::function([](std::int64_t i) { return 2.0 * static_cast<double>(i); })(1, {2}, 3),
            6);
}

TEST(InitTest, RandomValuesDependOnSeedParameterAndElementAlone) {
  const Init init = Init::normal(1);
  std::set<double> values;
  for (const std::uint64_t seed : {1ULL, 2ULL, 1ULL << 40}) {
    for (const int parameter : {0, 1, 300}) {
      for (const std::int64_t i : {std::int64_t{0}, std::int64_t{1}, std::int64_t{1} << 33}) {
        values.insert(init(seed, {parameter}, i));
        EXPECT_EQ(init(seed, {parameter}, i), init(seed, {parameter}, i));
      }
    }
  }

  EXPECT_EQ(values.size(), 27U);
}

TEST(InitTest, HasTheMomentsOfItsDistribution) {
  constexpr int n = 100'000;
  double sum = 0;
  double squares = 0;
  double fourth = 0;
  double low = 10;
  double high = -10;
  double uniform_sum = 0;
  for (int i = 0; i < n; ++i) {
    const double x = Init::normal(0.5)(3, {1}, i) / 0.5;
    sum += x;
    squares += x * x;
    fourth += x * x * x * x;
    const double u = Init::uniform(-1, 3)(3, {1}, i);
    low = std::min(low, u);
    high = std::max(high, u);
    uniform_sum += u;
  }

  // Five standard errors.
  EXPECT_NEAR(sum / n, 0, 5 / std::sqrt(n));
  EXPECT_NEAR(squares / n, 1, 5 * std::sqrt(2.0 / n));
  EXPECT_NEAR(fourth / n, 3, 5 * std::sqrt(96.0 / n));
  EXPECT_NEAR(uniform_sum / n, 1, 5 * 4 / std::sqrt(12.0 * n));
  EXPECT_GE(low, -1);
  EXPECT_LT(low, -0.99);
  EXPECT_LT(high, 3);
  EXPECT_GT(high, 2.99);
}

}  // namespace
}  // namespace mics
