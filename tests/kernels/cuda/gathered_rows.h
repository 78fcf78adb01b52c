// Rows of a tensor that the CUDA kernels and the reference gather, and what they make of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/gather_plan.h"
#include "tests/kernels/paged_tensor.h"
#include "tests/kernels/random_tensor.h"

namespace structkv::testing {

// A tensor, the rows of it that are kept, and where they go.
struct GatherShape {
  DType dtype = DType::kBF16;
  int64_t heads = 3;
  int64_t tokens = 90;
  int64_t dim = 64;
  int64_t kept = 37;
  bool per_head = false;
  Layout layout = Layout::kHeadTokenDim;
  int64_t block_tokens = 0;  // 0: dense
  Layout to_layout = Layout::kHeadTokenDim;
  int64_t to_block_tokens = 0;
  // Bytes beyond a boundary of 16, of dense sources and of the destination.
  int64_t misalign = 0;
  int64_t to_misalign = 0;
  int64_t row_dim = 0;  // elements that a row has in the source; 0: dim

  std::string Text() const;
};

// Random rows of a shape, and room for what is gathered of them, which is not written yet.
class GatheredRows {
 public:
  GatheredRows(const GatherShape& shape, std::mt19937_64& random);

  // Points into this.
  cuda::GatherJob job();
  // The positions of the kept rows, as the job's.
  const std::vector<int32_t>& positions() const { return positions_; }
  Tensor& dense() { return dense_; }
  // What the job has written.
  TensorView gathered() const { return View(got_); }

  // Fail where the job, or the job with `rotation`, has not written what the reference does, or
  // anything around it.
  void Expect(const Backend& reference);
  void ExpectMoved(const Backend& reference, const RotationParams& rotation);

 private:
  TensorView source() const;
  MutableTensorView To(std::vector<std::byte>& bytes) const;
  TensorView View(const std::vector<std::byte>& bytes) const;

  const GatherShape shape_;
  Tensor dense_;
  std::optional<PagedTensor> paged_;
  std::vector<int32_t> positions_;
  std::vector<std::byte> got_, want_;
};

}  // namespace structkv::testing
