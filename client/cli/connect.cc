#include "client/cli/connect.h"

#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "grpcpp/security/credentials.h"

namespace structkv::cli {
namespace {

absl::StatusOr<std::string> Read(const char* flag, const std::string& path) {
  if (path.empty()) return std::string();
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(flag, " ", path, " cannot be read"));
  std::string text((std::istreambuf_iterator<char>(file)), {});
  if (absl::StripAsciiWhitespace(text).empty()) {
    return absl::InvalidArgumentError(absl::StrCat(flag, " ", path, " is empty"));
  }
  return text;
}

}  // namespace

void AddSecurityFlags(CLI::App* app, SecurityFlags* flags, const char* group) {
  app->add_flag("--tls", flags->tls, "Speak TLS; the other flags of TLS imply it")->group(group);
  app->add_option("--tls-authorities", flags->authorities,
                  "Authorities (PEM) of the server's certificate; none: the system's")
      ->option_text("FILE")
      ->group(group);
  CLI::Option* certificate = app->add_option("--tls-certificate", flags->certificate,
                                             "The command's own certificate (PEM)")
                                 ->option_text("FILE")
                                 ->group(group);
  CLI::Option* key = app->add_option("--tls-key", flags->key, "Its private key (PEM)")
                         ->option_text("FILE")
                         ->group(group);
  certificate->needs(key);
  key->needs(certificate);
  app->add_option("--token-file", flags->token_file, "File whose first word is the caller's token")
      ->option_text("FILE")
      ->group(group);
}

absl::StatusOr<std::unique_ptr<client::Client>> ConnectTo(const std::string& server,
                                                          const SecurityFlags& flags) {
  client::ClientOptions options;
  grpc::SslCredentialsOptions ssl;
  for (const auto& [flag, path, text] :
       {std::tuple("--tls-authorities", &flags.authorities, &ssl.pem_root_certs),
        std::tuple("--tls-certificate", &flags.certificate, &ssl.pem_cert_chain),
        std::tuple("--tls-key", &flags.key, &ssl.pem_private_key),
        std::tuple("--token-file", &flags.token_file, &options.token)}) {
    absl::StatusOr<std::string> read = Read(flag, *path);
    if (!read.ok()) return read.status();
    *text = *std::move(read);
  }
  const absl::string_view token = absl::StripLeadingAsciiWhitespace(options.token);
  options.token = std::string(token.substr(0, token.find_first_of(" \t\r\n")));
  if (flags.tls || !flags.authorities.empty() || !flags.certificate.empty()) {
    options.credentials = grpc::SslCredentials(ssl);
  }
  return client::Client::Connect(server, options);
}

}  // namespace structkv::cli
