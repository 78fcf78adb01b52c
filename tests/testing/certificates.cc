#include "tests/testing/certificates.h"

#include <openssl/ec.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include <cstdlib>

#include "absl/strings/str_join.h"
#include "grpc/grpc.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "service/rpc/openssl_ptr.h"

namespace structkv::testkit {
namespace {

using rpc::BioPtr;
using rpc::CertificatePtr;
using rpc::KeyPtr;

std::string Text(BIO* memory) {
  char* data = nullptr;
  const auto size = BIO_get_mem_data(memory, &data);
  return {data, static_cast<size_t>(size)};
}

std::string Pem(X509* certificate) {
  const BioPtr memory(BIO_new(BIO_s_mem()));
  PEM_write_bio_X509(memory.get(), certificate);
  return Text(memory.get());
}

std::string Pem(EVP_PKEY* key) {
  const BioPtr memory(BIO_new(BIO_s_mem()));
  PEM_write_bio_PrivateKey(memory.get(), key, nullptr, nullptr, 0, nullptr, nullptr);
  return Text(memory.get());
}

KeyPtr NewKey() { return KeyPtr(EVP_EC_gen("P-256")); }

void Extend(X509* certificate, X509* issuer, int kind, const std::string& value) {
  X509V3_CTX context;
  X509V3_set_ctx(&context, issuer, certificate, nullptr, nullptr, 0);
  X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, &context, kind, value.c_str());
  if (extension == nullptr) std::abort();
  X509_add_ext(certificate, extension, -1);
  X509_EXTENSION_free(extension);
}

CertificatePtr NewCertificate(EVP_PKEY* key, const char* name, int seconds) {
  CertificatePtr certificate(X509_new());
  static long serial = 0;  // NOLINT(google-runtime-int): OpenSSL's
  X509_set_version(certificate.get(), X509_VERSION_3);
  ASN1_INTEGER_set(X509_get_serialNumber(certificate.get()), ++serial);
  X509_gmtime_adj(X509_getm_notBefore(certificate.get()), -60);
  X509_gmtime_adj(X509_getm_notAfter(certificate.get()), seconds);
  X509_set_pubkey(certificate.get(), key);
  X509_NAME_add_entry_by_txt(X509_get_subject_name(certificate.get()), "CN", MBSTRING_ASC,
                             reinterpret_cast<const unsigned char*>(name), -1, -1, 0);
  return certificate;
}

}  // namespace

struct Authority::Parts {
  KeyPtr key = NewKey();
  CertificatePtr certificate = NewCertificate(key.get(), "authority", 7200);
};

Authority::Authority() : parts_(std::make_unique<Parts>()) {
  X509* own = parts_->certificate.get();
  X509_set_issuer_name(own, X509_get_subject_name(own));
  Extend(own, own, NID_basic_constraints, "critical,CA:TRUE");
  // All authorities have one name: by these a verifier tells whose a certificate is.
  Extend(own, own, NID_subject_key_identifier, "hash");
  X509_sign(own, parts_->key.get(), EVP_sha256());
  certificate_ = Pem(own);
}

Authority::~Authority() = default;

Authority::Pair Authority::Sign(const std::vector<std::string>& names, int seconds) const {
  const KeyPtr key = NewKey();
  const CertificatePtr certificate = NewCertificate(key.get(), "common", seconds);
  X509* issuer = parts_->certificate.get();
  X509_set_issuer_name(certificate.get(), X509_get_subject_name(issuer));
  Extend(certificate.get(), issuer, NID_authority_key_identifier, "keyid:always");
  if (!names.empty()) {
    Extend(certificate.get(), issuer, NID_subject_alt_name, absl::StrJoin(names, ","));
  }
  X509_sign(certificate.get(), parts_->key.get(), EVP_sha256());
  return {Pem(certificate.get()), Pem(key.get())};
}

std::shared_ptr<grpc::Channel> NewTlsChannel(const std::string& target,
                                             const std::string& authority,
                                             const Authority::Pair& own) {
  grpc_init();  // once more than it is given back: see Server::Start()
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel(target,
                                   grpc::SslCredentials({.pem_root_certs = authority,
                                                         .pem_private_key = own.key,
                                                         .pem_cert_chain = own.certificate}),
                                   arguments);
}

}  // namespace structkv::testkit
