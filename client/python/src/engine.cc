// The engine in this process: a server without a socket, and a client of it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "client.h"
#include "error.h"
#include "options.h"
#include "service/config.h"

namespace structkv::python {
namespace {

// `flags` are those of structkv-server.
absl::StatusOr<std::shared_ptr<Connection>> Embed(const std::vector<std::string>& flags,
                                                  const client::ClientOptions& options) {
  std::vector<const char*> arguments = {"structkv.Engine"};
  for (const std::string& flag : flags) arguments.push_back(flag.c_str());
  auto parsed = ParseConfig(static_cast<int>(arguments.size()), arguments.data());
  if (const auto* early = std::get_if<EarlyExit>(&parsed)) {
    return absl::InvalidArgumentError(early->text);
  }
  ServerOptions server = std::get<Config>(std::move(parsed)).server;
  server.listen.clear();
  absl::StatusOr<std::unique_ptr<Server>> started = Server::Start(std::move(server));
  if (!started.ok()) return started.status();
  auto connection = std::make_shared<Connection>();
  connection->engine = *std::move(started);
  grpc::ChannelArguments channel;
  channel.SetMaxReceiveMessageSize(-1);
  channel.SetMaxSendMessageSize(-1);
  auto connected = connection->engine->PrivateChannel(channel);
  if (!connected.ok()) return connected.status();
  client::ClientOptions own = options;
  own.own_process = true;  // CUDA opens nothing in the process that made it
  connection->client = std::make_unique<client::Client>(*std::move(connected), own);
  return connection;
}

}  // namespace

void BindEngine(nb::module_& module) {
  module.def(
      "embed",
      [](const std::vector<std::string>& flags, nb::handle options) {
        RefuseEnded();
        const client::ClientOptions client = ClientOptionsOf(options);
        absl::StatusOr<std::shared_ptr<Connection>> connection;
        {
          const WithoutGil release;
          connection = Embed(flags, client);
        }
        return ConnectionHandle(Take(std::move(connection)));
      },
      nb::arg("flags"), nb::arg("options"));
}

}  // namespace structkv::python
