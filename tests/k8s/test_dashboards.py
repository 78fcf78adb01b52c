"""The dashboards are ones that Grafana knows, to the last field: read and written back by Grafana's own types."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

FILES = sorted((Path(__file__).resolve().parents[2] / "k8s/components/dashboards").glob("*.json"))
register_default_plugins()


def by_grafana(dashboard: Any) -> Any:
    return json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))


def lost(given: Any, kept: Any, at: str = "") -> Iterator[str]:
    """Where Grafana's types keep something else than what was given. What they add does not count."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key in kept:
                yield from lost(value, kept[key], f"{at}.{key}")
            else:
                yield f"{at}.{key}"
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for i, (one, other) in enumerate(zip(given, kept)):
            yield from lost(one, other, f"{at}[{i}]")
    elif given != kept:
        yield f"{at}: {given!r} became {kept!r}"


# What Grafana's types leave open: a variable's query is the data source's, and a target names one in two ways.
FREE = [("templating", "list", "query"), ("panels", "targets", "datasource")]


def mappings(thing: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if tuple(step for step in at if isinstance(step, str)) in FREE:
        return
    if isinstance(thing, dict):
        yield at
    if isinstance(thing, (dict, list)):
        for key, value in thing.items() if isinstance(thing, dict) else enumerate(thing):
            yield from mappings(value, (*at, key))


def test_there_are_dashboards() -> None:
    assert len(FILES) == 4


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_grafana_knows_every_field(file: Path) -> None:
    dashboard = json.loads(file.read_text())
    assert list(lost(dashboard, by_grafana(dashboard))) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_another_field_would_be_found_wherever_it_is(file: Path) -> None:
    dashboard = json.loads(file.read_text())
    for at in mappings(dashboard):
        wrong = copy.deepcopy(dashboard)
        inner = wrong
        for step in at:
            inner = inner[step]
        inner["anotherField"] = 1
        assert list(lost(wrong, by_grafana(wrong))), at
