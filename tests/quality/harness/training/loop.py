"""The training loop: curriculum over length, checkpoints, resume."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .batches import Batch, Sequences, StageBatches
from .recipe import Recipe

SAVE_SECONDS = 120
LOG_SECONDS = 15
SMOOTHING = 0.95  # of the share of right answers, which moves the curriculum


@dataclasses.dataclass
class Progress:
    """How far a training has come; saved with the weights."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    stage: int = 0
    stage_step: int = 0  # that the stage began at
    right: float = 0.0


def check_torch() -> None:
    """ImportError where torch has no Muon."""
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(
            f"torch: training needs 2.9 or later, which has Muon; {torch.__version__} is installed"
        )


class Trainer:
    """Trains `recipe` in `folder`, from its checkpoint where there is one, else from `weights` (a
    state_dict) where they are given, else from scratch.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerFast,
        sequences: Sequences,
        folder: Path,
        device: torch.device,
        weights: dict[str, torch.Tensor] | None = None,
    ) -> None:
        check_torch()
        self.recipe, self.tokenizer, self.sequences = recipe, tokenizer, sequences
        self.folder, self.device = folder, device
        self.progress = Progress()
        torch.manual_seed(recipe.seed)
        self.model = LlamaForCausalLM(recipe.config()).to(device)
        for layer in self.model.model.layers:  # Until it is trained a layer changes nothing.
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        if weights is not None:
            self.model.load_state_dict(weights)
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
        tokens, weights = batch.tokens.to(self.device), batch.weights[:, 1:].to(self.device)
        predicted = weights > 0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu"):
            with self._stage_layers():
                hidden = self.model.model(
                    input_ids=tokens,
                    position_ids=batch.positions.to(self.device),
                    # Without one, positions that jump are taken for several sequences in one row.
                    attention_mask=torch.ones_like(tokens),
                    use_cache=False,
                ).last_hidden_state[:, :-1]
            logits = self.model.lm_head(hidden[predicted])
        wanted, weights = tokens[:, 1:][predicted], weights[predicted]
        losses = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
        answers = batch.answers[:, 1:].to(self.device)[predicted]
        with torch.no_grad():
            right = (
                (logits.argmax(-1) == wanted)[answers].float().mean().item()
                if answers.any()
                else math.nan
            )
        return (losses * weights).sum() / weights.sum(), right

    @contextmanager
    def _stage_layers(self) -> Iterator[None]:
        """The model with those layers alone that the stage trains, spread over its depth."""
        layers = self.model.model.layers
        few = self.recipe.stages[self.progress.stage].layers or len(layers)
        each = len(layers) // few
        self.model.model.layers = layers[each - 1 :: each]
        try:
            yield
        finally:
            self.model.model.layers = layers

    def _set_rate(self) -> None:
        """A short rise in each stage, and down to a twentieth along a cosine. Where that is longer than
        the training, the rest of the way is linear, over its last third.
        """
        tokens = self.recipe.tokens
        done = min(1.0, self.progress.tokens / (self.recipe.horizon or tokens))
        begun = self.progress.step - self.progress.stage_step
        scale = min(1.0, (begun + 1) / self.recipe.warm_steps) * (
            0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2
        )
        if self.recipe.horizon:
            left = 1 - min(1.0, self.progress.tokens / tokens)
            scale *= min(1.0, max(0.05, 3 * left))
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
            progress.stage_step = progress.step
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
