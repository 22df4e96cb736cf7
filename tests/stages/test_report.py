"""The report from small hand-written results: pytest tests/stages/test_report.py."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tasks import compare, promote, report
from tasks.fingerprint import fingerprint
from tests.support.results_data import predictions, round_metrics, write_rounds, write_rows, write_system

SHARES = {"base": 0.40, "multi_agent": 0.58, "r1": 0.63, "r2": 0.68, "r3": 0.67}


def paths_of(number):
    """Two paths of one question: a right one the judge likes and a wrong one it does not."""
    steps = [
        {"title": "Read", "content": "Top row: 3, 5 and 1."},
        {"title": "Add", "content": f"3 + 5 + 1 = {number}."},
    ]
    shared = {"question_id": f"q{number}", "steps": steps, "text": "", "oracle": None}
    return [
        {**shared, "sample": 0, "answer": "top", "right": True, "score": 80 + number},
        {**shared, "sample": 1, "answer": "<b>bottom</b>", "right": False, "score": 20},
    ]


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A checkout in which every stage before the report has run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGVIEW_TRACKING", "off")
    write_rounds(1, 2, 3)
    for name, share in SHARES.items():
        rows = predictions(share, 0.9, share, reasons=name != "base")
        write_system(name, rows)
    records = []
    for number in range(6):
        path = Path(f"data/images/{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((48, 48), 90).point(lambda value: value // 2 + 100).save(path)
        records.append(
            {
                "id": f"q{number}",
                "images": [f"images/{number}.png"],
                "question": "Which row has the largest sum?",
                "answer": "top",
                "family": f"family_{number % 2}",
            }
        )
    write_rows("data/records.jsonl", records)
    for t in (1, 2, 3):
        write_rows(f"artifacts/rounds/r{t}/score/paths.jsonl", [row for n in range(6) for row in paths_of(n)])
    for name in ("judge", "assess"):
        Path(f"artifacts/{name}").mkdir()
        Path(f"artifacts/{name}/metrics.json").write_text(
            json.dumps({"agreement": round_metrics(1)["agreement"]})
        )
    compare.main()
    promote.main([])
    return tmp_path


def test_the_report_is_complete_self_contained_and_the_same_every_time(finished):
    report.main()
    html, text = (Path(f"artifacts/report/report.{kind}").read_text() for kind in ("html", "md"))
    files = {path.name for path in Path("artifacts/report/figures").iterdir()}
    drawn = {"ablation", "rounds", "length", "reasoning_answer", "agreement", "families"}
    assert files == {f"{name}.png" for name in drawn} | {f"example_{n}.png" for n in range(1, 5)}
    assert html.count("data:image/png;base64,") == len(files)
    assert "http" not in html and 'src="figures' not in html
    for file in files:
        assert f"(figures/{file})" in text
    assert "base answers 40.0% and round 2 68.0%" in text and "r2 passes the gate" in text
    assert "&lt;b&gt;bottom" in html and "<b>bottom" not in html
    flips = Path("artifacts/report/flips.html").read_text()
    assert "Multi-agent → Round 2: 40 test questions won, 0 lost" in text and 'href="flips.html"' in html
    assert flips.count("<article>") == 40 and "http" not in flips
    first = fingerprint("artifacts/report", cache=False)
    report.main()
    assert fingerprint("artifacts/report", cache=False) == first


def test_a_run_without_rounds_or_annotations_still_has_a_report(finished):
    rows = {name: predictions(SHARES[name], reasons=False) for name in ("base", "multi_agent")}
    comparison = compare.run(rows, {}, resamples=100, seed=0)
    decision = {**json.loads(Path("artifacts/promote/decision.json").read_text()), "candidate": "multi_agent"}
    out = Path("bare")
    report.run(comparison, decision, [], [], out=out, data_version="x", profile="tiny", seed=0, judge="rules")
    assert {path.name for path in (out / "figures").iterdir()} == {"ablation.png", "families.png"}
    assert "Example chains" not in (out / "report.html").read_text()


def test_examples_show_each_family_first_and_need_a_right_and_a_wrong_path():
    questions = {
        f"q{n}": {
            "id": f"q{n}",
            "images": ["a.png"],
            "question": "?",
            "answer": "top",
            "family": f"f{n // 3}",
        }
        for n in range(6)
    }
    paths = [row for n in range(6) for row in paths_of(n)]
    paths[1]["right"] = True  # q0: nothing wrong to show
    chosen = report.pick_examples(questions, paths, 3)
    assert [example["id"] for example in chosen] == ["q5", "q2", "q4"]
    assert [path["score"] for path in chosen[0]["paths"]] == [85, 20]
    assert report.pick_examples(questions, [], 3) == []


def test_an_image_outside_data_is_refused(finished):
    Image.new("RGB", (8, 8)).save("secret.png")
    with pytest.raises(ValueError, match="below data"):
        report._copy_image("../secret.png", Path("copy.png"))


def test_the_headline_says_when_a_difference_is_noise():
    rows = {"base": predictions(0.5), "multi_agent": predictions(0.5025)}
    assert "within what chance explains" in report.headline(
        compare.run(rows, {}, resamples=500, seed=0), "multi_agent"
    )
