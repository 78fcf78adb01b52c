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
#include "tensor.h"

namespace structkv::python {
namespace {

RegionHandle CreateRegion(size_t size_bytes, bool named, std::optional<bool> writable,
                          std::optional<bool> prefault, std::optional<bool> huge_pages,
                          std::optional<double> lease) {
  RefuseEnded();
  client::RegionOptions options;
  options.size_bytes = size_bytes;
  options.kind = named ? client::RegionKind::kNamed : client::RegionKind::kDescriptor;
  options.writable = writable.value_or(options.writable);
  options.prefault = prefault.value_or(options.prefault);
  options.huge_pages = huge_pages.value_or(options.huge_pages);
  if (lease.has_value()) options.lease = absl::Seconds(*lease);
  absl::StatusOr<std::shared_ptr<client::Region>> region;
  {
    const WithoutGil release;
    region = client::Region::Create(options);
  }
  return RegionHandle(Take(std::move(region)));
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
  return {Take(arena->Allocate(static_cast<size_t>(size))), element, std::move(shape)};
}

}  // namespace

void BindRegion(nb::module_& module) {
  nb::class_<RegionHandle>(
      module, "Region",
      "Memory that this process shares with a server on the same host. Unmapped with the last of "
      "its tensors, arenas and sessions. A forked child must not use it.")
      .def(
          "__init__",
          [](RegionHandle* self, size_t size_bytes, bool named, std::optional<bool> writable,
             std::optional<bool> prefault, std::optional<bool> huge_pages,
             std::optional<double> lease) {
            new (self) RegionHandle(
                CreateRegion(size_bytes, named, writable, prefault, huge_pages, lease));
          },
          nb::arg("size_bytes"), nb::kw_only(), nb::arg("named") = false,
          nb::arg("writable") = nb::none(), nb::arg("prefault") = nb::none(),
          nb::arg("huge_pages") = nb::none(), nb::arg("lease") = nb::none(),
          "`size_bytes`: rounded up to whole pages. `named`: a file of /dev/shm, for where a "
          "descriptor cannot be passed; `lease`: how many seconds the server keeps that after the "
          "last renewal. `writable`: whether the server may write results into it. `prefault`: "
          "take all pages at once. `huge_pages`: ask for them. None: the C++ client's default "
          "(structkv/region.h).")
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
