"""Group relative policy optimisation with TRL (GRPO, arXiv 2402.03300): the policy samples while it trains.

    numbers = train_grpo(model, processor, questions, reward, Grpo(), budget, ".work/grpo", seed=0)

A question's completions are a group, and a completion's advantage is what its reward is above the group's
mean. No pairs are made and no reference runs; a group of equal rewards teaches nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.distributed import processes
from models.engines.base import Completion, Request, Sampling, derived_seed
from models.guard import Guard, Report, TrainingError, callback
from models.images import ImageSource
from models.training import Budget, arguments, divided, freeze_vision, optimizer, quiet, run_trainer
from models.vlm import Conversation, Encoder, stack_pixels

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

Reward = Callable[[Sequence[int], Sequence[str]], list[float]]
"""reward(indices of the questions, completions): a number for each completion. The completions of a question
stand together."""


@dataclass(frozen=True)
class Grpo:
    """generations: completions of a question, at least 2. loss, scale_rewards: TRL's names; the defaults are
    those of Dr. GRPO (arXiv 2503.20783, section 3), without the bias to long wrong completions and to
    questions of nearly equal rewards. A completion is trained on in one step, by the policy that wrote it:
    there is no ratio of probabilities to clip. There is no KL term (DAPO, arXiv 2503.14476, section 2.3)."""

    generations: int = 8
    max_new_tokens: int = 1024
    temperature: float = 1.0
    loss: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = "dr_grpo"
    scale_rewards: Literal["group", "batch", "none"] = "none"


@dataclass(frozen=True)
class Drawn(Completion):
    """ids: of its tokens, with the one that ends it."""

    ids: Sequence[int] = ()


def train_grpo(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Conversation],
    reward: Reward,
    grpo: Grpo,
    budget: Budget,
    folder: str | Path,
    seed: int,
    images: ImageSource | str | Path = "data",
    report: Report | None = None,
) -> dict[str, float]:
    """Train `model` in place on open prompts; returns numbers of the run.

    budget.batch_size counts completions. The completions of a step in one process must be whole groups.

    Raises TrainingError where they are not, where there are no questions, and for a run that trained nothing:
    among others, one in which every group had equal rewards.
    """
    from transformers import TrainerCallback

    quiet()
    own = divided(budget, processes())
    if own.batch_size * own.accumulate % grpo.generations:
        raise TrainingError(
            f"the {own.batch_size} × {own.accumulate} completions of a step are no whole groups "
            f"of {grpo.generations}: make `batch_size` × `accumulate` a multiple in each process"
        )
    encoder = Encoder(processor, images)
    if first := next((question.images for question in questions if question.images), None):
        encoder.prepare(first)
    room = budget.max_tokens - grpo.max_new_tokens
    kept = [index for index, question in enumerate(questions) if len(encoder.prompt(question)) <= room]
    if not kept:
        raise TrainingError(
            f"no questions to train on ({len(questions)} given, those too long left out): give more, or "
            "raise max_tokens"
        )
    if not budget.train_vision:
        freeze_vision(model)
    guard = Guard(model)
    trainer = _trainer(model, encoder, questions, kept, reward, grpo, budget, Path(folder), seed)

    class Learnt(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            equal = _logged(state.log_history, "frac_reward_zero_std")
            if equal and min(equal) == 1:
                raise TrainingError(
                    "the completions of every question had equal rewards, which teaches nothing: choose "
                    "questions of middling difficulty, more generations, or a higher temperature"
                )

    trainer.add_callback(callback(guard, report, budget.stop))
    trainer.add_callback(Learnt())
    numbers = run_trainer(trainer, guard, folder)
    rewards = _logged(trainer.state.log_history, "reward")
    counts = {"questions": len(kept), "too_long": len(questions) - len(kept)}
    equal = _logged(trainer.state.log_history, "frac_reward_zero_std")
    return (
        numbers
        | counts
        | {
            "first_reward": _mean(rewards[:5]),
            "last_reward": _mean(rewards[-5:]),
            "equal_groups": _mean(equal),
        }
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _logged(history: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [entry[key] for entry in history if key in entry]


def _trainer(
    model: PreTrainedModel,
    encoder: Encoder,
    questions: Sequence[Conversation],
    kept: Sequence[int],
    reward: Reward,
    grpo: Grpo,
    budget: Budget,
    folder: Path,
    seed: int,
) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig

    def rewarded(completions: list[Any], question: list[int], **_: Any) -> list[float]:
        return reward(question, [completion[0]["content"] for completion in completions])

    shared = arguments(budget, folder, seed, len(kept) * grpo.generations)
    del shared["max_length"]
    rows = [{"prompt": _message(encoder, questions[index]), "question": index} for index in kept]
    return policy_trainer(encoder, questions)(
        model=model,
        reward_funcs=rewarded,
        args=GRPOConfig(
            **shared,
            num_generations=grpo.generations,
            max_completion_length=grpo.max_new_tokens,
            temperature=grpo.temperature,
            beta=0.0,
            loss_type=grpo.loss,
            scale_rewards=grpo.scale_rewards,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=encoder.processor,
        optimizers=(optimizer(model, budget), None),
    )


def _message(encoder: Encoder, question: Conversation) -> list[dict[str, str]]:
    return [{"role": "user", "content": encoder.plain(question.turns[0][0])}]


def draw(
    policy: PreTrainedModel,
    encoder: Encoder,
    prompts: Sequence[Conversation],
    sampling: Sampling,
    step: tuple[int, ...],
) -> list[list[int]]:
    """Token ids of a completion of each prompt, with the one that ends it; equal prompts get others. An image
    token is never drawn: no image would stand behind it. step: what the draws hang on besides."""
    from models.engines.local import LocalEngine

    class PolicyEngine(LocalEngine):
        def completion(self, row: Any) -> Drawn:
            return Drawn(**vars(super().completion(row)), ids=row.new)

    engine = PolicyEngine(policy, encoder.processor, encoder.open)
    engine.encoder, engine.never = encoder, [encoder.processor.image_token_id]
    before: Counter[str] = Counter()
    requests = []
    for prompt in prompts:
        key = repr(prompt)
        seed = derived_seed(*step, key, before[key])
        before[key] += 1
        requests.append(Request(key, prompt, replace(sampling, seed=seed)))

    async def ask() -> list[list[int]]:
        replies = await asyncio.gather(*(engine.ask(request) for request in requests))
        return [list(reply.ids) for reply in replies if isinstance(reply, Drawn)]

    return asyncio.run(ask())


def policy_trainer(encoder: Encoder, questions: Sequence[Conversation]) -> type:
    """TRL's trainer whose prompts are the token ids that the encoder makes, as they are served."""
    from trl import GRPOTrainer

    class PolicyTrainer(GRPOTrainer):  # type: ignore[misc, unused-ignore]
        _asked: Sequence[Conversation] = ()

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            self._asked = [questions[row["question"]] for row in inputs]
            opened = [
                {**row, "images": [encoder.open(name) for name in question.images]}
                for row, question in zip(inputs, self._asked, strict=True)
            ]
            return super()._generate_and_score_completions(opened)  # type: ignore[no-any-return, unused-ignore]

        def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
            ids = [encoder.prompt(question) for question in self._asked]
            pictures = [
                [part["image"] for part in prompt[0]["content"] if part["type"] == "image"]
                if isinstance(prompt[0]["content"], list)
                else []
                for prompt in prompts
            ]
            tensors = stack_pixels(encoder, [question.images for question in self._asked])
            return ids, pictures if any(pictures) else None, tensors

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            """Tokens by our engine. Seed, step, question and sample fix the draws: a resumed run, or one of
            several processes, draws as one that is not."""
            from trl.models import unwrap_model_for_generation

            gathered = self.args.ds3_gather_for_generation
            with unwrap_model_for_generation(
                self.model_wrapped, self.accelerator, gather_deepspeed3_params=gathered
            ) as policy:
                step = self.args.seed, self.state.global_step
                sampling = Sampling(self.temperature, max_new_tokens=self.max_completion_length)
                drawn = draw(policy, encoder, self._asked, sampling, step)
                policy.train()
            return drawn, None

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            """TRL's sampler, its order fixed by seed and epoch: TRL's own starts again with the first order
            in a resumed run."""
            sampler, trainer = super()._get_train_sampler(dataset), self

            class Ordered(type(sampler)):  # type: ignore[misc]
                def __iter__(self) -> Any:
                    epoch = int((trainer.state.epoch or 0) + 1e-6)
                    self.generator.manual_seed((self.seed << 32) + epoch)
                    return super().__iter__()

            sampler.__class__ = Ordered
            return sampler

    return PolicyTrainer
