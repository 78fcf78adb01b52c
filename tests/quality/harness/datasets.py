"""A local folder of prompts: JSON lines or Parquet, or one that Hugging Face's `datasets` saved.

Columns as in kvpress's evaluation datasets: `context`, `question`, `answer` (a text or several),
and, where they are there, `answer_prefix`, `task`. LongBench's names `input` and `answers` do as
well; these answers, and those of RULER's tasks `qa_1` and `qa_2`, are alternatives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .models import Loaded
from .tasks import Question, Sample


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The folder's rows, file after file."""
    lines = (
        sorted([*folder.rglob("*.jsonl"), *folder.rglob("*.json")]) if folder.is_dir() else [folder]
    )
    if folder.is_dir() and (folder / "state.json").exists():
        import datasets

        yield from datasets.load_from_disk(str(folder))
    elif parquet := sorted(folder.rglob("*.parquet")):
        import datasets

        yield from datasets.load_dataset(
            "parquet", data_files=[str(path) for path in parquet], split="train"
        )
    else:
        for path in lines:
            with path.open() as file:
                yield from (json.loads(line) for line in file if line.strip())


def column(folder: Path, row: dict[str, Any], *names: str) -> Any:
    """The first of these columns that the row has; ValueError where it has none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"{folder}: a row has no column {names[0]}; it has {', '.join(row)}")


def read(folder: Path, loaded: Loaded, longest: int, limit: int) -> list[Sample]:
    """At most `limit` prompts of a task, none longer than `longest` tokens. ValueError names a
    column that is missing.
    """
    samples, counts = list[Sample](), dict[str, int]()
    for row in rows(folder):
        context = column(folder, row, "context")
        question = column(folder, row, "question", "input")
        answers = column(folder, row, "answer", "answers")
        task = str(row.get("task", folder.stem))
        if counts.get(task, 0) >= limit:
            continue
        words = (answers,) if isinstance(answers, str) else tuple(map(str, answers))
        any_of = row.get("answer") is None or task.startswith("qa")
        target = words[0] if any_of else ", ".join(words)
        text, prefix = f"\n{question}", "\n" + row.get("answer_prefix", "")
        tokens = loaded.count(context) + loaded.count(text + prefix)
        if tokens > longest:
            continue
        counts[task] = counts.get(task, 0) + 1
        samples.append(
            Sample(
                task,
                context,
                Question(text, prefix, f" {target}", words, any_of),
                tokens,
                None,
                counts[task],
            )
        )
    return samples
