// SPDX-License-Identifier: Apache-2.0
#include <gpt/device/check.hpp>
#include <gpt/device/products.hpp>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace gpt::device {

namespace {

cublasLtEpilogue_t vendor_epilogue(Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::none:
      return CUBLASLT_EPILOGUE_DEFAULT;
    case Epilogue::bias:
      return CUBLASLT_EPILOGUE_BIAS;
    case Epilogue::gelu:
      return CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    case Epilogue::gelu_backward:
      return CUBLASLT_EPILOGUE_DGELU_BGRAD;
    case Epilogue::bias_gradient:
      return CUBLASLT_EPILOGUE_BGRADB;
  }
  return CUBLASLT_EPILOGUE_DEFAULT;
}

constexpr int most_candidates = 16;
// cuBLASLt wants its workspace at a multiple of so many bytes, which memory of a view need not be.
constexpr std::size_t workspace_alignment = 256;
constexpr std::size_t usable_bytes = Products::workspace_bytes - workspace_alignment;

// cuBLASLt's own type has no name, which nvcc does not take in containers.
struct Algorithm {
  cublasLtMatmulAlgo_t value{};
};

bool uses_auxiliary(Epilogue epilogue) {
  return epilogue == Epilogue::gelu || epilogue == Epilogue::gelu_backward;
}

std::string text(const Product& p) {
  return "product " + std::to_string(p.rows) + " x " + std::to_string(p.columns) + " x " +
         std::to_string(p.depth) + ", epilogue " + std::to_string(static_cast<int>(p.epilogue));
}

template <class Value>
void set(cublasLtMatmulDesc_t descriptor, cublasLtMatmulDescAttributes_t attribute,
         const Value& value) {
  check(cublasLtMatmulDescSetAttribute(descriptor, attribute, &value, sizeof(value)),
        "cublasLtMatmulDescSetAttribute");
}

cublasLtMatrixLayout_t make_layout(int rows, int columns, int leading, int batch,
                                   std::int64_t stride) {
  cublasLtMatrixLayout_t layout = nullptr;
  check(cublasLtMatrixLayoutCreate(&layout, CUDA_R_16BF, static_cast<std::uint64_t>(rows),
                                   static_cast<std::uint64_t>(columns), leading),
        "cublasLtMatrixLayoutCreate");
  if (batch > 1) {
    check(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch,
                                           sizeof(batch)),
          "cublasLtMatrixLayoutSetAttribute batch");
    check(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                           &stride, sizeof(stride)),
          "cublasLtMatrixLayoutSetAttribute stride");
  }
  return layout;
}

}  // namespace

// cuBLASLt's matrices are column-major: what it sees are the transposed ones, D^T = op(B)^T
// op(A)^T, so that our B comes first.
struct Products::Plan {
  explicit Plan(const Product& p) : product(p) {
    check(cublasLtMatmulDescCreate(&descriptor, CUBLAS_COMPUTE_32F, CUDA_R_32F),
          "cublasLtMatmulDescCreate");
    const bool turn_a = p.transpose_a == Transpose::yes;
    const bool turn_b = p.transpose_b == Transpose::yes;
    set(descriptor, CUBLASLT_MATMUL_DESC_TRANSA, turn_b ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(descriptor, CUBLASLT_MATMUL_DESC_TRANSB, turn_a ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(descriptor, CUBLASLT_MATMUL_DESC_EPILOGUE, vendor_epilogue(p.epilogue));
    const auto leading = [](int given, int dense) { return given > 0 ? given : dense; };
    const int width_a = turn_a ? p.rows : p.depth;
    const int width_b = turn_b ? p.depth : p.columns;
    a = make_layout(width_a, turn_a ? p.depth : p.rows, leading(p.leading_a, width_a), p.batch,
                    p.stride_a);
    b = make_layout(width_b, turn_b ? p.columns : p.depth, leading(p.leading_b, width_b), p.batch,
                    p.stride_b);
    const int leading_d = leading(p.leading_d, p.columns);
    d = make_layout(p.columns, p.rows, leading_d, p.batch, p.stride_d);
    if (uses_auxiliary(p.epilogue)) {
      set(descriptor, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, std::int64_t{leading_d});
    }
  }
  ~Plan() {
    cublasLtMatrixLayoutDestroy(d);
    cublasLtMatrixLayoutDestroy(b);
    cublasLtMatrixLayoutDestroy(a);
    cublasLtMatmulDescDestroy(descriptor);
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  [[nodiscard]] std::vector<Algorithm> candidates(cublasLtHandle_t handle, int most) const {
    cublasLtMatmulPreference_t preference = nullptr;
    check(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)),
            "cublasLtMatmulPreferenceSetAttribute");
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, std::uint64_t{usable_bytes});
    // What tensor cores load at once; views of parts of a buffer begin at no more.
    const std::uint32_t alignment = 16;
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment);
    cublasLtMatmulHeuristicResult_t found[most_candidates];
    int count = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        handle, descriptor, b, a, d, d, preference, std::min(most, most_candidates), found, &count);
    cublasLtMatmulPreferenceDestroy(preference);
    if (status != CUBLAS_STATUS_SUCCESS || count == 0) {
      throw std::runtime_error("gpt::device::Products: " + text(product) +
                               ": expected an algorithm of cuBLASLt, found " +
                               cublasLtGetStatusString(status));
    }
    std::vector<Algorithm> result;
    for (int i = 0; i < count; ++i) result.push_back({found[i].algo});
    return result;
  }

  void launch(cublasLtHandle_t handle, void* workspace, cudaStream_t stream,
              const Algorithm& choice, const ProductArguments& x) const {
    const float beta = product.add ? 1.0F : 0.0F;
    const cublasStatus_t status = cublasLtMatmul(handle, descriptor, &product.factor, x.b, b, x.a,
                                                 a, &beta, x.c == nullptr ? x.d : x.c, d, x.d, d,
                                                 &choice.value, workspace, usable_bytes, stream);
    if (status != CUBLAS_STATUS_SUCCESS) {
      throw std::runtime_error("gpt::device::Products: " + text(product) +
                               ": expected success of cublasLtMatmul, found " +
                               cublasLtGetStatusString(status));
    }
  }

  Product product;
  cublasLtMatmulDesc_t descriptor = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
  Algorithm algorithm;
  bool chosen = false;
};

Products::Products(void* workspace) {
  const auto address = std::bit_cast<std::uintptr_t>(workspace);
  const std::size_t misaligned = address % workspace_alignment;
  workspace_ = static_cast<std::byte*>(workspace) +
               (misaligned == 0 ? 0 : workspace_alignment - misaligned);
  cublasLtHandle_t handle = nullptr;
  check(cublasLtCreate(&handle), "cublasLtCreate");
  handle_ = handle;
}

Products::~Products() {
  plans_.clear();
  cublasLtDestroy(static_cast<cublasLtHandle_t>(handle_));
}

Products::Plan& Products::plan(const Product& product) {
  for (const auto& plan : plans_) {
    if (plan->product == product) return *plan;
  }
  return *plans_.emplace_back(std::make_unique<Plan>(product));
}

void Products::point(Plan& plan, const ProductArguments& arguments) {
  const Epilogue epilogue = plan.product.epilogue;
  if (epilogue == Epilogue::none) return;
  set(plan.descriptor, CUBLASLT_MATMUL_DESC_BIAS_POINTER, arguments.vector);
  if (uses_auxiliary(epilogue)) {
    set(plan.descriptor, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, arguments.auxiliary);
  }
}

void Products::run(const Exec& exec, const Product& product, const ProductArguments& arguments) {
  if (product.rows == 0 || product.columns == 0 || product.depth == 0) return;
  Plan& plan = this->plan(product);
  point(plan, arguments);
  const auto handle = static_cast<cublasLtHandle_t>(handle_);
  if (!plan.chosen) {
    plan.algorithm = plan.candidates(handle, 1).front();
    plan.chosen = true;
  }
  plan.launch(handle, workspace_, exec.cuda_stream(), plan.algorithm, arguments);
}

void Products::tune(const Exec& exec, const Product& product, const ProductArguments& arguments,
                    int candidates) {
  if (product.rows == 0 || product.columns == 0 || product.depth == 0) return;
  constexpr int repetitions = 5;
  Plan& plan = this->plan(product);
  point(plan, arguments);
  const auto handle = static_cast<cublasLtHandle_t>(handle_);
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  const cudaStream_t stream = exec.cuda_stream();
  float best = 0;
  for (const auto& candidate : plan.candidates(handle, candidates)) {
    plan.launch(handle, workspace_, stream, candidate, arguments);
    check(cudaEventRecord(begin, stream), "cudaEventRecord");
    for (int i = 0; i < repetitions; ++i) {
      plan.launch(handle, workspace_, stream, candidate, arguments);
    }
    check(cudaEventRecord(end, stream), "cudaEventRecord");
    check(cudaEventSynchronize(end), "a product");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
    if (plan.chosen && milliseconds >= best) continue;
    best = milliseconds;
    plan.algorithm = candidate;
    plan.chosen = true;
  }
  cudaEventDestroy(end);
  cudaEventDestroy(begin);
}

}  // namespace gpt::device
