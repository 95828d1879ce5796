"""Pictures of a search as SVG text, by matplotlib. Colours are CSS variables, because a page may be light or dark."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from dnas.spec.budget import show
from dnas.spec.space import KEEP

# The colours that matplotlib draws with, and the variables of the page that replace them.
INK, MUTED, LINE, FOUND, UNIFORM, EVENT, BALANCED = (f"#{k:02x}0d0f" for k in range(1, 8))
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", FOUND: "found", UNIFORM: "uniform", EVENT: "event"}
VARIABLES |= {BALANCED: "balanced"}
OF_KIND = {"found": FOUND, "uniform": UNIFORM, "balanced": BALANCED}  # of nets; all others are muted
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # names of folders are no formulas
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}
WIDTH = 7.2  # inches; the page scales it
UNITS = {"macs": "MACs", "params": "parameters", "ms": "ms"}
POINTS = 300  # of a curve: a search of ten thousand steps stays a small page


def _svg(figure: Figure, name: str, told: str) -> str:
    """The figure as an ``<svg>`` element with ids of its own. ``told`` describes it in words."""
    file = io.StringIO()
    with rc_context(STYLE | {"svg.hashsalt": name}):  # the same rows give the same file
        figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text[text.index("<svg") :])
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    head = re.sub(r' (width|height|version)="[^"]*"', "", text[: text.index(">")])
    return f'{head} role="img" aria-label="{told}" id="{name}"{text[text.index(">") :]}'


def _curve(steps: Sequence[int], values: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values): medians over up to `POINTS` stretches.

    Missing values (None, of a step that was skipped) do not count.
    """
    known = np.array([v is not None for v in values], dtype=bool)
    x, y = np.array(steps)[known], np.array([v for v in values if v is not None], dtype=float)
    parts = min(POINTS, len(x))
    if not parts:
        return x, y
    return (np.array([np.median(part) for part in np.array_split(a, parts)]) for a in (x, y))  # type: ignore[return-value]


def top1(nets: Mapping[str, Sequence[float]], score: str = "top-1") -> str:
    """Top-1, or another ``score``, of all trainings of each kind of net, with mean and standard deviation."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.6 + 0.42 * len(nets)))
        axes: Axes = figure.subplots()
        for k, (name, values) in enumerate(nets.items()):
            colour = OF_KIND.get(name, MUTED)
            mean, deviation = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0
            axes.plot(values, [k] * len(values), "o", color=colour, markersize=4, alpha=0.5, clip_on=False)
            axes.errorbar(mean, k, xerr=deviation or None, color=colour, marker="|", markersize=13, capsize=3)
            at, text = (float(mean), k), f"{mean:.2f}"
            axes.annotate(text, at, (0, 8), textcoords="offset points", ha="center", color=colour)
        axes.set_yticks(range(len(nets)), [f"{name} ({len(values)})" for name, values in nets.items()])
        axes.set_ylim(len(nets) - 0.5, -0.6)
        axes.margins(x=0.1)
        axes.set_xlabel(f"{score} after training from scratch, %")
        axes.grid(axis="y", visible=False)
        return _svg(figure, "top1", f"{score} of the found net and of those that it is compared with")


def course(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, float]) -> str:
    """Plots over the steps of a search: costs and budget, losses, step time. Lines mark steps that cut options off."""
    gate_rows = [row for row in rows if "expected" in row]
    cuts = [row["step"] for row in rows if row.get("events")]
    steps, taught = [row["step"] for row in rows], [row["step"] for row in gate_rows]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.9 * (len(limits) + 2)), layout="constrained")
        panels = figure.subplots(len(limits) + 2, 1, sharex=True, squeeze=False)[:, 0]
        for axes in panels:
            axes.vlines(cuts, 0, 1, transform=axes.get_xaxis_transform(), color=EVENT, linewidth=0.6, alpha=0.6)
        for axes, (metric, limit) in zip(panels, limits.items(), strict=False):
            if metric == "macs":
                axes.plot(*_curve(steps, [row["live_macs"] for row in rows]), color=MUTED, label="dearest net alive")
            axes.plot(*_curve(taught, [row["target"][metric] for row in gate_rows]), color=UNIFORM, label="target")
            axes.plot(*_curve(taught, [row["expected"][metric] for row in gate_rows]), color=FOUND, label="expected")
            axes.axhline(limit, color=INK, linewidth=0.8, linestyle=":")
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
            axes.set_title(f"{UNITS[metric]}, budget {show(metric, limit)} dotted")
            axes.legend(fontsize=8, loc="upper right")
        panels[-2].plot(*_curve(steps, [row["loss"] for row in rows]), color=UNIFORM, label="weights")
        panels[-2].plot(*_curve(taught, [row["gate_loss"] for row in gate_rows]), color=FOUND, label="gates")
        panels[-2].set_title("cross entropy; of the gates on held-out images")
        panels[-2].legend(fontsize=8, loc="upper right")
        panels[-1].plot(*_curve(steps, [row["weight_ms"] for row in rows]), color=UNIFORM, label="weights")
        panels[-1].plot(*_curve(taught, [row["gate_ms"] for row in gate_rows]), color=FOUND, label="gates")
        panels[-1].set_title("milliseconds of a step; of the gates with cutting")
        panels[-1].set_ylim(bottom=0)
        panels[-1].legend(fontsize=8, loc="upper right")
        panels[-1].set_xlabel(f"step; {len(cuts)} lines where something was cut off")
        return _svg(figure, "course", "cost, losses and step time over the search")


def gates(rows: Sequence[Mapping[str, Any]], decisions: Sequence[Mapping[str, Any]]) -> str:
    """Heat map over the steps of a search.

    A width is shown as the expected width over the widest width. A block is shown as the probability of the block that
    was chosen, a layer as the probability that it stays. So a layer that was dropped goes dark, and a block that was
    chosen goes bright.
    """
    shots = [row for row in rows if "gates" in row]
    shown = [d for d in decisions if d["found"] is not None and len(d["options"]) > 1]
    picture = np.full((len(shown), len(shots)), np.nan)
    for column, row in enumerate(shots):
        for line, decision in enumerate(shown):
            value = row["gates"].get(decision["name"])
            if isinstance(value, list):
                answer = KEEP if KEEP in decision["options"] else decision["found"]
                picture[line, column] = value[decision["options"].index(answer)]
            elif value is not None:
                picture[line, column] = value / decision["options"][-1]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.0 + 0.17 * len(shown)), layout="constrained")
        axes: Axes = figure.subplots()
        ends = (shots[0]["step"], shots[-1]["step"] + 1, len(shown) - 0.5, -0.5)
        how: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest", "cmap": "viridis"}
        image = axes.imshow(picture, vmin=0, vmax=1, extent=ends, **how)
        blocks = [KEEP not in d["options"] and type(d["found"]) is str for d in shown]
        names = [d["name"] + f": {d['found']}" * block for d, block in zip(shown, blocks, strict=True)]
        axes.set_yticks(range(len(shown)), names, fontsize=7)
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step")
        bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01)
        bar.outline.set_visible(False)
        bar.set_label("expected width / widest, or probability")
        return _svg(figure, "gates", "how widths, blocks and layers were decided over the search")


def layers(rows: Sequence[Mapping[str, Any]]) -> str:
    """The cost of every layer in the widest, the found, the uniform and the balanced net.

    The costs are MACs, and milliseconds if the rows have them.
    """
    metrics = [metric for metric in ("macs", "ms") if any(metric in row for row in rows)]
    names = [row["name"] for row in rows if any(row.get(metric, {}).get("widest") for metric in metrics)]
    by_name = {row["name"]: row for row in rows}
    at = np.arange(len(names))
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.8 + 0.19 * len(names)), layout="constrained")
        panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            nets = [
                net
                for net in ("widest", "found", "uniform", "balanced")
                if any(net in row.get("macs", {}) for row in rows)
            ]
            costs = {net: [by_name[name].get(metric, {}).get(net, 0) for name in names] for net in nets}
            axes.barh(at, costs["widest"], height=0.75, color=LINE, label="widest")
            axes.barh(at, costs["found"], height=0.45, color=FOUND, label="found")
            for net in nets[2:]:
                axes.plot(costs[net], at, "|", color=OF_KIND[net], markersize=8, markeredgewidth=1.8, label=net)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.set_xlabel(UNITS[metric])
            axes.grid(axis="y", visible=False)
        panels[0].set_yticks(at, names, fontsize=7)
        panels[0].set_ylim(len(names) - 0.4, -0.6)
        figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside upper right", ncols=4)
        return _svg(figure, "layers", "what every layer costs in the widest net, the found one and the rules'")


def predicted(nets: Mapping[str, tuple[float, float]]) -> str:
    """Milliseconds of networks: predicted by a latency table against measured.

    ``nets`` maps a kind of net to (predicted, measured).
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 2, WIDTH / 2.4), layout="constrained")
        axes: Axes = figure.subplots()
        most = 1.15 * max(max(pair) for pair in nets.values())
        axes.plot([0, most], [0, most], color=MUTED, linewidth=0.8, linestyle=":")
        for name, (told, measured) in nets.items():
            axes.plot(told, measured, "o", color=OF_KIND.get(name, MUTED), label=name)
        axes.set(xlim=(0, most), ylim=(0, most), xlabel="ms, predicted", ylabel="ms, measured")
        axes.legend(fontsize=8)
        return _svg(figure, "predicted", "predicted and measured latency")


def pareto(metric: str, points: Sequence[tuple[str, str, float, Sequence[float]]]) -> str:
    """Top-1 against cost. ``points`` are (group, kind of net, cost, top-1 of its trainings).

    A line joins the points of each kind, except those of ``random``.
    """
    kinds = list(dict.fromkeys(kind for _, kind, _, _ in points))
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axes: Axes = figure.subplots()
        for kind in kinds:
            own = sorted((cost, tops) for _, k, cost, tops in points if k == kind)
            costs, means = [cost for cost, _ in own], [float(np.mean(tops)) for _, tops in own]
            spread = [float(np.std(tops, ddof=1)) if len(tops) > 1 else 0.0 for _, tops in own]
            axes.errorbar(
                costs, means, spread, fmt="o" if kind == "random" else "-o", color=OF_KIND.get(kind, MUTED), label=kind,
                markersize=4, capsize=3, linewidth=1,
            )  # fmt: skip
        for name, kind, cost, tops in points:
            if kind == "found":
                at = (cost, float(np.mean(tops)))
                axes.annotate(name, at, (5, 5), textcoords="offset points", fontsize=7, color=MUTED)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set(xlabel=UNITS[metric], ylabel="top-1, %")
        axes.margins(0.12)
        axes.legend(fontsize=8)
        return _svg(figure, f"pareto-{metric}", f"top-1 against {UNITS[metric]}")
