"""Bare HTTP/2 frames over TLS, as a peer sends them that does not play by the rules."""

import socket
import ssl
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY, CONTINUATION = 0, 1, 3, 4, 7, 9
END_STREAM, END_HEADERS = 1, 4


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def header(name, value):
    """A literal of HPACK, without a table and without Huffman's code."""
    def text(t):
        assert len(t) < 127
        return bytes([len(t)]) + t.encode()
    return b"\x00" + text(name) + text(value)


def request(path, method="POST", content_type="application/grpc"):
    fields = [(":method", method), (":scheme", "https"), (":path", path), (":authority", "localhost"),
              ("content-type", content_type), ("te", "trailers")]
    return b"".join(header(n, v) for n, v in fields)


def open_tcp(port, source):
    return socket.create_connection(("127.0.0.1", port), timeout=30, source_address=(source, 0))


def open_tls(port, source, authority, pair=None):
    context = ssl.create_default_context(cafile=str(authority))
    context.set_alpn_protocols(["h2"])
    if pair:
        context.load_cert_chain(pair[0], pair[1])
    return context.wrap_socket(open_tcp(port, source), server_hostname="localhost")


def is_closed(connection, seconds):
    """Whether the peer closes it within that time, whatever else it sends."""
    import time
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        connection.settimeout(max(0.01, end - time.monotonic()))
        try:
            if not connection.recv(65536):
                return True
        except (TimeoutError, socket.timeout):
            return False
        except OSError:
            return True
    return False


def send_until_refused(connection, frames, limit):
    """Sends up to `limit` of them; how many went out before the peer broke off."""
    connection.settimeout(30)
    for i in range(limit):
        try:
            connection.sendall(frames(i))
        except OSError:
            return i
    return limit


def status_of(connection, path, **kind):
    """The :status that a request gets, where it is one of HPACK's own (200, 404, ...) or a literal."""
    known = {0x88: 200, 0x8d: 404, 0x8c: 400, 0x8e: 500}
    connection.sendall(PREFACE + frame(SETTINGS, 0, 0) +
                       frame(HEADERS, END_HEADERS | END_STREAM, 1, request(path, **kind)))
    connection.settimeout(10)
    data = b""
    while True:
        while len(data) >= 9:
            length = int.from_bytes(data[:3], "big")
            if len(data) < 9 + length:
                break
            if data[3] == HEADERS:
                first = data[9]
                if first in known:
                    return known[first]
                return int(data[9:9 + length][2:5]) if data[9:9 + length][2:5].isdigit() else -first
            data = data[9 + length:]
        more = connection.recv(65536)
        if not more:
            return None
        data += more
