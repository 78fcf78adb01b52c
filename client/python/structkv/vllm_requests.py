"""What a router sends to vLLM instances that have the connector (docs/engines.md). Needs no vLLM.

body = {"model": ..., "prompt": ids, ...}
first = post(prefill, vllm_requests.prefill_request(body))
post(decode, vllm_requests.decode_request(body, first["choices"][0]["token_ids"][0],
                                          first["kv_transfer_params"]))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

COMPRESS = "structkv_compress"
"""Of kv_transfer_params: the prompt is to be compressed and held."""

HELD = "structkv_held"
"""Of kv_transfer_params: the compacted prompt that is held, as HeldPrompt's fields."""

ERROR = "structkv_error"
"""Of kv_transfer_params: why the prompt was not compressed."""

DEFAULT_MAX_TOKENS = 16
"""Of a completion request to vLLM that does not say."""


@dataclass(frozen=True)
class HeldPrompt:
    """A compacted prompt in the service.

    handles: hexadecimal, of the heads of each tensor-parallel rank that prefilled, in their order.
    kv_length: tokens of every layer; keys are turned to the positions 0 .. kv_length - 1.
    prompt_tokens: of the prompt that it stands for.
    fingerprint: what method, parameters and model made it.
    replica: of several, the address of the one that holds it; empty: that is not known.
    """

    handles: Sequence[str]
    kv_length: int
    prompt_tokens: int
    fingerprint: str
    replica: str = ""

    @property
    def cache_salt(self) -> str:
        """Keeps its blocks out of every other prompt's prefix cache."""
        return ":".join(["structkv", self.fingerprint, *self.handles])


def prefill_request(body: dict[str, Any]) -> dict[str, Any]:
    """A completion request as the prefill instance gets it: two tokens, whatever they are, since
    what a prompt came to is known after the step that computed it. The first one is to be kept."""
    return {
        **_without(body, "min_tokens", "stop", "stop_token_ids", "stream_options"),
        "max_tokens": 2,
        "ignore_eos": True,
        "stream": False,
        "return_token_ids": True,
        "kv_transfer_params": {COMPRESS: True},
    }


def decode_request(
    body: dict[str, Any],
    prompt: Sequence[int],
    first_token: int,
    kv_transfer_params: dict[str, Any] | None,
) -> dict[str, Any]:
    """The request as the decode instance gets it: a prompt of kv_length tokens, which stand in for
    the compacted ones and are never computed, and the first token, at which it goes on. Its usage
    counts these; max_tokens and min_tokens are one less, and nothing is asked of the prompt's own
    tokens (echo, prompt_logprobs). ValueError where the prefill instance held nothing, and where
    max_tokens is 1, of which the first token is the whole answer."""
    params = kv_transfer_params or {}
    if HELD not in params:
        raise ValueError(
            f"kv_transfer_params: no {HELD}; {params.get(ERROR, 'nothing was compressed')}"
        )
    held = HeldPrompt(**params[HELD])
    request = {
        **_without(body, "echo", "prompt_logprobs", "skip_reading_prefix_cache"),
        "prompt": [*prompt[len(prompt) - held.kv_length :], first_token],
        "cache_salt": held.cache_salt,
        "kv_transfer_params": {HELD: asdict(held)},
    }
    wanted = body.get("max_tokens")
    wanted = DEFAULT_MAX_TOKENS if wanted is None else wanted
    if wanted < 2:
        raise ValueError(f"max_tokens: {wanted}; at least 2 are expected, the first is there")
    request["max_tokens"] = wanted - 1
    if body.get("min_tokens"):
        request["min_tokens"] = body["min_tokens"] - 1
    return request


def _without(body: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in names}
