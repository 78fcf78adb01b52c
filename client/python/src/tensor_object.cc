// Memory of the library as Python sees it: structkv.Tensor.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "error.h"
#include "prompt.h"
#include "tensor.h"

namespace structkv::python {

Tensor::Tensor(const client::Bytes& bytes, const Element& type, Shape dims, std::optional<int> on)
    : memory(bytes.span()),
      owner(bytes.owner()),
      element(type),
      shape(std::move(dims)),
      strides(shape.size()),
      gpu(on) {
  auto stride = static_cast<int64_t>(element.bytes());
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i];
  }
}

nb::object TensorOrNone(const client::Bytes& bytes, const Element& element, Shape shape,
                        std::optional<int> gpu) {
  if (bytes.empty()) return nb::none();
  // What has no plain shape (rows arranged for several decode ranks) is one axis.
  const size_t elements = bytes.size() / element.bytes();
  size_t count = 1;
  for (const int64_t axis : shape) count *= static_cast<size_t>(axis);
  if (count != elements) shape = {static_cast<int64_t>(elements)};
  return nb::cast(Tensor(bytes, element, std::move(shape), gpu));
}

namespace {

// Sets BufferError: nothing of the host's may read it.
void RefuseHost(const Tensor& tensor, const char* what) {
  PyErr_SetString(
      PyExc_BufferError,
      absl::StrCat("structkv.Tensor on ", DeviceName(tensor.gpu), " has no ", what,
                   ": torch.from_dlpack() takes it where it is, and Region.read() copies it")
          .c_str());
}

int GetBuffer(PyObject* object, Py_buffer* view, int /*flags*/) noexcept {
  auto& tensor = *nb::inst_ptr<Tensor>(object);
  if (tensor.gpu.has_value()) {
    view->obj = nullptr;
    RefuseHost(tensor, "buffer");
    return -1;
  }
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

nb::tuple DLPackDevice(const Tensor& tensor) {
  if (!tensor.gpu.has_value()) return nb::make_tuple(nb::device::cpu::value, 0);
  return nb::make_tuple(nb::device::cuda::value, *tensor.gpu);
}

// What the array API lets a consumer say: none, -1, or a stream's address (1 and 2: the default
// ones). 0 would be either of these.
void CheckStream(nb::handle stream) {
  if (stream.is_none()) return;
  int64_t value = 0;
  if (nb::try_cast(stream, value, /*convert=*/false) && value != 0 && value >= -1) return;
  Throw(absl::InvalidArgumentError(
      absl::StrCat("__dlpack__: stream is ", nb::cast<std::string>(nb::repr(stream)),
                   "; None, -1 or a cudaStream_t other than 0 is expected")));
}

nb::object DLPack(nb::handle_t<Tensor> self, const nb::kwargs& arguments) {
  const auto& tensor = *nb::inst_ptr<Tensor>(self);
  // No stream needs to wait: what the library wrote there was there before it was handed out.
  if (tensor.gpu.has_value() && arguments.contains("stream")) CheckStream(arguments["stream"]);
  const std::vector<size_t> shape(tensor.shape.begin(), tensor.shape.end());
  const nb::ndarray<nb::array_api> array(
      tensor.memory.data(), shape.size(), shape.data(), self, nullptr, tensor.element.dtype,
      nb::cast<int>(DLPackDevice(tensor)[0]), tensor.gpu.value_or(0));
  return nb::cast(array).attr("__dlpack__")(**arguments);
}

void RequireHost(const Tensor& tensor) {
  if (!tensor.gpu.has_value()) return;
  RefuseHost(tensor, "numpy array");
  throw nb::python_error();
}

// numpy asks for it where there is no buffer; without it such a tensor would become an array of one
// object.
nb::object Array(nb::handle_t<Tensor> self, nb::handle dtype, nb::handle copy) {
  RequireHost(*nb::inst_ptr<Tensor>(self));
  return nb::module_::import_("numpy").attr("array")(nb::steal(PyMemoryView_FromObject(self.ptr())),
                                                     nb::arg("dtype") = dtype,
                                                     nb::arg("copy") = copy);
}

// The third version of the interface; no stream needs to wait.
nb::dict CudaArrayInterface(const Tensor& tensor) {
  static constexpr std::pair<std::string_view, const char*> kTypes[] = {
      {"f32", "<f4"}, {"f16", "<f2"}, {"i32", "<i4"}, {"u8", "|u1"}};
  const char* type = nullptr;
  for (const auto& [name, text] : kTypes) {
    if (name == tensor.element.name) type = text;
  }
  if (!tensor.gpu.has_value() || type == nullptr) {
    throw nb::attribute_error(
        absl::StrCat("structkv.Tensor of ", tensor.element.name, " on ", DeviceName(tensor.gpu),
                     " has no __cuda_array_interface__, which f32, f16, i32 and u8 on a GPU have")
            .c_str());
  }
  nb::list shape;
  for (const int64_t axis : tensor.shape) shape.append(axis);
  nb::dict interface;
  interface["shape"] = nb::tuple(shape);
  interface["typestr"] = type;
  interface["data"] = nb::make_tuple(reinterpret_cast<uintptr_t>(tensor.memory.data()), false);
  interface["version"] = 3;
  interface["strides"] = nb::none();
  interface["stream"] = nb::none();
  return interface;
}

nb::object Numpy(nb::handle_t<Tensor> self) {
  RequireHost(*nb::inst_ptr<Tensor>(self));
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
      "Dense memory of the library: torch.from_dlpack(t), numpy.from_dlpack(t), "
      "numpy.asarray(t) and memoryview(t) see it without a copy and keep it alive. In a buffer "
      "bf16 is uint16 and fp8 uint8: their bits. In a GPU's memory it has DLPack alone, and of "
      "f32, f16, i32 and u8 __cuda_array_interface__.")
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
          "device", [](const Tensor& self) { return DeviceName(self.gpu); },
          "'cpu', or 'cuda:N', as CUDA counts GPUs in this process.")
      .def_prop_ro(
          "nbytes", [](const Tensor& self) { return self.memory.size(); }, "Bytes of the memory.")
      .def("__dlpack__", &DLPack,
           nb::sig("def __dlpack__(self, **kwargs: typing.Any) -> typing_extensions.CapsuleType"))
      .def("__dlpack_device__", &DLPackDevice,
           nb::sig("def __dlpack_device__(self) -> tuple[int, int]"))
      .def("__array__", &Array, nb::arg("dtype") = nb::none(), nb::arg("copy") = nb::none(),
           nb::sig("def __array__(self, dtype: typing.Any = None, copy: bool | None = None) -> "
                   "typing.Any"))
      .def_prop_ro("__cuda_array_interface__", &CudaArrayInterface,
                   nb::sig("def __cuda_array_interface__(self) -> dict[str, typing.Any]"))
      .def("numpy", &Numpy, nb::sig("def numpy(self) -> typing.Any"),
           "A view as a numpy array; of bf16 and fp8 with the types of ml_dtypes. BufferError in a "
           "GPU's memory.")
      .def("__repr__", [](const Tensor& self) {
        return absl::StrCat("structkv.Tensor(", self.element.name, ", ", Text(self.shape),
                            self.gpu.has_value() ? ", " : "",
                            self.gpu.has_value() ? DeviceName(self.gpu) : "", ")");
      });
}

}  // namespace structkv::python
