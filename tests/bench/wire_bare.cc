#include "tests/bench/wire_bare.h"

#include <malloc.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <optional>
#include <string_view>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "grpcpp/generic/async_generic_service.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "grpcpp/support/byte_buffer.h"
#include "tests/bench/wire_arithmetic.h"
#include "tests/bench/wire_peer.h"

namespace structkv::bench {
namespace {

// Echoes, or answers with a fixed message. Messages that wait to be written are bounded.
class BareReactor : public grpc::ServerGenericBidiReactor {
 public:
  // Null: the request is sent back.
  BareReactor(const grpc::ByteBuffer* answer, uint32_t arithmetic_tokens) {
    if (answer != nullptr) answer_ = *answer;
    fixed_ = answer != nullptr;
    if (arithmetic_tokens > 0) arithmetic_.emplace(arithmetic_tokens);
    StartRead(&incoming_);
  }

  void OnReadDone(bool ok) override {
    const std::lock_guard lock(mutex_);
    if (!ok) {
      ended_ = true;
      if (queue_.empty()) FinishOnce();
      return;
    }
    if (arithmetic_.has_value()) arithmetic_->Run();
    queue_.push_back(fixed_ ? answer_ : std::move(incoming_));
    incoming_.Clear();
    if (queue_.size() == 1) StartWrite(&queue_.front());
    reading_ = queue_.size() < kMaxQueued;
    if (reading_) StartRead(&incoming_);
  }

  void OnWriteDone(bool ok) override {
    const std::lock_guard lock(mutex_);
    queue_.pop_front();
    if (!ok) {
      ended_ = true;
      queue_.clear();
    }
    if (!queue_.empty()) StartWrite(&queue_.front());
    if (!ended_ && !reading_) {
      reading_ = true;
      StartRead(&incoming_);
    }
    if (ended_ && queue_.empty()) FinishOnce();
  }

  void OnDone() override { delete this; }

 private:
  static constexpr size_t kMaxQueued = 8;

  void FinishOnce() {
    if (!finished_) Finish(grpc::Status::OK);
    finished_ = true;
  }

  std::mutex mutex_;
  grpc::ByteBuffer incoming_;
  grpc::ByteBuffer answer_;
  std::optional<LayerArithmetic> arithmetic_;
  std::deque<grpc::ByteBuffer> queue_;
  bool fixed_ = false;
  bool reading_ = true;
  bool ended_ = false;
  bool finished_ = false;
};

class BareService : public grpc::CallbackGenericService {
 public:
  grpc::ServerGenericBidiReactor* CreateReactor(
      grpc::GenericCallbackServerContext* context) override {
    const auto arithmetic_tokens = static_cast<uint32_t>(Number(*context, kArithmeticTokensKey));
    if (context->method() != kAnswerMethod) return new BareReactor(nullptr, arithmetic_tokens);
    const grpc::Slice slice(std::string(Number(*context, kAnswerBytesKey), 'a'));
    const grpc::ByteBuffer answer(&slice, 1);
    return new BareReactor(&answer, arithmetic_tokens);
  }

 private:
  static uint64_t Number(const grpc::GenericCallbackServerContext& context, const char* key) {
    const auto it = context.client_metadata().find(key);
    if (it == context.client_metadata().end()) return 0;
    return std::strtoull(std::string(it->second.data(), it->second.size()).c_str(), nullptr, 10);
  }
};

}  // namespace

void KeepFreedMemory() {
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
}

int ServeBare(const std::string& addresses) {
  BareService service;
  grpc::ServerBuilder builder;
  const std::vector<std::string> names = absl::StrSplit(addresses, ',');
  std::vector<int> ports(names.size());
  for (size_t i = 0; i < names.size(); ++i) {
    builder.AddListeningPort(names[i], grpc::InsecureServerCredentials(), &ports[i]);
  }
  builder.SetMaxReceiveMessageSize(-1);
  builder.SetMaxSendMessageSize(-1);
  for (const auto& [name, value] : ChannelSettings()) builder.AddChannelArgument(name, value);
  builder.RegisterCallbackGenericService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr) return 1;
  std::string listens = "ready";
  for (size_t i = 0; i < names.size(); ++i) {
    const bool any_port = absl::EndsWith(names[i], ":0");
    absl::StrAppend(&listens, i == 0 ? " " : ",",
                    any_port ? absl::StripSuffix(names[i], "0") : absl::string_view(names[i]),
                    any_port ? std::to_string(ports[i]) : "");
  }
  std::puts(listens.c_str());
  std::fflush(stdout);
  server->Wait();
  return 0;
}

}  // namespace structkv::bench
