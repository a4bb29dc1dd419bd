# The pybind11 module and the libraries, placed in python/halfstep so that the source tree itself is an
# importable package (editable installs and tests use it as it stands).
find_package(Python COMPONENTS Interpreter Development.Module REQUIRED)
execute_process(COMMAND "${Python_EXECUTABLE}" -c "import pybind11; print(pybind11.get_cmake_dir())"
                OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE no_pybind11)
if(no_pybind11) # torch carries pybind11's headers, which is enough where nothing can be installed
  unset(pybind11_DIR)
  Python_add_library(halfstep_python MODULE WITH_SOABI python/bindings.cpp python/operators.cpp)
  target_include_directories(halfstep_python SYSTEM PRIVATE "${TORCH_DIR}/include")
else()
  find_package(pybind11 CONFIG REQUIRED)
  pybind11_add_module(halfstep_python MODULE python/bindings.cpp python/operators.cpp)
endif()
# torch's conversion of tensors to Python objects and back.
target_link_libraries(halfstep_python PRIVATE halfstep_flags halfstep "${TORCH_DIR}/lib/libtorch_python.so")
target_compile_definitions(
  halfstep_python PRIVATE HALFSTEP_TORCH_VERSION="${HALFSTEP_TORCH_VERSION}"
                          HALFSTEP_CUDA_REASON="${HALFSTEP_CUDA_REASON}"
                          HALFSTEP_HAVE_CUDA=$<BOOL:${HALFSTEP_HAVE_CUDA}>)
set(HALFSTEP_PACKAGE_DIR "${CMAKE_CURRENT_SOURCE_DIR}/python/halfstep" CACHE PATH
    "Where the module and the libraries are placed")
set(package "${HALFSTEP_PACKAGE_DIR}")
# Several builds may place their output in one folder (other torch, other Python): what another one left
# there would look newer than our objects and stay, so it goes.
set(owner "${CMAKE_CURRENT_BINARY_DIR} ${TORCH_DIR} ${HALFSTEP_TORCH_VERSION}")
set(previous "")
if(EXISTS "${package}/lib/.build")
  file(READ "${package}/lib/.build" previous)
endif()
if(NOT previous STREQUAL owner)
  file(GLOB stale "${package}/_C*.so")
  file(REMOVE_RECURSE ${stale} "${package}/lib")
  file(WRITE "${package}/lib/.build" "${owner}")
endif()
# Read before the libraries are loaded: with another torch they may not even load.
file(WRITE "${package}/lib/torch_version" "${HALFSTEP_TORCH_VERSION}\n")
install(FILES "${package}/lib/torch_version" DESTINATION lib)
set_target_properties(
  halfstep_python PROPERTIES OUTPUT_NAME _C LIBRARY_OUTPUT_DIRECTORY "${package}"
                             BUILD_RPATH "$ORIGIN/lib;${TORCH_DIR}/lib" BUILD_RPATH_USE_ORIGIN ON
                             INSTALL_RPATH "$ORIGIN/lib:$ORIGIN/../torch/lib")
install(TARGETS halfstep_python LIBRARY DESTINATION .)
set_target_properties(halfstep PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${package}/lib")
if(TARGET halfstep_cuda)
  set_target_properties(halfstep_cuda PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${package}/lib")
else()
  file(REMOVE "${package}/lib/libhalfstep_cuda.so") # of a build with HALFSTEP_CUDA; it would be loaded
endif()
# Built in place, the package also shows C++ users its headers and its CMake files.
if(package STREQUAL "${CMAKE_CURRENT_SOURCE_DIR}/python/halfstep")
  set(CMAKE_INSTALL_MESSAGE NEVER)
  file(CREATE_LINK ../../csrc/include "${package}/include" SYMBOLIC)
  add_custom_command(
    OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/cmake_files.stamp"
    COMMAND "${CMAKE_COMMAND}" --install "${CMAKE_CURRENT_BINARY_DIR}" --prefix "${package}" --component cmake
    COMMAND "${CMAKE_COMMAND}" -E touch "${CMAKE_CURRENT_BINARY_DIR}/cmake_files.stamp"
    DEPENDS "${CMAKE_CURRENT_LIST_DIR}/HalfstepInstall.cmake" "${CMAKE_CURRENT_LIST_DIR}/halfstepConfig.cmake.in"
            "${package}/lib/.build"
    VERBATIM)
  add_custom_target(halfstep_cmake_files ALL DEPENDS "${CMAKE_CURRENT_BINARY_DIR}/cmake_files.stamp")
endif()
