"""The report a reader opens first: results, figures and example chains, as Markdown and as one HTML file.

    python -m tasks.report

Writes artifacts/report/report.md, report.html (self-contained), figures/*.png and flips.html (the questions
that the rounds turned right or wrong, with image and chains), and keeps all with the MLflow run. Nothing in
them depends on the day, the machine or a run id: equal results give equal bytes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import results
from models.records import read_jsonl
from tasks import figures, flips, params
from tasks.stage import data_version, open_stage

DATA, ROUNDS, OUT = Path("data"), Path("artifacts/rounds"), Path("artifacts/report")
EVALUATE, FLIPS = Path("artifacts/evaluate"), "flips.html"
COMPARISON, DECISION = Path("artifacts/compare/comparison.json"), Path("artifacts/promote/decision.json")
AGREEMENTS = {
    "judge, held out": Path("artifacts/judge/metrics.json"),
    "assess": Path("artifacts/assess/metrics.json"),
}
IMAGE_PIXELS = 384
MAX_SOURCE_PIXELS = 50_000_000
MAX_TEXT = 600


@dataclass(frozen=True)
class Params:
    """examples: how many questions to show with their chains."""

    examples: int = 4


@dataclass(frozen=True)
class Figure:
    """One figure: its file, how it is drawn (False: nothing to draw), and what it says."""

    file: str
    title: str
    caption: str
    draw: Callable[[Path], bool]


def run(
    comparison: Mapping[str, Any],
    decision: Mapping[str, Any],
    agreements: Sequence[Mapping[str, Any]],
    examples: Sequence[Mapping[str, Any]],
    *,
    out: Path,
    data_version: str,
    profile: str,
    seed: int,
    judge: str,
    flipped: str = "",
) -> None:
    """Draw and write the report into `out`. `examples` come from `pick_examples`, `flipped` from
    `write_flips`."""
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    best = decision["candidate"]
    shown = [figure for figure in _figures(comparison, agreements, best) if figure.draw(folder / figure.file)]
    pictured = [_pictured(example, folder, number) for number, example in enumerate(examples, start=1)]
    values = {
        "headline": headline(comparison, best),
        "cards": _cards(comparison, best),
        "decision": decision,
        "results": results.table_rows(comparison, figures.title, best),
        "table": results.table(comparison),
        "figures": [
            {"file": f.file, "title": f.title, "caption": f.caption, "uri": _uri(folder / f.file)}
            for f in shown
        ],
        "families": _families(comparison),
        "rounds": [_round_row(name, facts) for name, facts in comparison["rounds"].items()],
        "examples": pictured,
        "examples_round": figures.title(list(comparison["rounds"])[-1]).lower()
        if comparison["rounds"]
        else "",
        "data_version": data_version,
        "profile": profile,
        "seed": seed,
        "judge": judge,
        "flipped": flipped,
    }
    for name in ("report.md", "report.html"):
        (out / name).write_text(_render(f"{name}.j2", values), encoding="utf-8")


def headline(comparison: Mapping[str, Any], best: str) -> str:
    """One sentence: from base to the best generation, and whether the difference is beyond noise."""
    system, base = comparison["systems"][best], comparison["systems"]["base"]
    difference = system["against"].get("base", {}).get("reasoning")
    if not difference or difference["mean"] is None:
        return "There are no reasoning test questions to compare the systems on."
    sure = difference["low"] > 0 or difference["high"] < 0
    return (
        f"On {difference['n']:,} unseen reasoning questions, base answers "
        f"{100 * base['accuracy']['reasoning']['mean']:.1f}% and {figures.title(best).lower()} "
        f"{100 * system['accuracy']['reasoning']['mean']:.1f}%: {results.points(difference)} points, "
        f"{'beyond' if sure else 'within'} what chance explains."
    )


def pick_examples(
    questions: Mapping[str, Mapping[str, Any]], paths: Sequence[Mapping[str, Any]], count: int
) -> list[dict[str, Any]]:
    """Questions with a right and a wrong path: families in turn, scores furthest apart first, and of equal
    ones the longest right chain."""
    by_question: dict[str, list[Mapping[str, Any]]] = {}
    for path in paths:
        if path.get("score") is not None and path["question_id"] in questions:
            by_question.setdefault(path["question_id"], []).append(path)
    found = []
    for name, own in by_question.items():
        best, worst = _extremes(own)
        if best["right"] and not worst["right"]:
            found.append((best["score"] - worst["score"], name, best, worst))
    found.sort(key=lambda item: (-item[0], -len(item[2]["steps"]), item[1]))
    seen: dict[str | None, int] = {}
    turns = []
    for _, name, _, _ in found:
        family = questions[name].get("family")
        seen[family] = seen.get(family, 0) + 1
        turns.append(seen[family])
    in_turn = sorted(range(len(found)), key=lambda place: (turns[place], place))[:count]
    return [_example(questions[name], best, worst) for _, name, best, worst in (found[i] for i in in_turn)]


def write_flips(comparison: Mapping[str, Any], best: str, out: Path) -> str:
    """Write the page of the questions that flipped between the agents before any round (base, if none was
    better) and the best generation; returns a sentence about it, empty if there is nothing to compare."""
    order = comparison["order"]
    if best not in order[1:]:
        return ""
    before = order[1] if best in order[2:] else order[0]
    rows = {name: list(read_jsonl(EVALUATE / name / "predictions.jsonl")) for name in (before, best)}
    found = flips.flips(rows[before], rows[best])
    titles = figures.title(before), figures.title(best)
    (out / FLIPS).write_text(flips.page(found, *titles, flips.source_of(DATA)), encoding="utf-8")
    return f"{titles[0]} → {titles[1]}: {len(found.won):,} test questions won, {len(found.lost):,} lost."


def _extremes(paths: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    ranked = sorted(
        paths, key=lambda path: (path["score"], bool(path["right"]), len(path["steps"]), path["sample"])
    )
    return ranked[-1], ranked[0]


def _example(question: Mapping[str, Any], *paths: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": question["id"],
        "image": question["images"][0] if question["images"] else None,
        "question": question["question"],
        "truth": question["answer"],
        "paths": [
            {
                "right": path["right"],
                "answer": " ".join(_short(path["answer"]).split()),
                "score": path["score"],
                "steps": [{key: _short(step[key]) for key in ("title", "content")} for step in path["steps"]],
            }
            for path in paths
        ],
    }


def _pictured(example: Mapping[str, Any], folder: Path, number: int) -> dict[str, Any]:
    file = f"example_{number}.png"
    _copy_image(example["image"], folder / file)
    return {**example, "file": file, "uri": _uri(folder / file)}


def _copy_image(name: str | None, target: Path) -> None:
    """The question's image as a readable PNG: small boards enlarged by whole factors, photos reduced."""
    from PIL import Image

    source = (DATA / (name or "")).resolve()
    if not source.is_relative_to(DATA.resolve()) or not source.is_file():
        raise ValueError(f"image {name!r} of an example is not a file below data/")
    with Image.open(source) as image:
        if image.width * image.height > MAX_SOURCE_PIXELS:
            raise ValueError(
                f"image {name!r} has {image.width}x{image.height} pixels: too large for the report"
            )
        picture = image.convert("RGB")
    if factor := IMAGE_PIXELS // max(picture.size):
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    else:
        picture.thumbnail((IMAGE_PIXELS, IMAGE_PIXELS))
    picture.save(target, format="PNG")


def _figures(
    comparison: Mapping[str, Any], agreements: Sequence[Mapping[str, Any]], best: str
) -> list[Figure]:
    return [
        Figure(
            "ablation.png",
            "Accuracy of every system",
            "Share of right answers on unseen images; whiskers are 95% intervals. Base answers directly; "
            "multi-agent reasons first and summarises with a second model; each round trains the reasoning "
            "agent on its own paths.",
            lambda path: figures.ablation(path, comparison),
        ),
        Figure(
            "rounds.png",
            "Accuracy and reward by round",
            "Left: each generation on test questions and on the validation questions that choose among them. "
            "Right: what the judge gives the paths each round sampled, of questions with right and wrong "
            "ones (a judge by rules gives 100 or 1). Reward that rises while accuracy does not is a judge "
            "being pleased, not an agent being right.",
            lambda path: figures.rounds(path, comparison),
        ),
        Figure(
            "length.png",
            "Length by round",
            "Preference training can reward length itself. Left: reasoning on held-out questions. Right: the "
            "whole paths sampled for training (with score.scope: step, a pair trains on less). Chosen far "
            "longer than rejected: working out is rewarded, or mere length; the accuracy beside it tells.",
            lambda path: figures.length(path, comparison),
        ),
        Figure(
            "reasoning_answer.png",
            "Reasoning against answer",
            "What the summary agent makes of the reasoning it is given: answers it saves from wrong "
            "reasoning, and answers it loses although the reasoning was right.",
            lambda path: figures.reasoning_answer(path, comparison),
        ),
        Figure(
            "agreement.png",
            "Agreement of judge and truth",
            "Left: chance that a right path scores above a wrong one (0.5 is a coin); empty for a judge by "
            "rules, which scores by the answers themselves. Right: correlation of scores with the oracle's, "
            "which knows what the image shows and counts false steps and a wrong answer (0 is none).",
            lambda path: figures.agreement(path, agreements),
        ),
        Figure(
            "families.png",
            "Accuracy by question family",
            "Reasoning test questions by kind: base, the first and the best generation; sorted by the best.",
            lambda path: figures.families(path, comparison, best),
        ),
    ]


def _cards(comparison: Mapping[str, Any], best: str) -> list[dict[str, str]]:
    cards = []
    for name in ("base", best):
        share = comparison["systems"][name]["accuracy"]["reasoning"]
        if share["mean"] is not None:
            cards.append(
                {"value": f"{100 * share['mean']:.1f}%", "label": f"{figures.title(name)}, reasoning"}
            )
    for key in ("reasoning", "perception"):
        difference = comparison["systems"][best]["against"].get("base", {}).get(key)
        if difference and difference["mean"] is not None:
            label = f"points on {key} ({100 * difference['low']:+.1f} to {100 * difference['high']:+.1f})"
            cards.append({"value": f"{100 * difference['mean']:+.1f}", "label": label})
    return cards


def _families(comparison: Mapping[str, Any]) -> dict[str, Any]:
    names, systems = comparison["order"], comparison["systems"]
    rows = []
    for family, share in systems[names[0]]["families"].items():
        cells = [systems[name]["families"].get(family, {}).get("mean") for name in names]
        shown = ["–" if cell is None else f"{100 * cell:.1f}" for cell in cells]
        rows.append({"name": family.replace("_", " "), "n": share["n"], "cells": shown})
    return {"systems": [figures.title(name) for name in names], "rows": rows}


def _round_row(name: str, facts: Mapping[str, Any]) -> dict[str, str]:
    pairs, right = facts.get("pairs") or {}, facts.get("right_share")
    dropped = ", ".join(
        f"{n} {why.replace('_', ' ')}" for why, n in sorted((pairs.get("dropped") or {}).items())
    )
    row = {key: _number(facts.get(key)) for key in ("questions", "paths", "failed")}
    return {
        "name": figures.title(name),
        **row,
        "right": "–" if right is None else f"{100 * right:.1f}%",
        "kept": _number(pairs.get("kept")),
        "dropped": dropped or "–",
        **{key: _number((facts.get(key) or {}).get("mean"), ".1f") for key in ("reward", "length")},
    }


def _number(value: float | None, form: str = ",") -> str:
    return "–" if value is None else format(value, form)


def _short(text: str) -> str:
    text = text.replace("```", "'''")
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT].rstrip() + " …"


def _uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _render(template: str, values: Mapping[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def read_agreements(rounds: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The judge's agreement with the truth, where a stage could measure it, in the order of the pipeline."""
    found = [(stage, _json(path).get("agreement")) for stage, path in AGREEMENTS.items() if path.exists()]
    found += [(figures.title(name).lower(), facts.get("agreement")) for name, facts in rounds.items()]
    rows = [{"stage": stage, **agreement} for stage, agreement in found if agreement]
    return [row for row in rows if row.get("auc") is not None or row.get("rank_correlation") is not None]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    """Run the stage on this checkout."""
    settings, profile = params.load("report", Params), str(params.read()["profile"])
    comparison, decision = _json(COMPARISON), _json(DECISION)
    scores = [ROUNDS / name / "score" for name in comparison["rounds"]]
    inputs = [DATA, COMPARISON.parent, DECISION.parent, *scores, *filter(Path.exists, AGREEMENTS.values())]
    inputs += [EVALUATE / name for name in comparison["order"]]
    with open_stage("report", params=settings, inputs=inputs, out=OUT) as stage:
        questions = {row["id"]: row for row in read_jsonl(DATA / "records.jsonl")}
        paths = list(read_jsonl(scores[-1] / "paths.jsonl")) if scores else []
        run(
            comparison,
            decision,
            read_agreements(comparison["rounds"]),
            pick_examples(questions, paths, settings.examples),
            out=stage.out,
            data_version=data_version({}) or "untracked",
            profile=profile,
            seed=params.seed(),
            judge=str(params.read().get("judge", {}).get("kind", "model")),
            flipped=write_flips(comparison, decision["candidate"], stage.out),
        )
        stage.artifact(stage.out / "report.html")
        stage.artifact(stage.out / "report.md")
        if (stage.out / FLIPS).exists():
            stage.artifact(stage.out / FLIPS)
        stage.artifact(stage.out / "figures", under="figures")
    print(f"{OUT / 'report.html'}\n\n{headline(comparison, decision['candidate'])}\n{decision['reason']}")


if __name__ == "__main__":
    main()
