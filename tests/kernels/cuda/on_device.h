// A CUDA backend whose callers' tensors lie in the host's memory, made to find them in a GPU's.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace structkv::testing {

// Every call's queries, keys, rows and destinations are copied to memory of GPU 0, at the alignment
// that they have, and `real` gets these; what it writes is copied back. Fails the test where a copy
// does.
std::unique_ptr<Backend> OnDevice(std::unique_ptr<Backend> real);

}  // namespace structkv::testing
