"""dvc.lock written whole, by the C parts of DVC's own YAML library.

DVC rewrites the file after each stage with ruamel.yaml's round-trip mode, which keeps comments: a second for
26 stages, more than all else it does for a stage. dvc.lock has no comments. DVC also writes it in place, so
that a kill in that instant cuts it in half; here the new file takes the place of the old one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAME = "dvc.lock"


def install() -> None:
    """Let DVC, in this process, write dvc.lock this way."""
    from dvc import dvcfile

    theirs = dvcfile.modify_yaml

    @contextmanager
    def modify_yaml(path: str, fs: Any = None) -> Iterator[Any]:
        with modify(Path(path)) if Path(path).name == NAME else theirs(path, fs=fs) as content:
            yield content

    dvcfile.modify_yaml = modify_yaml


@contextmanager
def modify(path: Path) -> Iterator[dict[str, Any]]:
    """The content of the file, empty if there is none; what the block makes of it is written."""
    yaml = _yaml()
    content = (yaml.load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
    yield content
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        yaml.dump(content, file)
    part.replace(path)


def _yaml() -> Any:
    """ruamel's safe mode, which is in C, laid out like its round-trip mode: only `null` is written out."""
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import SafeRepresenter

    class Representer(SafeRepresenter):
        """DVC's entries are OrderedDicts."""

    Representer.add_representer(OrderedDict, Representer.represent_dict)
    yaml: Any = YAML(typ="safe")
    yaml.Representer = Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    return yaml
