#!/usr/bin/env python3
"""A server-side dry run of every overlay at a kube-apiserver of version 1.20: apiserver.py KUBE_APISERVER.

What came after 1.20 is converted down or taken out first, and what no version 1.20 has is left out; both are printed.
Faults are tried as well: a server that refuses nothing shows nothing."""

from __future__ import annotations

import contextlib
import copy
import json
import pathlib
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from render import OVERLAYS, few, render

PATHS = {
    ("v1", "ConfigMap"): "configmaps", ("v1", "Service"): "services", ("v1", "ServiceAccount"): "serviceaccounts",
    ("v1", "PersistentVolumeClaim"): "persistentvolumeclaims", ("v1", "Namespace"): "namespaces",
    ("apps/v1", "StatefulSet"): "statefulsets", ("apps/v1", "Deployment"): "deployments", ("batch/v1", "Job"): "jobs",
    ("v1", "Pod"): "pods",
    ("networking.k8s.io/v1", "NetworkPolicy"): "networkpolicies",
    ("policy/v1beta1", "PodDisruptionBudget"): "poddisruptionbudgets",
    ("autoscaling/v2beta2", "HorizontalPodAutoscaler"): "horizontalpodautoscalers",
}
EARLIER = {"policy/v1": "policy/v1beta1", "autoscaling/v2": "autoscaling/v2beta2"}
TOKEN = "dry-run-0123456789abcdef"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def converted(thing: dict[str, Any], notes: set[str]) -> dict[str, Any]:
    """As version 1.20 can have it."""
    thing = copy.deepcopy(thing)
    if thing["apiVersion"] in EARLIER:
        notes.add(f"{thing['apiVersion']} as {EARLIER[thing['apiVersion']]}")
        thing["apiVersion"] = EARLIER[thing["apiVersion"]]

    def take(mapping: dict[str, Any], field: str) -> None:
        if mapping.pop(field, None) is not None:
            notes.add(f"without {field}")

    take(thing.get("spec", {}), "unhealthyPodEvictionPolicy")
    if thing["kind"] == "StatefulSet":
        take(thing["spec"], "minReadySeconds")
    pod = thing.get("spec", {}).get("template", {}).get("spec")
    if pod is None:
        return thing
    take(pod, "resourceClaims")
    for constraint in pod.get("topologySpreadConstraints", []):
        take(constraint, "matchLabelKeys")
    sidecars = [c for c in pod.get("initContainers", []) if c.get("restartPolicy") == "Always"]
    if sidecars:
        notes.add("sidecars as containers")
        del pod["initContainers"]
        pod["containers"] = [{k: v for k, v in c.items() if k != "restartPolicy"} for c in sidecars] + pod["containers"]
    for container in pod["containers"]:
        take(container["resources"], "claims")
        if "sleep" in container.get("lifecycle", {}).get("preStop", {}):
            take(container, "lifecycle")
    return thing


class Server:
    """Of dry runs."""

    def __init__(self, port: int) -> None:
        self._base = f"https://127.0.0.1:{port}"
        self._context = ssl.create_default_context()
        self._context.check_hostname, self._context.verify_mode = False, ssl.CERT_NONE  # it signed its own

    def call(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        request = urllib.request.Request(self._base + path, json.dumps(body).encode() if body else None,
                                         {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, context=self._context, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def create(self, thing: dict[str, Any], dry: bool = True) -> tuple[int, str]:
        version, kind = thing["apiVersion"], thing["kind"]
        path = ("/api/" if version == "v1" else "/apis/") + version
        if kind != "Namespace":
            path += f"/namespaces/{thing['metadata']['namespace']}"
        return self.call(f"{path}/{PATHS[version, kind]}" + ("?dryRun=All" if dry else ""), thing)


@contextlib.contextmanager
def started(program: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        work = pathlib.Path(name)
        subprocess.run(["openssl", "genrsa", "-out", work / "key", "2048"], check=True, capture_output=True)
        (work / "tokens").write_text(f"{TOKEN},admin,admin,system:masters\n")
        client, peer, port = free_port(), free_port(), free_port()
        at = f"http://127.0.0.1:{client}"
        etcd = ["etcd", f"--data-dir={work}/etcd", f"--listen-client-urls={at}", f"--advertise-client-urls={at}",
                f"--listen-peer-urls=http://127.0.0.1:{peer}"]
        apiserver = [program, f"--etcd-servers={at}", "--bind-address=127.0.0.1", f"--secure-port={port}", f"--cert-dir={work}/certs",
                     f"--service-account-key-file={work}/key", f"--service-account-signing-key-file={work}/key",
                     "--service-account-issuer=https://kubernetes.default.svc", "--service-cluster-ip-range=10.96.0.0/16",
                     f"--token-auth-file={work}/tokens", "--authorization-mode=RBAC",
                     "--disable-admission-plugins=ServiceAccount"]  # which wants the account to be there
        for command in (etcd, apiserver):
            log = stack.enter_context((work / (pathlib.Path(command[0]).name + ".log")).open("w"))
            process = subprocess.Popen(command, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
        server, end = Server(port), time.monotonic() + 180
        while server.call("/readyz")[0] != 200:
            assert process.poll() is None and time.monotonic() < end, (work / "kube-apiserver.log").read_text()[-2000:]
            time.sleep(0.2)
        yield server


def pod_of(workload: dict[str, Any]) -> dict[str, Any]:
    """A pod as the workload makes it: of a StatefulSet's template version 1.20 checks little."""
    metadata, template = workload["metadata"], workload["spec"]["template"]
    metadata = {"name": f"{metadata['name']}-0", "namespace": metadata["namespace"], **template["metadata"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def faults(stateful: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    other = copy.deepcopy(stateful)
    other["spec"]["selector"]["matchLabels"].update(other="x")
    yield "a selector of other labels", other

    def changed(what: str, change: Any) -> tuple[str, dict[str, Any]]:
        pod = copy.deepcopy(pod_of(stateful))
        change(pod["spec"], pod["spec"]["containers"][0])
        return what, pod

    yield changed("a mount of no volume", lambda p, c: c["volumeMounts"].append({"name": "no", "mountPath": "/x"}))
    yield changed("a request above its limit", lambda p, c: c["resources"]["requests"].update(memory="999Gi"))
    yield changed("a probe of a negative period", lambda p, c: c["readinessProbe"].update(periodSeconds=-1))
    yield changed("a port's name in capitals", lambda p, c: c["ports"][0].update(name="GRPC"))
    yield changed("a quantity that is none", lambda p, c: p["volumes"][-1]["emptyDir"].update(sizeLimit="64MegaBytes"))


def tried(thing: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield thing
    if thing["kind"] == "StatefulSet":
        yield pod_of(thing)


def main() -> None:
    notes, left_out, seen = set[str](), set[str](), set[str]()
    with started(sys.argv[1]) as server:
        version = json.loads(server.call("/version")[1])["gitVersion"]
        print(f"apiserver: kube-apiserver {version} is ready")
        status, text = server.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "structkv"}}, dry=False)
        assert status == 201, text
        for overlay in OVERLAYS:
            for components in few(overlay):
                for thing in render(overlay, components):
                    thing = converted(thing, notes)
                    if (thing["apiVersion"], thing["kind"]) not in PATHS:
                        left_out.add(f"{thing['apiVersion']} {thing['kind']}")
                        continue
                    if thing["kind"] == "Namespace" or (key := json.dumps(thing)) in seen:
                        continue
                    seen.add(key)
                    for each in tried(thing):
                        status, text = server.create(each)
                        assert status == 201, f"{overlay} {components}: {each['kind']} {each['metadata']['name']}: {text}"
        print(f"apiserver: {len(seen)} objects of {len(OVERLAYS)} overlays accepted, and the pods of StatefulSets")
        stateful = converted(next(t for t in render("cpu") if t["kind"] == "StatefulSet"), notes)
        for what, thing in faults(stateful):
            status, text = server.create(thing)
            assert status in (400, 422), f"{what} was not refused: {status} {text}"
        print("apiserver: six faults refused")
    print("apiserver: converted: " + "; ".join(sorted(notes)))
    print("apiserver: passed; left out, version 1.20 has no such kinds: " + ", ".join(sorted(left_out)))


if __name__ == "__main__":
    main()
