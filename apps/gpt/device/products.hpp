// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gpt/device/views.hpp>
#include <gpt/gemm.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace gpt::device {

/// What a product does with its sums before it stores them. `vector` has an element for each column
/// of the result, but for bias_gradient, and `auxiliary` has the result's shape.
enum class Epilogue : std::uint8_t {
  none,
  bias,           ///< adds vector
  gelu,           ///< adds vector, stores that in auxiliary, and its GELU as result
  gelu_backward,  ///< result = sums * gelu'(auxiliary); vector = its column sums
  bias_gradient,  ///< vector = sums over the depth of op(A): one for each row of the result
};

/// A kind of product: D = op(A) op(B) + beta C on row-major bf16 matrices, with sums in fp32.
/// op(A) is (rows, depth), op(B) is (depth, columns). Leading dimensions in elements; 0: dense.
struct Product {
  int rows = 0;
  int columns = 0;
  int depth = 0;
  Transpose transpose_a = Transpose::no;
  Transpose transpose_b = Transpose::no;
  Epilogue epilogue = Epilogue::none;
  bool add = false;  ///< beta = 1
  float factor = 1;  ///< of the product
  int leading_a = 0, leading_b = 0, leading_d = 0;
  int batch = 1;  ///< independent products, `stride` elements from one to the next
  std::int64_t stride_a = 0, stride_b = 0, stride_d = 0;

  friend bool operator==(const Product&, const Product&) = default;
};

struct ProductArguments {
  const bf16* a = nullptr;
  const bf16* b = nullptr;
  bf16* d = nullptr;
  const bf16* c = nullptr;          ///< what is added; null: d itself
  const void* vector = nullptr;     ///< written where the epilogue says so
  const void* auxiliary = nullptr;  ///< written where the epilogue says so
};

/// Matrix products by cuBLASLt, which fuses what follows them. The algorithm of each kind of
/// product is chosen when it is first run and kept.
class Products {
 public:
  /// Bytes of the workspace that products share: NVIDIA's advice for this generation.
  static constexpr std::size_t workspace_bytes = 32U << 20;

  /// \param[in] workspace  device memory of workspace_bytes
  explicit Products(void* workspace);
  ~Products();
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

  /// Ordered on exec; does not block. A result without elements is fine. Extents and leading
  /// dimensions are multiples of 8 elements but for numbers of rows of activations.
  /// \throws std::runtime_error if cuBLASLt has no algorithm for the product
  void run(const Exec& exec, const Product& product, const ProductArguments& arguments);

  /// Times up to `candidates` algorithms of a product on these arguments, which lose their
  /// contents, and keeps the fastest. Blocks; for the start.
  void tune(const Exec& exec, const Product& product, const ProductArguments& arguments,
            int candidates = 8);

 private:
  struct Plan;
  Plan& plan(const Product& product);
  static void point(Plan& plan, const ProductArguments& arguments);

  void* handle_ = nullptr;
  void* workspace_ = nullptr;
  std::vector<std::unique_ptr<Plan>> plans_;  // a model has about 20
};

}  // namespace gpt::device
