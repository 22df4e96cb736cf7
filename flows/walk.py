"""Walking the stages in order: what is stale now, run or skip, and one printed line each.

python -m flows.retrain        # the flow that walks
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flows import pipeline
from flows.parent_run import ParentRun
from flows.pipeline import StageInfo, StageState
from flows.stage import Outcome, run_stage


def say(text: str) -> None:
    """One line for whoever watches; flushed, so that it keeps its place between the stages' own output."""
    print(text, flush=True)


@dataclass
class Walk:
    """The state of one walk: the stages to visit and what became of those visited."""

    root: Path
    stages: list[StageInfo]
    states: Mapping[str, StageState]
    """What DVC said of each stage before the walk, or since."""
    parent: ParentRun
    timeout_s: float
    outcomes: list[Outcome] = field(default_factory=list)
    _ran_since: set[str] = field(default_factory=set)

    def visit(self, stage: StageInfo) -> Outcome:
        """Run the stage if DVC says that it would, else show it as skipped."""
        state = self._state(stage)
        place = f"[{len(self.outcomes) + 1:2}/{len(self.stages)}] {stage.name:<20}"
        if state.state == pipeline.UP_TO_DATE:
            say(f"{place} up to date")
            run_stage(stage.name, None, str(self.root))  # shows in Prefect as skipped
            outcome = Outcome(stage.name, "skipped")
        else:
            say(f"{place} {stage.description} ({_because(state)})")
            done = run_stage(stage.name, state.reason, str(self.root), self.parent.id(), self.timeout_s)
            assert isinstance(done, Outcome)
            outcome = done
            self._ran_since.add(stage.name)
            did = "done" if outcome.did == "ran" else "restored from the cache"
            say(f"{place} {did} in {_span(outcome.seconds)}")
        self.outcomes.append(outcome)
        return outcome

    def _state(self, stage: StageInfo) -> StageState:
        """What DVC says of the stage now.

        It looks at every file of every input, so it is asked again only where a stage before this one ran and
        may have made it stale or up to date; for all the others too, if that one is up to date.
        """
        known = self.states[stage.name]
        if not stage.ancestors & self._ran_since or self._runs_anyway(known):
            return known
        now = pipeline.state(self.root, stage.name)
        if now.state == pipeline.UP_TO_DATE:
            self.states, self._ran_since = pipeline.states(self.root, [s.name for s in self.stages]), set()
        return now

    def _runs_anyway(self, state: StageState) -> bool:
        """Whether the stage is stale for a reason that no other stage can take away."""
        made = [Path(out) for stage in self.stages for out in stage.outs]
        own = (path for path, _ in state.changes if not any(Path(path).is_relative_to(out) for out in made))
        return state.state == pipeline.MISSING or any(own)

    def did(self, what: str) -> list[str]:
        """The names of the stages that ran, were restored, or were skipped."""
        return [o.stage for o in self.outcomes if o.did == what]


def _because(state: StageState) -> str:
    if state.state == pipeline.MISSING:
        return "not made yet"
    return state.reason if len(state.reason) <= 90 else state.reason[:89] + "…"


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
