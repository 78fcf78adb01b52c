#include "kernels/cuda/vector_calls.h"

#include <algorithm>
#include <vector>

#include "kernels/cuda/downloads.h"
#include "kernels/cuda/staging.h"
#include "kernels/cuda/vector_launches.h"

namespace structkv::cuda {
namespace {

constexpr int64_t kFloat = sizeof(float);

// A lease for a selection of `row`: the parts, and after them its scratch memory.
absl::StatusOr<Lease> AcquireForSelect(Devices& devices, const SelectRow& row, const Parts& parts) {
  return devices.Acquire(
      [&](const Device& device) { return parts.bytes() + SelectScratch(device, &row, 1); });
}

}  // namespace

Smoothing SmoothingOf(Pooling pooling) {
  switch (pooling) {
    case Pooling::kAvg:
      return Smoothing::kMean;
    case Pooling::kMax:
      return Smoothing::kMaximum;
    case Pooling::kNone:
      break;
  }
  return Smoothing::kNone;
}

absl::Status SumHeads(Devices& devices, const float* per_head, int64_t heads, int64_t tokens,
                      float* out) {
  Parts parts;
  const int64_t values = parts.Add<float>(heads * tokens);
  const int64_t sum = parts.Add<float>(tokens);
  absl::StatusOr<Lease> lease = devices.Acquire(parts.bytes());
  if (!lease.ok()) return lease.status();
  Upload upload(*lease);
  upload.Write(lease->At<float>(values), per_head, heads * tokens);
  absl::Status status = upload.Flush();
  if (status.ok()) {
    status = RunStatistics(*lease, {.values = lease->At<float>(values),
                                    .heads = heads,
                                    .tokens = tokens,
                                    .sum = lease->At<float>(sum)});
  }
  return status.ok() ? Download(*lease, lease->At<float>(sum), tokens * kFloat, out) : status;
}

absl::StatusOr<std::optional<BadStatistic>> FindBad(Devices& devices, const float* values,
                                                    int64_t heads, int64_t tokens) {
  Parts parts;
  const int64_t all = parts.Add<float>(heads * tokens);
  const int64_t bad = parts.Add<uint64_t>(1);
  absl::StatusOr<Lease> lease = devices.Acquire(parts.bytes());
  if (!lease.ok()) return lease.status();
  uint64_t found = kNoBad;
  Upload upload(*lease);
  upload.Write(lease->At<float>(all), values, heads * tokens);
  upload.Write(lease->At<uint64_t>(bad), &found, 1);
  absl::Status status = upload.Flush();
  if (status.ok()) {
    status = RunStatistics(*lease, {.values = lease->At<float>(all),
                                    .heads = heads,
                                    .tokens = tokens,
                                    .bad = lease->At<uint64_t>(bad)});
  }
  if (status.ok()) status = Download(*lease, lease->At<uint64_t>(bad), sizeof(found), &found);
  if (!status.ok()) return status;
  if (found == kNoBad) return std::nullopt;
  const int64_t head = PlaceHead(found);
  const int64_t token = PlaceToken(found);
  return BadStatistic{head, token, values[head * tokens + token]};
}

absl::Status Pool(Devices& devices, const float* in, int64_t tokens, Pooling pooling,
                  int64_t kernel, float* out) {
  Parts parts;
  const int64_t from = parts.Add<float>(tokens);
  const int64_t to = parts.Add<float>(tokens);
  absl::StatusOr<Lease> lease = devices.Acquire(parts.bytes());
  if (!lease.ok()) return lease.status();
  Upload upload(*lease);
  upload.Write(lease->At<float>(from), in, tokens);
  absl::Status status = upload.Flush();
  if (status.ok()) {
    status = lease->device().Check(LaunchPool({.in = lease->At<float>(from),
                                               .out = lease->At<float>(to),
                                               .rows = 1,
                                               .tokens = tokens,
                                               .row_stride = tokens,
                                               .smoothing = SmoothingOf(pooling),
                                               .kernel = kernel},
                                              lease->stream()),
                                   "LaunchPool");
  }
  return status.ok() ? Download(*lease, lease->At<float>(to), tokens * kFloat, out) : status;
}

absl::StatusOr<SaliencySums> Sums(Devices& devices, const float* scores, int64_t tokens,
                                  int64_t top_count) {
  Parts parts;
  const int64_t values = parts.Add<float>(tokens);
  const int64_t tiles = parts.Add<SumsPart>(SumsParts(tokens));
  const int64_t sums = parts.Add<RowSums>(1);
  SelectRow row = {.tokens = tokens, .top_count = std::clamp<int64_t>(top_count, 0, tokens)};
  absl::StatusOr<Lease> lease = AcquireForSelect(devices, row, parts);
  if (!lease.ok()) return lease.status();
  row.scores = lease->At<float>(values);
  row.parts = lease->At<SumsPart>(tiles);
  row.sums = lease->At<RowSums>(sums);
  Upload upload(*lease);
  upload.Write(lease->At<float>(values), scores, tokens);
  absl::Status status = upload.Flush();
  if (status.ok()) {
    status = RunStatistics(
        *lease,
        {.values = row.scores, .heads = 1, .tokens = tokens, .parts = lease->At<SumsPart>(tiles)});
  }
  if (status.ok()) status = RunSelect(*lease, &row, 1, lease->At<void>(parts.bytes()));
  RowSums got;
  if (status.ok()) status = Download(*lease, row.sums, sizeof(got), &got);
  if (!status.ok()) return status;
  return SaliencySums{got.all.total, got.all.sum_s_log_s, got.all.sum_squares, got.top_mass};
}

absl::Status Accumulate(Devices& devices, float decay, const float* saliency, float* centrality,
                        int64_t tokens) {
  Parts parts;
  const int64_t values = parts.Add<float>(tokens);
  const int64_t sum = parts.Add<float>(tokens);
  absl::StatusOr<Lease> lease = devices.Acquire(parts.bytes());
  if (!lease.ok()) return lease.status();
  Upload upload(*lease);
  upload.Write(lease->At<float>(values), saliency, tokens);
  upload.Write<float>(lease->At<float>(sum), centrality, tokens);
  absl::Status status = upload.Flush();
  if (status.ok()) {
    status = RunAccumulate(*lease, decay, lease->At<float>(values), lease->At<float>(sum), tokens);
  }
  // Whoever does it instead finds `centrality` as it was.
  std::vector<float> whole(static_cast<size_t>(tokens));
  if (status.ok()) status = Download(*lease, lease->At<float>(sum), tokens * kFloat, whole.data());
  if (status.ok()) std::copy(whole.begin(), whole.end(), centrality);
  return status;
}

absl::Status Select(Devices& devices, const structkv::SelectParams& params, int32_t* positions) {
  Parts parts;
  const int64_t scores = parts.Add<float>(params.tokens);
  const int64_t kept = parts.Add<int32_t>(params.keep);
  SelectRow row = {.tokens = params.tokens, .window = params.window, .keep = params.keep};
  absl::StatusOr<Lease> lease = AcquireForSelect(devices, row, parts);
  if (!lease.ok()) return lease.status();
  row.scores = lease->At<float>(scores);
  row.positions = lease->At<int32_t>(kept);
  Upload upload(*lease);
  upload.Write(lease->At<float>(scores), params.scores, params.tokens);
  if (absl::Status status = upload.Flush(); !status.ok()) return status;
  return SelectToHost(*lease, row, lease->At<void>(parts.bytes()), positions);
}

}  // namespace structkv::cuda
