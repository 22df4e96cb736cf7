"""One forward pass over a prompt and both of its completions, instead of one for each of them.

    with shared_prompt(model):
        model(**SharedCollator(encoder)(rows), labels=labels, fused_lm_head=True)    # TRL's fused head

A row is one pair in three blocks, each padded on the right to the longest of its batch:

    [ prompt: P | chosen: C | rejected: C ]

The prompt reads itself, a completion the prompt and itself; positions of either completion go on from the end
of the prompt. What a token sees is what it sees in a row of its own, so the numbers are those of two plain
rows, for P + 2C tokens instead of 2(P + C). Attention is two ordinary calls, a causal one over the prompts,
and one in which the completions stand below each other as rows of their own: half of the products that a mask
over the whole row would compute, and no kernel of its own on any device.

TRL's losses want a tensor [chosen rows, then rejected rows]: the backbone gives back the states that predict
completion tokens in that layout, [2 pairs, 1 + C], so no logit is computed over a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from models.families import spatial_positions
from models.forwards import Forward, backbone, replaced, unwrapped

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ATTENTION = "shared_prompt"
"""The name of our attention among those of transformers."""


def obstacle(model: PreTrainedModel) -> str | None:
    """Why this model cannot share a prompt, as far as its configuration tells; None if nothing is against it.

    Full causal attention can; a window, a recurrence or attention to an encoder sees more than one row's
    tokens.
    """
    text = model.config.get_text_config()
    if model.config.is_encoder_decoder or getattr(text, "cross_attention_layers", None):
        return "its text model attends to an encoder"
    other = sorted(set(getattr(text, "layer_types", None) or []) - {"full_attention"})
    return f"its text model has layers of {', '.join(other)}" if other else None


def shared_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention [pairs, P + 2C, heads, width] from query, key and value [pairs, heads, P + 2C, width].

    attention_mask: `completion_mask`'s [2 pairs, 1, C, P + C]. Any other is an ordinary one, for plain rows.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    tokens = query.shape[2]
    if attention_mask is None or attention_mask.ndim != 4 or attention_mask.shape[2] == tokens:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    length = attention_mask.shape[2]
    sizes = [tokens - 2 * length, length, length]
    queries, keys, values = (states.split(sizes, dim=2) for states in (query, key, value))
    prompts, _ = sdpa_attention_forward(module, queries[0], keys[0], values[0], None, **options)
    completions, _ = sdpa_attention_forward(
        module,
        torch.cat(queries[1:]),
        torch.cat([torch.cat((keys[0], own), 2) for own in keys[1:]]),
        torch.cat([torch.cat((values[0], own), 2) for own in values[1:]]),
        attention_mask,
        **options,
    )
    return torch.cat([prompts, *completions.chunk(2)], dim=1), None


def completion_mask(valid: torch.Tensor, length: int) -> torch.Tensor:
    """What completion tokens see, [2 pairs, 1, C, P + C]: the prompt without its padding, and their own past.

    valid: [pairs, P + 2C], 0 on padding. length: C. Padding of completions stands behind them, where none
    looks.
    """
    import torch

    pairs, width = valid.shape
    prompt = valid[:, None, : width - 2 * length].bool().expand(pairs, length, -1)
    own = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril().expand(pairs, -1, -1)
    return torch.cat([prompt, own], dim=2).repeat(2, 1, 1)[:, None]


def positions(model: Any, pair_ids: torch.Tensor, valid: torch.Tensor, length: int, **images: Any) -> Any:
    """Positions [pairs, P + 2C], or [3, pairs, P + 2C] where they are spatial: the prompt's own, from its end
    on for either completion."""
    import torch

    prompt = valid[:, : valid.shape[1] - 2 * length]
    steps = torch.arange(length, device=valid.device).repeat(2)
    if hasattr(model, "get_rope_index"):
        read = spatial_positions(model, pair_ids[:, : prompt.shape[1]], prompt, images)
        last = read.masked_fill(prompt[None] == 0, -1).amax(dim=(0, 2))
        goes_on = (last[:, None] + 1 + steps).expand(len(read), -1, -1)
    else:
        read = torch.arange(prompt.shape[1], device=valid.device).expand(len(prompt), -1)
        goes_on = prompt.sum(1, keepdim=True) + steps
    return torch.cat([read, goes_on], dim=-1)


def predictors(states: torch.Tensor, valid: torch.Tensor, length: int) -> torch.Tensor:
    """The states [2 pairs, 1 + C, hidden] that predict the tokens of the chosen rows, then of the rejected
    ones; the last state of a row predicts nothing. states: [pairs, P + 2C, hidden]."""
    import torch

    width = states.shape[1] - 2 * length
    ends = valid[:, :width].sum(1) - 1
    last = states[torch.arange(len(states), device=states.device), ends][:, None]
    sides = states[:, width:].split(length, dim=1)
    return torch.cat([torch.cat([last, side], dim=1) for side in sides])


@contextmanager
def shared_prompt(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model takes `SharedCollator`'s batches, and ordinary ones as before."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, shared_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    before = model.config.get_text_config()._attn_implementation
    _set_attention(model, ATTENTION)
    try:
        with replaced(backbone(model), lambda plain: _forward(backbone(model), plain)):
            yield
    finally:
        _set_attention(model, before)


def _forward(model: Any, plain: Forward) -> Forward:
    def forward(*args: Any, pair_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """The backbone's forward; of a batch of pairs its states are `predictors`.

        pair_ids [pairs, P + 2C] and attention_mask of its shape, input_ids [2 pairs, 1 + C].
        """
        if pair_ids is None:
            return plain(*args, **kwargs)
        length, valid = kwargs.pop("input_ids").shape[1] - 1, kwargs.pop("attention_mask")
        outputs = plain(
            input_ids=pair_ids,
            attention_mask=completion_mask(valid, length),
            position_ids=positions(model, pair_ids, valid, length, **kwargs),
            **kwargs,
        )
        outputs.last_hidden_state = predictors(outputs.last_hidden_state, valid, length)
        return outputs

    return forward


def _set_attention(model: PreTrainedModel, name: str) -> None:
    """Of the text model alone: the vision tower keeps its own."""
    model = unwrapped(model)
    config, text = model.config, model.config.get_text_config()
    model.set_attn_implementation({key: name for key in config.sub_configs if getattr(config, key) is text})


def difference(model: PreTrainedModel, plain: dict[str, Any], shared: dict[str, Any]) -> float:
    """The largest difference between the log-probabilities of a completion token in two batches of the same
    pairs, one of plain rows and one of shared prompts."""
    import torch

    def log_probs(batch: dict[str, Any]) -> torch.Tensor:
        inputs = {key: value.to(model.device) for key, value in batch.items() if key != "completion_mask"}
        states = backbone(model)(**inputs, use_cache=False).last_hidden_state[:, :-1]
        trained = batch["completion_mask"][:, 1:].bool()
        logits = model.get_output_embeddings()(states[trained.to(model.device)]).float()
        targets = batch["input_ids"][:, 1:][trained].to(model.device)
        return logits.log_softmax(-1).gather(1, targets[:, None])

    with torch.no_grad():
        return float((log_probs(plain) - log_probs(shared)).abs().max())
