"""Judging behind sampling: a question is filtered and scored as soon as its last chain has ended.

    with judging_ahead("assess", questions, stage) as then:
        sample_chains(..., then=then)

For judges with `ahead: true`, which stand on an engine of their own, and chains that are sampled in the
stage's process. What they reply is kept where `assess` and `score` look first: these ask only for what is
missing, and their output is the same with and without.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from tasks import params, roles
from tasks.assessing import mixed, surviving
from tasks.engines import Role, engine_params
from tasks.sampling import answer_of

if TYPE_CHECKING:
    from models.assessment import PathJudge
    from models.engines.base import Engine
    from models.records import Question, ReasoningPath
    from tasks.stage import StageRun

SAMPLING: dict[str, Role] = {"assess": "generator", "score": "reasoner"}
"""Whose chains each stage judges."""
WORTH: dict[str, Callable[[Sequence[Any]], list[Any]]] = {"assess": surviving, "score": mixed}
"""The paths of a question that each stage has scored."""


@dataclass(frozen=True)
class Ahead:
    """Judges one question. Without a judge answers are filtered only; without a filter, rules decide."""

    prompts: str
    worth: Callable[[Sequence[Any]], list[Any]]
    judge: PathJudge | None
    filter: Engine | None
    rules_decide: bool

    @property
    def engines(self) -> list[Engine]:
        """Those that are asked."""
        return [*(self.judge.engines if self.judge else ()), *([self.filter] if self.filter else [])]

    async def __call__(self, question: Question, outcomes: Sequence[Any]) -> None:
        """Ask what the next stage will ask of these chains."""
        from models.assessment import mark_answer, score_paths

        marked: list[ReasoningPath] = []
        for outcome in outcomes:
            if not hasattr(outcome, "reason"):
                path = replace(outcome, answer=answer_of(outcome))
                marked.append((await mark_answer(path, question, self.filter, self.prompts))[0])
        undecided = any(path.right is None for path in marked) and not (self.filter or self.rules_decide)
        if self.judge and not undecided:
            await score_paths(self.worth(marked), question, self.judge)


@contextmanager
def judging_ahead(
    by: Literal["assess", "score"], questions: Sequence[Question], stage: StageRun
) -> Iterator[Ahead | None]:
    """What to do with a question of `stage` whose chains have ended; None where no judge works ahead. by: the
    stage that comes next, whose parameters hold."""
    section = params.read().get(by) or {}
    prompts, asked = section.get("prompts", "full"), section.get("answer_filter", "rules")
    filters = asked == "model" and engine_params("answer_judge").ahead
    if not filters and not engine_params("path_judge").ahead:
        yield None
        return
    if engine_params(SAMPLING[by]).scale is not None:
        print(f"{SAMPLING[by]} samples on a cluster: nothing is judged ahead", file=sys.stderr)
        yield None
        return
    if not (roles.JUDGE / roles.JUDGE_FILE).is_file():
        print(f"{roles.JUDGE} is not made yet: nothing is judged ahead", file=sys.stderr)
        yield None
        return
    with ExitStack() as opened:
        judge = None
        if engine_params("path_judge").ahead:
            judge = opened.enter_context(roles.path_judge(roles.JUDGE, prompts, questions, stage))
        filter = opened.enter_context(roles.answer_filter(asked, questions, stage)) if filters else None
        yield Ahead(prompts, WORTH[by], judge, filter, rules_decide=asked == "rules")
