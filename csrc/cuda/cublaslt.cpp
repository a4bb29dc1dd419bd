#include "cublaslt.h"

#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <map>

namespace halfstep::cuda {

namespace {

cudaDataType_t data_type(Dtype dtype) { return dtype == Dtype::kF16 ? CUDA_R_16F : CUDA_R_16BF; }

cublasLtEpilogue_t epilogue_of(Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::kRelu:
      return CUBLASLT_EPILOGUE_RELU;
    case Epilogue::kReluBias:
      return CUBLASLT_EPILOGUE_RELU_BIAS;
    case Epilogue::kReluAux:
      return CUBLASLT_EPILOGUE_RELU_AUX;
    case Epilogue::kReluAuxBias:
      return CUBLASLT_EPILOGUE_RELU_AUX_BIAS;
    case Epilogue::kGelu:
      return CUBLASLT_EPILOGUE_GELU;
    case Epilogue::kGeluBias:
      return CUBLASLT_EPILOGUE_GELU_BIAS;
    case Epilogue::kGeluAux:
      return CUBLASLT_EPILOGUE_GELU_AUX;
    case Epilogue::kGeluAuxBias:
      return CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    default:
      return CUBLASLT_EPILOGUE_BGRADB;
  }
}

#define HALFSTEP_LT_FUNCTIONS(each)                                                        \
  each(Create) each(MatmulDescCreate) each(MatmulDescDestroy) each(MatmulDescSetAttribute) \
      each(MatrixLayoutCreate) each(MatrixLayoutDestroy) each(MatmulPreferenceCreate)      \
          each(MatmulPreferenceDestroy) each(MatmulPreferenceSetAttribute)                 \
              each(MatmulAlgoGetHeuristic) each(Matmul)

/// The functions, from the library that torch brings: nothing here is linked against it, and a
/// process without it computes unfused.
struct Functions {
#define HALFSTEP_LT(name) decltype(&::cublasLt##name) name = nullptr;
  HALFSTEP_LT_FUNCTIONS(HALFSTEP_LT)
#undef HALFSTEP_LT

  bool load() {
    const std::string name = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
    void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) return false;
    bool all = true;
    const auto find = [&](auto& function, const char* symbol) {
      function =
          reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, symbol));
      all = all && function;
    };
#define HALFSTEP_LT(name) find(name, "cublasLt" #name);
    HALFSTEP_LT_FUNCTIONS(HALFSTEP_LT)
#undef HALFSTEP_LT
    return all;
  }
};

class CublasLt : public Lt {
 public:
  bool load() { return functions_.load(); }

  Handle create_product(const Problem& p) override {
    cublasLtMatmulDesc_t product = nullptr;
    if (functions_.MatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F) !=
        CUBLAS_STATUS_SUCCESS)
      return nullptr;
    const auto turned = [](int32_t yes) { return yes ? CUBLAS_OP_T : CUBLAS_OP_N; };
    bool good = set(product, CUBLASLT_MATMUL_DESC_TRANSA, turned(p.transposes_a)) &&
                set(product, CUBLASLT_MATMUL_DESC_TRANSB, turned(p.transposes_b)) &&
                set(product, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue_of(p.epilogue));
    // The heuristics take the alignment of what these point at from their values, which they do not
    // follow; each call sets its own, aligned to 16 bytes.
    void* const aligned = reinterpret_cast<void*>(uintptr_t(16));
    good = good && set(product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, aligned);
    if (p.aux_stride > 0)
      good = good && set(product, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, p.aux_stride) &&
             set(product, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aligned);
    if (good) return product;
    destroy_product(product);
    return nullptr;
  }
  void destroy_product(Handle product) override {
    functions_.MatmulDescDestroy(static_cast<cublasLtMatmulDesc_t>(product));
  }
  Handle create_layout(Dtype dtype, int64_t rows, int64_t columns, int64_t stride) override {
    cublasLtMatrixLayout_t layout = nullptr;
    const auto status = functions_.MatrixLayoutCreate(&layout, data_type(dtype), uint64_t(rows),
                                                      uint64_t(columns), stride);
    return status == CUBLAS_STATUS_SUCCESS ? layout : nullptr;
  }
  void destroy_layout(Handle layout) override {
    functions_.MatrixLayoutDestroy(static_cast<cublasLtMatrixLayout_t>(layout));
  }

  std::vector<Algorithm> algorithms(const Operands& o, const Problem& problem,
                                    int64_t most_workspace, int count) override {
    const cublasLtHandle_t handle = handle_of(problem.device);
    cublasLtMatmulPreference_t preference = nullptr;
    if (!handle || functions_.MatmulPreferenceCreate(&preference) != CUBLAS_STATUS_SUCCESS)
      return {};
    const auto prefer = [&](auto attribute, auto value) {
      functions_.MatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value));
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(most_workspace));
    for (const auto attribute :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
      prefer(attribute, uint32_t(problem.alignment));
    std::vector<cublasLtMatmulHeuristicResult_t> results(size_t(count),
                                                         cublasLtMatmulHeuristicResult_t{});
    int found = 0;
    const auto status =
        functions_.MatmulAlgoGetHeuristic(handle, product(o), layout(o.a), layout(o.b), layout(o.d),
                                          layout(o.d), preference, count, results.data(), &found);
    functions_.MatmulPreferenceDestroy(preference);
    std::vector<Algorithm> all;
    for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < found; ++i) {
      const auto& result = results[size_t(i)];
      if (result.state != CUBLAS_STATUS_SUCCESS) continue;
      Algorithm algorithm;
      static_assert(sizeof(algorithm.opaque) == sizeof(result.algo));
      std::memcpy(&algorithm.opaque, &result.algo, sizeof(result.algo));
      algorithm.workspace = int64_t(result.workspaceSize);
      all.push_back(algorithm);
    }
    return all;
  }

  bool multiply(const Operands& o, const Problem& problem, const Pointers& pointers,
                const Algorithm& algorithm, void* workspace, Stream stream) override {
    const cublasLtHandle_t handle = handle_of(problem.device);
    if (!handle) return false;
    if (pointers.bias &&
        !set(product(o), CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<void*>(pointers.bias)))
      return false;
    if (pointers.aux && !set(product(o), CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
                             static_cast<void*>(pointers.aux)))
      return false;
    cublasLtMatmulAlgo_t chosen;
    std::memcpy(&chosen, &algorithm.opaque, sizeof(chosen));
    const float one = 1, zero = 0;
    const auto status =
        functions_.Matmul(handle, product(o), &one, pointers.a, layout(o.a), pointers.b,
                          layout(o.b), &zero, pointers.d, layout(o.d), pointers.d, layout(o.d),
                          &chosen, workspace, size_t(algorithm.workspace), stream);
    return status == CUBLAS_STATUS_SUCCESS;
  }

 private:
  static cublasLtMatmulDesc_t product(const Operands& o) {
    return static_cast<cublasLtMatmulDesc_t>(o.product);
  }
  static cublasLtMatrixLayout_t layout(Handle handle) {
    return static_cast<cublasLtMatrixLayout_t>(handle);
  }
  template <class T>
  bool set(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t attribute, const T& value) {
    return functions_.MatmulDescSetAttribute(product, attribute, &value, sizeof(value)) ==
           CUBLAS_STATUS_SUCCESS;
  }
  /// The device is current; a handle lives as long as the process. Called under the lock of Plans.
  cublasLtHandle_t handle_of(int32_t device) {
    cublasLtHandle_t& handle = handles_[device];
    if (!handle && functions_.Create(&handle) != CUBLAS_STATUS_SUCCESS) handle = nullptr;
    return handle;
  }

  Functions functions_;
  std::map<int32_t, cublasLtHandle_t> handles_;
};

/// A CUDA event with a time.
class Event {
 public:
  Event() { check("linear", Status(cudaEventCreateWithFlags(&event_, cudaEventDefault))); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(Stream stream) { check("linear", Status(cudaEventRecord(event_, stream))); }
  double milliseconds_since(const Event& start) const {
    cudaError_t status = cudaErrorNotReady;
    while (status == cudaErrorNotReady) status = cudaEventQuery(event_);
    check("linear", Status(status));
    float time = 0;
    check("linear", Status(cudaEventElapsedTime(&time, start.event_, event_)));
    return time;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace

Lt* cublaslt() {
  // Never destroyed: at exit the driver may be gone before.
  static CublasLt* const lt = [] {
    auto* made = new CublasLt;
    if (made->load()) return made;
    delete made;
    return static_cast<CublasLt*>(nullptr);
  }();
  return lt;
}

Stopwatch stopwatch(Stream stream) {
  return [stream](const std::function<void()>& work) {
    // Events may be asked for while another thread captures.
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    constexpr int kRuns = 5;
    work();  // loads the kernel
    Event begin, end;
    begin.record(stream);
    for (int i = 0; i < kRuns; ++i) work();
    end.record(stream);
    return end.milliseconds_since(begin) / kRuns;
  };
}

bool captures(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) != cudaSuccess ||
         status != cudaStreamCaptureStatusNone;
}

}  // namespace halfstep::cuda
