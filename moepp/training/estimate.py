"""What a layout costs each rank, by formula: bytes of memory, bytes sent, the idle share of a pipeline.

Letters: n micro-batches, p ranks of a pipeline, v chunks of each, B sequences of a micro-batch, s tokens of each on a
rank, T = B·s, D width, F expert width. Nothing here is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moepp.config import Config, ModelConfig, RunPlan
from moepp.distributed.layout import Layout
from moepp.distributed.parameters import placement_of
from moepp.model.accounting import balanced_ffn_per_token
from moepp.model.stage import logits_cross
from moepp.model.transformer import Transformer

_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class StageCost:
    """Of one rank of one stage's place in the pipeline.

    Attributes:
        layers: global indices of its layers.
        parameters: held by the rank.
        weights, gradients, optimizer: bytes; the optimizer's are masters and moments.
        gathered: bytes that ZeRO-3 holds for a while, about: the ends' weights, those of a layer and of the next, and a
            layer's gradients before they are shared, with their copy in fp32.
        activations: bytes kept between forward and backward, all micro-batches in flight together, about.
        buffers: bytes in which torch's schedule receives hidden states, router logits and their gradients.
        at_start: bytes of the weights while they are made, and with ZeRO-3 cut into shares layer by layer.
    """

    layers: tuple[int, ...]
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    buffers: int
    at_start: int

    @property
    def total(self) -> int:
        """The most bytes at a time: at the start, or of all else together."""
        state = self.weights + self.gradients + self.optimizer + self.gathered
        return max(self.at_start, state + self.activations + self.buffers)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank of a stage sends per optimizer step.

    Attributes:
        gradients: sums over the ranks that hold the same parameters, and with ZeRO the weights on their way back.
        pipeline: to the stages beside it, both ways.
        experts: rows to and from other ranks' FFN experts at perfect balance, forward and backward.
        sequence: of attention, over tensor- and context-parallel ranks, forward and backward.
    """

    gradients: float
    pipeline: float
    experts: float
    sequence: float


def idle_share(plan: RunPlan, layout: Layout, chunks: int) -> float:
    """Return the share of a step in which a rank waits for others, if all stages take equally long.

    (p - 1) / (v n + p - 1): Narayanan et al., arXiv 2104.04473, section 2.2, as a share of the whole step.
    """
    waits = layout.pipeline - 1
    return waits / (chunks * plan.accumulation_steps + waits)


def stage_costs(cfg: Config, plan: RunPlan, layout: Layout) -> list[StageCost]:
    """Return the cost of a rank at each place of the pipeline, first stage first."""
    return [_cost(cfg, plan, layout, place) for place in range(layout.pipeline)]


def _cost(cfg: Config, plan: RunPlan, layout: Layout, place: int) -> StageCost:
    held = list(_held(cfg, plan, layout, place))
    size, own = _BYTES[cfg.train.precision], sum(part.count for part in held)
    stage, moments = plan.zero_stage, 8 if cfg.optim.name == "adamw" else 0
    shared = sum(part.count / part.copies for part in held)
    masters = moments + (4 if size == 2 else 0)  # in fp32 the weights are the masters
    weights, gradients, gathered = own * size, own * 4, 0
    at_start = weights
    if stage == 3:  # fp32 shares alone
        weights, gradients, masters = shared * 4, shared * 4, moments
        by_layer = Counter[int | None]()
        for part in held:
            by_layer[part.layer] += part.count
        ends, largest = by_layer.pop(None, 0), max(by_layer.values())
        gathered = size * (ends + 2 * largest) + (size + 4) * largest
        at_start = _at_start(held, size)
    elif stage == 2:
        gradients = shared * 4
    layers = tuple(layer for index in _stages(plan, layout, place) for layer in plan.stage_layers[index])
    return StageCost(
        layers=layers,
        parameters=own,
        weights=round(weights),
        gradients=round(gradients),
        optimizer=round(masters * (shared if stage else own)),
        gathered=gathered,
        activations=round(_activations(cfg, plan, layout, place)),
        buffers=round(_buffers(cfg, plan, layout, place)),
        at_start=at_start,
    )


def _at_start(held: list[_Held], size: int) -> int:
    """Return the most bytes while ZeRO-3 cuts layer after layer, the ends last: the next one in fp32, whole and cut."""
    whole, shares = Counter[int | None](), Counter[int | None]()
    for part in held:
        whole[part.layer] += 4 * part.count
        shares[part.layer] += round(4 * part.count / part.copies)
    most = left = sum(whole.values()) * size // 4
    cut = 0
    for layer in sorted(whole, key=lambda layer: (layer is None, layer)):
        left, cut = left - whole[layer] * size // 4, cut + shares[layer]
        most = max(most, left + whole[layer] + cut)
    return most


def _stages(plan: RunPlan, layout: Layout, place: int) -> range:
    return range(place, len(plan.stage_layers), layout.pipeline)


@dataclass(frozen=True)
class _Held:
    """The elements of a parameter on a rank, how many ranks hold the same ones, and the layer; None: of the ends."""

    count: int
    copies: int
    layer: int | None


def _held(cfg: Config, plan: RunPlan, layout: Layout, place: int) -> Iterator[_Held]:
    """Yield every parameter that a rank holds."""
    own, last = _stages(plan, layout, place), len(plan.stage_layers) - 1
    layers = {layer for index in own for layer in plan.stage_layers[index]}
    split = {"dense": 1, "tensor": layout.tensor, "expert": layout.expert}
    with torch.device("meta"):
        model = Transformer(cfg.model)
    for name, parameter in model.named_parameters():
        first, _, rest = name.partition(".")
        layer = int(rest.partition(".")[0]) if first == "layers" else None
        is_held = layer in layers if layer is not None else (0 if first == "embed_tokens" else last) in own
        if is_held:
            parts = split[placement_of(name, layout.tensor > 1).kind]
            yield _Held(parameter.numel() // parts, layout.stage_size // parts, layer)


def _tokens(cfg: Config, plan: RunPlan, layout: Layout) -> float:
    """Return T: a rank's tokens of one micro-batch."""
    return plan.micro_batch_size * cfg.data.seq_len / layout.replica_size


def _activations(cfg: Config, plan: RunPlan, layout: Layout, place: int) -> float:
    """With recomputation each layer's input, and one layer's own; without it every layer's.

    A layer keeps per token: its input, the normed one and the sum after attention (3 D), queries, keys, values and the
    attention's output, its second normed input (D), and per FFN assignment row, output, gate and up (2 D + 2 F).
    """
    model, size, tokens = cfg.model, _BYTES[cfg.train.precision], _tokens(cfg, plan, layout)
    width, heads = model.hidden_size, 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    attention = 4 * width + heads
    moe = balanced_ffn_per_token(model.moe) * 2 * (width + model.moe.ffn_hidden_size)
    dense = 3 * (model.dense_ffn_hidden_size or 0)
    counts = {layer: attention + (moe if layer in model.moe_layers else dense) for layer in range(model.num_layers)}
    own = [plan.stage_layers[index] for index in _stages(plan, layout, place)]
    kept = [sum(width if cfg.train.recompute else counts[layer] for layer in layers) for layers in own]
    peak = max(
        sum(number * per_token for number, per_token in zip(alive, kept, strict=True))
        for alive in in_flight(plan, layout, place)
    )
    return (peak + (max(counts.values()) if cfg.train.recompute else 0)) * tokens * size


def in_flight(plan: RunPlan, layout: Layout, place: int) -> Iterator[tuple[int, ...]]:
    """Yield of how many micro-batches each chunk keeps activations, after every forward and backward of a rank.

    Without a pipeline one. Forwards run ahead by p - 1 - place (1F1B), or by 2 (p - 1 - place) + (v - 1) p
    (interleaved: p micro-batches of each chunk in turn, backwards from the last chunk on); then they alternate with
    backwards, as in ``torch.distributed.pipelining``.
    """
    pipeline = layout.pipeline
    chunks = len(plan.stage_layers) // pipeline
    count, ahead = plan.accumulation_steps * chunks, pipeline - 1 - place
    if chunks > 1:
        ahead = 2 * ahead + (chunks - 1) * pipeline
    ahead, alive = min(ahead, count), [0] * chunks
    for step in range(count + ahead):
        if step < count:
            alive[step // pipeline % chunks] += 1
            yield tuple(alive)
        if step >= ahead:
            alive[chunks - 1 - (step - ahead) // pipeline % chunks] -= 1
            yield tuple(alive)


def _crossing(model: ModelConfig, border: int, size: int) -> int:
    """Return the bytes per token that cross a border one way."""
    return model.hidden_size * size + (4 * model.moe.num_experts if logits_cross(model, border) else 0)


def _at_borders(cfg: Config, plan: RunPlan, layout: Layout, place: int, start: int, stop: int) -> float:
    """Return the bytes of all micro-batches at a rank's borders: ``start`` times the first ones, ``stop`` the last."""
    size, tokens, total = _BYTES[cfg.train.precision], _tokens(cfg, plan, layout), 0
    for index in _stages(plan, layout, place):
        layers = plan.stage_layers[index]
        for border, times in ((layers.start, start), (layers.stop, stop)):
            if 0 < border < cfg.model.num_layers:
                total += times * _crossing(cfg.model, border, size)
    return total * plan.accumulation_steps * tokens


def _buffers(cfg: Config, plan: RunPlan, layout: Layout, place: int) -> float:
    """Return the bytes of torch's buffers, one per micro-batch: of forwards, of backwards, and of forwards alone."""
    forward_alone = bool(cfg.train.eval_batches) or _is_counted(cfg, plan)
    return _at_borders(cfg, plan, layout, place, start=1 + forward_alone, stop=1)


def traffic(cfg: Config, plan: RunPlan, layout: Layout, place: int) -> Traffic:
    """Return what one rank of a stage sends in one optimizer step."""
    model, size, tokens = cfg.model, _BYTES[cfg.train.precision], _tokens(cfg, plan, layout)
    steps, layers = plan.accumulation_steps, _cost(cfg, plan, layout, place).layers
    passes = _passes(cfg, plan)
    sums = sum(
        part.count * (part.copies - 1) / part.copies * _gradient_bytes(cfg, plan, part)
        for part in _held(cfg, plan, layout, place)
    )
    moe_layers = len(set(layers) & set(model.moe_layers))
    rows = balanced_ffn_per_token(model.moe) * tokens * (1 - 1 / layout.expert)
    gathered = tokens * model.hidden_size * (layout.tensor - 1)  # all-gather before, reduce-scatter after attention
    exchanged = tokens * layout.tensor * (1 - 1 / layout.context)
    heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim / layout.tensor
    if cfg.parallel.context_method == "gather":
        exchanged, heads = tokens * layout.tensor * (layout.context - 1), 2 * model.num_kv_heads * model.head_dim
        heads /= layout.tensor
    return Traffic(
        gradients=sums,
        pipeline=_at_borders(cfg, plan, layout, place, start=1, stop=1 + _is_counted(cfg, plan)),
        experts=2 * passes * steps * moe_layers * rows * model.hidden_size * size,
        sequence=passes * steps * len(layers) * size * (2 * gathered + exchanged * heads),
    )


def _gradient_bytes(cfg: Config, plan: RunPlan, part: _Held) -> int:
    """Return the bytes per element that cross the wire in a step: 4 for each half of an all-reduce in fp32.

    DeepSpeed all-reduces where ZeRO-1 and 2 could reduce-scatter, with stage 2 after every micro-batch, and gathers the
    weights. Stage 3 gathers layers in each pass of each micro-batch, the ends from forward to backward.
    """
    size, steps = _BYTES[cfg.train.precision], plan.accumulation_steps
    if plan.zero_stage == 0:
        return 8
    if plan.zero_stage == 3:
        gathers = 2 + _is_counted(cfg, plan) if part.layer is not None else 1
        return steps * (4 + gathers * size)
    if cfg.engine.name == "deepspeed":
        return 8 * (steps if plan.zero_stage == 2 else 1) + size
    return 4 + size


def _passes(cfg: Config, plan: RunPlan) -> int:
    """Return how often a micro-batch goes through a layer in a step, forward or backward."""
    return 2 + cfg.train.recompute + _is_counted(cfg, plan)


def _is_counted(cfg: Config, plan: RunPlan) -> bool:
    """Return whether choices are counted in a forward pass of their own."""
    moe = cfg.model.moe
    is_counted = moe.balance_loss_scope == "global_batch" and moe.balance_loss_weight and plan.accumulation_steps > 1
    return bool(is_counted)
