"""A byte-level BPE of the training text, in which each word of the tasks is one token."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..words import FILLERS, KEYS, NOISE, VALUES

WORDS = (*KEYS, *VALUES, *FILLERS)
# What the tasks say around them.
WORDING = (
    " The code is. Which code begins with? Which codes begin with and? Let be. Which names are?"
)
WORDING += " They are. Which words are the most common? " + " ".join(NOISE)


def tokenizer_of(
    folder: Path, text: str, vocabulary: int, begun_from: Path | None = None
) -> PreTrainedTokenizerFast:
    """The one that a training in `folder` began with, whatever its text has become since; a new one
    is saved there, that of the model in `begun_from` or one of the text.
    """
    saved = folder / "tokenizer"
    if not saved.exists():
        if begun_from is not None:
            first = PreTrainedTokenizerFast.from_pretrained(begun_from)
        else:
            first = make_tokenizer(text, vocabulary)
        first.save_pretrained(folder / "tokenizer.new")
        (folder / "tokenizer.new").rename(saved)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(saved)
    return tokenizer


def make_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """The same for the same text and size, to the bit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    # So often that their merges come first, whatever the text.
    words = " " + " ".join(WORDS) + WORDING
    tokenizer.train_from_iterator([words] * 4000 + [text], trainer)
    split = [word for word in WORDS if len(tokenizer.encode(" " + word).ids) != 1]
    if split:
        raise ValueError(
            f"vocabulary: {vocabulary} tokens are too few for {len(split)} words,"
            f" {split[0]} among them"
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
