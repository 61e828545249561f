# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Draws what benchmark_conch_attention.py and benchmark_conch_serving.py measured.

    python benchmarks/plot_conch.py prefill.csv decode.csv mixed.csv --out docs/plots

Writes, for each page size and kind of KV cache that the tables hold, as SVG (or
--format png):

    prefill_PAGE    TFLOP/s of one causal prompt against its length, a panel for each
                    head configuration, under the rate of a matrix product
    decode_PAGE     rate of reading K and V for one new token a sequence against the
                    context, a panel for each number of sequences, under the rate of a
                    kernel that only reads
    mixed_PAGE      ragged batches: the share of the roofline that is reached
    serving         milliseconds between tokens of a whole engine

Needs matplotlib and nothing of vLLM.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {
    "conch": "#d1495b",
    "conch_portable": "#edae49",
    "fa3": "#00798c",
    "triton": "#66717e",
    "cudnn": "#7b5ea7",
}
# By the backends' names.
SERVING = {"CONCH": "conch", "FLASH_ATTN": "fa3", "TRITON_ATTN": "triton"}
LABELS = {
    "conch": "CONCH",
    "conch_portable": "CONCH, portable kernel",
    "fa3": "FlashAttention-3",
    "triton": "vLLM Triton",
    "cudnn": "cuDNN, contiguous",
}
DEFAULT_HEADS = "32/8x128"
PANELS_A_ROW = 3

Row = dict[str, str]


@dataclass
class Figure:
    """Rows that belong into one file."""

    name: str
    rows: list[Row]
    draw: Callable[[list[Row], str], plt.Figure]


def read_table(path: Path) -> tuple[dict[str, str], list[Row]]:
    """The environment at the head of a table, and its rows."""
    with path.open(newline="") as file:
        lines = file.read().splitlines()
    head = [line[2:].partition(": ") for line in lines if line.startswith("# ")]
    rows = list(csv.DictReader(line for line in lines if not line.startswith("# ")))
    return {name: value for name, _, value in head}, rows


def is_timed(row: Row) -> bool:
    return bool(row.get("us")) and row["provider"] in COLORS


def is_plain(row: Row) -> bool:
    """Neither window nor softcap nor shared prefix."""
    return "@" not in row["case"]


def is_prefill(row: Row) -> bool:
    return (
        row["num_seqs"] == "1"
        and row["query_len"] == row["seq_len"] != ""
        and is_plain(row)
    )


def is_decode(row: Row) -> bool:
    """One new token after a context of a power of two."""
    if row["query_len"] != "1" or row["heads"] != DEFAULT_HEADS:
        return False
    return is_plain(row) and int(row["seq_len"]).bit_count() == 1


def is_mixed(row: Row) -> bool:
    return row["query_len"] == "" and is_plain(row)


def group_by(rows: Iterable[Row], *fields: str) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[field] for field in fields)].append(row)
    return groups


def select_figures(rows: Sequence[Row]) -> list[Figure]:
    """The figures that these rows are enough for."""
    figures = []
    if served := [row for row in rows if row.get("ms_between_tokens")]:
        figures.append(Figure("serving", served, draw_serving))
    kinds = (
        ("prefill", is_prefill, draw_prefill),
        ("decode", is_decode, draw_decode),
        ("mixed", is_mixed, draw_mixed),
    )
    timed = [row for row in rows if is_timed(row)]
    for (page, kv_dtype), group in group_by(timed, "page", "kv_dtype").items():
        suffix = f"page{page}" + ("" if kv_dtype == "auto" else f"_{kv_dtype}")
        for kind, belongs, draw in kinds:
            if chosen := [row for row in group if belongs(row)]:
                figures.append(Figure(f"{kind}_{suffix}", chosen, draw))
    return figures


def make_panels(count: int) -> tuple[plt.Figure, list[plt.Axes]]:
    columns = min(count, PANELS_A_ROW)
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.4 * lines), squeeze=False
    )
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return figure, list(axes.flat[:count])


def draw_lines(ax: plt.Axes, rows: list[Row], column: str) -> None:
    """A line for each provider over the sequence length."""
    by_provider = group_by(rows, "provider")
    for provider in COLORS:
        points = sorted(
            (int(row["seq_len"]), float(row[column]))
            for row in by_provider.get((provider,), [])
        )
        if points:
            color, label = COLORS[provider], LABELS[provider]
            ax.plot(*zip(*points), "o-", color=color, label=label, markersize=4)
    lengths = sorted({int(row["seq_len"]) for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [short_length(length) for length in lengths])
    ax.minorticks_off()
    ax.grid(alpha=0.3)


def short_length(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def draw_roof(ax: plt.Axes, rows: Iterable[Row], column: str) -> None:
    """What the rate in a column would be if a call took no longer than its floor."""
    roof = {
        int(row["seq_len"]): float(row[column]) / float(row["of_floor"]) for row in rows
    }
    ax.plot(*zip(*sorted(roof.items())), "k--", linewidth=1, label="roofline")
    ax.set_ylim(bottom=0)


def finish(figure: plt.Figure, title: str) -> plt.Figure:
    handles: dict[str, object] = {}
    for ax in figure.axes:
        handles |= {label: h for h, label in zip(*ax.get_legend_handles_labels())}
    figure.suptitle(title, fontsize=10)
    figure.legend(
        handles.values(), handles.keys(), loc="lower center", ncols=6, fontsize=8
    )
    figure.tight_layout(rect=(0, 0.06, 1, 0.98))
    return figure


def draw_prefill(rows: list[Row], title: str) -> plt.Figure:
    panels = group_by(rows, "heads")
    figure, axes = make_panels(len(panels))
    for ax, ((heads,), group) in zip(axes, panels.items()):
        draw_lines(ax, group, "TFLOP/s")
        draw_roof(ax, group, "TFLOP/s")
        ax.set(title=heads, xlabel="tokens of the prompt", ylabel="TFLOP/s")
    return finish(figure, f"Causal prefill of one prompt; {title}")


def draw_decode(rows: list[Row], title: str) -> plt.Figure:
    panels = group_by(rows, "num_seqs")
    # A single context makes no line; drawn as a point if there is nothing else.
    lines = {k: g for k, g in panels.items() if len({r["seq_len"] for r in g}) > 1}
    panels = lines or panels
    figure, axes = make_panels(len(panels))
    for ax, (count,) in zip(axes, sorted(panels, key=lambda key: int(key[0]))):
        group = panels[count,]
        draw_lines(ax, group, "TB/s")
        draw_roof(ax, group, "TB/s")
        name = "1 sequence" if count == "1" else f"{count} sequences"
        ax.set(title=name, xlabel="context", ylabel="TB/s of K and V")
    return finish(figure, f"Decode, one new token a sequence, {DEFAULT_HEADS}; {title}")


def draw_mixed(rows: list[Row], title: str) -> plt.Figure:
    cases = group_by(rows, "case", "heads")
    providers = [p for p in COLORS if any(row["provider"] == p for row in rows)]
    figure, ax = plt.subplots(figsize=(8, 1.2 + 0.8 * len(cases)))
    height = 0.8 / len(providers)
    for i, provider in enumerate(providers):
        style = {"color": COLORS[provider], "label": LABELS[provider]}
        for line, group in enumerate(cases.values()):
            for row in [row for row in group if row["provider"] == provider]:
                share = 100 * float(row["of_floor"])
                bar = ax.barh(line + i * height, share, height, **style)
                ax.bar_label(bar, [f"{row['us']} us"], fontsize=7, padding=2)
    middle = 0.4 - height / 2
    names = ["\n".join(wrap(case)) for case, _ in cases]
    ax.set_yticks([line + middle for line in range(len(cases))], names, fontsize=7)
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    ax.set_xlabel("per cent of the roofline")
    return finish(figure, f"Ragged batches; {title}")


def draw_serving(rows: list[Row], title: str) -> plt.Figure:
    panels = group_by(rows, "kv_cache_dtype")
    figure, axes = make_panels(len(panels))
    for ax, ((kv_dtype,), group) in zip(axes, panels.items()):
        cases = group_by(group, "case")
        height = 0.8 / len(SERVING)
        for line, case in enumerate(cases.values()):
            slowest = max(float(row["ms_between_tokens"]) for row in case)
            for i, (backend, provider) in enumerate(SERVING.items()):
                for row in [row for row in case if row["backend"] == backend]:
                    ms = float(row["ms_between_tokens"])
                    style = {"color": COLORS[provider], "label": backend}
                    where = (line + i * height, 100 * ms / slowest, height)
                    bar = ax.barh(*where, **style)
                    ax.bar_label(bar, [f"{ms:.3g} ms"], fontsize=7, padding=2)
        middle = 0.4 - height / 2
        ax.set_yticks([line + middle for line in range(len(cases))], labels(cases))
        ax.tick_params(labelsize=7)
        ax.invert_yaxis()
        ax.set_xlim(0, 125)
        ax.set(title=f"KV cache {kv_dtype}", xlabel="per cent of the slowest")
    title = f"Time between tokens, Llama-3.1-8B's shape, prompts x in/out; {title}"
    return finish(figure, title)


def labels(cases: Iterable[tuple[str, ...]]) -> list[str]:
    return [case for (case,) in cases]


def wrap(case: str, width: int = 28) -> list[str]:
    """Lines of whole segments."""
    lines = [""]
    for segment in case.split("_"):
        if lines[-1] and len(lines[-1]) + len(segment) >= width:
            lines.append("")
        lines[-1] += f"_{segment}" if lines[-1] else segment
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/plots"))
    parser.add_argument("--format", choices=["svg", "png"], default="svg")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    # The same rows give the same file.
    plt.rcParams["svg.hashsalt"] = "conch"
    rows, head = [], {}
    for path in options.tables:
        found, more = read_table(path)
        head = found | head
        rows += more
    figures = select_figures(rows)
    if not figures:
        raise SystemExit("None of the tables has a row with a time.")
    for one in figures:
        device = head.get("device") or one.rows[0].get("device", "?")
        pages = one.name.partition("_")[2].replace("page", "pages of ")
        figure = one.draw(one.rows, f"{device}, {pages}" if pages else device)
        path = options.out / f"{one.name}.{options.format}"
        metadata = {"Date": None} if options.format == "svg" else None
        figure.savefig(path, metadata=metadata, dpi=150, bbox_inches="tight")
        plt.close(figure)
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
