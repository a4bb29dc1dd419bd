# Imported targets for libtorch, made by hand: find_package(Torch) stops when no CUDA toolkit is
# installed, takes architectures that the toolkit no longer knows, and edits CMAKE_CUDA_FLAGS.
#   halfstep_torch_cpu   headers, libtorch_cpu, libc10          (all that libhalfstep needs)
#   halfstep_torch_cuda  the same and libtorch_cuda, libc10_cuda (only where they exist)
# TORCH_DIR may name a libtorch directory or site-packages/torch; otherwise Python is asked.
if(NOT TORCH_DIR)
  find_package(Python COMPONENTS Interpreter REQUIRED)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed ERROR_QUIET)
  if(failed)
    message(FATAL_ERROR "halfstep: ${Python_EXECUTABLE} has no torch; install torch >= 2.11 "
                        "or pass -DTORCH_DIR=<libtorch directory>")
  endif()
endif()
if(NOT EXISTS "${TORCH_DIR}/include/torch/headeronly/version.h")
  message(FATAL_ERROR "halfstep: TORCH_DIR=${TORCH_DIR} holds no include/torch/headeronly/version.h")
endif()
file(STRINGS "${TORCH_DIR}/include/torch/headeronly/version.h" torch_version_lines
     REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
string(REGEX REPLACE ".*MAJOR ([0-9]+).*MINOR ([0-9]+).*PATCH ([0-9]+).*" "\\1.\\2.\\3"
                     HALFSTEP_TORCH_VERSION "${torch_version_lines}")
if(HALFSTEP_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "halfstep needs torch >= 2.11, ${TORCH_DIR} is ${HALFSTEP_TORCH_VERSION}")
endif()

function(halfstep_import name)
  add_library(${name} SHARED IMPORTED GLOBAL)
  set_target_properties(${name} PROPERTIES IMPORTED_LOCATION "${TORCH_DIR}/lib/lib${ARGV1}.so")
endfunction()
if(NOT TARGET halfstep_torch_cpu)
  halfstep_import(halfstep_c10 c10)
  halfstep_import(halfstep_libtorch_cpu torch_cpu)
  add_library(halfstep_torch_cpu INTERFACE IMPORTED GLOBAL)
  target_include_directories(
    halfstep_torch_cpu SYSTEM
    INTERFACE "${TORCH_DIR}/include" "${TORCH_DIR}/include/torch/csrc/api/include")
  target_link_libraries(halfstep_torch_cpu INTERFACE halfstep_libtorch_cpu halfstep_c10)
  if(EXISTS "${TORCH_DIR}/lib/libc10_cuda.so")
    halfstep_import(halfstep_c10_cuda c10_cuda)
    halfstep_import(halfstep_libtorch_cuda torch_cuda)
    add_library(halfstep_torch_cuda INTERFACE IMPORTED GLOBAL)
    target_link_libraries(halfstep_torch_cuda INTERFACE halfstep_libtorch_cuda halfstep_c10_cuda
                                                        halfstep_torch_cpu)
  endif()
endif()
