"""Draws docs/benchmarks/*.svg from results/*.json (of the committed full run, or another one).

A point is the median of the rounds, the bar through it their quartiles.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from _harness import HERE, OURS, RESULTS

PLOTS = HERE.parent / "docs" / "benchmarks"

COLORS = {OURS: "#1f5fa8", "postgresql": "#b5492a", "floor": "#777777"}
MORE_COLORS = (
    "#5b8c3e",
    "#8a5aa8",
    "#b08a1e",
    "#2f8f8f",
    "#a84a78",
    "#6b6f2b",
    "#4a4a8a",
    "#905a3a",
)
LABELS = {
    "postgresql": "PostgreSQL",
    "floor": "os.fork",
    "c_program:locked_table": "mutex, linear scan (C)",
    "c_program:slot_contention": "pgbgw's core (C)",
}
VARIANTS = {"spares": "warm spares", "asleep": "supervisor asleep", "many": "register_many"}

Line = dict[str, Any]


class Curve(NamedTuple):
    """A figure against the points of its axis."""

    file: str
    question: str
    names: tuple[str, ...]
    title: str
    x: str
    y: str
    log: str = ""  # which axes are logarithmic
    scale: Callable[[float, float], float] = lambda value, at: value


class Bars(NamedTuple):
    """Figures that are numbers, a bar per subject."""

    file: str
    question: str
    names: tuple[str, ...]
    title: str
    x: str


CURVES = (
    Curve(
        "status",
        "status",
        ("status",),
        "Asking for a worker's state: all processes together",
        "processes asking",
        "questions per second",
        "y",
        lambda ns, processes: processes * 1e9 / ns,
    ),
    Curve(
        "table_size",
        "table_size",
        ("table_size",),
        "Register and terminate one worker in a table of n slots",
        "slots",
        "CPU time of the supervisor, µs",
        "xy",
    ),
    Curve(
        "refusal",
        "refusal",
        ("refusal",),
        "Being refused by a full table of n slots",
        "slots",
        "time of the call, ns",
        "xy",
    ),
    Curve(
        "resident",
        "resident",
        ("resident", "resident_spares"),
        "Register, started, stopped, beside n idle workers",
        "idle workers",
        "cycles per second",
        "s",
    ),
    Curve(
        "death",
        "death",
        ("death",),
        "Supervisor killed: until the last of n workers is gone",
        "workers",
        "time, ms",
        "xy",
    ),
)

BARS = (
    Bars(
        "launch",
        "launch",
        ("launch", "launch_spares"),
        "From the call to the first line of a new worker",
        "time, µs",
    ),
    Bars(
        "cycle",
        "cycle",
        ("cycle", "cycle_spares"),
        "Start a worker that does nothing and see its end",
        "workers per second, one after another",
    ),
    Bars(
        "burst",
        "burst",
        ("burst", "burst_spares"),
        "8 clients start 8 workers each at once, again and again",
        "workers per second",
    ),
    Bars("memory", "memory", ("memory",), "An idle worker", "proportional set size, kB"),
)


def label(line: Line, base: str) -> str:
    subject = str(line["subject"])
    if (line["name"], subject) == ("status", "floor"):
        return "os.kill(pid, 0)"
    found = LABELS.get(subject, subject.replace(":", ", ").replace("_", "."))
    variant = str(line["name"]).removeprefix(base).strip("_")
    return f"{found}, {VARIANTS.get(variant, variant)}" if variant else found


def color(subjects: list[str], subject: str) -> str:
    others = [s for s in subjects if s not in COLORS]
    return COLORS.get(subject) or MORE_COLORS[others.index(subject) % len(MORE_COLORS)]


def figure(width: float, height: float, title: str) -> tuple[Any, Any]:
    found, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return found, axes


def number(value: float, _: int = 0) -> str:
    """1 to 999, 1k, 1M ... for the decades of an axis."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def decades(axis: Any, values: list[float]) -> None:
    """Whole decades round all values, so that lengths mean the same in all plots."""
    low, high = (math.log10(max(extreme(values), 1e-9)) for extreme in (min, max))
    limits = 10 ** math.floor(low - 0.1), 10 ** math.ceil(high + 0.1)
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(*limits)
    axis.set_major_locator(LogLocator(10))
    axis.set_major_formatter(FuncFormatter(number))
    axis.set_minor_formatter(NullFormatter())


def draw_curve(plot: Curve, lines: list[Line], path: Path) -> None:
    subjects = list(dict.fromkeys(str(line["subject"]) for line in lines))
    found, axes = figure(7.2, 3.6, plot.title)
    series: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        series.setdefault((line["subject"], line["name"]), []).append(line)
    for (subject, name), points in series.items():
        xs = [point["at"] for point in points]
        middle, *ends = (
            [plot.scale(point[key], point["at"]) for point in points]
            for key in ("median", "q1", "q3")
        )
        errors = [
            [max(0.0, m - min(e)) for m, e in zip(middle, zip(*ends, strict=True), strict=True)],
            [max(0.0, max(e) - m) for m, e in zip(middle, zip(*ends, strict=True), strict=True)],
        ]
        axes.errorbar(
            xs,
            middle,
            errors,
            label=label(points[0], plot.names[0]),
            color=color(subjects, subject),
            linestyle="-" if name == plot.names[0] else "--",
            linewidth=1.8 if subject == OURS else 1.2,
            marker="o",
            markersize=3.5,
            elinewidth=0.8,
        )
    ticks = sorted({line["at"] for line in lines})
    if "x" in plot.log:
        axes.set_xscale("log")
    if "s" in plot.log:  # logarithmic, but with a zero
        axes.set_xscale("symlog", linthresh=10)
    if "y" in plot.log:
        axes.set_yscale("log")
        decades(axes.yaxis, [plot.scale(line["median"], line["at"]) for line in lines])
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks(ticks, [f"{tick:,}".replace(",", " ") for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(plot.x, fontsize=9)
    axes.set_ylabel(plot.y, fontsize=9)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    found.legend(fontsize=8, frameon=False, loc="outside right upper")
    save(found, path)


def draw_bars(plot: Bars, lines: list[Line], path: Path) -> None:
    subjects = list(dict.fromkeys(str(line["subject"]) for line in lines))
    best = lines[0]["better"] == "more"
    lines = sorted(lines, key=lambda line: line["median"], reverse=not best)
    found, axes = figure(7.2, 0.9 + 0.3 * len(lines), plot.title)
    for row, line in enumerate(lines):
        axes.barh(row, line["median"], color=color(subjects, line["subject"]), height=0.65)
        text = f" {line['median']:,.3g}" if line["median"] < 100 else f" {line['median']:,.0f}"
        text = text.replace(",", " ")
        axes.text(line["median"], row, text, va="center", fontsize=8)
    axes.set_xscale("log")
    decades(axes.xaxis, [line["median"] for line in lines])
    axes.set_yticks(range(len(lines)), [label(line, plot.names[0]) for line in lines])
    better = "more" if best else "less"
    axes.set_xlabel(f"{plot.x} (logarithmic; {better} is better)", fontsize=9)
    save(found, path)


def save(found: Any, path: Path) -> None:
    # No date in it: the same results make the same file.
    found.savefig(path, format="svg", metadata={"Date": None})
    plt.close(found)


def read(results: Path, question: str, names: tuple[str, ...]) -> list[Line]:
    path = results / f"{question}.json"
    if not path.exists():
        return []
    lines = json.loads(path.read_text())["figures"]
    return [line for line in lines if line.get("name") in names]


def contention(results: Path) -> Iterator[Curve]:
    """Pairs per second by processes, a plot for each size of the table that was measured."""
    path = results / "slot_contention.json"
    lines = json.loads(path.read_text())["figures"] if path.exists() else []
    for name in dict.fromkeys(line["name"] for line in lines if line.get("unit") == "1/s"):
        slots = name.rpartition("_")[2]
        yield Curve(
            name,
            "slot_contention",
            (name,),
            f"Register and terminate, all processes together, {slots} slots",
            "processes",
            "pairs per second",
            "y",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plots", type=Path, default=PLOTS)
    options = parser.parse_args()
    options.plots.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "pgbgw"
    plt.rcParams["svg.fonttype"] = "none"
    for curve in (*CURVES, *contention(options.results)):
        lines = read(options.results, curve.question, curve.names)
        if lines:
            draw_curve(curve, lines, options.plots / f"{curve.file}.svg")
    for bars in BARS:
        lines = read(options.results, bars.question, bars.names)
        if lines:
            draw_bars(bars, lines, options.plots / f"{bars.file}.svg")


if __name__ == "__main__":
    main()
