# The CUDA backend's host side on a runtime without a GPU; needs CUDA's headers alone. Objects, so that what they define
# comes before what libraries do: the list of backends, the launchers, the runtime.
add_library(structkv_cuda_fake OBJECT
  cuda/fake_api.cc cuda/fake_backend.cc cuda/fake_backends.cc cuda/fake_driver.cc cuda/fake_events.cc cuda/fake_ipc.cc
  cuda/fake_launch.cc cuda/fake_runtime.cc cuda/on_device.cc)
target_link_libraries(structkv_cuda_fake
  PUBLIC structkv_cuda_emulation structkv_cuda_backend
  PRIVATE structkv_options)
# The client library finds the driver's functions in the program itself.
target_link_options(structkv_cuda_fake INTERFACE -rdynamic)

# The same for a program that loads CUDA's driver as a library: Python's tests. Its own functions call one another, whatever
# else the program has loaded.
add_library(fake_cuda SHARED
  cuda/fake_api.cc cuda/fake_driver.cc cuda/fake_events.cc cuda/fake_ipc.cc cuda/fake_library.cc cuda/fake_runtime.cc)
target_link_libraries(fake_cuda PRIVATE structkv_options structkv_cuda_backend)
target_link_options(fake_cuda PRIVATE -Wl,-Bsymbolic)
set_target_properties(fake_cuda PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CMAKE_RUNTIME_OUTPUT_DIRECTORY})

structkv_test(kernels_cuda_arena_test SOURCES cuda/arena_test.cc
  LIBS structkv_cuda_backend structkv_kernels_tools LABELS thread)
structkv_test(kernels_cuda_backend_test SOURCES cuda/cuda_backend_test.cc cuda/device_vectors_test.cc cuda/fake_runtime_test.cc
  LIBS structkv_cuda_fake)
structkv_test(kernels_cuda_staged_test SOURCES cuda/staged_test.cc LIBS structkv_cuda_fake)
structkv_test(kernels_cuda_host_pinning_test SOURCES cuda/host_pinning_test.cc LIBS structkv_cuda_fake structkv_engine)
structkv_test(kernels_cuda_overlap_test SOURCES cuda/overlap_test.cc ../gpu/overlap_bench.cc
  LIBS structkv_cuda_fake structkv_engine absl::str_format nlohmann_json::nlohmann_json)
structkv_test(kernels_cuda_ipc_test SOURCES cuda/ipc_exporter.cc cuda/ipc_test.cc LIBS structkv_cuda_fake)
structkv_test(kernels_cuda_layer_pass_test SOURCES layer_pass_test.cc LIBS structkv_cuda_fake)

# The conformance suite. Emulated blocks take their time: shapes that are long, or wide under many heads, and some pairs of
# types and layouts are left to gpu_conformance_test; pinned keys, keys on a device and sanitizers get fewer still.
set(left_out "*n6001*" "*n2501*" "*n131_d576*" "*n245_d576*" "*n263_d576*" "*n487*" "*Paged*n64_d64*"
  "*/SaliencyTest*_f16_token*" "*/SaliencyTest*_bf16_head*" "*PagedSaliency*_f16_*" "*PagedSaliency*_f32_f32*"
  "*CopiesToTheByte*cuda_device" "*KeepsTheBest*cuda_device" "*SumsFor*cuda_device" "*TiesGo*cuda_device"
  "*HugeScores*cuda_device*" "*cuda_device*n479*"
  "*Fp8*cuda_pinned*" "*Input*cuda_pinned*" "*PagedSaliency*cuda_pinned*" "*CopiesToTheByte*cuda_pinned*" "*DoesNot*cuda_pinned*" "*NeedsNo*cuda_pinned*")
if(STRUCTKV_SANITIZE)
  list(APPEND left_out "*cuda_pinned*" "*cuda_device*" "*_f32_*" "*_bf16_*" "*n479*" "*n1000*" "*n64_d64*" "*n251*" "*n260*" "*SumsFor*"
    "*KeepsTheBest*" "*CopiesToTheByte*" "*ManyRows*")
endif()
list(JOIN left_out ":" left_out)
structkv_test(kernels_cuda_saliency_conformance_test
  SOURCES paged_conformance_test.cc saliency_conformance_test.cc saliency_fp8_conformance_test.cc
  LIBS structkv_cuda_fake FILTER "-${left_out}:*Gather*" TIMEOUT 1200)
structkv_test(kernels_cuda_rows_conformance_test
  SOURCES paged_conformance_test.cc rotation_conformance_test.cc selection_conformance_test.cc
  LIBS structkv_cuda_fake FILTER "-${left_out}:*Saliency*" TIMEOUT 1200)
