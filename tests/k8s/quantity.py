"""Sizes and durations, as Kubernetes and as the server write them."""

from __future__ import annotations

import re

_SIZES = {"": 1, "B": 1}
for power, letter in enumerate("KMGT", start=1):
    _SIZES[f"{letter}i"] = _SIZES[f"{letter}iB"] = 1 << (10 * power)
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}


def in_bytes(text: str) -> int:
    """32Gi and 32GiB alike."""
    number, unit = re.fullmatch(r"(\d+)([A-Za-z]*)", text).groups()  # type: ignore[union-attr]
    return int(number) * _SIZES[unit]


def in_seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)([a-z]+)", text).groups()  # type: ignore[union-attr]
    return int(number) * _SECONDS[unit]
