// Client, of a server or of the engine in this process, for Python.
#include "structkv/client.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "client.h"
#include "error.h"
#include "message.h"
#include "options.h"
#include "pending.h"
#include "region.h"
#include "results.h"
#include "session.h"

namespace structkv::python {
namespace {

using PendingHandle = Held<Pending>;
using LeaseHandle = Held<client::CacheLease>;

// Runs `call` on a thread without the GIL, and makes an object of what it returns.
template <typename Call, typename Make>
PendingHandle Async(const ConnectionHandle& self, Call call, Make make) {
  return PendingHandle(Start(nullptr, [connection = self.get(), call, make]() -> Pending::Outcome {
    auto result = std::make_shared<decltype(call(*connection->client))>(call(*connection->client));
    return [result, make] { return make(Take(*std::move(result))); };
  }));
}

// A prompt that is to be opened.
struct Request {
  std::shared_ptr<Prompt> prompt;
  std::shared_ptr<Events> events;
  client::PromptOptions options;
};

Request RequestOf(nb::handle open, nb::handle options) {
  Request request;
  request.prompt = std::make_shared<Prompt>();
  request.prompt->open = MessageOf<v1::Open>(open);
  request.events = std::make_shared<Events>();
  request.options = PromptOptionsOf(options, request.prompt);
  request.options.on_opened = [prompt = request.prompt,
                               events = request.events](const v1::Opened& opened) {
    prompt->opened = opened;
    events->Begin();
  };
  request.options.on_ready = [events = request.events] { events->Add(); };
  request.options.on_end = [events = request.events](const absl::Status&) { events->End(); };
  return request;
}

// The stream's regions are those of its options and of all its prompts'.
void NameGpuRegions(const std::vector<Request>& requests, const client::StreamOptions& options) {
  std::vector<std::shared_ptr<client::Region>> regions = options.regions;
  if (options.staging != nullptr) regions.push_back(options.staging->region());
  for (const Request& request : requests) {
    if (request.options.results != nullptr) regions.push_back(request.options.results->region());
  }
  for (const Request& request : requests) {
    request.prompt->has_staging = options.staging != nullptr;
    for (const auto& region : regions) {
      if (!region->on_gpu()) continue;
      request.prompt->gpu.Add(*region);
      request.prompt->gpu_region = region;
    }
  }
}

using Opening = absl::StatusOr<std::shared_ptr<Session>>;

std::vector<Opening> OpenAll(const std::shared_ptr<Connection>& connection,
                             const std::vector<Request>& requests,
                             const client::StreamOptions& options) {
  std::vector<client::BatchPrompt> prompts;
  for (const Request& request : requests) {
    prompts.push_back({request.prompt->open, request.options});
  }
  std::vector<Opening> openings;
  auto sessions = connection->client->OpenBatch(prompts, options);
  for (size_t i = 0; i < sessions.size(); ++i) {
    if (!sessions[i].ok()) {
      openings.emplace_back(sessions[i].status());
      continue;
    }
    requests[i].prompt->open = (*sessions[i])->open();
    openings.emplace_back(std::make_shared<Session>(*std::move(sessions[i]), requests[i].events,
                                                    requests[i].prompt, connection->engine));
  }
  return openings;
}

// `prompts`: pairs of an Open and its PromptOptions. A list with a session or an exception of each.
PendingHandle OpenBatch(const ConnectionHandle& self, nb::handle prompts, nb::handle stream) {
  const client::StreamOptions options = StreamOptionsOf(stream);
  std::vector<Request> requests;
  for (nb::handle prompt : prompts) {
    requests.push_back(RequestOf(prompt[0], prompt[1]));
  }
  NameGpuRegions(requests, options);
  return PendingHandle(
      Start(nullptr, [connection = self.get(), requests, options]() -> Pending::Outcome {
        return [openings = OpenAll(connection, requests, options)] {
          nb::list list;
          for (const Opening& opening : openings) {
            list.append(opening.ok() ? nb::cast(HandleOf(*opening))
                                     : ExceptionOf(opening.status()));
          }
          return list;
        };
      }));
}

const char* HealthText(client::ReplicaState::Health health) {
  switch (health) {
    case client::ReplicaState::Health::kReady:
      return "ready";
    case client::ReplicaState::Health::kDraining:
      return "draining";
    case client::ReplicaState::Health::kFailed:
      return "failed";
    case client::ReplicaState::Health::kUnknown:
      break;
  }
  return "unknown";
}

// The fields of structkv.ReplicaState, in order.
nb::list Replicas(const ConnectionHandle& self) {
  RefuseEnded();
  nb::list list;
  for (const client::ReplicaState& state : self->client->Replicas()) {
    list.append(nb::make_tuple(state.address, HealthText(state.health),
                               std::string(state.failure.message()), state.reserved_bytes,
                               state.limit_bytes, state.active_sessions));
  }
  return list;
}

PendingHandle Register(const ConnectionHandle& self, const RegionHandle& region,
                       const std::string& tenant) {
  return Async(
      self,
      [region = region.get(), tenant](client::Client& client) -> absl::StatusOr<bool> {
        absl::Status status = client.Register(*region, tenant);
        if (!status.ok()) return status;
        return true;
      },
      [](bool) { return nb::none(); });
}

PendingHandle Renew(const ConnectionHandle& self, nb::bytes handle, std::optional<double> lease,
                    nb::handle options) {
  std::optional<absl::Duration> duration;
  if (lease.has_value()) duration = absl::Seconds(*lease);
  return Async(
      self,
      [handle = std::string(handle.c_str(), handle.size()), duration,
       options = HeldCallOptionsOf(options)](client::Client& client) {
        return client.RenewCache(handle, duration, options);
      },
      [](absl::Duration renewed) { return nb::float_(absl::ToDoubleSeconds(renewed)); });
}

PendingHandle Release(const ConnectionHandle& self, nb::bytes handle, nb::handle options) {
  return Async(
      self,
      [handle = std::string(handle.c_str(), handle.size()),
       options = HeldCallOptionsOf(options)](client::Client& client) -> absl::StatusOr<bool> {
        absl::Status status = client.ReleaseCache(handle, options);
        if (!status.ok()) return status;
        return true;
      },
      [](bool) { return nb::none(); });
}

LeaseHandle Keep(const ConnectionHandle& self, nb::bytes handle, double lease, nb::handle options) {
  RefuseEnded();
  auto kept = std::make_shared<client::CacheLease>(
      self->client.get(), std::string(handle.c_str(), handle.size()), absl::Seconds(lease),
      HeldCallOptionsOf(options));
  // The client outlives it.
  return LeaseHandle({kept.get(), [kept, connection = self.get()](auto*) mutable {
                        kept.reset();
                        connection.reset();
                      }});
}

}  // namespace

void BindClient(nb::module_& module) {
  nb::class_<LeaseHandle>(module, "Lease", "CacheLease; see structkv.Client.keep.")
      .def(
          "check",
          [](const LeaseHandle& self) {
            if (self.get() != nullptr) Check(self->status());
          },
          "Raises what the last renewal ended with, if it failed.")
      .def(
          "stop", [](LeaseHandle& self) { self.Reset(); },
          "Stops renewing, and leaves the cache to its lease.")
      .def(
          "__enter__", [](nb::handle self) { return nb::borrow(self); },
          nb::sig("def __enter__(self) -> Lease"))
      .def(
          "__exit__", [](LeaseHandle& self, const nb::args&) { self.Reset(); },
          nb::sig("def __exit__(self, *args: object) -> None"));
  nb::class_<ConnectionHandle>(module, "Connection", nb::is_weak_referenceable(),
                               "Client; see structkv.Client.")
      .def(
          "get_capabilities",
          [](const ConnectionHandle& self, double timeout) {
            return Async(
                self,
                [timeout](client::Client& client) {
                  return client.GetCapabilities(absl::Seconds(timeout));
                },
                [](const v1::GetCapabilitiesResponse& response) { return FromMessage(response); });
          },
          nb::arg("timeout"))
      .def(
          "choose_replica",
          [](const ConnectionHandle& self, nb::handle open, double timeout) {
            return Async(
                self,
                [open = MessageOf<v1::Open>(open), timeout](client::Client& client) {
                  return client.ChooseReplica(open, absl::Seconds(timeout));
                },
                [](const std::string& address) { return nb::cast(address); });
          },
          nb::arg("open"), nb::arg("timeout"))
      .def("replicas", &Replicas,
           nb::sig("def replicas(self) -> list[tuple[str, str, str, int, int, int]]"))
      .def("open_batch", &OpenBatch, nb::arg("prompts"), nb::arg("stream"))
      .def("register", &Register, nb::arg("region"), nb::arg("tenant"))
      .def(
          "fetch",
          [](const ConnectionHandle& self, nb::bytes handle, nb::handle options) {
            const auto taking = std::make_shared<absl::Status>();
            const client::FetchOptions fetch = FetchOptionsOf(options, taking);
            GpuPlaces gpu;
            if (fetch.results != nullptr) gpu.Add(*fetch.results->region());
            return Async(
                self,
                [handle = std::string(handle.c_str(), handle.size()), taking,
                 fetch](client::Client& client) -> absl::StatusOr<client::FetchedCache> {
                  absl::StatusOr<client::FetchedCache> fetched = client.FetchCache(handle, fetch);
                  if (!taking->ok()) return *taking;
                  return fetched;
                },
                [gpu](const client::FetchedCache& fetched) { return FromFetched(fetched, gpu); });
          },
          nb::arg("handle"), nb::arg("options"))
      .def("renew", &Renew, nb::arg("handle"), nb::arg("lease").none(), nb::arg("options"))
      .def("release", &Release, nb::arg("handle"), nb::arg("options"))
      .def("keep", &Keep, nb::arg("handle"), nb::arg("lease"), nb::arg("options"))
      .def(
          "close",
          [](const ConnectionHandle& self) {
            if (!Forked()) self->Close();
          },
          nb::call_guard<WithoutGil>(),
          "Of an engine: what runs in it, and what comes, is Unavailable.");
  module.def(
      "connect",
      [](const std::string& target, nb::handle options) {
        RefuseEnded();
        auto connection = std::make_shared<Connection>();
        connection->client = Take(client::Client::Connect(target, ClientOptionsOf(options)));
        return ConnectionHandle(std::move(connection));
      },
      nb::arg("target"), nb::arg("options"));
}

}  // namespace structkv::python
