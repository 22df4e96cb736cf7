"""What surrounds every stage: an empty output, scratch that survives a kill, a manifest, an MLflow run.

    with open_stage("judge", params=params, inputs=["artifacts/foundation"], out="artifacts/judge") as run:
        ...                                  # work in run.scratch, publish into run.out
        run.metrics({"loss": 0.3})           # out/metrics.json and MLflow

The manifest is written last: a folder with manifest.json is complete. It holds nothing that changes from run
to run: equal inputs and parameters give equal bytes. To see one: `python -m tasks.stage artifacts/judge`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from models.distributed import rank
from models.folders import drop
from tasks import tracking
from tasks.fingerprint import fingerprint, text_md5

WORK = Path(".work")
PUBLISHED = WORK / "published"
KEY = "LONGVIEW_STAGE_KEY"
"""What the stage runs on, if a flow started it (flows/published.py)."""
DECIMALS = 6


class StageError(RuntimeError):
    """A stage that must not publish its output; the message says what to do."""


class StageRun:
    """One execution of a stage: where it writes, and what it tells MLflow."""

    def __init__(self, name: str, out: Path, scratch: Path, recorder: tracking.Recorder | None) -> None:
        self.name, self.out, self.scratch = name, out, scratch
        self._recorder = recorder
        self._generations: list[dict[str, Any]] = []

    @property
    def first(self) -> bool:
        """Whether this is the process that publishes, of those that train together."""
        return rank() == 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send numbers to MLflow; the recorder gathers them into batches, so calling this often is cheap."""
        if self._recorder and metrics:
            values = {key: float(value) for key, value in metrics.items()}
            self._recorder.send("metrics", values=values, step=step, time_ms=int(time.time() * 1000))

    def metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write out/metrics.json (keys sorted, floats rounded) and log its numeric leaves. In the first
        process alone."""
        if not self.first:
            return
        rounded = round_floats(metrics)
        write_json(self.out / "metrics.json", rounded)
        self.log_metrics(numeric_leaves(rounded))

    def artifact(self, path: str | Path, under: str | None = None) -> None:
        """Keep a file or folder with the MLflow run once the stage succeeds."""
        if self._recorder:
            self._recorder.send("artifact", path=str(Path(path).resolve()), under=under)

    def generation(
        self, name: str, checkpoint: Path, *, round: int | None, parents: Sequence[str], kind: str
    ) -> None:
        """Declare a checkpoint of this stage: one logged model, whose weights stay in DVC.

        `kind` is its use: base, generator, judge, reasoning or summary. `parents` are names of generations.
        """
        self._generations.append(
            {"name": name, "checkpoint": checkpoint, "round": round, "parents": list(parents), "kind": kind}
        )

    def _publish(self, inputs: Mapping[str, str]) -> None:
        """Tell MLflow what the stage made: bytes by md5, generations, manifest and metrics as artifacts."""
        if not self._recorder:
            return
        version = data_version(inputs)
        for model in self._generations:
            path = Path(model.pop("checkpoint"))
            self._recorder.send(
                "model", **model, checkpoint=_relative(path), md5=fingerprint(path), data_version=version
            )
        parts = [self.out, *sorted(path for path in self.out.iterdir() if path.name != "manifest.json")]
        tags = {f"longview.out.{_relative(path)}": fingerprint(path) for path in parts}
        kept = [str((self.out / file).resolve()) for file in ("manifest.json", "metrics.json")]
        self._recorder.close(
            "FINISHED",
            tags=tags,
            out_md5=tags[f"longview.out.{_relative(self.out)}"],
            artifacts=[file for file in kept if Path(file).exists()],
        )


@contextmanager
def open_stage(
    name: str,
    *,
    params: object | dict,
    inputs: Sequence[str | Path],
    out: str | Path,
    round: int | None = None,
) -> Iterator[StageRun]:
    """Run the body as one stage: publish manifest and record on success, mark the record on failure.

    Raises StageError when an input is missing or changes while the stage runs, TrackingError when MLflow
    cannot record. In training processes other than the first (RANK above 0) it touches and records nothing.
    """
    name = name if round is None or "@" in name else f"{name}@r{round}"
    out, settings = Path(out), plain(params)
    if rank() > 0:
        scratch = _scratch(name, _fingerprints(inputs), settings)
        yield StageRun(name, out, scratch, None)
        return
    _check_present(inputs)
    recorder = tracking.connect() if tracking.enabled() else None
    before = _fingerprints(inputs)
    scratch = _scratch(name, before, settings)
    _empty(out)
    scratch.mkdir(parents=True, exist_ok=True)
    run = StageRun(name, out, scratch, recorder)
    try:
        if recorder:
            recorder.send("open", **_opening(name, round, settings, before))
        yield run
        _refuse_changes(before, _fingerprints(inputs))
        write_json(out / "manifest.json", manifest(name, before, settings, out))
        run._publish(before)
        _note_published(out)
    except BaseException as error:
        _close_failed(recorder, error)
        raise
    drop(scratch)


def _note_published(out: Path) -> None:
    """For a run that is killed before DVC has recorded the output: it need not be made again."""
    key, stage = os.environ.get(KEY), os.environ.get("DVC_STAGE")
    if key and stage:
        with suppress(OSError):  # a full disk: made again if need be
            PUBLISHED.mkdir(parents=True, exist_ok=True)
            write_json(PUBLISHED / f"{stage}.json", {"key": key, "md5": fingerprint(out)})


def manifest(name: str, inputs: Mapping[str, str], params: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """What the stage was given and made; `counts` are rows of .jsonl files, bytes of all else."""
    counts = {}
    for path in sorted(out.iterdir()):
        if path.is_dir():
            counts[f"{path.name}/"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        elif path.suffix == ".jsonl":
            with path.open("rb") as file:
                counts[path.name] = sum(1 for line in file if line.strip())
        elif path.name != "manifest.json":
            counts[path.name] = path.stat().st_size
    return {"stage": name, "inputs": dict(inputs), "params": dict(params), "counts": counts}


def settings(section: object, engines: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a stage obeys, for `open_stage(params=...)`: its section, the seed and the engines it asks."""
    from tasks import params

    return {**plain(section), "seed": params.seed(), **({"engines": dict(engines)} if engines else {})}


def plain(params: object | Mapping[str, Any]) -> dict[str, Any]:
    """Parameters (a dataclass or a mapping) as what JSON can hold."""
    if dataclasses.is_dataclass(params) and not isinstance(params, type):
        tree: Any = dataclasses.asdict(params)
    else:
        tree = params
    return json.loads(json.dumps(tree, default=str))


def round_floats(tree: Any) -> Any:
    """Every float rounded to 6 decimals; refuses numbers that JSON has no form for."""
    if isinstance(tree, Mapping):
        return {str(key): round_floats(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [round_floats(value) for value in tree]
    if hasattr(tree, "item") and not isinstance(tree, str | bytes):  # numpy scalars
        tree = tree.item()
    if isinstance(tree, float):
        if not math.isfinite(tree):
            raise StageError(f"a metric is {tree}: the stage computed nothing that can be compared")
        return round(tree, DECIMALS)
    return tree


def numeric_leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """{"reward": {"mean": 3}} as {"reward/mean": 3.0}; leaves that are no numbers are left out."""
    leaves: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves.update(numeric_leaves(value, f"{prefix}{key}/"))
        elif isinstance(value, int | float):
            leaves[f"{prefix}{key}"] = float(value)
    return leaves


def write_json(path: Path, value: Any) -> None:
    """Sorted, indented JSON that appears whole or not at all."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def data_version(inputs: Mapping[str, str]) -> str:
    """The md5 of data/: from the inputs, else from data.dvc; empty where there is neither."""
    if "data" in inputs:
        return inputs["data"]
    file = Path("data.dvc")
    match = re.search(r"md5: (\S+)", file.read_text(encoding="utf-8")) if file.is_file() else None
    return match.group(1) if match else ""


def _check_present(inputs: Sequence[str | Path]) -> None:
    missing = [str(path) for path in inputs if not Path(path).exists()]
    if missing:
        raise StageError(f"missing input: {', '.join(missing)}. Make it first: `dvc repro`, or `dvc pull`.")


def _fingerprints(inputs: Sequence[str | Path]) -> dict[str, str]:
    return {_relative(path): fingerprint(path) for path in sorted(map(Path, inputs))}


def _refuse_changes(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    changed = [path for path in before if before[path] != after[path]]
    if changed:
        raise StageError(
            f"{', '.join(changed)} changed while the stage ran: its output has no version. Run it again."
        )


def _scratch(name: str, inputs: Mapping[str, str], params: Mapping[str, Any]) -> Path:
    key = text_md5(json.dumps([inputs, params], sort_keys=True))
    return WORK / name / key[:16]


def _empty(out: Path) -> None:
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)


def _opening(name: str, round: int | None, params: dict[str, Any], inputs: dict[str, str]) -> dict[str, Any]:
    parent = os.environ.get("LONGVIEW_PARENT_RUN_ID")
    tags = {
        "mlflow.parentRunId": parent,
        "mlflow.source.name": " ".join(["python", *sys.orig_argv[1:]]) if "-m" in sys.orig_argv else name,
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": _commit(),
        "longview.stage": name,
        "longview.round": round,
        "longview.profile": _profile(),
        "longview.data_version": data_version(inputs),
        "longview.host": socket.gethostname(),
        "longview.pid": os.getpid(),
    }
    return {"stage": name, "round": round, "parent": parent, "params": params, "inputs": inputs, "tags": tags}


def _commit() -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    return None


def _profile(path: str = "params.yaml") -> str | None:
    with suppress(OSError):
        match = re.search(r"^profile:\s*(\S+)", Path(path).read_text(encoding="utf-8"), re.MULTILINE)
        return match.group(1) if match else None
    return None


def _close_failed(recorder: tracking.Recorder | None, error: BaseException) -> None:
    """Mark the run, without hiding why the stage failed."""
    if recorder and not isinstance(error, tracking.TrackingError):
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        with suppress(tracking.TrackingError, OSError):
            recorder.close(status, tags={"longview.error": f"{type(error).__name__}: {error}"})


def _relative(path: str | Path) -> str:
    return Path(os.path.relpath(path)).as_posix()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the manifests of stage outputs."""
    for out in sys.argv[1:] if arguments is None else arguments:
        print((Path(out) / "manifest.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
