// Copies of a byte of tensors, beside the times of a row.
#pragma once

#include <string>
#include <vector>

#include "nlohmann/json.hpp"
#include "tests/bench/copy_count.h"

namespace structkv::bench {

// Of a row: bytes that both processes copied (from memory to memory, into sockets and out of them)
// and bytes that they sent through sockets, over bytes of tensors both ways.
inline constexpr char kCopiesKey[] = "copies_per_byte";
inline constexpr char kSocketKey[] = "socket_bytes_per_byte";

void AddCopies(const Copies& copies, double tensor_bytes, nlohmann::json* row);
// "-" where the row has none.
std::string CopiesText(const nlohmann::json& row, const char* key);

// Runs `command`, a program that prints such a report as this one as JSON, as one that counts
// (copy_counting.cc), with the servers that it starts, and adds its rows' copies to those of
// `report`. Ends the program where it fails.
void AddCountedCopies(const std::vector<std::string>& command, nlohmann::json* report);

}  // namespace structkv::bench
