# What an outside project sees: include/, lib/, share/cmake/halfstep.
include(CMakePackageConfigHelpers)
install(TARGETS halfstep EXPORT halfstepTargets LIBRARY DESTINATION lib)
if(TARGET halfstep_cuda)
  install(TARGETS halfstep_cuda LIBRARY DESTINATION lib)
endif()
install(DIRECTORY csrc/include/halfstep DESTINATION include)
install(EXPORT halfstepTargets NAMESPACE halfstep:: DESTINATION share/cmake/halfstep)
configure_package_config_file(cmake/halfstepConfig.cmake.in
                              "${CMAKE_CURRENT_BINARY_DIR}/halfstepConfig.cmake"
                              INSTALL_DESTINATION share/cmake/halfstep)
write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/halfstepConfigVersion.cmake"
                                 COMPATIBILITY SameMajorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/halfstepConfig.cmake"
              "${CMAKE_CURRENT_BINARY_DIR}/halfstepConfigVersion.cmake"
        DESTINATION share/cmake/halfstep)
# A program that only looks ops up by name would lose the library to --as-needed.
target_link_options(halfstep INTERFACE "LINKER:--no-as-needed")
