"""What a rendered container tells the server: arguments, environment and the file, as the kubelet would give them."""

from __future__ import annotations

from typing import Any

import yaml

from render import Objects, named

CONFIG = "/etc/structkv/config/structkv.yaml"


def config_text(objects: Objects, workload: dict[str, Any]) -> str:
    """The text of the ConfigMap that is mounted as the server's file."""
    volumes = {each["name"]: each for each in workload["spec"]["template"]["spec"]["volumes"]}
    config = named(objects, "ConfigMap", volumes["config"]["configMap"]["name"])
    assert list(config["data"]) == ["structkv.yaml"]
    text: str = config["data"]["structkv.yaml"]
    return text


def environment(container: dict[str, Any]) -> dict[str, str]:
    """Names and values, those of the container's resources looked up."""
    found = {}
    for entry in container.get("env", []):
        if "value" in entry:
            found[entry["name"]] = entry["value"]
            continue
        reference = entry["valueFrom"]["resourceFieldRef"]
        assert reference["resource"] == "limits.cpu" and reference["divisor"] == "1", reference
        found[entry["name"]] = container["resources"]["limits"]["cpu"]
    return found


def options(objects: Objects, workload: dict[str, Any], container: dict[str, Any]) -> dict[str, Any]:
    """The options by their names, the environment's over the file's. Flags are left to the reader."""
    found = dict(yaml.safe_load(config_text(objects, workload)))
    for name, value in environment(container).items():
        if name.startswith("STRUCTKV_"):
            found[name.removeprefix("STRUCTKV_").lower().replace("_", "-")] = value
    return found
