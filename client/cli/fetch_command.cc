#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "client/cli/commands.h"
#include "client/cli/compacted_file.h"
#include "client/cli/compressor.h"
#include "client/cli/shared_memory.h"
#include "client/cli/text.h"
#include "nlohmann/json.hpp"
#include "structkv/client.h"
#include "structkv/held_cache.h"

namespace structkv::cli {
namespace {

struct FetchFlags {
  std::string handle;
  std::string output;
  std::string layers;
  std::string kv_heads;
  ConnectionFlags connection;
  bool checksums = false;
  bool release = false;
  bool json = false;
};

absl::StatusOr<std::string> ParseHandle(const std::string& hex) {
  const std::string bytes = absl::HexStringToBytes(hex);
  if (hex.size() == 32 && absl::BytesToHexString(bytes) == absl::AsciiStrToLower(hex)) return bytes;
  return absl::InvalidArgumentError(
      absl::StrCat("the handle ", hex, " is not one of 32 hexadecimal digits"));
}

// "a-b" or "a"; empty: all.
absl::Status ParseRange(const char* flag, const std::string& text, uint32_t* first,
                        uint32_t* count) {
  if (text.empty()) return absl::OkStatus();
  const std::pair<std::string, std::string> ends = absl::StrSplit(text, absl::MaxSplits('-', 1));
  uint32_t last = 0;
  const bool numbers = absl::SimpleAtoi(ends.first, first) &&
                       absl::SimpleAtoi(ends.second.empty() ? ends.first : ends.second, &last);
  if (!numbers || last < *first || last - *first == UINT32_MAX) {
    return absl::InvalidArgumentError(absl::StrCat(
        flag, " is ", text, "; a number, or a first and a last one such as 0-3, is needed"));
  }
  *count = last - *first + 1;
  return absl::OkStatus();
}

absl::Duration Timeout(const ConnectionFlags& flags, absl::Duration otherwise) {
  return flags.timeout_seconds > 0 ? absl::Seconds(flags.timeout_seconds) : otherwise;
}

void Print(const FetchFlags& flags, const client::FetchedCache& fetched, absl::Duration elapsed) {
  const v1::CacheInfo& info = fetched.info;
  const double rate = static_cast<double>(info.total_bytes()) / absl::ToDoubleSeconds(elapsed);
  if (flags.json) {
    nlohmann::ordered_json json;
    json["output"] = flags.output;
    json["first_layer"] = info.first_layer();
    json["layers"] = info.layer_count();
    json["first_kv_head"] = info.kv_heads().begin();
    json["kv_heads"] = info.kv_heads().count();
    json["logical_length"] = info.logical_length();
    json["kv_length"] = info.kv_length();
    json["next_position"] = info.next_position();
    json["output_bytes"] = info.total_bytes();
    json["fingerprint"] = info.fingerprint();
    json["attempts"] = fetched.attempts;
    json["transport"] = TransportText(info.transport());
    json["transport_reason"] = info.transport_reason();
    json["seconds"] = absl::ToDoubleSeconds(elapsed);
    std::printf("%s\n", json.dump(2).c_str());
    return;
  }
  std::printf("fetched   %u of %s layers, %u of %s KV heads, %s at %s/s\n", info.layer_count(),
              CountText(info.geometry().layer_count()).c_str(), info.kv_heads().count(),
              CountText(info.geometry().kv_head_count()).c_str(),
              BytesText(info.total_bytes()).c_str(),
              BytesText(static_cast<uint64_t>(rate)).c_str());
  std::printf("transport %s%s%s\n", TransportText(info.transport()).c_str(),
              info.transport_reason().empty() ? "" : ": ", info.transport_reason().c_str());
  std::printf("output    %s, fingerprint %s\n", flags.output.c_str(), info.fingerprint().c_str());
}

absl::Status RunFetch(const FetchFlags& flags) {
  client::FetchOptions options;
  absl::StatusOr<std::string> handle = ParseHandle(flags.handle);
  if (!handle.ok()) return handle.status();
  absl::Status parsed =
      ParseRange("--layers", flags.layers, &options.first_layer, &options.layer_count);
  parsed.Update(
      ParseRange("--kv-heads", flags.kv_heads, &options.first_kv_head, &options.kv_head_count));
  if (!parsed.ok()) return parsed;
  options.checksums = flags.checksums;
  options.transport = flags.connection.transport;
  options.timeout = Timeout(flags.connection, absl::InfiniteDuration());
  options.metadata = TenantMetadata(flags.connection);
  std::unique_ptr<CompactedFile> file;
  absl::Status written;
  Progress progress("fetching");
  uint32_t answered = 0;
  uint32_t layers = 0;
  options.on_info = [&](const v1::CacheInfo& info) {
    layers = info.layer_count();
    absl::StatusOr<std::unique_ptr<CompactedFile>> created =
        CompactedFile::Create(flags.output, info);
    written = created.status();
    if (created.ok()) file = *std::move(created);
  };
  SharedMemory memory;
  options.on_layer = [&](client::LayerResult layer) {
    absl::StatusOr<client::LayerResult> on_host = ToHost(memory, std::move(layer));
    written.Update(on_host.status());
    if (written.ok()) written = file->Add(*on_host);
    progress.Update(++answered, layers, "layers");
  };
  absl::StatusOr<std::unique_ptr<client::Client>> client =
      ConnectTo(flags.connection.server, flags.connection.security);
  if (!client.ok()) return client.status();
  if (flags.connection.transport != client::TransportChoice::kInline) {
    const absl::StatusOr<v1::CacheInfo> info = (*client)->DescribeCache(*handle, options);
    if (!info.ok()) return info.status();
    absl::StatusOr<SharedMemory> made =
        MakeSharedMemory(flags.connection, client::FetchResultBytes(*info));
    if (!made.ok()) return made.status();
    memory = *std::move(made);
    options.results = memory.arena;
    options.nccl = memory.nccl;
  }
  const absl::Time start = absl::Now();
  const absl::StatusOr<client::FetchedCache> fetched = (*client)->FetchCache(*handle, options);
  progress.Clear();
  if (!fetched.ok()) return fetched.status();
  if (!written.ok()) return written;
  const absl::Duration elapsed = absl::Now() - start;
  v1::Summary lengths;
  lengths.set_logical_length(fetched->info.logical_length());
  lengths.set_kv_length(fetched->info.kv_length());
  lengths.set_next_position(fetched->info.next_position());
  if (absl::Status finished = file->Finish(lengths); !finished.ok()) return finished;
  if (flags.release) {
    client::HeldCallOptions call;
    call.metadata = options.metadata;
    if (absl::Status released = (*client)->ReleaseCache(*handle, call); !released.ok()) {
      return released;
    }
  }
  Print(flags, *fetched, elapsed);
  return absl::OkStatus();
}

absl::Status RunRelease(const FetchFlags& flags) {
  absl::StatusOr<std::string> handle = ParseHandle(flags.handle);
  if (!handle.ok()) return handle.status();
  absl::StatusOr<std::unique_ptr<client::Client>> client =
      ConnectTo(flags.connection.server, flags.connection.security);
  if (!client.ok()) return client.status();
  client::HeldCallOptions options;
  options.timeout = Timeout(flags.connection, options.timeout);
  options.metadata = TenantMetadata(flags.connection);
  return (*client)->ReleaseCache(*handle, options);
}

}  // namespace

Command AddFetch(CLI::App* app) {
  auto flags = std::make_shared<FetchFlags>();
  CLI::App* sub =
      app->add_subcommand("fetch", "Fetch a cache that `compress --hold` left in a server");
  sub->add_option("handle", flags->handle, "What `compress --hold` printed")->required();
  sub->add_option("--to", flags->output, "Compacted cache to write (safetensors)")->required();
  sub->add_option("--layers", flags->layers, "First and last layer, such as 0-15; none: all");
  sub->add_option("--kv-heads", flags->kv_heads, "First and last KV head of the model; none: all");
  sub->add_flag("--checksums", flags->checksums, "Have a checksum sent with every piece");
  sub->add_flag("--release", flags->release, "Then free it");
  sub->add_flag("--json", flags->json, "Print JSON");
  AddServerFlags(sub, &flags->connection);
  AddTransportFlag(sub, &flags->connection);
  return {sub, [flags] { return RunFetch(*flags); }};
}

Command AddRelease(CLI::App* app) {
  auto flags = std::make_shared<FetchFlags>();
  CLI::App* sub =
      app->add_subcommand("release", "Free a cache that `compress --hold` left in a server");
  sub->add_option("handle", flags->handle, "What `compress --hold` printed")->required();
  AddServerFlags(sub, &flags->connection);
  return {sub, [flags] { return RunRelease(*flags); }};
}

}  // namespace structkv::cli
