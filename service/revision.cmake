# Writes OUT, a header with the revision of SOURCE, where that is another one than OUT has.
#   cmake -D SOURCE=... -D OUT=... [-D REVISION=...] -P revision.cmake
if(NOT REVISION)
  execute_process(COMMAND git -C ${SOURCE} rev-parse --short=12 HEAD
    OUTPUT_VARIABLE REVISION OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  if(failed)
    set(REVISION unknown)
  else()
    execute_process(COMMAND git -C ${SOURCE} status --porcelain --untracked-files=no
      OUTPUT_VARIABLE changes ERROR_QUIET)
    if(changes)
      string(APPEND REVISION "+")
    endif()
  endif()
endif()
file(CONFIGURE OUTPUT ${OUT} CONTENT
  "#pragma once\n\ninline constexpr char kRevision[] = \"@REVISION@\";\n" @ONLY)
