"""See tests/haproxy.sh."""

import json
import pathlib
import signal
import sys
import tempfile
import threading
import time

import http2
from fixtures import ROOT, Cluster, Program, Relay, wait_for

CAPTURE = ROOT / "tests/data/capture-tiny-llama-1000.safetensors"
LIMITS = {"STRUCTKV_CLIENT_CONNECTIONS": "20", "STRUCTKV_CLIENT_STREAM_RATE": "200",
          "STRUCTKV_CLIENT_TIMEOUT": "20s"}
# Attacks come from addresses of their own, since limits are each address's.
CROWD, SLOW, RESETS, HEADERS, PATHS = (f"127.0.1.{i}" for i in range(1, 6))
HEALTH = "/grpc.health.v1.Health/Check"


def compress(cluster, out, **where):
    return cluster.run("compress", CAPTURE, "--out", out, **where)


def check_prompts(cluster, direct):
    """What comes through the proxy is what comes without it, to the byte."""
    result = compress(cluster, cluster.folder / "direct", host=cluster.HOSTS[0])
    assert result.returncode == 0, result.stderr
    direct += (cluster.folder / "direct").read_bytes()
    for i in range(4):
        result = compress(cluster, cluster.folder / "proxied")
        assert result.returncode == 0, result.stderr
        assert (cluster.folder / "proxied").read_bytes() == direct, "the proxied result differs"


def check_identities(cluster, _):
    """A held cache is found by whoever has the certificate, and not by one who claims the name."""
    cluster.wait_up(cluster.HOSTS[0])
    held = cluster.run("compress", CAPTURE, "--hold", "--json")
    assert held.returncode == 0, held.stderr
    handle = json.loads(held.stdout)["handle"]
    out = cluster.folder / "fetched"
    for claim in ([], ["--tenant", "prefill"]):
        foreign = cluster.run("fetch", handle, "--to", out, *claim, client="decode")
        assert foreign.returncode != 0 and "no such cache is held" in foreign.stderr, foreign.stderr
    # A drain would wait for a cache that stays.
    own = cluster.run("fetch", handle, "--to", out, "--release")
    assert own.returncode == 0, own.stderr
    for client in ("stranger",):
        refused = compress(cluster, out, client=client)
        assert refused.returncode != 0, "a certificate of another authority was taken"
    try:
        with http2.open_tls(cluster.front_port, PATHS, cluster.authority.certificate) as nobody:
            assert http2.is_closed(nobody, 10), "a client without a certificate was let in"
    except OSError:
        pass
    cluster.wait_up(*cluster.HOSTS)


def check_metrics(cluster, _):
    """What the alert rules ask of a proxy."""
    def value(name):
        lines = [line for line in cluster.proxy_metrics().splitlines() if line.startswith(name + " ")]
        return float(lines[0].split()[1])
    wait_for("two servers are active", lambda: value('haproxy_backend_active_servers{proxy="servers"}') == 2)
    assert abs(time.time() - value("haproxy_process_start_time_seconds")) < 3600


def check_long_streams(cluster, _):
    """A stream that is silent for longer than any limit on requests stays open."""
    with http2.open_tls(cluster.front_port, PATHS, cluster.authority.certificate,
                        cluster.clients["prefill"]) as stream:
        watch = http2.request("/grpc.health.v1.Health/Watch")
        stream.sendall(http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0) +
                       http2.frame(http2.HEADERS, http2.END_HEADERS, 1, watch) +
                       http2.frame(http2.DATA, http2.END_STREAM, 1, b"\0\0\0\0\0"))
        assert not http2.is_closed(stream, 15), "a watch of health was ended"


def check_a_killed_server(cluster, direct):
    """Each prompt under way ends in its answer or an error, none in a wrong one; new ones go elsewhere."""
    results, lock = [], threading.Lock()

    def prompts(number):
        for i in range(4):
            out = cluster.folder / f"under-load-{number}-{i}"
            result = compress(cluster, out)
            with lock:
                results.append((result, out))

    threads = [threading.Thread(target=prompts, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    wait_for("a prompt under load", lambda: results)
    victim = cluster.servers[cluster.HOSTS[1]]
    victim.signal(signal.SIGKILL)
    for thread in threads:
        thread.join()
    for result, out in results:
        if result.returncode == 0:
            assert out.read_bytes() == direct, "a wrong answer"
        else:
            assert result.stderr.strip(), "an error without a word"
    wait_for("the killed server is out", lambda: cluster.up() == 1)
    for i in range(3):
        assert compress(cluster, cluster.folder / "after").returncode == 0
    print(f"  {sum(r.returncode == 0 for r, _ in results)} of {len(results)} prompts were answered")
    cluster.start_server(cluster.HOSTS[1])
    wait_for("the new one is in", lambda: cluster.up() == 2)


def check_a_drain(cluster, _):
    """A server that is told to end gets no new prompts, and ends well."""
    host = cluster.HOSTS[1]
    server = cluster.servers[host]
    with http2.open_tls(cluster.front_port, PATHS, cluster.authority.certificate,
                        cluster.clients["prefill"]):
        server.signal(signal.SIGTERM)
        wait_for("it has drained", lambda: server.process.poll() is not None)
        assert server.process.returncode == 0
    wait_for("it is out", lambda: cluster.up() == 1)
    for i in range(3):
        result = compress(cluster, cluster.folder / "drained")
        assert result.returncode == 0, result.stderr
    cluster.start_server(host)
    wait_for("it is back", lambda: cluster.up() == 2)


def check_a_drain_under_a_prompt(cluster, direct):
    """A prompt whose server is told to end in the midst of it gets its answer, and new ones go elsewhere."""
    out, log = cluster.folder / "through-a-drain", cluster.folder / "through-a-drain.log"
    done = 'structkv_sessions_total{result="ok"}'
    with Relay(cluster.front_port, CAPTURE.stat().st_size // 2) as relay, \
            Program(cluster.command("compress", CAPTURE, "--out", out, front=relay.port), log) as client:
        def serving():
            return [h for h in cluster.HOSTS if cluster.metric(h, "structkv_sessions_active") == 1]
        wait_for("half a prompt is with a server", lambda: relay.waits.is_set() and serving())
        (host,) = serving()
        (other,) = set(cluster.HOSTS) - {host}
        server = cluster.servers[host]
        server.signal(signal.SIGTERM)
        wait_for("HAProxy has taken it out", lambda: cluster.up() == 1)
        before = cluster.metric(other, done)
        for i in range(3):
            result = compress(cluster, cluster.folder / "elsewhere")
            assert result.returncode == 0, result.stderr
            assert (cluster.folder / "elsewhere").read_bytes() == direct
        assert cluster.metric(other, done) == before + 3
        assert client.process.poll() is None and serving() == [host], "the prompt did not go on"
        assert server.process.poll() is None, "the server did not wait for its prompt"
        relay.let_go()
        assert client.process.wait(60) == 0, log.read_text()
        assert out.read_bytes() == direct, "a wrong answer"
    wait_for("it has drained", lambda: server.process.poll() is not None)
    assert server.process.returncode == 0
    assert "streams_cut=none" in server.log.read_text()
    cluster.start_server(host)
    wait_for("it is back", lambda: cluster.up() == 2)


def check_connections(cluster, _):
    """One address has 20 connections, and the others what they need."""
    crowd = []
    for i in range(40):
        try:
            crowd.append(http2.open_tls(cluster.front_port, CROWD, cluster.authority.certificate,
                                        cluster.clients["prefill"]))
        except OSError:
            pass
    assert len(crowd) == 20, f"{len(crowd)} connections of one address"
    assert compress(cluster, cluster.folder / "crowded").returncode == 0
    for one in crowd:
        one.close()


def check_slow_handshakes(cluster, _):
    """Whoever does not shake hands, or says hello and then nothing more of its request, is closed."""
    silent = http2.open_tcp(cluster.front_port, SLOW)
    half = http2.open_tls(cluster.front_port, SLOW, cluster.authority.certificate, cluster.clients["prefill"])
    half.sendall(http2.PREFACE[:10])
    start = time.monotonic()
    assert http2.is_closed(silent, 40), "a connection without a handshake stays"
    assert http2.is_closed(half, 40), "a connection with half a preface stays"
    print(f"  closed after {time.monotonic() - start:.0f} s")


def check_rapid_reset(cluster, _):
    """Streams that are reset as soon as they are begun: servers see no more than the rate, others are served."""
    programs = [cluster.proxy, *cluster.servers.values()]
    before = [p.resident_kib() for p in programs]
    lines = [len(s.log.read_text().splitlines()) for s in cluster.servers.values()]
    block = http2.request("/structkv.v1.Compression/Compress")

    def frames(i):
        stream = 2 * i + 1
        return (http2.frame(http2.HEADERS, http2.END_HEADERS, stream, block) +
                http2.frame(http2.RST_STREAM, 0, stream, b"\0\0\0\x08"))

    with http2.open_tls(cluster.front_port, RESETS, cluster.authority.certificate,
                        cluster.clients["prefill"]) as peer:
        peer.sendall(http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0))
        sent = http2.send_until_refused(peer, frames, 50_000)
        assert compress(cluster, cluster.folder / "meanwhile").returncode == 0
        closed = sent < 50_000 or http2.is_closed(peer, 1)
    grown = [p.resident_kib() - b for p, b in zip(programs, before)]
    assert max(grown) < 100 << 10, f"memory grew by {grown} KiB"
    seen = sum(len(s.log.read_text().splitlines()) - l for s, l in zip(cluster.servers.values(), lines))
    assert seen <= 250, f"the servers saw {seen} streams"
    print(f"  {sent} streams, {seen} of them at the servers; connection closed: {closed}; memory grew by {max(grown)} KiB")


def check_endless_headers(cluster, _):
    """Headers that go on and on (CONTINUATION)."""
    before = cluster.proxy.resident_kib()
    with http2.open_tls(cluster.front_port, HEADERS, cluster.authority.certificate,
                        cluster.clients["prefill"]) as peer:
        peer.sendall(http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0) +
                     http2.frame(http2.HEADERS, 0, 1, http2.request(HEALTH)))
        filler = http2.frame(http2.CONTINUATION, 0, 1, http2.header("x-filler", "a" * 100) * 100)
        sent = http2.send_until_refused(peer, lambda _: filler, 20_000)
        assert sent < 20_000 or http2.is_closed(peer, 10), "the connection stays"
    assert cluster.proxy.resident_kib() - before < 50 << 10
    assert compress(cluster, cluster.folder / "after").returncode == 0
    print(f"  refused after {sent} frames")


def check_paths(cluster, _):
    """Nothing but the servers' own calls passes."""
    def status(path, **kind):
        with http2.open_tls(cluster.front_port, PATHS, cluster.authority.certificate,
                            cluster.clients["prefill"]) as peer:
            return http2.status_of(peer, path, **kind)
    assert status(HEALTH) == 200
    assert status("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo") == 404
    assert status("/statusz") == 404
    assert status(HEALTH, method="GET") != 200
    assert status(HEALTH, content_type="text/html") != 200


def main():
    binaries = pathlib.Path(sys.argv[1]).resolve()
    checks = [check_prompts, check_metrics, check_identities, check_paths, check_long_streams, check_connections,
              check_slow_handshakes, check_rapid_reset, check_endless_headers, check_a_killed_server, check_a_drain,
              check_a_drain_under_a_prompt]
    direct = bytearray()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        try:
            with Cluster(folder, binaries, LIMITS) as cluster:
                for check in checks:
                    print(f"haproxy: {check.__doc__.strip().splitlines()[0]}", flush=True)
                    check(cluster, direct)
        except BaseException:
            for log in sorted(folder.glob("*.log")):
                print(f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-25:]))
            raise
    print("haproxy: passed")


main()
