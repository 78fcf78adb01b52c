"""Tasks built like RULER's (arXiv 2404.06654), generated and seeded: facts laid into a haystack,
and questions about them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .words import FILLERS, KEYS, NOISE, VALUES

Count = Callable[[str], int]  # tokens of a text, by the model's tokenizer

HAYSTACKS = ("noise", "words", "text")


@dataclass(frozen=True)
class Question:
    """A question, the words that its answer begins with, the right answer, and the words of it that
    count, all of them or `any_of` them. Each of the first three follows the one before as it is.
    """

    text: str
    prefix: str
    target: str
    answers: tuple[str, ...]
    any_of: bool = False


@dataclass(frozen=True)
class Facts:
    """Sentences, the first of which goes where the depth says and the others in order at random
    places, and the questions they answer.
    """

    needles: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Sample:
    """One prompt: `context` and then a question. `tokens` is the length that was asked for, `depth`
    where the needle lies (0 to 1), `number` tells the samples of a task apart.
    """

    task: str
    context: str
    question: Question
    tokens: int
    depth: float | None
    number: int


def fact(key: str, value: str) -> str:
    return f"The code is {key} {value}."


def ask(key: str, value: str) -> Question:
    return Question(
        f" Which code begins with {key}?", f" The code is {key}", f" {value}.", (value,)
    )


def single(rng: random.Random) -> Facts:
    """One needle."""
    return multi_key(rng, 1)


def multi_key(rng: random.Random, count: int = 8) -> Facts:
    """`count` needles of which one is asked for."""
    pairs = list(zip(rng.sample(KEYS, count), rng.sample(VALUES, count)))
    return Facts(tuple(fact(k, v) for k, v in pairs), tuple(ask(k, v) for k, v in pairs))


def multi_value(rng: random.Random, count: int = 3) -> Facts:
    """One key with `count` values, all of which are asked for, in their order."""
    key, values = rng.choice(KEYS), rng.sample(VALUES, count)
    target = f". The code is {key} ".join(values)
    question = Question(
        f" Which codes begin with {key}?", f" The code is {key}", f" {target}.", tuple(values)
    )
    return Facts(tuple(fact(key, v) for v in values), (question,))


def multi_query(rng: random.Random, count: int = 8, asked: int = 3) -> Facts:
    """`count` needles, `asked` of which one question asks for."""
    keys, values = rng.sample(KEYS, count), rng.sample(VALUES, count)
    names = ", ".join(keys[: asked - 1]) + f" and {keys[asked - 1]}"
    text, prefix = f" Which codes begin with {names}?", f" The code is {keys[0]}"
    rest = "".join(f" {fact(k, v)}" for k, v in zip(keys[1:asked], values[1:asked]))
    needles = tuple(fact(k, v) for k, v in zip(keys, values))
    return Facts(needles, (Question(text, prefix, f" {values[0]}.{rest}", tuple(values[:asked])),))


def variable_tracking(rng: random.Random, hops: int = 2, chains: int = 2) -> Facts:
    """`chains` values, each handed on from name to name `hops` times; all names that hold the first
    are asked for.
    """
    names, values = rng.sample(KEYS, chains * (hops + 1)), rng.sample(VALUES, chains)
    lines = []
    for i, value in enumerate(values):
        chain = names[i * (hops + 1) : (i + 1) * (hops + 1)]
        lines.append([f"Let {name} be {held}." for name, held in zip(chain, [value, *chain])])
    needles = tuple(line for step in zip(*lines) for line in step)
    chain = names[: hops + 1]
    question = Question(
        f" Which names are {values[0]}?", " They are", f" {', '.join(chain)}.", tuple(chain)
    )
    return Facts(needles, (question,))


def records(rng: random.Random, count: int = 8) -> Facts:
    """What the bundled model was trained on (tests/data/README.md): `~Kv` says that K has the value
    v, `~K` asks, once for the question and once for the answer's beginning.
    """
    keys = rng.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", count)
    values = rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=count)
    questions = tuple(Question(f"~{k}", f"~{k}", v, (v,)) for k, v in zip(keys, values))
    return Facts(tuple(f"~{k}{v}" for k, v in zip(keys, values)), questions)


FACTS: dict[str, Callable[[random.Random], Facts]] = {
    "single": single,
    "multi_key": multi_key,
    "multi_value": multi_value,
    "multi_query": multi_query,
    "variable_tracking": variable_tracking,
    "records": records,
}
DEPTHS = ("single", "multi_key", "records")  # the tasks that have a depth
TASKS = (*FACTS, "common_words")


def haystack(kind: str, rng: random.Random, sentences: list[str]) -> Iterator[str]:
    """Sentences without end: RULER's noise, random words, or a text's from a random place on."""
    at = rng.randrange(max(1, len(sentences)))
    while True:
        if kind == "noise":
            yield from NOISE
        elif kind == "words":
            yield " ".join(rng.choices(FILLERS, k=8)).capitalize() + "."
        else:
            yield sentences[at % len(sentences)]
            at += 1


def lay_out(
    facts: Facts, hay: Iterator[str], room: int, count: Count, rng: random.Random, depth: float
) -> str:
    """`facts` among as many sentences of `hay` as `room` tokens hold, the last of them cut short:
    the first needle after a share `depth` of them.
    """
    left = room - sum(count(" " + needle) for needle in facts.needles)
    if left < 0:
        raise ValueError(f"room: {room} tokens; the needles alone need {room - left}")
    sentences: list[str] = []
    while left > 0:
        words = next(hay).split()
        while words and count(" " + " ".join(words)) > left:
            words.pop()
        if not words:
            break
        sentences.append(" ".join(words))
        left -= count(" " + sentences[-1])
    places = sorted(rng.randrange(len(sentences) + 1) for _ in facts.needles[1:])
    order = sorted(
        [(round(depth * len(sentences)), facts.needles[0]), *zip(places, facts.needles[1:])],
        key=lambda placed: placed[0],
    )
    for place, needle in reversed(order):
        sentences.insert(place, needle)
    return " ".join(sentences)


MOST_COMMON = " Which words are the most common?"


def common_words(
    rng: random.Random, room: int, count: Count, asked: int = 3
) -> tuple[str, Question]:
    """A list of words, `asked` of which come four times as often as any other."""
    pool = rng.sample(KEYS, len(KEYS))
    common, others = pool[:asked], pool[asked:]
    words, left, rounds = list[str](), room, 0
    while left > 0:
        # A round has every common word four times and a share of the others once.
        part = common * 4 + [others[(rounds * 12 + i) % len(others)] for i in range(12)]
        left -= sum(count(f" {word}.") for word in part)
        if left >= 0 or not words:
            words += part
        rounds += 1
    rng.shuffle(words)
    question = Question(MOST_COMMON, " They are", f" {', '.join(common)}.", tuple(common))
    return ". ".join(words) + ".", question


def make(
    task: str,
    tokens: int,
    seed: int,
    count: Count,
    depth: float | None = None,
    hay: str = "noise",
    sentences: list[str] | None = None,
) -> Sample:
    """The sample number `seed` of a task, context and question together at most `tokens` tokens.

    `hay` is one of HAYSTACKS; "text" takes `sentences`. Without `depth` the needle lies anywhere.
    """
    rng = random.Random(f"{task} {tokens} {seed}")
    if task == "common_words":
        room = tokens - count(f"{MOST_COMMON} They are")
        context, question = common_words(rng, room, count)
        return Sample(task, context, question, tokens, None, seed)
    facts = FACTS[task](rng)
    question = facts.questions[0]
    place = rng.random() if depth is None else depth
    stack = haystack(hay, rng, sentences or [])
    context = lay_out(
        facts, stack, tokens - count(question.text + question.prefix), count, rng, place
    )
    return Sample(task, context, question, tokens, place if task in DEPTHS else None, seed)
