#include "tensor.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "error.h"

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

std::string Text(const Shape& shape) { return absl::StrCat("[", absl::StrJoin(shape, ", "), "]"); }

std::string Text(nb::dlpack::dtype dtype) {
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

// Why the object itself says that it cannot be taken.
std::string Reason(nb::handle object) {
  const std::string type = nb::cast<std::string>(nb::str(object.type()));
  std::string reason = absl::StrCat(type, " has neither DLPack nor the buffer protocol");
  if (!nb::hasattr(object, "__dlpack__")) return reason;
  try {
    object.attr("__dlpack__")();
  } catch (nb::python_error& error) {
    return absl::StrCat(type, ": ", nb::cast<std::string>(nb::str(error.value())));
  }
  return reason;
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
  if (nb::try_cast<Array>(object, array, /*convert=*/false)) return array;
  const nb::object bits = Bits(object);
  if (!bits.is_none() && nb::try_cast<Array>(bits, array, /*convert=*/false)) return array;
  Refuse(expected, Reason(object));
}

template <typename Array>
void CheckArray(const Array& array, const Expected& expected) {
  const int device = array.device_type();
  if (device != nb::device::cpu::value && device != nb::device::cuda_host::value) {
    Refuse(expected, absl::StrCat("a tensor on a device (DLPack type ", device,
                                  ") cannot be sent from where it is: copy it to the host"));
  }
  Shape shape;
  int64_t dense = 1;
  bool is_dense = true;
  for (size_t i = array.ndim(); i-- > 0;) {
    const auto axis = static_cast<int64_t>(array.shape(i));
    is_dense &= axis == 1 || array.stride(i) == dense;
    dense *= axis;
    shape.insert(shape.begin(), axis);
  }
  const nb::dlpack::dtype dtype = array.dtype();
  const std::string what = absl::StrCat(Text(dtype), " ", Text(shape));
  if (dense > 0 && !is_dense) {
    Shape strides;
    for (size_t i = 0; i < array.ndim(); ++i) strides.push_back(array.stride(i));
    Refuse(expected, absl::StrCat(what, " has the strides ", Text(strides), ", in elements"));
  }
  if (!expected.shape.has_value()) return;
  const size_t bytes = expected.element.bytes() * static_cast<size_t>(Count(*expected.shape));
  if (dtype == Byte().dtype && shape.size() == 1 && array.nbytes() == bytes) return;
  const bool bits = IsInteger(dtype) && !IsInteger(expected.element.dtype);
  const bool same = dtype == expected.element.dtype ||
                    (bits && dtype.bits == expected.element.dtype.bits && dtype.lanes == 1);
  while (shape.size() > expected.shape->size() && shape.front() == 1) shape.erase(shape.begin());
  if (!same || shape != *expected.shape) Refuse(expected, absl::StrCat(what, " came"));
}

}  // namespace

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
  if (object.is_none()) return {};
  auto array = Import<nb::ndarray<nb::ro>>(object, expected);
  CheckArray(array, expected);
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

Tensor::Tensor(const client::Bytes& bytes, const Element& type, Shape dims)
    : memory(bytes.span()),
      owner(bytes.owner()),
      element(type),
      shape(std::move(dims)),
      strides(shape.size()) {
  auto stride = static_cast<int64_t>(element.bytes());
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i];
  }
}

nb::object TensorOrNone(const client::Bytes& bytes, const Element& element, Shape shape) {
  if (bytes.empty()) return nb::none();
  // What has no plain shape (rows arranged for several decode ranks) is one axis.
  const size_t elements = bytes.size() / element.bytes();
  if (static_cast<size_t>(Count(shape)) != elements) shape = {static_cast<int64_t>(elements)};
  return nb::cast(Tensor(bytes, element, std::move(shape)));
}

namespace {

int GetBuffer(PyObject* object, Py_buffer* view, int /*flags*/) noexcept {
  auto& tensor = *nb::inst_ptr<Tensor>(object);
  static_assert(sizeof(Py_ssize_t) == sizeof(int64_t));
  *view = {};
  view->buf = tensor.memory.data();
  view->obj = Py_NewRef(object);
  view->len = static_cast<Py_ssize_t>(tensor.memory.size());
  view->itemsize = static_cast<Py_ssize_t>(tensor.element.bytes());
  view->format = const_cast<char*>(tensor.element.format);
  view->ndim = static_cast<int>(tensor.shape.size());
  view->shape = reinterpret_cast<Py_ssize_t*>(tensor.shape.data());
  view->strides = reinterpret_cast<Py_ssize_t*>(tensor.strides.data());
  return 0;
}

nb::object DLPack(nb::handle_t<Tensor> self, const nb::kwargs& arguments) {
  const auto& tensor = *nb::inst_ptr<Tensor>(self);
  const std::vector<size_t> shape(tensor.shape.begin(), tensor.shape.end());
  const nb::ndarray<nb::array_api> array(tensor.memory.data(), shape.size(), shape.data(), self,
                                         nullptr, tensor.element.dtype, nb::device::cpu::value);
  return nb::cast(array).attr("__dlpack__")(**arguments);
}

nb::object Numpy(nb::handle_t<Tensor> self) {
  const std::string name = nb::inst_ptr<Tensor>(self)->element.name;
  const nb::object array = nb::module_::import_("numpy").attr("asarray")(self);
  if (name != "bf16" && name.substr(0, 2) != "f8") return array;
  const char* type = name == "bf16"      ? "bfloat16"
                     : name == "f8_e4m3" ? "float8_e4m3fn"
                                         : "float8_e5m2";
  return array.attr("view")(nb::module_::import_("ml_dtypes").attr(type));
}

}  // namespace

void BindTensor(nb::module_& module) {
  static PyType_Slot slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(&GetBuffer)},
                                {0, nullptr}};
  nb::class_<Tensor>(
      module, "Tensor", nb::type_slots(slots), nb::is_weak_referenceable(),
      "Dense memory of the library, on the CPU: torch.from_dlpack(t), "
      "numpy.from_dlpack(t), numpy.asarray(t) and memoryview(t) see it without a "
      "copy and keep it alive. In a buffer bf16 is uint16 and fp8 uint8: their bits.")
      .def_prop_ro(
          "shape",
          [](const Tensor& self) {
            nb::list shape;
            for (const int64_t axis : self.shape) shape.append(axis);
            return nb::tuple(shape);
          },
          nb::sig("def shape(self) -> tuple[int, ...]"))
      .def_prop_ro(
          "dtype", [](const Tensor& self) { return std::string(self.element.name); },
          "'f32', 'f16', 'bf16', 'f8_e4m3', 'f8_e5m2', 'i32' or 'u8'.")
      .def_prop_ro(
          "nbytes", [](const Tensor& self) { return self.memory.size(); }, "Bytes of the memory.")
      .def("__dlpack__", &DLPack,
           nb::sig("def __dlpack__(self, **kwargs: typing.Any) -> typing_extensions.CapsuleType"))
      .def(
          "__dlpack_device__", [](const Tensor&) { return nb::make_tuple(1, 0); },
          nb::sig("def __dlpack_device__(self) -> tuple[int, int]"))
      .def("numpy", &Numpy, nb::sig("def numpy(self) -> typing.Any"),
           "A view as a numpy array; of bf16 and fp8 with the types of ml_dtypes.")
      .def("__repr__", [](const Tensor& self) {
        return absl::StrCat("structkv.Tensor(", self.element.name, ", ", Text(self.shape), ")");
      });
}

}  // namespace structkv::python
