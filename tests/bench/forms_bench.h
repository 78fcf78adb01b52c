// Forms of keys and values other than dense ones of the queries' type.
#pragma once

namespace structkv::bench {

// Registers the benchmarks Forms/... and GatherForms/..., each with its time's ratio to the dense
// form's, measured in turns.
void RegisterForms();

}  // namespace structkv::bench
