// A decode worker with shared memory: registers it at the region socket argv[2], fetches the held
// cache argv[3] (hexadecimal) at the target argv[1] into it, says so, and fetches it over and over
// until it is killed.
#include <cstdio>
#include <string>

#include "absl/strings/escaping.h"
#include "tests/testing/call.h"
#include "tests/testing/held.h"
#include "tests/testing/shared_region.h"

namespace structkv::testkit {
namespace {

int Main(const std::string& target, const std::string& socket, const std::string& handle) {
  const auto file = SharedFile::Sealed(64 << 20);
  RegionConnection connection(socket);
  const std::string region = connection.Register(*file).handle();
  const auto channel = NewChannel(target);
  while (true) {
    const Fetched fetched = Fetch(
        channel, Into(FetchRequest(absl::HexStringToBytes(handle)), region, *file), {}, file.get());
    if (!fetched.status.ok()) {
      std::fprintf(stderr, "%s\n", fetched.status.error_message().c_str());
      return 1;
    }
    std::puts("fetched");
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace structkv::testkit

int main(int argc, char** argv) {
  return argc == 4 ? structkv::testkit::Main(argv[1], argv[2], argv[3]) : 2;
}
