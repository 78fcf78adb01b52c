// Fetches into shared memory that is wrong, goes away, or whose owner does: an error for the fetch,
// nothing for others, and nothing left in the server.
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/escaping.h"
#include "gmock/gmock.h"
#include "grpcpp/create_channel.h"
#include "gtest/gtest.h"
#include "tests/e2e/held_region.h"
#include "tests/testing/process.h"

namespace structkv::testkit {
namespace {

using ::testing::HasSubstr;

constexpr auto kInvalid = grpc::StatusCode::INVALID_ARGUMENT;
constexpr auto kPrecondition = grpc::StatusCode::FAILED_PRECONDITION;

class HeldRegionFaultTest : public HoldingRegionTest {
 protected:
  void SetUp() override {
    HoldingRegionTest::SetUp();
    handle_ = Hold(data_).summary->held().handle();
    expected_ = Fetch(channel(), FetchRequest(handle_)).bytes;
    ExpectMemoryBack();
  }
  void TearDown() override {
    EXPECT_TRUE(Release(channel(), handle_).ok());
    EXPECT_TRUE(Eventually([&] { return held_bytes() == 0; }));
  }

  v1::FetchCacheRequest Request() { return Into(FetchRequest(handle_), region_, *file_); }
  Fetched FetchIt(const v1::FetchCacheRequest& request) {
    return Fetch(channel(), request, {}, file_.get());
  }
  void ExpectRefused(const std::function<void(v1::FetchCacheRequest*)>& set, grpc::StatusCode code,
                     const std::vector<std::string>& texts) {
    v1::FetchCacheRequest request = Request();
    set(&request);
    const Fetched fetched = FetchIt(request);
    ExpectFetchFailure(fetched, code, texts);
    EXPECT_FALSE(fetched.info.has_value());
    ExpectUnused();
  }
  // No fetch holds the region, a message or a stream.
  void ExpectUnused() {
    EXPECT_TRUE(Eventually([&] { return Get(region_).use_count() == 0; }));
    EXPECT_TRUE(Eventually([&] { return server().active_streams() == 1; }))  // the neighbour's
        << server().active_streams();
    ExpectMemoryBack();
  }
  void ExpectGood(const Fetched& fetched) {
    EXPECT_TRUE(fetched.status.ok()) << fetched.status.error_message();
    EXPECT_THAT(fetched.faults, ::testing::IsEmpty());
    EXPECT_TRUE(fetched.bytes == expected_);
  }
  // A cache whose positions, in messages, are more than a stream takes in while nobody reads.
  std::string HoldLong() {
    v1::Open open = WideOpen(20000);
    auto* method = open.mutable_method()->mutable_structkv();
    method->set_granularity(v1::GRANULARITY_PER_KV_HEAD);
    method->mutable_kv_budget()->set_ratio(1);
    return Hold(PromptData(open, 3)).summary->held().handle();
  }
  // A connection that takes in little more than what is read.
  std::shared_ptr<grpc::Channel> NarrowChannel() {
    grpc::ChannelArguments args;
    args.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
    args.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 64 << 10);
    args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    args.SetMaxReceiveMessageSize(-1);
    return grpc::CreateCustomChannel(target(), grpc::InsecureChannelCredentials(), args);
  }
  // A region for it.
  std::unique_ptr<SharedFile> LongFile() { return SharedFile::Sealed(64 << 20); }

  const PromptData data_{WideOpen(), 6};
  std::string handle_;
  std::string expected_;
};

TEST_F(HeldRegionFaultTest, PlacesThatAreNone) {
  const auto range = [](uint64_t offset, uint64_t size, uint32_t region = 0) {
    return [=](v1::FetchCacheRequest* request) {
      request->mutable_result_range()->set_offset_bytes(offset);
      request->mutable_result_range()->set_size_bytes(size);
      request->mutable_result_range()->set_region(region);
    };
  };
  const uint64_t size = file_->size();
  ExpectRefused(range(0, size + 1), kInvalid, {"result_range: range has size_bytes 4194305"});
  ExpectRefused(range(size, 64), kInvalid, {"result_range", "at offset_bytes 4194304"});
  ExpectRefused(range(UINT64_MAX - 63, 64), kInvalid, {"18446744073709551552"});
  ExpectRefused(range(64, UINT64_MAX), kInvalid, {"18446744073709551615"});
  ExpectRefused(range(0, 0), kInvalid, {"size_bytes 0"});
  ExpectRefused(range(0, size, 1), kInvalid, {"range.region is 1", "names 1 regions"});
  ExpectRefused(range(2, size - 64), kInvalid, {"a multiple of 64"});
  ExpectRefused(range(0, 64), kInvalid, {"size_bytes is 64; 4 layers of", "are needed"});
  ExpectRefused([](auto* request) { request->clear_result_range(); }, kInvalid,
                {"result_range is not set", "shared_memory"});
  ExpectRefused([](auto* request) { request->clear_regions(); }, kPrecondition,
                {"transports: none can be granted: shared_memory: regions names none"});
  ExpectRefused([this](auto* request) { request->add_regions(region_); }, kInvalid,
                {"regions[0] comes twice"});
  const auto read_only = SharedFile::Sealed(size);
  const std::string handle = connection().Register(*read_only, /*writable=*/false).handle();
  ExpectRefused([&](auto* request) { request->set_regions(0, handle); }, kInvalid,
                {"result_range: region 0 was not registered as writable"});
  ExpectGood(FetchIt(Request()));
}

TEST_F(HeldRegionFaultTest, WishesAreGrantedInOrder) {
  ExpectRefused([](auto* request) { request->add_transports(v1::TRANSPORT_SHARED_MEMORY); },
                kInvalid, {"transports[1] is TRANSPORT_SHARED_MEMORY (2); each is named once"});
  ExpectRefused([](auto* request) { request->add_transports(v1::TRANSPORT_UNSPECIFIED); }, kInvalid,
                {"transports[1] is TRANSPORT_UNSPECIFIED", "allowed: TRANSPORT_INLINE"});
  ExpectRefused([](auto* request) { request->set_transports(0, v1::TRANSPORT_NCCL); },
                kPrecondition, {"nccl: this server does not have it"});
  v1::FetchCacheRequest request = Request();
  request.set_transports(0, v1::TRANSPORT_NCCL);
  request.add_transports(v1::TRANSPORT_CUDA_IPC);
  request.add_transports(v1::TRANSPORT_SHARED_MEMORY);
  const Fetched third = FetchIt(request);
  ExpectGood(third);
  EXPECT_EQ(third.summary->transport(), "shared_memory");
  EXPECT_EQ(third.info->transport_reason(),
            "nccl: this server does not have it; cuda_ipc: this server does not have it");
  request.add_transports(v1::TRANSPORT_INLINE);
  request.mutable_transports()->SwapElements(0, 3);
  const Fetched first = FetchIt(request);
  ExpectGood(first);
  EXPECT_EQ(first.message_bytes, expected_.size());
  EXPECT_EQ(first.summary->transport(), "inline");
  EXPECT_EQ(first.info->transport(), v1::TRANSPORT_INLINE);
}

TEST_F(HeldRegionFaultTest, HandlesThatAreUnknownOrAnothersAreTheSame) {
  const std::string others = connection().Register(*file_, true, 0, "another tenant").handle();
  for (const std::string& wrong : {std::string(16, 'x'), std::string("x"), others}) {
    ExpectRefused([&](auto* request) { request->set_regions(0, wrong); },
                  grpc::StatusCode::NOT_FOUND, {"regions[0]: the region", "is not registered"});
  }
  // The region is the caller's and the cache another's.
  const Fetched fetched = Fetch(channel(), Into(FetchRequest(handle_), others, *file_),
                                {{"structkv-tenant", "another tenant"}});
  ExpectFetchFailure(fetched, grpc::StatusCode::NOT_FOUND, {"handle: no such cache is held"});
  ExpectGood(FetchIt(Request()));
}

TEST_F(HeldRegionFaultTest, AServerWithoutRegionsSaysSo) {
  EXPECT_TRUE(Release(channel(), handle_).ok());
  ExpectUndisturbed();
  Restart(HoldOptions());
  handle_ = Hold(data_).summary->held().handle();
  v1::FetchCacheRequest request = Request();
  ExpectFetchFailure(FetchIt(request), kPrecondition, {"shared_memory: this server does not"});
  request.add_transports(v1::TRANSPORT_INLINE);
  const Fetched fetched = FetchIt(request);
  ExpectGood(fetched);
  EXPECT_EQ(fetched.info->transport_reason(), "shared_memory: this server does not have it");
}

// The memory is taken away before, and while it is written; whatever the moment, the fetch fails,
// and nothing else does.
TEST_F(HeldRegionFaultTest, ItsRegionIsTruncated) {
  const std::string long_handle = HoldLong();
  const std::string name = "structkv.fetch-" + std::to_string(getpid());
  int failed = 0;
  for (int round = 0; round < 20; ++round) {
    const auto file = SharedFile::Named(name, 64 << 20);
    grpc::ClientContext context;
    v1::RegisterRegionRequest request;
    request.set_name(name);
    request.set_size_bytes(file->size());
    request.set_writable(true);
    v1::RegisterRegionResponse region;
    ASSERT_TRUE(Regions()->RegisterRegion(&context, request, &region).ok());
    std::thread cutter([&, round] {
      std::this_thread::sleep_for(std::chrono::microseconds(300 * round));
      EXPECT_TRUE(file->Truncate(4096));
    });
    if (round == 0) cutter.join();
    // Nothing of the region is read here: it may be gone.
    FetchCall call(channel(), Into(FetchRequest(long_handle), region.handle(), *file));
    const Fetched fetched = call.Finish();
    if (cutter.joinable()) cutter.join();
    if (fetched.status.ok()) continue;  // it was quicker
    ++failed;
    ExpectFetchFailure(fetched, kPrecondition, {"regions[0]", "bytes of the region are gone"});
    EXPECT_EQ(Get(region.handle()).state(), v1::REGION_STATE_BROKEN);
    ExpectGood(FetchIt(Request()));
  }
  EXPECT_GT(failed, 0);
  ExpectUnused();
  EXPECT_TRUE(Release(channel(), long_handle).ok());
}

TEST_F(HeldRegionFaultTest, ItsRegionGoesUnderARunningFetch) {
  const std::string long_handle = HoldLong();
  const std::string whole = Fetch(channel(), FetchRequest(long_handle)).bytes;
  for (const bool closes : {false, true}) {
    SCOPED_TRACE(closes);
    const auto file = LongFile();
    RegionConnection connection(socket_path());
    const std::string region = connection.Register(*file, true, closes ? 0 : 200).handle();
    const v1::FetchCacheRequest request = Into(FetchRequest(long_handle), region, *file);
    FetchCall reader(NarrowChannel(), request, {}, file.get());
    ASSERT_TRUE(reader.ReadOne());
    EXPECT_EQ(Get(region).use_count(), 1U);
    if (closes) connection.Close();  // otherwise its lease ends
    EXPECT_TRUE(Eventually([&] { return Get(region).state() == v1::REGION_STATE_UNREGISTERING; }));
    ExpectFetchFailure(Fetch(channel(), request), grpc::StatusCode::NOT_FOUND, {"regions[0]"});
    const Fetched fetched = reader.Finish();
    EXPECT_TRUE(fetched.status.ok()) << fetched.status.error_message();
    EXPECT_TRUE(fetched.bytes == whole);
    EXPECT_TRUE(Eventually([&] { return Get(region).state() == v1::REGION_STATE_UNSPECIFIED; }));
  }
  EXPECT_TRUE(Release(channel(), long_handle).ok());
}

TEST_F(HeldRegionFaultTest, ItsReaderGoesOrStaysAway) {
  const std::string long_handle = HoldLong();
  const auto file = LongFile();
  const std::string region = Register(*file);
  {
    FetchCall reader(NarrowChannel(), Into(FetchRequest(long_handle), region, *file));
    ASSERT_TRUE(reader.ReadOne());
    EXPECT_EQ(Get(region).use_count(), 1U);
    reader.Cancel();
    EXPECT_EQ(reader.Finish().status.error_code(), grpc::StatusCode::CANCELLED);
    EXPECT_TRUE(Eventually([&] { return Get(region).use_count() == 0; }));
  }
  // Gone on with, inline and into the region in turns, from the byte where it was.
  const std::string whole = Fetch(channel(), FetchRequest(long_handle)).bytes;
  std::string came;
  for (int i = 0; came.size() < whole.size(); ++i) {
    v1::FetchCacheRequest request = FetchRequest(long_handle);
    request.set_skip_bytes(came.size());
    if (i % 2 == 0) request = Into(request, region, *file);
    FetchCall reader(NarrowChannel(), request, {}, file.get());
    for (int messages = 0; messages < 7 && reader.ReadOne(); ++messages) {
    }
    reader.Cancel();
    came += reader.Finish().bytes;
  }
  EXPECT_TRUE(came == whole);
  EXPECT_TRUE(Eventually([&] { return Get(region).use_count() == 0; }));
  EXPECT_TRUE(Release(channel(), long_handle).ok());
}

// Killed at any moment a client that fetches leaves nothing: no mapping, no descriptor, no memory.
TEST_F(HeldRegionFaultTest, AClientIsKilledWhileItFetches) {
  const std::string long_handle = HoldLong();
  const int64_t mapped = mapped_bytes();
  const int64_t files = OpenFiles(getpid());
  for (int round = 0; round < 6; ++round) {
    Process client(
        {STRUCTKV_FETCHING_CLIENT, target(), socket_path(), absl::BytesToHexString(long_handle)});
    ASSERT_TRUE(client.WaitForLine("fetched").has_value()) << client.error();
    EXPECT_GT(mapped_bytes(), mapped);
    std::this_thread::sleep_for(std::chrono::milliseconds(3 * round));
    client.Signal(SIGKILL);
    EXPECT_EQ(client.Wait(), 128 + SIGKILL);
    EXPECT_TRUE(Eventually([&] { return mapped_bytes() == mapped; }));
    ExpectUnused();
    ExpectGood(FetchIt(Request()));
    EXPECT_TRUE(Eventually([&] { return OpenFiles(getpid()) <= files; }))
        << OpenFiles(getpid()) << " descriptors, there were " << files;
  }
  EXPECT_TRUE(Release(channel(), long_handle).ok());
}

// What the operator sees of a fetch.
TEST_F(HeldRegionFaultTest, TheLogHasALineOfEach) {
  EXPECT_TRUE(Release(channel(), handle_).ok());
  ExpectUndisturbed();
  FILE* const log = tmpfile();
  ServerOptions options = HoldOptions();
  options.log = std::make_shared<rpc::Log>(rpc::LogFormat::kText, fileno(log));
  Restart(options);
  handle_ = Hold(data_).summary->held().handle();
  v1::FetchCacheRequest request = FetchRequest(handle_);
  request.set_first_layer(1);
  request.set_kv_head_count(2);
  const size_t bytes = FetchIt(request).bytes.size();
  request.set_first_layer(9);
  FetchIt(request);
  const auto lines = [log] {
    std::string text(4096, '\0');
    text.resize(static_cast<size_t>(pread(fileno(log), text.data(), text.size(), 0)));
    return text;
  };
  EXPECT_TRUE(Eventually([&] { return lines().find("INVALID_ARGUMENT") != std::string::npos; }));
  EXPECT_THAT(
      lines(),
      HasSubstr(
          " fetch client_session=- trace=- transport=inline layers=3 kv_heads=2 output_bytes=" +
          std::to_string(bytes) + " micros="));
  EXPECT_THAT(lines(), HasSubstr(" fetch client_session=- trace=- transport=- layers=0 kv_heads=0 "
                                 "output_bytes=0 micros="));
  EXPECT_THAT(lines(), HasSubstr("first_layer is 9"));
  EXPECT_THAT(lines(), ::testing::Not(HasSubstr(absl::BytesToHexString(handle_))));
  EXPECT_TRUE(options.log->Flush(absl::Seconds(30)));
  fclose(log);
}

}  // namespace
}  // namespace structkv::testkit
