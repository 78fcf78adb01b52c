#include "kernels/cpu/cpu_backend.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <optional>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/gather.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/rotate.h"
#include "kernels/cpu/saliency.h"
#include "kernels/cpu/scratch_pool.h"
#include "kernels/saliency_checks.h"

namespace structkv::cpu {
namespace {

// Elements that one task of a vector operation takes.
constexpr int64_t kBlockTokens = 16384;
// Scratch memory that is kept for the next call.
constexpr size_t kIdleScratchBytes = size_t{64} << 20;

int64_t Blocks(int64_t tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }
int64_t BlockSize(int64_t block, int64_t tokens) {
  return std::min(kBlockTokens, tokens - block * kBlockTokens);
}

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const KernelTable& table) : table_(table) {}

  std::string_view name() const override { return "cpu"; }
  std::string device() const override { return std::string(table_.device); }
  const BackendCapabilities& capabilities() const override { return capabilities_; }

  bool KeepsHalfWeights(const SaliencyParams& params) const override {
    return cpu::KeepsHalfWeights(table_, params);
  }

  int64_t SaliencyScratchBytes(const SaliencyParams& params) const override {
    return cpu::SaliencyScratchBytes(table_, params);
  }

  absl::Status Saliency(const SaliencyParams& params, float* out, BadStatistic* bad,
                        ParallelFor parallel) const override {
    if (absl::Status status = CheckSaliencyParams(params, capabilities_); !status.ok()) {
      return status;
    }
    return cpu::Saliency(table_, params, &scratch_, out, bad, parallel);
  }

  void SumHeads(const float* per_head, int64_t heads, int64_t tokens, float* out,
                ParallelFor parallel) const override {
    parallel(Blocks(tokens), [&](int64_t block) {
      const int64_t begin = block * kBlockTokens;
      table_.sum_heads(per_head + begin, heads, tokens, BlockSize(block, tokens), out + begin);
    });
  }

  std::optional<BadStatistic> FindBad(const float* values, int64_t heads, int64_t tokens,
                                      ParallelFor parallel) const override {
    std::vector<std::optional<BadStatistic>> found(Blocks(tokens));
    parallel(Blocks(tokens), [&](int64_t block) {
      const int64_t begin = block * kBlockTokens;
      for (int64_t h = 0; h < heads; ++h) {
        const float* row = values + h * tokens;
        const int64_t index = table_.find_bad(row + begin, BlockSize(block, tokens));
        if (index < 0 || (found[block] && found[block]->token <= begin + index)) continue;
        found[block] = BadStatistic{h, begin + index, row[begin + index]};
      }
    });
    for (const auto& each : found) {
      if (each) return each;
    }
    return std::nullopt;
  }

  void Pool(const float* in, int64_t tokens, Pooling pooling, int64_t kernel,
            float* out) const override {
    const int64_t half = kernel / 2;
    if (pooling == Pooling::kNone || kernel == 1) {
      std::copy(in, in + tokens, out);
      return;
    }
    const bool maximum = pooling == Pooling::kMax;
    const float factor = maximum ? 1.0F : 1.0F / static_cast<float>(kernel);
    // Up to here, and from here on, the kernel hangs over an edge.
    const int64_t begin = std::min(half, tokens);
    const int64_t end = std::max(begin, tokens - half);
    for (int64_t j = 0; j < tokens; ++j) {
      if (j == begin && begin < end) j = end;
      if (j == tokens) break;
      const int64_t from = std::max<int64_t>(0, j - half);
      const int64_t to = std::min(tokens, j + half + 1);
      table_.slide(in + from, 1, to - from, maximum, factor, out + j);
    }
    table_.slide(in, end - begin, kernel, maximum, factor, out + begin);
  }

  SaliencySums Sums(const float* scores, int64_t tokens, int64_t top_count,
                    ParallelFor parallel) const override {
    const int64_t blocks = Blocks(tokens);
    std::vector<SumsBlock> parts(blocks);
    TopCut cut;
    // The cut is a task of its own, beside the sums.
    parallel(blocks + 1, [&](int64_t task) {
      if (task == 0) {
        cut = table_.find_cut(scores, tokens, std::clamp<int64_t>(top_count, 0, tokens));
      } else {
        const int64_t block = task - 1;
        parts[block] = table_.sums(scores + block * kBlockTokens, BlockSize(block, tokens));
      }
    });
    SaliencySums sums;
    for (int64_t block = 0; block < blocks; ++block) {
      sums.total += parts[block].total;
      sums.sum_s_log_s += parts[block].sum_s_log_s;
      sums.sum_squares += parts[block].sum_squares;
      if (cut.above > 0) {
        sums.top_mass += table_.sum_above(scores + block * kBlockTokens, BlockSize(block, tokens),
                                          cut.threshold);
      }
    }
    if (cut.ties > 0) {
      sums.top_mass += static_cast<double>(cut.ties) * table_.key_value(cut.threshold);
    }
    return sums;
  }

  void Accumulate(float decay, const float* saliency, float* centrality, int64_t tokens,
                  ParallelFor parallel) const override {
    parallel(Blocks(tokens), [&](int64_t block) {
      const int64_t begin = block * kBlockTokens;
      table_.accumulate(decay, saliency + begin, centrality + begin, BlockSize(block, tokens));
    });
  }

  void Select(const SelectParams& params, int32_t* positions) const override {
    const int64_t others = params.tokens - params.window;
    const int64_t best = params.keep - params.window;
    if (best == others) {
      std::iota(positions, positions + params.keep, 0);
      return;
    }
    if (best > 0) {
      const TopCut cut = table_.find_cut(params.scores, others, best);
      table_.collect(params.scores, others, cut, positions);
    }
    std::iota(positions + best, positions + params.keep, static_cast<int32_t>(others));
  }

  absl::Status Gather(const TensorView& source, const int32_t* positions, bool per_head,
                      const MutableTensorView& destination, ParallelFor parallel) const override {
    cpu::Gather(table_, source, positions, per_head, destination, parallel);
    return absl::OkStatus();
  }

  absl::Status GatherRotated(const TensorView& source, const int32_t* rows, bool per_head,
                             const RotationParams& rotation, const MutableTensorView& destination,
                             ParallelFor parallel) const override {
    cpu::GatherRotated(table_, source, rows, per_head, rotation, destination, parallel);
    return absl::OkStatus();
  }

 private:
  const KernelTable& table_;
  mutable ScratchPool scratch_{kIdleScratchBytes};
  const BackendCapabilities capabilities_ = {
      .dtypes = {DType::kF32, DType::kF16, DType::kBF16, DType::kF8E4M3, DType::kF8E5M2},
      .layouts = {Layout::kHeadTokenDim, Layout::kTokenHeadDim},
      .paged = true,
  };
};

}  // namespace

std::vector<std::string_view> CpuTargets() {
  std::vector<std::string_view> names;
  for (const KernelTable& table : SupportedTables()) names.push_back(table.name);
  return names;
}

absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(const CpuOptions& options) {
  std::string_view target = options.target;
  if (target.empty()) {
    const char* from_environment = std::getenv("STRUCTKV_CPU_TARGET");
    if (from_environment != nullptr) target = from_environment;
  }
  std::string known;
  for (const KernelTable& table : SupportedTables()) {
    if (target.empty() || table.name == target) return std::make_unique<CpuBackend>(table);
    known.append(known.empty() ? "" : ", ").append(table.name);
  }
  return absl::NotFoundError(
      absl::StrCat("cpu target: \"", std::string(target), "\" is not one of ", known));
}

}  // namespace structkv::cpu
