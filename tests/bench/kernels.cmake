# The CPU backend beside its floors: the arithmetic peak, memcpy, nth_element.
add_executable(structkv_kernels_bench
  arithmetic_peak.cc arithmetic_peak_bf16.cc bench_data.cc bench_threads.cc forms_bench.cc
  kernels_bench.cc)
target_link_libraries(structkv_kernels_bench PRIVATE
  structkv_options structkv_engine structkv_kernels benchmark::benchmark PkgConfig::HWY)
structkv_cpu_target_options(arithmetic_peak.cc arithmetic_peak_bf16.cc)
