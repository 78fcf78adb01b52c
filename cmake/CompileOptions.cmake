# Flags that every target of the project gets through structkv_options.
add_library(structkv_options INTERFACE)
target_include_directories(structkv_options INTERFACE ${PROJECT_SOURCE_DIR})
# Not for nvcc, which has its own (cmake/Cuda.cmake).
target_compile_options(structkv_options INTERFACE $<$<COMPILE_LANGUAGE:C,CXX>:
  -Wall -Wextra -Wshadow -Wnon-virtual-dtor -Woverloaded-virtual -Wno-missing-field-initializers>)
option(STRUCTKV_WERROR "Treat warnings as errors" ON)
if(STRUCTKV_WERROR)
  target_compile_options(structkv_options INTERFACE $<$<COMPILE_LANGUAGE:C,CXX>:-Werror>)
endif()

# Lines and functions for backtraces, without variables: those would be four fifths of a build's 9 GB. The preset dev has them.
add_compile_options($<$<AND:$<CONFIG:RelWithDebInfo>,$<COMPILE_LANGUAGE:C,CXX>>:-g1>)

if(STRUCTKV_SANITIZE)
  add_compile_options(-fsanitize=${STRUCTKV_SANITIZE} -fno-omit-frame-pointer
    -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${STRUCTKV_SANITIZE})
  # The thread sanitizer knows no fences. Asio's own are beside its locks, which order the same.
  if(STRUCTKV_SANITIZE MATCHES "thread")
    add_compile_definitions(BOOST_ASIO_DISABLE_FENCED_BLOCK)
  endif()
endif()

find_program(CCACHE ccache)
if(CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
endif()
