# structkv_test(NAME SOURCES a.cc ... LIBS x ... [LABELS l ...] [TIMEOUT s])
# A GoogleTest program registered with CTest as one test. The label "thread" has it run under the thread
# sanitizer too.
function(structkv_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;LIBS;LABELS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE structkv_options ${ARG_LIBS} GTest::gmock GTest::gtest_main)
  target_compile_definitions(${name} PRIVATE
    STRUCTKV_TEST_DATA="${PROJECT_SOURCE_DIR}/tests/data")
  if("thread" IN_LIST ARG_LABELS)
    add_dependencies(thread_tests ${name})
  endif()
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS "${ARG_LABELS}")
endfunction()
