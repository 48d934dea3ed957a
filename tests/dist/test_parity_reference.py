"""The reference of the parity tests, one process with the native engine, against plain PyTorch in float64.

The plain model computes every expert on every token and masks; it shares no code with ``moepp`` and takes from it only
the initial weights. Optimizer, clipping and schedule are torch's own or written out here.

Shapes: B sequences, S tokens each, T = B·S, D width, E experts of every kind (FFN, constant, copy, zero).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moepp.config import Config
from moepp.distributed import comm
from moepp.training.build import build_model
from tests.parity import (
    EVAL_BATCHES,
    GLOBAL_BATCH,
    REFERENCE,
    STEPS,
    Deviation,
    History,
    Setting,
    deviation,
    group_of,
    make_config,
    make_one_sided,
    make_sequences,
    train,
)

Tensor = torch.Tensor
Weights = dict[str, Tensor]
NOT_DECAYED = ("norm.weight", "zero_computation.value")
MARGIN = 1e-5


def initial_weights(rank: int, setting: Setting) -> Weights:
    """What the product starts from."""
    model = build_model(make_config(setting, REFERENCE), group_of(1), comm.CommStats())
    if setting.one_sided:
        make_one_sided(model)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def attention(cfg: Any, w: Weights, prefix: str, x_BSD: Tensor) -> Tensor:
    batch, length, width = x_BSD.shape
    size = width // cfg.num_heads
    angle = torch.outer(torch.arange(length).double(), cfg.rope_theta ** (-torch.arange(size // 2).double() * 2 / size))
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # [S, 1, size/2]

    def heads(name: str, rotated: bool = True) -> Tensor:
        x = (x_BSD @ w[f"{prefix}.{name}.weight"].T).view(batch, length, -1, size)
        if rotated:
            turned = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
            x = torch.cat((turned.real, turned.imag), dim=-1)
        return x.repeat_interleave(cfg.num_heads // x.shape[2], dim=2)

    scores = torch.einsum("bihd,bjhd->bhij", heads("q_proj"), heads("k_proj")) / math.sqrt(size)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    mixed = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(future, -math.inf).softmax(-1), heads("v_proj", False))
    return mixed.reshape(batch, length, width) @ w[f"{prefix}.o_proj.weight"].T


def experts(cfg: Any, w: Weights, prefix: str, x_TD: Tensor) -> list[Tensor]:
    """The output of every expert on every token."""
    outputs = []
    for e in range(cfg.num_ffn_experts):
        gate, up = (x_TD @ w[f"{prefix}.experts.gate_up_proj"][e].T).split(cfg.ffn_hidden_size, dim=1)
        outputs.append((gate * torch.sigmoid(gate) * up) @ w[f"{prefix}.experts.down_proj"][e].T)
    for c in range(cfg.num_constant_experts):
        alpha = (x_TD @ w[f"{prefix}.zero_computation.alpha_proj"][c].T).softmax(-1)
        outputs.append(alpha[:, :1] * x_TD + alpha[:, 1:] * w[f"{prefix}.zero_computation.value"][c])
    return outputs + [x_TD] * cfg.num_copy_experts + [torch.zeros_like(x_TD)] * cfg.num_zero_experts


def moe(cfg: Any, w: Weights, prefix: str, x_TD: Tensor, prev_TE: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Output, router logits, and Eq. 7 with all tokens of the batch (unweighted), plus the z-loss with its weight."""
    logits_TE = x_TD @ w[f"{prefix}.router.weight"].T
    if prev_TE is not None:
        logits_TE = logits_TE + prev_TE @ w[f"{prefix}.router.gate_map.weight"].T
    p_TE = logits_TE.softmax(-1)
    chosen_TE = p_TE >= p_TE.sort(dim=-1).values[:, -cfg.top_k :][:, :1]
    kind = ["ffn"] * cfg.num_ffn_experts + ["constant"] * cfg.num_constant_experts
    kind += ["copy"] * cfg.num_copy_experts + ["zero"] * cfg.num_zero_experts
    gate_TE = p_TE * chosen_TE * torch.tensor([float(k != "zero") for k in kind])
    gate_TE = gate_TE / gate_TE.sum(-1, keepdim=True)
    out_TD = sum(gate_TE[:, e, None] * y for e, y in enumerate(experts(cfg, w, prefix, x_TD)))
    eta = torch.tensor([1.0 if k == "ffn" else cfg.tau for k in kind]).double()
    balance = (eta * chosen_TE.double().mean(0) * p_TE.mean(0)).sum()
    z = (logits_TE.logsumexp(-1) ** 2).mean()
    assert isinstance(out_TD, Tensor)
    return out_TD, logits_TE, torch.stack((balance, z))


def losses(cfg: Config, w: Weights, sequences: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, and balance loss and z-loss summed over layers, of one global batch."""
    m = cfg.model

    def norm(name: str, x: Tensor) -> Tensor:
        return w[name] * x / (x.pow(2).mean(-1, keepdim=True) + m.norm_eps).sqrt()

    h_BSD = w["embed_tokens.weight"][torch.stack([s["tokens"] for s in sequences])]
    prev, extra = None, torch.zeros(2, dtype=torch.float64)
    for i in range(m.num_layers):
        p = f"layers.{i}"
        h_BSD = h_BSD + attention(m, w, f"{p}.self_attn", norm(f"{p}.input_layernorm.weight", h_BSD))
        x_TD = norm(f"{p}.post_attention_layernorm.weight", h_BSD).flatten(0, 1)
        y_TD, prev, layer_losses = moe(m.moe, w, f"{p}.moe", x_TD, prev)
        h_BSD, extra = h_BSD + y_TD.view_as(h_BSD), extra + layer_losses
    logits = norm("norm.weight", h_BSD).flatten(0, 1) @ w["lm_head.weight"].T
    ce = F.cross_entropy(logits, torch.cat([s["labels"] for s in sequences]))
    return ce, extra[0], extra[1]


def plain_learning_rate(cfg: Config, step: int) -> float:
    o = cfg.optim
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    turn = math.pi * (step - o.warmup_steps) / (STEPS - 1 - o.warmup_steps)
    return o.min_lr + (o.lr - o.min_lr) * (1 + math.cos(turn)) / 2


def plain_training(setting: Setting, start: Weights) -> History:
    cfg, history = make_config(setting, REFERENCE), History()
    w = {name: value.double().requires_grad_() for name, value in start.items()}
    groups = [
        {"params": [v for n, v in w.items() if not n.endswith(NOT_DECAYED)], "weight_decay": cfg.optim.weight_decay},
        {"params": [v for n, v in w.items() if n.endswith(NOT_DECAYED)], "weight_decay": 0.0},
    ]
    if setting.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=1.0)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=cfg.optim.betas, eps=cfg.optim.eps)
    train_set = make_sequences(STEPS * GLOBAL_BATCH, 1)
    for step in range(STEPS):
        optimizer.zero_grad()
        ce, balance, z = losses(cfg, w, train_set[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH])
        (ce + cfg.model.moe.balance_loss_weight * balance + cfg.model.moe.z_loss_weight * z).backward()
        # The first layer's gate map has no input and so no gradient here; the product gives it zeros, and decays it.
        for value in w.values():
            value.grad = torch.zeros_like(value) if value.grad is None else value.grad
        norm = torch.nn.utils.clip_grad_norm_(w.values(), setting.grad_clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = plain_learning_rate(cfg, step)
        optimizer.step()
        history.loss.append(float(ce.detach()))
        history.balance_loss.append(float(balance.detach()))
        history.grad_norm.append(float(norm))
    with torch.no_grad():
        held_out = make_sequences(EVAL_BATCHES * GLOBAL_BATCH, 2)
        parts = [held_out[i * GLOBAL_BATCH : (i + 1) * GLOBAL_BATCH] for i in range(EVAL_BATCHES)]
        history.eval_loss.append(sum(float(losses(cfg, w, part)[0]) for part in parts) / EVAL_BATCHES)
    return history


def compare(pool: Any, setting: Setting, trained_as: Setting | None = None) -> Deviation:
    """The product's training against the plain one, which may be told another setting."""
    [start] = pool.run(initial_weights, setting)
    [observed] = pool.run(train, setting, REFERENCE)
    return deviation(plain_training(trained_as or setting, start), observed)


# Without clipping, SGD from the one-sided start diverges.
@pytest.mark.parametrize(("one_sided", "grad_clip"), [(False, 0.3), (True, 0.3), (False, None)])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_process_trains_as_plain_pytorch_does(pool_1, optimizer, grad_clip, one_sided):
    found = compare(pool_1, Setting(optimizer, one_sided, grad_clip))
    assert found.worst < MARGIN, found


# The comparison with plain PyTorch notices mistakes that every layout would make alike.
OTHER_SETTINGS = {
    "other weight of the balance loss": {"moe": (("balance_loss_weight", 0.29),)},
    "other tau": {"moe": (("tau", 0.61),)},
    "no z-loss": {"moe": (("z_loss_weight", 0.0),)},
    "other clipping": {"grad_clip": 0.301},
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_comparison_with_plain_pytorch_notices(pool_1, name):
    setting = Setting("sgd")
    assert compare(pool_1, setting, Setting("sgd", **OTHER_SETTINGS[name])).worst > 10 * MARGIN


def test_comparison_with_plain_pytorch_notices_what_decays(pool_1, monkeypatch):
    monkeypatch.setattr(f"{__name__}.NOT_DECAYED", ("norm.weight",))
    assert compare(pool_1, Setting("sgd")).worst > 10 * MARGIN
