#include "tests/trace/fake_collector.h"

#include <deque>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "absl/time/clock.h"
#include "boost/asio/io_context.hpp"
#include "boost/asio/ip/tcp.hpp"
#include "boost/asio/post.hpp"
#include "boost/asio/ssl.hpp"
#include "boost/beast/core.hpp"
#include "boost/beast/http.hpp"

namespace structkv::testkit {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
namespace ssl = asio::ssl;
using tcp = asio::ip::tcp;
using Json = nlohmann::json;

constexpr absl::Duration kPatience = absl::Seconds(60);

struct Connection {
  explicit Connection(tcp::socket taken) : socket(std::move(taken)) {}
  // With its stream, whichever that is.
  template <typename Call>
  void With(const Call& call) {
    secure.has_value() ? call(*secure) : call(socket);
  }
  tcp::socket socket;
  std::optional<ssl::stream<tcp::socket&>> secure;  // over it
  beast::flat_buffer buffer;
  http::request<http::string_body> request;
  http::response<http::string_body> response;
};

}  // namespace

class FakeCollector::Impl {
 public:
  explicit Impl(const Authority::Pair& pair)
      : acceptor_(io_, {asio::ip::make_address("127.0.0.1"), 0}) {
    if (!pair.key.empty()) {
      tls_.emplace(ssl::context::tls_server);
      tls_->use_certificate_chain(asio::buffer(pair.certificate));
      tls_->use_private_key(asio::buffer(pair.key), ssl::context::pem);
    }
    endpoint_ = std::string(tls_.has_value() ? "https" : "http") +
                "://127.0.0.1:" + std::to_string(acceptor_.local_endpoint().port()) + "/v1/traces";
    Accept();
    thread_ = std::thread([this] { io_.run(); });
  }
  ~Impl() {
    io_.stop();
    thread_.join();
  }

  void Close() {
    asio::post(io_, [this] { acceptor_.close(); });
    while (open()) absl::SleepFor(absl::Milliseconds(1));
  }
  bool open() const {
    const std::lock_guard lock(mutex_);
    return open_;
  }

  std::string endpoint_;
  mutable std::mutex mutex_;
  bool open_ = true;
  std::deque<int> statuses_;
  std::string reply_ = "{}";
  std::string retry_after_;
  std::vector<CollectorRequest> requests_;
  std::vector<Json> spans_;

 private:
  void Accept() {
    acceptor_.async_accept([this](boost::system::error_code error, tcp::socket socket) {
      if (error) {
        const std::lock_guard lock(mutex_);
        open_ = false;
        return;
      }
      auto connection = std::make_shared<Connection>(std::move(socket));
      if (tls_.has_value()) {
        connection->secure.emplace(connection->socket, *tls_);
        connection->secure->async_handshake(ssl::stream_base::server,
                                            [this, connection](beast::error_code failed) {
                                              if (!failed) Read(connection);
                                            });
      } else {
        Read(connection);
      }
      Accept();
    });
  }

  void Read(const std::shared_ptr<Connection>& connection) {
    connection->With([&](auto& stream) {
      http::async_read(stream, connection->buffer, connection->request,
                       [this, connection](beast::error_code failed, size_t) {
                         if (!failed) Answer(connection);
                       });
    });
  }

  void Answer(const std::shared_ptr<Connection>& connection) {
    int status = 200;
    {
      const std::lock_guard lock(mutex_);
      const auto& request = connection->request;
      requests_.push_back({std::string(request.target()),
                           std::string(request[http::field::content_type]), request.body()});
      if (!statuses_.empty()) {
        status = statuses_.front();
        statuses_.pop_front();
      }
      if (status == 200) Keep(request.body());
      connection->response = {static_cast<http::status>(status == 0 ? 200 : status), 11};
      connection->response.body() = reply_;
      if (status != 200 && !retry_after_.empty()) {
        connection->response.set(http::field::retry_after, retry_after_);
      }
    }
    if (status == 0) {
      silent_.push_back(connection);
      return;
    }
    connection->response.keep_alive(false);
    connection->response.prepare_payload();
    connection->With([&](auto& stream) {
      http::async_write(stream, connection->response, [connection](beast::error_code, size_t) {});
    });
  }

  void Keep(const std::string& body) {
    const Json json = Json::parse(body, nullptr, /*allow_exceptions=*/false);
    if (json.is_discarded()) return;
    for (const Json& resource : json["resourceSpans"]) {
      for (const Json& scope : resource["scopeSpans"]) {
        for (const Json& span : scope["spans"]) spans_.push_back(span);
      }
    }
  }

  std::optional<ssl::context> tls_;
  asio::io_context io_{1};
  tcp::acceptor acceptor_;
  std::vector<std::shared_ptr<Connection>> silent_;
  std::thread thread_;
};

FakeCollector::FakeCollector(const Authority::Pair& pair) : impl_(std::make_unique<Impl>(pair)) {}
FakeCollector::~FakeCollector() = default;

const std::string& FakeCollector::endpoint() const { return impl_->endpoint_; }

void FakeCollector::AnswerWith(std::vector<int> statuses) {
  const std::lock_guard lock(impl_->mutex_);
  impl_->statuses_.assign(statuses.begin(), statuses.end());
}

void FakeCollector::SetReply(std::string body, std::string retry_after) {
  const std::lock_guard lock(impl_->mutex_);
  impl_->reply_ = std::move(body);
  impl_->retry_after_ = std::move(retry_after);
}

void FakeCollector::Close() { impl_->Close(); }

std::vector<CollectorRequest> FakeCollector::requests() const {
  const std::lock_guard lock(impl_->mutex_);
  return impl_->requests_;
}

std::vector<Json> FakeCollector::spans() const {
  const std::lock_guard lock(impl_->mutex_);
  return impl_->spans_;
}

bool FakeCollector::WaitForSpans(size_t count) const {
  const absl::Time end = absl::Now() + kPatience;
  while (spans().size() < count) {
    if (absl::Now() > end) return false;
    absl::SleepFor(absl::Milliseconds(5));
  }
  return true;
}

std::string AttributeOf(const Json& span, const std::string& key) {
  for (const Json& attribute : span["attributes"]) {
    if (attribute["key"] != key) continue;
    const Json& value = attribute["value"];
    return value.begin().value().get<std::string>();
  }
  return "";
}

}  // namespace structkv::testkit
