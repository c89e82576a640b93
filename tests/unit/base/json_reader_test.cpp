// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/base/json_reader.hpp>

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

namespace mics {
namespace {

using Strings = std::vector<std::string>;

std::string refusal(const std::function<void()>& action) {
  try {
    action();
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "nothing was refused";
}

std::string refusal_of(const std::string& text, const Strings& overrides = {}) {
  return refusal([&] { static_cast<void>(JsonReader::parse(text, "deck.json", overrides)); });
}

TEST(JsonReaderTest, ReadsEveryTypeWithComments) {
  auto json = JsonReader::parse(R"({ // a deck
    "n": 24.0, "big": 5e8, "x": 0.5, "yes": true, "word": "auto", /* list */ "list": [1, 2.5],
    "names": ["a", "b"], "name": "c", "inner": {"y": -3}, "nothing": null })",
                                "deck.json");

  EXPECT_EQ(json.integer("n"), 24);
  EXPECT_EQ(json.integer("big"), 500'000'000);
  EXPECT_EQ(json.number("x"), 0.5);
  EXPECT_TRUE(json.boolean("yes"));
  EXPECT_TRUE(json.is_auto("word"));
  EXPECT_EQ(json.numbers("list"), (std::vector<double>{1, 2.5}));
  EXPECT_EQ(json.texts("names"), (Strings{"a", "b"}));
  EXPECT_EQ(json.texts("name"), (Strings{"c"}));
  EXPECT_FALSE(json.has("nothing"));
  auto inner = json.object("inner");
  EXPECT_EQ(inner.integer("y"), -3);
  EXPECT_EQ(inner.where("y"), "deck.json: inner.y");
  inner.finish();
  json.finish();
}

TEST(JsonReaderTest, TakesFallbacksForWhatIsMissing) {
  auto json = JsonReader::parse("{}", "deck.json");

  EXPECT_EQ(json.integer("n", 3), 3);
  EXPECT_EQ(json.number("x", 0.25), 0.25);
  EXPECT_EQ(json.text("word", "w"), "w");
  EXPECT_TRUE(json.texts("names").empty());
  EXPECT_EQ(json.object("inner").integer("y", 9), 9);
}

TEST(JsonReaderTest, TextIsUtf8ToItsEnd) {
  const std::string long_text(100, 'x');
  const Strings words{"a=\xEF\xBF\xBD", "b=" + long_text + "\xFF"};
  auto json = JsonReader::parse("{}", "deck.json", words);

  EXPECT_EQ(json.text("a"), "\xEF\xBF\xBD");
  EXPECT_NE(
      refusal([&] { static_cast<void>(json.text("b")); }).find("deck.json: b: expected text in"),
      std::string::npos);
}

TEST(JsonReaderTest, NamesFileAndKeyOfAWrongType) {
  auto json = JsonReader::parse(R"({"a": {"n": "six", "m": 2.5, "x": [1], "b": 1}})", "deck.json");
  auto a = json.object("a");

  EXPECT_NE(refusal([&] {
              static_cast<void>(a.integer("n"));
            }).find("deck.json: a.n: expected an integer, found \"six\""),
            std::string::npos);
  EXPECT_NE(refusal([&] { static_cast<void>(a.integer("m")); }).find("found 2.5"),
            std::string::npos);
  EXPECT_NE(refusal([&] { static_cast<void>(a.number("x")); }).find("expected a finite number"),
            std::string::npos);
  EXPECT_NE(refusal([&] { static_cast<void>(a.boolean("b")); }).find("expected true or false"),
            std::string::npos);
  EXPECT_NE(refusal([&] { static_cast<void>(a.object("b")); }).find("expected an object"),
            std::string::npos);
  EXPECT_NE(refusal([&] { static_cast<void>(a.text("missing")); }).find("found nothing"),
            std::string::npos);
  EXPECT_NE(refusal([&] {
              static_cast<void>(a.integer("b", {}, 2, 4));
            }).find("at least 2 and at most 4, found 1"),
            std::string::npos);
}

TEST(JsonReaderTest, SuggestsTheKeyThatWasMeant) {
  auto json = JsonReader::parse(R"({"slotts": 2})", "deck.json");
  static_cast<void>(json.integer("slots", 2));
  static_cast<void>(json.integer("seed", 2));

  const std::string line = refusal([&] { json.finish(); });

  EXPECT_NE(line.find("deck.json: slotts"), std::string::npos) << line;
  EXPECT_NE(line.find("did you mean \"slots\"?"), std::string::npos) << line;
}

TEST(JsonReaderTest, SuggestsNothingForAWordThatIsFarFromAll) {
  auto json = JsonReader::parse(R"({"zebra": 2})", "deck.json");
  static_cast<void>(json.integer("slots", 2));

  EXPECT_EQ(refusal([&] { json.finish(); }).find("did you mean"), std::string::npos);
}

TEST(JsonReaderTest, GivesTheLineOfASyntaxError) {
  EXPECT_NE(refusal_of("{\n  \"a\": 1,\n  \"b\" 2\n}").find("deck.json:3: expected valid JSON"),
            std::string::npos);
  EXPECT_NE(refusal_of("").find("deck.json:1"), std::string::npos);
  EXPECT_NE(refusal_of("[1]").find("expected a JSON object, found [1]"), std::string::npos);
}

TEST(JsonReaderTest, RefusesDuplicateKeysAtAnyDepth) {
  EXPECT_NE(refusal_of(R"({"a": 1, "a": 2})").find("two values of \"a\""), std::string::npos);
  EXPECT_NE(refusal_of(R"({"o": {"b": 1, "c": {}, "b": 2}})").find("two values of \"b\""),
            std::string::npos);
  EXPECT_EQ(refusal_of(R"({"o": {"b": 1}, "p": {"b": 1}})"), "nothing was refused");
}

TEST(JsonReaderTest, RefusesNumbersThatAreNotFinite) {
  EXPECT_NE(refusal_of(R"({"a": 1e999})").find("deck.json"), std::string::npos);
  EXPECT_NE(refusal_of(R"({"a": NaN})").find("deck.json:1"), std::string::npos);
  auto json = JsonReader::parse("{}", "deck.json", Strings{"lr=nan"});
  EXPECT_NE(refusal([&] { static_cast<void>(json.number("lr")); }).find("found \"nan\""),
            std::string::npos);
}

TEST(JsonReaderTest, AppliesOverridesInOrder) {
  auto json = JsonReader::parse(R"({"a": {"b": 1}})", "deck.json",
                                Strings{"a.b=2", "a.c.d=true", "a.b=3", "e=word", "f=[1,2]"});

  auto a = json.object("a");
  EXPECT_EQ(a.integer("b"), 3);
  EXPECT_TRUE(a.object("c").boolean("d"));
  EXPECT_EQ(json.text("e"), "word");
  EXPECT_EQ(json.numbers("f").size(), 2U);
}

TEST(JsonReaderTest, RefusesOverridesWithoutAPlace) {
  EXPECT_NE(refusal_of("{}", {"a.b"}).find("expected key.inner=value"), std::string::npos);
  EXPECT_NE(refusal_of("{}", {"=3"}).find("expected key.inner=value"), std::string::npos);
  EXPECT_NE(refusal_of(R"({"a": 1})", {"a.b=2"}).find("expected an object to hold \"a.b\""),
            std::string::npos);
}

TEST(JsonReaderTest, ListsKeysAndShowsValues) {
  auto json = JsonReader::parse(
      R"({"b": 1, "a": {"x": [1, 2]}, "c": null, "long": ")" + std::string(100, 'x') + "\"}",
      "deck.json");

  EXPECT_EQ(json.keys(), (Strings{"a", "b", "c", "long"}));
  EXPECT_TRUE(json.is_object("a"));
  EXPECT_FALSE(json.is_object("b"));
  EXPECT_FALSE(json.is_object("missing"));
  EXPECT_EQ(json.shown("a"), R"({"x":[1,2]})");
  EXPECT_EQ(json.shown("c"), "null");
  EXPECT_EQ(json.shown("missing"), "null");
  EXPECT_EQ(json.shown("long").size(), 63U) << "cut";
  EXPECT_EQ(json.unknown_keys(), (Strings{"c", "long"})) << "is_object asks, the others do not";
  EXPECT_EQ(json.remedy_for("mising"), "did you mean \"missing\"?");
}

TEST(JsonReaderTest, CutsNoCharacterInTwo) {
  std::string text;
  for (int i = 0; i < 40; ++i) text += "\u20ac";
  auto json = JsonReader::parse("{\"a\": \"" + text + "\"}", "deck.json");

  EXPECT_EQ(json.shown("a"), '"' + text.substr(0, 57) + "...");
}

TEST(JsonReaderTest, RefusesMoreThan64Levels) {
  const auto nested = [](std::size_t levels) {
    return "{\"a\": " + std::string(levels, '[') + std::string(levels, ']') + "}";
  };
  const auto value = [&](std::size_t levels) {
    return Strings{"a=" + std::string(levels, '[') + std::string(levels, ']')};
  };
  std::string path = "a";
  for (int i = 0; i < 100; ++i) path += ".a";

  EXPECT_EQ(refusal_of(nested(60)), "nothing was refused");
  EXPECT_NE(refusal_of(nested(100'000)).find("at most 64 levels"), std::string::npos);
  EXPECT_EQ(refusal_of("{}", value(60)), "nothing was refused");
  EXPECT_NE(refusal_of("{}", value(100'000)).find("at most 64 levels"), std::string::npos);
  EXPECT_NE(refusal_of("{}", {path + "=1"}).find("at most 64 levels"), std::string::npos);
}

TEST(JsonReaderTest, RefusesAZeroByteWhereverItStands) {
  EXPECT_NE(
      refusal_of(std::string("{}\n\0{", 5)).find("deck.json:2: expected valid JSON, found a zero"),
      std::string::npos);
}

TEST(JsonReaderTest, RefusesDuplicateKeysOfAnOverride) {
  EXPECT_NE(refusal_of("{}", {R"(a={"b": 1, "b": 2})"}).find("two values of \"b\""),
            std::string::npos);
}

TEST(JsonReaderTest, KeysPrintOnOneShortLine) {
  auto json = JsonReader::parse(R"({"a\nb": 1})", "deck.json");
  EXPECT_EQ(json.where("a\nb"), "deck.json: a\\nb");
  EXPECT_LT(json.where(std::string(100'000, 'x')).size(), 100U);

  auto large = JsonReader::parse("{\"" + std::string(1'000'000, 'x') + "\": 1}", "deck.json");
  static_cast<void>(large.has("slots"));
  EXPECT_LT(refusal([&] { large.finish(); }).size(), 400U);
}

TEST(JsonReaderTest, RefusesAFileThatIsMissingOrEmpty) {
  const std::string line =
      refusal([] { static_cast<void>(JsonReader::parse_file("/nonexistent/deck.json")); });

  EXPECT_NE(line.find("/nonexistent/deck.json: expected a file that can be read"),
            std::string::npos)
      << line;
}

}  // namespace
}  // namespace mics
