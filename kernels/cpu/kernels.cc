// The kernels of every instruction set, and the tables of those that this machine can run.
#include <algorithm>
#include <vector>

#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/scores_avx512_bf16.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/kernels.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "kernels/cpu/gather-inl.h"
#include "kernels/cpu/rotate-inl.h"
#include "kernels/cpu/scores-inl.h"
#include "kernels/cpu/select-inl.h"
#include "kernels/cpu/softmax-inl.h"
#include "kernels/cpu/vector_ops-inl.h"

HWY_BEFORE_NAMESPACE();
namespace structkv::cpu::HWY_NAMESPACE {

KernelTable Table(std::string_view name, std::string_view device) {
  constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(hn::ScalableTag<float>()));
  return {
      .name = name,
      .device = device,
      .row_multiple = std::max<int64_t>(kLanes, 8),
      .to_f32 = &ToF32,
      .scores = &Scores,
      .copy_keys = &CopyKeys,
      .row_max = &RowMax,
      .exponentiate = &Exponentiate,
      .to_half = &ToHalf,
      .weigh_rows = &WeighRows,
      .weigh_half_rows = &WeighHalfRows,
      .tile_weights = &TileWeights,
      .sum_heads = &SumHeads,
      .find_bad = &FindBad,
      .accumulate = &Accumulate,
      .slide = &Slide,
      .sums = &Sums,
      .find_cut = &FindCut,
      .key_value = &KeyToValue,
      .sum_above = &SumAbove,
      .collect = &Collect,
      .copy_rows = &CopyRowsTo,
      .rotary_angles = &FillRotaryAngles,
      .rotate_row = &RotateRowTo,
  };
}

}  // namespace structkv::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace structkv::cpu {
namespace {

std::vector<KernelTable> MakeTables() {
  [[maybe_unused]] const int64_t supported = hwy::SupportedTargets();
  std::vector<KernelTable> tables;
#if HWY_TARGETS & HWY_AVX3
  if ((supported & HWY_AVX3) != 0 && HaveAvx512Bf16()) {
    KernelTable table = N_AVX3::Table("avx3_bf16", "AVX-512 BF16");
    table.bf16_scores = &ScoresAvx512Bf16;
    table.bf16_exponentials = &ExponentialsAvx512Bf16;
    table.bf16_half_exponentials = &HalfExponentialsAvx512Bf16;
    table.fp8_to_bf16 = &Fp8ToBf16Avx512;
    tables.push_back(table);
  }
#endif
#if HWY_TARGETS & HWY_AVX3_DL
  if ((supported & HWY_AVX3_DL) != 0) {
    tables.push_back(N_AVX3_DL::Table("avx3_dl", "AVX-512 (Ice Lake)"));
  }
#endif
#if HWY_TARGETS & HWY_AVX3
  if ((supported & HWY_AVX3) != 0) tables.push_back(N_AVX3::Table("avx3", "AVX-512"));
#endif
#if HWY_TARGETS & HWY_AVX2
  if ((supported & HWY_AVX2) != 0) tables.push_back(N_AVX2::Table("avx2", "AVX2"));
#endif
#if HWY_TARGETS & HWY_SSE4
  if ((supported & HWY_SSE4) != 0) tables.push_back(N_SSE4::Table("sse4", "SSE4"));
#endif
  tables.push_back(HWY_STATIC_DISPATCH(Table)("baseline", "baseline"));
  return tables;
}

}  // namespace

absl::Span<const KernelTable> SupportedTables() {
  static const std::vector<KernelTable>* tables = new std::vector<KernelTable>(MakeTables());
  return *tables;
}

}  // namespace structkv::cpu
#endif  // HWY_ONCE
