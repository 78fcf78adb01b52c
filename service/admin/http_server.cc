#include "service/admin/http_server.h"

#include <algorithm>
#include <chrono>
#include <list>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "boost/asio/io_context.hpp"
#include "boost/asio/ip/tcp.hpp"
#include "boost/asio/ip/v6_only.hpp"
#include "boost/asio/steady_timer.hpp"
#include "boost/beast/core.hpp"
#include "boost/beast/http.hpp"

namespace structkv::admin {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using tcp = asio::ip::tcp;

// Of a request: its line and headers.
constexpr size_t kMaxRequestBytes = 8 << 10;
// Pages run their own inline script and style, and ask this server alone.
constexpr char kContentPolicy[] =
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'";

struct Limits {
  std::chrono::nanoseconds time;
  int max_connections = 0;
};

absl::StatusOr<tcp::endpoint> ParseAddress(const std::string& address) {
  const absl::Status bad = absl::InvalidArgumentError(absl::StrCat(
      "'", address, "' is no address to listen on; write for instance 127.0.0.1:7412"));
  const size_t colon = address.rfind(':');
  int port = 0;
  if (colon == std::string::npos || !absl::SimpleAtoi(address.substr(colon + 1), &port) ||
      port < 0 || port > 65535) {
    return bad;
  }
  std::string host = address.substr(0, colon);
  if (host == "localhost") host = "127.0.0.1";
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  boost::system::error_code error;
  const asio::ip::address parsed = asio::ip::make_address(host, error);
  if (error) return bad;
  return tcp::endpoint(parsed, static_cast<uint16_t>(port));
}

// One connection, which lives as long as an operation on it.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  using Response = http::response<http::string_body>;

  Connection(tcp::socket socket, const Limits* limits, const HttpServer::Handler* handler,
             std::shared_ptr<int> count)
      : stream_(std::move(socket)), limits_(limits), handler_(handler), count_(std::move(count)) {
    ++*count_;
  }
  ~Connection() { --*count_; }

  // Whether nothing of a request has come, or not all.
  bool reads() const { return reads_; }
  // Ends it, whatever it does.
  void Drop() {
    beast::error_code ignored;
    stream_.socket().close(ignored);
  }

  void Read() {
    reads_ = true;
    parser_.emplace();
    parser_->header_limit(kMaxRequestBytes);
    parser_->body_limit(0);
    stream_.expires_after(limits_->time);
    http::async_read(
        stream_, buffer_, *parser_,
        [self = shared_from_this()](beast::error_code error, size_t) { self->OnRead(error); });
  }

 private:
  void OnRead(beast::error_code error) {
    reads_ = false;
    if (error == http::error::end_of_stream || error == beast::error::timeout) return Close();
    if (error == http::error::body_limit || error == http::error::unexpected_body)
      return Answer(Plain(413, "no body is read here"), false);
    if (error == http::error::header_limit)
      return Answer(Plain(431, "the headers are too long"), false);
    if (error.category() == http::make_error_code(http::error::bad_method).category()) {
      return Answer(Plain(400, "this is no HTTP request"), false);
    }
    if (error) return;
    const auto& request = parser_->get();
    const bool head = request.method() == http::verb::head;
    if (request.method() != http::verb::get && !head) {
      return Answer(Plain(405, "GET and HEAD alone are answered"), request.keep_alive());
    }
    const beast::string_view target = request.target();
    HttpResponse response =
        (*handler_)(std::string_view(target.data(), std::min(target.find('?'), target.size())));
    Answer(std::move(response), request.keep_alive(), head);
  }

  static HttpResponse Plain(int status, std::string text) {
    return {.status = status, .body = std::move(text) + "\n"};
  }

  void Answer(HttpResponse answer, bool keep_alive, bool head = false) {
    response_ = {};
    response_.result(static_cast<unsigned>(answer.status));
    response_.set(http::field::content_type, answer.content_type);
    response_.set(http::field::cache_control, "no-store");
    response_.set("X-Content-Type-Options", "nosniff");
    response_.set("Content-Security-Policy", kContentPolicy);
    if (answer.status == 405) response_.set(http::field::allow, "GET, HEAD");
    response_.keep_alive(keep_alive);
    response_.content_length(answer.body.size());
    if (!head) response_.body() = std::move(answer.body);
    stream_.expires_after(limits_->time);
    serializer_.emplace(response_);
    const auto written = [self = shared_from_this(), keep_alive](beast::error_code error, size_t) {
      if (error) return;
      if (keep_alive) {
        self->Read();
      } else {
        self->Close();
      }
    };
    if (head) {
      http::async_write_header(stream_, *serializer_, written);
    } else {
      http::async_write(stream_, *serializer_, written);
    }
  }

  void Close() {
    beast::error_code ignored;
    stream_.socket().shutdown(tcp::socket::shutdown_send, ignored);
  }

  beast::tcp_stream stream_;
  bool reads_ = false;
  const Limits* const limits_;
  const HttpServer::Handler* const handler_;
  const std::shared_ptr<int> count_;                 // of connections; on the server's thread alone
  beast::flat_buffer buffer_{2 * kMaxRequestBytes};  // so that the parser finds what is too long
  std::optional<http::request_parser<http::empty_body>> parser_;
  Response response_;
  std::optional<http::response_serializer<http::string_body>> serializer_;
};

}  // namespace

absl::Status CheckAddress(const std::string& address) { return ParseAddress(address).status(); }

class HttpServer::Impl {
 public:
  Impl(const HttpOptions& options, Handler handler)
      : limits_{absl::ToChronoNanoseconds(options.limit), options.max_connections},
        handler_(std::move(handler)) {}

  ~Impl() {
    io_.stop();
    if (thread_.joinable()) thread_.join();
  }

  absl::Status Listen(const std::string& address) {
    const absl::StatusOr<tcp::endpoint> endpoint = ParseAddress(address);
    if (!endpoint.ok()) return endpoint.status();
    boost::system::error_code error;
    if (endpoint->address().is_unspecified()) {
      // Both families, whichever is named; where there is no IPv6, the other one.
      error = Bind(tcp::endpoint(tcp::v6(), endpoint->port()));
      if (error == boost::system::errc::address_family_not_supported ||
          error == boost::system::errc::address_not_available) {
        error = Bind(tcp::endpoint(tcp::v4(), endpoint->port()));
      }
    } else {
      error = Bind(*endpoint);
    }
    if (error) {
      return absl::UnavailableError(
          absl::StrCat("cannot listen on ", address, ": ", error.message()));
    }
    address_ =
        absl::StrCat(address.substr(0, address.rfind(':')), ":", acceptor_.local_endpoint().port());
    Accept();
    thread_ = std::thread([this] { io_.run(); });
    return absl::OkStatus();
  }

  const std::string& address() const { return address_; }

 private:
  boost::system::error_code Bind(const tcp::endpoint& endpoint) {
    boost::system::error_code error;
    boost::system::error_code ignored;
    acceptor_.close(ignored);
    acceptor_.open(endpoint.protocol(), error);
    if (!error) acceptor_.set_option(asio::socket_base::reuse_address(true), error);
    if (!error && endpoint.address().is_v6() && endpoint.address().is_unspecified()) {
      acceptor_.set_option(asio::ip::v6_only(false), error);
    }
    if (!error) acceptor_.bind(endpoint, error);
    if (!error) acceptor_.listen(asio::socket_base::max_listen_connections, error);
    return error;
  }

  void Accept() {
    acceptor_.async_accept([this](boost::system::error_code error, tcp::socket socket) {
      if (error == asio::error::operation_aborted) return;
      if (error) return AcceptLater();
      if (*connections_ >= limits_.max_connections) DropOldest();
      auto connection =
          std::make_shared<Connection>(std::move(socket), &limits_, &handler_, connections_);
      oldest_first_.push_back(connection);
      connection->Read();
      Accept();
    });
  }

  // Who waits longest for nothing makes room: so nobody keeps a monitor out.
  void DropOldest() {
    oldest_first_.remove_if([](const auto& each) { return each.expired(); });
    for (const std::weak_ptr<Connection>& each : oldest_first_) {
      const std::shared_ptr<Connection> connection = each.lock();
      if (connection == nullptr || !connection->reads()) continue;
      connection->Drop();
      return;
    }
  }

  // Without a free descriptor accepting would fail again at once.
  void AcceptLater() {
    pause_.expires_after(std::chrono::milliseconds(100));
    pause_.async_wait([this](boost::system::error_code error) {
      if (!error) Accept();
    });
  }

  const Limits limits_;
  const Handler handler_;
  const std::shared_ptr<int> connections_ = std::make_shared<int>(0);
  std::list<std::weak_ptr<Connection>> oldest_first_;
  std::string address_;
  asio::io_context io_{1};
  tcp::acceptor acceptor_{io_};
  asio::steady_timer pause_{io_};
  std::thread thread_;
};

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const HttpOptions& options,
                                                              Handler handler) {
  auto impl = std::make_unique<Impl>(options, std::move(handler));
  if (absl::Status status = impl->Listen(options.address); !status.ok()) return status;
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpServer::~HttpServer() = default;
const std::string& HttpServer::address() const { return impl_->address(); }

}  // namespace structkv::admin
