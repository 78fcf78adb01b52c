#include "tests/admin/http_get.h"

#include <utility>

#include "boost/asio/buffers_iterator.hpp"
#include "boost/asio/ip/tcp.hpp"
#include "boost/asio/read.hpp"
#include "boost/asio/streambuf.hpp"
#include "boost/asio/write.hpp"
#include "boost/beast/core.hpp"
#include "boost/beast/http.hpp"

namespace structkv::testkit {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;

asio::ip::tcp::socket Connect(asio::io_context* io, const std::string& address) {
  const size_t colon = address.rfind(':');
  std::string host = address.substr(0, colon);
  if (host.front() == '[') host = host.substr(1, host.size() - 2);
  asio::ip::tcp::socket socket(*io);
  socket.connect(
      {asio::ip::make_address(host), static_cast<uint16_t>(std::stoi(address.substr(colon + 1)))});
  return socket;
}

}  // namespace

HttpAnswer HttpGet(const std::string& address, const std::string& path, const std::string& method) {
  asio::io_context io;
  asio::ip::tcp::socket socket = Connect(&io, address);
  http::request<http::empty_body> request(http::string_to_verb(method), path, 11);
  request.set(http::field::host, address);
  request.keep_alive(false);
  http::write(socket, request);
  boost::beast::flat_buffer buffer;
  http::response_parser<http::string_body> parser;
  parser.skip(method == "HEAD");
  http::read(socket, buffer, parser);
  HttpAnswer answer = {.status = static_cast<int>(parser.get().result_int()),
                       .headers = {},
                       .body = parser.get().body()};
  for (const auto& field : parser.get()) {
    answer.headers[std::string(field.name_string())] = std::string(field.value());
  }
  return answer;
}

std::string HttpRaw(const std::string& address, const std::string& bytes) {
  asio::io_context io;
  asio::ip::tcp::socket socket = Connect(&io, address);
  boost::system::error_code error;
  asio::write(socket, asio::buffer(bytes), error);
  asio::streambuf all;
  asio::read(socket, all, error);
  return {asio::buffers_begin(all.data()), asio::buffers_end(all.data())};
}

}  // namespace structkv::testkit
