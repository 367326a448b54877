"""Runs the benchmarks, and puts what they print into docs/benchmarks.md, with plots of it in docs/figures.

Each benchmark is a program of its own: what it prints stands between two comments that name it, and is replaced. The
plots are drawn from the tables. Nothing else may run meanwhile.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "kedge"  # the same picture has the same bytes

_HERE = Path(__file__).parent
_DOCS = _HERE.parent / "docs"

Rows = list[dict[str, str]]

COMMANDS: dict[str, list[str]] = {
    "update": ["update.py"],
    "exchange": ["exchange.py", "--layouts", "mlp,resnet50", "--workers", "1,2,4,8"],
    "exchange-gpt2": ["exchange.py", "--layouts", "gpt2", "--workers", "1,2"],
    "exchange-dtypes": [
        *("exchange.py", "--layouts", "resnet50", "--transports", "grpc"),
        *("--wire-dtypes", "bfloat16,float16,int8,top_k,sign", "--workers", "1,4"),
    ],
    "scaling": ["scaling.py"],
    "transport": ["transport.py"],
    "versus": ["versus.py"],
}
"""What is run, by its name in the document."""

NEED_PEERS = ("transport", "versus")


def run(name: str, extra: Sequence[str]) -> str:
    """What a benchmark prints, which is shown as it comes."""
    print(f"== {name}", flush=True)
    script, *arguments = COMMANDS[name]
    command = [sys.executable, str(_HERE / script), *arguments, *extra]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise SystemExit(f"{name} failed with exit code {process.returncode}: the document is as it was")
    return "".join(lines).strip()


def replaced(document: str, name: str, text: str) -> str:
    """The document with another text between the comments of this name.

    Raises:
        ValueError: if it has no such comments.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if begin not in document or end not in document:
        raise ValueError(f"docs/benchmarks.md has no {begin} ... {end}: put them where the figures belong")
    before, after = document.split(begin, maxsplit=1)[0], document.split(end)[1]
    return f"{before}{begin}\n{text}\n{end}{after}"


def table_in(document: str, name: str) -> Rows:
    """The first table between the comments of this name, a dict for each row."""
    inside = document.split(f"<!-- begin {name} -->")[1].split(f"<!-- end {name} -->", maxsplit=1)[0]
    lines = [line for line in inside.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]] if cells else []


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def draw_scaling(rows: Rows) -> Figure:
    """Step time and memory over parameters, and step time over workers."""
    figure, (time, memory, workers) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for transport in dict.fromkeys(row["transport"] for row in rows):
        ours = [row for row in rows if row["transport"] == transport]
        one = [row for row in ours if row["workers"] == "1"]
        counts = [_number(row["parameters"]) for row in one]
        time.loglog(counts, [_number(row["ms a step (median)"]) for row in one], "o-", label=transport)
        memory.loglog(counts, [_number(row["server's peak MB"]) for row in one], "o-", label=transport)
        many = [row for row in ours if row["parameters"] == ours[-1]["parameters"]]
        workers.loglog(
            [_number(row["workers"]) for row in many],
            [_number(row["ms a step (median)"]) for row in many],
            "o-",
            label=transport,
        )
    one = [row for row in rows if row["workers"] == "1"]
    memory.loglog(
        [_number(row["parameters"]) for row in one],
        [_number(row["promised MB"]) for row in one],
        "k:",
        label="promised",
    )
    for axes, title, x, y in (
        (time, "a step of one worker", "parameters", "ms"),
        (memory, "the server's memory, one worker", "parameters", "MB"),
        (workers, f"a step of {rows[-1]['parameters']} parameters", "workers", "ms"),
    ):
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    return figure


def draw_versus(rows: Rows) -> Figure:
    """The ratios, a bar for each."""
    labels = [f"{row['layout']} x{row['workers']}, {row['Kedge']} / {row['peer']}" for row in rows]
    figure, axes = plt.subplots(figsize=(9, 0.26 * len(rows) + 1), layout="constrained")
    colours = {"yes": "tab:green", "no": "tab:red", "": "tab:gray"}
    axes.barh(labels, [_number(row["ratio"]) for row in rows], color=[colours[row["met"]] for row in rows])
    for at, row in enumerate(rows):
        if row["goal"]:
            axes.plot([_number(row["goal"])] * 2, [at - 0.45, at + 0.45], color="black")
    axes.axvline(1, color="black", linewidth=0.5)
    axes.set(title="step time over the peer's; a bar's black mark is its goal", xlabel="ratio")
    axes.invert_yaxis()
    return figure


def draw_exchange(rows: Rows) -> Figure:
    """Step time over workers, for each layout and transport."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for layout, transport in dict.fromkeys((row["layout"], row["transport"]) for row in rows):
        ours = [row for row in rows if (row["layout"], row["transport"]) == (layout, transport)]
        workers = [_number(row["workers"]) for row in ours]
        times = [_number(row["ms a step (median)"]) for row in ours]
        axes.loglog(workers, times, "o-", label=f"{layout}, {transport}")
    axes.set(title="a step, float32", xlabel="workers", ylabel="ms")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    return figure


PLOTS: dict[str, Callable[[Rows], Figure]] = {
    "exchange": draw_exchange,
    "scaling": draw_scaling,
    "versus": draw_versus,
}


def _write(name: str, text: str) -> None:
    path = _DOCS / "benchmarks.md"
    path.write_text(replaced(path.read_text("utf-8"), name, text), "utf-8")


def _draw(name: str) -> None:
    rows = table_in((_DOCS / "benchmarks.md").read_text("utf-8"), name)
    if rows:
        (_DOCS / "figures").mkdir(exist_ok=True)
        figure = PLOTS[name](rows)
        figure.savefig(_DOCS / "figures" / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Runs what is asked for, and writes the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(COMMANDS), help=f"of {', '.join(COMMANDS)}, joined by commas")
    parser.add_argument("--peers", help="the folder of the peers' scripts; without it those comparisons are left out")
    parser.add_argument("--python", action="append", default=[], help="an interpreter with peers' packages; repeatable")
    parser.add_argument("--draw", action="store_true", help="run nothing: draw the plots from the document")
    arguments = parser.parse_args()
    peers = [] if arguments.peers is None else ["--peers", arguments.peers]
    peers += [part for python in arguments.python for part in ("--python", python)]
    for name in re.split(",", arguments.only):
        if name in NEED_PEERS and not (arguments.peers and arguments.python):
            print(f"== {name} is left out: it needs --peers and --python")
            continue
        if not arguments.draw:
            _write(name, run(name, peers if name in NEED_PEERS else []))
        if name in PLOTS:
            _draw(name)


if __name__ == "__main__":
    main()
