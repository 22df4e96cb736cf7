"""The figures of the report: one function each, from plain values to a PNG that is the same every time.

    python -m tasks.report      # draws them all into artifacts/report/figures/

Colours are those of Okabe and Ito (2008), which stay apart for every kind of colour vision; marks differ too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

BLUE, ORANGE, GREEN, RED, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#767676"
INK, GRID = "#222222", "#e4e4e4"
STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#999999",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.dpi": 100,
    "savefig.dpi": 160,
}
LEGEND_PAD = 24.0
"""Points between axes and title where a legend stands there."""
PATH_LINES = (
    ("chosen_mean", "chosen", GREEN, "^"),
    ("mean", "all paths", BLUE, "o"),
    ("rejected_mean", "rejected", RED, "v"),
)
TITLES = {"base": "Base", "multi_agent": "Multi-agent"}


def title(system: str) -> str:
    """base → Base, r2 → Round 2."""
    return TITLES.get(system) or (f"Round {system[1:]}" if system[1:].isdigit() else system.replace("_", " "))


def ablation(path: Path, comparison: Mapping[str, Any]) -> bool:
    """Accuracy of every system with its 95% interval, on reasoning and on perception."""
    names = comparison["order"]

    def draw(axes: Any) -> None:
        for axis, key, label in zip(
            axes, ("reasoning", "perception"), ("Reasoning", "Perception"), strict=True
        ):
            shares = [comparison["systems"][name]["accuracy"][key] for name in names]
            _bars(axis, shares, [_colour(name) for name in names])
            axis.set(title=f"{label} (n = {shares[0]['n']:,})", xlabel="Accuracy, %")
            axis.set_yticks(range(len(names)), [title(name) for name in names])
            axis.invert_yaxis()
            axis.grid(axis="y", visible=False)
        axes[1].tick_params(labelleft=False)

    return _figure(path, draw, columns=2, size=(9, 1.2 + 0.48 * len(names)))


def rounds(path: Path, comparison: Mapping[str, Any]) -> bool:
    """Accuracy by generation, and the judge's reward of the sampled paths by round."""
    generations = [name for name in comparison["order"] if name != "base"]
    facts = comparison["rounds"]

    def draw(axes: Any) -> None:
        for key, label, style, shift in (
            ("reasoning", "test", {"color": BLUE, "marker": "o"}, -0.04),
            ("validation", "validation", {"color": ORANGE, "marker": "s"}, 0.04),
        ):
            shares = [comparison["systems"][name]["accuracy"][key] for name in generations]
            _line(axes[0], shares, label, style, shift)
        axes[0].set_title("Reasoning accuracy by generation", pad=LEGEND_PAD)
        axes[0].set(ylabel="Accuracy, %")
        axes[0].set_xticks(range(len(generations)), [title(name) for name in generations])
        _by_round(axes[1], facts, "reward")
        axes[1].set_title("Reward by round", pad=LEGEND_PAD)
        axes[1].set(ylabel="Judge's score, 1–100")

    return bool(facts) and _figure(path, draw, columns=2, size=(9, 3.4))


def length(path: Path, comparison: Mapping[str, Any]) -> bool:
    """Reasoning length on held-out questions by generation, and of chosen and rejected paths by round."""
    names = [
        name for name in comparison["order"] if comparison["systems"][name]["reasoning_tokens"] is not None
    ]

    def draw(axes: Any) -> None:
        values = [comparison["systems"][name]["reasoning_tokens"] for name in names]
        axes[0].plot(range(len(names)), values, color=BLUE, marker="o", linewidth=2)
        axes[0].set_title("Held-out reasoning", pad=LEGEND_PAD)
        axes[0].set(ylabel="Tokens, mean", ylim=(0, max(values) * 1.2))
        axes[0].set_xticks(range(len(names)), [title(name) for name in names])
        if comparison["rounds"]:
            _by_round(axes[1], comparison["rounds"], "length")
            axes[1].set_title("Sampled paths by round", pad=LEGEND_PAD)
            axes[1].set(ylabel="Words, mean")
            axes[1].set_ylim(0, 1.15 * axes[1].get_ylim()[1])

    columns = 2 if comparison["rounds"] else 1
    return bool(names) and _figure(path, draw, columns=columns, size=(4.5 * columns, 3.2))


def reasoning_answer(path: Path, comparison: Mapping[str, Any]) -> bool:
    """Reasoning right or wrong by answer right or wrong: what the summary agent saves, and what it spoils."""
    names = [name for name in comparison["order"] if comparison["systems"][name]["two_by_two"]]
    parts = (
        ("reasoning_right_answer_right", "both right", BLUE, ""),
        ("reasoning_wrong_answer_right", "reasoning wrong, answer right", SKY, "///"),
        ("reasoning_right_answer_wrong", "reasoning right, answer wrong", ORANGE, "\\\\\\"),
        ("reasoning_wrong_answer_wrong", "both wrong", "#bdbdbd", ""),
    )

    def draw(axes: Any) -> None:
        left = [0.0] * len(names)
        for key, label, colour, hatch in parts:
            counts = [comparison["systems"][name]["two_by_two"] for name in names]
            widths = [100 * count[key] / sum(count.values()) for count in counts]
            axes[0].barh(
                range(len(names)),
                widths,
                left=left,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                label=label,
            )
            for row, (start, width) in enumerate(zip(left, widths, strict=True)):
                if width >= 5:
                    dark = colour == BLUE
                    box = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
                    axes[0].text(
                        start + width / 2,
                        row,
                        f"{width:.0f}",
                        ha="center",
                        va="center",
                        color="white" if dark else INK,
                        bbox=box,
                    )
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes[0].set(xlabel="Share of reasoning questions, %", xlim=(0, 100))
        axes[0].set_yticks(range(len(names)), [title(name) for name in names])
        axes[0].invert_yaxis()
        axes[0].grid(visible=False)
        axes[0].legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1.0))

    return bool(names) and _figure(path, draw, size=(8, 1.6 + 0.45 * len(names)))


def agreement(path: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    """The judge against the truth: AUC of right over wrong paths, rank correlation with the oracle."""

    def draw(axes: Any) -> None:
        panels = (
            ("auc", "Right above wrong path (AUC)", 0.5, BLUE),
            ("rank_correlation", "Rank correlation with the oracle", 0.0, GREEN),
        )
        for axis, (key, label, chance, colour) in zip(axes, panels, strict=True):
            known = [(index, row[key]) for index, row in enumerate(rows) if row.get(key) is not None]
            axis.barh(
                [index for index, _ in known],
                [value - chance for _, value in known],
                left=chance,
                color=colour,
                height=0.55,
            )
            for index, value in known:
                axis.text(
                    value, index, f" {value:.2f}", va="center", ha="left" if value >= chance else "right"
                )
            axis.axvline(chance, color=INK, linewidth=1)
            axis.set(
                title=label,
                xlim=(
                    min([chance, *(v for _, v in known)]) - (0.1 if any(v < chance for _, v in known) else 0),
                    1.08,
                ),
            )
            axis.set_yticks(range(len(rows)), [row["stage"] for row in rows])
            axis.set_ylim(len(rows) - 0.5, -0.5)
            axis.grid(axis="y", visible=False)
        axes[1].tick_params(labelleft=False)

    return bool(rows) and _figure(path, draw, columns=2, size=(9, 1.1 + 0.42 * len(rows)))


def families(path: Path, comparison: Mapping[str, Any], best: str) -> bool:
    """Accuracy by question family: base against the first generation and the best one."""
    shown = list(dict.fromkeys([comparison["order"][0], *comparison["order"][1:2], best]))
    systems = comparison["systems"]
    last = systems[shown[-1]]["families"]
    names = sorted(last, key=lambda name: (-(last[name]["mean"] or 0), name))
    marks = {0: "o", 1: "s", 2: "D"}

    def draw(axes: Any) -> None:
        for index, system in enumerate(shown):
            points = [systems[system]["families"].get(name, {}).get("mean") for name in names]
            known = [(100 * value, row) for row, value in enumerate(points) if value is not None]
            colour = (GREY, ORANGE, BLUE)[index]
            axes[0].scatter(
                *zip(*known, strict=True),
                s=46,
                color=colour,
                marker=marks[index],
                label=title(system),
                zorder=3,
            )
        for row, name in enumerate(names):
            values = [
                100 * systems[s]["families"][name]["mean"] for s in shown if name in systems[s]["families"]
            ]
            axes[0].plot([min(values), max(values)], [row, row], color="#cccccc", linewidth=2, zorder=2)
        axes[0].set(xlabel="Accuracy, %", xlim=(-2, 102), ylim=(len(names) - 0.4, -0.6))
        axes[0].set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axes[0].legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0))

    return bool(names) and _figure(path, draw, size=(8, 1.3 + 0.34 * len(names)))


def _figure(path: Path, draw: Callable[[Any], None], *, size: tuple[float, float], columns: int = 1) -> bool:
    """Draw on a fresh figure and save it with nothing that depends on the day or a version number."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, columns, figsize=size, squeeze=False, layout="constrained")
        draw(axes[0])
        figure.savefig(path, metadata={"Software": None})
        pyplot.close(figure)
    return True


def _bars(axis: Any, shares: Sequence[Mapping[str, Any]], colours: Sequence[str]) -> None:
    known = [(row, share) for row, share in enumerate(shares) if share["mean"] is not None]
    rows, means = [row for row, _ in known], [100 * share["mean"] for _, share in known]
    errors = [[100 * abs(share["mean"] - share[end]) for _, share in known] for end in ("low", "high")]
    axis.barh(rows, means, color=[colours[row] for row in rows], height=0.62)
    axis.errorbar(means, rows, xerr=errors, fmt="none", ecolor=INK, elinewidth=1.2, capsize=3)
    for row, share in known:
        axis.text(100 * share["high"] + 1.5, row, f"{100 * share['mean']:.1f}", va="center")
    axis.set_xlim(0, 112)
    axis.set_xticks(range(0, 101, 20))


def _line(
    axis: Any, shares: Sequence[Mapping[str, Any]], label: str, style: Mapping[str, str], shift: float
) -> None:
    known = [(x, share) for x, share in enumerate(shares) if share["mean"] is not None]
    if not known:
        return
    xs, means = [x + shift for x, _ in known], [100 * share["mean"] for _, share in known]
    errors = [[100 * abs(share["mean"] - share[end]) for _, share in known] for end in ("low", "high")]
    axis.errorbar(xs, means, yerr=errors, linewidth=2, elinewidth=1, capsize=3, label=label, **style)
    _legend_above(axis)


def _by_round(axis: Any, facts: Mapping[str, Any], key: str) -> None:
    """Chosen, all and rejected paths: three lines over the rounds."""
    for part, label, colour, mark in PATH_LINES:
        values = [(fact.get(key) or {}).get(part) for fact in facts.values()]
        known = [(x, value) for x, value in enumerate(values) if value is not None]
        if known:
            axis.plot(*zip(*known, strict=True), color=colour, marker=mark, linewidth=2, label=label)
    axis.set_xticks(range(len(facts)), [title(name) for name in facts])
    if axis.get_lines():
        _legend_above(axis)


def _legend_above(axis: Any) -> None:
    """Between the title and the axes, where no line runs through it."""
    axis.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2)


def _colour(system: str) -> str:
    return {"base": GREY, "multi_agent": ORANGE}.get(system, BLUE)
