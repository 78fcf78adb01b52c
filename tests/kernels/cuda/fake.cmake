# The CUDA backend's host side on a runtime without a GPU; needs CUDA's headers alone. Objects, so that what they define
# comes before what libraries do: the list of backends, the launchers, the runtime.
add_library(structkv_cuda_fake OBJECT
  cuda/fake_backend.cc cuda/fake_backends.cc cuda/fake_launch.cc cuda/fake_runtime.cc)
target_link_libraries(structkv_cuda_fake
  PUBLIC structkv_cuda_emulation structkv_cuda_backend
  PRIVATE structkv_options)

structkv_test(kernels_cuda_arena_test SOURCES cuda/arena_test.cc LIBS structkv_cuda_backend
  structkv_kernels_tools LABELS thread)

# The conformance suite. An emulated block takes its time, so the longest rows are left to GPUs.
structkv_test(kernels_cuda_conformance_test
  SOURCES paged_conformance_test.cc rotation_conformance_test.cc saliency_conformance_test.cc
          saliency_fp8_conformance_test.cc selection_conformance_test.cc
  LIBS structkv_cuda_fake
  TIMEOUT 1200)
structkv_test(kernels_cuda_backend_test SOURCES cuda/cuda_backend_test.cc LIBS structkv_cuda_fake)
