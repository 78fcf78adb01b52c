"""JSON schemas of the custom resources' own definitions (CRDs): of cert-manager, KEDA and Prometheus' operator.

PyPI has none of the definitions themselves, but models of pydantic that cloudcoil generates from them, with every field,
its type, its enumeration and its pattern, of the versions in requirements.txt. What these leave open is closed here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import sys
import warnings
from typing import Any


def _close(schema: Any) -> None:
    """A mapping that has fields has no others. Patterns become Python's, which has (?i) in front alone."""
    if isinstance(schema, dict):
        if isinstance(schema.get("pattern"), str) and "(?i)" in schema["pattern"]:
            schema["pattern"] = "(?i)" + schema["pattern"].replace("(?i)", "")
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
        for inner in schema.values():
            _close(inner)
    elif isinstance(schema, list):
        for inner in schema:
            _close(inner)


def _make() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields whose names are pydantic's, too
        from cloudcoil.models.cert_manager import v1 as cert_manager
        from cloudcoil.models.keda import v1alpha1 as keda
        from cloudcoil.models.prometheus_operator import v1 as operator

        found = {}
        for model in (cert_manager.Certificate, cert_manager.Issuer, keda.ScaledObject, operator.PodMonitor, operator.PrometheusRule):
            schema = model.model_json_schema()
            own = schema["properties"]
            name = f"{own['apiVersion']['default']} {own['kind']['default']}"
            _close(schema)
            own["metadata"] = {"type": "object"}  # Kubernetes', which schema.py looks at
            found[name] = schema
    return found


@functools.cache
def definitions() -> dict[str, Any]:
    """By "apiVersion kind". Made once for a virtual environment, since the models take seconds to load."""
    version = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()[:16]
    path = pathlib.Path(sys.prefix) / f"crd-schemas-{version}.json"
    if not path.exists():
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(_make()))
        fresh.rename(path)
    return json.loads(path.read_text())
