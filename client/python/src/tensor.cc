#include "tensor.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "error.h"
#include "prompt.h"

namespace structkv::python {
namespace {

using Code = nb::dlpack::dtype_code;

constexpr nb::dlpack::dtype DType(Code code, uint8_t bits) {
  return {static_cast<uint8_t>(code), bits, 1};
}

const Element kElements[] = {
    {"f32", "f", DType(Code::Float, 32)},
    {"f16", "e", DType(Code::Float, 16)},
    {"bf16", "H", DType(Code::Bfloat, 16)},
    {"f8_e4m3", "B", DType(Code::Float8_E4M3FN, 8)},
    {"f8_e5m2", "B", DType(Code::Float8_E5M2, 8)},
    {"i32", "i", DType(Code::Int, 32)},
    {"u8", "B", DType(Code::UInt, 8)},
};

std::string NameOf(nb::dlpack::dtype dtype) {
  for (const Element& element : kElements) {
    if (element.dtype == dtype) return element.name;
  }
  static constexpr const char* kKinds[] = {"int", "uint", "float"};
  const char* kind = dtype.code < 3 ? kKinds[dtype.code] : "type ";
  return absl::StrCat(kind, dtype.code < 3 ? "" : absl::StrCat(dtype.code, " of "), dtype.bits,
                      dtype.code < 3 ? "" : " bits");
}

int64_t Count(const Shape& shape) {
  int64_t count = 1;
  for (const int64_t axis : shape) count *= axis;
  return count;
}

bool IsInteger(nb::dlpack::dtype dtype) {
  return dtype.code == static_cast<uint8_t>(Code::Int) ||
         dtype.code == static_cast<uint8_t>(Code::UInt);
}

[[noreturn]] void Refuse(const Expected& expected, const std::string& what) {
  const std::string wanted = expected.shape.has_value()
                                 ? absl::StrCat(expected.element.name, " ", Text(*expected.shape))
                                 : "a tensor";
  Throw(absl::InvalidArgumentError(
      absl::StrCat(expected.name, ": ", what, "; ", wanted, " on the CPU, dense, is expected")));
}

std::string SaidBy(nb::handle object, const nb::python_error& error) {
  return absl::StrCat(nb::cast<std::string>(nb::str(object.type())), ": ",
                      nb::cast<std::string>(nb::str(error.value())));
}

// Why the object itself says that it cannot be taken.
std::string Reason(nb::handle object) {
  const std::string type = nb::cast<std::string>(nb::str(object.type()));
  std::string reason = absl::StrCat(type, " has neither DLPack nor the buffer protocol");
  if (!nb::hasattr(object, "__dlpack__")) return reason;
  try {
    object.attr("__dlpack__")();
  } catch (nb::python_error& error) {
    return SaidBy(object, error);
  }
  return reason;
}

// Whether the object says that it is in a GPU's memory.
bool IsOnGpu(nb::handle object) {
  if (!nb::hasattr(object, "__dlpack_device__")) return false;
  try {
    return nb::cast<int>(object.attr("__dlpack_device__")()[0]) == nb::device::cuda::value;
  } catch (nb::python_error&) {
    return false;
  } catch (nb::cast_error&) {
    return false;
  }
}

// Of an object on a GPU. No stream is made to wait: nothing is queued on any here.
nb::object Capsule(nb::handle object, const Expected& expected) {
  try {
    return object.attr("__dlpack__")(nb::arg("stream") = -1);
  } catch (nb::python_error& error) {
    Refuse(expected, SaidBy(object, error));
  }
}

// What numpy cannot export (the types of ml_dtypes) by its bits.
nb::object Bits(nb::handle object) {
  try {
    return object.attr("view")(
        nb::str(absl::StrCat("u", nb::cast<int>(object.attr("dtype").attr("itemsize"))).c_str()));
  } catch (nb::python_error&) {
    return nb::none();
  } catch (nb::cast_error&) {
    return nb::none();
  }
}

template <typename Array>
Array Import(nb::handle object, const Expected& expected) {
  Array array;
  if (IsOnGpu(object)) {
    if (nb::try_cast<Array>(Capsule(object, expected), array, /*convert=*/false)) return array;
    Refuse(expected, Reason(object));
  }
  if (nb::try_cast<Array>(object, array, /*convert=*/false)) return array;
  const nb::object bits = Bits(object);
  if (!bits.is_none() && nb::try_cast<Array>(bits, array, /*convert=*/false)) return array;
  nb::ndarray<nb::ro> readable;
  if (nb::try_cast<nb::ndarray<nb::ro>>(object, readable, /*convert=*/false)) {
    Refuse(expected, absl::StrCat(nb::cast<std::string>(nb::str(object.type())), " is read-only"));
  }
  Refuse(expected, Reason(object));
}

// The number of its GPU; nullopt: it is on the CPU.
template <typename Array>
std::optional<int> GpuOf(const Array& array, const Expected& expected, const std::string& what) {
  const int device = array.device_type();
  if (device == nb::device::cpu::value || device == nb::device::cuda_host::value) {
    return std::nullopt;
  }
  if (device == nb::device::cuda::value) return array.device_id();
  Refuse(expected, absl::StrCat(what, " on a device (DLPack type ", device,
                                ") cannot be taken from where it is: copy it to the host"));
}

template <typename Array>
Shape DenseShape(const Array& array, const Expected& expected) {
  Shape shape;
  int64_t dense = 1;
  bool is_dense = true;
  for (size_t i = array.ndim(); i-- > 0;) {
    const auto axis = static_cast<int64_t>(array.shape(i));
    is_dense &= axis == 1 || array.stride(i) == dense;
    dense *= axis;
    shape.insert(shape.begin(), axis);
  }
  if (dense == 0 || is_dense) return shape;
  Shape strides;
  for (size_t i = 0; i < array.ndim(); ++i) strides.push_back(array.stride(i));
  Refuse(expected, absl::StrCat(NameOf(array.dtype()), " ", Text(shape), " has the strides ",
                                Text(strides), ", in elements"));
}

// Whether it is of the expected type and shape.
bool Fits(nb::dlpack::dtype dtype, Shape shape, size_t nbytes, const Expected& expected) {
  if (!expected.shape.has_value()) return true;
  const size_t bytes = expected.element.bytes() * static_cast<size_t>(Count(*expected.shape));
  if (dtype == Byte().dtype && shape.size() == 1 && nbytes == bytes) return true;
  const bool bits = IsInteger(dtype) && !IsInteger(expected.element.dtype);
  const bool same = dtype == expected.element.dtype ||
                    (bits && dtype.bits == expected.element.dtype.bits && dtype.lanes == 1);
  while (shape.size() > expected.shape->size() && shape.front() == 1) shape.erase(shape.begin());
  return same && shape == *expected.shape;
}

// The number of its GPU; nullopt: it is on the CPU.
template <typename Array>
std::optional<int> CheckArray(const Array& array, const Expected& expected) {
  const Shape shape = DenseShape(array, expected);
  const std::string what = absl::StrCat(NameOf(array.dtype()), " ", Text(shape));
  const std::optional<int> gpu = GpuOf(array, expected, what);
  const std::string where = gpu.has_value() ? absl::StrCat(" on ", DeviceName(gpu)) : "";
  if (!Fits(array.dtype(), shape, array.nbytes(), expected)) {
    Refuse(expected, absl::StrCat(what, where, " came"));
  }
  if (!gpu.has_value()) return std::nullopt;
  const std::string why =
      expected.gpu
          ? expected.gpu({static_cast<const std::byte*>(array.data()), array.nbytes()}, *gpu)
          : "copy it to the host";
  if (why.empty()) return gpu;
  Throw(absl::InvalidArgumentError(absl::StrCat(expected.name, ": ", what, where, " came; ", why)));
}

}  // namespace

std::string Text(const Shape& shape) { return absl::StrCat("[", absl::StrJoin(shape, ", "), "]"); }

const Element& ElementOf(v1::DType dtype) {
  switch (dtype) {
    case v1::DTYPE_F16:
      return kElements[1];
    case v1::DTYPE_BF16:
      return kElements[2];
    case v1::DTYPE_F8_E4M3:
      return kElements[3];
    case v1::DTYPE_F8_E5M2:
      return kElements[4];
    default:
      return Float32();
  }
}

const Element& ElementOf(const std::string& name) {
  std::vector<std::string> names;
  for (const Element& element : kElements) {
    if (element.name == name) return element;
    names.emplace_back(element.name);
  }
  Throw(absl::InvalidArgumentError(
      absl::StrCat("dtype is '", name, "'; one of ", absl::StrJoin(names, ", "), " is expected")));
}

const Element& Float32() { return kElements[0]; }
const Element& Int32() { return kElements[5]; }
const Element& Byte() { return kElements[6]; }

absl::Span<const std::byte> Arguments::Take(nb::handle object, const Expected& expected) {
  gpu_.reset();
  if (object.is_none()) return {};
  auto array = Import<nb::ndarray<nb::ro>>(object, expected);
  gpu_ = CheckArray(array, expected);
  const absl::Span<const std::byte> bytes(static_cast<const std::byte*>(array.data()),
                                          array.nbytes());
  arrays_.push_back(std::move(array));
  return bytes;
}

absl::Span<std::byte> Arguments::TakeWritable(nb::handle object, const Expected& expected) {
  auto array = Import<nb::ndarray<>>(object, expected);
  CheckArray(array, expected);
  const absl::Span<std::byte> bytes(static_cast<std::byte*>(array.data()), array.nbytes());
  arrays_.emplace_back(std::move(array));
  return bytes;
}

std::shared_ptr<const void> Arguments::Owner() && {
  if (arrays_.empty()) return nullptr;
  return {new std::vector(std::move(arrays_)),
          [](auto* arrays) { Post([arrays] { delete arrays; }); }};
}

}  // namespace structkv::python
