# Streams and round trips over real sockets, beside a bare gRPC service in the same run.
if(TARGET structkv_wire)
  add_library(structkv_wire_bench_bare STATIC wire_bare.cc wire_bare.h)
  target_link_libraries(structkv_wire_bench_bare
    PUBLIC structkv_options PkgConfig::GRPCPP)
endif()
if(TARGET structkv-server AND TARGET structkv_wire AND TARGET structkv_kernels)
  add_executable(structkv_wire_bench
    wire_arithmetic.cc wire_bench.cc wire_peer.cc wire_round_trip.cc wire_stream.cc)
  target_link_libraries(structkv_wire_bench PRIVATE
    structkv_wire_bench_bare structkv_wire structkv_kernels structkv_testkit CLI11::CLI11
    nlohmann_json::nlohmann_json absl::strings)
  target_compile_definitions(structkv_wire_bench PRIVATE
    STRUCTKV_SERVER="$<TARGET_FILE:structkv-server>")
  add_dependencies(structkv_wire_bench structkv-server)
endif()
