"""Certificates, a name server, servers and HAProxy, all of them on this host's loopback addresses."""

import contextlib
import os
import pathlib
import signal
import socket
import struct
import subprocess
import threading
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = ROOT / "k8s/components/haproxy/haproxy.cfg"
SERVICE = "structkv.test"


def wait_for(what, condition, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


class Authority:
    def __init__(self, folder, name):
        self.folder, self.name = folder, name
        self.certificate = folder / f"{name}.crt"
        self.key = folder / f"{name}.key"
        self._openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={name}",
                      "-keyout", self.key, "-out", self.certificate)

    @staticmethod
    def _openssl(*arguments):
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)

    def sign(self, common_name, alternative_names):
        """(certificate, key, both in one file)"""
        base = self.folder / f"{self.name}-{common_name}"
        paths = [base.with_suffix(s) for s in (".crt", ".key", ".pem")]
        request, extra = base.with_suffix(".csr"), base.with_suffix(".ext")
        extra.write_text(f"subjectAltName={alternative_names}\n")
        self._openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={common_name}", "-keyout", paths[1],
                      "-out", request)
        self._openssl("x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self.key,
                      "-CAcreateserial", "-days", "1", "-extfile", extra, "-out", paths[0])
        paths[2].write_text(paths[0].read_text() + paths[1].read_text())
        return paths


class NameServer:
    """Says over UDP which addresses SERVICE has, as a cluster's does of a headless service."""

    def __init__(self):
        self.addresses = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address = "127.0.0.1:%d" % self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            query, client = self._socket.recvfrom(4096)
            labels, at = [], 12
            while query[at]:
                labels.append(query[at + 1:at + 1 + query[at]].decode())
                at += 1 + query[at]
            question = query[12:at + 5]
            (kind,) = struct.unpack(">H", query[at + 1:at + 3])
            known = ".".join(labels) == SERVICE
            found = self.addresses if known and kind == 1 else []
            answers = b"".join(b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 1, 4) + socket.inet_aton(one) for one in found)
            flags = 0x8580 if known else 0x8583
            header = query[:2] + struct.pack(">HHHHH", flags, 1, len(found), 0, 0)
            self._socket.sendto(header + question + answers, client)


def free_port(hosts):
    while True:
        with contextlib.ExitStack() as stack:
            port = 0
            try:
                for host in hosts:
                    one = stack.enter_context(socket.socket())
                    one.bind((host, port))
                    port = one.getsockname()[1]
                return port
            except OSError:
                continue


class Program:
    """Ended with the context."""

    def __init__(self, arguments, log, environment=None):
        self.log = log
        clean = {k: v for k, v in os.environ.items() if not k.startswith("STRUCTKV_")}
        self.process = subprocess.Popen([str(a) for a in arguments], stdout=open(log, "ab"), stderr=subprocess.STDOUT,
                                        env={**clean, **(environment or {})})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def signal(self, number):
        self.process.send_signal(number)

    def resident_kib(self):
        for line in open(f"/proc/{self.process.pid}/status"):
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise AssertionError("the process is gone")


class Relay:
    """Passes one TCP connection on to a port of this host: what the client sends only up to so many bytes, until it is let go."""

    def __init__(self, port, most):
        self.waits, self._go = threading.Event(), threading.Event()
        self._to, self._most = port, most
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets = []
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.let_go()
        for one in [self._listener, *self._sockets]:
            one.close()

    def let_go(self):
        self._go.set()

    def _serve(self):
        client = self._listener.accept()[0]
        server = socket.create_connection(("127.0.0.1", self._to))
        self._sockets += [client, server]
        threading.Thread(target=self._copy, args=(server, client, None), daemon=True).start()
        self._copy(client, server, self._most)

    def _copy(self, source, target, most):
        try:
            while data := source.recv(65536 if most is None else max(1, min(65536, most))):
                target.sendall(data)
                if most is None:
                    continue
                most -= len(data)
                if most <= 0:
                    self.waits.set()
                    self._go.wait()
                    most = None
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # either end has gone


class Cluster:
    """Two servers that take calls from the proxy, and from clients who come directly."""

    HOSTS = ("127.0.0.2", "127.0.0.3")

    def __init__(self, folder, binaries, limits):
        self.folder, self.binaries = folder, binaries
        self.authority = Authority(folder, "authority")
        self.stranger = Authority(folder, "stranger")
        self.server_pair = self.authority.sign("server", f"DNS:{SERVICE}," + ",".join(f"IP:{h}" for h in self.HOSTS))
        self.front_pair = self.authority.sign("front", "IP:127.0.0.1,DNS:localhost")
        self.proxy_pair = self.authority.sign("proxy", "DNS:proxy.structkv")
        self.clients = {name: self.authority.sign(name, f"DNS:{name}") for name in ("prefill", "decode")}
        self.clients["stranger"] = self.stranger.sign("prefill", "DNS:prefill")
        self.dns = NameServer()
        self.port, self.admin_port = free_port(self.HOSTS), free_port(self.HOSTS)
        self.front_port, self.status_port = free_port(["127.0.0.1"]), free_port(["127.0.0.1"])
        self.servers = {}
        self.stack = contextlib.ExitStack()
        self.limits = limits
        self.proxy = None

    def __enter__(self):
        for host in self.HOSTS:
            self.start_server(host)
        self.set_addresses(*self.HOSTS)
        environment = {
            "STRUCTKV_BIND": f"127.0.0.1:{self.front_port}", "STRUCTKV_TLS": str(self.front_pair[2]),
            "STRUCTKV_CLIENT_CA": str(self.authority.certificate), "STRUCTKV_SERVICE": SERVICE,
            "STRUCTKV_PORT": str(self.port), "STRUCTKV_ADMIN_PORT": str(self.admin_port),
            "STRUCTKV_DNS": self.dns.address, "STRUCTKV_BACKEND_CA": str(self.authority.certificate),
            "STRUCTKV_BACKEND_CERT": str(self.proxy_pair[2]),
            "STRUCTKV_STATUS_BIND": f"127.0.0.1:{self.status_port}", **self.limits}
        self.proxy = self.stack.enter_context(
            Program(["haproxy", "-W", "-db", "-f", CONFIG], self.folder / "haproxy.log", environment))
        self.wait_up(*self.HOSTS)
        return self

    def __exit__(self, *_):
        self.stack.close()

    def start_server(self, host):
        log = self.folder / f"server-{host}.log"
        log.unlink(missing_ok=True)
        self.servers[host] = self.stack.enter_context(Program(
            [self.binaries / "structkv-server", "--listen", f"{host}:{self.port}", "--admin-listen",
             f"{host}:{self.admin_port}", "--tls-certificate", self.server_pair[0], "--tls-key", self.server_pair[1],
             "--client-authorities", self.authority.certificate, "--proxy-names", "proxy.structkv",
             "--hold-budget", "256MiB", "--threads", "1"], log))
        wait_for(f"{host} is ready", lambda: " ready " in log.read_text())

    def set_addresses(self, *hosts):
        self.dns.addresses = list(hosts)

    def proxy_metrics(self):
        return urllib.request.urlopen(f"http://127.0.0.1:{self.status_port}/metrics", timeout=5).read().decode()

    def up(self):
        """Addresses of the servers that HAProxy sends streams to."""
        try:
            text = self.proxy_metrics()
        except OSError:
            return -1
        def servers(metric, state):
            return {l.split('server="')[1].split('"')[0] for l in text.splitlines()
                    if l.startswith(metric + "{") and 'proxy="servers"' in l and f'state="{state}"' in l
                    and l.endswith(" 1")}
        return len(servers("haproxy_server_status", "UP") & servers("haproxy_server_check_status", "L7OK"))

    def wait_up(self, *hosts):
        self.set_addresses(*hosts)
        wait_for(f"{len(hosts)} servers are up", lambda: self.up() == len(hosts))

    def metric(self, host, series):
        """What a server says of a series of /metrics; 0 where it is not there."""
        text = urllib.request.urlopen(f"http://{host}:{self.admin_port}/metrics", timeout=5).read().decode()
        return next((float(l.split()[-1]) for l in text.splitlines() if l.startswith(series + " ")), 0)

    def command(self, name, *arguments, client="prefill", host=None, front=None):
        """A `structkv` command line, for a server or, by default, the proxy; `front`: by that port of this host."""
        address = f"{host}:{self.port}" if host else f"127.0.0.1:{front or self.front_port}"
        certificate, key, _ = self.clients[client]
        return [str(a) for a in (self.binaries / "structkv", name, *arguments, "--server", address, "--tls-authorities",
                                 self.authority.certificate, "--tls-certificate", certificate, "--tls-key", key)]

    def run(self, name, *arguments, **where):
        return subprocess.run(self.command(name, *arguments, **where), capture_output=True, text=True, timeout=120)
