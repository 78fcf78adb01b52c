"""structkv.hf against plain models and a reference; skipped where torch or transformers is missing
(python_test.sh)."""

from __future__ import annotations

from typing import Any

import pytest
import structkv

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import structkv.hf  # noqa: E402
from hf_models import (  # noqa: E402
    LAYERS,
    MODELS,
    cache_of,
    make_model,
    make_prompt,
    pad_left,
    reference,
    steps,
    with_cache,
)

TOKENS = 260
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("implementation", structkv.hf.attention.IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_all_kept_is_the_plain_model(
    engine: structkv.Engine, name: str, implementation: str
) -> None:
    model, prompt = make_model(name, implementation), make_prompt(TOKENS)
    plain = steps(model, input_ids=prompt)
    with structkv.hf.compress(model, engine, kv_budget=1.0, skeleton=1.0, pivot=3) as run:
        torch.testing.assert_close(steps(model, input_ids=prompt), plain, **CLOSE)
    assert run.last is not None and run.last.cut_layer == 4 and run.last.compute_saved == 0
    assert run.last.cache_bytes == run.last.full_cache_bytes
    assert torch.equal(steps(model, input_ids=prompt), plain)


@pytest.mark.parametrize("implementation", structkv.hf.attention.IMPLEMENTATIONS)
def test_nothing_is_left_of_it(engine: structkv.Engine, implementation: str) -> None:
    model = make_model("llama", implementation)

    def hooks() -> int:
        return sum(
            len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules()
        )

    class Stop(BaseException):
        pass

    for error in (None, RuntimeError, Stop):
        try:
            with structkv.hf.compress(model, engine):
                model(make_prompt(TOKENS), use_cache=True)
                assert hooks() == 2 + LAYERS
                assert model.config._attn_implementation == f"structkv_{implementation}"
                if error is not None:
                    raise error
        except (RuntimeError, Stop) as raised:
            assert type(raised) is error
        assert hooks() == 0
        for each in model.modules():
            if hasattr(each, "config"):
                assert each.config._attn_implementation == implementation


def test_one_prompt_goes_on_behind_the_context(engine: structkv.Engine) -> None:
    """As docs/huggingface.md says; layers that differ in length do not."""
    model, prompt, token = make_model("llama"), make_prompt(TOKENS), make_prompt(1, 7)
    methods: list[Any] = ["structkv", "snapkv"]
    for method in methods:
        got = []
        for inside in (True, False):
            with structkv.hf.compress(model, engine, method) as run:
                cache = cache_of(model(prompt, use_cache=True))
                if inside:
                    got.append(model(token, **with_cache(cache)).logits)
            if not inside:
                got.append(model(token, **with_cache(cache)).logits)
            assert run.last is not None and run.last.cache_bytes < run.last.full_cache_bytes
        torch.testing.assert_close(got[0], got[1], **CLOSE)


@pytest.mark.parametrize("method", ["structkv", "fastkv"])
@pytest.mark.parametrize("name", MODELS)
def test_the_reference(engine: structkv.Engine, name: str, method: Any) -> None:
    model, prompt = make_model(name), make_prompt(TOKENS)
    with structkv.hf.compress(model, engine, method, kv_budget=0.1, skeleton=0.2, pivot=4) as run:
        got = steps(model, input_ids=prompt)
    plain = make_model(name, "eager")
    wanted = reference(plain, prompt, 4, method == "fastkv")
    assert run.last is not None
    (row,) = run.last.prompts
    assert row.skeleton is not None and torch.equal(row.skeleton.long(), wanted.skeleton)
    for kept, positions in zip(row.kept, wanted.kept):
        assert torch.equal(kept.long(), positions)
    assert run.last.pivot_layer == 4 and run.last.cut_layer == 5
    torch.testing.assert_close(got[0], wanted.logits, **CLOSE)
    tokens = got.argmax(-1)[:-1, 0]
    torch.testing.assert_close(got[1:, 0], wanted.decode(plain, TOKENS, tokens), **CLOSE)


@pytest.mark.parametrize("method", ["snapkv", "pyramidkv", "h2o", "streaming_llm", "full"])
def test_methods_without_a_skeleton(engine: structkv.Engine, method: Any) -> None:
    model, prompt = make_model("llama"), make_prompt(TOKENS)
    with structkv.hf.compress(model, engine, method) as run:
        got = steps(model, input_ids=prompt)
    assert run.last is not None and run.last.cut_layer is None and run.last.pivot_layer is None
    cache = cache_of(model(prompt, use_cache=True))
    for kept, layer in zip(run.last.prompts[0].kept, cache.layers):
        index = kept.long().expand(2, -1)[None, ..., None].expand(-1, -1, -1, 32)
        layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
    for place, token in enumerate(got.argmax(-1)[:-1, 0]):
        position = torch.tensor([[TOKENS + place]])
        out = model(token.view(1, 1), **with_cache(cache), position_ids=position)
        torch.testing.assert_close(got[place + 1], out.logits[:, -1], **CLOSE)


def test_h2o_sums_all_queries(engine: structkv.Engine) -> None:
    model, prompt = make_model("qwen3", "eager"), make_prompt(TOKENS)
    with structkv.hf.compress(model, engine, "h2o") as run:
        model(prompt, use_cache=True)
    weights = model(prompt, output_attentions=True).attentions
    assert run.last is not None and len(weights) == LAYERS
    for kept, layer in zip(run.last.prompts[0].kept, weights):
        sums = layer[0].sum(1).unflatten(0, (2, 3)).sum(1)  # [kv_heads, tokens]
        heavy = sums[:, : TOKENS - 13].topk(13).indices.sort(-1).values
        assert torch.equal(kept[:, :13].long(), heavy)
        assert torch.equal(kept[:, 13:].long(), torch.arange(TOKENS - 13, TOKENS).expand(2, -1))


def test_gemfilter_prefills_again(engine: structkv.Engine) -> None:
    model, prompt = make_model("qwen2"), make_prompt(TOKENS)
    with structkv.hf.compress(model, engine, "gemfilter", pivot=2) as run:
        got = steps(model, input_ids=prompt)
    assert run.last is not None and run.last.cut_layer == 3
    chosen = run.last.prompts[0].skeleton
    assert (
        chosen is not None and len(chosen) == 26 and run.last.prompts[0].kept_tokens == (26,) * 8
    )
    torch.testing.assert_close(got, steps(model, input_ids=prompt[:, chosen.long()]), **CLOSE)
    assert run.last.compute_saved == pytest.approx(1 - (3 + 8 * 0.1) / 8)


def test_rows_that_come_back_are_those_that_are_gathered(
    client: structkv.Client, engine: structkv.Engine
) -> None:
    """Of a server and of the engine, with the output COMPACT and PLAN."""
    model, batch = make_model("llama"), pad_left([make_prompt(TOKENS), make_prompt(90, 1)])
    caches = []
    for service, output in ((engine, "plan"), (engine, "compact"), (client, "compact")):
        with structkv.hf.compress(model, service, "fastkv", output=output) as run:  # type: ignore
            caches.append(cache_of(model(**batch, use_cache=True)))
        assert run.last is not None and run.last.failure is None
    for cache in caches[1:]:
        for left, right in zip(caches[0].layers, cache.layers):
            assert torch.equal(left.keys, right.keys) and torch.equal(left.values, right.values)
            assert left.kept == right.kept == (26, 9)


@pytest.mark.parametrize(
    "method, pivot",
    [("structkv", 3), ("fastkv", 3), ("gemfilter", 2), ("pyramidkv", None), ("h2o", None)],
)
@pytest.mark.parametrize("name", ["llama", "ministral3"])
@pytest.mark.parametrize("implementation", structkv.hf.attention.IMPLEMENTATIONS)
def test_a_padded_batch_is_its_prompts(
    engine: structkv.Engine, method: Any, pivot: Any, name: str, implementation: str
) -> None:
    model = make_model(name, implementation)
    prompts = [make_prompt(tokens, tokens) for tokens in (120, TOKENS, 41)]
    with structkv.hf.compress(model, engine, method, pivot=pivot) as run:
        together = steps(model, **pad_left(prompts))
        reports = run.last.prompts if run.last is not None else ()
        for row, prompt in enumerate(prompts):
            alone = steps(model, input_ids=prompt)
            torch.testing.assert_close(together[:, row], alone[:, 0], **CLOSE)
            assert run.last is not None
            for left, right in zip(reports[row].kept, run.last.prompts[0].kept):
                assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(engine: structkv.Engine, dtype: Any) -> None:
    model, prompt = make_model("mistral").to(dtype), make_prompt(TOKENS)
    with structkv.hf.compress(model, engine, kv_budget=0.1, skeleton=0.2, output="compact") as run:
        cache = cache_of(model(prompt, use_cache=True))
    assert run.last is not None
    full = cache_of(model(prompt, use_cache=True)).layers
    for kept, layer, whole in zip(run.last.prompts[0].kept, cache.layers, full):
        assert layer.keys.dtype == dtype and layer.keys.shape == (1, 2, 26, 32)
        if layer is cache.layers[0]:  # later ones differ where the attention takes another kernel
            assert torch.equal(layer.keys, whole.keys[:, :, kept.long()])


def test_a_pivot_that_is_found_cuts_the_prefill(engine: structkv.Engine) -> None:
    model, prompt = make_model("qwen3_moe"), make_prompt(TOKENS)
    rows = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    with structkv.hf.compress(model, engine) as run:
        out = model(prompt, use_cache=True)
    assert run.last is not None and run.last.prompts[0].pivot is not None
    pivot = run.last.prompts[0].pivot
    assert pivot.mode == "online" and run.last.cut_layer == pivot.skeleton_from_layer
    cut = run.last.cut_layer
    assert cut is not None and cut < LAYERS and out.logits.shape[1] == 52
    assert rows == [TOKENS] * cut + [52] * (LAYERS - cut)
    assert run.last.compute_saved == pytest.approx(0.8 * (LAYERS - cut) / LAYERS)
    entry = 2 * 2 * 32 * 4 * LAYERS  # keys and values of 2 heads of 32 in f32
    assert run.last.cache_bytes == 26 * entry and run.last.full_cache_bytes == TOKENS * entry
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache_of(out).layers)
    assert held == run.last.cache_bytes
    seconds = run.last.seconds
    assert 0 < seconds.open + seconds.send + seconds.wait + seconds.compact < seconds.total


def test_a_batch_is_cut_after_the_last_of_its_pivots(engine: structkv.Engine) -> None:
    model = make_model("llama")
    batch = pad_left([make_prompt(tokens, tokens) for tokens in (120, 200, 90)])
    with structkv.hf.compress(model, engine) as run:
        steps(model, **batch)
    assert run.last is not None
    first = [
        row.pivot.skeleton_from_layer
        for row in run.last.prompts
        if row.pivot is not None and row.pivot.skeleton_from_layer is not None
    ]
    assert len(first) == 3 and len(set(first)) > 1  # they are found in different layers
    assert run.last.cut_layer == max(first)
    assert [row.kept_tokens[0] for row in run.last.prompts] == [12, 20, 9]


def test_a_text_behind_the_prompt(engine: structkv.Engine) -> None:
    model, batch = make_model("llama"), pad_left([make_prompt(120), make_prompt(TOKENS, 1)])
    more = torch.cat([make_prompt(5, 2), make_prompt(5, 3)])
    with structkv.hf.compress(model, engine, "pyramidkv", continuation=True):
        at_once = model(**batch, use_cache=True)
        mask = batch["attention_mask"]
        positions = mask.sum(1)[:, None] + torch.arange(5)[None]
        whole = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
        got = model(
            more, **with_cache(cache_of(at_once)), attention_mask=whole, position_ids=positions
        ).logits
        cache = cache_of(model(**batch, use_cache=True))
        for place in range(5):
            now = slice(place, place + 1)
            one = model(
                more[:, now],
                **with_cache(cache),
                attention_mask=whole[:, : TOKENS + place + 1],
                position_ids=positions[:, now],
            )
            torch.testing.assert_close(got[:, now], one.logits, **CLOSE)
        assert cache.get_seq_length() == TOKENS + 5
        cache.crop(-5)
        again = model(
            more, **with_cache(cache), attention_mask=whole, position_ids=positions
        ).logits
        torch.testing.assert_close(again, got, **CLOSE)


def test_beams(engine: structkv.Engine) -> None:
    model, batch = make_model("llama"), pad_left([make_prompt(120), make_prompt(TOKENS, 1)])
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    plain = model.generate(**batch, **options)
    with structkv.hf.compress(model, engine, kv_budget=1.0, skeleton=1.0):
        assert torch.equal(model.generate(**batch, **options), plain)
