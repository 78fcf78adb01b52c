"""Strict validation of objects: a field that no schema knows is an error.

Kubernetes' own kinds against the JSON schemas of its OpenAPI document (kubernetes-validate, strict); those of others
against schemas/, a subset written by hand for the fields that are used here, not checked against their CRDs.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from render import SOURCE

VERSION = "1.34"
# It reads megabytes for each object otherwise.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)
_METADATA = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}


@functools.cache
def _others() -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for path in sorted((SOURCE / "tests/k8s/schemas").glob("*.yaml")):
        for kind, schema in yaml.safe_load(path.read_text()).items():
            schema = {**schema, "properties": {**_METADATA, **schema["properties"]}, "additionalProperties": False}
            found[path.stem, kind] = schema
    return found


class Invalid(Exception):
    """What is wrong with an object, and where."""


def _own(thing: dict[str, Any]) -> None:
    try:
        kubernetes_validate.validate(copy.deepcopy(thing), VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise Invalid(f"{list(error.path)}: {error.message}") from error
    except kubernetes_validate.SchemaNotFoundError as error:
        raise Invalid(f"no such kind: {error}") from error


def validate(thing: dict[str, Any]) -> None:
    group = thing["apiVersion"].rpartition("/")[0]
    other = _others().get((group, thing["kind"]))
    if other is None:
        return _own(thing)
    try:
        jsonschema.validate(thing, other)
    except jsonschema.ValidationError as error:
        raise Invalid(f"{list(error.path)}: {error.message}") from error
    # Their metadata are Kubernetes'.
    _own({"apiVersion": "v1", "kind": "ConfigMap", "metadata": thing["metadata"]})
    if thing["kind"] == "ScaledObject":
        spec = thing["spec"]
        scaler = {"scaleTargetRef": spec["scaleTargetRef"], "maxReplicas": spec["maxReplicaCount"]}
        scaler["behavior"] = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        metadata = thing["metadata"]
        _own({"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": metadata, "spec": scaler})
