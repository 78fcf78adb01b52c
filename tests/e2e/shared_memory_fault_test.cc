// Shared memory that is wrong, goes away, or whose owner does: an error for the prompts that use
// it, nothing for those of others, and nothing left in the server.
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/region_test.h"

namespace structkv::testkit {
namespace {

using Milliseconds = std::chrono::milliseconds;

// Files of clients that the server's process, this one, has mapped.
int MappedRegions(const std::string& name) {
  std::ifstream maps("/proc/self/maps");
  int count = 0;
  for (std::string line; std::getline(maps, line);) {
    if (line.find(name) != std::string::npos) ++count;
  }
  return count;
}

class SharedMemoryFaultTest : public RegionTest {
 protected:
  void SetUp() override {
    StartShared();
    placed_ = Place(data_);
    messages_ = Messages(data_, &placed_);
  }

  v1::TensorPiece* Piece(v1::Tensor tensor) {
    for (v1::CompressRequest& message : messages_) {
      if (!message.has_pieces()) continue;
      for (v1::TensorPiece& piece : *message.mutable_pieces()->mutable_pieces()) {
        if (piece.layer() == 1 && piece.tensor() == tensor) return &piece;
      }
    }
    return nullptr;
  }
  v1::RegionRange* Range(v1::Tensor tensor) { return Piece(tensor)->mutable_range(); }

  void ExpectInvalid(const std::vector<std::string>& texts) {
    ExpectFailure(Run(messages_), grpc::StatusCode::INVALID_ARGUMENT, texts);
    ExpectMemoryBack();
    messages_ = Messages(data_, &(placed_ = Place(data_)));
  }

  // The prompt's result, which must be the undisturbed one.
  void ExpectUndisturbedResult(const Outcome& outcome) {
    EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
    EXPECT_TRUE(ResultBytes(Assemble(placed_.ranged->Get(outcome))) ==
                ResultBytes(Assemble(Run(AllMessages(data_)))));
  }

  // Sends all but the last `left` messages, and waits for what was answered.
  void SendAllBut(size_t left, Call* call) {
    for (size_t i = 0; i + left < messages_.size(); ++i) call->Send(messages_[i]);
    EXPECT_TRUE(call->WaitForLayer(0));
  }
  Outcome SendLast(size_t left, Call* call) {
    for (size_t i = messages_.size() - left; i < messages_.size(); ++i) call->Send(messages_[i]);
    call->HalfClose();
    return call->Finish();
  }

  const std::string& handle() { return messages_[0].open().regions(0); }

  const PromptData data_{SmallOpen(), 6};
  Placed placed_;
  std::vector<v1::CompressRequest> messages_;
};

TEST_F(SharedMemoryFaultTest, RangesOutsideOfTheirRegion) {
  const uint64_t size = placed_.file->size();
  Range(v1::TENSOR_KEYS)->set_offset_bytes(size);
  ExpectInvalid({"layer 1, keys", "range has size_bytes", std::to_string(size) + " bytes"});
  Range(v1::TENSOR_VALUES)->set_offset_bytes(UINT64_MAX - 63);
  ExpectInvalid({"layer 1, values", "18446744073709551552"});
  Range(v1::TENSOR_KEYS)->set_offset_bytes((size - 64) / 64 * 64);
  ExpectInvalid({"layer 1, keys", "range has size_bytes"});
  Range(v1::TENSOR_WINDOW_QUERIES)->set_size_bytes(UINT64_MAX);
  ExpectInvalid({"layer 1, window_queries", "18446744073709551615"});
  Range(v1::TENSOR_WINDOW_QUERIES)->set_size_bytes(0);
  ExpectInvalid({"layer 1, window_queries", "size_bytes 0"});
  Range(v1::TENSOR_KEYS)->set_region(1);
  ExpectInvalid({"layer 1, keys", "range.region is 1", "names 1 regions"});
}

TEST_F(SharedMemoryFaultTest, KeysAndValuesThatAreNotOneWholeRange) {
  Piece(v1::TENSOR_KEYS)->set_data(data_.tensor(1, v1::TENSOR_KEYS));
  ExpectInvalid({"layer 1, keys", "has `data`"});
  Range(v1::TENSOR_KEYS)->set_size_bytes(data_.tensor(1, v1::TENSOR_KEYS).size() / 2);
  ExpectInvalid({"layer 1, keys", "one range of the whole tensor"});
  Piece(v1::TENSOR_VALUES)->set_offset_bytes(64);
  ExpectInvalid({"layer 1, values", "one range of the whole tensor"});
  Range(v1::TENSOR_KEYS)->set_offset_bytes(Range(v1::TENSOR_KEYS)->offset_bytes() + 2);
  ExpectInvalid({"layer 1, keys", "a multiple of 64"});
  *Range(v1::TENSOR_KEYS) = placed_.ranged->results();
  Range(v1::TENSOR_KEYS)->set_size_bytes(data_.tensor(1, v1::TENSOR_KEYS).size());
  Range(v1::TENSOR_KEYS)->set_offset_bytes(Range(v1::TENSOR_KEYS)->offset_bytes() - 6400);
  ExpectInvalid({"layer 1, keys", "overlaps open.result_range"});
}

TEST_F(SharedMemoryFaultTest, ResultsThatDoNotFit) {
  v1::RegionRange* results = messages_[0].mutable_open()->mutable_result_range();
  results->set_size_bytes(results->size_bytes() - 1);
  ExpectInvalid({"open.result_range", "4 layers of", "are needed"});
  results = messages_[0].mutable_open()->mutable_result_range();
  results->set_region(7);
  ExpectInvalid({"open.result_range", "range.region is 7"});
  messages_[0].mutable_open()->set_output(v1::OUTPUT_PLAN);
  ExpectInvalid({"open.result_range", "plan"});
}

TEST_F(SharedMemoryFaultTest, WishesThatAreNone) {
  messages_[0].mutable_open()->add_transports(v1::TRANSPORT_SHARED_MEMORY);
  ExpectInvalid({"open.transports[1]", "each is named once"});
  messages_[0].mutable_open()->add_transports(v1::TRANSPORT_UNSPECIFIED);
  ExpectInvalid({"open.transports[1]", "TRANSPORT_UNSPECIFIED"});
  messages_[0].mutable_open()->add_regions(messages_[0].open().regions(0));
  ExpectInvalid({"open.regions[0]", "comes twice"});
  messages_[0].mutable_open()->clear_transports();
  ExpectInvalid({"layer 0", "the prompt's transport is inline"});
}

TEST_F(SharedMemoryFaultTest, HandlesThatAreUnknownOrAnothersAreTheSame) {
  const std::string own = handle();
  const std::string others =
      connection().Register(*placed_.file, true, 0, "another tenant").handle();
  for (const std::string& wrong : {std::string(16, 'x'), std::string("x"), others}) {
    messages_[0].mutable_open()->set_regions(0, wrong);
    ExpectFailure(Run(messages_), grpc::StatusCode::NOT_FOUND,
                  {"open.regions[0]", "is not registered"});
    EXPECT_EQ(Get(wrong).state(), v1::REGION_STATE_UNSPECIFIED);
  }
  messages_[0].mutable_open()->set_regions(0, own);
  ExpectUndisturbedResult(Run(messages_));
}

TEST_F(SharedMemoryFaultTest, PiecesAgain) {
  std::vector<v1::CompressRequest> again = messages_;
  again.insert(again.begin() + 2, messages_[1]);
  ExpectUndisturbedResult(Run(again));

  again = messages_;
  again.insert(again.begin() + 2, messages_[1]);
  for (v1::TensorPiece& piece : *again[2].mutable_pieces()->mutable_pieces()) {
    if (piece.tensor() == v1::TENSOR_KEYS) piece.mutable_range()->set_offset_bytes(64);
  }
  ExpectFailure(Run(again), grpc::StatusCode::ALREADY_EXISTS, {"layer 0, keys"});

  Piece(v1::TENSOR_KEYS)->set_xxh3_64(5);
  ExpectFailure(Run(messages_), grpc::StatusCode::DATA_LOSS, {"layer 1, keys"});
  ExpectMemoryBack();
}

// The memory is taken away between two layers.
TEST_F(SharedMemoryFaultTest, ARegionIsTruncatedInMidSession) {
  const auto file =
      SharedFile::Named("structkv.cut-" + std::to_string(getpid()), placed_.file->size());
  grpc::ClientContext context;
  v1::RegisterRegionRequest request;
  request.set_name("structkv.cut-" + std::to_string(getpid()));
  request.set_size_bytes(file->size());
  request.set_writable(true);
  v1::RegisterRegionResponse region;
  const grpc::Status status = Regions()->RegisterRegion(&context, request, &region);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_FALSE(file->HasName());

  RangedPrompt ranged(data_, file.get(), region.handle(), true);
  Call call(channel());
  call.Send(OpenMessage(ranged.Open(data_.open())));
  call.Send(ranged.Put(LayerMessage(data_, 0)));
  ASSERT_TRUE(call.WaitForLayer(0));
  const v1::CompressRequest next = ranged.Put(LayerMessage(data_, 1));
  ASSERT_TRUE(file->Truncate(4096));
  call.Send(next);
  ExpectFailure(call.Finish(), grpc::StatusCode::FAILED_PRECONDITION,
                {"open.regions[0]", "bytes of the region are gone",
                 "its file has 4096 now (it was truncated)"});
  ExpectMemoryBack();
  EXPECT_EQ(Get(region.handle()).state(), v1::REGION_STATE_BROKEN);
}

// The memory is taken away while it is read and written; whatever the moment, the prompt fails, and
// nothing else does.
TEST_F(SharedMemoryFaultTest, ARegionIsTruncatedWhileItIsRead) {
  v1::Open open = SmallOpen(4000);
  open.set_layers_in_flight(4);
  const PromptData data(open, 4);
  const std::string name = "structkv.race-" + std::to_string(getpid());
  int failed = 0;
  for (int round = 0; round < 20; ++round) {
    const auto file = SharedFile::Named(name, RangedPrompt::BytesFor(data));
    grpc::ClientContext context;
    v1::RegisterRegionRequest request;
    request.set_name(name);
    request.set_size_bytes(file->size());
    request.set_writable(true);
    v1::RegisterRegionResponse region;
    ASSERT_TRUE(Regions()->RegisterRegion(&context, request, &region).ok());
    RangedPrompt ranged(data, file.get(), region.handle(), true);
    std::vector<v1::CompressRequest> messages = AllMessages(data);
    messages[0] = OpenMessage(ranged.Open(data.open()));
    for (v1::CompressRequest& message : messages) {
      if (message.has_pieces()) message = ranged.Put(message);
    }
    std::thread cutter([&, round] {
      std::this_thread::sleep_for(std::chrono::microseconds(200 * round));
      EXPECT_TRUE(file->Truncate(0));
    });
    const Outcome outcome = Run(messages);
    cutter.join();
    if (outcome.status.ok()) continue;  // it was quicker
    ++failed;
    ExpectFailure(outcome, grpc::StatusCode::FAILED_PRECONDITION, {"open.regions[0]"});
  }
  EXPECT_GT(failed, 0);
  ExpectMemoryBack();
}

TEST_F(SharedMemoryFaultTest, IsUnregisteredUnderARunningSession) {
  Call call(channel());
  SendAllBut(2, &call);
  EXPECT_EQ(Get(handle()).use_count(), 1U);
  grpc::ClientContext context;
  v1::UnregisterRegionRequest request;
  request.set_handle(handle());
  v1::UnregisterRegionResponse response;
  ASSERT_TRUE(Regions()->UnregisterRegion(&context, request, &response).ok());
  EXPECT_EQ(response.use_count(), 1U);
  EXPECT_EQ(Get(handle()).state(), v1::REGION_STATE_UNREGISTERING);
  ExpectFailure(Run(messages_), grpc::StatusCode::NOT_FOUND, {"open.regions[0]"});
  EXPECT_EQ(mapped_bytes(), static_cast<int64_t>(placed_.file->size()));
  ExpectUndisturbedResult(SendLast(2, &call));
  EXPECT_TRUE(Eventually([&] { return mapped_bytes() == 0; }));
}

TEST_F(SharedMemoryFaultTest, ItsConnectionClosesUnderARunningSession) {
  Call call(channel());
  SendAllBut(2, &call);
  connection().Close();
  EXPECT_TRUE(Eventually([&] { return Get(handle()).state() == v1::REGION_STATE_UNREGISTERING; }));
  ExpectUndisturbedResult(SendLast(2, &call));
  EXPECT_TRUE(Eventually([&] { return mapped_bytes() == 0; }));
}

TEST_F(SharedMemoryFaultTest, ItsLeaseEndsUnderARunningSession) {
  const auto short_lived = connection().Register(*placed_.file, true, 100);
  messages_[0].mutable_open()->set_regions(0, short_lived.handle());
  Call call(channel());
  SendAllBut(2, &call);
  EXPECT_TRUE(Eventually([&] { return Get(handle()).state() == v1::REGION_STATE_UNREGISTERING; }));
  ExpectUndisturbedResult(SendLast(2, &call));
  EXPECT_TRUE(Eventually([&] { return Get(handle()).state() == v1::REGION_STATE_UNSPECIFIED; }));
}

TEST_F(SharedMemoryFaultTest, AClientCancels) {
  {
    Call call(channel());
    SendAllBut(2, &call);
  }
  ExpectMemoryBack();
  EXPECT_TRUE(Eventually([&] { return Get(handle()).use_count() == 0; }));
}

// Killed at any moment a client leaves nothing: no name, no mapping, no descriptor, no memory.
TEST_F(SharedMemoryFaultTest, AClientIsKilled) {
  const std::string registered = "structkv.registered-" + std::to_string(getpid());
  const std::string left = "structkv.left-" + std::to_string(getpid());
  const auto exists = [](const std::string& name) {
    struct stat status = {};
    return stat(("/dev/shm/" + name).c_str(), &status) == 0;
  };
  const int64_t mapped = mapped_bytes();
  const int64_t files = OpenFiles(getpid());
  for (int i = 0; i < 2; ++i) {
    Process client({STRUCTKV_REGION_CLIENT, target(), socket_path(), std::to_string(getpid())});
    ASSERT_TRUE(client.WaitForLine("sent").has_value()) << client.error();
    EXPECT_GT(mapped_bytes(), mapped);
    EXPECT_EQ(MappedRegions(registered), 1);
    EXPECT_FALSE(exists(registered));
    EXPECT_TRUE(exists(left));
    client.Signal(SIGKILL);
    EXPECT_EQ(client.Wait(), 128 + SIGKILL);
    // Within a lease: 300 ms of the name, and what the sweeper waits for.
    EXPECT_TRUE(Eventually([&] { return mapped_bytes() == mapped; }, Milliseconds(1500)));
    EXPECT_TRUE(Eventually([&] { return !exists(left); }, Milliseconds(1500)));
    EXPECT_EQ(MappedRegions(registered), 0);
    ExpectMemoryBack();
    EXPECT_TRUE(Eventually([&] { return OpenFiles(getpid()) <= files; }))
        << OpenFiles(getpid()) << " descriptors, there were " << files;
  }
}

}  // namespace
}  // namespace structkv::testkit
