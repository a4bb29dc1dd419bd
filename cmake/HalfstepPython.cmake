# The pybind11 module and the libraries, placed in python/halfstep so that the source tree itself is an
# importable package (editable installs and tests use it as it stands).
find_package(Python COMPONENTS Interpreter Development.Module REQUIRED)
execute_process(COMMAND "${Python_EXECUTABLE}" -c "import pybind11; print(pybind11.get_cmake_dir())"
                OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE)
find_package(pybind11 CONFIG REQUIRED)
pybind11_add_module(halfstep_python MODULE python/bindings.cpp)
target_link_libraries(halfstep_python PRIVATE halfstep_flags halfstep)
target_compile_definitions(
  halfstep_python PRIVATE HALFSTEP_TORCH_VERSION="${HALFSTEP_TORCH_VERSION}"
                          HALFSTEP_CUDA_REASON="${HALFSTEP_CUDA_REASON}"
                          HALFSTEP_HAVE_CUDA=$<BOOL:${HALFSTEP_HAVE_CUDA}>)
set(HALFSTEP_PACKAGE_DIR "${CMAKE_CURRENT_SOURCE_DIR}/python/halfstep" CACHE PATH
    "Where the module and the libraries are placed")
set(package "${HALFSTEP_PACKAGE_DIR}")
set_target_properties(
  halfstep_python PROPERTIES OUTPUT_NAME _C LIBRARY_OUTPUT_DIRECTORY "${package}"
                             BUILD_RPATH "$ORIGIN/lib;${TORCH_DIR}/lib" BUILD_RPATH_USE_ORIGIN ON
                             INSTALL_RPATH "$ORIGIN/lib:$ORIGIN/../torch/lib")
set_target_properties(halfstep PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${package}/lib")
if(TARGET halfstep_cuda)
  set_target_properties(halfstep_cuda PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${package}/lib")
endif()
