# Streams and round trips over real sockets, beside a bare gRPC service in the same run.
add_executable(structkv_wire_bench
  server_process.cc wire_arithmetic.cc wire_bare.cc wire_bench.cc wire_hold.cc wire_peer.cc wire_plan.cc wire_prompt.cc
  wire_round_trip.cc wire_stream.cc wire_transports.cc)
target_link_libraries(structkv_wire_bench PRIVATE
  structkv_options structkv_cli structkv_wire structkv_session structkv_open_decoder structkv_kernels
  structkv_testkit CLI11::CLI11
  nlohmann_json::nlohmann_json absl::strings)
target_compile_definitions(structkv_wire_bench PRIVATE
  STRUCTKV_SERVER="$<TARGET_FILE:structkv-server>")
add_dependencies(structkv_wire_bench structkv-server)
