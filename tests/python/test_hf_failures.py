"""What structkv.hf refuses, and what it does when the service fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import structkv

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import structkv.hf  # noqa: E402
from hf_models import (  # noqa: E402
    cache_of,
    make_model,
    make_prompt,
    pad_left,
    steps,
    with_cache,
)

TOKENS = 150


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


class Failing:
    """A service whose sessions fail at one call: "open", "commit", or a layer that is sent."""

    def __init__(self, engine: structkv.Engine, at: Any) -> None:
        self._engine, self._at = engine, at
        self.sessions: list[structkv.Session] = []
        self.interrupts_after: int | None = None

    def open_prompt(self, open: Any, options: Any) -> Any:
        if self._at == "open":
            raise structkv.Unavailable("gone", None)
        if len(self.sessions) == self.interrupts_after:
            raise KeyboardInterrupt
        session = self._engine.open_prompt(open, options)
        self.sessions.append(session)
        return Faulty(session, self._at)


class Faulty:
    def __init__(self, session: structkv.Session, at: Any) -> None:
        self._session, self._at = session, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def send_layer(self, layer: int, tensors: Any) -> None:
        if layer == self._at:
            raise structkv.Unavailable("gone", None)
        self._session.send_layer(layer, tensors)

    def commit(self) -> None:
        if self._at == "commit":
            raise structkv.Unavailable("gone", None)
        self._session.commit()


@pytest.mark.parametrize(
    "method, at", [("structkv", "open"), ("structkv", 2), ("snapkv", "commit")]
)
def test_a_service_that_fails_before_the_cut(
    engine: structkv.Engine, method: Any, at: Any
) -> None:
    model, batch = make_model("llama"), pad_left([make_prompt(TOKENS), make_prompt(60, 1)])
    plain = steps(model, **batch)
    service: Any = Failing(engine, at)
    with structkv.hf.compress(model, service, method) as run:
        with pytest.warns(UserWarning, match="full cache: .*gone"):
            torch.testing.assert_close(steps(model, **batch), plain, rtol=1e-4, atol=1e-4)
    assert run.last is not None and isinstance(run.last.failure, structkv.Unavailable)
    assert run.last.prompts == () and run.last.cache_bytes == run.last.full_cache_bytes
    for session in service.sessions:
        with pytest.raises(structkv.Cancelled):
            session.next_event()


@pytest.mark.parametrize("at", ["open", 2, "commit"])
def test_a_failure_that_is_to_be_raised(engine: structkv.Engine, at: Any) -> None:
    model, service = make_model("llama"), Failing(engine, at)
    with structkv.hf.compress(model, service, "snapkv", on_failure="raise") as run:  # type: ignore
        with pytest.raises(structkv.Unavailable, match="gone"):
            model(make_prompt(TOKENS), use_cache=True)
    assert run.last is None


@pytest.mark.parametrize("at", [6, "commit"])
def test_a_service_that_fails_after_the_cut(engine: structkv.Engine, at: Any) -> None:
    model, service = make_model("llama"), Failing(engine, at)
    with structkv.hf.compress(model, service, pivot=3) as run:  # type: ignore[arg-type]
        with pytest.raises(structkv.Unavailable, match="gone"):
            model(make_prompt(TOKENS), use_cache=True)
    assert run.last is None


def test_no_server() -> None:
    options = structkv.SessionOptions(retry=structkv.RetryPolicy(max_attempts=1))
    model, prompt = make_model("llama"), make_prompt(TOKENS)
    client = structkv.Client("unix:/nowhere/at/all")
    with structkv.hf.compress(model, client, options=options):
        with pytest.warns(UserWarning, match="UNAVAILABLE"):
            got = steps(model, input_ids=prompt)
    assert torch.equal(got, steps(model, input_ids=prompt))


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_model_that_fails_leaves_no_session(
    engine: structkv.Engine, kind: Any, goes_on: bool
) -> None:
    free = engine.get_capabilities().limits
    model, service = make_model("llama"), Failing(engine, None)

    def fail(*_: Any) -> None:
        raise kind("out of memory")

    hook = model.model.layers[5].mlp.register_forward_hook(fail)
    with structkv.hf.compress(model, service, "snapkv") as run:  # type: ignore[arg-type]
        with pytest.raises(kind, match="out of memory"):
            model(make_prompt(TOKENS), use_cache=True)
        hook.remove()
        if goes_on:
            plain = model(make_prompt(TOKENS), use_cache=False).logits  # not taken for the prefill
            assert plain.shape[1] == TOKENS
        assert run.last is None
    (session,) = service.sessions
    with pytest.raises(structkv.Cancelled):
        while True:
            session.next_event()
    _wait_until_free(engine, free)


def test_an_interrupt_while_rows_are_opened(engine: structkv.Engine) -> None:
    free = engine.get_capabilities().limits
    service: Any = Failing(engine, None)
    service.interrupts_after = 1
    batch = pad_left([make_prompt(TOKENS), make_prompt(60, 1)])
    with structkv.hf.compress(make_model("llama"), service) as run:
        with pytest.raises(KeyboardInterrupt):
            run._model(**batch, use_cache=True)
        (session,) = service.sessions
        with pytest.raises(structkv.Cancelled):
            session.next_event()
    _wait_until_free(engine, free)


def _wait_until_free(engine: structkv.Engine, free: Any) -> None:
    assert free is not None
    end = time.monotonic() + 10
    while (now := engine.get_capabilities().limits) is not None:
        if now.memory_available_bytes == free.memory_available_bytes:
            break
        assert time.monotonic() < end, (now, free)
        time.sleep(0.02)


def test_what_is_asked_for_wrongly_is_raised(engine: structkv.Engine) -> None:
    model = make_model("llama")
    with structkv.hf.compress(model, engine, kv_budget=1.5):
        with pytest.raises(structkv.InvalidArgument, match="ratio"):
            model(make_prompt(TOKENS), use_cache=True)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "best"}, "'best'; one of structkv, snapkv"),
        ({"method": "full", "kv_budget": 0.1}, "keeps everything"),
        ({"method": "snapkv", "skeleton": 0.2}, "'snapkv' has none"),
        ({"method": "snapkv", "pivot": 3}, "'snapkv' has none"),
        ({"method": "fastkv", "pivot": "online"}, "takes a layer"),
        ({"method": "gemfilter", "pivot": 7}, "at most 6 is allowed"),
        ({"pivot": "sometimes"}, "'online', 'profiled', 'exact'"),
        ({"method": structkv.FullMethod(), "kv_budget": 0.1}, "kv_budget: the method came as"),
        ({"on_failure": "ignore"}, "'full' or 'raise'"),
        ({"output": "hold"}, "'plan' or 'compact'"),
    ]
    for arguments, text in cases:
        with pytest.raises(ValueError, match=text):
            structkv.hf.compress(model, engine, **arguments)
    with pytest.raises(TypeError, match="window"):
        structkv.hf.compress(model, engine, window=3)
    small = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=1, vocab_size=50)
    with pytest.raises(TypeError, match="of the type 'gpt2'"):
        structkv.hf.compress(transformers.GPT2LMHeadModel(small), engine)
    flexible = make_model("llama", "flex_attention")
    with pytest.raises(ValueError, match="'flex_attention'; one of sdpa, eager"):
        with structkv.hf.compress(flexible, engine):
            pass


def test_forwards_that_are_refused(engine: structkv.Engine) -> None:
    model, prompt = make_model("ministral", sliding_window=200), make_prompt(TOKENS)
    before = cache_of(model(prompt, use_cache=True))
    right = torch.ones(1, TOKENS, dtype=torch.long)
    right[0, -1] = 0

    def generate(**options: Any) -> Callable[[], Any]:
        return lambda: model.generate(prompt, max_new_tokens=100, do_sample=False, **options)

    cases: list[tuple[Callable[[], Any], str]] = [
        (generate(prefill_chunk_size=64), "prefill in chunks"),
        (generate(cache_implementation="static"), "StaticCache; a DynamicCache"),
        (generate(), "at most 200, the sliding window"),
        (lambda: model(make_prompt(201), use_cache=True), "201 tokens; at most 200"),
        (lambda: model(prompt, attention_mask=right), "on the left alone"),
        (lambda: model(prompt, attention_mask=right[None, None]), r"\[batch, tokens\]"),
        (
            lambda: model(prompt[:, :5], **with_cache(before)),
            "150 tokens that were not compressed here",
        ),
    ]
    with structkv.hf.compress(model, engine):
        for call, text in cases:
            with pytest.raises(ValueError, match=text):
                call()
        out = model(
            prompt[:, :1], **with_cache(before)
        )  # an ordinary cache is gone on with as ever
        assert cache_of(out).get_seq_length() == TOKENS + 1
        assert model(prompt, use_cache=False).logits.shape[1] == TOKENS
