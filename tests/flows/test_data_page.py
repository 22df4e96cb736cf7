"""`longview data diff --html`: a page of two real versions in DVC's cache, with their images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from flows import data, data_page, data_versions


def version(project: Path, records: list[tuple[str, str]], colour: str) -> str:
    """A new version of data/ with these ids and answers; every record has the one image."""
    (project / "data/images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 24), colour).save(project / "data/images/a.png")
    rows = [
        {
            "id": key,
            "question": f"<i>{key}</i>?",
            "answer": answer,
            "images": ["images/a.png"],
            "split": "train",
        }
        for key, answer in records
    ]
    (project / "data/records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "data"], cwd=project, check=True)
    return str(data.version(project))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    folder = tmp_path_factory.mktemp("data")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, check=True)
    first = version(folder, [("1", "no"), ("2", "no"), ("3", "yes")], "red")
    second = version(folder, [("1", "no"), ("2", "yes"), ("4", "a longer answer")], "blue")
    return folder, first, second


def test_the_page_has_counts_distributions_and_the_images_of_both(project: tuple[Path, str, str]) -> None:
    folder, first, second = project
    found = data_versions.diff(folder, first, second)
    page = data_page.page(folder, found)
    assert "3 → 3 records" in page and "Changed: " in page and "answer 1" in page and "image 2" in page
    assert "&lt;i&gt;4&lt;/i&gt;" in page and "<i>" not in page
    # One added, one removed, two changed with both sides: six images, of two kinds; nothing from elsewhere.
    pictures = [part.partition('"')[0] for part in page.split('src="')[1:]]
    assert len(pictures) == 6 and len(set(pictures)) == 2 and "http" not in page
    assert all(picture.startswith("data:image/png;base64,") for picture in pictures)
    assert 'aria-label="no: 2, then 1"' in page and "Length of the answer" in page


def test_lengths_are_counted_in_the_same_bins(project: tuple[Path, str, str]) -> None:
    folder, first, second = project
    found = data_versions.diff(folder, first, second).as_dict()["lengths"]["answer"]
    assert sum(part["before"] for part in found) == sum(part["after"] for part in found) == 3
    assert found[0] == {"from": 2, "to": 3, "before": 3, "after": 2} and found[-1]["after"] == 1
