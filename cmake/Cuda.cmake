# STRUCTKV_CUDA: whether the CUDA kernels are built. AUTO takes them where nvcc is found. Sets STRUCTKV_HAVE_CUDA, and
# STRUCTKV_HAVE_CUDA_HEADERS where the runtime's headers are there: then the backend's host side and its tests on a fake
# runtime are built too, under sanitizers as well.
set(STRUCTKV_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO (where nvcc is found), ON, OFF")
set_property(CACHE STRUCTKV_CUDA PROPERTY STRINGS AUTO ON OFF)
set(STRUCTKV_HAVE_CUDA OFF)
set(STRUCTKV_HAVE_CUDA_HEADERS OFF)
if(NOT STRUCTKV_CUDA STREQUAL "OFF")
  find_package(CUDAToolkit QUIET)
  if(CUDAToolkit_FOUND)
    set(STRUCTKV_HAVE_CUDA_HEADERS ON)
    add_library(structkv_cuda_headers INTERFACE)
    target_include_directories(structkv_cuda_headers SYSTEM INTERFACE ${CUDAToolkit_INCLUDE_DIRS})
  endif()
endif()
# nvcc knows none of the sanitizers' flags; the tests run the kernels' code on the host under them.
if(STRUCTKV_CUDA STREQUAL "OFF" OR (STRUCTKV_CUDA STREQUAL "AUTO" AND STRUCTKV_SANITIZE))
  return()
endif()

# Machine code for A100 (and the rest of 8.x), H100/H200 and B100/B200. What is newer compiles the last one's PTX
# at its first start; nothing older is supported.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 100)
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(STRUCTKV_CUDA STREQUAL "ON")
    message(FATAL_ERROR "STRUCTKV_CUDA is ON, but there is no nvcc on the PATH (or in CUDACXX)")
  endif()
  message(STATUS "CUDA kernels: not built, no nvcc")
  return()
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(STRUCTKV_HAVE_CUDA ON)
message(STATUS "CUDA kernels: nvcc ${CMAKE_CUDA_COMPILER_VERSION}, ${CMAKE_CUDA_ARCHITECTURES}")

# CMake 3.25 does not know that nvcc has C++20.
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
# ptxas fails the build where a kernel's registers spill, or an array is indexed at run time and so lies in local
# memory.
set(STRUCTKV_CUDA_FLAGS -Werror=all-warnings
  -Xptxas=--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error)
