#!/usr/bin/env python3
"""A pod's life on this machine, from the rendered manifest of the overlay `cpu`: its arguments, environment, ConfigMap,
certificates, user, mounts, memory limit, probes, preStop and grace. The server starts, is probed, answers clients, is
told to stop in the midst of a prompt, finishes that, and ends with 0.

Runs in a network namespace of its own, so that the manifest's ports are free, with the pod at 10.77.0.2 under the name
that the certificate has. Needs root; tests/k8s/pod_life.sh starts it."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict

import container_options
import pod_sandbox
from certificates import make_certificates
from pod_kubelet import Kubelet
from quantity import in_bytes
from render import SOURCE, named, render, server_pods

BIN = pathlib.Path(os.environ["STRUCTKV_BIN"])
ENTRY = ["/usr/bin/structkv-server"]  # of the images; test_manifests.py holds the Containerfiles to it
ADDRESS = "10.77.0.2"
CAPTURE = SOURCE / "tests/data/capture-tiny-llama-1000.safetensors"


def say(text: str) -> None:
    print(f"pod_life: {text}", flush=True)


def until(what: str, holds: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def make_network(hosts: dict[str, str], work: pathlib.Path) -> None:
    """PermissionError: this machine lets nobody have one."""
    file = work / "hosts"
    file.write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
    pod_sandbox.unshare(pod_sandbox.CLONE_NEWNET | pod_sandbox.CLONE_NEWNS)
    try:
        pod_sandbox.mount("--make-rprivate", "/")
        for command in ("link set lo up", f"address add {ADDRESS}/32 dev lo"):
            subprocess.run(["ip", *command.split()], check=True)
        pod_sandbox.mount("--bind", str(file), "/etc/hosts")
    except subprocess.CalledProcessError as error:
        raise PermissionError(str(error)) from error


class Pod:
    """The server's container, running."""

    def __init__(self, work: pathlib.Path) -> None:
        objects = render("cpu", ("certificate",))
        ((self.workload, self.manifest),) = server_pods(objects)
        self.spec = self.workload["spec"]["template"]["spec"]
        certificate = named(objects, "Certificate", "structkv-server")["spec"]
        assert certificate["secretName"] == next(v for v in self.spec["volumes"] if v["name"] == "tls")["secret"]["secretName"]
        service = named(objects, "Service", "structkv")["metadata"]
        self.name = f"{service['name']}.{service['namespace']}.svc"
        port = named(objects, "Service", "structkv")["spec"]["ports"][0]["port"]
        self.client_flags = ["--server", f"dns:///{self.name}:{port}", "--tls-authorities", str(work / "client/ca.crt"),
                             "--tls-certificate", str(work / "client/tls.crt"), "--tls-key", str(work / "client/tls.key")]
        make_certificates(certificate["dnsNames"], named(objects, "Certificate", "structkv-client")["spec"]["uris"][0], work)
        self._put_volumes(objects, work)
        self.limit = in_bytes(self.manifest["resources"]["limits"]["memory"])
        self.group = pod_sandbox.memory_group(f"structkv-pod-{os.getpid()}", self.limit)
        self.log = work / "log"
        self.work = work

    def _put_volumes(self, objects: object, work: pathlib.Path) -> None:
        """Files as the kubelet puts them: the group is fsGroup, the mode the volume's."""
        (work / "config").mkdir()
        (work / "config/structkv.yaml").write_text(container_options.config_text(objects, self.workload))  # type: ignore[arg-type]
        (work / "tls").mkdir()
        mode = next(v for v in self.spec["volumes"] if v["name"] == "tls")["secret"]["defaultMode"]
        for file in ("tls.crt", "tls.key", "ca.crt"):
            target = work / "tls" / file
            target.write_bytes((work / "server" / file).read_bytes())
            os.chown(target, 0, self.spec["securityContext"]["fsGroup"])
            target.chmod(mode)

    def start(self) -> None:
        root = self.work / "root"
        root.mkdir()
        directories = {"config": str(self.work / "config"), "tls": str(self.work / "tls")}
        container = pod_sandbox.of_manifest(self.spec, self.manifest, ENTRY, container_options.environment(self.manifest),
                                            str(BIN / "structkv-server"), directories, str(root))
        self.runtime = subprocess.Popen(
            [sys.executable, str(pathlib.Path(pod_sandbox.__file__)), str(self.group or "")], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True)
        assert self.runtime.stdin and self.runtime.stdout
        self.runtime.stdin.write(json.dumps(asdict(container)))
        self.runtime.stdin.close()
        line = self.runtime.stdout.readline()
        assert line, self.log.read_text()
        self.process = int(line)

    def status(self, field: str) -> str:
        text = pathlib.Path(f"/proc/{self.process}/status").read_text()
        return re.search(rf"^{field}:\s*(\S+)", text, re.MULTILINE)[1]  # type: ignore[index]

    def metric(self, name: str) -> float:
        """The sum over its labels."""
        with urllib.request.urlopen(f"http://{ADDRESS}:7412/metrics", timeout=30) as answer:
            values = re.findall(rf"^{name}(?:{{.*}})? (\S+)", answer.read().decode(), re.MULTILINE)
        return sum(map(float, values))

    def end(self) -> None:
        if self.runtime.poll() is None:
            os.kill(self.process, signal.SIGKILL)
            self.runtime.wait()
        if self.group:
            self.group.rmdir()


def compress(pod: Pod, out: pathlib.Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BIN / "structkv", "compress", CAPTURE, "--out", out, *(flags or pod.client_flags)],
                          capture_output=True, text=True, check=False)


def check_confined(pod: Pod) -> None:
    context = pod.spec["securityContext"]
    assert pod.status("Uid") == str(context["runAsUser"]) and pod.status("NoNewPrivs") == "1"
    assert int(pod.status("CapEff"), 16) == int(pod.status("CapBnd"), 16) == 0
    mounts = pathlib.Path(f"/proc/{pod.process}/mountinfo").read_text().splitlines()
    roots = [line.split() for line in mounts if line.split()[4] == "/"]
    assert any("ro" in line[5].split(",") for line in roots), roots
    held = f"{pod.limit >> 30} GiB by {pod.group}" if pod.group else "none: this machine has no control group to make"
    say(f"confined: user {context['runAsUser']}, read-only root, no capabilities; memory limit {held}")


def check_served(pod: Pod, work: pathlib.Path) -> None:
    done = compress(pod, work / "served.safetensors")
    assert done.returncode == 0, done.stderr
    done = compress(pod, work / "embedded.safetensors", "--in-process")
    assert done.returncode == 0, done.stderr
    assert (work / "served.safetensors").read_bytes() == (work / "embedded.safetensors").read_bytes()
    say(f"load: a prompt over mutual TLS to {pod.name}, answered as the library does, to the byte")
    # Flags come in pairs: those for the server and its authority alone.
    refused = compress(pod, work / "refused.safetensors", *pod.client_flags[:4])
    assert refused.returncode != 0, "a client without a certificate was served"
    say("load: a client without a certificate has no connection")


@contextlib.contextmanager
def prompt(pod: Pod) -> Iterator[subprocess.Popen[str]]:
    """A prompt of 24 layers of 8,192 tokens under way, whose client then stands still."""
    before = pod.metric("structkv_layers_total")
    command = [BIN / "structkv", "bench", "--tokens", "8192", "--layers", "24", "--prompts", "1", *pod.client_flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as client:
        try:
            # A layer of it: what the client opens to ask for transports has none.
            until("a prompt runs", lambda: pod.metric("structkv_layers_total") > before or client.poll() is not None)
            client.send_signal(signal.SIGSTOP)
            assert pod.metric("structkv_sessions_active") == 1, "the prompt was over before its client was held"
            yield client
        finally:
            if client.poll() is None:
                client.send_signal(signal.SIGCONT)
                client.kill()


def check_stop(pod: Pod, kubelet: Kubelet, work: pathlib.Path) -> None:
    grace = pod.spec["terminationGracePeriodSeconds"]
    sleep = pod.manifest["lifecycle"]["preStop"]["sleep"]["seconds"]
    deleted = time.monotonic()
    time.sleep(sleep)
    assert kubelet.readiness.holds and kubelet.liveness.holds
    # A client that has not yet heard.
    with prompt(pod) as client:
        say(f"stop: preStop's {sleep} s are over, a prompt is under way; SIGTERM")
        os.kill(pod.process, signal.SIGTERM)
        until("readiness falls", lambda: kubelet.readiness.ask() == 503)
        assert pod.metric("structkv_sessions_active") == 1 and pod.metric("structkv_draining") == 1
        until("the kubelet sees it", lambda: kubelet.readiness.holds is False)
        assert kubelet.liveness.ask() == 200, "the kubelet would kill a server that drains"
        say("stop: not ready, alive, and the prompt is still there")
        late = compress(pod, work / "late.safetensors")
        assert late.returncode != 0 and pod.runtime.poll() is None
        say("stop: a new prompt is refused: " + late.stderr.strip().splitlines()[-1][:120])
        client.send_signal(signal.SIGCONT)
        output, _ = client.communicate(timeout=grace)
        assert client.returncode == 0, output
        say("stop: the prompt that ran was answered in full")
    code = pod.runtime.wait(timeout=grace)
    took = time.monotonic() - deleted
    assert code == 0, f"exit code {code}: {pod.log.read_text()[-500:]}"
    assert took < grace
    stopped = json.loads(pod.log.read_text().splitlines()[-1])
    assert stopped["event"] == "stopped" and stopped["streams_cut"] in ("none", 0), stopped
    say(f"stop: exit code 0, {took:.0f} s after the deletion, of {grace} s of grace")


def main() -> None:
    for needed in ("/usr/sbin/ip", "/usr/bin/openssl"):
        if not os.path.exists(needed) and not os.path.exists(needed.replace("/usr/sbin", "/usr/bin")):
            print(f"skipped: there is no {os.path.basename(needed)}")
            sys.exit(77)
    with tempfile.TemporaryDirectory(prefix="structkv-pod-") as name:
        work = pathlib.Path(name)
        work.chmod(0o755)
        try:
            pod = Pod(work)
            make_network({pod.name: ADDRESS, "localhost": "127.0.0.1"}, work)
        except PermissionError as error:
            print(f"skipped: a network or mounts of its own cannot be had here: {error}")
            sys.exit(77)
        pod.start()
        kubelet = Kubelet(pod.manifest, ADDRESS)
        try:
            say(f"start: started by the startup probe after {kubelet.start():.1f} s")
            until("ready", lambda: kubelet.readiness.holds and kubelet.liveness.holds)
            say("probe: ready and alive")
            check_confined(pod)
            check_served(pod, work)
            check_stop(pod, kubelet, work)
        finally:
            kubelet.stop()
            pod.end()
    say("passed" if pod.group else "passed; left out: the memory limit, no control group can be made here")


if __name__ == "__main__":
    main()
