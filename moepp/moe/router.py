"""Routers: logits with gating residuals.

Shapes: T tokens, D width, E = N experts of every kind, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

from moepp import ops
from moepp.config import MoEConfig
from moepp.moe.gates import Gates, compute_gates, require_gates
from moepp.moe.registered import RegisteredModule, require_tensor, without_side_effects
from moepp.registry import ROUTERS


class Router(RegisteredModule):
    """Router logits with gating residual (MoE++, arXiv 2410.07348, Eq. 6), in fp32 even under autocast.

    ``logits_j = R_j(x) + W_g^j · logits_{j-1}``. A subclass says what R is, by :meth:`make_parameters` and
    :meth:`project`; it may also choose experts in its own way and keep state that is updated after every optimizer
    step. The first MoE layer has no predecessor: its previous logits are zeros, so its W_g stays unused but is kept,
    as in the released checkpoints.

    Buffers (``register_buffer``; see :class:`RegisteredModule`) must be the same on every rank;
    :meth:`after_optimizer_step` gets what it needs for that.
    """

    default_options: ClassVar[Mapping[str, bool | int | float | str]] = {}
    """Settings that ``model.moe.router_options`` may have, with their defaults; :attr:`options` has those in force.

    A value has the type of its default: bool, int, float or str. Another one is refused.
    """

    computed_by: ClassVar[tuple[str, ...]] = ("project", "forward")  # the residual's product is counted elsewhere

    def __init__(self, cfg: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.options = {**self.default_options, **cfg.router_options}
        self.make_parameters(hidden_size)
        self.gate_map = nn.Linear(cfg.num_experts, cfg.num_experts, bias=False) if cfg.gating_residual else None

    @classmethod
    def check(cls, cfg: MoEConfig) -> None:
        """Raise :class:`moepp.errors.ConfigError` for settings that this router cannot work with.

        Called for every configuration that names it, before anything else. ``cfg.router_options`` holds only names of
        :attr:`default_options`, with values of their types, by then.
        """

    def make_parameters(self, hidden_size: int) -> None:
        """Create the parameters and buffers of R."""
        raise NotImplementedError

    def project(self, x_TD: Tensor) -> Tensor:
        """R(x): logits [T, N] before the residual, fp32 (fp64 for fp64 input) whatever the dtype of x."""
        raise NotImplementedError

    def forward(self, x_TD: Tensor, prev_logits_TE: Tensor | None) -> Tensor:
        """Return logits [T, N] after the residual, before any normalisation; fp32 (fp64 for fp64 input).

        Args:
            x_TD: the tokens.
            prev_logits_TE: logits of the previous MoE layer.
        """
        logits_TE = self._require_logits(self.project(x_TD), x_TD)
        if self.gate_map is not None:
            logits_TE = ops.add_linear_fp32(logits_TE, prev_logits_TE, self.gate_map.weight)
        return logits_TE

    def choose(self, logits_TE: Tensor) -> Gates:
        """Return the K experts of every token (int64) and their gate weights (in the logits' dtype)."""
        return compute_gates(logits_TE, self.cfg)

    def route(self, x_TD: Tensor, prev_logits_TE: Tensor | None) -> tuple[Tensor, Gates]:
        """Return logits and gates, as :meth:`forward` and :meth:`gates` do, once they are right.

        Raises:
            ConfigError: they have another shape, dtype or device, or making them had side effects.
        """
        with self._watched(f"router {self.cfg.router}", x_TD, type(self) not in (LinearRouter, MLPRouter)):
            logits_TE = self(x_TD, prev_logits_TE)
        return self._require_logits(logits_TE, x_TD), self.gates(logits_TE)

    def gates(self, logits_TE: Tensor) -> Gates:
        """Return what :meth:`choose` does; errors as of :meth:`route`."""
        what, is_registered = f"router {self.cfg.router}", True
        if type(self).choose is Router.choose:
            what = f"gate normalisation {self.cfg.gate_normalization}"
            is_registered = self.cfg.gate_normalization not in ops.GATE_NORMALIZATIONS
        with self._watched(what, logits_TE, is_registered):
            gates = self.choose(logits_TE)
        return require_gates(gates, what, logits_TE, self.cfg) if is_registered else gates

    def _watched(self, what: str, like: Tensor, is_registered: bool) -> AbstractContextManager[None]:
        return without_side_effects(what, like, self) if is_registered else nullcontext()

    def _require_logits(self, logits_TE: Tensor, x_TD: Tensor) -> Tensor:
        shape, dtype = (len(x_TD), self.cfg.num_experts), torch.promote_types(x_TD.dtype, torch.float32)
        return require_tensor(logits_TE, f"router {self.cfg.router}", x_TD, shape, dtype)

    def after_optimizer_step(self, load_E: Tensor) -> None:
        """Update the buffers. Called after every optimizer step that was taken, not after one that was skipped.

        Only where :attr:`updates_after_step` is set; without autograd.

        Args:
            load_E: how often each expert was chosen in this step, before drops: all ranks and micro-batches, fp64.
        """


@ROUTERS.register("linear")
class LinearRouter(Router):
    """R(x) = W x, as the paper has it."""

    def make_parameters(self, hidden_size: int) -> None:
        self.weight = nn.Parameter(torch.empty(self.cfg.num_experts, hidden_size))

    def flops_per_token(self) -> float:
        return 2 * self.weight.numel()

    def project(self, x_TD: Tensor) -> Tensor:
        return ops.project(x_TD, self.weight)


@ROUTERS.register("mlp")
class MLPRouter(Router):
    """R(x) = W_2 tanh(W_1 x) with 8N hidden units, as the released code has it."""

    def make_parameters(self, hidden_size: int) -> None:
        n = self.cfg.num_experts
        self.fc1 = nn.Linear(hidden_size, 8 * n, bias=False)
        self.fc2 = nn.Linear(8 * n, n, bias=False)

    def flops_per_token(self) -> float:
        return 2 * (self.fc1.weight.numel() + self.fc2.weight.numel())

    def project(self, x_TD: Tensor) -> Tensor:
        return ops.linear_fp32(torch.tanh(ops.project(x_TD, self.fc1.weight)), self.fc2.weight)


def make_router(cfg: MoEConfig, hidden_size: int) -> Router:
    """Return the router that ``cfg.router`` names."""
    return ROUTERS.get(cfg.router)(cfg, hidden_size)
