"""Shapes of the paper's layers, and routing drawn from the balanced distribution.

Shapes: T tokens, D width, F expert width, E = N experts of every kind, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moepp.config import ModelConfig, MoEConfig
from moepp.moe import MoELayer
from moepp.moe.gates import compute_gates
from moepp.moe.losses import balance_loss
from moepp.moe.router import LinearRouter
from moepp.ops import count_experts, linear_fp32


@dataclass(frozen=True)
class Case:
    """One layer shape: its FFN experts alone are the vanilla MoE of the same size."""

    name: str
    num_ffn: int
    num_constant: int  # besides one zero and one copy expert
    hidden_size: int
    ffn_hidden_size: int
    top_k: int = 2

    def config(self, tau: float | None) -> MoEConfig:
        """Return the MoE++ layer for ``tau``, or the vanilla one for None; dropless."""
        zero_computation = 0 if tau is None else 1
        return MoEConfig(
            num_ffn_experts=self.num_ffn,
            num_zero_experts=zero_computation,
            num_copy_experts=zero_computation,
            num_constant_experts=0 if tau is None else self.num_constant,
            ffn_hidden_size=self.ffn_hidden_size,
            top_k=self.top_k,
            tau=1.0 if tau is None else tau,
            capacity_factor=None,
        )

    def limit(self, tau: float) -> float:
        """Return the largest speed-up over the vanilla layer that the arithmetic allows: (τ N_F + N_Z) / (τ N_F)."""
        return 1 + (self.num_constant + 2) / (tau * self.num_ffn)

    def expert_flops(self, ffn_assignments: float) -> float:
        """Return the FLOPs of an expert's three matrix products, forward, for ``ffn_assignments`` assignments."""
        return 6.0 * ffn_assignments * self.hidden_size * self.ffn_hidden_size


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A whole model: ``num_ffn`` FFN experts and 4 zero-computation experts a layer, top-2, dropless."""

    num_layers: int = 4
    hidden_size: int = 768
    ffn_hidden_size: int = 2048
    num_ffn: int = 8
    num_heads: int = 12
    vocab_size: int = 16384
    seq_len: int = 512
    tau: float = 0.75

    def model_config(self, vanilla: bool = False) -> ModelConfig:
        """Return the MoE++ model, or the vanilla MoE of the same FFN experts; both compute every assignment."""
        few = 0 if vanilla else 1
        return ModelConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            max_seq_len=self.seq_len,
            moe=MoEConfig(
                num_ffn_experts=self.num_ffn,
                ffn_hidden_size=self.ffn_hidden_size,
                num_zero_experts=few,
                num_copy_experts=few,
                num_constant_experts=2 * few,
                gating_residual=not vanilla,
                tau=1.0 if vanilla else self.tau,
                capacity_factor=None,
            ),
        )


# MoE++ (arXiv 2410.07348), Table 2.
CASES = {
    case.name: case
    for case in (
        Case("8+4", 8, 2, 768, 2048),
        Case("16+4", 16, 2, 768, 2048),
        Case("32+8", 32, 6, 768, 2048),
        Case("7b-16+4", 16, 2, 1536, 4096),
        Case("quick", 4, 2, 128, 256),
    )
}


def make_layer(case: Case, tau: float | None, dtype: torch.dtype, device: torch.device, seed: int = 0) -> MoELayer:
    """Return a layer with random weights of the usual size; in eval and training mode dropless."""
    torch.manual_seed(seed)
    return MoELayer(case.config(tau), case.hidden_size).to(device=device, dtype=dtype)


def balanced_logits(cfg: MoEConfig, num_tokens: int, seed: int = 0) -> Tensor:
    """Return logits [T, E] whose top-K choices are random and spread as the balance loss wants them at its minimum.

    FFN experts each get a share τ / (τ N_F + N_Z) of the assignments, the others 1 / (τ N_F + N_Z). Random scores are
    biased until the shares fit (drawing K experts without replacement would make popular ones too rare).
    """
    generator = torch.Generator().manual_seed(seed)
    uniform_TE = torch.rand(num_tokens, cfg.num_experts, generator=generator).clamp_(1e-9, 1 - 1e-7)
    gumbel_TE = -torch.log(-torch.log(uniform_TE))
    target_E = torch.ones(cfg.num_experts)
    if cfg.num_zero_computation_experts:
        target_E[: cfg.num_ffn_experts] = cfg.tau
    target_E /= target_E.sum()
    bias_E = target_E.log()
    for _ in range(60):
        chosen = torch.topk(gumbel_TE + bias_E, cfg.top_k, dim=-1).indices.flatten()
        share_E = torch.bincount(chosen, minlength=cfg.num_experts).clamp(min=1) / chosen.numel()
        bias_E -= 0.7 * (share_E / target_E).log()
    return gumbel_TE + bias_E


class ForcedRouting:
    """Adds fixed logits to a layer's router, which still does all its work; the choice is then theirs.

    Use as a context manager around the calls.
    """

    def __init__(self, layer: MoELayer, num_tokens: int, strength: float = 8.0) -> None:
        parameter = next(layer.parameters())
        self._layer = layer
        self._logits_TE = (strength * balanced_logits(layer.cfg, num_tokens)).to(parameter.device)

    def __enter__(self) -> ForcedRouting:
        self._handle = self._layer.router.register_forward_hook(self._add)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _add(self, _module: object, _args: object, logits_TE: Tensor) -> Tensor:
        return logits_TE + self._logits_TE


def learn_balance(layer: MoELayer, x_TD: Tensor, steps: int = 150, lr: float = 2e-4) -> None:
    """Train the router alone on the balance loss, so that its routing is learned instead of forced."""
    assert isinstance(layer.router, LinearRouter)
    weight = layer.router.weight
    master = weight.detach().float().clone().requires_grad_()
    optimizer = torch.optim.Adam([master], lr=lr)
    for _ in range(steps):
        logits_TE = linear_fp32(x_TD, master)
        gates = compute_gates(logits_TE, layer.cfg)
        share_E = count_experts(gates.topk_ids_TK.flatten(), layer.cfg.num_experts) / x_TD.shape[0]
        optimizer.zero_grad()
        balance_loss(probs_TE=gates.probs_TE, selection_share_E=share_E, cfg=layer.cfg).backward()
        optimizer.step()
    with torch.no_grad():
        weight.copy_(master)


def random_tokens(num_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return hidden states [T, D] around a common mean, like a trained model's, which require gradients."""
    generator = torch.Generator().manual_seed(1)
    mean_D = torch.randn(hidden_size, generator=generator)
    x_TD = torch.randn(num_tokens, hidden_size, generator=generator) + 0.5 * mean_D
    return x_TD.to(device=device, dtype=dtype).requires_grad_()
