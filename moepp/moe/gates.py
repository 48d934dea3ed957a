"""From router logits to gates: the experts that each token chooses, and their weights.

Shapes: T tokens, E = N experts of every kind (order FFN, constant, copy, zero, registered kinds), K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moepp import ops
from moepp.config import MoEConfig
from moepp.errors import ConfigError
from moepp.moe.registered import require_tensor
from moepp.registry import GATE_NORMALIZATIONS


@dataclass(frozen=True)
class Gates:
    """The experts that each token chose.

    Attributes:
        probs_TE: score of every expert, differentiable, in the logits' dtype; P_i of the balance loss is its mean.
        topk_ids_TK: chosen experts, K different ones per token, best first, int64.
        weights_TK: their gate weights, differentiable, before capacity drops, in the logits' dtype.
    """

    probs_TE: Tensor
    topk_ids_TK: Tensor
    weights_TK: Tensor


def compute_gates(logits_TE: Tensor, cfg: MoEConfig) -> Gates:
    """Return the top-K experts and their weights, as ``cfg.gate_normalization`` says, in the logits' precision.

    A gate normalisation is a function ``(logits_TE, cfg) -> Gates`` in :data:`moepp.registry.GATE_NORMALIZATIONS`,
    of its arguments alone.
    """
    if cfg.logits_norm_std is not None:
        centered_TE = logits_TE - logits_TE.mean(dim=-1, keepdim=True)
        std_T1 = (centered_TE.square().sum(dim=-1, keepdim=True) / (cfg.num_experts - 1)).sqrt()
        logits_TE = logits_TE / (std_T1 / cfg.logits_norm_std)
    return GATE_NORMALIZATIONS.get(cfg.gate_normalization)(logits_TE, cfg)


def require_gates(gates: Any, what: str, logits_TE: Tensor, cfg: MoEConfig) -> Gates:
    """Return the gates that a part made of these logits, once they are what :class:`Gates` says.

    The numbers of experts are looked at on the CPU alone; an accelerator would have to be waited for.

    Raises:
        ConfigError: they are not.
    """
    for name, width, dtype in (
        ("probs_TE", cfg.num_experts, logits_TE.dtype),
        ("topk_ids_TK", cfg.top_k, torch.int64),
        ("weights_TK", cfg.top_k, logits_TE.dtype),
    ):
        value = getattr(gates, name, gates)
        require_tensor(value, f"{name} of {what}", logits_TE, (len(logits_TE), width), dtype)
    if gates.topk_ids_TK.is_cpu and gates.topk_ids_TK.numel():
        least, most = (int(value) for value in gates.topk_ids_TK.aminmax())
        if least < 0 or most >= cfg.num_experts:
            raise ConfigError(
                f"topk_ids_TK of {what} holds {least if least < 0 else most}; return numbers of experts, 0 to "
                f"{cfg.num_experts - 1}"
            )
    return gates


def _softmax(logits_TE: Tensor, cfg: MoEConfig, *, normalization: str) -> Gates:
    zero = cfg.kind_slices["zero"]
    return Gates(*ops.softmax_gates(logits_TE, cfg.top_k, range(zero.start, zero.stop), normalization))


for _name in ops.GATE_NORMALIZATIONS:  # zero_masked (released code), none (paper), topk_softmax (Mixtral)
    GATE_NORMALIZATIONS.register(_name)(partial(_softmax, normalization=_name))
