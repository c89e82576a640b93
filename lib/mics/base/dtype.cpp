// SPDX-License-Identifier: Apache-2.0
#include <mics/base/dtype.hpp>

#include <array>

namespace mics {

std::string_view name(DType dtype) {
  switch (dtype) {
    case DType::fp64:
      return "fp64";
    case DType::fp32:
      return "fp32";
    case DType::bf16:
      return "bf16";
    case DType::fp16:
      return "fp16";
  }
  return "?";
}

DType parse_dtype(std::string_view word, std::string_view object) {
  struct Entry {
    std::string_view word;
    DType dtype;
  };
  static constexpr std::array<Entry, 12> known{{{"fp64", DType::fp64},
                                                {"float64", DType::fp64},
                                                {"double", DType::fp64},
                                                {"fp32", DType::fp32},
                                                {"float32", DType::fp32},
                                                {"float", DType::fp32},
                                                {"bf16", DType::bf16},
                                                {"bfloat16", DType::bf16},
                                                {"bfp16", DType::bf16},
                                                {"fp16", DType::fp16},
                                                {"float16", DType::fp16},
                                                {"half", DType::fp16}}};
  for (const Entry& entry : known) {
    if (entry.word == word) return entry.dtype;
  }
  raise<ConfigError>({.object = std::string(object),
                      .expected = "fp64, fp32, bf16 or fp16",
                      .found = in_quotes(word)});
}

}  // namespace mics
