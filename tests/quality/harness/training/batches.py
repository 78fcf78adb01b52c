"""Training sequences: text, repetition, and the tasks of tasks.py with as many questions as fit.
Seeded by step.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from ..tasks import FACTS, HAYSTACKS, Facts, Question, common_words, haystack, lay_out, multi_key
from ..words import FILLERS, KEYS, VALUES
from .recipe import Recipe, Stage

COMMON_WORDS_ROOM = 32  # tokens of that task's question and answer, at most
# Of the loss of a token that is no answer: 0.1, spread over the share of them that are predicted.
LANGUAGE_SHARE = 0.25
LANGUAGE_WEIGHT = 0.1 / LANGUAGE_SHARE


@dataclass(frozen=True)
class Batch:
    """`tokens` [rows, length] i64; `weights` the same shape, of the loss of each token as a
    prediction, 0 where none is made; `positions` i64 rotary positions; `answers` bool, the tokens that answer a question.
    """

    tokens: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor
    answers: torch.Tensor


class Sequences:
    """Makes training sequences, each of one task of a mixture, the tasks' own or "text" or
    "repetition".
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text: str, sentences: list[str]) -> None:
        encode = tokenizer.backend_tokenizer.encode
        self._encode = lru_cache(1 << 16)(lambda piece: tuple(encode(piece).ids))
        self._text = encode(text).ids
        self._sentences = sentences
        self._words = [self._encode(" " + word)[0] for word in (*KEYS, *VALUES, *FILLERS)]

    def count(self, text: str) -> int:
        return len(self._encode(text))

    def _repetition(self, rng: random.Random, length: int) -> tuple[list[int], list[bool]]:
        """Random words, again and again: the quickest way to learn to look back."""
        period = rng.randrange(8, max(9, min(length // 2, 64)))
        words = rng.sample(self._words, period)
        tokens = (words * (length // period + 1))[:length]
        return tokens, [at >= period + 1 for at in range(length)]

    def _facts(self, rng: random.Random, length: int, task: str) -> tuple[Facts, int]:
        """As many facts and questions as `length` tokens hold densely, and the tokens left for the
        context.

        Half of such sequences ask by the answer's beginning alone, which gives more answers in less
        text.
        """
        terse = rng.random() < 0.5
        per_fact = 12 if terse else 20  # a needle, its question and its answer
        if task in ("single", "multi_key"):
            most = max(1, min(len(KEYS), length // per_fact))
            count = rng.choice((most, rng.randint(1, most)))
            facts = multi_key(rng, count)
            if terse:
                facts = replace(
                    facts, questions=tuple(replace(each, text="") for each in facts.questions)
                )
        else:
            facts = FACTS[task](rng)
        questions = list(facts.questions)
        rng.shuffle(questions)
        room, asked = length, list[Question]()
        needed = sum(self.count(" " + needle) for needle in facts.needles)
        for question in questions:
            size = self.count(question.text + question.prefix) + self.count(question.target)
            if room - size < needed:
                break
            room -= size
            asked.append(question)
        return Facts(facts.needles, tuple(asked)), room

    def _task(self, rng: random.Random, length: int, task: str) -> tuple[list[int], list[bool]]:
        if task == "common_words":
            context, question = common_words(rng, length - COMMON_WORDS_ROOM, self.count)
            questions: tuple[Question, ...] = (question,)
        else:
            facts, room = self._facts(rng, length, task)
            hay = haystack(rng.choice(HAYSTACKS), rng, self._sentences)
            context = lay_out(facts, hay, room, self.count, rng, rng.random())
            questions = facts.questions
        tokens = list(self._encode(context))
        answers = [False] * len(tokens)
        for question in questions:
            text, target = (
                self._encode(question.text + question.prefix),
                self._encode(question.target),
            )
            wanted = {self._encode(" " + word)[0] for word in question.answers}
            tokens += (*text, *target)
            answers += [False] * len(text) + [token in wanted for token in target]
        return tokens[:length], answers[:length]

    def sequence(
        self, rng: random.Random, length: int, mixture: dict[str, float]
    ) -> tuple[list[int], list[bool]]:
        """Tokens and which of them are answers, both of `length`."""
        task = rng.choices(list(mixture), list(mixture.values()))[0]
        if task == "text":
            at = rng.randrange(len(self._text) - length)
            return self._text[at : at + length], [False] * length
        if task == "repetition":
            return self._repetition(rng, length)
        try:
            tokens, answers = self._task(rng, length, task)
        except ValueError:  # too short for this task's needles
            return self._repetition(rng, length)
        pad = length - len(tokens)
        at = rng.randrange(len(self._text) - length)
        return self._text[at : at + pad] + tokens, [False] * pad + answers


def positions(rng: random.Random, length: int, span: int) -> list[int]:
    """0 .. length-1 with jumps at up to three places, so that short sequences show distances of up
    to `span` tokens (positional skips, arXiv 2309.10400).
    """
    spare = span - length
    if spare <= 0 or rng.random() < 0.5:
        return list(range(length))
    cuts = sorted(rng.randrange(1, length) for _ in range(3))
    jumps = sorted(rng.randrange(spare + 1) for _ in range(3))
    result, jump = list[int](), 0
    for begin, end, next_jump in zip([0, *cuts], [*cuts, length], [*jumps, 0]):
        result += range(begin + jump, end + jump)
        jump = next_jump
    return result


class StageBatches(Dataset[Batch]):
    """The batches of a stage by their step."""

    def __init__(self, sequences: Sequences, recipe: Recipe, stage: Stage) -> None:
        self._sequences, self._recipe, self._stage = sequences, recipe, stage

    def __getitem__(self, step: int) -> Batch:
        recipe, stage = self._recipe, self._stage
        rows = max(1, (stage.step_tokens or recipe.step_tokens) // stage.length)
        return make_batch(
            self._sequences,
            recipe.seed << 32 | step,
            rows,
            stage.length,
            stage.span or recipe.span,
            stage.mixture,
        )


def make_batch(
    sequences: Sequences, seed: int, rows: int, length: int, span: int, mixture: dict[str, float]
) -> Batch:
    """Batch number `seed`."""
    rng = random.Random(seed)
    pairs = [sequences.sequence(rng, length, mixture) for _ in range(rows)]
    answers = torch.tensor([pair[1] for pair in pairs])
    drawn = torch.tensor(
        [[rng.random() < LANGUAGE_SHARE for _ in range(length)] for _ in range(rows)]
    )
    return Batch(
        tokens=torch.tensor([pair[0] for pair in pairs]),
        weights=torch.where(answers, 1.0, drawn * LANGUAGE_WEIGHT),
        positions=torch.tensor([positions(rng, length, span) for _ in range(rows)]),
        answers=answers,
    )
