"""MIMIC-IT files: what we write comes back with the same bytes, what others wrote never stops the reader."""

import base64
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from models import mimicit
from models.base64_images import ROW_GROUP, MimicItError, ParquetImages, decode_base64, write_parquet_images
from models.mimicit import Instruction, Meta, read_folder, read_set, write_folder

META = Meta("1", "2025-01-01", "Longview")


def png(shade):
    buffer = io.BytesIO()
    Image.new("L", (2, 2), shade).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = {f"img{number:03}": png(number) for number in range(ROW_GROUP + 6)}
ROWS = [
    Instruction("b", "Combien ?", "二", ["img001"], ["a"]),
    Instruction("a", "How many?", "2", ["img000", "img069"], ["b", "c"]),
    Instruction("c", "Which row?", "row 2", ["img001"]),
]


@pytest.mark.parametrize("image_format", ["parquet", "json"])
def test_what_is_written_comes_back(tmp_path, image_format):
    write_folder(tmp_path, ROWS, IMAGES, META, ["c", "a"], image_format=image_format)
    found = read_folder(tmp_path)
    assert found.instructions == {row.id: row for row in sorted(ROWS, key=lambda row: row.id)}
    assert dict(found.images) == IMAGES
    assert (found.meta, found.train_ids, found.problems) == (META, ["a", "c"], [])
    assert [row.id for row in found.context("a")] == ["b", "c"]
    assert found.summary() == {"instructions": 3, "images": 70, "train": 2}
    with pytest.raises(KeyError):
        found.images["none"]


@pytest.mark.parametrize("image_format", ["parquet", "json"])
def test_the_same_content_is_the_same_bytes_in_any_order_and_process(tmp_path, image_format):
    write_folder(tmp_path / "one", ROWS, IMAGES, META, image_format=image_format)
    backwards = dict(reversed(IMAGES.items()))
    code = "import pickle, sys; from models.mimicit import *; "
    code += "rows, images, meta = pickle.load(sys.stdin.buffer); "
    code += f"write_folder(sys.argv[1], rows, images, meta, image_format={image_format!r})"
    payload = pickle.dumps((ROWS[::-1], backwards, META))
    command = [sys.executable, "-c", code, str(tmp_path / "two")]
    subprocess.run(command, input=payload, cwd=Path(mimicit.__file__).parents[1], check=True)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_pandas_reads_our_images_and_we_read_those_of_pandas(tmp_path):
    import pandas as pd

    write_parquet_images(tmp_path / "ours.parquet", IMAGES)
    frame = pd.read_parquet(tmp_path / "ours.parquet")
    assert frame.index.name == "image_id"
    assert list(frame.columns) == ["base64"]
    assert base64.b64decode(frame.loc["img003"]["base64"]) == IMAGES["img003"]
    frame.index.name = None
    frame.to_parquet(tmp_path / "theirs.parquet")
    assert dict(ParquetImages(tmp_path / "theirs.parquet")) == IMAGES


def test_parquet_images_are_read_by_group_when_asked_for(tmp_path):
    write_parquet_images(tmp_path / "images.parquet", IMAGES)
    images = ParquetImages(tmp_path / "images.parquet", kept_bytes=1)
    read, real = [], images._file.read_row_group
    images._file.read_row_group = lambda group, **options: read.append(group) or real(group, **options)
    assert len(images) == 70 and "img069" in images and "none" not in images
    assert read == []
    assert [images[name] for name in ("img000", "img001", "img069", "img068")] == [
        IMAGES[name] for name in ("img000", "img001", "img069", "img068")
    ]
    assert read == [0, 1]


def test_an_empty_image_file_is_a_file(tmp_path):
    write_parquet_images(tmp_path / "images.parquet", {})
    assert dict(ParquetImages(tmp_path / "images.parquet")) == {}


@pytest.mark.parametrize(
    "encode",
    [
        base64.b64encode,
        base64.urlsafe_b64encode,
        lambda data: base64.urlsafe_b64encode(data).rstrip(b"="),
        base64.encodebytes,
        lambda data: b"data:image/png;base64," + base64.b64encode(data),
    ],
)
def test_every_base64_in_use_is_read(encode):
    data = bytes(range(256)) * 3 + b"\xfb\xff"
    assert decode_base64(encode(data).decode()) == data


@pytest.mark.parametrize("text", ["A", "AAAA*", "é", "AA=A"])
def test_what_is_no_base64_is_refused(text):
    with pytest.raises(MimicItError, match="not base64"):
        decode_base64(text)


@pytest.mark.parametrize(
    ("rows", "train", "message"),
    [
        ([*ROWS, ROWS[0]], None, "id of another"),
        ([Instruction("a", "?", "!", ["none"])], None, "no image"),
        ([Instruction("a", "?", "!", ["img001"], ["z"])], None, "no related"),
        (ROWS, ["z"], "train ids"),
    ],
)
def test_writing_is_strict(tmp_path, rows, train, message):
    with pytest.raises(MimicItError, match=message):
        write_folder(tmp_path, rows, IMAGES, META, train)
    assert list(tmp_path.iterdir()) == []


def entry(**fields):
    return {"instruction": "?", "answer": "!", "image_ids": ["i"], "rel_ins_ids": []} | fields


def read(tmp_path, data, images=None, train=None, **options):
    files = {
        "instructions": {"meta": {}, "data": data},
        "images": images or {"i": base64.b64encode(png(1)).decode()},
    }
    for name, value in (files | ({"train": train} if train is not None else {})).items():
        text = value if isinstance(value, str) else json.dumps(value)
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    train_file = tmp_path / "train.json" if train is not None else None
    return read_set(tmp_path / "instructions.json", tmp_path / "images.json", train_file, **options)


def test_dangling_ids_are_counted_and_left_out(tmp_path):
    data = {
        "good": entry(rel_ins_ids=["other", "gone", "good", "other", "blind"]),
        "other": entry(image_ids="i"),
        "blind": entry(image_ids=["i", "lost"]),
    }
    found = read(tmp_path, data, train={"good": ["gone", "other"], "gone": []})
    assert list(found.instructions) == ["good", "other"]
    assert found.train_ids == ["good"]
    assert found.instructions["good"].rel_ins_ids == ["other"]
    assert found.summary() == {
        "instructions": 2,
        "images": 1,
        "train": 1,
        mimicit.DANGLING_IMAGE: 1,
        mimicit.DANGLING_RELATED: 1,
        mimicit.DANGLING_TRAIN: 1,
    }
    without = read(tmp_path, data)
    assert without.train_ids == ["good", "other"]
    assert [p.detail for p in without.problems if p.reason == mimicit.DANGLING_RELATED] == ["gone", "blind"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("text", mimicit.NOT_AN_ENTRY),
        (None, mimicit.NOT_AN_ENTRY),
        (entry(answer=None), mimicit.NOT_AN_ENTRY),
        (entry(instruction=["?"]), mimicit.NOT_AN_ENTRY),
        (entry(image_ids=[]), mimicit.NO_IMAGE),
        (entry(image_ids=[1]), mimicit.NO_IMAGE),
        ({"instruction": "?", "answer": "!"}, mimicit.NO_IMAGE),
        (entry(image_ids=["I"]), mimicit.DANGLING_IMAGE),
    ],
)
def test_a_bad_entry_costs_itself(tmp_path, bad, reason):
    found = read(tmp_path, {"good": entry(), "bad": bad})
    assert list(found.instructions) == ["good"]
    assert [(problem.id, problem.reason) for problem in found.problems] == [("bad", reason)]


def test_odd_related_ids_count_as_none(tmp_path):
    found = read(
        tmp_path, {"a": entry(rel_ins_ids={"x": 1}), "b": entry(rel_ins_ids=None)}, train={"a": 3, "b": None}
    )
    assert [row.rel_ins_ids for row in found.instructions.values()] == [[], []]


def test_equal_keys_keep_the_first(tmp_path):
    text = json.dumps({"meta": {}, "data": {"a": entry(), "b": entry(answer="second")}}).replace('"b"', '"a"')
    (tmp_path / "instructions.json").write_text(text)
    (tmp_path / "images.json").write_text(json.dumps({"i": ""}))
    found = read_set(tmp_path / "instructions.json", tmp_path / "images.json")
    assert found.instructions["a"].answer == "!"
    assert found.summary()[mimicit.DUPLICATE] == 1


def test_broken_images_are_found_when_asked_to_decode(tmp_path):
    images = {"i": base64.b64encode(png(1)).decode(), "text": "bm8=", "junk": "*", "none": None}
    data = {name: entry(image_ids=[name]) for name in images}
    assert len(read(tmp_path, data, images).instructions) == 4
    found = read(tmp_path, data, images, decode=True)
    assert list(found.instructions) == ["i"]
    assert found.summary()[mimicit.BAD_IMAGE] == 3


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"data": []}', '{"meta": {}}'])
def test_a_file_that_is_something_else_is_named(tmp_path, text):
    (tmp_path / "instructions.json").write_text(text)
    (tmp_path / "images.json").write_text("{}")
    with pytest.raises(MimicItError, match=r"instructions\.json"):
        read_folder(tmp_path)


def test_a_parquet_file_that_is_something_else_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "text.parquet").write_text("no")
    pq.write_table(pa.table({"image": ["x"]}), tmp_path / "columns.parquet")
    for name in ("text", "columns", "missing"):
        with pytest.raises(MimicItError, match=name):
            ParquetImages(tmp_path / f"{name}.parquet")
    with pytest.raises(MimicItError, match="neither"):
        read_folder(tmp_path)
