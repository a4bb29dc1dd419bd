# libhalfstep_cuda.so: the kernels of cuda/ (no torch header) and their glue in csrc/cuda.
#
# HALFSTEP_CUDA_ARCHITECTURES: "release" for every card that this toolkit and we support, "majors" to see in
# half the time that they compile (PTX of the oldest, assembled for one card each of five major versions), "native"
# for the cards present, or a list as CMAKE_CUDA_ARCHITECTURES takes it. Default: native where there is a card,
# else three generations and PTX for later ones.
set(generate_code "")
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(architectures "${HALFSTEP_CUDA_ARCHITECTURES}")
  if(NOT architectures)
    set(architectures 75-real 80-real 90)
    find_program(nvidia_smi nvidia-smi)
    if(nvidia_smi)
      execute_process(COMMAND "${nvidia_smi}" -L OUTPUT_VARIABLE cards ERROR_QUIET)
      if(cards MATCHES "GPU 0")
        set(architectures native)
      endif()
    endif()
  elseif(architectures STREQUAL "majors")
    set(architectures OFF)
    set(generate_code --generate-code=arch=compute_75,code=[compute_75,sm_75,sm_80,sm_90,sm_100,sm_120])
  elseif(architectures STREQUAL "release")
    set(architectures 75-real 80-real 86-real 89-real 90-real 100-real 120)
    execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE nvcc_version)
    if(nvcc_version MATCHES "release 12")
      list(PREPEND architectures 70-real)
    endif()
  endif()
  set(CMAKE_CUDA_ARCHITECTURES ${architectures})
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
# The CUDA runtime is torch's own at run time, so the major versions must agree.
file(STRINGS "${TORCH_DIR}/lib/libc10_cuda.so" torch_runtime REGEX "^libcudart\\.so\\.[0-9]+$" LIMIT_COUNT 1)
string(REGEX REPLACE ".*\\." "" torch_cuda_major "${torch_runtime}")
if(torch_cuda_major AND NOT torch_cuda_major EQUAL CUDAToolkit_VERSION_MAJOR)
  message(FATAL_ERROR "halfstep: nvcc is CUDA ${CUDAToolkit_VERSION} but torch is built for CUDA ${torch_cuda_major}; "
                      "install that toolkit, or pass -DHALFSTEP_CUDA=OFF")
endif()
set(CMAKE_CUDA_STANDARD 20)
set(cuda_sources csrc/cuda/common.cpp csrc/cuda/cublaslt.cpp csrc/ops/check.cpp csrc/ops/linear_check.cpp csrc/ops/gather.cpp cuda/table.cu)
foreach(family IN LISTS HALFSTEP_FAMILIES)
  foreach(source csrc/cuda/${family}.cpp cuda/${family}.cu)
    if(EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/${source}")
      list(APPEND cuda_sources ${source})
    endif()
  endforeach()
endforeach()
add_library(halfstep_cuda SHARED ${cuda_sources})
target_compile_options(
  halfstep_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${generate_code} -O3 -fmad=false --expt-relaxed-constexpr --Werror all-warnings
                        -Xcompiler=-fvisibility=hidden,-ffp-contract=off,-Wall,-Wextra>)
target_precompile_headers(halfstep_cuda PRIVATE <ATen/core/Tensor.h> <ATen/ops/empty.h> <torch/library.h> <array>
                          <string> <vector>)
target_include_directories(halfstep_cuda SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
target_link_libraries(halfstep_cuda PRIVATE halfstep_flags halfstep halfstep_torch_cuda CUDA::cudart)
set_target_properties(
  halfstep_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Shared BUILD_RPATH "${TORCH_DIR}/lib"
                           INSTALL_RPATH "$ORIGIN:$ORIGIN/../../torch/lib:$ORIGIN/../../nvidia/cu13/lib")
