"""The MoE layer on 1, 2 and 4 gloo ranks agrees with the oracle, and sends exactly the rows that it must."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moepp import MoEConfig, MoELayer
from moepp.distributed.comm import CommStats
from moepp.errors import ConfigError
from moepp.moe import ExpertParallel
from tests.dist import subgroups
from tests.moe_cases import Case, Observed, assert_agrees, build_layer, draw_case, expect, make_inputs, run_layer

LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 4), (4, 2)]  # ranks, expert-parallel size
WITH_FLOAT32 = [(2, 2), (4, 2)]  # besides float64


def grid(layouts: list[tuple[int, int]]) -> pytest.MarkDecorator:
    """Each layout in float64, some in float32; the rest is exhaustive."""
    rare = [pytest.mark.slow]
    cases = [pytest.param(*layout, torch.float64) for layout in layouts]
    cases += [pytest.param(*layout, torch.float32, marks=[] if layout in WITH_FLOAT32 else rare) for layout in layouts]
    return pytest.mark.parametrize(("ranks", "ep_size", "dtype"), cases)


def config(ffn: int = 4, constant: int = 2, copy: int = 1, zero: int = 1, **fields: Any) -> MoEConfig:
    defaults: dict[str, Any] = {"ffn_hidden_size": 4, "balance_loss_weight": 0.3, "z_loss_weight": 0.05, "tau": 0.6}
    counts: dict[str, Any] = {
        "num_ffn_experts": ffn,
        "num_constant_experts": constant,
        "num_copy_experts": copy,
        "num_zero_experts": zero,
    }
    return MoEConfig(**(defaults | counts | fields))


def _groups(case: Case) -> dict[str, Any]:
    return {"ep_group": subgroups(case.ep_size), "balance_group": dist.group.WORLD}


def _parallel(case: Case, stats: CommStats) -> ExpertParallel:
    return ExpertParallel(*_groups(case).values(), stats, case.exchange_chunks)


def _run_cases(rank: int, cases: list[Case], device: str = "cpu") -> list[Observed]:
    return [run_layer(case, rank, device=device, **_groups(case)) for case in cases]


def check(pool: Any, cases: list[Case], device: torch.device) -> list[list[Observed]]:
    """Run the cases on all ranks and compare each rank with the oracle; results as [case][rank].

    Ranks on a GPU share it, and exchange over gloo.
    """
    by_case = [list(ranks) for ranks in zip(*pool.run(_run_cases, cases, device.type), strict=True)]
    for case, observed in zip(cases, by_case, strict=True):
        for rank, expected in enumerate(expect(case)):
            assert_agrees(case, observed[rank], expected, rank)
        check_traffic(case, observed)
    return by_case


def check_traffic(case: Case, observed: list[Observed]) -> None:
    """Rows cross twice forward (dispatch, combine) and twice backward; nothing else is sent as rows."""
    row = case.hidden_size * torch.finfo(case.dtype).bits // 8
    for start in range(0, len(observed), case.ep_size):
        group = observed[start : start + case.ep_size]
        remote_assignments = sum(int(rank.stats["remote_assignments"]) for rank in group)
        assert sum(rank.comm_stats.row_bytes for rank in group) == 4 * remote_assignments * row, case
        for rank in group:
            assert rank.comm_stats.row_bytes >= 2 * int(rank.stats["remote_assignments"]) * row


@grid(LAYOUTS)
def test_random_configurations_agree_with_the_oracle_on_every_rank(pools, ranks, ep_size, dtype, device):
    check(pools(ranks), [draw_case(1000 + seed, dtype, ranks, ep_size) for seed in range(40)], device)


# FFN experts 0..3 (EP=2: 0, 1 on the first rank; EP=4: one each), constant 4 and 5, copy 6, zero 7.
SPREAD = ((0, 5), (1, 2), (2, 7), (3, 6), (4, 6), (1, 0), (3, 4))
LOCAL_ONLY = ((4, 6), (7, 5), (6, 7), (5, 4))
ROUTINGS = {
    "a rank that receives no row": (((0, 5), (0, 6), (0, 7)), ((0, 4), (0, 6))),
    "the first rank receives no row": (((3, 5), (3, 6), (3, 7)), ((3, 4), (3, 6))),
    "all tokens on zero-computation experts": (LOCAL_ONLY, LOCAL_ONLY),
    "one rank's tokens all on zero-computation experts": (SPREAD, LOCAL_ONLY),
    "all tokens on one FFN expert and the copy": (((2, 6),) * 5, ((2, 6),) * 3),
    "all rows cross": (((2, 3), (3, 2)), ((0, 1), (1, 0))),
    "no row crosses": (((0, 1), (1, 5)), ((2, 3), (3, 7))),
    "a rank without tokens": (SPREAD, ()),
    "the first rank without tokens": ((), SPREAD),
    "no tokens anywhere": ((), ()),
    "one token in all": ((), ((1, 2),)),
    "one token per rank": (((3, 4),), ((0, 7),)),
}


@grid([(2, 2), (4, 4), (4, 2)])
def test_forced_routings_agree_with_the_oracle_on_every_rank(pools, ranks, ep_size, dtype, device):
    cases = []
    for capacity in (None, 0.9):
        for scope in ("micro_batch", "data_parallel"):
            cfg = config(capacity_factor=capacity, balance_loss_scope=scope)
            for choices in ROUTINGS.values():
                choices = choices if ranks == 2 else (*choices, SPREAD[1:3], *choices[:1])
                tokens = tuple(len(rank) for rank in choices)
                for parts in {1, 4 // ep_size}:
                    forced = {"ep_size": ep_size, "exchange_chunks": parts, "choices": choices}
                    cases.append(Case(cfg, tokens, hidden_size=9, dtype=dtype, **forced))
    check(pools(ranks), cases, device)


def test_row_bytes_of_a_routing_counted_by_hand(pool_2, device):
    # Rank 0 sends its assignments to experts 2 and 3, rank 1 those to 0 and 1: 2 + 3 rows, both ways, twice; fp64, D=9.
    choices = (((0, 2), (1, 6), (3, 5)), ((0, 1), (2, 1), (7, 4)))
    case = Case(config(capacity_factor=None), (3, 3), hidden_size=9, ep_size=2, choices=choices)
    [observed] = check(pool_2, [case], device)
    assert [int(rank.stats["remote_assignments"]) for rank in observed] == [2, 3]
    row = 9 * 8
    # A rank sends its own remote rows twice (dispatch; combine's gradient), and its peer's twice (outputs; gradients).
    assert [rank.comm_stats.row_bytes for rank in observed] == [(2 * 2 + 2 * 3) * row, (2 * 3 + 2 * 2) * row]
    assert [rank.comm_stats.row_exchanges for rank in observed] == [4, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exchange_in_parts_sends_the_same_bytes_and_gives_the_same_bits(pool_2, dtype):
    whole = Case(config(8, capacity_factor=None), (40, 31), hidden_size=16, ep_size=2, dtype=dtype)
    results = [pool_2.run(_run_cases, [dataclasses.replace(whole, exchange_chunks=parts)]) for parts in (1, 2, 4)]
    for parts, ranks in zip((2, 4), results[1:], strict=True):
        for [one], [other] in zip(results[0], ranks, strict=True):
            assert torch.equal(one.hidden, other.hidden)
            assert one.grads.keys() == other.grads.keys()
            for name, grad in one.grads.items():
                assert torch.equal(grad, other.grads[name]), name
            assert (one.comm_stats.row_bytes, one.comm_stats.count_bytes) == (
                other.comm_stats.row_bytes,
                other.comm_stats.count_bytes,
            )
            assert (other.comm_stats.row_exchanges, other.comm_stats.count_exchanges) == (4 * parts, 1)


def _build_with_parts(rank: int, ffn: int) -> None:
    MoELayer(config(ffn), hidden_size=4, parallel=ExpertParallel(dist.group.WORLD, num_chunks=3))


@pytest.mark.parametrize("ffn", [4, 0])
def test_parts_that_do_not_divide_the_experts_of_a_rank_are_refused(pool_2, ffn):
    for message in pool_2.run(_build_with_parts, ffn, raises=ConfigError):
        assert "exchange_chunks=3" in message and f"the {ffn // 2} FFN experts" in message and "\n" not in message


def test_dropped_and_zero_computation_assignments_are_never_sent(pool_2, device):
    choices = (((3, 6),) * 10, ((0, 6),) * 10)
    kept = {}
    for capacity in (None, 0.5):
        case = Case(config(capacity_factor=capacity), (10, 10), hidden_size=8, ep_size=2, choices=choices)
        [observed] = check(pool_2, [case], device)
        kept[capacity] = int(observed[0].stats["remote_assignments"])
    # gamma tau K T / (tau N_FFN + N_ZC) = 0.5·0.6·20 / 6.4, rounded up
    assert kept == {None: 10, 0.5: 1}


def test_bf16_rows_are_sent_in_two_bytes_per_element(pool_2, device):
    cases = [Case(config(), (9, 4), ep_size=2, dtype=torch.bfloat16, seed=seed) for seed in range(4)]
    observed = check(pool_2, cases, device)
    assert all(rank.comm_stats.row_bytes > 0 for ranks in observed for rank in ranks)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_vanilla_moe_agrees_with_the_oracle_on_every_rank(pools, ranks, top_k, device):
    cfg = config(4, 0, 0, 0, top_k=top_k)
    check(pools(ranks), [Case(cfg, (5, 9, 0, 2)[:ranks], ep_size=ranks, seed=seed) for seed in range(3)], device)


def test_layer_without_ffn_experts_works_under_expert_parallelism(pool_2, device):
    [observed] = check(pool_2, [Case(config(0), (5, 3), ep_size=2)], device)
    assert [rank.comm_stats.row_bytes for rank in observed] == [0, 0]


def test_evaluation_is_dropless_under_expert_parallelism(pool_2, device):
    cfg = config(capacity_factor=0.2, balance_loss_scope="data_parallel")
    [observed] = check(pool_2, [Case(cfg, (9, 4), ep_size=2, training=False)], device)
    assert [float(rank.stats["drop_fraction"]) for rank in observed] == [0, 0]


def _forward_without_gradients(rank: int, case: Case) -> tuple[torch.Tensor, int]:
    comm_stats = CommStats()
    inputs = make_inputs(case)
    with torch.no_grad():
        out = build_layer(case, inputs, rank, parallel=_parallel(case, comm_stats))(inputs.x[rank], inputs.prev[rank])
    return out.hidden, comm_stats.row_bytes


def test_forward_without_gradients_sends_half_of_the_rows(pool_2):
    case = Case(config(), (9, 4), ep_size=2)
    expected = expect(case)
    results = pool_2.run(_forward_without_gradients, case)
    for rank, (hidden, _) in enumerate(results):
        torch.testing.assert_close(hidden, expected[rank].reference.hidden_TD.detach(), rtol=1e-10, atol=1e-10)
    remote_assignments = sum(rank.reference.stats["remote_assignments"] for rank in expected)
    assert sum(row_bytes for _, row_bytes in results) == 2 * remote_assignments * case.hidden_size * 8 > 0


def _stack_gradients(rank: int, cases: list[Case], recompute: bool, sharded: bool) -> dict[str, Any]:
    """Three layers with gating residuals and residual connections, on one rank's tokens."""
    inputs = [make_inputs(case) for case in cases]
    parallel = _parallel(cases[0], CommStats()) if sharded else None
    cases = cases if sharded else [dataclasses.replace(case, ep_size=1) for case in cases]
    layers = [build_layer(case, given, rank, parallel=parallel) for case, given in zip(cases, inputs, strict=True)]
    x_TD = inputs[0].x[rank].clone().requires_grad_()
    hidden, logits, loss = x_TD, None, torch.zeros(())
    for layer, given in zip(layers, inputs, strict=True):

        def block(hidden: torch.Tensor, logits: torch.Tensor | None, layer: MoELayer = layer) -> Any:
            out = layer(hidden, logits)
            return hidden + out.hidden, out.router_logits, out.aux_loss

        arguments = (hidden, logits)
        if recompute:
            hidden, logits, aux = checkpoint(block, *arguments, use_reentrant=False)
        else:
            hidden, logits, aux = block(*arguments)
        loss = loss + given.grad_aux[rank] * aux
    (loss + (hidden * inputs[0].grad_hidden[rank]).sum()).backward()
    parameters = [(f"{i}.{name}", p.grad) for i, layer in enumerate(layers) for name, p in layer.named_parameters()]
    return dict(parameters) | {"x": x_TD.grad, "hidden": hidden.detach()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("ranks", "tokens"), [(2, (9, 0)), (2, (4, 7)), (4, (3, 0, 8, 1))])
def test_stacked_layers_give_the_gradients_of_unsharded_ones(pools, ranks, tokens, recompute):
    cases = [Case(config(), tokens, ep_size=2, seed=seed) for seed in range(3)]
    sharded = pools(ranks).run(_stack_gradients, cases, recompute, True)
    alone = [_stack_gradients(rank, cases, False, False) for rank in range(ranks)]
    for rank, grads in enumerate(sharded):
        group = range(rank - rank % 2, rank - rank % 2 + 2)
        for name, grad in grads.items():
            expected = alone[rank][name]
            if ".experts." in name:
                total = torch.stack([alone[peer][name] for peer in group]).sum(dim=0)
                expected = total.chunk(2)[rank % 2]
            torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


def _fresh_weights(rank: int, ep_size: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return MoELayer(config(), hidden_size=4, ep_group=subgroups(ep_size)).state_dict()


def test_ranks_that_are_seeded_alike_start_with_the_weights_of_one_process(pool_2):
    [alone, _] = pool_2.run(_fresh_weights, 1)
    first, second = pool_2.run(_fresh_weights, 2)
    for name, weight in alone.items():
        is_shared = name.startswith("experts.")
        assert torch.equal(torch.cat([first[name], second[name]]) if is_shared else first[name], weight)
        assert is_shared or torch.equal(second[name], weight)


def _build_indivisible(rank: int) -> None:
    MoELayer(config(3), hidden_size=4, ep_group=dist.group.WORLD)


def test_expert_parallelism_that_does_not_divide_the_ffn_experts_is_refused(pool_2):
    for message in pool_2.run(_build_indivisible, raises=ConfigError):
        assert "2" in message and "num_ffn_experts=3" in message and "\n" not in message
