"""What the manifests tell the server, and what they ask of it, is what the server knows: held against `--help`,
`--check-config`, and the metrics and paths of a server that runs."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

import container_options
from certificates import make_certificates
from render import K8S, OVERLAYS, SOURCE, containers, few, fits, named, of_kind, render, server_pods

BIN = pathlib.Path(os.environ["STRUCTKV_BIN"])
SERVER = BIN / "structkv-server"
CLIENT = BIN / "structkv"
EVERYTHING = [(o, c) for o in OVERLAYS for c in ((), max(few(o), key=len), ("tokens",)) if c != ("tokens",) or fits(o, "tokens")]
each_case = pytest.mark.parametrize(("overlay", "components"), EVERYTHING, ids=["-".join((o, *c)) for o, c in EVERYTHING])
# What Prometheus and its operator add to every series, and histograms to theirs.
ADDED = {"namespace", "pod", "job", "instance", "container", "endpoint", "le"}


def flags(*command: str) -> set[str]:
    text = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^  (?:-\w,)?(--[a-z-]+)", text, re.MULTILINE))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Stands for a container's root: what its volumes would have."""
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl")
    root = tmp_path_factory.mktemp("root")
    make_certificates(["structkv.structkv.svc"], "spiffe://cluster.local/client", root)
    for directory in ("etc/structkv/tls", "etc/structkv/config", "etc/structkv/tokens", "run/structkv"):
        (root / directory).mkdir(parents=True)
    for file in ("tls.crt", "tls.key", "ca.crt"):
        shutil.copy(root / "server" / file, root / "etc/structkv/tls")
    (root / "etc/structkv/tokens/tokens").write_text("team-a 0123456789abcdef0123456789abcdef\n")
    return root


@each_case
def test_options(overlay: str, components: tuple[str, ...], files: pathlib.Path) -> None:
    objects = render(overlay, components)
    known = flags(str(SERVER))

    def placed(text: str) -> str:
        return re.sub(r"/(etc|run)/structkv/", rf"{files}/\1/structkv/", text)

    for workload, container in server_pods(objects):
        text = placed(container_options.config_text(objects, workload))
        environment = container_options.environment(container)
        for argument in container["args"]:
            assert not argument.startswith("-") or argument.partition("=")[0] in known
        for name in environment:
            assert "--" + name.removeprefix("STRUCTKV_").lower().replace("_", "-") in known, name
        config = pathlib.Path(placed(container_options.CONFIG))
        config.write_text(text)
        command = [str(SERVER), *(placed(argument) for argument in container["args"]), "--check-config"]
        assert any(str(config) in each for each in command), "the file is not the one that is mounted"
        # Where the kernels were not built the server knows no backend cuda.
        if environment.get("STRUCTKV_BACKEND") == "cuda" and "cuda" not in known_backends():
            environment["STRUCTKV_BACKEND"] = "auto"
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        # And it would say so if one were unknown.
        config.write_text(text + "structkv-typo: 1\n")
        assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode != 0


def known_backends() -> set[str]:
    text = subprocess.run([SERVER, "--help"], capture_output=True, text=True, check=True).stdout
    return set(re.search(r"--backend NAME.*computes: (.*)", text)[1].split(", "))  # type: ignore[index]


def port_of(address: str) -> int | None:
    return None if address.startswith("unix:") else int(address.rpartition(":")[2])


@each_case
def test_ports(overlay: str, components: tuple[str, ...]) -> None:
    objects = render(overlay, components)
    for workload, container in server_pods(objects):
        options = container_options.options(objects, workload, container)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["admin"] == port_of(options["admin-listen"])
        assert ports.get("grpc") == port_of(options["listen"])


def commands() -> list[list[str]]:
    """Of containers that run the command `structkv`."""
    found = [c for o in (*render("sidecar"), *render("cpu", ("certificate", "first-prompt")))
             if o["kind"] in ("Deployment", "Job") for c in containers(o)]
    return [container["args"] for container in found if container.get("command") == ["/usr/bin/structkv"]]


def test_clients_flags() -> None:
    assert len(commands()) == 2
    for command, *arguments in commands():
        assert {argument.partition("=")[0] for argument in arguments} <= flags(str(CLIENT), command)
        # Measures nothing, and needs no server and no certificate.
        plain = [argument for argument in arguments if not argument.startswith("--tls")]
        done = subprocess.run([CLIENT, command, *plain, "--bytes"], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def running() -> Iterator[tuple[str, str]]:
    """A server with the base's options, at ports that are free: its address and its admin port's."""
    (workload, container), = server_pods(render("cpu"))
    environment = {**container_options.environment(container), "STRUCTKV_LISTEN": "127.0.0.1:0"}
    environment |= {"STRUCTKV_ADMIN_LISTEN": "127.0.0.1:0", "STRUCTKV_LOG_FORMAT": "json"}
    with subprocess.Popen([SERVER], env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            ready = json.loads(process.stderr.readline())
            yield ready["listen"], "http://" + ready["admin"]
        finally:
            process.terminate()
            process.communicate(timeout=60)
    assert process.returncode == 0


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, str]]:
    """The admin port of a server that has had a prompt, and its metrics."""
    with running() as (address, admin):
        capture = SOURCE / "tests/data/capture-tiny-llama-1000.safetensors"
        subprocess.run([CLIENT, "compress", capture, "--server", address, "--hold"], check=True, capture_output=True)
        deadline = time.monotonic() + 60
        while 'structkv_sessions_total{result="ok"} 1' not in (text := get(admin + "/metrics")[1]):
            assert time.monotonic() < deadline, text
            time.sleep(0.05)
        yield admin, text


def test_paths(served: tuple[str, str]) -> None:
    admin, _ = served
    for overlay in OVERLAYS:
        objects = render(overlay, max(few(overlay), key=len))
        paths = {c[probe]["httpGet"]["path"] for _, c in server_pods(objects)
                 for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
        paths |= {end["path"] for m in of_kind(objects, "PodMonitor") for end in m["spec"]["podMetricsEndpoints"]}
        assert paths == {"/livez", "/readyz", "/metrics"}
        assert {get(admin + path)[0] for path in paths} == {200}
    assert get(admin + "/structkv-typo")[0] == 404


def expressions() -> list[tuple[str, str]]:
    """Where, and what: every expression over metrics in k8s/."""
    found: list[tuple[str, str]] = []
    everything = render("cpu", max((c for c in few("cpu") if "hpa" in c), key=len)) + render("cpu", ("keda",))
    for thing in of_kind(everything, "PrometheusRule"):
        rules = [rule for group in thing["spec"]["groups"] for rule in group["rules"]]
        found += [(rule.get("alert", rule.get("record")), rule["expr"]) for rule in rules]
    for thing in of_kind(everything, "ScaledObject"):
        found += [("keda", trigger["metadata"]["query"]) for trigger in thing["spec"]["triggers"]]
    for rule in yaml.safe_load((K8S / "components/hpa/adapter-rules.yaml").read_text())["rules"]:
        query = rule["metricsQuery"].replace("<<.Series>>", rule["seriesQuery"].partition("{")[0])
        found += [("adapter", rule["seriesQuery"]), ("adapter", query.replace("<<.LabelMatchers>>", "").replace("<<.GroupBy>>", "pod"))]

    def targets(node: Any, where: str) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("expr"), str):
                found.append((where, node["expr"]))
            for value in node.values():
                targets(value, where)
        elif isinstance(node, list):
            for value in node:
                targets(value, where)

    for path in (K8S / "components/dashboards").glob("*.json"):
        targets(json.loads(path.read_text()), path.name)
    return found


def documented_labels() -> dict[str, set[str]]:
    """Of docs/operations.md's table, for series that a server without GPUs, TLS and faults does not have."""
    found: dict[str, set[str]] = {}
    for line in (SOURCE / "docs/operations.md").read_text().splitlines():
        if line.startswith("| `structkv_"):
            names, labels = line.split("|")[1:3]
            for name in re.findall(r"structkv_\w+", names):
                found[name] = set(re.findall(r"\w+", labels))
    return found


def live_labels(text: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"(structkv_\w+)(?:\{(.*)\})? ", line):
            found.setdefault(match[1], set()).update(re.findall(r'(\w+)="', match[2] or ""))
    return found


def test_metrics_and_labels(served: tuple[str, str]) -> None:
    live, documented = live_labels(served[1]), documented_labels()
    own = SERVER.read_bytes()
    used = expressions()
    assert len(used) > 10
    for where, expression in used:
        # tests/haproxy.sh asks a real one for the proxy's metrics.
        allowed = set(ADDED) | ({"proxy"} if "haproxy_" in expression else set())
        for name in set(re.findall(r"\bstructkv_[a-z0-9_]+", expression)):
            plain = re.sub(r"_(bucket|sum|count)$", "", name)
            assert name.encode() in own or plain.encode() in own, f"{where}: the server has no {name}"
            labels = live.get(name, documented.get(plain))
            assert labels is not None, f"{where}: {name} is neither there nor in docs/operations.md"
            allowed |= labels
        asked = set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)\s*[\"']", expression))
        for group in re.findall(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)", expression):
            asked |= set(re.findall(r"\w+", group))
        assert asked <= allowed, f"{where}: {asked - allowed} are no labels of {expression}"


def test_the_autoscaler_asks_for_what_the_adapter_makes() -> None:
    made = {rule["name"]["as"] for rule in yaml.safe_load((K8S / "components/hpa/adapter-rules.yaml").read_text())["rules"]}
    scaler = named(render("cpu", ("hpa",)), "HorizontalPodAutoscaler", "structkv")
    assert {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]} == made
