# libhalfstep_cuda.so: the kernels of cuda/ (no torch header) and their glue in csrc/cuda.
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 90)
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_CUDA_STANDARD 20)
set(cuda_sources "")
foreach(family IN LISTS HALFSTEP_FAMILIES)
  foreach(source csrc/cuda/${family}.cpp cuda/${family}.cu)
    if(EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/${source}")
      list(APPEND cuda_sources ${source})
    endif()
  endforeach()
endforeach()
file(GLOB cuda_common RELATIVE "${CMAKE_CURRENT_SOURCE_DIR}" CONFIGURE_DEPENDS csrc/cuda/common*.cpp
                                                                               csrc/cuda/table*.cpp)
add_library(halfstep_cuda SHARED ${cuda_sources} ${cuda_common})
target_compile_options(
  halfstep_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-fmad=false --expt-relaxed-constexpr
                        -Xcompiler=-fvisibility=hidden,-ffp-contract=off>)
target_include_directories(halfstep_cuda SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
target_link_libraries(halfstep_cuda PRIVATE halfstep_flags halfstep halfstep_torch_cuda CUDA::cudart)
set_target_properties(
  halfstep_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Shared BUILD_RPATH "${TORCH_DIR}/lib"
                           INSTALL_RPATH "$ORIGIN:$ORIGIN/../../torch/lib:$ORIGIN/../../nvidia/cu13/lib")
