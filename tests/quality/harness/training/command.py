"""`tests/quality/train`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from ..texts import sentences, training_text
from .batches import Sequences
from .loop import Trainer
from .recipe import RECIPES
from .tokenizer import make_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(prog="train", description=__doc__)
    parser.add_argument("folder", type=Path, help="for checkpoint.pt, log.jsonl and model/; goes on where it holds a checkpoint")
    parser.add_argument("--recipe", choices=RECIPES, default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="of the whole training (the recipe's number)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of PyTorch (its own choice)")
    flags = parser.parse_args()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    recipe = dataclasses.replace(RECIPES[flags.recipe], seed=flags.seed)
    if flags.tokens:
        recipe = dataclasses.replace(recipe, tokens=flags.tokens)
    flags.folder.mkdir(parents=True, exist_ok=True)
    text = training_text()
    tokenizer = make_tokenizer(text, recipe.vocabulary)
    sequences = Sequences(tokenizer, text, sentences(text))
    trainer = Trainer(recipe, tokenizer, sequences, flags.folder, torch.device("cuda" if flags.recipe == "gpu" else "cpu"))
    print(f"train: {sum(p.numel() for p in trainer.model.parameters()):,} parameters", flush=True)
    trainer.run()
    trainer.export(flags.folder / "model")
