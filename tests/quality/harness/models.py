"""A local Hugging Face model and its tokenizer."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging


class Tokenizer(Protocol):
    """What the harness needs of a tokenizer. begin: tokens that it puts before every text."""

    begin: list[int]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


class Bytes:
    """A model without tokenizer files reads bytes, as the bundled one does."""

    begin: list[int] = []

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class HuggingFace:
    """AutoTokenizer; special tokens are those of `begin` alone, for whoever puts texts together."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        first = self._tokenizer.bos_token_id
        self.begin = [first] if first in self._tokenizer.encode("a")[:1] else []

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


@dataclass(frozen=True)
class Loaded:
    """A model that is ready, and the tokenizer of its folder."""

    name: str
    model: PreTrainedModel
    tokenizer: Tokenizer
    cache_name: str  # of the forward's argument: newer transformers call it otherwise

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def forward(self, tokens: torch.Tensor, cache: Any, position: int, **kwargs: Any) -> Any:
        """One forward of `tokens` [1, n] from `position` on, with a cache that is added to. Logits
        are of the last token unless `logits_to_keep` says otherwise.
        """
        positions = torch.arange(position, position + tokens.shape[1], device=tokens.device)[None]
        kwargs = {"logits_to_keep": 1, "use_cache": True, self.cache_name: cache, **kwargs}
        with torch.inference_mode():
            return self.model(input_ids=tokens, position_ids=positions, **kwargs)


def load(folder: Path, device: str = "cpu", dtype: str = "float32") -> Loaded:
    """The model of a local folder; nothing is downloaded."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True
    )
    model.to(device).eval()
    has_tokenizer = any(
        (folder / name).exists()
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    )
    tokenizer: Tokenizer = HuggingFace(folder) if has_tokenizer else Bytes()
    parameters = inspect.signature(type(model).forward).parameters
    cache_name = "cache" if "cache" in parameters else "past_key_values"
    return Loaded(folder.resolve().name, model, tokenizer, cache_name)
