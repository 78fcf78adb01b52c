// Names of options, in their three spellings, and what somebody may have meant by one that is none.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace structkv {

// "memory-budget" -> "STRUCTKV_MEMORY_BUDGET".
std::string EnvironmentName(const std::string& name);

// Whether the option of that name may change while the server runs.
bool MayChange(std::string_view name);

// "unknown flag '--treads'; did you mean '--threads'?" for the first argument that looks like a
// flag and is none of `known`; `otherwise` where there is none.
std::string UnknownFlag(int argc, const char* const* argv, const std::string& otherwise,
                        const std::vector<std::string>& known);

// The same for a variable STRUCTKV_... of the environment; empty where there is none. What
// Kubernetes makes for a Service, and what others than the server read, is left alone.
std::string UnknownInEnvironment(const std::vector<std::string>& known);

}  // namespace structkv
