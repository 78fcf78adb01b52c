"""What the objects say of one another: names, ports, memory, time, and the restricted profile."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

import container_options
from quantity import in_bytes, in_seconds
from render import (K8S, OVERLAYS, SOURCE, Objects, containers, few, named, of_kind, render, server_pods, workloads)

EVERYTHING = [(overlay, max(few(overlay), key=len)) for overlay in OVERLAYS]
each_overlay = pytest.mark.parametrize(("overlay", "components"), EVERYTHING, ids=[e[0] for e in EVERYTHING])
# Of Secrets that no object here makes: of the base without cert-manager, and of tokens.
BY_HAND = {"structkv-tls", "structkv-tokens"}
# What the server and its runtime take beside what the options give out.
OF_ITS_OWN = 512 << 20


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = workload["spec"]["template"]["spec"]
    return spec


def labels_match(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return set(selector.get("matchLabels", selector).items()) <= set(labels.items())


def selected(objects: Objects, selector: dict[str, Any]) -> list[dict[str, Any]]:
    return [w for w in workloads(objects) if labels_match(selector, w["spec"]["template"]["metadata"]["labels"])]


def ports(workload: dict[str, Any]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for c in containers(workload) for port in c.get("ports", [])}


@each_overlay
def test_restricted_profile(overlay: str, components: tuple[str, ...]) -> None:
    objects = render(overlay, components)
    assert workloads(objects)
    for workload in workloads(objects):
        spec = pod(workload)
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
        for volume in spec["volumes"]:
            assert set(volume) - {"name"} <= {"configMap", "secret", "emptyDir", "persistentVolumeClaim"}
        for container in containers(workload):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert all("hostPort" not in port for port in container.get("ports", []))
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    assert named(objects, "Namespace", "structkv")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert all(a["automountServiceAccountToken"] is False for a in of_kind(objects, "ServiceAccount"))


@each_overlay
def test_names_lead_somewhere(overlay: str, components: tuple[str, ...]) -> None:
    objects = render(overlay, components)
    for service in of_kind(objects, "Service"):
        found = selected(objects, service["spec"]["selector"])
        assert len(found) == 1, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            assert ports(found[0])[port["targetPort"]] == port["port"]
    for kind in ("PodDisruptionBudget", "PodMonitor"):
        for thing in of_kind(objects, kind):
            # The proxy's monitor is there without it as well.
            if thing["metadata"]["name"] != "structkv-proxy" or "haproxy" in components:
                assert selected(objects, thing["spec"]["selector"]), thing["metadata"]["name"]
    for policy in of_kind(objects, "NetworkPolicy"):
        found = selected(objects, policy["spec"]["podSelector"])
        assert found, policy["metadata"]["name"]
        for rule in policy["spec"].get("ingress", []):
            for workload in found:
                known = {**ports(workload), **{number: number for number in ports(workload).values()}}
                assert {port["port"] for port in rule["ports"]} <= set(known), policy["metadata"]["name"]
    for monitor in of_kind(objects, "PodMonitor"):
        for workload in selected(objects, monitor["spec"]["selector"]):
            assert {end["port"] for end in monitor["spec"]["podMetricsEndpoints"]} <= set(ports(workload))
    for scaler in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        target = scaler["spec"]["scaleTargetRef"]
        assert "replicas" not in named(objects, target["kind"], target["name"])["spec"]
    for workload in workloads(objects):
        if workload["kind"] == "StatefulSet":
            assert named(objects, "Service", workload["spec"]["serviceName"])["spec"]["clusterIP"] == "None"
        for container in containers(workload):
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                for check in ("httpGet", "tcpSocket"):
                    if check in container.get(probe, {}):
                        assert container[probe][check]["port"] in ports(workload)


@each_overlay
def test_clients_are_let_in(overlay: str, components: tuple[str, ...]) -> None:
    objects = render(overlay, components)
    if overlay == "sidecar":
        return
    policy = named(objects, "NetworkPolicy", "structkv")["spec"]["ingress"][0]
    label = policy["from"][0]["podSelector"]["matchLabels"]
    assert policy["ports"] == [{"port": "grpc"}]
    clients = [w for w in workloads(objects) if "structkv.structkv.svc" in json.dumps(pod(w)["containers"])]
    for workload in clients:
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert labels_match(label, labels) or labels["app.kubernetes.io/name"] == "haproxy", workload["metadata"]["name"]
    assert len(clients) == {"disaggregated": 4}.get(overlay, 2)


@each_overlay
def test_volumes_and_secrets_are_there(overlay: str, components: tuple[str, ...]) -> None:
    objects = render(overlay, components)
    secrets = {c["spec"]["secretName"] for c in of_kind(objects, "Certificate")} | BY_HAND
    for issuer in of_kind(objects, "Issuer"):
        assert issuer["spec"].get("ca", {"secretName": "structkv-tls"})["secretName"] in secrets
    for workload in workloads(objects):
        spec = pod(workload)
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounted = {mount["name"] for c in containers(workload) for mount in c["volumeMounts"]}
        assert mounted == set(volumes), "a volume that nobody mounts, or a mount of none"
        for volume in volumes.values():
            if "configMap" in volume:
                named(objects, "ConfigMap", volume["configMap"]["name"])
            if "secret" in volume:
                assert volume["secret"]["secretName"] in secrets
        # Nodes with GPUs are often tainted; a claim brings no toleration of its own.
        of_gpu = spec.get("resourceClaims") or any("nvidia.com/gpu" in c["resources"].get("limits", {}) for c in containers(workload))
        tolerated = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec.get("tolerations", [])
        assert bool(of_gpu) == tolerated, workload["metadata"]["name"]
        claims = {claim["name"] for claim in spec.get("resourceClaims", [])}
        used = {claim["name"] for c in containers(workload) for claim in c["resources"].get("claims", [])}
        assert used == claims
        for claim in spec.get("resourceClaims", []):
            named(objects, "ResourceClaimTemplate", claim["resourceClaimTemplateName"])


@each_overlay
def test_time_to_stop(overlay: str, components: tuple[str, ...]) -> None:
    objects = render(overlay, components)
    assert server_pods(objects)
    for workload, container in server_pods(objects):
        drain = in_seconds(container_options.options(objects, workload, container)["drain-limit"])
        grace, probe = pod(workload)["terminationGracePeriodSeconds"], container["readinessProbe"]
        if overlay == "sidecar":
            # Told to stop when the worker has ended, it has nobody who must forget it first: no preStop, and the worker's end takes time.
            assert "lifecycle" not in container and grace >= drain + 40
            continue
        sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert grace >= sleep + drain + 30
        # Out of the service before the server refuses, also where the pod is not deleted.
        assert probe["periodSeconds"] * probe["failureThreshold"] <= sleep


@each_overlay
def test_memory_fits(overlay: str, components: tuple[str, ...]) -> None:
    objects = render(overlay, components)
    for workload, container in server_pods(objects):
        options = container_options.options(objects, workload, container)
        shm = next(volume for volume in pod(workload)["volumes"] if volume["name"] == "shm")
        assert shm["emptyDir"]["medium"] == "Memory"
        given = sum(in_bytes(options.get(name, "0")) for name in ("memory-budget", "hold-budget", "idle-buffers"))
        given += in_bytes(shm["emptyDir"]["sizeLimit"])
        assert given + OF_ITS_OWN <= in_bytes(container["resources"]["limits"]["memory"])
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"] == "shm"


@each_overlay
def test_certificates_have_the_names_that_are_asked_for(overlay: str, components: tuple[str, ...]) -> None:
    objects = render(overlay, components)
    certificates = {c["metadata"]["name"]: c["spec"] for c in of_kind(objects, "Certificate")}
    for certificate in certificates.values():
        named(objects, "Issuer", certificate["issuerRef"]["name"])
    for service, certificate in (("structkv", "structkv-server"), ("structkv-proxy", "structkv-proxy")):
        if certificate in certificates:
            name = f"{service}.{named(objects, 'Service', service)['metadata']['namespace']}.svc"
            assert {name, f"{name}.cluster.local"} <= set(certificates[certificate]["dnsNames"])
    for target in re.findall(r"dns:///([^:\"]+):7411", json.dumps(of_kind(objects, "Job"))):
        assert target in certificates["structkv-server"]["dnsNames"]
    for workload in workloads(objects):
        targets = re.findall(r'"target": "([^"]+)"', json.dumps(workload).replace('\\"', '"'))
        assert len(targets) == (workload["metadata"]["name"] in ("prefill", "decode"))
        for target in targets:
            # All replicas: the one that holds a cache is among them.
            name = target.removeprefix("dns:///").removesuffix(":7411")
            assert target == f"dns:///{name}:7411" and name in certificates["structkv-server"]["dnsNames"]


def test_a_sidecar_and_its_worker_share_what_they_need() -> None:
    objects = render("sidecar")
    (workload,) = workloads(objects)
    server, worker = containers(workload)
    assert server["restartPolicy"] == "Always" and pod(workload)["shareProcessNamespace"] is True
    options = container_options.options(objects, workload, server)
    directory = options["listen"].removeprefix("unix:").rpartition("/")[0]
    assert options["region-socket"].rpartition("/")[0] == directory
    mounts = [{m["mountPath"]: m["name"] for m in c["volumeMounts"]} for c in (server, worker)]
    assert mounts[0][directory] == mounts[1][directory]
    assert mounts[0]["/dev/shm"] == mounts[1]["/dev/shm"]
    assert f"--server={options['listen']}" in worker["args"]
    assert server["resources"]["claims"] == worker["resources"]["claims"] == [{"name": "gpu"}]
    assert "runAsUser" not in server["securityContext"] and "runAsUser" not in worker["securityContext"]


def test_images_have_the_user_and_the_ports() -> None:
    for name in ("Containerfile", "Containerfile.cuda"):
        text = (SOURCE / "container" / name).read_text()
        last = text.rpartition("FROM scratch")[2]
        assert 'ENTRYPOINT ["/usr/bin/structkv-server"]' in last
        user = re.search(r"USER (\d+):(\d+)", last)
        exposed = re.search(r"EXPOSE (.*)", last)
        assert user and exposed
        for overlay in OVERLAYS:
            for workload, container in server_pods(render(overlay)):
                context = pod(workload)["securityContext"]
                assert (str(context["runAsUser"]), str(context["runAsGroup"])) == user.groups()
                assert {str(p["containerPort"]) for p in container["ports"]} <= set(exposed[1].split())


def test_the_prometheus_rule_is_the_rules_file() -> None:
    directory = K8S / "components/prometheus-rule"
    rule = yaml.safe_load((directory / "prometheus-rule.yaml").read_text())
    assert rule["spec"] == yaml.safe_load((directory / "structkv.rules.yaml").read_text()), "run wrap.py"


def test_every_dashboard_is_listed() -> None:
    directory = K8S / "components/dashboards"
    files = sorted(path.name for path in directory.glob("*.json"))
    generator = yaml.safe_load((directory / "kustomization.yaml").read_text())["configMapGenerator"][0]
    assert files and sorted(generator["files"]) == files
    config = named(render("cpu", ("dashboards",)), "ConfigMap", "structkv-dashboards")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    for text in config["data"].values():
        assert json.loads(text)["panels"]


def test_the_proxy_has_what_its_file_reads() -> None:
    objects = render("cpu", ("certificate", "haproxy"))
    proxy = named(objects, "Deployment", "structkv-proxy")
    (container,) = containers(proxy)
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    text = (K8S / "components/haproxy/haproxy.cfg").read_text()
    read = set(re.findall(r"\$\{?(STRUCTKV_[A-Z_]*[A-Z])", text)) | set(re.findall(r"defined\((STRUCTKV_[A-Z_]+)\)", text))
    assert set(given) <= read, "a variable that the file does not read"
    # Without a default: nothing works without them.
    assert set(re.findall(r"\$\{(STRUCTKV_[A-Z_]*[A-Z])\}", text)) - {"STRUCTKV_DNS"} <= set(given)
    server = ports(named(objects, "StatefulSet", "structkv"))
    assert (int(given["STRUCTKV_PORT"]), int(given["STRUCTKV_ADMIN_PORT"])) == (server["grpc"], server["admin"])
    own = ports(proxy)
    assert given["STRUCTKV_BIND"] == f":{own['grpc']}" and given["STRUCTKV_STATUS_BIND"] == f":{own['status']}"
    assert given["STRUCTKV_SERVICE"] in named(objects, "Certificate", "structkv-server")["spec"]["dnsNames"]
    trusted = container_options.environment(server_pods(objects)[0][1])["STRUCTKV_PROXY_NAMES"]
    assert trusted == named(objects, "Certificate", "structkv-proxy")["spec"]["dnsNames"][0]
    # HAProxy reads no alternative names: a client without a common name would be nobody's.
    assert named(objects, "Certificate", "structkv-client")["spec"]["commonName"]
    health = container["readinessProbe"]["httpGet"]["path"]
    assert f"monitor-uri {health}" in text
