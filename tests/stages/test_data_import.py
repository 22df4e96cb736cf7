"""Own data becomes data/ under a real DVC: same bytes, nothing lost, nothing half done."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from models.records import read_jsonl, read_questions
from tasks import data_import
from tasks.data_import import ImportRefused, check, import_folder
from tasks.meter import meter


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    from dvc.repo import Repo

    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    root = tmp_path / "checkout"
    root.mkdir()
    Repo.init(str(root), no_scm=True).close()
    return root


def make_source(folder, count=40, answer="2", **extra):
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        Image.new("RGB", (40, 40), (number, 0, 9)).save(folder / "photos" / f"{number}.png")
        rows.append(
            {
                "id": number,
                "image": f"photos/{number}.png",
                "question": "How many?",
                "answer": answer,
                **extra,
            }
        )
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def add_line(source, row):
    with (source / "records.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def tree(root):
    """Everything a user has: data/ and its pointer."""
    paths = [*(root / "data").rglob("*"), root / "data.dvc"]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths if path.is_file()}


def dvc(root, *arguments):
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_gives_the_agreed_layout_and_version(checkout, tmp_path):
    source = make_source(tmp_path / "source")
    add_line(source, {"id": "bad", "image": "/etc/passwd", "question": "?", "answer": "x"})
    imported = import_folder(source, checkout)
    assert sorted(path.name for path in (checkout / "data").iterdir()) == [
        "images",
        "records.jsonl",
        "source.json",
    ]
    questions = read_questions(checkout / "data" / "records.jsonl")
    assert len(questions) == 40
    assert {name for question in questions for name in question.images} == {
        f"images/{path.name}" for path in (checkout / "data" / "images").iterdir()
    }
    origin = json.loads((checkout / "data" / "source.json").read_text(encoding="utf-8"))
    assert (origin["kind"], origin["questions"], origin["quarantined"]) == (
        "import",
        40,
        {"image outside the folder": 1},
    )
    (bad,) = read_jsonl(checkout / imported.quarantine)
    assert (bad["id"], bad["place"]) == ("bad", "records.jsonl:41")
    pointer = (checkout / "data.dvc").read_text(encoding="utf-8")
    assert imported.version in pointer and "kind: import" in pointer
    assert not any(str(tmp_path).encode() in data for data in tree(checkout).values())
    assert "up to date" in dvc(checkout, "status")


def test_the_same_folder_is_the_same_version_anywhere(checkout, tmp_path):
    source = make_source(tmp_path / "source")
    first = import_folder(source, checkout)
    moved = shutil.copytree(source, tmp_path / "elsewhere")
    again = import_folder(moved, checkout)
    assert (again.version, again.replaced) == (first.version, first.version)


def test_the_old_version_can_be_had_again(checkout, tmp_path):
    first = import_folder(make_source(tmp_path / "one"), checkout)
    before = tree(checkout)
    second = import_folder(make_source(tmp_path / "two", answer="3"), checkout)
    assert second.replaced == first.version != second.version
    shutil.copy(checkout / ".work" / "data_import" / f"{first.version}.pointer", checkout / "data.dvc")
    dvc(checkout, "checkout", "data.dvc")
    assert tree(checkout) == before


def test_data_that_dvc_does_not_have_is_never_replaced(checkout, tmp_path):
    source = make_source(tmp_path / "source")
    (checkout / "data").mkdir()
    (checkout / "data" / "mine.txt").write_text("precious")
    with pytest.raises(ImportRefused, match="dvc add data"):
        import_folder(source, checkout)
    assert (checkout / "data" / "mine.txt").read_text() == "precious"
    (checkout / "data" / "mine.txt").unlink()
    import_folder(source, checkout)
    (checkout / "data" / "mine.txt").write_text("precious")
    with pytest.raises(ImportRefused, match="dvc add data"):
        import_folder(source, checkout)
    assert (checkout / "data" / "mine.txt").read_text() == "precious"


def test_a_version_that_is_in_no_cache_is_put_there_first(checkout, tmp_path):
    first = import_folder(make_source(tmp_path / "one"), checkout)
    before = tree(checkout)
    shutil.rmtree(checkout / ".dvc" / "cache")
    import_folder(make_source(tmp_path / "two", answer="3"), checkout)
    shutil.copy(checkout / ".work" / "data_import" / f"{first.version}.pointer", checkout / "data.dvc")
    dvc(checkout, "checkout", "data.dvc")
    assert tree(checkout) == before


@pytest.mark.parametrize("bad", [40, 5])
def test_too_many_bad_records_change_nothing(checkout, tmp_path, bad):
    import_folder(make_source(tmp_path / "one"), checkout)
    before = tree(checkout)
    source = make_source(tmp_path / "two", answer="3")
    for number in range(bad):
        (source / "photos" / f"{number}.png").unlink()
    with pytest.raises(ImportRefused, match="image missing"):
        import_folder(source, checkout, max_bad_share=0.1)
    assert tree(checkout) == before
    assert len(list(read_jsonl(checkout / ".work" / "data_import" / "quarantine.jsonl"))) == bad


def test_sources_that_are_none(checkout, tmp_path):
    with pytest.raises(ImportRefused, match="does not exist"):
        import_folder(tmp_path / "none", checkout)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImportRefused, match="with records in"):
        import_folder(tmp_path / "empty", checkout)
    import_folder(make_source(tmp_path / "one"), checkout)
    with pytest.raises(ImportRefused, match="copy it elsewhere"):
        import_folder(checkout / "data", checkout)
    with pytest.raises(ImportRefused, match="dvc init"):
        import_folder(make_source(tmp_path / "one"), tmp_path)


def test_a_failing_dvc_leaves_everything_as_it_was(checkout, tmp_path, monkeypatch):
    from dvc.repo import Repo

    import_folder(make_source(tmp_path / "one"), checkout)
    before = tree(checkout)
    two = make_source(tmp_path / "two", answer="3")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(Repo, "add", fail)
    with pytest.raises(OSError, match="disk full"):
        import_folder(two, checkout)
    assert tree(checkout) == before


KILLED = """
import os, sys
from pathlib import Path
from tasks import data_import
kind, name = sys.argv[3].split(":")
if kind == "rename":
    real, left = Path.rename, [int(name)]
    def rename(self, target):
        if self.name in ("data", "new", "old"):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
        return real(self, target)
    Path.rename = rename
else:
    setattr(data_import, name, lambda *_: os._exit(9))
data_import.import_folder(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("where", ["rename:0", "rename:1", "rename:2", "call:_mark", "call:drop"])
def test_killed_anywhere_the_next_import_is_whole(checkout, tmp_path, where):
    old = import_folder(make_source(tmp_path / "one"), checkout)
    two = make_source(tmp_path / "two", answer="3")
    environment = os.environ | {"PYTHONPATH": str(Path(data_import.__file__).parents[1])}
    command = [sys.executable, "-c", KILLED, str(two), str(checkout), where]
    assert subprocess.run(command, env=environment).returncode == 9
    imported = import_folder(two, checkout)
    assert imported.replaced in (old.version, imported.version)
    assert "kind: import" in (checkout / "data.dvc").read_text(encoding="utf-8")
    assert {q.answer for q in read_questions(checkout / "data" / "records.jsonl")} == {"3"}
    leftovers = {path.name for path in (checkout / ".work" / "data_import").iterdir() if path.is_dir()}
    assert leftovers == set()


def test_data_in_use_is_not_replaced(checkout, tmp_path):
    """A stage that reads data holds DVC's read lock; here the living process is the parent of the test."""
    source = make_source(tmp_path / "one")
    import_folder(source, checkout)
    before = tree(checkout)
    lock = {"read": {str(checkout / "data"): [{"pid": os.getppid(), "cmd": "dvc repro"}]}, "write": {}}
    (checkout / ".dvc" / "tmp" / "rwlock").write_text(json.dumps(lock))
    with pytest.raises(ImportRefused, match="in use"):
        import_folder(make_source(tmp_path / "two", answer="3"), checkout)
    assert tree(checkout) == before


def test_a_stage_that_starts_while_images_are_read_is_not_disturbed(checkout, tmp_path, monkeypatch):
    import_folder(make_source(tmp_path / "one"), checkout)
    before, build = tree(checkout), data_import._build

    def build_while_a_stage_starts(*arguments):
        lock = {"read": {str(checkout / "data"): [{"pid": os.getppid(), "cmd": "dvc repro"}]}, "write": {}}
        (checkout / ".dvc" / "tmp" / "rwlock").write_text(json.dumps(lock))
        return build(*arguments)

    monkeypatch.setattr(data_import, "_build", build_while_a_stage_starts)
    monkeypatch.setattr(data_import, "_swap", lambda *_: pytest.fail("data/ was touched under a reader"))
    with pytest.raises(ImportRefused, match="in use"):
        import_folder(make_source(tmp_path / "two", answer="3"), checkout)
    assert tree(checkout) == before


def test_killed_before_the_kind_is_noted_the_data_still_counts_as_imported(checkout, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(data_import.__file__).parents[1])}
    one = make_source(tmp_path / "one")
    command = [sys.executable, "-c", KILLED, str(one), str(checkout), "call:_mark"]
    assert subprocess.run(command, env=environment).returncode == 9
    assert "kind" not in (checkout / "data.dvc").read_text(encoding="utf-8")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "r.jsonl").write_text("{}\n")
    with pytest.raises(ImportRefused, match="none of 1 records"):
        import_folder(tmp_path / "bad", checkout)
    assert "kind: import" in (checkout / "data.dvc").read_text(encoding="utf-8")


def test_images_of_records_set_aside_are_left_out(checkout, tmp_path):
    source = make_source(tmp_path / "source")
    Image.new("RGB", (40, 40), (0, 0, 200)).save(source / "photos" / "only.png")
    add_line(source, {"id": "x", "images": ["photos/only.png", "none.png"], "question": "?", "answer": "2"})
    import_folder(source, checkout)
    assert len(list((checkout / "data" / "images").iterdir())) == 40


def test_one_import_at_a_time(checkout, tmp_path):
    source = make_source(tmp_path / "one")
    with (
        data_import._exclusive(checkout / ".work" / "data_import"),
        pytest.raises(ImportRefused, match="another import"),
    ):
        import_folder(source, checkout)


def test_check_of_a_folder_and_of_data(checkout, tmp_path):
    source = make_source(tmp_path / "source", count=60)
    report = check(source)
    assert (report.questions, report.errors, report.images) == (60, [], 60)
    assert any("intervals will be wide" in warning for warning in report.warnings)
    assert any("perception" in warning for warning in report.warnings)
    assert report.answers["reasoning"] == [("2", 1.0)]
    import_folder(source, checkout)
    assert check(checkout / "data") == report


def test_check_finds_leaks_repeats_and_tiny_images(tmp_path):
    source = make_source(tmp_path / "source", split="train")
    Image.new("RGB", (8, 90)).save(source / "photos" / "tiny.png")
    add_line(
        source, {"id": "leak", "image": "photos/0.png", "question": "Why?", "answer": "x", "split": "test"}
    )
    add_line(source, {"id": "again", "image": "photos/0.png", "question": "how many", "answer": "3"})
    add_line(
        source, {"id": "tiny", "image": "photos/tiny.png", "question": "Why?", "answer": "x", "split": "test"}
    )
    report = check(source)
    assert (report.leaks, report.repeated, report.contradicting, report.tiny) == (1, 1, 1, 1)
    assert "no validation questions" in report.errors


def test_the_commands(checkout, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    source = make_source(tmp_path / "source", count=60)
    assert data_import.main([str(source), "--check"]) == 0
    assert data_import.main([str(source)]) == 0
    assert "is now version" in capsys.readouterr().out
    (source / "photos" / "0.png").write_bytes(b"[red]not an image[/]")
    assert data_import.main([str(source), "--check"]) == 1
    assert "image unreadable" in capsys.readouterr().out
    assert data_import.main([str(source)]) == 0
    assert "to go back:" in capsys.readouterr().out
    assert data_import.main([str(tmp_path / "none")]) == 1
    assert data_import.main([str(tmp_path / "none"), "--check"]) == 1


def test_the_meter_prints_rate_and_time_left_once_it_is_known(capsys):
    now = 0.0
    with meter("records", 100, clock=lambda: now) as advance:
        for now, number in [(50.0, 1), (61.0, 3), (72.0, 5), (80.0, 10)]:  # noqa: B007
            advance(number, number * 10)
    assert capsys.readouterr().err.splitlines() == [
        "1 records, 0.0/s",
        "3 records, 0.0/s, 38 s left",
        "5 records, 0.1/s, 28 s left",
        "10 records, 0.1/s",
    ]


def test_own_data_is_taught_without_boards_where_none_are_wanted(checkout, tmp_path):
    from models.mimicit import general_conversations
    from tasks import instruct

    import_folder(make_source(tmp_path / "source"), checkout)
    settings = instruct.Params(boards=0, demonstrations=0, graded=0)
    counts = instruct.run(settings, 0, checkout / "data", tmp_path / "instruct")
    asked = list(read_questions(checkout / "data/records.jsonl", split="train"))
    lessons = general_conversations(tmp_path / "instruct")
    assert counts["instructions"] == len(lessons) == len(asked) and counts["boards"] == 0
    assert (tmp_path / "instruct/graded.jsonl").read_text() == ""
