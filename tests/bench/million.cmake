# Prompts of a million tokens, and the cost of a token by the prompt's length.
add_executable(structkv_million_bench
  long_prompt_check.cc memory_stream.cc million.cc server_process.cc)
target_link_libraries(structkv_million_bench PRIVATE
  structkv_options structkv_client structkv_kernels structkv_testkit CLI11::CLI11
  nlohmann_json::nlohmann_json)
target_compile_definitions(structkv_million_bench PRIVATE
  STRUCTKV_SERVER="$<TARGET_FILE:structkv-server>")
add_dependencies(structkv_million_bench structkv-server)
