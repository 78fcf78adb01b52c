#!/usr/bin/env python3
"""Draws what tests/gpu/run.sh measured: microseconds a layer over the prompt's tokens, each step beside its floor.

  tests/gpu/plot.py REPORT.json PICTURE.svg      needs matplotlib (PyPI), no GPU
"""
import argparse
import json
import sys
from collections import defaultdict

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402


def series(rows):
    """{step: [(tokens, micros, floor_micros)]}, each by tokens."""
    steps = defaultdict(list)
    for row in rows:
        steps[row["step"]].append((row["tokens"], row["micros"], row["floor_micros"]))
    return {step: sorted(points) for step, points in steps.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report")
    parser.add_argument("picture")
    flags = parser.parse_args()
    with open(flags.report) as file:
        bench = json.load(file).get("bench")
    if not bench:
        sys.exit(f"plot.py: '{flags.report}' has no benchmark: it ran on a machine without a GPU")
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for step, points in series(bench["rows"]).items():
        tokens, micros, floors = zip(*points)
        (line,) = axes.plot(tokens, micros, marker="o", label=step)
        axes.plot(tokens, floors, linestyle=":", color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("microseconds a layer (dotted: floor)")
    axes.set_title(f"{bench['device']}, copies {bench['copy_bytes_per_second'] / 1e9:.0f} GB/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(flags.picture)


if __name__ == "__main__":
    main()
