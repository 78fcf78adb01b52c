"""`tests/quality/run`."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import accuracy, datasets, fidelity, perplexity, sets
from .methods import PRESSES, Method, full, make_method
from .models import Loaded, load
from .report import FORMAT, read_results, write_report
from .tasks import DEPTHS, HAYSTACKS, TASKS, Sample, make
from .texts import held_out_text, sentences

PARTS = ("accuracy", "perplexity", "fidelity", "sets")
SERVICE = ("structkv", "fastkv", "snapkv", "pyramidkv", "gemfilter", "h2o", "streaming_llm")
KVPRESS = tuple(f"kvpress:{press}" for press in PRESSES)
# The paper's: lambda; a skeleton as small as the budget, a larger one, and none; other pivots.
ABLATION_BUDGET = 0.1
ABLATIONS = (
    *(f"structkv:decay={decay}" for decay in (0.5, 0.8, 0.95, 1.0)),
    *(f"structkv:skeleton={share}" for share in (0.1, 0.4, 1.0)),
    *(f"structkv:pivot={mode}" for mode in ("exact", "half")),
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run", description=__doc__)
    parser.add_argument("model", type=Path, help="folder of a Hugging Face model")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for results and report.html; holds those of earlier runs",
    )
    parser.add_argument("--label", default="results", help="the results' name in it: LABEL.json")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=[part for part in PARTS if part != "sets"]
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[*SERVICE, *KVPRESS],
        help="NAME[:FIELD=VALUE,...], kvpress:NAME[:FIELD=VALUE,...]",
    )
    parser.add_argument(
        "--ablations",
        action="store_true",
        help="structkv with other parameters too, at 10 %%",
    )
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    parser.add_argument(
        "--tasks", nargs="*", choices=TASKS, default=[task for task in TASKS if task != "records"]
    )
    parser.add_argument(
        "--dataset", type=Path, help="folder of prompts in kvpress's or LongBench's form"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 2048], help="tokens of a prompt"
    )
    parser.add_argument(
        "--depths", type=int, default=5, help="places of a needle, from the start to the end"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=4,
        help="for each task, length and depth (five times that, without depths)",
    )
    parser.add_argument("--hay", choices=HAYSTACKS, default="noise")
    parser.add_argument(
        "--questions", nargs="+", choices=("aware", "agnostic"), default=["aware", "agnostic"]
    )
    parser.add_argument(
        "--continuation", type=int, default=64, help="tokens whose perplexity is taken"
    )
    parser.add_argument("--text", type=Path, help="for perplexity and haystacks (docs/protocol.md)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first sample; trainings use others"
    )
    parser.add_argument("--server", help="target of a structkv-server (an engine in this process)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, help="of PyTorch and of the engine")
    return parser.parse_args()


def connect(target: str | None, threads: int | None) -> Any:
    """A client of the service; None without the package, whose methods are then left out. An engine
    of this process has as many threads as PyTorch is given.
    """
    try:
        import structkv
    except ImportError:
        return None
    if target:
        return structkv.Client(target)
    return structkv.Engine(log_sessions=False, **({"threads": threads} if threads else {}))


def choose(
    flags: argparse.Namespace, layers: int, client: Any
) -> tuple[list[Method], dict[str, str]]:
    """The full cache and all methods at all budgets; and why others are left out."""
    methods, skipped = [full()], dict[str, str]()
    wanted = [
        (name, budget) for budget in flags.budgets for name in flags.methods if name != "full"
    ]
    if flags.ablations:
        wanted += [(name.replace("half", str(layers // 2)), ABLATION_BUDGET) for name in ABLATIONS]
    for name, budget in wanted:
        try:
            methods.append(make_method(name, budget, client))
        except ImportError as error:
            skipped[name] = str(error)
    return methods, skipped


def too_short(methods: list[Method], lengths: set[int]) -> dict[str, str]:
    """What is not measured because a method's window fills its budget."""
    return {
        f"{method.name} at {method.budget:.0%}": f"its window of {method.window} tokens fills the"
        f" budget of prompts of up to {max(short)}"
        for method in methods
        if (short := [tokens for tokens in lengths if not method.fits(tokens)])
    }


def make_samples(flags: argparse.Namespace, loaded: Loaded, text: str) -> list[Sample]:
    samples = list[Sample]()
    hay = sentences(text)
    for task in flags.tasks:
        for length in flags.lengths:
            places = (
                [i / max(1, flags.depths - 1) for i in range(flags.depths)]
                if task in DEPTHS
                else [None] * flags.depths
            )
            for number in range(flags.samples * len(places)):
                depth = places[number % len(places)]
                # Records need text around them, which their model was trained on.
                kind = "text" if task == "records" else flags.hay
                samples.append(
                    make(task, length, flags.seed + number, loaded.count, depth, kind, hay)
                )
    if flags.dataset:
        samples += datasets.read(
            flags.dataset, loaded, max(flags.lengths), flags.samples * flags.depths
        )
    return samples


def spread(samples: list[Sample], count: int, depths: int) -> list[Sample]:
    """`count` of a task's samples, which come depth after depth: over all depths, the middle one if
    it is one.
    """
    places = [i * depths + (2 * i + 1) * depths // (2 * count) for i in range(count)]
    return [samples[place] for place in places]


def weights_hash(folder: Path) -> str:
    """Of the model's files of weights."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def environment(
    flags: argparse.Namespace, loaded: Loaded, text: str, skipped: dict[str, str]
) -> dict[str, Any]:
    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "label": flags.label,
        "model": loaded.name,
        "weights": weights_hash(flags.model),
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "layers": loaded.model.config.num_hidden_layers,
        "dtype": flags.dtype,
        "device": flags.device,
        "seed": flags.seed,
        "hay": flags.hay,
        "text": hashlib.sha256(text.encode()).hexdigest()[:16],
        "continuation": flags.continuation,
        "command": " ".join(sys.argv[1:]),
        "versions": {
            name: installed(name) for name in ("structkv", "kvpress", "transformers", "torch")
        },
        "skipped": skipped,
    }


def measure(
    part: str,
    flags: argparse.Namespace,
    loaded: Loaded,
    text: str,
    samples: list[Sample],
    methods: list[Method],
) -> Iterator[dict[str, Any]]:
    """The records of one of PARTS."""
    awareness = [side == "aware" for side in flags.questions]
    if part == "accuracy":
        yield from accuracy.measure(loaded, samples, methods, awareness)
    elif part == "perplexity":
        for length in flags.lengths:
            yield from perplexity.measure(
                loaded, text, length, flags.continuation, flags.samples, methods
            )
    else:
        longest = [sample for sample in samples if sample.tokens == max(flags.lengths)]
        few = [
            sample
            for task in flags.tasks
            for sample in spread(
                [s for s in longest if s.task == task], flags.samples, flags.depths
            )
        ]
        per_layer = fidelity if part == "fidelity" else sets
        yield from per_layer.measure(loaded, few, methods, awareness)


def shown(records: Iterator[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """The records, with a line now and then of how many there are."""
    result, last = list[dict[str, Any]](), time.monotonic()
    for record in records:
        result.append(record)
        if time.monotonic() - last > 20:
            last = time.monotonic()
            print(f"run: {what}: {len(result)} measured", flush=True)
    return result


def main() -> None:
    flags = parse()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    loaded = load(flags.model, flags.device, flags.dtype)
    text = flags.text.read_text() if flags.text else held_out_text()
    client = connect(flags.server, flags.threads)
    methods, skipped = choose(flags, loaded.model.config.num_hidden_layers, client)
    samples = make_samples(flags, loaded, text)
    skipped |= too_short(methods, {sample.tokens for sample in samples} | set(flags.lengths))
    for name, why in skipped.items():
        print(f"run: skipped: {name}: {why}", flush=True)
    results: dict[str, Any] = {
        "format": FORMAT,
        "environment": environment(flags, loaded, text, skipped),
    }
    flags.out.mkdir(parents=True, exist_ok=True)
    for part in flags.parts:
        results[part] = shown(measure(part, flags, loaded, text, samples, methods), part)
        # What was measured stays where a later part fails.
        (flags.out / f"{flags.label}.new").write_text(json.dumps(results))
        (flags.out / f"{flags.label}.new").replace(flags.out / f"{flags.label}.json")
    for name, why in read_results(flags.out)[1].items():
        print(f"run: left out of the report: {name}: {why}", flush=True)
    page = write_report(flags.out)
    print(f"run: {page}", flush=True)
