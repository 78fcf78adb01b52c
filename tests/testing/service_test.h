// A server in the test's process behind a real socket, and the checks that every misuse of it must
// pass: the right status and text, memory back to where it was, neighbours undisturbed.
#pragma once

#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "service/server.h"
#include "tests/testing/answer.h"
#include "tests/testing/call.h"
#include "tests/testing/prompt_data.h"

namespace structkv::testkit {

// Limits that fit tests: two threads, 256 MiB, a port of the system's choosing.
ServerOptions TestOptions();

// A prompt that is in the middle of its stream while something happens beside it: half of its
// layers and a half of the next are sent at construction, the rest by Finish().
class Neighbour {
 public:
  Neighbour(const std::shared_ptr<grpc::Channel>& channel, const PromptData* data);
  // Sends the rest and returns the outcome.
  Outcome Finish();

 private:
  const PromptData& data_;
  Call call_;
};

class ServiceTest : public ::testing::Test {
 protected:
  ServiceTest();
  ~ServiceTest() override;

  // Starts the server, learns the neighbour's undisturbed result, and sets the neighbour going on a
  // connection of its own.
  void Start(ServerOptions options = TestOptions());
  // Starts the server alone, for limits that a neighbour who waits would meet as well. Null: the
  // backend that the options name.
  void StartAlone(ServerOptions options, std::unique_ptr<Backend> backend = nullptr);

  // Stops the server, which must hold nothing.
  void Stop();
  // The same, whatever it holds: streams end as those of a server that dies.
  void StopUnderPrompts();
  // Stops it, which must hold nothing, and starts another.
  void Restart(ServerOptions options);

  // Ends the neighbour and checks that its result is the undisturbed one, to the byte, and that the
  // server then holds no memory, no session and no stream. Called at the end of a test at the
  // latest.
  void ExpectUndisturbed();
  // Checks that the server holds no memory, no session and no stream.
  void ExpectNothingHeld();
  // Waits until nothing but the neighbour holds memory.
  void ExpectMemoryBack();

  // The outcome of sending `messages` on a connection of the tests' own.
  Outcome Run(const std::vector<v1::CompressRequest>& messages, const CallOptions& options = {});

  Server& server() { return *server_; }
  bool running() const { return server_ != nullptr; }
  const std::shared_ptr<grpc::Channel>& channel() const { return channel_; }
  const std::string& target() const { return target_; }
  int64_t neighbour_bytes() const { return neighbour_bytes_; }

 private:
  PromptData neighbour_data_;
  std::unique_ptr<Server> server_;
  std::string target_;
  std::shared_ptr<grpc::Channel> channel_;
  std::shared_ptr<grpc::Channel> neighbour_channel_;
  std::string undisturbed_;
  std::unique_ptr<Neighbour> neighbour_;
  int64_t neighbour_bytes_ = 0;
};

// Fails the test unless the outcome has `code` and its text has every one of `texts`, and a failed
// stream has no summary.
void ExpectFailure(const Outcome& outcome, grpc::StatusCode code,
                   const std::vector<std::string>& texts);
// Fails the test unless the outcome is OK and what the oracle says.
void ExpectSuccess(const PromptData& data, const Outcome& outcome);

}  // namespace structkv::testkit
