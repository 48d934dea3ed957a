"""The decoder against an independent plain implementation: loops over heads, complex rotations, float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from moepp.config import ModelConfig, MoEConfig
from moepp.distributed.comm import CommStats
from moepp.errors import ConfigError
from moepp.model import KVCache, Transformer, init_parameters
from moepp.moe import ExpertParallel
from tests.dist import subgroups
from tests.oracle import moe_reference

Tensor = torch.Tensor


def make_config(**changes) -> ModelConfig:
    moe = MoEConfig(
        num_ffn_experts=4,
        ffn_hidden_size=6,
        num_zero_experts=1,
        num_copy_experts=1,
        num_constant_experts=2,
        capacity_factor=None,
        z_loss_weight=0.1,
        **changes.pop("moe", {}),
    )
    values = {
        "vocab_size": 23,
        "hidden_size": 16,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_seq_len": 32,
        "init_std": 0.3,
        "norm_eps": 1e-3,
        "rope_theta": 100.0,
    }
    return ModelConfig(moe=moe, **(values | changes))


def make_model(cfg: ModelConfig, dtype: torch.dtype = torch.float64) -> Transformer:
    model = Transformer(cfg).to(dtype)
    init_parameters(model, seed=5)
    with torch.no_grad():  # norms that differ, so that a forgotten or swapped one shows
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith("norm.weight"):
                parameter.add_(torch.linspace(-0.3, 0.2 + 0.05 * i, parameter.numel()))
    return model


def make_ids(batch: int = 2, length: int = 7, vocab_size: int = 23) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def reference_attention(cfg: ModelConfig, weights: dict[str, Tensor], prefix: str, x_SD: Tensor) -> Tensor:
    size = cfg.hidden_size // cfg.num_heads
    frequency = torch.tensor([cfg.rope_theta ** (-2 * i / size) for i in range(size // 2)], dtype=torch.float64)

    def rotate(head_Sd: Tensor) -> Tensor:
        rows = []
        for position, row in enumerate(head_Sd):
            turned = torch.complex(row[: size // 2], row[size // 2 :]) * torch.exp(1j * position * frequency)
            rows.append(torch.cat((turned.real, turned.imag)))
        return torch.stack(rows)

    def project(name: str) -> list[Tensor]:
        return list((x_SD @ weights[f"{prefix}.{name}.weight"].T).split(size, dim=1))

    queries, keys, values = project("q_proj"), project("k_proj"), project("v_proj")
    heads = []
    for j, query in enumerate(queries):
        group = j // (cfg.num_heads // cfg.num_kv_heads)
        query, key = rotate(query), rotate(keys[group])
        rows = []
        for i in range(len(x_SD)):
            weight = torch.softmax(key[: i + 1] @ query[i] / math.sqrt(size), dim=0)
            rows.append(weight @ values[group][: i + 1])
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=1) @ weights[f"{prefix}.o_proj.weight"].T


def reference_logits(cfg: ModelConfig, weights: dict[str, Tensor], ids_S: Tensor) -> tuple[Tensor, list]:
    """Logits [S, V] of one sequence and the MoE layers' references."""

    def norm(name: str, x_SD: Tensor) -> Tensor:
        return torch.stack(
            [weights[name] * row / (sum(v * v for v in row) / len(row) + cfg.norm_eps) ** 0.5 for row in x_SD]
        )

    h_SD, prev, references = weights["embed_tokens.weight"][ids_S], None, []
    for i in range(cfg.num_layers):
        p = f"layers.{i}"
        h_SD = h_SD + reference_attention(cfg, weights, f"{p}.self_attn", norm(f"{p}.input_layernorm.weight", h_SD))
        x_SD = norm(f"{p}.post_attention_layernorm.weight", h_SD)
        if (i + 1) % cfg.moe_layer_interval == 0:
            params = {n.removeprefix(f"{p}.moe."): w for n, w in weights.items() if n.startswith(f"{p}.moe.")}
            out = moe_reference(cfg.moe, params, [x_SD], [prev])[0]
            references.append(out)
            prev = out.router_logits_TN
            h_SD = h_SD + out.hidden_TD
        else:
            gate, up, down = (weights[f"{p}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
            g = x_SD @ gate.T
            h_SD = h_SD + (g / (1 + torch.exp(-g)) * (x_SD @ up.T)) @ down.T
    out_weight = weights["embed_tokens.weight" if cfg.tie_embeddings else "lm_head.weight"]
    return norm("norm.weight", h_SD) @ out_weight.T, references


CONFIGS = {
    "gqa": make_config(),
    "mha_mlp_router": make_config(num_kv_heads=4, moe={"router": "mlp", "logits_norm_std": 1.0}),
    "tied": make_config(tie_embeddings=True, num_kv_heads=1),
    "every_second_layer": make_config(num_layers=5, moe_layer_interval=2, dense_ffn_hidden_size=10),
    "no_moe_layer": make_config(num_layers=2, moe_layer_interval=3, dense_ffn_hidden_size=10),
}


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_logits_loss_and_gradients_agree_with_plain_implementation(cfg):
    model = make_model(cfg)
    ids_BS = make_ids(batch=1)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected_SV, references = reference_logits(cfg, weights, ids_BS[0])
    labels_S = torch.tensor([4, 8, -100, 1, 0, 22, 9])

    torch.testing.assert_close(model.logits(model(ids_BS).hidden)[0], expected_SV, rtol=1e-5, atol=1e-6)
    out = model.loss(ids_BS, labels_S.unsqueeze(0))
    expected_ce = sum(-torch.log_softmax(row, 0)[t] for row, t in zip(expected_SV, labels_S, strict=True) if t >= 0)
    expected_aux = sum((r.aux_loss for r in references), torch.zeros((), dtype=torch.float64))
    assert int(out.num_tokens) == 6
    torch.testing.assert_close(out.ce_sum, expected_ce, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.aux_loss.double(), expected_aux, rtol=1e-6, atol=1e-9)
    assert len(out.stats) == len(references) == len(cfg.moe_layers)
    for stats, reference in zip(out.stats, references, strict=True):
        assert stats.load_E.tolist() == reference.stats["load_E"]

    (out.ce_sum / 6 + 3 * out.aux_loss).backward()
    (expected_ce / 6 + 3 * expected_aux).backward()
    for name, parameter in model.named_parameters():
        grad = weights[name].grad if weights[name].grad is not None else torch.zeros_like(weights[name])
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_sequences_of_a_batch_do_not_see_each_other():
    model = make_model(CONFIGS["gqa"]).eval()
    ids_BS = make_ids(batch=3)
    together = model(ids_BS).hidden
    for row, ids_S in zip(together, ids_BS, strict=True):
        torch.testing.assert_close(row, model(ids_S.unsqueeze(0)).hidden[0])


def test_given_selection_shares_reach_their_moe_layer():
    cfg = CONFIGS["every_second_layer"]
    model, ids_BS = make_model(cfg), make_ids()
    shares_LE = torch.rand(2, cfg.moe.num_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    plain, given = model(ids_BS), model(ids_BS, selection_share_LE=shares_LE)
    for layer, (before, after) in enumerate(zip(plain.stats, given.stats, strict=True)):
        only = shares_LE.clone()
        only[1 - layer] = 0
        alone = model(ids_BS, selection_share_LE=only).stats[layer].balance_loss
        assert float(after.balance_loss) == float(alone) != float(before.balance_loss)
    torch.testing.assert_close(given.hidden, plain.hidden)


def test_tied_model_has_no_second_table():
    model = Transformer(CONFIGS["tied"])
    assert not [name for name, _ in model.named_parameters() if name.startswith("lm_head")]
    assert model.output_weight is model.embed_tokens.weight


@pytest.mark.parametrize("name", ["gqa", "every_second_layer"])
def test_recompute_changes_neither_gradients_nor_statistics(name):
    cfg = dataclasses.replace(CONFIGS[name], moe=dataclasses.replace(CONFIGS[name].moe, capacity_factor=0.7))
    model, ids_BS = make_model(cfg, torch.float32), make_ids()
    model.set_observed(True)
    results, stored = [], []
    for recompute in (False, True):
        model.set_recompute(recompute)
        model.zero_grad()
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model.loss(ids_BS, ids_BS.roll(-1, 1))
        (out.ce_sum + out.aux_loss).backward()
        results.append((out, {n: p.grad for n, p in model.named_parameters()}))
        stored.append(sum(sizes))
    assert stored[1] < stored[0] / 2  # it really stores less
    (plain, plain_grads), (again, again_grads) = results
    assert any(float(stats.drop_fraction) > 0 for stats in plain.stats)  # drops are repeated too
    for a, b in zip(plain.stats, again.stats, strict=True):
        for field in dataclasses.fields(a)[1:]:  # the first are names
            assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name
    assert torch.equal(plain.ce_sum, again.ce_sum) and torch.equal(plain.aux_loss, again.aux_loss)
    for parameter, grad in plain_grads.items():
        assert torch.equal(grad, again_grads[parameter]), parameter


def _gradients_on_rank(rank: int, ids_by_rank: list[Tensor], recompute: bool) -> tuple[dict[str, Tensor], int]:
    comm_stats = CommStats()
    model = Transformer(CONFIGS["gqa"], ExpertParallel(subgroups(2), stats=comm_stats)).double()
    init_parameters(model, 5, rank, 2)
    model.set_recompute(recompute)
    out = model.loss(ids_by_rank[rank], ids_by_rank[rank].roll(-1, 1))
    out.ce_sum.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, comm_stats.row_exchanges


@pytest.mark.parametrize("recompute", [False, True])
def test_two_ranks_sharing_the_experts_give_the_gradients_of_one_process(pool_2, recompute):
    ids_BS = make_ids(batch=3)
    model = Transformer(CONFIGS["gqa"]).double()
    init_parameters(model, 5)
    model.loss(ids_BS, ids_BS.roll(-1, 1)).ce_sum.backward()
    (first, exchanges), (second, _) = pool_2.run(_gradients_on_rank, [ids_BS[:1], ids_BS[1:]], recompute)
    assert exchanges == (6 if recompute else 4) * model.cfg.num_layers  # out and back; forward, (again,) backward
    for name, parameter in model.named_parameters():
        found = torch.cat((first[name], second[name])) if ".experts." in name else first[name] + second[name]
        torch.testing.assert_close(found, parameter.grad, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 1, 3], [9], [2, 7]])
def test_cached_decoding_equals_full_forward(pieces):
    model, ids_BS = make_model(CONFIGS["every_second_layer"]).eval(), make_ids(length=9)
    cache = KVCache(model.cfg.num_layers, max_length=9)
    parts = []
    for part_BS in ids_BS.split(pieces, dim=1):
        parts.append(model(part_BS, cache=cache).hidden)
    assert cache.length == 9
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids_BS).hidden)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_unpadded_sequences(side, cached):
    model = make_model(CONFIGS["gqa"]).eval()
    lengths, width = [3, 7, 5], 7
    ids_BS = make_ids(batch=3, length=width)
    ranges = [slice(width - n, width) if side == "left" else slice(0, n) for n in lengths]
    mask_BS = torch.zeros(3, width, dtype=torch.int64)
    for row, real in zip(mask_BS, ranges, strict=True):
        row[real] = 1
    if cached:
        cache = KVCache(model.cfg.num_layers, max_length=width)
        first = model(ids_BS[:, :4], None, mask_BS[:, :4], cache).hidden
        hidden = torch.cat((first, model(ids_BS[:, 4:], None, mask_BS, cache).hidden), dim=1)
    else:
        hidden = model(ids_BS, attention_mask=mask_BS).hidden
    assert hidden.isfinite().all()
    for row, real in enumerate(ranges):
        alone = model(ids_BS[row : row + 1, real]).hidden[0]
        torch.testing.assert_close(hidden[row, real], alone, rtol=1e-5, atol=1e-5)  # angles are fp32


def test_given_positions_are_used():
    model, ids_BS = make_model(CONFIGS["gqa"]).eval(), make_ids()
    plain = model(ids_BS).hidden
    shifted = model(ids_BS, torch.arange(3, 10).unsqueeze(0)).hidden
    spread = model(ids_BS, torch.arange(0, 14, 2).expand(2, 7)).hidden
    torch.testing.assert_close(shifted, plain, rtol=1e-5, atol=1e-5)  # only distances matter
    assert (spread - plain).abs().max() > 1e-3


def test_a_model_built_on_meta_equals_one_built_on_the_cpu():
    cfg = CONFIGS["gqa"]
    with torch.device("meta"):
        late = Transformer(cfg)
    assert not list(late.buffers())
    late = late.to_empty(device="cpu")
    init_parameters(late, seed=3)
    direct = Transformer(cfg)
    init_parameters(direct, seed=3)
    ids_BS = make_ids()
    assert torch.equal(late(ids_BS).hidden, direct(ids_BS).hidden)


def test_bfloat16_model_stays_near_float32():
    cfg = make_config(moe={"gating_residual": False}, init_std=0.1)
    model, ids_BS = make_model(cfg, torch.float32).eval(), make_ids(batch=4, length=12)
    exact = model(ids_BS).hidden
    rounded = model.bfloat16()(ids_BS)
    assert rounded.hidden.dtype == torch.bfloat16 and rounded.aux_loss.dtype == torch.float32
    per_token = (rounded.hidden.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert per_token.median() < 0.03  # a token at the edge between two experts may differ more


def test_wrong_mask_shape_and_full_cache_are_refused():
    model, ids_BS = make_model(CONFIGS["gqa"]).eval(), make_ids()
    with pytest.raises(ConfigError, match=r"attention_mask has shape \[2, 6\], expected \[2, 7\]"):
        model(ids_BS, attention_mask=torch.ones(2, 6))
    cache = KVCache(model.cfg.num_layers, max_length=8)
    model(ids_BS, cache=cache)
    with pytest.raises(ConfigError, match="batch of 1 does not match the 2 cached"):
        model(ids_BS[:1, :1], cache=cache)
    with pytest.raises(ConfigError, match="position 9 is beyond max_length=8"):
        model(ids_BS[:, :2], cache=cache)
