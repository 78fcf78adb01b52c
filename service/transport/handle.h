// Names that nobody can guess: who has one has what it names.
#pragma once

#include <cstddef>
#include <string>

namespace structkv::transport {

inline constexpr size_t kHandleBytes = 16;

// kHandleBytes random bytes of the system's. Ends the process where it has none.
std::string NewHandle();

}  // namespace structkv::transport
