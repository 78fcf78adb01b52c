"""A short run of the whole harness on the bundled model, and its answers against kvpress's own
pipeline.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from harness.accuracy import measure as measure_accuracy  # noqa: E402
from harness.fidelity import measure as measure_fidelity  # noqa: E402
from harness.generate import answer  # noqa: E402
from harness.methods import full, make_method  # noqa: E402
from harness.models import Loaded, load  # noqa: E402
from harness.report import FORMAT, SAME, write_report  # noqa: E402
from harness.tasks import make  # noqa: E402
from harness.texts import held_out_text, sentences  # noqa: E402


def loads(name: str) -> bool:
    try:
        import_module(name)
    except ImportError:
        return False
    return True


HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "data" / "tiny-llama"
TRAINED = HERE / "model"
SERVICE = loads("structkv.hf")
KVPRESS = loads("kvpress")
RUN = [
    "--tasks",
    "records",
    "--lengths",
    "260",
    "--depths",
    "2",
    "--samples",
    "1",
    "--budgets",
    "0.3",
    "--threads",
    "1",
]


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    torch.set_num_threads(1)
    return load(MODEL)


@pytest.fixture(scope="module")
def samples() -> list[Any]:
    hay = sentences(held_out_text())
    return [
        make("records", 600, seed, len, depth=0.3, hay="text", sentences=hay) for seed in range(8)
    ]


def run(out: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "run"), str(MODEL), "--out", str(out), *RUN, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return results


def test_smoke(tmp_path: Path) -> None:
    methods = ["structkv", "snapkv", "kvpress:snapkv", "kvpress:pyramidkv"]
    results = run(tmp_path, "--continuation", "8", "--methods", *methods)
    there = {"full"} | {
        name for name in methods if (KVPRESS if name.startswith("kvpress") else SERVICE)
    }
    assert set(results["environment"]["skipped"]) == set(methods) - there
    for part, count in (("accuracy", 4), ("perplexity", 1), ("fidelity", 2)):
        for method in there:
            assert sum(record["method"] == method for record in results[part]) == count, (
                part,
                method,
            )
    for record in results["fidelity"]:
        # With 30 % kept; at random 30 % of a set are an oracle's.
        full = record["method"] == "full"
        lowest = {"hidden": 0.5, "attention": 0.3, "overlap": 0.3}
        for kind, bound in lowest.items():
            assert len(record[kind]) == 12
            assert all((0.9999 if full else bound) <= each <= 1.0001 for each in record[kind]), (
                record["method"],
                kind,
                min(record[kind]),
            )
        share = 1.0 if full else 0.3
        assert record["kept_share"] == pytest.approx(share, abs=0.02), record["method"]
        # Keys and values of 2 heads of 32 in f32, 12 layers.
        entries = record["cache_bytes"] / (2 * 2 * 32 * 4 * 12)
        assert 0.9 * 260 * share < entries < 1.02 * 260 * share
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") >= 8 and not re.search(r"<(script|link|img|iframe)|url\(http", page)
    for method in methods:
        assert method in page
    assert ("Skipped" in page) == (len(there) < 5)


@pytest.mark.skipif(not SERVICE, reason="structkv is not installed")
def test_sets(tmp_path: Path) -> None:
    results = run(tmp_path, "--parts", "sets", "--methods", "structkv", "snapkv")
    by_method: dict[str, list[dict[str, Any]]] = {}
    for record in results["sets"]:
        by_method.setdefault(record["method"], []).append(record)
    assert list(by_method) == ["random", "oracle", "full", "structkv", "snapkv"]
    for records in by_method.values():
        assert [record["aware"] for record in records] == [True, False]
    for full in by_method["full"]:
        for measure in ("mass", "output", "answer"):
            assert full[measure] == pytest.approx([1] * 12, abs=1e-4)
        assert all(0 <= each <= 1.0001 for each in full["sought"])
        assert max(full["sought"]) > 0.2  # some head looks the answer up
    for method, records in by_method.items():
        for record, oracle in zip(records, by_method["oracle"]):
            pairs = list(zip(record["mass"], oracle["mass"]))
            # As many tokens have no more attention than the oracle's; sets for each head may.
            if method in ("random", "structkv"):
                assert all(mine <= best + 1e-4 for mine, best in pairs)
            assert method != "random" or all(0.05 < mine < 0.9 for mine, _ in pairs), pairs
    assert "Sets by layer" in (tmp_path / "report.html").read_text()


def test_the_full_cache_answers(tiny: Loaded, samples: list[Any]) -> None:
    records = list(measure_accuracy(tiny, samples, [full()], [True, False]))
    assert (
        sum(record["score"] for record in records) / len(records) >= 0.6
    )  # a guess is right once in 36


@pytest.mark.skipif(not SERVICE, reason="structkv is not installed")
def test_the_trained_model_answers_on_a_tenth_of_its_cache() -> None:
    import structkv

    torch.set_num_threads(1)
    trained = load(TRAINED)
    prompts = [make("multi_key", 1024, 900 + seed, trained.count) for seed in range(6)]
    with structkv.Engine(log_sessions=False, threads=1) as engine:
        methods = [full()] + [make_method(n, 0.1, engine) for n in ("structkv", "streaming_llm")]
        records = list(measure_accuracy(trained, prompts, methods, [True]))
    right = {
        method.name: sum(r["score"] for r in records if r["method"] == method.name)
        for method in methods
    }
    # A guess among the values of a prompt is right once in eight.
    assert right["full"] >= 5 and right["structkv"] >= right["full"] - 1, right
    assert right["streaming_llm"] < right["structkv"], right


@pytest.mark.parametrize("name", SAME)
def test_results_of_other_models_and_prompts_are_not_mixed(tmp_path: Path, name: str) -> None:
    for label, value in (("a", "one"), ("b", "two")):
        results = {
            "format": FORMAT,
            "environment": {**dict.fromkeys(SAME, "same"), name: value},
        }
        (tmp_path / f"{label}.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=f"results of {name} one, two; one is expected"):
        write_report(tmp_path)


def test_results_of_other_versions_are_left_out_in_sight(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps({"environment": {}, "accuracy": [{"task": "a"}]}))
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"old.json: format None; 1 is expected.*other.json"):
        write_report(tmp_path)
    results = run(tmp_path, "--methods", "full", "--parts", "accuracy")
    assert results["format"] == FORMAT
    page = (tmp_path / "report.html").read_text()
    assert "Left out: old.json (format None; 1 is expected: of another version); other.json" in page


def test_results_stay_where_a_later_part_fails(tmp_path: Path) -> None:
    flags = ["--methods", "full", "--parts", "accuracy", "perplexity", "--continuation", "999999"]
    command = [sys.executable, str(HERE / "run"), str(MODEL), "--out", str(tmp_path), *RUN, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "1000259 are expected" in done.stderr
    assert len(json.loads((tmp_path / "results.json").read_text())["accuracy"]) == 4


@pytest.mark.skipif(not SERVICE, reason="structkv is not installed")
def test_everything_kept_is_the_full_cache(tiny: Loaded, samples: list[Any]) -> None:
    import structkv

    with structkv.Engine(log_sessions=False, threads=1) as engine:
        method = make_method("structkv:skeleton=1.0", 1.0, engine)
        for record in measure_fidelity(tiny, samples[:2], [method], [True, False]):
            assert record["overlap"] == [1.0] * 12
            assert min(record["hidden"]) > 0.9999 and min(record["attention"]) > 0.9999
        with pytest.raises(structkv.Error):
            with make_method("structkv", 7.0, engine).prefill(
                tiny, torch.zeros(1, 64, dtype=torch.long)
            ):
                pass


@pytest.mark.skipif(not SERVICE, reason="structkv is not installed")
def test_an_exact_pivot_cuts_and_the_skeleton_holds_the_budget(
    tiny: Loaded, samples: list[Any]
) -> None:
    import structkv

    prompt = torch.tensor([tiny.tokenizer.encode(samples[0].context)])
    with structkv.Engine(log_sessions=False, threads=1) as engine:
        for name in ("structkv:pivot=exact", "structkv:pivot=4", "fastkv"):
            with make_method(name, 0.4, engine).prefill(tiny, prompt) as prefilled:
                assert prefilled.pivot_layer is not None
                assert prefilled.cut_layer == prefilled.pivot_layer + 1
                assert prefilled.kept_share == pytest.approx(0.4, abs=0.005)
        with make_method("structkv:pivot=4,skeleton=0.2", 0.4, engine).prefill(
            tiny, prompt
        ) as prefilled:
            assert prefilled.kept_share == pytest.approx((5 * 0.4 + 7 * 0.2) / 12, abs=0.005)


@pytest.mark.skipif(not KVPRESS, reason="kvpress is not installed")
def test_a_press_with_another_window(tiny: Loaded, samples: list[Any]) -> None:
    prompt = torch.tensor([tiny.tokenizer.encode(samples[0].context)])
    whole, small = (
        make_method(name, 0.1, None) for name in ("kvpress:snapkv", "kvpress:snapkv:window_size=8")
    )
    assert whole.window == 64 and not whole.fits(600)
    assert small.window == 8 and small.fits(600)
    with small.prefill(tiny, prompt) as prefilled:
        assert prefilled.kept_share == pytest.approx(0.1, abs=0.005)


@pytest.mark.skipif(not KVPRESS, reason="kvpress is not installed")
@pytest.mark.parametrize(
    "name", ["snapkv", "pyramidkv", "streaming_llm", "tova", "knorm", "expected_attention"]
)
def test_kvpress_answers_as_in_its_own_pipeline(
    tiny: Loaded, samples: list[Any], name: str
) -> None:
    import kvpress

    from harness.methods import PRESSES

    class Pipeline(kvpress.KVPressTextGenerationPipeline):  # type: ignore[misc]
        def __init__(self, tokenizer: Any) -> None:
            self.model, self.tokenizer = tiny.model, tokenizer

    class Tokenizer:
        def decode(self, tokens: Any, skip_special_tokens: bool) -> str:
            return tiny.tokenizer.decode(tokens.tolist())

    pipeline, method = Pipeline(Tokenizer()), make_method(f"kvpress:{name}", 0.4, None)
    for sample in samples[:4]:
        # One token, which needs no mask: layers may keep different numbers.
        prompt = torch.tensor([tiny.tokenizer.encode(sample.context)])
        question = torch.tensor([tiny.tokenizer.encode("~")])
        with torch.inference_mode():
            (theirs,) = pipeline._forward(
                {"context_ids": prompt, "questions_ids": [question]},
                max_new_tokens=6,
                press=getattr(kvpress, PRESSES[name])(compression_ratio=0.6),
            )
        with method.prefill(tiny, prompt) as prefilled:
            ours = tiny.tokenizer.decode(answer(tiny, prefilled, question, 6))
        assert ours == theirs
