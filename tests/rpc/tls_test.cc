#include "service/rpc/tls.h"

#include <fstream>
#include <string>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/certificates.h"
#include "tests/testing/process.h"

namespace structkv::rpc {
namespace {

using ::testing::HasSubstr;
using testkit::Authority;

class TlsTest : public ::testing::Test {
 protected:
  std::string File(const std::string& name, const std::string& text) {
    const std::string path = directory_.Path(name);
    std::ofstream(path) << text;
    return path;
  }
  TlsOptions Options(const Authority::Pair& pair) {
    return {.certificate = File("certificate", pair.certificate), .key = File("key", pair.key)};
  }
  static void ExpectRefused(const TlsOptions& options, const std::string& why) {
    const absl::Status status = MakeCredentials(options).status();
    EXPECT_FALSE(status.ok());
    EXPECT_THAT(std::string(status.message()), HasSubstr(why));
  }

  const Authority authority_;
  const Authority::Pair pair_ = authority_.Sign({"DNS:localhost"});
  testkit::TemporaryDirectory directory_;
};

TEST_F(TlsTest, TakesGoodFiles) {
  TlsOptions options = Options(pair_);
  EXPECT_EQ(MakeCredentials(options).status(), absl::OkStatus());
  options.client_authorities = File("authorities", authority_.certificate());
  EXPECT_EQ(MakeCredentials(options).status(), absl::OkStatus());
}

TEST_F(TlsTest, SaysWhatIsWrong) {
  ExpectRefused({.certificate = "/a"}, "tls-certificate and tls-key are given together");
  ExpectRefused({.client_authorities = "/a"},
                "client-authorities needs tls-certificate and tls-key");
  TlsOptions options = Options(pair_);
  options.key = "/nowhere";
  ExpectRefused(options, "tls-key /nowhere cannot be read");
  options.key = File("other", authority_.Sign({}).key);
  ExpectRefused(options, "is not the key of the first certificate in " + options.certificate);
  options.key = File("text", "text");
  ExpectRefused(options, "holds no private key in PEM form");
  options = Options(pair_);
  options.client_authorities = File("none", "none");
  ExpectRefused(options, "client-authorities " + directory_.Path("none") +
                             " holds no certificate in PEM form");
  ExpectRefused(Options(authority_.Sign({}, /*seconds=*/-30)), " ended at 2");
}

TEST_F(TlsTest, Expiry) {
  TlsOptions options = Options(pair_);
  options.certificate = File("chain", pair_.certificate + authority_.Sign({}, 600).certificate);
  const absl::StatusOr<absl::Time> end = CertificateExpiry(options);
  ASSERT_TRUE(end.ok()) << end.status();
  EXPECT_LT(absl::AbsDuration(*end - absl::Now() - absl::Seconds(600)), absl::Seconds(60));
  options.key = File("other", authority_.Sign({}).key);
  EXPECT_FALSE(CertificateExpiry(options).ok());
}

TEST(LocalAddressTest, WhoReachesIt) {
  for (const char* local : {"127.0.0.1:7411", "127.1.2.3:0", "localhost:1", "[::1]:1", "unix:/a",
                            "unix-abstract:a", "ipv4:127.0.0.1:1", "dns:///localhost:1"}) {
    EXPECT_TRUE(IsLocalAddress(local)) << local;
  }
  for (const char* open :
       {"0.0.0.0:7411", "[::]:1", "10.0.0.1:1", "host:1", "127.example.org:1", "ipv4:0.0.0.0:1",
        "localhost.example.org:1", ":1", "unix1.example:7411"}) {
    EXPECT_FALSE(IsLocalAddress(open)) << open;
  }
}

}  // namespace
}  // namespace structkv::rpc
