"""`tests/quality/train`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from ..models import load
from ..texts import held_out_text, sentences, training_text
from .batches import Sequences
from .loop import Trainer, check_torch
from .recipe import RECIPES
from .scores import full_cache_scores
from .tokenizer import tokenizer_of

SHORTEST_SCORED = 256  # tokens: shorter prompts have no room for some tasks


def main() -> None:
    parser = argparse.ArgumentParser(prog="train", description=__doc__)
    parser.add_argument(
        "folder",
        type=Path,
        help="for checkpoint.pt, tokenizer/, log.jsonl, model/ and scores.json;"
        " a training in it goes on",
    )
    parser.add_argument(
        "--recipe", choices=RECIPES, default="gpu" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--from",
        dest="begun_from",
        type=Path,
        metavar="MODEL",
        help="the folder of a model that the training goes on from; cpu-long: of cpu's",
    )
    parser.add_argument("--tokens", type=int, help="of the whole training (the recipe's number)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--samples",
        type=int,
        default=50,
        help="prompts of each task, length and haystack for the scores",
    )
    parser.add_argument("--threads", type=int, help="of PyTorch (its own choice)")
    flags = parser.parse_args()
    try:
        check_torch()
    except ImportError as error:
        parser.exit(1, f"train: {error}\n")
    if flags.threads:
        torch.set_num_threads(flags.threads)
    recipe = dataclasses.replace(RECIPES[flags.recipe], seed=flags.seed)
    if flags.tokens:
        recipe = dataclasses.replace(recipe, tokens=flags.tokens)
    if recipe.goes_on and flags.begun_from is None:
        parser.error(f"--from: none is given; --recipe {flags.recipe} goes on from a model")
    flags.folder.mkdir(parents=True, exist_ok=True)
    text = training_text()
    tokenizer = tokenizer_of(flags.folder, text, recipe.vocabulary, flags.begun_from)
    sequences = Sequences(tokenizer, text, sentences(text))
    device = "cuda" if flags.recipe == "gpu" else "cpu"
    weights = None if flags.begun_from is None else load(flags.begun_from).model.state_dict()
    try:
        trainer = Trainer(recipe, tokenizer, sequences, flags.folder, torch.device(device), weights)
    except RuntimeError as error:  # PyTorch names the weights and both shapes
        parser.error(f"--from: {flags.begun_from} is no model of --recipe {flags.recipe}: {error}")
    print(f"train: {sum(p.numel() for p in trainer.model.parameters()):,} parameters", flush=True)
    trainer.run()
    trainer.export(flags.folder / "model")
    lengths = sorted({stage.length for stage in recipe.stages if stage.length >= SHORTEST_SCORED})
    loaded = load(flags.folder / "model", device)
    scores = full_cache_scores(loaded, lengths, flags.samples, sentences(held_out_text()))
    (flags.folder / "scores.json").write_text(json.dumps(scores, indent=1))
    for task, by_length in scores.items():
        print(
            f"train: {task}: "
            + ", ".join(f"{length}: {score:.1%}" for length, score in by_length.items())
        )
