#include "service/trace/http_post.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "boost/asio/io_context.hpp"
#include "boost/asio/ip/tcp.hpp"
#include "boost/asio/post.hpp"
#include "boost/asio/ssl.hpp"
#include "boost/asio/steady_timer.hpp"
#include "boost/beast/core.hpp"
#include "boost/beast/http.hpp"

namespace structkv::trace {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
namespace ssl = asio::ssl;
using tcp = asio::ip::tcp;
using Clock = std::chrono::steady_clock;

constexpr char kUserAgent[] = "structkv-server";
// Debian's authorities, which an image may have without OpenSSL's own folder of them.
constexpr char kSystemAuthorities[] = "/etc/ssl/certs/ca-certificates.crt";

absl::StatusOr<std::unique_ptr<ssl::context>> MakeTls(const std::string& authorities) {
  auto context = std::make_unique<ssl::context>(ssl::context::tls_client);
  context->set_options(ssl::context::default_workarounds | ssl::context::no_sslv2 |
                       ssl::context::no_sslv3 | ssl::context::no_tlsv1 | ssl::context::no_tlsv1_1);
  context->set_verify_mode(ssl::verify_peer);
  beast::error_code error;
  if (authorities.empty()) {
    // Whatever there is of them: without any no certificate is good.
    context->set_default_verify_paths(error);
    context->load_verify_file(kSystemAuthorities, error);
    return context;
  }
  context->load_verify_file(authorities, error);
  if (!error) return context;
  return absl::InvalidArgumentError(
      absl::StrCat("otlp-authorities ", authorities, ": no certificates (", error.message(), ")"));
}

std::optional<absl::Duration> RetryAfter(beast::string_view text) {
  int64_t seconds = 0;
  if (!absl::SimpleAtoi(absl::string_view(text.data(), text.size()), &seconds) || seconds < 0) {
    return std::nullopt;
  }
  return absl::Seconds(seconds);
}

}  // namespace

class HttpPoster::Impl {
 public:
  // `tls` null: the URL is one of http.
  Impl(HttpUrl url, std::unique_ptr<ssl::context> tls)
      : url_(std::move(url)), tls_(std::move(tls)) {}

  absl::StatusOr<HttpReply> Post(const std::string& content_type, std::string body,
                                 absl::Duration limit) {
    result_ = absl::InternalError("the request was not made");
    late_ = false;
    io_.restart();
    io_.poll();  // whether there is a hurry
    busy_ = true;
    request_ = {http::verb::post, url_.path, 11};
    request_.set(http::field::host, url_.authority());
    request_.set(http::field::user_agent, kUserAgent);
    request_.set(http::field::content_type, content_type);
    request_.keep_alive(false);
    request_.body() = std::move(body);
    request_.prepare_payload();
    stream_.emplace(io_);
    secure_.reset();
    if (tls_ != nullptr) secure_.emplace(*stream_, *tls_);
    parser_.emplace();
    parser_->body_limit(kMaxReplyBytes);
    buffer_.clear();
    end_ = Clock::now() + absl::ToChronoNanoseconds(limit);
    WaitForEnd();
    const bool hurried = latest_ != Clock::time_point::max();
    if (hurried && !found_.empty()) {
      Connect();
    } else {
      LookUp();
    }
    io_.restart();
    io_.run();
    secure_.reset();
    stream_.reset();
    return std::move(result_);
  }

  void Hurry(absl::Duration limit) {
    const Clock::time_point latest = Clock::now() + absl::ToChronoNanoseconds(limit);
    asio::post(io_, [this, latest] {
      latest_ = latest;
      if (busy_ && timer_.expires_at() > latest) WaitForEnd();
    });
  }

 private:
  void LookUp() {
    resolver_.async_resolve(url_.host, url_.port,
                            [this](beast::error_code error, tcp::resolver::results_type found) {
                              if (error) return Fail("looking up", error);
                              found_ = std::move(found);
                              if (late_) return Fail("looking up", asio::error::operation_aborted);
                              Connect();
                            });
  }

  void Connect() {
    stream_->async_connect(found_, [this](beast::error_code error, const tcp::endpoint&) {
      if (error) return Fail("connecting", error);
      if (!secure_.has_value()) return Write(&*stream_);
      // Of an address there is no name to send, and its certificate names the address.
      beast::error_code is_name;
      asio::ip::make_address(url_.host, is_name);
      if (is_name) SSL_set_tlsext_host_name(secure_->native_handle(), url_.host.c_str());
      secure_->set_verify_callback(ssl::host_name_verification(url_.host));
      secure_->async_handshake(ssl::stream_base::client, [this](beast::error_code failed) {
        if (failed) return Fail("the TLS handshake", failed);
        Write(&*secure_);
      });
    });
  }

  template <typename Stream>
  void Write(Stream* stream) {
    http::async_write(*stream, request_, [this, stream](beast::error_code error, size_t) {
      if (error) return Fail("sending", error);
      Read(stream);
    });
  }

  template <typename Stream>
  void Read(Stream* stream) {
    http::async_read(*stream, buffer_, *parser_, [this](beast::error_code error, size_t) {
      if (error) return Fail("the answer", error);
      HttpReply reply;
      reply.status = static_cast<int>(parser_->get().result_int());
      reply.retry_after = RetryAfter(parser_->get()[http::field::retry_after]);
      reply.body = std::move(parser_->get().body());
      result_ = std::move(reply);
      Finish();
    });
  }

  void Fail(const char* what, beast::error_code error) {
    Finish();
    result_ = late_ ? absl::DeadlineExceededError(
                          absl::StrCat(url_.authority(), ": ", what, " took too long"))
                    : absl::UnavailableError(
                          absl::StrCat(url_.authority(), ": ", what, ": ", error.message()));
  }

  void Finish() {
    busy_ = false;
    timer_.cancel();
  }

  void WaitForEnd() {
    timer_.expires_at(std::min(end_, latest_));
    timer_.async_wait([this](beast::error_code error) {
      if (error) return;  // the request is over, or has another end
      late_ = true;
      resolver_.cancel();
      if (stream_.has_value()) stream_->close();
    });
  }

  const HttpUrl url_;
  const std::unique_ptr<ssl::context> tls_;
  asio::io_context io_{1};
  tcp::resolver resolver_{io_};
  asio::steady_timer timer_{io_};
  Clock::time_point end_;                                // of the request
  Clock::time_point latest_ = Clock::time_point::max();  // of any
  bool busy_ = false;                                    // a request is not over
  bool late_ = false;
  tcp::resolver::results_type found_;  // by the last look-up
  std::optional<beast::tcp_stream> stream_;
  std::optional<ssl::stream<beast::tcp_stream&>> secure_;  // over stream_
  http::request<http::string_body> request_;
  beast::flat_buffer buffer_;
  std::optional<http::response_parser<http::string_body>> parser_;
  absl::StatusOr<HttpReply> result_;
};

absl::StatusOr<std::unique_ptr<HttpPoster>> HttpPoster::Make(HttpUrl url,
                                                             const std::string& authorities) {
  std::unique_ptr<ssl::context> tls;
  if (url.tls) {
    auto made = MakeTls(authorities);
    if (!made.ok()) return made.status();
    tls = *std::move(made);
  } else if (!authorities.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("otlp-authorities needs an otlp-endpoint of https://; it is http://",
                     url.authority(), url.path));
  }
  auto impl = std::make_unique<Impl>(std::move(url), std::move(tls));
  return std::unique_ptr<HttpPoster>(new HttpPoster(std::move(impl)));
}

HttpPoster::HttpPoster(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpPoster::~HttpPoster() = default;

absl::StatusOr<HttpReply> HttpPoster::Post(const std::string& content_type, std::string body,
                                           absl::Duration limit) {
  return impl_->Post(content_type, std::move(body), limit);
}
void HttpPoster::Hurry(absl::Duration limit) { impl_->Hurry(limit); }

}  // namespace structkv::trace
