"""What every benchmark shares: rows that say whether a target holds, tables, and the file they are saved to.

    python -m benchmarks.results            # print what benchmarks/results/ holds

A row is {"what", "value", "unit", "target", "holds"}; the last two are null where a figure is only shown.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NO_WORDS = (
    r"\((?:r|tm)\)|\b(?:intel|amd|cpu|processor|\d+-core)\b|@.*"  # of a model name: say nothing of speed
)


@dataclass(frozen=True)
class Row:
    """One figure. `target` is what the project promises of it in words ("≥ 7"), `holds` whether it does."""

    what: str
    value: float | None
    unit: str
    target: str | None = None
    holds: bool | None = None


@dataclass(frozen=True)
class Table:
    """Text cells under a head; the caption says how the figures were taken."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


def device(cpuinfo: str | None = None, cores: int | None = None) -> str:
    """This machine in plain words fit for a file name, such as 2-core-xeon-2.5ghz."""
    if cpuinfo is None:
        file = Path("/proc/cpuinfo")
        cpuinfo = file.read_text(encoding="utf-8") if file.is_file() else ""
    if cores is None:
        from flows.environment import cores as usable

        cores = usable()
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.M)
    name = named[1] if named else platform.processor() or platform.machine()
    words = re.sub(NO_WORDS, " ", name, flags=re.I).lower()
    said = re.search(r"([\d.]+)\s*ghz", name, re.I)
    measured = re.search(r"^cpu MHz\s*:\s*([\d.]+)$", cpuinfo, re.M)
    ghz = float(said[1]) if said else float(measured[1]) / 1000 if measured else None
    parts = [f"{cores}-core", *re.findall(r"[a-z0-9_.]+(?:-[a-z0-9_.]+)*", words)]
    return "-".join(parts + ([f"{ghz:.1f}ghz"] if ghz else []))


def commit(root: Path = ROOT) -> str:
    """The commit of the checkout, and whether tracked files differ from it."""
    differs = " with uncommitted changes" if uncommitted(root) else ""
    return _git(root, "rev-parse", "HEAD") + differs


def uncommitted(root: Path = ROOT) -> list[str]:
    """Tracked files that differ from the commit, in git's short form."""
    return _git(root, "status", "--porcelain", "--untracked-files=no").splitlines()


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def command(arguments: Sequence[str], root: Path = ROOT) -> str:
    """How this benchmark was called. Folders outside the checkout are named without where they lie."""
    module = Path(arguments[0]).stem
    return " ".join(["python -m", f"benchmarks.{module}", *(_shown(word, root) for word in arguments[1:])])


def _shown(word: str, root: Path) -> str:
    path = Path(word)
    if not path.is_absolute():
        return word
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def row_table(name: str, rows: Sequence[Row]) -> Table:
    """Every row that has a target, and whether it holds."""
    cells = [
        [row.what, _number(row.value), row.unit, str(row.target), "yes" if row.holds else "NO"]
        for row in rows
        if row.target is not None
    ]
    return Table(f"{name}: targets", ("What", "Value", "Unit", "Target", "Holds"), cells)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}"


def show(*tables: Table) -> None:
    """Print tables: as wide as the terminal, or as wide as they need where there is none."""
    from rich.console import Console
    from rich.table import Table as Drawn

    console = Console() if sys.stdout.isatty() else Console(width=200)
    for table in tables:
        drawn = Drawn(title=table.title, caption=table.caption or None, title_justify="left")
        for number, name in enumerate(table.head):
            drawn.add_column(name, justify="right" if number else "left")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)


def markdown(table: Table) -> str:
    """The table in Markdown."""
    rule = ["---", *["---:"] * (len(table.head) - 1)]
    lines = ["| " + " | ".join(line) + " |" for line in [table.head, rule, *table.rows]]
    return "\n".join([f"**{table.title}**", "", *lines, *(["", table.caption] if table.caption else []), ""])


def save(
    name: str, rows: Sequence[Row], tables: Sequence[Table], called: str, folder: Path = RESULTS
) -> Path:
    """Write <name>-<device>.json and the same tables as .md; return the first."""
    machine = device()
    found = {
        "name": name,
        "device": machine,
        "command": called,
        "commit": commit(),
        "rows": [asdict(row) for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{machine}.json"
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    head = f"`{called}` on {machine}, commit {found['commit']}\n\n"
    text = head + "\n".join(markdown(table) for table in tables)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return path


def finish(name: str, rows: Sequence[Row], tables: Sequence[Table], saved: bool) -> int:
    """Show the tables, save them if asked; the exit status is 1 if a target does not hold."""
    show(*tables)
    if saved:
        print(f"saved: {save(name, rows, tables, command(sys.argv)).relative_to(ROOT)}")
    missed = [row.what for row in rows if row.holds is False]
    print("every target holds" if not missed else "does not hold:\n  " + "\n  ".join(missed))
    return 1 if missed else 0


def main() -> None:
    """Show the saved results."""
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        show(row_table(f"{found['name']} on {found['device']}", [Row(**row) for row in found["rows"]]))


if __name__ == "__main__":
    main()
