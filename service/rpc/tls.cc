#include "service/rpc/tls.h"

#include <openssl/err.h>
#include <openssl/pem.h>

#include <algorithm>
#include <ctime>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "grpcpp/security/tls_certificate_provider.h"
#include "grpcpp/security/tls_credentials_options.h"
#include "service/rpc/openssl_ptr.h"
#include "structkv/v1/address.h"

namespace structkv::rpc {
namespace {

absl::StatusOr<BioPtr> Open(const char* option, const std::string& path) {
  BioPtr file(BIO_new_file(path.c_str(), "r"));
  if (file != nullptr) return file;
  return absl::NotFoundError(absl::StrCat(option, " ", path, " cannot be read"));
}

absl::StatusOr<std::vector<CertificatePtr>> ReadCertificates(const char* option,
                                                             const std::string& path) {
  absl::StatusOr<BioPtr> file = Open(option, path);
  if (!file.ok()) return file.status();
  std::vector<CertificatePtr> all;
  while (X509* one = PEM_read_bio_X509(file->get(), nullptr, nullptr, nullptr)) {
    all.emplace_back(one);
  }
  ERR_clear_error();  // of the end of the file
  if (!all.empty()) return all;
  return absl::InvalidArgumentError(
      absl::StrCat(option, " ", path, " holds no certificate in PEM form"));
}

absl::StatusOr<KeyPtr> ReadKey(const std::string& path) {
  absl::StatusOr<BioPtr> file = Open("tls-key", path);
  if (!file.ok()) return file.status();
  // Without a terminal: one that is encrypted cannot be read.
  const auto no_password = [](char*, int, int, void*) { return 0; };
  KeyPtr key(PEM_read_bio_PrivateKey(file->get(), nullptr, no_password, nullptr));
  if (key != nullptr) return key;
  return absl::InvalidArgumentError(
      absl::StrCat("tls-key ", path, " holds no private key in PEM form without a password"));
}

absl::Time EndOf(const CertificatePtr& certificate) {
  std::tm end = {};
  if (ASN1_TIME_to_tm(X509_get0_notAfter(certificate.get()), &end) != 1) {
    return absl::InfinitePast();
  }
  return absl::FromTM(end, absl::UTCTimeZone());
}

absl::Time FirstEnd(const std::vector<CertificatePtr>& certificates) {
  absl::Time first = absl::InfiniteFuture();
  for (const CertificatePtr& one : certificates) first = std::min(first, EndOf(one));
  return first;
}

// When the first certificate ends.
absl::StatusOr<absl::Time> CheckFiles(const TlsOptions& options) {
  const auto chain = ReadCertificates("tls-certificate", options.certificate);
  if (!chain.ok()) return chain.status();
  const absl::StatusOr<KeyPtr> key = ReadKey(options.key);
  if (!key.ok()) return key.status();
  if (X509_check_private_key(chain->front().get(), key->get()) != 1) {
    return absl::InvalidArgumentError(absl::StrCat("tls-key ", options.key,
                                                   " is not the key of the first certificate in ",
                                                   options.certificate));
  }
  if (!options.client_authorities.empty()) {
    const auto authorities = ReadCertificates("client-authorities", options.client_authorities);
    if (!authorities.ok()) return authorities.status();
  }
  return FirstEnd(*chain);
}

}  // namespace

absl::Status CheckTls(const TlsOptions& options) {
  if (options.certificate.empty() != options.key.empty()) {
    return absl::InvalidArgumentError("tls-certificate and tls-key are given together");
  }
  if (!options.client_authorities.empty() && !options.enabled()) {
    return absl::InvalidArgumentError("client-authorities needs tls-certificate and tls-key");
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeCredentials(
    const TlsOptions& options) {
  if (absl::Status status = CheckTls(options); !status.ok()) return status;
  const absl::StatusOr<absl::Time> end = CheckFiles(options);
  if (!end.ok()) return end.status();
  if (*end < absl::Now()) {
    return absl::InvalidArgumentError(
        absl::StrCat("tls-certificate ", options.certificate, " ended at ",
                     absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", *end, absl::UTCTimeZone())));
  }
  auto provider = std::make_shared<grpc::experimental::FileWatcherCertificateProvider>(
      options.key, options.certificate, options.client_authorities,
      static_cast<unsigned>(options.look_seconds));
  grpc::experimental::TlsServerCredentialsOptions tls(std::move(provider));
  tls.watch_identity_key_cert_pairs();
  if (!options.client_authorities.empty()) {
    tls.watch_root_certs();
    tls.set_cert_request_type(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  }
  return grpc::experimental::TlsServerCredentials(tls);
}

absl::StatusOr<absl::Time> CertificateExpiry(const TlsOptions& options) {
  return CheckFiles(options);
}

bool IsUnixAddress(const std::string& address) { return wire::IsUnixAddress(address); }

bool IsLocalAddress(const std::string& address) {
  return IsUnixAddress(address) || wire::IsLoopbackAddress(address);
}

}  // namespace structkv::rpc
