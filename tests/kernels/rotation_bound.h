// How far keys that were moved may lie from the reference's, and frequencies to move them by.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/rotation.h"
#include "kernels/tensor.h"

namespace structkv::testing {

// theta^(-j / pairs)
std::vector<float> Frequencies(int64_t pairs, double theta);

// Half a unit in the last place, relative.
double UnitOf(DType dtype);

// Fails fatally where a rotated element is further from the wanted one than a rounding to another
// side and float32's arithmetic explain, or any other element differs.
void ExpectRotated(const RotationParams& rotation, const TensorView& got, const TensorView& want,
                   const std::string& what);

}  // namespace structkv::testing
