"""Import of the released format against what the released code itself computed (tests/golden)."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from moepp.interop import official
from moepp.interop.official.keys import pieces_of
from moepp.model import Transformer
from moepp.moe import ExpertParallel
from tests.official_cases import GOLDEN

CASES = ("default", "published_flags", "published_flags_bf16")


@cache
def expected(case: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / case / "expected.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files if arrays[key].dtype.kind in "fi"}


@cache
def load(case: str, dtype: torch.dtype = torch.float32) -> official.OfficialModel:
    return official.load_pretrained(GOLDEN / case, dtype)


def check_forward(out: official.OfficialOutput, want: dict[str, Tensor], suffix: str = "") -> None:
    torch.testing.assert_close(out.logits, want[f"logits{suffix}"], rtol=0, atol=2e-5)
    torch.testing.assert_close(torch.stack(out.router_logits), want[f"router_logits{suffix}"], rtol=0, atol=2e-5)
    assert torch.equal(torch.stack(out.topk_ids), want[f"topk_idx{suffix}"])
    torch.testing.assert_close(torch.stack(out.topk_weights), want[f"topk_weight{suffix}"], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_fp32_logits_and_routing_are_those_of_the_released_code(case):
    want = expected(case)
    out = load(case)(want["input_ids"])
    check_forward(out, want)
    torch.testing.assert_close(torch.stack(out.hidden_states), want["hidden_states"], rtol=0, atol=2e-5)
    assert out.logits.dtype == torch.float32


@torch.no_grad()
def test_bf16_rounds_where_the_released_code_rounds():
    want = expected("published_flags_bf16")
    out = load("published_flags_bf16", torch.bfloat16)(want["input_ids"])
    check_forward(out, want, "_bf16run")
    assert out.logits.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("case", CASES[:2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_count_positions_like_the_released_code(case, side):
    want = expected(case)
    logits = load(case)(want[f"{side}pad_ids"], attention_mask=want[f"{side}pad_mask"]).logits
    torch.testing.assert_close(logits, want[f"{side}pad_logits"], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES[:2])
def test_given_position_ids_are_used(case):
    want = expected(case)
    logits = load(case)(want["leftpad_ids"], want["leftpad_mask"], want["leftpad_position_ids"]).logits
    torch.testing.assert_close(logits, want["leftpad_logits_with_position_ids"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", CASES[:2])
def test_greedy_continuation_is_that_of_the_released_code(case):
    want = expected(case)
    prompt, out = want["greedy_prompt"], want["greedy_out"]
    assert torch.equal(load(case).generate(prompt, max_new_tokens=out.shape[1] - prompt.shape[1]), out)


@pytest.mark.parametrize("case", CASES[:2])
def test_the_training_model_computes_the_same_logits_loss_and_gradients(case):
    """A run that starts from imported weights trains the very model that was imported."""
    want = expected(case)
    model = Transformer(official.read_config(GOLDEN / case))
    official.load_into(model, GOLDEN / case)
    model.eval()
    ids = want["input_ids"]
    logits = model.logits(model(ids).hidden)
    torch.testing.assert_close(logits, want["logits"], rtol=0, atol=2e-5)
    labels = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), dim=1)
    out = model.loss(ids, labels)
    loss = out.ce_sum / out.num_tokens
    torch.testing.assert_close(loss.double(), want["loss"].double(), rtol=1e-6, atol=1e-6)
    loss.backward()
    names = np.load(GOLDEN / case / "expected.npz")["grad_names"].tolist()
    norms = dict(zip(names, want["grad_l2"].tolist(), strict=True))
    compared = 0
    for name, parameter in model.named_parameters():
        for piece in pieces_of(name, tuple(parameter.shape), model.cfg):
            if "layers.0.mlp.moe.gate.gate_map" in piece.key:
                continue  # no gradient there, zeros here
            assert parameter.grad is not None
            own = parameter.grad[piece.target] if piece.target else parameter.grad
            assert own.norm().item() == pytest.approx(norms.pop(piece.key), rel=1e-4, abs=1e-7), piece.key
            compared += 1
    assert compared > 100 and all("layers.0.mlp.moe.gate.gate_map" in name for name in norms)


def _sharded_logits(rank: int, case: str) -> tuple[int, Tensor]:
    with torch.device("meta"):
        model = Transformer(official.read_config(GOLDEN / case), ExpertParallel(torch.distributed.group.WORLD))
    model.to_empty(device="cpu")
    official.load_into(model, GOLDEN / case, rank, torch.distributed.get_world_size())
    model.eval()
    with torch.no_grad():
        logits = model.logits(model(expected(case)["input_ids"]).hidden)
    return model.layers[0].moe.experts.down_proj.shape[0], logits


@pytest.mark.parametrize("case", CASES[:2])
def test_experts_sharded_over_ranks_give_the_released_logits(case, pool_2):
    num_experts = official.read_config(GOLDEN / case).moe.num_ffn_experts
    for held, logits in pool_2.run(_sharded_logits, case):
        assert held == num_experts // 2
        torch.testing.assert_close(logits, expected(case)["logits"], rtol=0, atol=2e-5)
