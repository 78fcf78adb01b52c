"""What a trained model answers with its full cache."""

from __future__ import annotations

from statistics import mean

from .. import accuracy
from ..methods import full
from ..models import Loaded
from ..tasks import FACTS, TASKS, make


def full_cache_scores(
    loaded: Loaded, lengths: list[int], samples: int, sentences: list[str]
) -> dict[str, dict[int, float]]:
    """Accuracy by task and prompt length, over `samples` prompts of each haystack that a task can
    lie in. These are not the training's: those are seeded by step, and their layout is another.
    """
    result: dict[str, dict[int, float]] = {}
    for task in TASKS:
        if task == "records":  # another model's
            continue
        for length in lengths:
            hays = ("noise", "text") if task in FACTS else ("noise",)
            prompts = [
                make(task, length, seed, loaded.count, None, hay, sentences)
                for hay in hays
                for seed in range(samples)
            ]
            records = accuracy.measure(loaded, prompts, [full()], [True])
            result.setdefault(task, {})[length] = mean(record["score"] for record in records)
    return result
