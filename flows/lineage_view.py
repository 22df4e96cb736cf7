"""A chain as a tree for the terminal, as JSON, and as a graph in Mermaid's or Graphviz's language.

longview explain champion --mermaid > lineage.mmd
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from flows.lineage import Artifact, Chain, Step, overlap


def as_json(chain: Chain, verified: list[Any] | None = None) -> str:
    """Everything that is known, with the findings of `--verify` if it was asked for."""
    findings = {} if verified is None else {"verify": [asdict(finding) for finding in verified]}
    return json.dumps({**asdict(chain), **findings}, indent=2, sort_keys=True, ensure_ascii=False)


def as_tree(chain: Chain, *, full: bool = False) -> Any:
    """A rich tree: each artifact over what made it; what is shown already is named with `(above)`."""
    from rich.markup import escape
    from rich.tree import Tree

    top = Tree(f"[bold]{escape(chain.asked)}[/]  as of {chain.source}")
    shown: set[str] = set()
    for target in chain.targets:
        _grow(top, target, chain, shown, full)
    return top


def _grow(tree: Any, read: Artifact, chain: Chain, shown: set[str], full: bool) -> None:
    makers = [step for step in chain.steps if any(overlap(out.path, read.path) for out in step.makes)]
    label = f"[cyan]{read.path}[/]  {read.md5[:12] or 'md5 not known here'}{_size(read)}"
    if chain.data and overlap(read.path, chain.data.path):
        same = "" if read.path == chain.data.path else f" of {chain.data.md5}"
        tree.add(f"{label}  [green]data version{same}[/]")
        return
    branch = tree.add(label)
    for step in makers:
        if step.stage in shown:
            branch.add(f"[dim]{step.stage} (above)[/]")
            continue
        shown.add(step.stage)
        below = branch.add("\n".join(_facts(step, full)))
        for each in step.reads:
            _grow(below, each, chain, shown, full)


def _facts(step: Step, full: bool) -> Iterator[str]:
    from rich.markup import escape

    yield f"[bold]{step.stage}[/]  {escape(step.command)}"
    where = f"{step.run or 'no run version'}" + (f", commit {step.commit[:12]}" if step.commit else "")
    if step.mlflow:
        where += f", MLflow run {step.mlflow.run_id}, {step.mlflow.when}"
    yield f"[dim]executed[/] {where}"
    yield f"[dim]code[/]     {len(step.code)} files, {step.code_md5[:12]}"
    if full:
        yield from (f"         {file.path}  {file.md5[:12]}" for file in step.code)
    text = json.dumps(step.params, ensure_ascii=False)
    if step.params:
        yield f"[dim]obeyed[/]   {escape(text if full or len(text) < 100 else text[:99] + '… (--full)')}"


def _size(made: Artifact) -> str:
    return "" if made.size is None else f", {readable(made.size)}"


def readable(size: float) -> str:
    """Bytes as a person reads them: `1.5 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def as_mermaid(chain: Chain) -> str:
    """A flowchart, data on top: artifacts as boxes, stages as rounded ones."""
    nodes, edges = _graph(chain)
    lines = [
        f'  {key}{"([" if stage else "["}"{label}"{"])" if stage else "]"}'
        for key, (label, stage) in nodes.items()
    ]
    return "\n".join(["flowchart TD", *lines, *(f"  {a} --> {b}" for a, b in edges)])


def as_dot(chain: Chain) -> str:
    """The same for Graphviz: `longview explain r3 --dot | dot -Tsvg`."""
    nodes, edges = _graph(chain)
    lines = [
        f'  {key} [label="{label}", shape={"ellipse" if stage else "box"}];'
        for key, (label, stage) in nodes.items()
    ]
    return "\n".join(["digraph lineage {", *lines, *(f"  {a} -> {b};" for a, b in edges), "}"])


def _graph(chain: Chain) -> tuple[dict[str, tuple[str, bool]], list[tuple[str, str]]]:
    """Nodes (key -> label, whether it is a stage) and edges, producer to consumer."""
    nodes: dict[str, tuple[str, bool]] = {}
    keys: dict[tuple[str, bool], str] = {}
    edges: dict[tuple[str, str], None] = {}

    def node(name: str, label: str, stage: bool) -> str:
        key = keys.setdefault((name, stage), f"n{len(keys)}")
        nodes.setdefault(key, (label.replace('"', "'"), stage))
        return key

    def box(made: Artifact) -> str:
        return node(made.path, f"{made.path} {made.md5[:8]}", False)

    made = [out for step in chain.steps for out in step.makes]
    for step in chain.steps:
        stage = node(step.stage, f"{step.stage} {step.run or ''}".strip(), True)
        for read in step.reads:
            within = [out for out in made if overlap(out.path, read.path)] or [read]
            edges.update({(box(each), stage): None for each in within})
        edges.update({(stage, box(out)): None for out in step.makes})
    return nodes, list(edges)
