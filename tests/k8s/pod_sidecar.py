#!/usr/bin/env python3
"""The pod of the overlay `sidecar` on this machine, from its rendered manifest: the server is started and probed, the worker in
its own container finds it by the shared sockets, and tensors go by shared memory.

Not as in a cluster: the backend is the CPU's, since there is no GPU to claim, and each container has process ids of its
own, which shared memory does not mind. Needs root; tests/k8s/pod_life.sh starts it."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from typing import Any

import container_options
import pod_sandbox
from pod_kubelet import Kubelet
from pod_life import ADDRESS, BIN, ENTRY, make_network, until
from quantity import in_bytes
from render import containers, render, server_pods


def start(container: pod_sandbox.Container, log: pathlib.Path) -> tuple[subprocess.Popen[str], int]:
    """The runtime's process, and the container's."""
    os.makedirs(container.root)
    runtime = subprocess.Popen([sys.executable, pod_sandbox.__file__, ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=log.open("w"), text=True)
    assert runtime.stdin and runtime.stdout
    runtime.stdin.write(json.dumps(asdict(container)))
    runtime.stdin.close()
    line = runtime.stdout.readline()
    assert line, log.read_text()
    return runtime, int(line)


def make_volumes(pod: dict[str, Any], text: str, work: pathlib.Path) -> dict[str, str]:
    """The ConfigMap's file, and what both containers share, in memory and of its size."""
    (work / "config").mkdir()
    (work / "config/structkv.yaml").write_text(text)
    directories = {"config": str(work / "config")}
    for volume in pod["volumes"]:
        if "emptyDir" in volume:
            at = work / "volumes" / volume["name"]
            at.mkdir(parents=True)
            size = in_bytes(volume["emptyDir"]["sizeLimit"])
            pod_sandbox.mount("-t", "tmpfs", "-o", f"size={size},mode=2777", "memory", str(at))
            os.chown(at, 0, pod["securityContext"]["fsGroup"])
            directories[volume["name"]] = str(at)
    return directories


def live(work: pathlib.Path) -> None:
    objects = render("sidecar")
    ((workload, manifest),) = server_pods(objects)
    pod = workload["spec"]["template"]["spec"]
    worker = containers(workload)[1]
    make_network({"localhost": "127.0.0.1"}, work)
    directories = make_volumes(pod, container_options.config_text(objects, workload), work)
    environment = container_options.environment(manifest) | {"STRUCTKV_BACKEND": "cpu"}
    server, process = start(pod_sandbox.of_manifest(pod, manifest, ENTRY, environment, str(BIN / "structkv-server"),
                                                    directories, str(work / "server")), work / "log")
    kubelet = Kubelet(manifest, ADDRESS)
    try:
        kubelet.start()
        print("pod_sidecar: the server is started, which the worker waits for")
        # A small prompt, once.
        small = {**worker, "args": [*(a for a in worker["args"] if not a.startswith("--prompts")), "--prompts=2",
                                    "--geometry=tiny-llama", "--tokens=1000"]}
        ended, _ = start(pod_sandbox.of_manifest(pod, small, worker["command"], {}, str(BIN / "structkv"), directories,
                                                 str(work / "worker")), work / "worker.log")
        assert ended.wait(timeout=120) == 0, (work / "worker.log").read_text()

        def answered() -> list[dict[str, Any]]:
            lines = [json.loads(line) for line in (work / "log").read_text().splitlines() if line.startswith("{")]
            return [line for line in lines if line["event"] == "session" and line["status"] == "OK"]

        until("both prompts are logged", lambda: len(answered()) >= 2)
        assert {line["transport"] for line in answered()} == {"shared_memory"}, answered()
        print("pod_sidecar: the worker's prompts went by shared memory, from a container of its own")
        os.kill(process, signal.SIGTERM)
        assert server.wait(timeout=pod["terminationGracePeriodSeconds"]) == 0
        print("pod_sidecar: passed; left out: the GPU and its claim")
    finally:
        kubelet.stop()
        if server.poll() is None:
            os.kill(process, signal.SIGKILL)
            server.wait()


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="structkv-pod-") as name:
        work = pathlib.Path(name)
        work.chmod(0o755)
        try:
            live(work)
        finally:
            for volume in ("shm", "sockets"):
                subprocess.run(["umount", "-q", str(work / "volumes" / volume)], check=False)


if __name__ == "__main__":
    main()
