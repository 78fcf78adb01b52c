"""Every object of every overlay is one that Kubernetes knows, to the last field."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import crd
import pytest

from render import OVERLAYS, Objects, few, render
from schema import Invalid, validate, validate_by_crd

CASES = [(overlay, components) for overlay in OVERLAYS for components in few(overlay)]


def name(thing: dict[str, Any]) -> str:
    return f"{thing['apiVersion']} {thing['kind']} {thing['metadata']['name']}"


def case_id(case: object) -> str:
    return case if isinstance(case, str) else "+".join(case) or "alone"  # type: ignore[arg-type]


@pytest.mark.parametrize(("overlay", "components"), CASES, ids=case_id)
def test_objects_are_valid(overlay: str, components: tuple[str, ...]) -> None:
    objects = render(overlay, components)
    for thing in objects:
        try:
            validate(thing)
        except Invalid as error:
            pytest.fail(f"{name(thing)}: {error}")
    names = [name(thing) for thing in objects]
    assert len(names) == len(set(names)), "an object is there twice"
    for thing in objects:
        if thing["kind"] not in ("Namespace",):
            assert thing["metadata"].get("namespace") == "structkv", name(thing)


def every_object() -> Objects:
    found = {name(thing): thing for overlay, components in CASES for thing in render(overlay, components)}
    return tuple(found.values())


def places(thing: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Of every mapping with fields of a schema: not those whose keys are free."""
    if isinstance(thing, dict):
        if at and at[-1] in FREE:
            return
        yield at
        for key, value in thing.items():
            yield from places(value, (*at, key))
    elif isinstance(thing, list):
        for i, value in enumerate(thing):
            yield from places(value, (*at, i))


FREE = {"labels", "annotations", "matchLabels", "selector", "data", "limits", "requests"}


def expect_typo_refused(
    check: Callable[[dict[str, Any]], None], thing: dict[str, Any], at: tuple[str | int, ...]
) -> None:
    changed = copy.deepcopy(thing)
    inner: Any = changed
    for step in at:
        inner = inner[step]
    inner["structkvTypo"] = 1
    with pytest.raises(Invalid):
        check(changed)
        pytest.fail(f"{name(thing)}: an unknown field at {at} passes")


def test_an_unknown_field_is_refused_anywhere() -> None:
    tried = 0
    for thing in every_object():
        for at in places(thing):
            expect_typo_refused(validate, thing, at)
            tried += 1
            if len(at) == 0:
                assert tried
    assert tried > 300


def test_a_crd_refuses_unknown_fields_anywhere() -> None:
    kinds = set()
    for thing in every_object():
        kind = f"{thing['apiVersion']} {thing['kind']}"
        if kind not in crd.definitions():
            continue
        kinds.add(kind)
        validate_by_crd(thing)
        for at in places(thing):
            # Free in the CRDs: what a trigger is told, and metadata, which are Kubernetes'.
            if "metadata" in at:
                continue
            expect_typo_refused(validate_by_crd, thing, at)
    assert kinds == set(crd.definitions()), "a kind of which there is no object"


def test_a_wrong_type_and_a_missing_field_are_refused() -> None:
    for thing in every_object():
        if "spec" not in thing or thing["kind"] == "PodDisruptionBudget":
            continue
        with pytest.raises(Invalid):
            validate({**thing, "spec": "text"})
    stateful = next(thing for thing in every_object() if thing["kind"] == "StatefulSet")
    changed = copy.deepcopy(stateful)
    del changed["spec"]["selector"]
    with pytest.raises(Invalid):
        validate(changed)
