# Peak memory of the server while prompts stream through it.
add_executable(structkv_peak_memory_bench memory_stream.cc peak_memory.cc)
target_link_libraries(structkv_peak_memory_bench PRIVATE
  structkv_options structkv_client structkv_testkit CLI11::CLI11 nlohmann_json::nlohmann_json)
target_compile_definitions(structkv_peak_memory_bench PRIVATE
  STRUCTKV_SERVER="$<TARGET_FILE:structkv-server>")
add_dependencies(structkv_peak_memory_bench structkv-server)
