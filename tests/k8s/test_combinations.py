"""Every set of components that fits an overlay, not a few alone (tests/k8s/combinations.sh)."""

from __future__ import annotations

import pytest

from render import OVERLAYS, combinations, render
from schema import Invalid, validate

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_combination(overlay: str) -> None:
    seen = set()
    for components in combinations(overlay):
        objects = render(overlay, components)
        names = [(thing["kind"], thing["metadata"]["name"]) for thing in objects]
        assert len(names) == len(set(names)), components
        for thing in objects:
            # Most objects come in every set.
            if (text := repr(thing)) in seen:
                continue
            seen.add(text)
            try:
                validate(thing)
            except Invalid as error:
                pytest.fail(f"{components}: {thing['kind']} {thing['metadata']['name']}: {error}")
