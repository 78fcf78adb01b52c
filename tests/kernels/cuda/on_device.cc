#include "tests/kernels/cuda/on_device.h"

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <utility>

#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/tensor_runs.h"
#include "kernels/layer_pass.h"
#include "tests/kernels/forwarding_backend.h"

namespace structkv::testing {
namespace {

constexpr int64_t kAlignment = 256;

// Bytes from a view's data to the end of its last vector.
template <class View>
int64_t SpanBytes(const View& view, const int32_t* table) {
  if (view.heads == 0 || view.tokens == 0 || view.block_tokens < 0) return 0;
  int64_t last_token = (view.tokens - 1) * view.token_stride;
  if (view.paged()) {
    const int64_t blocks = (view.tokens + view.block_tokens - 1) / view.block_tokens;
    const int64_t last_block =
        table == nullptr ? blocks - 1 : *std::max_element(table, table + blocks);
    last_token = last_block * view.block_stride + (view.block_tokens - 1) * view.token_stride;
  }
  return ((view.heads - 1) * view.head_stride + last_token + view.dim) *
         static_cast<int64_t>(DTypeSize(view.dtype));
}

// A copy of some bytes of the host's memory on GPU 0.
class DeviceCopy {
 public:
  DeviceCopy(const void* data, int64_t bytes)
      : bytes_(bytes),
        begin_(static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % kAlignment)) {
    host_ = const_cast<void*>(data);
    if (bytes <= 0) return;
    EXPECT_EQ(cudaSetDevice(0), cudaSuccess);
    device_ = *cuda::MakeDeviceBytes(begin_ + bytes);
    pinned_ = *cuda::MakePinnedBytes(bytes);
    std::memcpy(pinned_.get(), data, static_cast<size_t>(bytes));
    Copy(this->data(), pinned_.get());
  }
  // What there is nothing of, as in shapes that make no sense, stays where it is.
  void* data() const { return device_ == nullptr ? host_ : device_.get() + begin_; }
  void CopyBack(void* to) const {
    if (bytes_ <= 0) return;
    Copy(pinned_.get(), data());
    std::memcpy(to, pinned_.get(), static_cast<size_t>(bytes_));
  }

 private:
  void Copy(void* to, const void* from) const {
    EXPECT_EQ(cudaSetDevice(0), cudaSuccess);
    const auto stream = cuda::MakeStream();
    EXPECT_EQ(
        cudaMemcpyAsync(to, from, static_cast<size_t>(bytes_), cudaMemcpyDefault, stream->get()),
        cudaSuccess);
    EXPECT_EQ(cudaStreamSynchronize(stream->get()), cudaSuccess);
  }

  const int64_t bytes_;
  const int64_t begin_;
  void* host_ = nullptr;
  cuda::DeviceBytes device_;
  cuda::PinnedBytes pinned_;
};

class OnDeviceBackend final : public ForwardingBackend {
 public:
  using ForwardingBackend::ForwardingBackend;

  absl::Status Saliency(const SaliencyParams& params, float* out, BadStatistic* bad,
                        ParallelFor parallel) const override {
    const DeviceCopy queries(params.queries.data, SpanBytes(params.queries, nullptr));
    const DeviceCopy keys(params.keys.data, SpanBytes(params.keys, params.keys.block_table));
    SaliencyParams on_device = params;
    on_device.queries.data = queries.data();
    on_device.keys.data = keys.data();
    return real().Saliency(on_device, out, bad, parallel);
  }
  absl::Status Gather(const TensorView& source, const int32_t* positions, bool per_head,
                      const MutableTensorView& destination, ParallelFor parallel) const override {
    return OnCopies(source, destination, [&](const TensorView& from, const MutableTensorView& to) {
      return real().Gather(from, positions, per_head, to, parallel);
    });
  }
  absl::Status GatherRotated(const TensorView& source, const int32_t* rows, bool per_head,
                             const RotationParams& rotation, const MutableTensorView& destination,
                             ParallelFor parallel) const override {
    return OnCopies(source, destination, [&](const TensorView& from, const MutableTensorView& to) {
      return real().GatherRotated(from, rows, per_head, rotation, to, parallel);
    });
  }
  absl::Status RunLayer(const LayerPass& pass, BadStatistic* bad,
                        ParallelFor parallel) const override {
    const SaliencyParams& params = pass.saliency;
    const DeviceCopy queries(params.queries.data, SpanBytes(params.queries, nullptr));
    const DeviceCopy keys(params.keys.data, SpanBytes(params.keys, params.keys.block_table));
    LayerPass on_device = pass;
    on_device.saliency.queries.data = queries.data();
    on_device.saliency.keys.data = keys.data();
    std::deque<DeviceCopy> from;
    std::deque<DeviceCopy> to;
    for (LayerPass::Rows& rows : on_device.rows) {
      from.emplace_back(rows.source.data, SpanBytes(rows.source, rows.source.block_table));
      to.emplace_back(rows.destination.data, SpanBytes(rows.destination, nullptr));
      rows.source.data = from.back().data();
      rows.destination.data = to.back().data();
    }
    absl::Status status = real().RunLayer(on_device, bad, parallel);
    for (size_t i = 0; i < to.size(); ++i) to[i].CopyBack(pass.rows[i].destination.data);
    return status;
  }
  // The copies of the keys are made by the call itself.
  std::unique_ptr<StagedLayer> Stage(const SaliencyParams& /*params*/, int /*gpu*/) const override {
    return nullptr;
  }
  absl::Status Zero(void* to, int64_t bytes) const override {
    const DeviceCopy copy(to, bytes);
    absl::Status status = real().Zero(copy.data(), bytes);
    copy.CopyBack(to);
    return status;
  }

 private:
  template <class Call>
  static absl::Status OnCopies(const TensorView& source, const MutableTensorView& destination,
                               Call call) {
    const DeviceCopy from(source.data, SpanBytes(source, source.block_table));
    const DeviceCopy to(destination.data, SpanBytes(destination, nullptr));
    TensorView device_source = source;
    device_source.data = from.data();
    MutableTensorView device_destination = destination;
    device_destination.data = to.data();
    absl::Status status = call(device_source, device_destination);
    to.CopyBack(destination.data);
    return status;
  }
};

}  // namespace

std::unique_ptr<Backend> OnDevice(std::unique_ptr<Backend> real) {
  return std::make_unique<OnDeviceBackend>(std::move(real));
}

}  // namespace structkv::testing
