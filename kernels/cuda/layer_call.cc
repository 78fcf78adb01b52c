#include "kernels/cuda/layer_call.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/device_vectors.h"
#include "kernels/cuda/downloads.h"
#include "kernels/cuda/gather.h"
#include "kernels/cuda/gather_call.h"
#include "kernels/cuda/saliency.h"
#include "kernels/cuda/saliency_inputs.h"
#include "kernels/cuda/staged.h"
#include "kernels/cuda/staging.h"
#include "kernels/cuda/tensor_runs.h"
#include "kernels/cuda/vector_calls.h"
#include "kernels/cuda/vector_launches.h"

namespace structkv::cuda {
namespace {

constexpr int64_t kFloat = sizeof(float);

const void* HeadOf(const TensorView& keys, int64_t head) {
  return static_cast<const std::byte*>(keys.data) +
         head * keys.head_stride * static_cast<int64_t>(DTypeSize(keys.dtype));
}

// Whether the source is some heads of the call's keys.
bool IsOfKeys(const LayerPass& pass, const LayerPass::Rows& rows) {
  const TensorView& keys = pass.saliency.keys;
  const TensorView& source = rows.source;
  return source.data == HeadOf(keys, rows.first_head) && source.dtype == keys.dtype &&
         source.tokens == keys.tokens && source.dim == keys.dim &&
         source.head_stride == keys.head_stride && source.token_stride == keys.token_stride &&
         source.block_table == keys.block_table && source.block_tokens == keys.block_tokens;
}

// Rows that the device gathers.
struct DeviceRows {
  const LayerPass::Rows* rows = nullptr;
  bool are_keys = false;  // of the call's keys, which may have been packed
  bool writes_in_place = false;
  int64_t table_blocks = 0;
  int64_t table_at = 0;
  int64_t out_at = 0;
};

class LayerCall {
 public:
  // `keys_at`: where the keys lie. `device`: whose memory the tensors lie in; -1: none's.
  LayerCall(const LayerPass& pass, const Place& keys_at, int device)
      : pass_(pass),
        device_(device),
        inputs_(pass.saliency, keys_at, &parts_),
        results_at_(parts_.Add<SaliencyFlags>(1)),
        sums_at_(parts_.Add<RowSums>(1)),
        positions_at_(parts_.Add<int32_t>(selections() * pass.keep)),
        results_end_(parts_.bytes()),
        heads_at_(parts_.Add<float>(wants_heads() ? heads() * tokens() : 0)),
        sum_at_(parts_.Add<float>(tokens())),
        sums_parts_at_(parts_.Add<SumsPart>(SumsParts(tokens()))),
        smoothed_at_(parts_.Add<float>(smooths() ? selections() * tokens() : 0)) {}

  // Rows that can be gathered in the call. False: they cannot.
  bool Take(const LayerPass::Rows& rows, const Place& from, const Place& to) {
    DeviceRows taken = {.rows = &rows, .writes_in_place = to.on_device()};
    taken.are_keys = IsOfKeys(pass_, rows);
    if (!taken.are_keys && !from.on_device() && !LiesInPinned(rows.source)) return false;
    taken.table_blocks = taken.are_keys ? 0 : TableBlocks(rows.source);
    taken.table_at = parts_.Add<int32_t>(taken.table_blocks);
    taken.out_at = parts_.Add<std::byte>(to.on_device() ? 0 : VectorBytes(rows.destination));
    rows_.push_back(taken);
    return true;
  }

  // `staged`: where the keys lie, on the call's device; null: elsewhere.
  absl::Status Run(Devices& devices, Staged* staged, BadStatistic* bad) {
    std::vector<float> elsewhere;
    absl::Status status = RunOnDevice(devices, staged, bad, &elsewhere);
    if (!status.ok() || elsewhere.empty()) return status;
    // Without a lease: whoever has one and waits for another may wait for one who does the same.
    return pass_.resident->Add(pass_.resident_to, elsewhere.data(), SerialFor);
  }

 private:
  // `elsewhere`: as of Fetch.
  absl::Status RunOnDevice(Devices& devices, Staged* staged, BadStatistic* bad,
                           std::vector<float>* elsewhere) {
    const auto bytes = [this](const Device& device) {
      const std::vector<SelectRow> rows = SelectRows([](int64_t) { return nullptr; });
      return parts_.bytes() + SelectScratch(device, rows.data(), static_cast<int64_t>(rows.size()));
    };
    if (!devices.CanHold(bytes, device_)) {
      return absl::UnimplementedError("a layer is more than a GPU can hold at once");
    }
    absl::StatusOr<Lease> lease = staged == nullptr
                                      ? devices.AcquireOn(device_, bytes)
                                      : staged->device().Acquire(bytes(staged->device()), staged);
    if (!lease.ok()) return lease.status();
    absl::Status status = Upload(*lease);
    if (status.ok()) status = LaunchScores(*lease);
    if (status.ok()) status = LaunchSelection(*lease);
    if (status.ok()) status = LaunchRows(*lease);
    return status.ok() ? Fetch(*lease, bad, elsewhere) : status;
  }

  int64_t heads() const { return pass_.saliency.keys.heads; }
  int64_t tokens() const { return pass_.saliency.keys.tokens; }
  int64_t selections() const { return pass_.per_head ? heads() : 1; }
  int64_t before_window() const { return tokens() - pass_.window; }
  bool wants_heads() const { return pass_.per_head || pass_.heads != nullptr; }
  bool smooths() const { return pass_.pooling != Pooling::kNone && before_window() > 0; }

  absl::Status Upload(const Lease& lease) const {
    cuda::Upload upload(lease);
    inputs_.Write(lease, &upload);
    for (const DeviceRows& each : rows_) {
      upload.Write(lease.At<int32_t>(each.table_at), each.rows->source.block_table,
                   each.table_blocks);
    }
    return upload.Flush();
  }

  absl::Status LaunchScores(const Lease& lease) const {
    SaliencyRequest request = inputs_.In(lease);
    if (wants_heads()) request.per_head = lease.At<float>(heads_at_);
    request.saliency = lease.At<float>(sum_at_);
    request.parts = lease.At<SumsPart>(sums_parts_at_);
    request.flags = lease.At<SaliencyFlags>(results_at_);
    float* const resident = ResidentOn(lease);
    if (resident != nullptr && pass_.resident_to.decay.has_value()) {
      request.centrality = resident;
      request.decay = *pass_.resident_to.decay;
    }
    absl::Status status =
        lease.device().Check(LaunchSaliency(request, lease.stream()), "LaunchSaliency");
    if (!status.ok() || resident == nullptr || pass_.resident_to.decay.has_value()) return status;
    return Copy(lease, resident, request.saliency, tokens() * kFloat, cudaMemcpyDefault);
  }

  // The pass's resident vector; null where there is none, or on another device.
  float* ResidentOn(const Lease& lease) const {
    if (pass_.resident == nullptr || pass_.resident->gpu() != lease.device().index()) {
      return nullptr;
    }
    return static_cast<DeviceVectors*>(pass_.resident)->At(pass_.resident_to.vector);
  }

  // The rows of the selection, one for each set, and of the sums. `at(offset)`: the address of a
  // part of the lease.
  template <class At>
  std::vector<SelectRow> SelectRows(const At& at) const {
    const auto floats = [&](int64_t offset, int64_t index) {
      float* const begin = at(offset);
      return begin == nullptr ? nullptr : begin + index * tokens();
    };
    std::vector<SelectRow> rows;
    for (int64_t i = 0; i < selections(); ++i) {
      rows.push_back({.scores = smooths()        ? floats(smoothed_at_, i)
                                : pass_.per_head ? floats(heads_at_, i)
                                                 : floats(sum_at_, 0),
                      .tokens = tokens(),
                      .window = pass_.window,
                      .keep = pass_.keep});
    }
    // What is selected and what is summed is read once where both are the same.
    if (smooths() || pass_.per_head)
      rows.push_back({.scores = floats(sum_at_, 0), .tokens = tokens()});
    rows.back().top_count = std::clamp<int64_t>(pass_.top_count, 0, tokens());
    return rows;
  }

  absl::Status LaunchSelection(const Lease& lease) const {
    if (smooths()) {
      if (absl::Status status = LaunchSmoothing(lease); !status.ok()) return status;
    }
    std::vector<SelectRow> rows =
        SelectRows([&lease](int64_t offset) { return lease.At<float>(offset); });
    for (int64_t i = 0; i < selections(); ++i) {
      rows[static_cast<size_t>(i)].positions = lease.At<int32_t>(positions_at_) + i * pass_.keep;
    }
    rows.back().sums = lease.At<RowSums>(sums_at_);
    rows.back().parts = lease.At<SumsPart>(sums_parts_at_);
    return RunSelect(lease, rows.data(), static_cast<int64_t>(rows.size()),
                     lease.At<void>(parts_.bytes()));
  }

  // Smoothing does not see the window, whose tokens stay whatever their scores.
  absl::Status LaunchSmoothing(const Lease& lease) const {
    float* const to = lease.At<float>(smoothed_at_);
    const auto bytes = static_cast<size_t>(selections() * tokens() * kFloat);
    absl::Status status =
        lease.device().Check(cudaMemsetAsync(to, 0, bytes, lease.stream()), "cudaMemsetAsync");
    if (!status.ok()) return status;
    const PoolParams params = {.in = lease.At<float>(pass_.per_head ? heads_at_ : sum_at_),
                               .out = to,
                               .rows = selections(),
                               .tokens = before_window(),
                               .row_stride = tokens(),
                               .smoothing = SmoothingOf(pass_.pooling),
                               .kernel = pass_.pooling_kernel};
    return lease.device().Check(LaunchPool(params, lease.stream()), "LaunchPool");
  }

  absl::Status LaunchRows(const Lease& lease) const {
    std::vector<GatherJob> jobs;
    for (const DeviceRows& each : rows_) jobs.push_back(JobOf(each, lease));
    if (jobs.empty()) return absl::OkStatus();
    return lease.device().Check(
        LaunchGather({jobs.data(), static_cast<int64_t>(jobs.size())}, lease.stream()),
        "LaunchGather");
  }

  GatherJob JobOf(const DeviceRows& each, const Lease& lease) const {
    const LayerPass::Rows& rows = *each.rows;
    GatherJob job = {.source = rows.source, .per_head = pass_.per_head};
    job.positions =
        lease.At<int32_t>(positions_at_) + (pass_.per_head ? rows.first_head * pass_.keep : 0);
    if (each.are_keys) {
      job.source = inputs_.In(lease).keys;
      job.source.data = HeadOf(job.source, rows.first_head);
      job.source.heads = rows.source.heads;
    } else if (job.source.block_table != nullptr) {
      job.source.block_table = lease.At<int32_t>(each.table_at);
    }
    job.destination = rows.destination;
    if (!each.writes_in_place) {
      const MutableTensorView& to = rows.destination;
      job.destination = MutableTensorView::Dense(lease.At<void>(each.out_at), to.dtype,
                                                 LayoutOf(to), to.heads, to.tokens, to.dim);
    }
    return job;
  }

  // `elsewhere`: the sum over the heads, where its resident vector lies on another GPU.
  absl::Status Fetch(const Lease& lease, BadStatistic* bad, std::vector<float>* elsewhere) const {
    Downloads downloads(lease);
    // Positions, sums and what was found to be bad lie together and come in one copy.
    std::vector<std::byte> results(static_cast<size_t>(results_end_ - results_at_));
    downloads.Read(lease.At<std::byte>(results_at_), static_cast<int64_t>(results.size()),
                   results.data());
    const auto* const sum = lease.At<float>(sum_at_);
    if (pass_.sum != nullptr) downloads.Read(sum, tokens() * kFloat, pass_.sum);
    if (pass_.resident != nullptr && ResidentOn(lease) == nullptr) {
      elsewhere->resize(static_cast<size_t>(tokens()));
      downloads.Read(sum, tokens() * kFloat, elsewhere->data());
    }
    if (pass_.heads != nullptr) {
      downloads.Read(lease.At<float>(heads_at_), heads() * tokens() * kFloat, pass_.heads);
    }
    for (const DeviceRows& each : rows_) {
      if (each.writes_in_place) continue;
      downloads.ReadTensor(lease.At<void>(each.out_at), each.rows->destination,
                           LayoutOf(each.rows->destination));
    }
    if (absl::Status status = downloads.Finish(); !status.ok()) return status;
    const auto read = [&](int64_t offset, size_t bytes, void* to) {
      std::memcpy(to, results.data() + (offset - results_at_), bytes);
    };
    SaliencyFlags flags;
    read(results_at_, sizeof(flags), &flags);
    if (absl::Status status = StatusOf(flags, pass_.saliency, bad); !status.ok()) return status;
    RowSums sums;
    read(sums_at_, sizeof(sums), &sums);
    *pass_.sums = {sums.all.total, sums.all.sum_s_log_s, sums.all.sum_squares, sums.top_mass};
    read(positions_at_, static_cast<size_t>(selections() * pass_.keep) * sizeof(int32_t),
         pass_.positions);
    return absl::OkStatus();
  }

  const LayerPass& pass_;
  const int device_;
  Parts parts_;
  const SaliencyInputs inputs_;
  const int64_t results_at_, sums_at_, positions_at_, results_end_;
  const int64_t heads_at_, sum_at_, sums_parts_at_, smoothed_at_;
  std::vector<DeviceRows> rows_;
};

// The same with the keys, and their rows, where they were staged.
LayerPass OnStaged(const LayerPass& pass, const Staged& staged) {
  LayerPass moved = pass;
  const TensorView& from = pass.saliency.keys;
  moved.saliency.keys = TensorView::Dense(staged.data(), from.dtype, LayoutOf(from), from.heads,
                                          from.tokens, from.dim);
  for (LayerPass::Rows& rows : moved.rows) {
    if (!IsOfKeys(pass, rows)) continue;
    const int64_t heads = rows.source.heads;
    rows.source = moved.saliency.keys;
    rows.source.data = HeadOf(rows.source, rows.first_head);
    rows.source.heads = heads;
  }
  return moved;
}

// ABORTED where what was staged is gone. `left`: indices of the pass's rows.
absl::Status RunPass(Devices& devices, const LayerPass& pass, Staged* staged, BadStatistic* bad,
                     std::vector<size_t>* left) {
  const absl::StatusOr<Place> keys_at = devices.PlaceOf(pass.saliency.keys.data);
  if (!keys_at.ok()) return keys_at.status();
  std::vector<std::pair<Place, Place>> places;
  int device = keys_at->device;
  for (const LayerPass::Rows& rows : pass.rows) {
    const absl::StatusOr<Place> from = devices.PlaceOf(rows.source.data);
    if (!from.ok()) return from.status();
    const absl::StatusOr<Place> to = devices.PlaceOf(rows.destination.data);
    if (!to.ok()) return to.status();
    places.emplace_back(*from, *to);
    for (const Place& place : {*from, *to}) {
      if (place.on_device() && device >= 0 && place.device != device) {
        if (staged != nullptr) return absl::AbortedError("another tensor lies on another GPU");
        return absl::InvalidArgumentError(
            absl::StrCat("tensors of a layer lie in the memory of GPU ", device, " and of GPU ",
                         place.device, "; all must lie in that of the same"));
      }
      device = std::max(device, place.device);
    }
  }
  if (device < 0 && pass.resident != nullptr) device = pass.resident->gpu();
  LayerCall call(pass, *keys_at, device);
  for (size_t i = 0; i < pass.rows.size(); ++i) {
    if (!call.Take(pass.rows[i], places[i].first, places[i].second)) left->push_back(i);
  }
  return call.Run(devices, staged, bad);
}

}  // namespace

absl::Status RunLayer(Devices& devices, const LayerPass& pass, BadStatistic* bad,
                      std::vector<const LayerPass::Rows*>* left) {
  if (pass.saliency.keys.heads > kMaxKvHeads) {
    return absl::UnimplementedError(
        absl::StrCat("a layer of ", pass.saliency.keys.heads, " KV heads"));
  }
  absl::Status status = absl::AbortedError("nothing is staged");
  std::vector<size_t> rows;
  if (pass.staged != nullptr) {
    auto* const staged = static_cast<Staged*>(pass.staged);
    status = RunPass(devices, OnStaged(pass, *staged), staged, bad, &rows);
  }
  if (absl::IsAborted(status)) {
    rows.clear();
    status = RunPass(devices, pass, /*staged=*/nullptr, bad, &rows);
  }
  for (const size_t each : rows) left->push_back(&pass.rows[each]);
  return status;
}

}  // namespace structkv::cuda
