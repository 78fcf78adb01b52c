"""structkv.hf in a session with memory of a GPU, that of the fake CUDA, and of the host's. PyTorch
has no such GPU, so the models' own tensors lie on the CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import structkv

torch = pytest.importorskip("torch")

import structkv.hf  # noqa: E402
from fake_cuda import LIBRARY, FakeCuda  # noqa: E402
from gpu_prompts import NEEDS_FAKE, cuda, gpu_client, gpu_server  # noqa: E402, F401: fixtures
from hf_models import cache_of, make_model, make_prompt, pad_left, steps  # noqa: E402
from structkv.hf.prompt import Prompt, _stream_of  # noqa: E402

TOKENS = 260


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


@NEEDS_FAKE
@pytest.mark.parametrize("method", ["structkv", "h2o", "gemfilter"])
def test_layers_go_by_cuda_ipc(cuda: FakeCuda, gpu_client: structkv.Client, method: Any) -> None:
    model, batch = make_model("llama"), pad_left([make_prompt(TOKENS), make_prompt(90, 1)])
    arena = structkv.Arena(structkv.Region(4 << 20, gpu=0, cuda_library=str(LIBRARY)))
    logits = []
    for transport, options in (
        ("inline", structkv.SessionOptions()),
        ("cuda_ipc", structkv.SessionOptions(staging=arena)),
    ):
        with structkv.hf.compress(model, gpu_client, method, options=options) as run:
            logits.append(steps(model, **batch))
        assert run.last is not None and run.last.failure is None
        assert {each.summary.transport for each in run.last.prompts} == {transport}
    assert torch.equal(*logits)
    assert arena.free_bytes == arena.region.size_bytes


def test_rows_come_back_by_shared_memory(client: structkv.Client, engine: structkv.Engine) -> None:
    model, batch = make_model("llama"), pad_left([make_prompt(TOKENS), make_prompt(90, 1)])
    arena = structkv.Arena(structkv.Region(16 << 20))
    shared = structkv.SessionOptions(staging=arena, results=arena)
    with structkv.hf.compress(model, engine, "fastkv") as run:
        wanted = cache_of(model(**batch, use_cache=True))
    with structkv.hf.compress(model, client, "fastkv", output="compact", options=shared) as run:
        got = cache_of(model(**batch, use_cache=True))
    assert run.last is not None
    assert {each.summary.transport for each in run.last.prompts} == {"shared_memory"}
    for left, right in zip(wanted.layers, got.layers):
        assert torch.equal(left.keys, right.keys) and torch.equal(left.values, right.values)


@NEEDS_FAKE
def test_what_a_gpu_holds_stays_there(cuda: FakeCuda, engine: structkv.Engine) -> None:
    """Where the session can take it; elsewhere it is copied to the host. A meta tensor is one that
    no copy to the host can be made of."""
    with structkv.hf.compress(make_model("llama"), engine) as run:
        open = run._setup.open
    arena = structkv.Arena(structkv.Region(2 << 20, gpu=0, cuda_library=str(LIBRARY)))
    elsewhere = torch.empty(2, 4, 8, device="meta").transpose(0, 1)
    for options in (
        structkv.SessionOptions(staging=arena, copy_from_gpu=True),
        structkv.SessionOptions(regions=[arena.region], copy_from_gpu=True),
        structkv.SessionOptions(results=arena, copy_from_gpu=True),
    ):
        prompt = Prompt(engine, open, 100, 0, options)
        dense = prompt._dense(elsewhere)
        assert dense.device.type == "meta" and dense.is_contiguous() and dense.shape == (4, 2, 8)
        prompt.cancel()
    prompt = Prompt(engine, open, 100, 0, structkv.SessionOptions())
    with pytest.raises(NotImplementedError, match="meta"):
        prompt._dense(elsewhere)
    prompt.cancel()


def test_the_stream_that_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Played tensors: that of the region's GPU is left to the service, another GPU's waited for."""
    waited: list[str] = []

    def stream(device: Any) -> Any:
        return SimpleNamespace(
            cuda_stream=70 + device.index, synchronize=lambda: waited.append(str(device))
        )

    monkeypatch.setattr(torch.cuda, "current_stream", stream)

    def on(device: str) -> Any:
        return SimpleNamespace(device=torch.device(device), is_cuda=device != "cpu")

    assert _stream_of(on("cuda:1"), {"cuda:1", "cpu"}) == 71 and waited == []
    assert _stream_of(on("cuda:0"), {"cuda:1"}) is None and waited == ["cuda:0"]
    assert _stream_of(on("cpu"), {"cuda:1"}) is None and waited == ["cuda:0"]
