"""Compressed prefill for Hugging Face models (docs/huggingface.md).

with structkv.hf.compress(model, client, kv_budget=0.1, skeleton=0.2) as run:
    tokens = model.generate(**inputs, max_new_tokens=100)
print(run.last.pivot_layer, run.last.compute_saved, run.last.cache_bytes)
"""

from __future__ import annotations

from typing import Any, Literal

try:
    import torch as _torch  # noqa: F401
    import transformers as _transformers
except ImportError as _error:
    raise ImportError(
        "structkv.hf needs torch and transformers: pip install 'structkv[hf]'"
    ) from _error

if tuple(map(int, _transformers.__version__.split(".")[:2])) < (5, 20):
    raise ImportError(
        f"structkv.hf needs transformers 5.20 or later; {_transformers.__version__} is installed"
    )

from transformers import PreTrainedModel

from ..client import Client
from ..messages import Budget, Method, Pivot
from ..methods import MethodName, build_method
from ..options import SessionOptions
from .cache import CompactedLayer
from .model import build_open, check_model
from .prefill import Setup
from .report import PromptReport, Report, Seconds
from .run import Run

__all__ = ["CompactedLayer", "PromptReport", "Report", "Run", "Seconds", "compress"]


def compress(
    model: PreTrainedModel,
    client: Client,
    method: MethodName | Method = "structkv",
    *,
    kv_budget: float | Budget | None = None,
    skeleton: float | Budget | None = None,
    pivot: Literal["online", "profiled", "exact"] | int | Pivot | None = None,
    output: Literal["plan", "compact"] = "plan",
    on_failure: Literal["full", "raise"] = "full",
    continuation: bool = False,
    model_id: str | None = None,
    options: SessionOptions = SessionOptions(),
    **parameters: Any,
) -> Run:
    """Compresses what `model` prefills, by generate() or by a call with a cache, as long as the
    returned context lasts.

    Each layer's keys, values and last queries go to the service as the model computes them. Once
    the pivot is known the layers that follow compute on the skeleton alone; the cache gets the rows
    that each layer keeps, and generation goes on at the prompt's own length. Sources:
    docs/method.md.

    model: Llama, Mistral, Ministral, Qwen2, Qwen3 or Qwen3-MoE (model.MODEL_TYPES), in f32, f16 or
        bf16, with attn_implementation "sdpa" or "eager". Sliding windows must hold the whole
        sequence.
    client: a Client or an Engine.
    method: its name, or a message with all of its parameters (structkv.SnapKvMethod(...)).
    kv_budget: share of the prompt's tokens that each layer keeps; the service's default is 0.1.
    skeleton: share that the layers after the pivot compute on (structkv, fastkv); default 0.2.
    pivot: StructKV: a layer, or how it is found: "online" (the default), "profiled", or "exact",
        which answers too late to save work. FastKV, GemFilter: the layer that chooses.
    output: "plan": the service says which rows stay, and the cache is gathered here, so that values
        are not sent. "compact": values are sent, and the rows come back. The same to the byte.
    on_failure: where the service fails before anything was cut. "full": a warning, and the prompt
        keeps its full cache. "raise": the error; layers are then compacted while the prefill runs,
        so that the full cache is never whole in memory. What fails later is raised either way, and
        so is what the caller has asked for wrongly.
    continuation: allows several tokens at once on a compacted cache: a next turn, a text that is
        scored. Without it they are refused, since chunks of one prompt look the same.
    model_id: names the model to the service; default: where it came from.
    options: of the sessions: timeout and retry above all, and memory that is shared with the
        service (staging, results), so that nothing goes in messages.
    parameters: other fields of the method, for instance window_tokens=32, decay=0.8.

    A batch is padded on the left; each row has its own session, sets and skeleton, and the rows are
    cut together, after the last of their pivots. Past the cut there are hidden states, and logits,
    of the skeleton's tokens alone. Tensors on a GPU are copied to the host, unless options.staging is
    an arena of a GPU's region: then they are copied to it, on the GPU.

    Raises ValueError or TypeError for what the package does not take, structkv.Error of the
    service.
    """
    if on_failure not in ("full", "raise"):
        raise ValueError(f"on_failure: {on_failure!r}; 'full' or 'raise' is expected")
    if output not in ("plan", "compact"):
        raise ValueError(f"output: {output!r}; 'plan' or 'compact' is expected")
    check_model(model)
    layers = len(model.get_decoder().layers)
    message = build_method(method, layers, kv_budget, skeleton, pivot, parameters)
    open = build_open(model, message, output, model_id)
    return Run(model, Setup(client, open, message, options, on_failure == "raise"), continuation)
