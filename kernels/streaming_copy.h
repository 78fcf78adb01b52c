// Copies that leave the caches to others.
#pragma once

#include <cstddef>

namespace structkv {

// As memcpy, for bytes that are read later, if at all: long runs are written past the caches, which
// spares reading what is overwritten. Other threads may miss them until FinishStreamingCopies().
void StreamingCopy(std::byte* to, const std::byte* from, size_t size);

// After the last of this thread's streaming copies, and before anything that tells another thread
// of them: no lock orders them by itself.
void FinishStreamingCopies();

}  // namespace structkv
