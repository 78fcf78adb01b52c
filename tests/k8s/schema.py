"""Strict validation of objects: a field that no schema knows is an error.

Kubernetes' own kinds against the JSON schemas of its OpenAPI document (kubernetes-validate, strict); those of others
against what is generated from their CRDs (crd.py), and against schemas/, written by hand for the fields that are used
here: those say more of what the controllers take than the CRDs do.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

import crd
from render import SOURCE

VERSION = "1.34"
# It reads megabytes for each object otherwise.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)
_METADATA = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}


@functools.cache
def _others() -> dict[tuple[str, str], jsonschema.Draft202012Validator]:
    found = {}
    for path in sorted((SOURCE / "tests/k8s/schemas").glob("*.yaml")):
        for kind, schema in yaml.safe_load(path.read_text()).items():
            schema = {**schema, "properties": {**_METADATA, **schema["properties"]}, "additionalProperties": False}
            found[path.stem, kind] = _validator(schema)
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


def _validator(schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@functools.cache
def _by_crd(kind: str) -> jsonschema.Draft202012Validator:
    return _validator(crd.definitions()[kind])


def _check(thing: dict[str, Any], validator: jsonschema.Draft202012Validator) -> None:
    error = jsonschema.exceptions.best_match(validator.iter_errors(thing))
    if error is not None:
        raise Invalid(f"{list(error.path)}: {error.message}")


def validate_by_crd(thing: dict[str, Any]) -> None:
    """By its CRD alone; of a kind that has one."""
    _check(thing, _by_crd(f"{thing['apiVersion']} {thing['kind']}"))


def validate(thing: dict[str, Any]) -> None:
    group = thing["apiVersion"].rpartition("/")[0]
    other = _others().get((group, thing["kind"]))
    if other is None:
        return _own(thing)
    validate_by_crd(thing)
    _check(thing, other)
    # Their metadata are Kubernetes'.
    _own({"apiVersion": "v1", "kind": "ConfigMap", "metadata": thing["metadata"]})
    if thing["kind"] == "ScaledObject":
        spec = thing["spec"]
        scaler = {"scaleTargetRef": spec["scaleTargetRef"], "maxReplicas": spec["maxReplicaCount"]}
        scaler["behavior"] = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        metadata = thing["metadata"]
        _own({"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": metadata, "spec": scaler})
