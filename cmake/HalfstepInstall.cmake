# What an outside project sees: include/, lib/, share/cmake/halfstep.
include(CMakePackageConfigHelpers)
# Beside the wheel's torch the libraries find it by themselves; elsewhere the path is written down.
set(halfstep_torch_fallback "")
if(NOT HALFSTEP_RELOCATABLE)
  set(halfstep_torch_fallback "${TORCH_DIR}")
endif()
install(TARGETS halfstep EXPORT halfstepTargets LIBRARY DESTINATION lib)
foreach(library halfstep halfstep_cuda)
  if(TARGET ${library} AND NOT HALFSTEP_RELOCATABLE)
    set_property(TARGET ${library} APPEND PROPERTY INSTALL_RPATH "${TORCH_DIR}/lib")
  endif()
endforeach()
if(TARGET halfstep_cuda)
  install(TARGETS halfstep_cuda LIBRARY DESTINATION lib)
endif()
install(DIRECTORY csrc/include/halfstep DESTINATION include)
install(EXPORT halfstepTargets NAMESPACE halfstep:: DESTINATION share/cmake/halfstep COMPONENT cmake)
configure_package_config_file(cmake/halfstepConfig.cmake.in
                              "${CMAKE_CURRENT_BINARY_DIR}/halfstepConfig.cmake"
                              INSTALL_DESTINATION share/cmake/halfstep)
write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/halfstepConfigVersion.cmake"
                                 COMPATIBILITY SameMajorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/halfstepConfig.cmake"
              "${CMAKE_CURRENT_BINARY_DIR}/halfstepConfigVersion.cmake"
        DESTINATION share/cmake/halfstep COMPONENT cmake)
# A program that only looks ops up by name would lose the library to --as-needed.
target_link_options(halfstep INTERFACE "LINKER:--no-as-needed")
# libtorch.so is what brings torch's CUDA side into a program; the installed package links it too.
target_link_libraries(halfstep INTERFACE "$<BUILD_INTERFACE:${TORCH_DIR}/lib/libtorch.so>")
