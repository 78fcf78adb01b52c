"""Figures as SVG texts."""

from __future__ import annotations

import io
import math
from collections import Counter
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

Records = list[dict[str, Any]]
plt.rcParams.update(
    {"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
)


def _svg(figure: Figure) -> str:
    """The figure as an element of a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _methods(records: Records) -> list[str]:
    return list(dict.fromkeys(record["method"] for record in records))


def counted(values: list[int]) -> Counter[int]:
    return Counter(values)


def perplexity(records: Records) -> float:
    return math.exp(mean(record["loss"] for record in records))


def by_layer(records: Records, kind: str) -> list[float]:
    """The mean of a measure over records, for each layer."""
    return [mean(layer) for layer in zip(*(record[kind] for record in records))]


def accuracy_over_budget(records: Records, title: str) -> str:
    figure, axes = plt.subplots(figsize=(8, 4))
    for number, method in enumerate(_methods(records)):
        part = [record for record in records if record["method"] == method]
        budgets = sorted({record["budget"] for record in part})
        scores = [mean(r["score"] for r in part if r["budget"] == budget) for budget in budgets]
        if method == "full":
            axes.axhline(scores[0], color="black", linestyle=":", label=method)
        else:
            style = "--" if method.startswith("kvpress:") else "-"
            axes.plot(budgets, scores, style, marker="os^vD"[number % 5], label=method)
    axes.set(
        xlabel="share of the prompt's tokens kept",
        ylabel="accuracy",
        ylim=(-0.02, 1.02),
        title=title,
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return _svg(figure)


def depth_by_length(records: Records, title: str) -> str:
    """A map for each method: accuracy by the needle's depth and the prompt's length."""
    methods = _methods(records)
    lengths, depths = (sorted({record[name] for record in records}) for name in ("tokens", "depth"))
    across = min(4, len(methods))
    down = -(-len(methods) // across)
    figure, grid = plt.subplots(
        down, across, figsize=(2.6 * across, 2.3 * down), squeeze=False, sharex=True, sharey=True
    )
    for axes in grid.flat[len(methods) :]:
        axes.set_visible(False)
    for axes, method in zip(grid.flat, methods):
        cells = [[_score(records, method, length, depth) for length in lengths] for depth in depths]
        image = axes.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(method, fontsize=9)
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    figure.supxlabel("prompt, tokens")
    figure.supylabel("depth of the needle")
    figure.suptitle(title)
    figure.tight_layout()
    figure.colorbar(image, ax=grid, label="accuracy", shrink=0.8)
    return _svg(figure)


def _score(records: Records, method: str, length: int, depth: float) -> float:
    found = [
        r["score"]
        for r in records
        if (r["method"], r["tokens"], r["depth"]) == (method, length, depth)
    ]
    return mean(found) if found else math.nan


def over_layers(records: Records, kind: str, title: str) -> str:
    figure, axes = plt.subplots(figsize=(8, 4))
    for number, method in enumerate(_methods(records)):
        values = by_layer([record for record in records if record["method"] == method], kind)
        style = "--" if method.startswith("kvpress:") else "-"
        axes.plot(
            range(len(values)),
            values,
            style,
            marker="os^vD"[number % 5],
            markersize=4,
            label=method,
        )
    axes.set(xlabel="layer", title=title)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return _svg(figure)
