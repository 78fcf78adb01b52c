"""The training: its sequences, and that one that was interrupted goes on as if it had not been."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if not hasattr(torch.optim, "Muon"):
    pytest.skip(f"torch {torch.__version__} has no Muon; 2.9 has", allow_module_level=True)

from harness.models import load  # noqa: E402
from harness.texts import held_out_text, sentences  # noqa: E402
from harness.training import command, recipe  # noqa: E402
from harness.training.batches import (  # noqa: E402
    LANGUAGE_SHARE,
    LANGUAGE_WEIGHT,
    Batch,
    Sequences,
    make_batch,
    positions,
)
from harness.training.loop import Trainer, check_torch  # noqa: E402
from harness.training.recipe import (  # noqa: E402
    CPU,
    CPU_LONG,
    FIRST_MIXTURE,
    GPU,
    MIXTURE,
    Stage,
)
from harness.training.scores import full_cache_scores  # noqa: E402
from harness.training.tokenizer import WORDS, make_tokenizer, tokenizer_of  # noqa: E402

TEXT = held_out_text()
SMALL = replace(
    CPU, layers=2, hidden=32, feed_forward=32, query_heads=2, kv_heads=1, head_dim=16, vocabulary=2048,
    step_tokens=256, tokens=256 * 6, horizon=None,
    stages=(Stage(64, 2.0, 0.5, FIRST_MIXTURE), Stage(128, 2.0, 1.0)),
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(TEXT, 2048)


@pytest.fixture(scope="module")
def sequences(tokenizer: Any) -> Sequences:
    return Sequences(tokenizer, TEXT, sentences(TEXT))


def test_tokenizer(tokenizer: Any) -> None:
    assert all(len(tokenizer.encode(" " + word)) == 1 for word in WORDS)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert make_tokenizer(TEXT, 2048).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ValueError, match="300 tokens are too few"):
        make_tokenizer(TEXT, 300)


def test_a_training_keeps_its_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    """Its text is the project's documents, which change while it is interrupted."""
    began = tokenizer_of(tmp_path, TEXT, 2048)
    goes_on = tokenizer_of(tmp_path, TEXT[: len(TEXT) // 2], 2048)
    assert began.get_vocab() == goes_on.get_vocab() == tokenizer.get_vocab()
    assert goes_on.encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize("task", MIXTURE)
def test_sequences(tokenizer: Any, sequences: Sequences, task: str) -> None:
    batch = make_batch(sequences, 7, 8, 256, 2048, {task: 1.0})
    assert batch.tokens.shape == batch.weights.shape == batch.positions.shape == (8, 256)
    assert torch.equal(batch.answers, batch.answers & (batch.weights == 1))
    rest = batch.weights[~batch.answers]
    assert torch.equal(rest, (rest > 0) * LANGUAGE_WEIGHT)
    assert (rest > 0).float().mean().item() == pytest.approx(LANGUAGE_SHARE, abs=0.06)
    assert batch.answers.any() == (task != "text")
    again = make_batch(sequences, 7, 8, 256, 2048, {task: 1.0})
    assert torch.equal(batch.tokens, again.tokens) and torch.equal(batch.positions, again.positions)
    for row, answers in zip(batch.tokens, batch.answers):
        for at in answers.nonzero().flatten().tolist():
            # What answers was there before, or it could not be found.
            assert row[at] in row[:at], tokenizer.decode(row)


def test_positions() -> None:
    rng = random.Random(5)
    rows = [positions(rng, 64, 1000) for _ in range(50)]
    steps = [[b - a for a, b in zip(row, row[1:])] for row in rows]
    assert all(min(row) >= 0 and max(row) < 1000 and len(row) == 64 for row in rows)
    assert all(step >= 1 for row in steps for step in row)
    assert all(sum(step > 1 for step in row) <= 3 for row in steps)
    assert max(map(max, rows)) > 800 and rows.count(list(range(64))) > 10
    assert positions(rng, 64, 64) == list(range(64))


def test_tokens_see_what_is_before_a_jump(
    tokenizer: Any, sequences: Sequences, tmp_path: Path
) -> None:
    trainer = Trainer(SMALL, tokenizer, sequences, tmp_path, torch.device("cpu"))
    for layer in trainer.model.model.layers:  # At the start of a training layers change nothing.
        torch.nn.init.normal_(layer.self_attn.o_proj.weight)
    tokens = torch.arange(40)[None] + 300
    jumping = torch.cat([torch.arange(20), torch.arange(500, 520)])[None]
    ones = torch.ones_like(tokens)
    last = []
    for first in (5, 6):
        tokens[0, 0] = first
        batch = Batch(tokens.clone(), ones.float(), jumping, ones.bool())
        # The same answers from the second half on, so that only the loss of these tells.
        batch.weights[:, :21] = 0
        last.append(trainer._loss(batch)[0].item())
    assert last[0] != last[1]


def train(recipe: Any, tokenizer: Any, sequences: Sequences, folder: Path) -> Trainer:
    folder.mkdir(exist_ok=True)
    trainer = Trainer(recipe, tokenizer, sequences, folder, torch.device("cpu"))
    trainer.run()
    return trainer


def test_resume_and_export(tokenizer: Any, sequences: Sequences, tmp_path: Path) -> None:
    whole = train(SMALL, tokenizer, sequences, tmp_path / "whole")
    assert (whole.progress.step, whole.progress.stage) == (6, 1)
    parts = Trainer(SMALL, tokenizer, sequences, tmp_path / "whole", torch.device("cpu"))
    assert parts.progress == whole.progress
    # The rate follows the tokens of the whole, so half of it is stopped by hand.
    (tmp_path / "half").mkdir()
    half = Trainer(SMALL, tokenizer, sequences, tmp_path / "half", torch.device("cpu"))
    half.train_until(3 * SMALL.step_tokens)
    rest = train(replace(SMALL, workers=2), tokenizer, sequences, tmp_path / "half")
    for one, other in zip(whole.model.parameters(), rest.model.parameters()):
        assert torch.equal(one, other)
    whole.export(tmp_path / "model")
    loaded = load(tmp_path / "model", dtype="bfloat16")
    assert loaded.model.config.num_key_value_heads == 1
    assert loaded.tokenizer.encode(" apple") == tokenizer.encode(" apple")
    scores = full_cache_scores(loaded, [160], 1, sentences(TEXT))
    assert 0 <= scores["single"][160] <= 1 and "records" not in scores


def test_a_training_goes_on_from_a_model(
    tokenizer: Any,
    sequences: Sequences,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With its weights and its tokenizer, by the command."""
    train(SMALL, tokenizer, sequences, tmp_path / "first").export(tmp_path / "model")
    none = replace(
        SMALL, span=256, tokens=0, stages=(Stage(256, 2.0, 1.0),), goes_on=True, vocabulary=2048
    )
    wide = replace(none, feed_forward=64)
    monkeypatch.setattr(command, "RECIPES", {"cpu": SMALL, "long": none, "wide": wide})

    def run(name: str, *flags: str) -> None:
        arguments = ["train", str(tmp_path / name), "--recipe", name, "--samples", "1", *flags]
        monkeypatch.setattr("sys.argv", arguments)
        command.main()

    with pytest.raises(SystemExit):
        run("long")
    assert "--from: none is given; --recipe long goes on from a model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("wide", "--from", str(tmp_path / "model"))
    assert "is no model of --recipe wide" in capsys.readouterr().err
    run("long", "--from", str(tmp_path / "model"))
    first, longer = load(tmp_path / "model"), load(tmp_path / "long" / "model")
    assert longer.model.config.max_position_embeddings == 256
    for one, other in zip(first.model.parameters(), longer.model.parameters()):
        assert torch.equal(one, other)
    assert longer.tokenizer.encode(TEXT) == tokenizer.encode(TEXT)


def test_a_torch_without_muon_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ImportError, match=r"needs 2.9 or later.*is installed"):
        check_torch()


def test_layers_join_without_a_change(tokenizer: Any, sequences: Sequences, tmp_path: Path) -> None:
    """A stage of fewer layers leaves the others as they began: they change nothing."""
    few = replace(SMALL, stages=(replace(SMALL.stages[0], layers=1), SMALL.stages[1]))
    (tmp_path / "few").mkdir()
    trainer = Trainer(few, tokenizer, sequences, tmp_path / "few", torch.device("cpu"))
    trainer.train_until(3 * few.step_tokens)
    assert trainer.progress.stage == 1 and trainer.progress.stage_step == 3
    first, last = trainer.model.model.layers
    assert not first.self_attn.o_proj.weight.any() and last.self_attn.o_proj.weight.any()
    batch = make_batch(sequences, 9, 2, 64, 64, FIRST_MIXTURE)
    whole = trainer._loss(batch)[0].item()
    trainer.progress.stage = 0
    assert trainer._loss(batch)[0].item() == whole
    trainer.progress.stage = 1
    trainer.run()
    assert first.self_attn.o_proj.weight.any()


def test_recipes_are_of_the_size_that_is_claimed() -> None:
    from transformers import LlamaForCausalLM

    for each in recipe.RECIPES.values():
        with torch.device("meta"):
            model = LlamaForCausalLM(each.config())
        assert 2 * sum(p.numel() for p in model.parameters()) <= 40e6
        assert each.layers >= 16 and each.query_heads > each.kv_heads
        assert each.stages[-1].length == each.span and each.stages[-1].end == 1
    assert CPU_LONG.span == GPU.span == 8192
