"""Accuracy: samples crossed with methods, with the question inside or outside of what is
compressed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .generate import answer
from .methods import Method
from .models import Loaded
from .tasks import Sample


def score(text: str, answers: tuple[str, ...], any_of: bool = False) -> float:
    """The share of the answers that the text has, as RULER counts: as whole words, or at its start
    if one letter long. `any_of`: one is enough.
    """
    found = [
        text.lstrip().startswith(each)
        if len(each) == 1
        else bool(re.search(rf"\b{re.escape(each)}\b", text, re.IGNORECASE))
        for each in answers
    ]
    return float(any(found)) if any_of else sum(found) / len(found)


def split(loaded: Loaded, sample: Sample, aware: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that are compressed, and those that follow: [1, n] and [1, m].

    Aware: the question is compressed with the context, in the observation window, and the answer's
    beginning follows. Agnostic: both follow. Either way each token of the answer comes from the
    compacted cache.
    """
    context = loaded.tokenizer.begin + loaded.tokenizer.encode(sample.context)
    question = loaded.tokenizer.encode(sample.question.text)
    prefix = loaded.tokenizer.encode(sample.question.prefix)
    cut = len(context) + (len(question) if aware else 0)
    tokens = torch.tensor([context + question + prefix], device=loaded.model.device)
    return tokens[:, :cut], tokens[:, cut:]


def measure(
    loaded: Loaded, samples: Iterable[Sample], methods: list[Method], awareness: Iterable[bool]
) -> Iterator[dict[str, Any]]:
    """A record for each sample, side of the question, and method that the sample is long enough
    for.
    """
    for sample in samples:
        limit = loaded.count(sample.question.target) + 2
        for aware in awareness:
            prompt, question = split(loaded, sample, aware)
            for method in methods:
                if not method.fits(sample.tokens):
                    continue
                with method.prefill(loaded, prompt) as prefilled:
                    text = loaded.tokenizer.decode(answer(loaded, prefilled, question, limit))
                yield {
                    "task": sample.task,
                    "tokens": sample.tokens,
                    "number": sample.number,
                    "depth": sample.depth,
                    "aware": aware,
                    "method": method.name,
                    "budget": method.budget,
                    "score": score(text, sample.question.answers, sample.question.any_of),
                    **prefilled.measures(),
                }
