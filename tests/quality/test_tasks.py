"""The tasks' generators, scores and sets; all seeded, no model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from harness import datasets  # noqa: E402
from harness.accuracy import score, split  # noqa: E402
from harness.command import spread, too_short  # noqa: E402
from harness.fidelity import overlap  # noqa: E402
from harness.methods import Method  # noqa: E402
from harness.models import Bytes, HuggingFace, Loaded  # noqa: E402
from harness.tasks import DEPTHS, FACTS, HAYSTACKS, TASKS, Question, Sample, fact, make  # noqa: E402
from harness.texts import held_out_text, sentences, training_text  # noqa: E402
from harness.words import FILLERS, KEYS, NOISE, VALUES  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

TEXT = sentences(held_out_text())


def words(text: str) -> int:
    return len(text.split())


def test_words_are_distinct_and_disjoint() -> None:
    noise = {word.strip(".").lower() for sentence in NOISE for word in sentence.split()}
    everything = [*KEYS, *VALUES, *FILLERS]
    assert len(set(everything)) == len(everything)
    assert not noise & {*KEYS, *VALUES}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("hay", HAYSTACKS)
def test_prompts_fit_and_can_be_answered(task: str, hay: str) -> None:
    for seed in range(5):
        sample = make(task, 400, seed, words, hay=hay, sentences=TEXT)
        question = sample.question
        prompt = sample.context + question.text + question.prefix
        assert (395 if task in FACTS else 370) <= words(prompt) <= 400
        assert all(answer in sample.context for answer in question.answers)
        assert score(question.target, question.answers) == 1
        assert sample == make(task, 400, seed, words, hay=hay, sentences=TEXT)
        assert sample != make(task, 400, seed + 1, words, hay=hay, sentences=TEXT)


@pytest.mark.parametrize("task", sorted(DEPTHS))
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_needle_lies_at_its_depth(task: str, depth: float) -> None:
    sample = make(task, 600, 3, words, depth=depth)
    needle = (
        sample.question.text + sample.question.target
        if task == "records"
        else sample.question.prefix.strip()
    )
    at = sample.context.index(needle) / len(sample.context)
    # A needle's own length, and those of the others that fall to one side of it.
    assert abs(at - depth) < 0.15


def test_a_question_asks_for_the_needle_of_its_key_alone() -> None:
    sample = make("multi_key", 400, 0, words)
    key = sample.question.text.split()[-1].strip("?")
    assert fact(key, sample.question.answers[0]) in sample.context
    assert sample.context.count(f" {key} ") == 1


def test_a_room_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="room: .* tokens; the needles alone need"):
        make("multi_key", 30, 0, words)


def test_common_words_are_the_most_common() -> None:
    sample = make("common_words", 500, 1, words)
    listed = sample.context.replace(".", "").split()
    ranked = sorted(set(listed), key=listed.count, reverse=True)
    assert set(ranked[:3]) == set(sample.question.answers)
    assert listed.count(ranked[2]) >= 2 * listed.count(ranked[3])


def test_scores() -> None:
    assert score(" blue. And red", ("blue", "red")) == 1
    assert score(" Blue-ish", ("blue", "red")) == 0.5
    assert score(" blueish", ("blue",)) == 0
    assert score("g~Q", ("g",)) == score(" g", ("g",)) == 1
    assert score("~g", ("g",)) == 0
    assert score(" red", ("blue", "red"), any_of=True) == 1
    assert score(" green", ("blue", "red"), any_of=True) == 0


def test_overlap_with_the_oracle() -> None:
    wanted = torch.tensor([[0.9, 0.1, 0.8, 0.2], [0.1, 0.9, 0.2, 0.8]])
    assert overlap(torch.tensor([[0, 2], [0, 2]]), wanted) == 0.5
    assert overlap(torch.tensor([[0, 2], [1, 3]]), wanted) == 1.0
    summed = torch.tensor([[0.9, 0.1, 0.8, 0.2], [0.1, 0.2, 0.0, 0.1]])
    assert overlap(torch.tensor([0, 1]), summed) == 0.5


def test_the_held_out_text_is_not_trained_on() -> None:
    trained = training_text()
    assert not [
        piece for piece in held_out_text().split("\n\n") if len(piece) > 200 and piece in trained
    ]


def test_datasets(tmp_path: Path) -> None:
    rows = [
        {
            "context": "a b c",
            "question": "which?",
            "answer": ["a", "b"],
            "answer_prefix": "It is",
            "task": "niah",
        },
        {"context": "x " * 500, "question": "too long?", "answer": "x", "task": "niah"},
        {"context": "p q", "input": "what?", "answers": ["p", "q"], "task": "hotpotqa"},
        {"context": "p q", "question": "what?", "answer": ["p", "q"], "task": "qa_1"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = Loaded("none", None, Bytes(), "")
    first, second, third = datasets.read(tmp_path, loaded, longest=200, limit=4)
    assert (first.task, first.question.text, first.question.prefix) == (
        "niah",
        "\nwhich?",
        "\nIt is",
    )
    assert first.question.answers == ("a", "b")
    assert not first.question.any_of and first.question.target == " a, b"
    for task, sample in (("hotpotqa", second), ("qa_1", third)):
        assert (sample.task, sample.question.answers) == (task, ("p", "q"))
        assert sample.question.any_of and sample.question.target == " p"
    (tmp_path / "rows.jsonl").write_text('{"context": "a"}')
    with pytest.raises(ValueError, match="no column question"):
        datasets.read(tmp_path, loaded, longest=200, limit=4)


def test_fidelity_has_all_depths() -> None:
    few = [make("single", 100, i, words, (i % 5) / 4) for i in range(20)]
    assert [sample.depth for sample in spread(few, 4, 5)] == [0.0, 0.25, 0.75, 1.0]
    assert [sample.depth for sample in spread(few[:5], 1, 5)] == [0.5]
    assert len({sample.number for sample in spread(few, 4, 5)}) == 4


def test_a_window_that_fills_the_budget_is_skipped_in_sight() -> None:
    methods = [Method("snapkv", budget, None, 64) for budget in (0.1, 0.2)]  # type: ignore
    assert too_short(methods, {512, 640, 1024}) == {
        "snapkv at 10%": "its window of 64 tokens fills the budget of prompts of up to 640"
    }


def test_the_token_that_begins_a_text(tmp_path: Path) -> None:
    backend = Tokenizer(WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="b"))
    for begins in (False, True):
        if begins:
            backend.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 0)])
        plain = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
        plain.save_pretrained(tmp_path)
        tokenizer = HuggingFace(tmp_path)
        assert tokenizer.begin == [0] * begins and tokenizer.encode("a") == [1]
        model: Any = SimpleNamespace(device="cpu")
        prompt, rest = split(
            Loaded("none", model, tokenizer, ""),
            Sample("qa", "a", Question("b", "a", "b", ("b",)), 3, None, 0),
            True,
        )
        assert prompt.tolist() == [[0] * begins + [1, 2]] and rest.tolist() == [[1]]


def test_samples_differ_between_lengths() -> None:
    rng = random.Random(0)
    assert FACTS["single"](rng) != FACTS["single"](rng)
    assert make("single", 200, 0, words).question != make("single", 300, 0, words).question
