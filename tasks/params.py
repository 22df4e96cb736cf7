"""params.yaml at the boundary: each section becomes one frozen dataclass, or the run stops with the place.

python -m tasks.params params.yaml      # parse every section with its stage's Params
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
PARAMS_FILE = "params.yaml"
TOP_LEVEL = ("profile", "seed", "rounds")  # keys of params.yaml that are no stage's section


class ParamsError(ValueError):
    """A parameter file that does not have the agreed form; the message names file, section and key."""


def load(section: str, cls: type[T], path: str | Path = PARAMS_FILE) -> T:
    """The section (dots reach deeper: `dpo.loss`) as `cls`. Keys left out, here or in a section of it, keep
    the defaults of `cls`."""
    value: Any = read(path)
    for key in section.split("."):
        if not isinstance(value, Mapping) or key not in value:
            known = list(value) if isinstance(value, Mapping) else []
            raise ParamsError(f"{path}: no section '{section}'{_nearest(key, known)}")
        value = value[key]
    return typing.cast(T, parse(value, cls, f"{path}: {section}"))


def seed(path: str | Path = PARAMS_FILE) -> int:
    """The one seed of a run."""
    value = read(path).get("seed")
    if type(value) is not int:
        raise ParamsError(f"{path}: seed: expected an integer, found {value!r}")
    return value


def read(path: str | Path = PARAMS_FILE) -> dict[str, Any]:
    """The whole file as plain values (YAML 1.2, so `1e-5` is a number)."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        data = YAML(typ="safe", pure=True).load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(
            f"{path}: not found; run from the checkout's root, or `longview run --profile embedded`"
        ) from None
    except YAMLError as error:
        raise ParamsError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ParamsError(f"{path}: expected a mapping of sections, found {type(data).__name__}")
    return data


def parse(value: Any, kind: Any, where: str) -> Any:
    """`value` as the annotated type `kind`; `where` opens every error message."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(value, typing.cast(type, kind), where)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(value, arguments, where)
    if origin is typing.Literal:
        if value in arguments and type(value) in {type(a) for a in arguments}:
            return value
        raise ParamsError(
            f"{where}: expected one of {_list(arguments)}, found {value!r}{_nearest(value, arguments)}"
        )
    if origin in (list, tuple) or kind in (list, tuple):
        return _parse_sequence(value, origin or kind, arguments, where)
    if origin is dict or kind is dict:
        return _parse_dict(value, arguments, where)
    return _parse_scalar(value, kind, where)


def _parse_dataclass(value: Any, cls: type, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ParamsError(f"{where}: expected a section with keys, found {value!r}")
    kinds, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for key in value:
        if key not in fields:
            raise ParamsError(f"{where}: unknown key '{key}'{_nearest(key, list(fields))}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ParamsError(f"{where}: key '{name}' is missing")
    parsed = {}
    for key, item in value.items():
        parsed[key] = parse(item, kinds[key], f"{where}.{key}")
        make = fields[key].default_factory
        default = None if make is dataclasses.MISSING else make()
        if isinstance(item, Mapping) and dataclasses.is_dataclass(default) and not isinstance(default, type):
            given = {name: getattr(parsed[key], name) for name in item}
            parsed[key] = dataclasses.replace(default, **given)
    try:
        return cls(**parsed)
    except ValueError as error:  # a dataclass may check its own ranges in __post_init__
        raise ParamsError(f"{where}: {error}") from None


def _parse_union(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(k for k in kinds if k is not type(None))
    errors = []
    for kind in sorted(kinds, key=lambda k: k is not type(value)):  # an exact match first: int before float
        try:
            return parse(value, kind, where)
        except ParamsError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise ParamsError(f"{where}: expected {' or '.join(_name(k) for k in kinds)}, found {value!r}")


def _parse_sequence(value: Any, origin: Any, arguments: tuple[Any, ...], where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ParamsError(f"{where}: expected a list, found {value!r}")
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise ParamsError(f"{where}: expected {len(arguments)} values, found {len(value)}")
        kinds = arguments
    else:
        kinds = (arguments[0] if arguments else Any,) * len(value)
    return origin(
        parse(item, kind, f"{where}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
    )


def _parse_dict(value: Any, arguments: tuple[Any, ...], where: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise ParamsError(f"{where}: expected a mapping, found {value!r}")
    key_kind, item_kind = arguments or (Any, Any)
    return {
        parse(k, key_kind, f"{where} (key)"): parse(v, item_kind, f"{where}.{k}") for k, v in value.items()
    }


def _parse_scalar(value: Any, kind: Any, where: str) -> Any:
    if kind is Any or type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and type(value) is str:
        return Path(value)
    raise ParamsError(f"{where}: expected {_name(kind)}, found {value!r}")


def _name(kind: Any) -> str:
    words = {int: "an integer", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def _list(values: Any) -> str:
    return ", ".join(repr(v) for v in values)


def _nearest(name: Any, known: Any) -> str:
    names = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(sorted(names))}" if names else ""


@dataclasses.dataclass(frozen=True)
class Round:
    """One preference round: its number, where its policy lies (DVC cannot compute t - 1), and the section
    that trains it."""

    t: int
    policy: str
    trainer: typing.Literal["dpo", "grpo"] = "dpo"


def validate(path: str | Path = PARAMS_FILE, *, skip_missing: bool = False) -> dict[str, Any]:
    """Every section, parsed with the `Params` of `tasks.<section>`. Raises ParamsError at the first fault.

    With `skip_missing` a section whose module does not exist is left out instead of being an error.
    """
    data = read(path)
    parsed: dict[str, Any] = {"seed": seed(path)}
    if not isinstance(data.get("profile"), str):
        raise ParamsError(f"{path}: profile: expected a text, found {data.get('profile')!r}")
    parsed["rounds"] = _parse_rounds(data.get("rounds"), f"{path}: rounds")
    for section, value in data.items():
        if section in TOP_LEVEL:
            continue
        if importlib.util.find_spec(f"tasks.{section}") is None:
            if skip_missing:
                continue
            raise ParamsError(
                f"{path}: section '{section}' belongs to no stage{_nearest(section, _stage_modules())}"
            )
        cls = getattr(importlib.import_module(f"tasks.{section}"), "Params", None)
        if cls is None:
            raise ParamsError(f"{path}: section '{section}': tasks/{section}.py has no Params")
        parsed[section] = parse(value, cls, f"{path}: {section}")
    return parsed


def _parse_rounds(value: Any, where: str) -> dict[str, Round]:
    rounds = parse(value, dict[str, Round], where)
    for i, (name, entry) in enumerate(rounds.items(), start=1):
        if name != f"r{i}" or entry.t != i:
            raise ParamsError(
                f"{where}: rounds must be r1, r2, … with t: 1, 2, …; found {name} with t: {entry.t}"
            )
    return rounds


def _stage_modules() -> list[str]:
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_"))


def main() -> None:
    """Check the files named on the command line."""
    for path in sys.argv[1:] or [PARAMS_FILE]:
        try:
            validate(path)
        except ParamsError as error:
            sys.exit(str(error))
        print(f"{path}: every section is valid")


if __name__ == "__main__":
    main()
