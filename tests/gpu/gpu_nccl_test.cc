// What of the NCCL transport can be tried on one GPU, and which of it works: the real library and
// the real CUDA streams under the transport's own code.
//
//   gpu_nccl_test                          the tests
//   gpu_nccl_test --peer ID RANK SEED      the other process of the last one
#include <cuda_runtime_api.h>
#include <spawn.h>
#include <sys/wait.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cuda/device_memory.h"
#include "service/transport/nccl/cuda_device_api.h"
#include "service/transport/nccl/nccl_api.h"
#include "service/transport/nccl/worker.h"

extern char** environ;

namespace structkv::nccl {
namespace {

constexpr int64_t kBytes64 = int64_t{64} << 20;

std::vector<uint32_t> Pattern(uint32_t seed) {
  std::vector<uint32_t> words(kBytes64 / sizeof(uint32_t));
  for (uint32_t& word : words) word = seed = seed * 1664525u + 1013904223u;
  return words;
}

// Two buffers of 64 MiB together.
class DeviceBuffers {
 public:
  DeviceBuffers() : bytes_(*cuda::MakeDeviceBytes(kBytes64)) {
    EXPECT_EQ(cudaMemset(bytes_.get(), 0, kBytes64), cudaSuccess);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }
  void Fill(const std::vector<uint32_t>& words) {
    EXPECT_EQ(cudaMemcpy(bytes_.get(), words.data(), kBytes64, cudaMemcpyHostToDevice),
              cudaSuccess);
  }
  std::vector<uint32_t> Read() {
    std::vector<uint32_t> words(kBytes64 / sizeof(uint32_t));
    EXPECT_EQ(cudaMemcpy(words.data(), bytes_.get(), kBytes64, cudaMemcpyDeviceToHost),
              cudaSuccess);
    return words;
  }
  std::vector<Buffer> buffers() {
    return {{bytes_.get(), kBytes64 / 4}, {bytes_.get() + kBytes64 / 4, 3 * kBytes64 / 4}};
  }

 private:
  cuda::DeviceBytes bytes_;
};

// A line for run.sh's report.
void Report(const char* what, const char* result) { std::printf("result: %s: %s\n", what, result); }

struct Waiter {
  std::promise<absl::Status> promise;
  std::future<absl::Status> future = promise.get_future();
  Worker::Done Setter() {
    return [this](const absl::Status& status) { promise.set_value(status); };
  }
};

// Connects, and moves the pattern of `seed` from rank 0 to rank 1.
absl::Status RunEnd(std::shared_ptr<const Api> api, const UniqueId& id, int rank, uint32_t seed) {
  WorkerOptions options;
  options.group_bytes = int64_t{32} << 20;
  auto worker = Worker::Start(std::move(api), CudaDeviceApi(), options);
  if (!worker.ok()) return worker.status();
  Waiter connected;
  (*worker)->Connect(1, id, rank, {connected.Setter(), {}, {}});
  absl::Status status = connected.future.get();
  if (!status.ok()) return status;
  DeviceBuffers data;
  if (rank == 0) data.Fill(Pattern(seed));
  Waiter moved;
  Transfer transfer;
  transfer.direction = rank == 0 ? Direction::kSend : Direction::kReceive;
  transfer.buffers = data.buffers();
  transfer.done = moved.Setter();
  const auto start = Clock::now();
  (*worker)->Submit(1, std::move(transfer));
  status = moved.future.get();
  if (!status.ok()) return status;
  std::printf("rank %d: 64 MiB in %.3f ms, the first time\n", rank,
              std::chrono::duration<double, std::milli>(Clock::now() - start).count());
  if (rank == 1 && data.Read() != Pattern(seed)) return absl::DataLossError("other bytes came");
  Waiter closed;
  (*worker)->Close(1, closed.Setter());
  return closed.future.get();
}

class GpuNcclTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
      GTEST_SKIP() << "no GPU: " << cudaGetErrorString(error);
    }
    absl::StatusOr<std::shared_ptr<const Api>> api = Api::Load();
    if (!api.ok()) GTEST_SKIP() << "no GPU test without NCCL: " << api.status();
    api_ = *std::move(api);
    std::printf("NCCL %s\n", VersionText(api_->version()).c_str());
  }

  std::shared_ptr<const Api> api_;
};

// A 1-rank communicator sends to itself, inside a group.
TEST_F(GpuNcclTest, SendsToItself) {
  const Functions& call = api_->call();
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  UniqueId id;
  ASSERT_TRUE(api_->ToStatus(call.get_unique_id(&id), "id").ok());
  Config config;
  config.blocking = 0;
  Comm* comm = nullptr;
  absl::Status status =
      api_->ToStatus(call.comm_init_rank_config(&comm, 1, id, 0, &config), "init", comm);
  ASSERT_TRUE(status.ok()) << status;
  const auto wait = [&](const char* what) {
    Result error = Result::kInProgress;
    const auto limit = Clock::now() + std::chrono::seconds(60);
    while (error == Result::kInProgress && Clock::now() < limit) {
      std::this_thread::sleep_for(std::chrono::microseconds(100));
      if (call.comm_get_async_error(comm, &error) != Result::kSuccess) break;
    }
    return error == Result::kInProgress ? absl::DeadlineExceededError(what)
                                        : api_->ToStatus(error, what, comm);
  };
  ASSERT_EQ(wait("init"), absl::OkStatus());
  DeviceBuffers from;
  DeviceBuffers to;
  const std::vector<uint32_t> pattern = Pattern(3);
  from.Fill(pattern);
  const DeviceApi device = CudaDeviceApi();
  absl::StatusOr<Stream*> stream = device.create_stream();
  ASSERT_TRUE(stream.ok()) << stream.status();
  ASSERT_TRUE(api_->ToStatus(call.group_start(), "group", comm).ok());
  for (const Buffer& buffer : from.buffers()) {
    status.Update(api_->ToStatus(
        call.send(buffer.data, static_cast<size_t>(buffer.bytes), kBytes, 0, comm, *stream), "send",
        comm));
  }
  for (const Buffer& buffer : to.buffers()) {
    status.Update(api_->ToStatus(
        call.receive(buffer.data, static_cast<size_t>(buffer.bytes), kBytes, 0, comm, *stream),
        "receive", comm));
  }
  status.Update(api_->ToStatus(call.group_end(), "group", comm));
  ASSERT_TRUE(status.ok()) << status;
  ASSERT_EQ(wait("group"), absl::OkStatus());
  ASSERT_EQ(cudaStreamSynchronize(reinterpret_cast<cudaStream_t>(*stream)), cudaSuccess);
  EXPECT_TRUE(to.Read() == pattern);
  Report("NCCL, self-send on one GPU", "works");
  ASSERT_TRUE(api_->ToStatus(call.comm_finalize(comm), "finalize", comm).ok());
  EXPECT_EQ(wait("finalize"), absl::OkStatus());
  EXPECT_EQ(call.comm_destroy(comm), Result::kSuccess);
  device.destroy_stream(*stream);
}

// Two ranks on one GPU are refused within a process, and say so; the worker lives on.
TEST_F(GpuNcclTest, RefusesTwoRanksOfOneProcessOnOneGpu) {
  UniqueId id;
  ASSERT_TRUE(api_->ToStatus(api_->call().get_unique_id(&id), "id").ok());
  std::future<absl::Status> other =
      std::async(std::launch::async, [&] { return RunEnd(api_, id, 1, 5); });
  const absl::Status status = RunEnd(api_, id, 0, 5);
  std::printf("rank 0: %s\nrank 1: %s\n", status.ToString().c_str(),
              other.get().ToString().c_str());
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  Report("NCCL, two ranks of one process on one GPU", "refused by NCCL");
}

// Two processes that say they are different hosts. Whether NCCL lets them is its own matter, and is
// reported; where it does, the data must be right.
TEST_F(GpuNcclTest, MovesBetweenTwoProcessesOnOneGpu) {
  UniqueId id;
  setenv("NCCL_SOCKET_IFNAME", "lo", 1);
  ASSERT_TRUE(api_->ToStatus(api_->call().get_unique_id(&id), "id").ok());
  std::string hex;
  for (char byte : id.bytes) {
    char two[3];
    std::snprintf(two, sizeof(two), "%02x", static_cast<unsigned char>(byte));
    hex += two;
  }
  // Processes of their own for both: NCCL reads its environment once.
  const auto start = [&](const char* rank) {
    setenv("NCCL_HOSTID", (std::string("structkv-test-host-") + rank).c_str(), 1);
    std::vector<std::string> arguments = {"/proc/self/exe", "--peer", hex, rank, "9"};
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    pid_t pid = -1;
    EXPECT_EQ(posix_spawn(&pid, "/proc/self/exe", nullptr, nullptr, argv.data(), environ), 0);
    return pid;
  };
  const pid_t pids[2] = {start("0"), start("1")};
  bool passed = true;
  for (pid_t pid : pids) {
    int code = 0;
    ASSERT_EQ(waitpid(pid, &code, 0), pid);
    ASSERT_TRUE(WIFEXITED(code));
    EXPECT_NE(WEXITSTATUS(code), 3) << "the data was wrong";
    passed = passed && WEXITSTATUS(code) == 0;
  }
  Report("NCCL, two processes on one GPU", passed ? "works" : "does not work; see the log");
}

int Peer(const std::string& hex, int rank, uint32_t seed) {
  UniqueId id;
  for (size_t i = 0; i < sizeof(id.bytes) && 2 * i + 1 < hex.size(); ++i) {
    id.bytes[i] = static_cast<char>(std::stoi(hex.substr(2 * i, 2), nullptr, 16));
  }
  absl::StatusOr<std::shared_ptr<const Api>> api = Api::Load();
  const absl::Status status = api.ok() ? RunEnd(*api, id, rank, seed) : api.status();
  std::printf("rank %d: %s\n", rank, status.ToString().c_str());
  if (status.ok()) return 0;
  return absl::IsDataLoss(status) ? 3 : 1;
}

}  // namespace
}  // namespace structkv::nccl

int main(int argc, char** argv) {
  if (argc == 5 && std::string(argv[1]) == "--peer") {
    return structkv::nccl::Peer(argv[2], std::atoi(argv[3]),
                                static_cast<uint32_t>(std::strtoul(argv[4], nullptr, 10)));
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
