"""The training loop: curriculum over length, checkpoints, resume."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .batches import Batch, Sequences, StageBatches
from .recipe import Recipe

SAVE_SECONDS = 120
LOG_SECONDS = 15
WARM_STEPS = 50
SMOOTHING = 0.95  # of the share of right answers, which moves the curriculum


@dataclasses.dataclass
class Progress:
    """How far a training has come; saved with the weights."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    stage: int = 0
    right: float = 0.0


class Trainer:
    """Trains `recipe` in `folder`, from its checkpoint where there is one."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerFast,
        sequences: Sequences,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.recipe, self.tokenizer, self.sequences = recipe, tokenizer, sequences
        self.folder, self.device = folder, device
        self.progress = Progress()
        torch.manual_seed(recipe.seed)
        self.model = LlamaForCausalLM(recipe.config()).to(device)
        matrices = [p for n, p in self.model.model.layers.named_parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        self.optimizers = [
            torch.optim.Muon(
                matrices, lr=recipe.rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self._log = folder / "log.jsonl"
        checkpoint = folder / "checkpoint.pt"
        if checkpoint.exists():
            self._load(checkpoint)

    def run(self) -> None:
        self.train_until(self.recipe.tokens)

    def train_until(self, tokens: int) -> None:
        """Goes on until `tokens` were seen, and saves."""
        begin, saved, logged = time.monotonic() - self.progress.seconds, 0.0, 0.0
        for batch in self._batches():
            if self.progress.tokens >= tokens:
                break
            loss, right = self._step(batch)
            self.progress.seconds = time.monotonic() - begin
            self._advance(right)
            now = self.progress.seconds
            if now - logged > LOG_SECONDS:
                logged = now
                self._write_log(loss)
            if now - saved > SAVE_SECONDS:
                saved = now
                self._save()
        self._save()

    def _batches(self) -> Iterator[Batch]:
        """Those of the step and stage that the progress is at, without end."""
        while True:
            stage = self.progress.stage
            # Forked, since the sequences hold a cache of what was encoded; they use no GPU.
            loader: DataLoader[Batch] = DataLoader(
                StageBatches(self.sequences, self.recipe, self.recipe.stages[stage]),
                batch_size=None,
                sampler=range(self.progress.step, sys.maxsize),
                num_workers=self.recipe.workers,
                multiprocessing_context="fork" if self.recipe.workers else None,
            )
            for batch in loader:
                yield batch
                if self.progress.stage != stage:
                    break

    def _step(self, batch: Batch) -> tuple[float, float]:
        """One update; the loss and the share of answers that came first."""
        self._set_rate()
        loss, right = self._loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.tokens += batch.tokens.numel()
        return loss.item(), right

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, float]:
        tokens = batch.tokens.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu"):
            logits = self.model(
                input_ids=tokens,
                position_ids=batch.positions.to(self.device),
                # Without one, positions that jump are taken for several sequences in one row.
                attention_mask=torch.ones_like(tokens),
                use_cache=False,
            ).logits[:, :-1]
        wanted, weights = tokens[:, 1:], batch.weights[:, 1:].to(self.device)
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), wanted.flatten(), reduction="none"
        )
        answers = batch.answers[:, 1:].to(self.device)
        with torch.no_grad():
            right = (
                (logits.argmax(-1) == wanted)[answers].float().mean().item()
                if answers.any()
                else math.nan
            )
        return (losses * weights.flatten()).sum() / weights.sum(), right

    def _set_rate(self) -> None:
        """A short rise, then down to a twentieth along a cosine."""
        done = min(1.0, self.progress.tokens / self.recipe.tokens)
        scale = min(1.0, (self.progress.step + 1) / WARM_STEPS) * (
            0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.rate * scale

    def _advance(self, right: float) -> None:
        progress, stages = self.progress, self.recipe.stages
        if not math.isnan(right):
            progress.right = SMOOTHING * progress.right + (1 - SMOOTHING) * right
        stage = stages[progress.stage]
        over = progress.tokens >= stage.end * self.recipe.tokens
        if progress.stage + 1 < len(stages) and (over or progress.right >= stage.until):
            progress.stage += 1
            progress.right = 0.0

    def _write_log(self, loss: float) -> None:
        line = {**dataclasses.asdict(self.progress), "loss": loss}
        line["length"] = self.recipe.stages[self.progress.stage].length
        text = json.dumps({k: round(v, 4) for k, v in line.items()})
        print(text, flush=True)
        with self._log.open("a") as log:
            log.write(text + "\n")

    def _save(self) -> None:
        """The state to go on from, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": dataclasses.asdict(self.progress),
        }
        torch.save(state, self.folder / "checkpoint.new")
        (self.folder / "checkpoint.new").replace(self.folder / "checkpoint.pt")

    def _load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])

    def export(self, folder: Path) -> None:
        """Weights (bf16, safetensors), config and tokenizer, as any tool loads them."""
        model = LlamaForCausalLM(self.recipe.config())
        model.load_state_dict(self.model.state_dict())
        model.to(torch.bfloat16).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
