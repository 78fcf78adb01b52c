#!/usr/bin/env python3
"""Writes prometheus-rule.yaml, a PrometheusRule of what structkv.rules.yaml says. Run it after changing that file."""

import pathlib

HEAD = """\
# Made by wrap.py of structkv.rules.yaml; change that one.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: structkv
spec:
"""


def wrapped(rules: str) -> str:
    """The object, for the text of a rules file: all of it, two columns further in."""
    return HEAD + "".join("  " + line if line.strip() else line for line in rules.splitlines(keepends=True))


def main() -> None:
    here = pathlib.Path(__file__).parent
    (here / "prometheus-rule.yaml").write_text(wrapped((here / "structkv.rules.yaml").read_text()))


if __name__ == "__main__":
    main()
