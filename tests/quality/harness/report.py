"""One self-contained HTML page of all results in a folder."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import jinja2

from . import plots

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of each is its name."""

    title: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    """A title, what it shows, tables and figures (SVG)."""

    title: str
    text: str
    tables: list[Table]
    figures: list[str]


def side(aware: bool) -> str:
    return "question inside the window" if aware else "question after compression"


def groups(records: Records, *names: str) -> dict[tuple[Any, ...], Records]:
    """Records by the values of these fields, in the order in which they came."""
    result: dict[tuple[Any, ...], Records] = defaultdict(list)
    for record in records:
        result[tuple(record[name] for name in names)].append(record)
    return result


SIZES = ("kept", "cache, bytes")


def sizes(records: Records) -> list[str]:
    """What the caches came to, mean over the records: share of the prompt, and bytes."""
    share, size = (mean(r[name] for r in records) for name in ("kept_share", "cache_bytes"))
    return [f"{share:.1%}", f"{size:,.0f}"]


def method_rows(
    records: Records, column: str, cell: Callable[[Records], str]
) -> tuple[list[str], list[list[str]]]:
    """A table of methods and budgets over the values of `column`."""
    columns = list(dict.fromkeys(record[column] for record in records))
    rows = []
    for (method, budget), part in groups(records, "method", "budget").items():
        by_column = groups(part, column)
        cells = [cell(by_column[(value,)]) if (value,) in by_column else "–" for value in columns]
        rows.append([method, f"{budget:.0%}", *sizes(part), *cells, cell(part)])
    return ["method", "budget", *SIZES, *map(str, columns), "all"], rows


def score(records: Records) -> str:
    return f"{mean(record['score'] for record in records):.1%}"


def accuracy_section(records: Records) -> Section:
    tables, figures = [], []
    for (aware,), part in groups(records, "aware").items():
        for column in ("task", "tokens"):
            title = f"By {'task' if column == 'task' else 'prompt length in tokens'}, {side(aware)}"
            tables.append(Table(title, *method_rows(part, column, score)))
        main = [record for record in part if "=" not in record["method"]]
        figures.append(plots.accuracy_over_budget(main, side(aware)))
        placed = [record for record in main if record["depth"] is not None]
        if placed:
            lowest = min(record["budget"] for record in placed)
            few = [record for record in placed if record["budget"] in (lowest, 1.0)]
            figures.append(plots.depth_by_length(few, f"budget {lowest:.0%}, {side(aware)}"))
    count = len({(r["task"], r["tokens"], r["depth"], r["number"]) for r in records})
    text = (
        f"The share of the right answers that the model gives, over {count} prompts; greedy"
        " decoding. Each token of an answer is computed on the compacted cache. Where the full"
        " cache does not answer there is nothing to compare."
    )
    return Section("Accuracy", text, tables, figures)


def perplexity_section(records: Records) -> Section:
    def cell(part: Records) -> str:
        return f"{plots.perplexity(part):.2f}"

    table = Table("Perplexity by prompt length in tokens", *method_rows(records, "tokens", cell))
    text = "Perplexity of a text's continuation behind the compacted cache of its beginning."
    return Section("Perplexity", text, [table], [])


def fidelity_section(records: Records) -> Section:
    tables, figures = [], []
    names = {
        "hidden": "Hidden states: cosine with the full cache's",
        "attention": "Attention outputs: cosine with the full cache's",
        "overlap": "Kept sets: share that an oracle of the tokens that follow keeps as well",
    }
    for (aware,), part in groups(records, "aware").items():
        for kind, title in names.items():

            def lowest(group: Records, kind: str = kind) -> list[str]:
                layers = plots.by_layer(group, kind)
                worst = min(range(len(layers)), key=layers.__getitem__)
                return [f"{mean(layers):.1%}", f"{layers[worst]:.1%} ({worst})"]

            rows = [
                [m, f"{b:.0%}", *sizes(group), *lowest(group)]
                for (m, b), group in groups(part, "method", "budget").items()
            ]
            head = ["method", "budget", *SIZES, "mean", "worst layer"]
            tables.append(Table(f"{title}, {side(aware)}", head, rows))
            budget = min(record["budget"] for record in part)
            few = [
                record
                for record in part
                if record["budget"] == budget and "=" not in record["method"]
            ]
            figures.append(
                plots.over_layers(few, kind, f"{title}\nbudget {budget:.0%}, {side(aware)}")
            )
    text = (
        "Over the tokens that follow the prompt, up to the right answer, behind each cache; means"
        " over tokens and prompts. A layer after the pivot computed on the skeleton alone."
    )
    return Section("Fidelity by layer", text, tables, figures)


def sets_section(records: Records) -> Section:
    names = {
        "mass": "Attention on the prompt that the kept tokens have",
        "output": "Attention outputs with the kept tokens alone: cosine with the full cache's",
        "answer": "Answer's first token: share of the KV heads that keep it",
    }
    tables = []
    for (aware,), part in groups(records, "aware").items():
        for kind, title in names.items():
            rows = [
                [m, f"{b:.0%}", *(f"{each:.0%}" for each in plots.by_layer(group, kind))]
                for (m, b), group in groups(part, "method", "budget").items()
            ]
            head = ["method", "budget", *map(str, range(len(rows[0]) - 2))]
            tables.append(Table(f"{title}, by layer, {side(aware)}", head, rows))
        told = {
            "sought": "attention to its first token of the token before it, of one head",
            "looked_at": "saliency of its first token, times the mean token's",
        }
        rows = [
            [text, *(f"{each:.2f}" for each in plots.by_layer(of_it, kind))]
            for kind, text in told.items()
            if (of_it := [record for record in part if kind in record])
        ]
        head = ["full cache", *map(str, range(len(rows[0]) - 1))]
        tables.append(Table(f"The answer in the prompt, by layer, {side(aware)}", head, rows))
    text = (
        "Each layer's kept tokens alone, behind the full cache's own queries, keys and values; sets"
        " drawn at random, and an oracle's, which sees the tokens that follow. Means over prompts."
    )
    return Section("Sets by layer", text, tables, [])


def pivots(records: Records) -> Table | None:
    rows = [
        [
            method,
            f"{budget:.0%}",
            ", ".join(f"{layer}: {n}" for layer, n in sorted(plots.counted(found).items())),
        ]
        for (method, budget), part in groups(records, "method", "budget").items()
        if (found := [r["pivot_layer"] for r in part if r["pivot_layer"] is not None])
    ]
    return (
        Table(
            "Pivot layers and how many prompts had them",
            ["method", "budget", "layer: prompts"],
            rows,
        )
        if rows
        else None
    )


SECTIONS: dict[str, Callable[[Records], Section]] = {
    "accuracy": accuracy_section,
    "perplexity": perplexity_section,
    "fidelity": fidelity_section,
    "sets": sets_section,
}

PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    (Path(__file__).parent / "report.html.jinja").read_text()
)


# Of a file of results; another when the fields of its records change.
FORMAT = 1
# Of the environment; a seed is a part of the samples' numbers.
SAME = ("model", "weights", "dtype", "hay", "text", "continuation")
IDENTITY = ("task", "tokens", "depth", "number", "aware", "method", "budget")


def merged(results: Iterable[dict[str, Any]], part: str) -> Records:
    """A part's records of all results; the full cache's of the first that has each prompt."""
    records, seen = Records(), set()
    for result in results:
        for record in result.get(part, []):
            identity = tuple(record.get(name) for name in IDENTITY)
            if identity not in seen:
                seen.add(identity)
                records.append(record)
    return sorted(records, key=lambda record: (record["method"] != "full", record["budget"]))


def read_results(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The results of `folder`/*.json by their file, and why others are left out."""
    results, left_out = dict[str, dict[str, Any]](), dict[str, str]()
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        form = content.get("format") if isinstance(content, dict) else None
        if form == FORMAT:
            results[path.name] = content
        else:
            left_out[path.name] = f"format {form}; {FORMAT} is expected: of another version"
    return results, left_out


def write_report(folder: Path) -> Path:
    """Writes `folder`/report.html of its *.json. ValueError where they are not of the same model or
    not of the same prompts, or none is of this version.
    """
    by_file, left_out = read_results(folder)
    results = list(by_file.values())
    if not results:
        names = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise ValueError(f"{folder}: no results that this version reads; {names or 'no *.json'}")
    for name in SAME:
        values = sorted({str(result["environment"][name]) for result in results})
        if len(values) > 1:
            raise ValueError(f"{folder}: results of {name} {', '.join(values)}; one is expected")
    sections = []
    for part, section in SECTIONS.items():
        if records := merged(results, part):
            sections.append(section(records))
            if part == "accuracy" and (table := pivots(records)):
                sections[-1].tables.append(table)
    page = folder / "report.html"
    environments = [result["environment"] for result in results]
    page.write_text(
        PAGE.render(
            model=environments[0]["model"],
            environments=environments,
            sections=sections,
            left_out=left_out,
        )
    )
    return page
