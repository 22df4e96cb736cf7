"""Small hand-written evaluation results: predictions of any accuracy, and the metrics of a round.

from tests.support.results_data import predictions
"""

import json
from pathlib import Path

SIZES = {("test", "reasoning"): 400, ("test", "perception"): 200, ("validation", "reasoning"): 200}


def predictions(reasoning=0.5, perception=0.9, validation=0.5, *, reasons=True, ids=""):
    """Rows with the given shares right; right ones come first, so a better system has all a worse one has."""
    shares = dict(zip(SIZES, (reasoning, perception, validation), strict=True))
    rows = []
    for (split, kind), n in SIZES.items():
        for index in range(n):
            right = index < round(shares[split, kind] * n)
            thinks = reasons and kind == "reasoning"
            rows.append(
                {
                    "id": f"{ids}{split}-{kind}-{index}",
                    "set": kind,
                    "split": split,
                    "family": ("row_sum", "count", "parity")[index % 3] if kind == "reasoning" else "read",
                    "image": f"images/{index % 4}.png",
                    "question": f"Which row has the largest sum ({index})?",
                    "truth": "top",
                    "answer": "top" if right else "bottom",
                    "right": right,
                    "reasoning": f"Read: the cells. Sum: row {index}." if thinks else None,
                    "reasoning_answer": ("top" if index % 5 else "bottom") if thinks else None,
                    "reasoning_right": bool(index % 5) if thinks else None,
                    "reasoning_tokens": 40 + index % 7 if thinks else 0,
                    "failure": "unparsable" if index == n - 1 and not right else None,
                }
            )
    return rows


def round_metrics(t):
    """score/metrics.json of round t."""
    reward = {
        "mean": 50.0 + 5 * t,
        "chosen_mean": 70.0 + t,
        "rejected_mean": 30.0 - t,
        "margin_mean": 40.0 + 2 * t,
    }
    return {
        "questions": 300,
        "paths": 1180,
        "failed": 20,
        "right_share": 0.5 + 0.05 * t,
        "reward": reward,
        "length": {"mean": 60.0 - 3 * t, "chosen_mean": 62.0 - 3 * t, "rejected_mean": 57.0 - 3 * t},
        "pairs": {"kept": 120, "dropped": {"all_right": 100, "all_wrong": 60, "tie": 20}},
        "agreement": {"auc": 0.8 + 0.01 * t, "rank_correlation": 0.45, "questions": 210},
    }


def write_rows(path, rows):
    """Rows as JSON lines."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_system(name, rows, checkpoint_md5="0" * 32 + ".dir", summary_md5="5" * 32 + ".dir"):
    """artifacts/evaluate/<name> as the stage leaves it."""
    folder = Path("artifacts/evaluate") / name
    write_rows(folder / "predictions.jsonl", rows)
    path = {"base": "artifacts/foundation", "multi_agent": "artifacts/reasoning_sft"}.get(
        name, f"artifacts/rounds/{name}/dpo"
    )
    inputs = {path: checkpoint_md5, "artifacts/summary_sft/checkpoint": summary_md5}
    (folder / "manifest.json").write_text(json.dumps({"stage": f"evaluate@{name}", "inputs": inputs}))


def write_rounds(*numbers):
    """artifacts/rounds/<round>/score/metrics.json, and params.yaml with these rounds."""
    lines = ["profile: tiny", "seed: 0", "compare: {}", "promote: {}", "report: {}", "rounds:"]
    for t in numbers:
        path = Path(f"artifacts/rounds/r{t}/score/metrics.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(round_metrics(t)))
        lines += [f"  r{t}:", f"    t: {t}", "    policy: artifacts/reasoning_sft"]
    Path("params.yaml").write_text("\n".join(lines) + "\n")
