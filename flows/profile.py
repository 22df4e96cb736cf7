"""Profiles: params.yaml = profiles/embedded.yaml + one overlay, with the rounds written out.

    python -m flows.profile embedded --rounds 3 [--force]        # what `longview run --profile` does first

Profile files say `rounds: 3` or, with the trainer of each, `rounds: [dpo, dpo, grpo]`; params.yaml carries
the map that DVC's `foreach` needs (no t - 1 there).
Comments of the embedded profile are kept. Edits made by hand in params.yaml are never lost without --force.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import io
import shutil
import sys
import typing
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DEFAULT = "embedded"
PAIRS = "dpo"
"""The section that trains a round, unless the profile names another."""
HEADER = """The active parameters. Edit freely: DVC reruns what an edit touches. Written from profiles/ by
    longview run --profile {name} --rounds {rounds}"""


class ProfileError(ValueError):
    """A profile that does not exist or does not fit, or params.yaml edits that would be lost."""


def available(root: Path) -> list[str]:
    """The names of the profiles that this checkout ships."""
    return sorted(p.stem for p in (root / "profiles").glob("*.yaml"))


def rounds_map(count: int, trainers: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """r1 starts from the reasoning agent, each later round from the one before. trainers: of the first
    rounds; those after them are trained on pairs."""
    if count < 1:
        raise ProfileError(f"rounds: expected 1 or more, found {count}")
    policies = ["artifacts/reasoning_sft"] + [f"artifacts/rounds/r{t}/dpo" for t in range(1, count)]
    named = [*trainers[:count], *[PAIRS] * (count - len(trainers))]
    return {
        f"r{t}": {"t": t, "policy": policy, "trainer": trainer}
        for t, (policy, trainer) in enumerate(zip(policies, named, strict=True), start=1)
    }


def trainers_of(rounds: Any) -> list[str]:
    """What trains each round: of a profile (`3`, or `[dpo, dpo, grpo]`), or of the map in params.yaml."""
    if isinstance(rounds, Mapping):
        return [entry.get("trainer", PAIRS) for entry in rounds.values()]
    return list(rounds) if isinstance(rounds, list) else [PAIRS] * int(rounds)


def build(root: Path, name: str, rounds: int | None = None) -> Any:
    """The parameters of a profile as a commented mapping, rounds written out."""
    base = _read(root, DEFAULT)
    if name != DEFAULT:
        _merge(base, _read(root, name), f"profiles/{name}.yaml")
    base["profile"] = name
    trainers = trainers_of(base["rounds"])
    base["rounds"] = rounds_map(len(trainers) if rounds is None else rounds, trainers)
    return base


def parse(root: Path, name: str | None = None, rounds: int | None = None) -> dict[str, Any]:
    """Every section of the named profile (None: of params.yaml as it is), parsed; nothing is written.

    Raises ParamsError at the first fault.
    """
    from tempfile import TemporaryDirectory

    from tasks.params import validate

    if name is None and rounds is None:
        return validate(root / "params.yaml")
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{name or 'params'}.yaml"
        name = name or str(_load(root / "params.yaml").get("profile", DEFAULT))
        _write(path, _dump(build(root, name, rounds)))
        return validate(path)


def activate(
    root: Path, name: str | None = None, rounds: int | None = None, *, force: bool = False
) -> list[str]:
    """Make params.yaml the named profile (None: the active one) with `rounds`; return the keys that changed.

    Without a new name only the rounds change and every edit stays. With one, edits made by hand are refused
    unless `force`, because they would be lost.
    """
    path = root / "params.yaml"
    current = _load(path) if path.exists() else None
    if current is not None and name in (None, current.get("profile")) and not force:
        return _set_rounds(path, current, rounds)
    if current is not None and not force:
        lost = edits(root, current)
        if lost:
            shown = "\n  ".join(lost)
            raise ProfileError(
                f"params.yaml carries edits that changing the profile would lose:\n  {shown}\n"
                "Move them to a file in profiles/, or pass --force to drop them."
            )
    target = build(root, name or (current or {}).get("profile", DEFAULT), rounds)
    changed = differences(current or {}, target)
    if changed:
        target.yaml_set_start_comment(HEADER.format(name=target["profile"], rounds=len(target["rounds"])))
        _write(path, _dump(target))
    return changed


def set_seed(root: Path, seed: int) -> list[str]:
    """Make `seed` the seed of params.yaml; return what changed. Every stage that draws runs again."""
    path = root / "params.yaml"
    current = _load(path)
    changed = differences(current.get("seed"), seed, "seed.")
    if changed:
        current["seed"] = seed
        _write(path, _dump(current))
    return changed


def drop_old_rounds(root: Path) -> list[str]:
    """Remove the folders of rounds that params.yaml no longer has (DVC's cache keeps them); say which."""
    kept, said = set(read_rounds(root)), []
    for folder in [*(root / "artifacts/rounds").glob("r*"), *(root / "artifacts/evaluate").glob("r*")]:
        if folder.name[1:].isdigit() and folder.name not in kept:
            said.append(f"{folder.relative_to(root)}: no longer a round, removed (DVC's cache keeps it)")
            shutil.rmtree(folder)
    return said


def read_rounds(root: Path) -> list[str]:
    """The names of the rounds in params.yaml."""
    return list(_load(root / "params.yaml").get("rounds") or {})


def edits(root: Path, current: Mapping[str, Any]) -> list[str]:
    """The keys in which params.yaml differs from the profile that it names."""
    name = str(current.get("profile", DEFAULT))
    if name not in available(root):
        return [f"profile: {name} (no such file in profiles/)"]
    return differences(build(root, name, len(current.get("rounds") or {})), current)


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose value differs, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(k for k in new if k not in old)]
        nested = (differences(old.get(k), new.get(k), f"{prefix}{k}.") for k in keys)
        return [line for lines in nested for line in lines]
    return [] if old == new else [f"{prefix.rstrip('.')}: {_short(old)} -> {_short(new)}"]


def _set_rounds(path: Path, current: Any, rounds: int | None) -> list[str]:
    if rounds is None or len(current.get("rounds") or {}) == rounds:
        return []
    before = current.get("rounds") or {}
    current["rounds"] = rounds_map(rounds, trainers_of(before))
    changed = differences(before, current["rounds"], "rounds.")
    _write(path, _dump(current))
    return changed


def _merge(base: Any, overlay: Mapping[str, Any], where: str, section: tuple[str, ...] = ()) -> None:
    """Keys that the embedded profile leaves to their defaults (`engines.reasoner.url`) may be named too."""
    for key, value in overlay.items():
        if key not in base:
            known = {*base, *fields(section)}
            if key not in known:
                close = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
                hint = f"; did you mean '{close[0]}'?" if close else ""
                raise ProfileError(f"{where}: '{key}' is not in profiles/{DEFAULT}.yaml{hint}")
        if isinstance(base.get(key), Mapping) and isinstance(value, Mapping):
            _merge(base[key], value, f"{where}: {key}", (*section, key))
        else:
            base[key] = value


def fields(section: tuple[str, ...]) -> list[str]:
    """The keys that the code knows of a section of params.yaml, e.g. ("engines", "reasoner"); none of one
    that belongs to no stage."""
    if not section or find_spec(f"tasks.{section[0]}") is None:
        return []
    kind: Any = getattr(import_module(f"tasks.{section[0]}"), "Params", None)
    for key in section[1:]:
        kind = typing.get_type_hints(kind).get(key) if dataclasses.is_dataclass(kind) else None
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _read(root: Path, name: str) -> Any:
    path = root / "profiles" / f"{name}.yaml"
    if not path.is_file():
        raise ProfileError(f"no profile '{name}'; there are: {', '.join(available(root)) or 'none'}")
    return _load(path)


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 110
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _load(path: Path) -> Any:
    from ruamel.yaml.error import YAMLError

    try:
        data = _yaml().load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise ProfileError(f"{path.name}: not valid YAML: {error}") from None
    if not isinstance(data, Mapping):
        raise ProfileError(f"{path.name}: expected a mapping of sections")
    return data


def _dump(data: Any) -> str:
    text = io.StringIO()
    _yaml().dump(data, text)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _short(value: Any) -> str:
    text = repr(dict(value)) if isinstance(value, Mapping) else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def main() -> None:
    """Write params.yaml for the named profile."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("profile", nargs="?")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    try:
        changed = activate(Path.cwd(), args.profile, args.rounds, force=args.force)
    except ProfileError as error:
        sys.exit(str(error))
    print("\n".join(changed) or "params.yaml: nothing to change")


if __name__ == "__main__":
    main()
