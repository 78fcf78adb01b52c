"""Renders the overlays of k8s/, alone and with components, as `kubectl kustomize` does."""

from __future__ import annotations

import functools
import itertools
import os
import pathlib
import shutil
import subprocess
import tempfile
from typing import Any

import yaml

SOURCE = pathlib.Path(__file__).resolve().parents[2]
K8S = SOURCE / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
# Those that change or use the StatefulSet, which a sidecar's pod is not.
OF_THE_SET = {"certificate", "first-prompt", "haproxy", "hpa", "keda", "tokens"}
# Those that do the same.
SCALERS = {"hpa", "keda"}
# Those that do not go together: also a proxy, which is known by its certificate, with callers that show none.
NEVER_BOTH = (SCALERS, {"haproxy", "tokens"})
# What an overlay has already, or cannot have: the example's clients show certificates, and scaling in would take their caches.
NOT_WITH = {"disaggregated": {"certificate", "tokens", *SCALERS}, "sidecar": OF_THE_SET}

Objects = tuple[dict[str, Any], ...]


def fits(overlay: str, component: str) -> bool:
    return component not in NOT_WITH.get(overlay, ())


def combinations(overlay: str) -> list[tuple[str, ...]]:
    """Every set of components that an overlay may have."""
    able = [component for component in COMPONENTS if fits(overlay, component)]
    sets = itertools.chain.from_iterable(itertools.combinations(able, n) for n in range(len(able) + 1))
    return [each for each in sets if not any(both <= set(each) for both in NEVER_BOTH)]


def few(overlay: str) -> list[tuple[str, ...]]:
    """None, each component alone, and the largest sets."""
    every = combinations(overlay)
    largest = max(len(each) for each in every)
    return [each for each in every if len(each) <= 1 or len(each) == largest]


def run_kustomize(directory: pathlib.Path) -> str:
    kubectl = shutil.which("kubectl")
    command = [kubectl, "kustomize"] if kubectl else ["kustomize", "build"]
    done = subprocess.run([*command, str(directory)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{directory}: {done.stderr}")
    # A field that is on its way out is told here.
    assert not done.stderr, done.stderr
    return done.stdout


@functools.cache
def render_text(overlay: str, components: tuple[str, ...] = ()) -> str:
    if not components:
        return run_kustomize(K8S / "overlays" / overlay)
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name).resolve()
        above = os.path.relpath(K8S, directory)
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "structkv",
            "resources": [f"{above}/overlays/{overlay}"],
            "components": [f"{above}/components/{component}" for component in components],
        }
        (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return run_kustomize(directory)


@functools.cache
def render(overlay: str, components: tuple[str, ...] = ()) -> Objects:
    return tuple(yaml.safe_load_all(render_text(overlay, components)))


def of_kind(objects: Objects, *kinds: str) -> list[dict[str, Any]]:
    return [each for each in objects if each["kind"] in kinds]


def named(objects: Objects, kind: str, name: str) -> dict[str, Any]:
    found = [each for each in of_kind(objects, kind) if each["metadata"]["name"] == name]
    assert len(found) == 1, f"{kind}/{name}: there are {len(found)}"
    return found[0]


def workloads(objects: Objects) -> list[dict[str, Any]]:
    return of_kind(objects, "StatefulSet", "Deployment", "Job")


def containers(workload: dict[str, Any]) -> list[dict[str, Any]]:
    pod = workload["spec"]["template"]["spec"]
    return [*pod.get("initContainers", []), *pod["containers"]]


def server_pods(objects: Objects) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Workload and container of each StructKV server."""
    return [(w, c) for w in workloads(objects) for c in containers(w) if c["name"] == "structkv-server"]
