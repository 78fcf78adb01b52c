# Streams and round trips over real sockets, beside a bare gRPC service in the same run.
add_library(structkv_wire_bench_parts STATIC
  copy_count.cc server_process.cc wire_arithmetic.cc wire_bare.cc wire_copies.cc wire_gpu.cc wire_hold.cc wire_nccl.cc
  wire_peer.cc wire_plan.cc wire_prompt.cc wire_round_trip.cc wire_route.cc wire_servers.cc wire_stream.cc wire_transports.cc)
target_link_libraries(structkv_wire_bench_parts
  PUBLIC structkv_cli structkv_wire structkv_session structkv_open_decoder structkv_kernels structkv_nccl structkv_testkit
         CLI11::CLI11 nlohmann_json::nlohmann_json absl::strings
  PRIVATE structkv_options)
function(structkv_wire_program name)
  add_executable(${name} wire_bench.cc ${ARGN})
  target_link_libraries(${name} PRIVATE structkv_options structkv_wire_bench_parts)
endfunction()

structkv_wire_program(structkv_wire_bench)
target_compile_definitions(structkv_wire_bench PRIVATE STRUCTKV_SERVER="$<TARGET_FILE:structkv-server>")
add_dependencies(structkv_wire_bench structkv-server)

# The same and its server, counting what they copy. Sanitizers stand in for the functions that do.
if(NOT STRUCTKV_SANITIZE AND CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64")
  add_library(structkv_copy_counting OBJECT copy_count.cc copy_counting.cc)
  set_source_files_properties(copy_counting.cc PROPERTIES COMPILE_OPTIONS "-fno-builtin")
  target_link_libraries(structkv_copy_counting PRIVATE structkv_options)
  get_target_property(server_libraries structkv-server LINK_LIBRARIES)
  add_executable(structkv_counting_server ${PROJECT_SOURCE_DIR}/service/main.cc)
  target_compile_definitions(structkv_counting_server PRIVATE STRUCTKV_VERSION="${PROJECT_VERSION}")
  target_link_libraries(structkv_counting_server PRIVATE structkv_copy_counting ${server_libraries})
  structkv_wire_program(structkv_wire_count)
  target_compile_definitions(structkv_wire_count PRIVATE STRUCTKV_SERVER="$<TARGET_FILE:structkv_counting_server>")
  target_link_libraries(structkv_wire_count PRIVATE structkv_copy_counting)
  target_compile_definitions(structkv_wire_bench PRIVATE
    STRUCTKV_WIRE_COUNT="$<TARGET_FILE:structkv_wire_count>"
    STRUCTKV_COUNTING_SERVER="$<TARGET_FILE:structkv_counting_server>")
  add_dependencies(structkv_wire_bench structkv_wire_count structkv_counting_server)
endif()

structkv_test(wire_bench_test SOURCES wire_bench_test.cc LIBS structkv_testkit nlohmann_json::nlohmann_json)
target_compile_definitions(wire_bench_test PRIVATE
  STRUCTKV_WIRE_BENCH="$<TARGET_FILE:structkv_wire_bench>" $<$<TARGET_EXISTS:structkv_wire_count>:STRUCTKV_COUNTS_COPIES>)
add_dependencies(wire_bench_test structkv_wire_bench)
if(STRUCTKV_HAVE_CUDA_HEADERS)
  structkv_wire_program(structkv_gpu_wire_bench ${PROJECT_SOURCE_DIR}/tests/cli/gpu_command.cc)
  target_compile_definitions(structkv_gpu_wire_bench PRIVATE STRUCTKV_SERVER="$<TARGET_FILE:structkv-server>")
  target_link_libraries(structkv_gpu_wire_bench PRIVATE structkv_cuda_fake structkv_fake_nccl GTest::gtest)
  target_compile_definitions(wire_bench_test PRIVATE
    STRUCTKV_GPU_WIRE_BENCH="$<TARGET_FILE:structkv_gpu_wire_bench>" STRUCTKV_GPU_SERVER="$<TARGET_FILE:structkv_gpu_server>"
    STRUCTKV_FAKE_NCCL="$<TARGET_FILE:fake_nccl>")
  add_dependencies(wire_bench_test structkv_gpu_wire_bench structkv_gpu_server fake_nccl)
endif()
