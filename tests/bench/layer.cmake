# One layer through the engine; pytorch_compare.py runs it beside PyTorch.
add_executable(structkv_layer_bench bench_data.cc layer_bench.cc)
target_link_libraries(structkv_layer_bench PRIVATE
  structkv_options structkv_engine structkv_kernels CLI11::CLI11 nlohmann_json::nlohmann_json)
