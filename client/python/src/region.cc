#include "region.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "error.h"
#include "prompt.h"
#include "tensor.h"

namespace structkv::python {
namespace {

// What Region() and Region.adopt() were given of a region's options; None leaves the default.
struct Given {
  std::optional<bool> writable;
  std::optional<double> lease;
  std::optional<double> quarantine;
  std::optional<std::string> cuda_library;

  client::RegionOptions Options() const {
    client::RegionOptions options;
    options.writable = writable.value_or(options.writable);
    if (lease.has_value()) options.lease = absl::Seconds(*lease);
    if (quarantine.has_value()) options.quarantine = absl::Seconds(*quarantine);
    options.cuda_library = cuda_library.value_or(options.cuda_library);
    return options;
  }
};

[[noreturn]] void Invalid(const std::string& text) { Throw(absl::InvalidArgumentError(text)); }

// What is of one kind of memory alone is refused of the other, not ignored.
client::RegionKind KindOf(bool named, std::optional<int> gpu, const Given& given,
                          std::optional<bool> prefault, std::optional<bool> huge_pages) {
  if (!gpu.has_value()) {
    if (given.cuda_library.has_value()) {
      Invalid("Region: cuda_library is set and gpu is None; it finds the CUDA of a gpu's region");
    }
    return named ? client::RegionKind::kNamed : client::RegionKind::kDescriptor;
  }
  const char* const host_only = named                    ? "named"
                                : prefault.has_value()   ? "prefault"
                                : huge_pages.has_value() ? "huge_pages"
                                                         : nullptr;
  if (host_only != nullptr) {
    Invalid(absl::StrCat("Region: ", host_only, " is set and gpu is ", *gpu,
                         "; it is of memory of the host alone"));
  }
  return client::RegionKind::kGpu;
}

RegionHandle CreateRegion(size_t size_bytes, bool named, std::optional<int> gpu,
                          std::optional<bool> prefault, std::optional<bool> huge_pages,
                          const Given& given) {
  RefuseEnded();
  client::RegionOptions options = given.Options();
  options.size_bytes = size_bytes;
  options.kind = KindOf(named, gpu, given, prefault, huge_pages);
  options.gpu = gpu.value_or(options.gpu);
  options.prefault = prefault.value_or(options.prefault);
  options.huge_pages = huge_pages.value_or(options.huge_pages);
  absl::StatusOr<std::shared_ptr<client::Region>> region;
  {
    const WithoutGil release;
    region = client::Region::Create(options);
  }
  return RegionHandle(Take(std::move(region)));
}

// The allocation is shared as a whole, and an arena gives out all of it: so it is the tensor's
// whole.
RegionHandle Adopt(nb::handle tensor, const Given& given) {
  RefuseEnded();
  Arguments arguments;
  const absl::Span<const std::byte> bytes =
      arguments.Take(tensor, {"Region.adopt: tensor", Byte(), std::nullopt,
                              [](absl::Span<const std::byte>, int) { return std::string(); }});
  if (!arguments.gpu().has_value() || bytes.empty()) {
    Invalid(absl::StrCat("Region.adopt: tensor has ", bytes.size(), " bytes on ",
                         DeviceName(arguments.gpu()),
                         "; 1 or more in a GPU's memory are expected"));
  }
  client::RegionOptions options = given.Options();
  options.gpu = *arguments.gpu();
  client::GpuAllocation allocation;
  allocation.data = const_cast<std::byte*>(bytes.data());
  allocation.owner = std::move(arguments).Owner();
  absl::StatusOr<std::shared_ptr<client::Region>> region;
  {
    const WithoutGil release;
    region = client::Region::Adopt(allocation, options);
  }
  RegionHandle handle(Take(std::move(region)));
  if (handle->size() != bytes.size()) {
    Invalid(absl::StrCat("Region.adopt: tensor has ", bytes.size(), " bytes of an allocation of ",
                         handle->size(), " on ", DeviceName(options.gpu),
                         ", which is shared as a whole; a tensor of all of it is expected"));
  }
  return handle;
}

void Record(const RegionHandle& self, nb::handle stream) {
  RefuseEnded();
  const std::optional<void*> queue = StreamOf(stream, "Region.record: stream");
  if (!queue.has_value()) Invalid("Region.record: stream is None; a cudaStream_t is expected");
  absl::Status status;
  {
    const WithoutGil release;
    status = self->Record(*queue);
  }
  Check(status);
}

void Write(const RegionHandle& self, uint64_t offset_bytes, nb::handle data) {
  RefuseEnded();
  Arguments arguments;
  const absl::Span<const std::byte> bytes =
      arguments.Take(data, {"Region.write: data", Byte(), std::nullopt, nullptr});
  absl::Status status;
  {
    const WithoutGil release;
    status = self->Write(offset_bytes, bytes);
  }
  Check(status);
}

void Read(const RegionHandle& self, uint64_t offset_bytes, nb::handle into) {
  RefuseEnded();
  Arguments arguments;
  const absl::Span<std::byte> bytes =
      arguments.TakeWritable(into, {"Region.read: into", Byte(), std::nullopt, nullptr});
  absl::Status status;
  {
    const WithoutGil release;
    status = self->Read(offset_bytes, bytes);
  }
  Check(status);
}

std::optional<uint64_t> OffsetOf(const RegionHandle& self, nb::handle tensor) {
  Arguments arguments;
  const absl::Span<const std::byte> bytes =
      arguments.Take(tensor, {"Region.offset_of: tensor", Byte(), std::nullopt,
                              [](absl::Span<const std::byte>, int) { return std::string(); }});
  return self->OffsetOf(bytes);
}

std::optional<int> GpuOf(const client::Region& region) {
  if (!region.on_gpu()) return std::nullopt;
  return region.options().gpu;
}

Tensor Allocate(const ArenaHandle& arena, const Element& element, std::vector<int64_t> shape) {
  RefuseEnded();
  int64_t size = static_cast<int64_t>(element.bytes());
  for (const int64_t axis : shape) {
    if (axis < 0 || __builtin_mul_overflow(size, axis, &size)) {
      Throw(absl::InvalidArgumentError(absl::StrCat("shape has the axis ", axis,
                                                    "; 0 or more, and 2^63 bytes in all, are "
                                                    "allowed")));
    }
  }
  return {Take(arena->Allocate(static_cast<size_t>(size))), element, std::move(shape),
          GpuOf(*arena->region())};
}

}  // namespace

std::optional<void*> StreamOf(nb::handle stream, const char* name) {
  if (stream.is_none()) return std::nullopt;
  uint64_t address = 0;
  if (nb::try_cast(stream, address, /*convert=*/false)) return reinterpret_cast<void*>(address);
  Invalid(absl::StrCat(name, " is ", nb::cast<std::string>(nb::repr(stream)),
                       "; a cudaStream_t as an int is expected"));
}

void BindRegion(nb::module_& module) {
  nb::class_<RegionHandle>(
      module, "Region",
      "Memory that this process shares with a server on the same host: of the host, or of a GPU. "
      "Let go of with the last of its tensors, arenas and sessions; of a GPU once the servers have "
      "closed it as well. A forked child must not use it.")
      .def(
          "__init__",
          [](RegionHandle* self, size_t size_bytes, bool named, std::optional<int> gpu,
             std::optional<bool> writable, std::optional<bool> prefault,
             std::optional<bool> huge_pages, std::optional<double> lease,
             std::optional<double> quarantine, std::optional<std::string> cuda_library) {
            new (self)
                RegionHandle(CreateRegion(size_bytes, named, gpu, prefault, huge_pages,
                                          {writable, lease, quarantine, std::move(cuda_library)}));
          },
          nb::arg("size_bytes"), nb::kw_only(), nb::arg("named") = false,
          nb::arg("gpu") = nb::none(), nb::arg("writable") = nb::none(),
          nb::arg("prefault") = nb::none(), nb::arg("huge_pages") = nb::none(),
          nb::arg("lease") = nb::none(), nb::arg("quarantine") = nb::none(),
          nb::arg("cuda_library") = nb::none(),
          "`size_bytes`: rounded up to whole pages, of a GPU to 2 MiB. `named`: a file of "
          "/dev/shm, "
          "for where a descriptor cannot be passed. `gpu`: memory of that GPU, as CUDA counts them "
          "in this process; `cuda_library`: a name or path of CUDA's driver. `lease`: how many "
          "seconds the server keeps a named one, or a GPU's, after the last renewal; `quarantine`: "
          "how long after the lease a server that is silent may still use it. `writable`: whether "
          "the server may write results into it. Of the host alone: `prefault`: take all pages at "
          "once; `huge_pages`: ask for them. None: the C++ client's default (structkv/region.h).")
      .def_static(
          "adopt",
          [](nb::handle tensor, std::optional<bool> writable, std::optional<double> lease,
             std::optional<double> quarantine, std::optional<std::string> cuda_library) {
            return Adopt(tensor, {writable, lease, quarantine, std::move(cuda_library)});
          },
          nb::arg("tensor"), nb::kw_only(), nb::arg("writable") = nb::none(),
          nb::arg("lease") = nb::none(), nb::arg("quarantine") = nb::none(),
          nb::arg("cuda_library") = nb::none(),
          nb::sig("def adopt(tensor: typing.Any, *, writable: bool | None = None, lease: float | "
                  "None = None, quarantine: float | None = None, cuda_library: str | None = None) "
                  "-> Region"),
          "A region of the program's own memory of a GPU: `tensor`, by DLPack, is all of one "
          "allocation of cudaMalloc. It is kept alive until no server has it open any more.")
      .def("record", &Record, nb::arg("stream").none(),
           nb::sig("def record(self, stream: int) -> None"),
           "Of a GPU: has servers wait for what was queued on the cudaStream_t until now, before "
           "they read the region. LayerTensors.cuda_stream does so for a layer.")
      .def("write", &Write, nb::arg("offset_bytes"), nb::arg("data"),
           nb::sig("def write(self, offset_bytes: int, data: typing.Any) -> None"),
           "Copies a dense tensor of the host's memory into the region, and waits for that.")
      .def("read", &Read, nb::arg("offset_bytes"), nb::arg("into"),
           nb::sig("def read(self, offset_bytes: int, into: typing.Any) -> None"),
           "Copies from the region into a dense, writable tensor of the host's memory, and waits "
           "for that; of a GPU behind what was recorded.")
      .def("offset_of", &OffsetOf, nb::arg("tensor"),
           nb::sig("def offset_of(self, tensor: typing.Any) -> int | None"),
           "Where a dense tensor begins in the region, in bytes; None: not all of it lies there.")
      .def_prop_ro(
          "device", [](const RegionHandle& self) { return DeviceName(GpuOf(*self.get())); },
          "'cpu', or 'cuda:N'.")
      .def_prop_ro(
          "size_bytes", [](const RegionHandle& self) { return self->size(); }, "Bytes of it.");
  nb::class_<ArenaHandle>(module, "Arena",
                          "Blocks of a region, so that a worker computes straight into memory that "
                          "it shares. Two arenas of one region give out the same memory.")
      .def(
          "__init__",
          [](ArenaHandle* self, const RegionHandle& region) {
            new (self) ArenaHandle(std::make_shared<client::Arena>(region.get()));
          },
          nb::arg("region"))
      .def(
          "empty",
          [](const ArenaHandle& self, std::vector<int64_t> shape, const std::string& dtype) {
            return Allocate(self, ElementOf(dtype), std::move(shape));
          },
          nb::arg("shape"), nb::arg("dtype"),
          nb::sig("def empty(self, shape: collections.abc.Sequence[int], dtype: str) -> Tensor"),
          "A block as a dense tensor of unspecified content; it comes back when the last view of "
          "it dies. ResourceExhausted where no free range is large enough.")
      .def_prop_ro("region", [](const ArenaHandle& self) { return RegionHandle(self->region()); })
      .def_prop_ro(
          "free_bytes", [](const ArenaHandle& self) { return self->free_bytes(); },
          "Bytes that no block holds.")
      .def_prop_ro(
          "largest_free_bytes", [](const ArenaHandle& self) { return self->largest_free_bytes(); },
          "The largest run of them.");
}

}  // namespace structkv::python
