// The oracle: every operation in plain scalar double precision, written to be read.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace structkv::reference {

// Never null. Runs on the calling thread; `ParallelFor` arguments are not used.
std::unique_ptr<Backend> CreateReferenceBackend();

}  // namespace structkv::reference
