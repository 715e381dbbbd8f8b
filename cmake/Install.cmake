# What `cmake --install` and CPack put under a prefix besides libthimble (src/api): one folder, lib/thimble, with the command,
# the plugin, the profiles of this project and a llama.cpp, and a link to the command in bin/. Its parts find each other by
# where they lie, so the folder may be moved, and the wheel (scripts/make-wheel) holds a copy of it.
set(home lib/thimble)
list(TRANSFORM THIMBLE_APIS PREPEND ggml-thimble-api OUTPUT_VARIABLE plugins)
set_target_properties(thimble ggml-thimble ${plugins} PROPERTIES INSTALL_RPATH "$ORIGIN")
install(TARGETS thimble RUNTIME DESTINATION ${home} COMPONENT programs)
install(TARGETS ggml-thimble ${plugins} LIBRARY DESTINATION ${home} COMPONENT programs)
install(DIRECTORY ${CMAKE_SOURCE_DIR}/profiles DESTINATION ${home} COMPONENT programs FILES_MATCHING PATTERN *.gguf)
install(DIRECTORY ${CMAKE_SOURCE_DIR}/texts DESTINATION ${home} COMPONENT programs)
install(FILES ${CMAKE_SOURCE_DIR}/LICENSE DESTINATION ${home} COMPONENT programs)
# Which builds of llama.cpp it was run in.
install(FILES ${CMAKE_SOURCE_DIR}/docs/results/hosts.md DESTINATION ${home} COMPONENT programs)
install(FILES ${THIMBLE_LLAMA_CPP_SOURCE}/LICENSE DESTINATION ${home} RENAME LICENSE.llama.cpp COMPONENT programs)
if(IS_DIRECTORY ${THIMBLE_LLAMA_CPP_SOURCE}/licenses)  # of what llama.cpp has inside
  install(DIRECTORY ${THIMBLE_LLAMA_CPP_SOURCE}/licenses DESTINATION ${home} COMPONENT programs)
endif()
configure_file(cmake/install_llama_cpp.cmake.in install_llama_cpp.cmake @ONLY)
install(SCRIPT ${CMAKE_BINARY_DIR}/install_llama_cpp.cmake COMPONENT programs)

set(CPACK_PACKAGE_NAME thimble)
set(CPACK_PACKAGE_CONTACT "the Thimble project")
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "A coded KV cache for llama.cpp: a ggml backend plugin and its programs")
set(CPACK_RESOURCE_FILE_LICENSE ${CMAKE_SOURCE_DIR}/LICENSE)
set(CPACK_GENERATOR DEB TGZ)
set(CPACK_STRIP_FILES ON)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
include(CPack)
