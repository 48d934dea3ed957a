"""A gate normalisation and a balance rule: functions."""

import torch
from torch import Tensor

from moepp.config import MoEConfig
from moepp.moe.gates import Gates
from moepp.registry import BALANCE_RULES, GATE_NORMALIZATIONS


@GATE_NORMALIZATIONS.register("topk_sigmoid")
def topk_sigmoid(logits_TE: Tensor, cfg: MoEConfig) -> Gates:
    """Weigh each chosen expert by the sigmoid of its logit."""
    logits_TK, ids_TK = logits_TE.topk(cfg.top_k, dim=-1)
    return Gates(logits_TE.softmax(dim=-1), ids_TK, logits_TK.sigmoid())


@BALANCE_RULES.register("ffn_only")
def ffn_only(*, probs_TE: Tensor, selection_share_E: Tensor, cfg: MoEConfig) -> Tensor:
    """Balance the FFN experts among themselves and leave the other kinds alone."""
    num_ffn = cfg.num_ffn_experts
    mean_E = probs_TE.sum(dim=0) / max(len(probs_TE), 1)
    return torch.dot(selection_share_E[:num_ffn], mean_E[:num_ffn])
