// Regions for tests of the registry: descriptors of files of the test's own.
#pragma once

#include <unistd.h>

#include <memory>

#include "service/transport/region_registry.h"
#include "tests/testing/shared_region.h"

namespace structkv::transport {

inline FileDescriptor Copy(const testkit::SharedFile& file) {
  return FileDescriptor(dup(file.fd()));
}

inline NewRegion Wanted(const testkit::SharedFile& file, bool writable = true) {
  return {.size_bytes = file.size(),
          .writable = writable,
          .tenant = "name:a",
          .owner = "a test",
          .connection = 1};
}

}  // namespace structkv::transport
