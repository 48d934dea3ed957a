"""Sequences split over tensor- and context-parallel ranks: collectives, masks, and the whole model on one process.

Gradients are summed here by hand, with rules of the test's own: attention's matrices over the ranks with the same
heads, experts over the ranks that hold them, the rest over all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moepp.config import ModelConfig, MoEConfig
from moepp.distributed import comm, sequence
from moepp.distributed.sequence import SequenceParallel, exchange_heads, gather_sequence, sum_scatter_sequence
from moepp.errors import ConfigError
from moepp.model import Transformer, init_parameters
from moepp.moe import ExpertParallel

TOLERANCE = 5e-6  # of a gradient, relative to its norm, in fp32
BATCH, SEQ_LEN = 2, 16


@dataclass(frozen=True)
class Place:
    """Tensor-, context- and expert-parallel ranks of one replica."""

    tensor: int = 1
    context: int = 1
    expert: int = 1
    method: str = "ulysses"

    @property
    def ranks(self) -> int:
        return self.tensor * self.context

    def __str__(self) -> str:
        context = f"CP{self.context}-{self.method}-" if self.context > 1 else ""
        return f"TP{self.tensor}-{context}EP{self.expert}"


_GROUPS: dict[tuple[tuple[int, ...], ...], Any] = {}


def own_group(parts: list[list[int]]) -> Any:
    """This rank's among the groups of ``parts``, made once."""
    key = tuple(map(tuple, parts))
    if key not in _GROUPS:
        made = [dist.new_group(part) for part in parts]
        _GROUPS[key] = next(group for group, part in zip(made, parts, strict=True) if dist.get_rank() in part)
    return _GROUPS[key]


def groups_of(place: Place) -> dict[str, Any]:
    """tensor, context, expert and expert-data groups: tensor ranks are consecutive, expert ranks too."""
    ranks = torch.arange(place.ranks)
    context_tensor = ranks.view(place.context, place.tensor)
    by_expert = ranks.view(-1, place.expert)
    return {
        "tensor": own_group(context_tensor.tolist()),
        "context": own_group(context_tensor.t().tolist()),
        "expert": own_group(by_expert.tolist()),
        "expert_data": own_group(by_expert.t().tolist()),
        "replica": own_group([ranks.tolist()]),
    }


def sequence_of(place: Place, groups: dict[str, Any], stats: comm.CommStats | None = None) -> SequenceParallel:
    parts = groups["tensor"], groups["context"], groups["replica"]
    return SequenceParallel(*parts, place.method, stats if stats is not None else comm.CommStats())


# Collectives


def _numbers(rank: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def _collectives(rank: int) -> dict[str, Any]:
    """Results, gradients and bytes of each collective on 2 ranks; gradients of a sum with distinct weights."""
    group, found = dist.group.WORLD, {}
    calls = {
        "gather_sequence": ((2, 3, 5), lambda x, stats: gather_sequence(x, group, stats)),
        "sum_scatter_sequence": ((2, 6, 5), lambda x, stats: sum_scatter_sequence(x, group, stats)),
        "heads_out": ((2, 4, 3, 5), lambda x, stats: exchange_heads(x, group, stats, heads_out=True)),
        "heads_back": ((2, 2, 6, 5), lambda x, stats: exchange_heads(x, group, stats, heads_out=False)),
    }
    for name, (shape, call) in calls.items():
        stats, x = comm.CommStats(), _numbers(rank, *shape).transpose(0, -1).contiguous().transpose(0, -1)
        x.requires_grad_()  # not contiguous
        out = call(x, stats)
        (out * _numbers(10 + rank, *out.shape)).sum().backward()
        found[name] = out.detach(), x.grad, dict(stats.sequence_bytes), dict(stats.sequence_calls)
    return found


def _expected(name: str, xs: list[Tensor]) -> list[Tensor]:
    """What each of 2 ranks must get of the ranks' tensors, by indexing alone."""
    if name == "gather_sequence":
        return [torch.cat(xs, dim=1)] * 2
    if name == "sum_scatter_sequence":
        return [(xs[0] + xs[1])[:, 3 * rank : 3 * rank + 3] for rank in range(2)]
    if name == "heads_out":
        return [torch.cat([x[:, 2 * rank : 2 * rank + 2] for x in xs], dim=2) for rank in range(2)]
    return [torch.cat([x[:, :, 3 * rank : 3 * rank + 3] for x in xs], dim=1) for rank in range(2)]


@pytest.mark.parametrize(
    ("name", "shape", "forward_bytes", "backward_bytes"),
    [
        ("gather_sequence", (2, 3, 5), {"gather_sequence": 240}, {"sum_scatter_sequence": 240}),
        ("sum_scatter_sequence", (2, 6, 5), {"sum_scatter_sequence": 240}, {"gather_sequence": 240}),
        ("heads_out", (2, 4, 3, 5), {"exchange_heads": 480}, {"exchange_heads": 480}),
        ("heads_back", (2, 2, 6, 5), {"exchange_heads": 480}, {"exchange_heads": 480}),
    ],
)
def test_collective_and_its_gradient_equal_indexing_on_one_process(pool_2, name, shape, forward_bytes, backward_bytes):
    found = [by_name[name] for by_name in pool_2.run(_collectives)]
    xs = [_numbers(rank, *shape).requires_grad_() for rank in range(2)]
    wanted = _expected(name, xs)
    torch.stack([(out * _numbers(10 + rank, *out.shape)).sum() for rank, out in enumerate(wanted)]).sum().backward()
    for rank, (out, grad, sent, calls) in enumerate(found):
        torch.testing.assert_close(out, wanted[rank].detach(), rtol=0, atol=1e-15)
        torch.testing.assert_close(grad, xs[rank].grad, rtol=0, atol=1e-15)
        assert sent == {
            kind: forward_bytes.get(kind, 0) + backward_bytes.get(kind, 0) for kind in forward_bytes | backward_bytes
        }
        assert sum(calls.values()) == 2


def _split_and_joined(rank: int, place: Place, seq_len: int) -> tuple[Tensor, Tensor]:
    shared = sequence_of(place, groups_of(place))
    ids_BS = torch.arange(2 * seq_len).view(2, seq_len)
    own = shared.own(ids_BS)
    return own, shared.whole(own)


PLACES_4 = [
    Place(2, 2, 4, "ulysses"),
    Place(2, 2, 2, "gather"),
    Place(1, 4, 2, "gather"),
    Place(4, 1, 4),
    Place(1, 4, 1, "ulysses"),
]


@pytest.mark.parametrize("place", PLACES_4, ids=str)
def test_every_token_is_on_one_rank_and_comes_back_in_order(pools, place):
    found = pools(4).run(_split_and_joined, place, 16)
    assert torch.cat([own[0] for own, _ in found]).sort().values.tolist() == list(range(16))
    for own, whole in found:
        assert own.shape == (2, 4) and torch.equal(own[1], own[0] + 16)
        assert torch.equal(whole, torch.arange(32).view(2, 16))


def test_zigzag_gives_all_ranks_as_many_pairs_below_the_diagonal(pools):
    found = pools(4).run(_split_and_joined, Place(1, 4, 1, "gather"), 32)
    assert len({int((own[0] + 1).sum()) for own, _ in found}) == 1
    assert found[1][0][0].tolist() == [4, 5, 6, 7, 24, 25, 26, 27]


# The model


def make_config(**changes: Any) -> ModelConfig:
    moe = {
        "num_ffn_experts": 4,
        "ffn_hidden_size": 12,
        "num_zero_experts": 1,
        "num_copy_experts": 1,
        "num_constant_experts": 2,
        "capacity_factor": None,
        "balance_loss_scope": "data_parallel",
        "balance_loss_weight": 0.3,
        "z_loss_weight": 0.02,
    } | changes.pop("moe", {})
    values = {
        "vocab_size": 32,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 4,
        "max_seq_len": SEQ_LEN,
        "init_std": 0.2,
    }
    return ModelConfig(moe=MoEConfig(**moe), **(values | changes))


CONFIGS = {
    "dropless": make_config(),
    "capacity by weight, f of the micro-batch": make_config(
        moe={"capacity_factor": 0.7, "balance_loss_scope": "micro_batch"}
    ),
    "capacity by position": make_config(moe={"capacity_factor": 0.7, "drop_policy": "position"}),
    "dense layers between, tied": make_config(
        num_layers=4, moe_layer_interval=2, dense_ffn_hidden_size=20, tie_embeddings=True
    ),
}


def make_batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(32, (BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(3))
    return tokens[:, :-1], tokens[:, 1:]


@dataclass
class Measured:
    loss: float
    aux_loss: float
    drops: float
    gradients: dict[str, Tensor]


def one_process(cfg: ModelConfig, document_end: int | None = None) -> Measured:
    model = Transformer(cfg, document_end=document_end)
    init_parameters(model, 7)
    out = model.loss(*make_batch())
    (out.ce_sum / out.num_tokens + out.aux_loss).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    drops = sum(float(s.drop_fraction) for s in out.stats)
    return Measured(float((out.ce_sum / out.num_tokens).detach()), float(out.aux_loss.detach()), drops, gradients)


Sabotage = Any  # a context manager's function, by name; see below


def many_processes(
    rank: int, place: Place, cfg: ModelConfig, document_end: int | None = None, sabotage: Sabotage = None
) -> Measured:
    """The same on the ranks of ``place``, with the parts of each gradient that this rank holds."""
    groups = groups_of(place)
    with sabotage() if sabotage is not None else contextlib.nullcontext():
        experts = ExpertParallel(groups["expert"] if place.expert > 1 else None, groups["replica"])
        model = Transformer(cfg, experts, sequence_of(place, groups), document_end)
        init_parameters(model, 7, rank % place.expert, place.expert)
        out = model.loss(*make_batch())
        loss = out.ce_sum / out.num_tokens
        ((loss + out.aux_loss) / place.ranks).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        reduced_over = groups[
            "context" if is_head_matrix(name) else "expert_data" if ".experts." in name else "replica"
        ]
        gradients[name] = comm.all_reduce_sum(parameter.grad, reduced_over)
    values = torch.tensor(
        [float(loss.detach()), float(out.aux_loss.detach()), sum(float(s.drop_fraction) for s in out.stats)]
    )
    comm.all_reduce_sum(values, groups["replica"])
    return Measured(*(values / place.ranks).tolist(), gradients)


def is_head_matrix(name: str) -> bool:
    return name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"))


def part_of(name: str, whole: Tensor, place: Place, rank: int) -> Tensor:
    if is_head_matrix(name):
        return whole.chunk(place.tensor, 1 if "o_proj" in name else 0)[rank % place.tensor]
    return whole.chunk(place.expert)[rank % place.expert] if ".experts." in name else whole


def worst_gradient(wanted: Measured, found: list[Measured], place: Place) -> float:
    errors = []
    for rank, measured in enumerate(found):
        assert measured.gradients.keys() == wanted.gradients.keys()
        for name, gradient in measured.gradients.items():
            whole = wanted.gradients[name]
            target = part_of(name, whole, place, rank)
            assert gradient.shape == target.shape, name
            if "router.gate_map" in name and whole.norm() == 0:  # of the first MoE layer: there is no predecessor
                assert gradient.count_nonzero() == 0
            else:
                assert whole.norm() > 0, name
                errors.append(float((gradient - target).norm() / whole.norm()))
    return max(errors)


def check(wanted: Measured, found: list[Measured], place: Place) -> None:
    for measured in found:
        assert measured.loss == pytest.approx(wanted.loss, rel=1e-6)
        assert measured.aux_loss == pytest.approx(wanted.aux_loss, rel=1e-6)
        assert measured.drops == pytest.approx(wanted.drops, rel=1e-6)
    assert worst_gradient(wanted, found, place) < TOLERANCE


PLACES = [
    Place(2),
    Place(2, 1, 2),
    Place(1, 2, 1, "ulysses"),
    Place(1, 2, 2, "ulysses"),
    Place(1, 2, 1, "gather"),
    Place(1, 2, 2, "gather"),
    *PLACES_4,
]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_loss_and_every_gradient_are_those_of_one_process(pools, place, name):
    wanted = one_process(CONFIGS[name])
    assert (wanted.drops > 0.1) == ("capacity" in name)
    check(wanted, pools(place.ranks).run(many_processes, place, CONFIGS[name]), place)


def _bytes_sent(rank: int, place: Place) -> dict[str, int]:
    groups, stats = groups_of(place), comm.CommStats()
    model = Transformer(CONFIGS["dropless"], sequence=sequence_of(place, groups, stats))
    init_parameters(model, 7)
    model(make_batch()[0])
    return dict(stats.sequence_bytes)


@pytest.mark.parametrize("place", [Place(2), Place(4), *(Place(2, 2, 1, x) for x in ("ulysses", "gather"))], ids=str)
def test_forward_sends_what_the_formulas_of_the_layouts_page_say(pools, place):
    cfg, t, c = CONFIGS["dropless"], place.tensor, place.context
    tokens, kv_width = BATCH * SEQ_LEN // c, cfg.num_kv_heads * cfg.head_dim
    wanted = {"gather_sequence": (t - 1) * tokens // t * cfg.hidden_size}
    wanted["sum_scatter_sequence"] = wanted["gather_sequence"]
    if c > 1 and place.method == "ulysses":
        wanted["exchange_heads"] = (c - 1) * tokens // c * (2 * cfg.hidden_size + 2 * kv_width) // t
    elif c > 1:
        wanted["gather_sequence"] += (c - 1) * tokens * 2 * kv_width // t
    wanted = {kind: 4 * cfg.num_layers * count for kind, count in wanted.items()}
    assert pools(place.ranks).run(_bytes_sent, place) == [wanted] * place.ranks


DOCUMENT_END = 24  # twice in the first sequence, once in the second


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_attention_within_documents_is_that_of_one_process(pools, place):
    cfg, (ids_BS, _) = CONFIGS["dropless"], make_batch()
    assert (ids_BS == DOCUMENT_END).sum(dim=1).tolist() == [2, 1]
    wanted, crossing = one_process(cfg, DOCUMENT_END), one_process(cfg)
    assert abs(wanted.loss - crossing.loss) > 1e-3
    check(wanted, pools(place.ranks).run(many_processes, place, cfg, DOCUMENT_END), place)


def _hidden_of_padded(rank: int, place: Place, document_end: int | None) -> Tensor:
    groups = groups_of(place)
    experts = ExpertParallel(groups["expert"] if place.expert > 1 else None, groups["replica"])
    shared = sequence_of(place, groups)
    model = Transformer(CONFIGS["dropless"], experts, shared, document_end).eval()
    init_parameters(model, 7, rank % place.expert, place.expert)
    with torch.no_grad():
        return shared.whole(model(make_batch()[0], attention_mask=padding()).hidden)


def padding() -> Tensor:
    """Left of the first sequence, right of the second."""
    mask_BS = torch.ones(BATCH, SEQ_LEN, dtype=torch.int64)
    mask_BS[0, :3], mask_BS[1, 10:] = 0, 0
    return mask_BS


@pytest.mark.parametrize("document_end", [None, DOCUMENT_END])
@pytest.mark.parametrize("place", [Place(2), *PLACES_4[:3]], ids=str)
def test_padded_batch_is_that_of_one_process(pools, place, document_end):
    model = Transformer(CONFIGS["dropless"], document_end=document_end).eval()
    init_parameters(model, 7)
    with torch.no_grad():
        wanted = model(make_batch()[0], attention_mask=padding()).hidden
        unmasked = model(make_batch()[0]).hidden
    assert (wanted - unmasked).abs().max() > 1e-2
    for hidden in pools(place.ranks).run(_hidden_of_padded, place, document_end):
        torch.testing.assert_close(hidden[padding() == 1], wanted[padding() == 1], rtol=2e-5, atol=2e-5)


def _parameters(rank: int, place: Place) -> dict[str, Tensor]:
    model = Transformer(CONFIGS["dropless"], sequence=sequence_of(place, groups_of(place)))
    init_parameters(model, 7)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_initial_weights_are_bitwise_parts_of_those_of_one_process(pools):
    model = Transformer(CONFIGS["dropless"])
    init_parameters(model, 7)
    place = Place(4)
    for rank, found in enumerate(pools(4).run(_parameters, place)):
        for name, parameter in model.named_parameters():
            assert torch.equal(found[name], part_of(name, parameter.detach(), place, rank)), name


# Mistakes that the comparisons above must notice. Losses do not show all of them.


def zigzag_order_forgotten() -> Any:
    def in_ranks_order(self: SequenceParallel, seq_len: int, device: torch.device) -> Tensor:
        return torch.arange(seq_len, device=device)

    return patch.object(SequenceParallel, "_context_order", in_ranks_order)


def positions_of_the_first_rank() -> Any:
    right = SequenceParallel.context_positions
    return patch.object(
        SequenceParallel, "context_positions", lambda self, seq_len, rank=None, device=None: right(self, seq_len, 0)
    )


def gradient_of_gathered_tokens_not_summed() -> Any:
    def own_slice(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.chunk(comm.size(ctx.group), 1)[comm.rank(ctx.group)].contiguous(), None, None

    return patch.object(sequence._GatherSequence, "backward", staticmethod(own_slice))


def gradient_of_exchanged_heads_left_where_it_is() -> Any:
    def unmoved(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        n = comm.size(ctx.group)
        parts = grad.unflatten(2 if ctx.heads_out else 1, (n, -1)).movedim(2 if ctx.heads_out else 1, 0)
        moved = parts.movedim(0, 1).flatten(1, 2) if ctx.heads_out else parts.movedim(0, 2).flatten(2, 3)
        return moved, None, None, None

    return patch.object(sequence._ExchangeHeads, "backward", staticmethod(unmoved))


@contextlib.contextmanager
def capacity_of_the_slice() -> Iterator[None]:
    right = SequenceParallel.own
    with (
        patch.object(SequenceParallel, "whole", lambda self, x: x),
        patch.object(SequenceParallel, "own", lambda self, x: x if x.dtype == torch.bool else right(self, x)),
    ):
        yield


def f_of_the_slice() -> Any:
    return patch.object(comm, "start_all_reduce_sum", lambda counts, group, comm_stats: comm.Pending(None))


MISTAKES = [
    (zigzag_order_forgotten, Place(1, 2, 1, "gather"), "dropless"),
    (positions_of_the_first_rank, Place(1, 2, 1, "ulysses"), "dropless"),
    (gradient_of_gathered_tokens_not_summed, Place(1, 2, 1, "gather"), "dropless"),
    (gradient_of_gathered_tokens_not_summed, Place(2), "dropless"),
    (gradient_of_exchanged_heads_left_where_it_is, Place(1, 2, 1, "ulysses"), "dropless"),
    (capacity_of_the_slice, Place(2), "capacity by weight, f of the micro-batch"),
    (capacity_of_the_slice, Place(2), "capacity by position"),
    (f_of_the_slice, Place(2), "capacity by weight, f of the micro-batch"),
]


@pytest.mark.parametrize(("mistake", "place", "name"), MISTAKES)
def test_mistake_shows(pools, mistake, place, name):
    wanted = one_process(CONFIGS[name])
    found = pools(place.ranks).run(many_processes, place, CONFIGS[name], None, mistake)
    assert worst_gradient(wanted, found, place) > 100 * TOLERANCE


# What is refused


def _error(rank: int, place: Place, seq_len: int, heads: dict[str, int]) -> str:
    try:
        cfg = make_config(**heads)
        model = Transformer(cfg, sequence=sequence_of(place, groups_of(place)))
        init_parameters(model, 7)
        model(torch.zeros(1, seq_len, dtype=torch.int64))
    except ConfigError as error:
        return str(error)
    return ""


def test_what_cannot_be_divided_is_refused_on_every_rank(pool_2):
    cases = [
        (Place(2), 16, {"num_kv_heads": 1}, "model.num_kv_heads=1 cannot be divided over 2 ranks"),
        (Place(1, 2), 16, {"num_kv_heads": 1}, "model.num_kv_heads=1 cannot be divided over 2 ranks"),
        (Place(1, 2, 1, "gather"), 16, {"num_kv_heads": 1}, ""),
        (Place(2), 15, {}, "make it a multiple of 2"),
        (Place(1, 2, 1, "gather"), 14, {}, "make it a multiple of 4"),
    ]
    for place, seq_len, heads, message in cases:
        for found in pool_2.run(_error, place, seq_len, heads):
            assert message in found and bool(found) == bool(message)
