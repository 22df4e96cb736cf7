"""What MLflow's registry holds, for the commands that ask where a model came from or what must be kept.

python -m flows.registered        # every registered version, its aliases and the md5s of its checkpoints
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.promote import Params
    from tasks.registry import Registry


class RegistryUnknown(RuntimeError):
    """The registry could not be asked."""


@dataclass(frozen=True)
class Registered:
    """A registered version. `checkpoints`: what the agent is for -> DVC's md5 of its checkpoint."""

    model: str
    number: str
    generation: str
    aliases: tuple[str, ...]
    checkpoints: dict[str, str]
    was_champion: bool = False

    @property
    def held(self) -> bool:
        """Whether somebody may want it back: an alias names it, or it was champion once. Every run registers
        its candidate, so that a version exists says nothing."""
        return self.was_champion or bool(self.aliases)

    @property
    def name(self) -> str:
        """`longview version 3 (champion)`."""
        return f"{self.model} version {self.number}" + (
            f" ({', '.join(self.aliases)})" if self.aliases else ""
        )


def settings(root: Path) -> Params:
    """What `promote` of params.yaml says: among it the model, and the alias of its champion. Defaults where a
    pipeline has no such section. Raises ParamsError."""
    from tasks import params, promote

    with chdir(root):
        return params.load("promote", promote.Params) if "promote" in params.read() else promote.Params()


def registry(root: Path) -> Registry | None:
    """The registry of this checkout, with the model and the alias that params.yaml names; to be asked from
    within the checkout. None: it has no store yet."""
    from tasks.registry import Registry

    if not _has_store():
        return None
    found = settings(root)
    return Registry(found.model, found.alias)


def client(root: Path) -> Any | None:
    """MLflow's client, also where LONGVIEW_TRACKING=off (that stops recording, not looking).

    None: this checkout has no store yet. Raises RegistryUnknown where there is one that cannot be asked.
    """
    from tasks import tracking

    with asking(root):
        return tracking.client() if _has_store() else None


@contextmanager
def asking(root: Path) -> Iterator[None]:
    """A block that asks MLflow, from within the checkout: whatever it raises is RegistryUnknown."""
    from tasks import tracking
    from tasks.params import ParamsError

    with chdir(root):
        try:
            yield
        except ParamsError as error:
            raise RegistryUnknown(f"which model is meant is not known: {error}") from error
        except Exception as error:  # a database's or a server's own: all mean the same here
            raise RegistryUnknown(f"MLflow at {tracking.tracking_uri()} cannot be asked: {error}") from error


def _has_store() -> bool:
    """False before the first run of a checkout with a store of its own."""
    from tasks import tracking

    uri = tracking.tracking_uri()
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).exists()


def versions(root: Path, found: Any | None) -> list[Registered]:
    """Every registered version of every model that Longview promoted; `found`: of `client(root)`.

    Raises RegistryUnknown.
    """
    if found is None:
        return []
    with asking(root):
        champion = settings(root).alias
        models = [model for page in _pages(found.search_registered_models) for model in page]
        return [
            _registered(version, _aliases(model, champion), _champions(model.tags))
            for model in models
            for page in _pages(found.search_model_versions, f"name = '{model.name}'")
            for version in page
        ]


def _pages(search: Any, *arguments: str) -> Any:
    token = None
    while True:
        page = search(*arguments, page_token=token)
        yield page
        token = page.token
        if not token:
            return


def _aliases(model: Any, champion: str) -> Mapping[str, str]:
    """The version number of each alias that names one."""
    from tasks.registry import meant

    return meant({alias: str(number) for alias, number in model.aliases.items()}, champion)


def _champions(tags: dict[str, str]) -> set[str]:
    """The versions that were champion, by the history that tasks/promotion.py keeps."""
    from tasks.registry import CHANGE

    changes = [json.loads(value) for key, value in tags.items() if key.startswith(CHANGE)]
    return {str(change[side]) for change in changes for side in ("before", "after") if change[side]}


def _registered(version: Any, aliases: Mapping[str, str], champions: set[str]) -> Registered:
    tags = version.tags
    named = {"reasoning": tags.get("checkpoint_md5"), "summary": tags.get("summary_md5")}
    return Registered(
        model=version.name,
        number=str(version.version),
        generation=tags.get("generation", ""),
        aliases=tuple(sorted(a for a, number in aliases.items() if number == str(version.version))),
        checkpoints={role: md5 for role, md5 in named.items() if md5},
        was_champion=str(version.version) in champions,
    )


def main() -> None:
    """Print the registry."""
    from flows.environment import root

    for version in versions(root(), client(root())):
        print(version.name, version.generation, version.checkpoints)


if __name__ == "__main__":
    main()
