"""A router that balances without a loss (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

Scores are s = sigmoid(logits). A token chooses the experts with the largest s + b; their weights are s alone,
normalised to sum to 1. After every optimizer step b_i grows by the update rate where expert i had less than the mean
load, and shrinks by it where it had more.
"""

from typing import ClassVar

import torch
from torch import Tensor

from moepp.config import MoEConfig
from moepp.errors import ConfigError
from moepp.moe.gates import Gates
from moepp.moe.router import LinearRouter
from moepp.registry import ROUTERS


@ROUTERS.register("bias")
class BiasRouter(LinearRouter):
    """Linear logits (with the gating residual, if it is on), sigmoid scores, a selection bias."""

    default_options: ClassVar = {"bias_update_rate": 0.001}
    updates_after_step = True

    @classmethod
    def check(cls, cfg: MoEConfig) -> None:
        rate = cfg.router_options.get("bias_update_rate", 0.0)
        if rate < 0:
            raise ConfigError(f"model.moe.router_options.bias_update_rate={rate} is negative; give 0 or more")
        if cfg.gate_normalization != "none" or cfg.logits_norm_std is not None:
            raise ConfigError(
                "router=bias makes its gate weights itself; set model.moe.gate_normalization=none and "
                "model.moe.logits_norm_std=null"
            )

    def make_parameters(self, hidden_size: int) -> None:
        super().make_parameters(hidden_size)
        self.register_buffer("bias", torch.zeros(self.cfg.num_experts))

    def reset_buffers(self) -> None:
        self.bias.zero_()

    def choose(self, logits_TE: Tensor) -> Gates:
        scores_TE = logits_TE.sigmoid()
        ids_TK = (scores_TE.detach() + self.bias).topk(self.cfg.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(-1, ids_TK)
        probs_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
        return Gates(probs_TE, ids_TK, weights_TK / weights_TK.sum(dim=-1, keepdim=True))

    @torch.no_grad()
    def after_optimizer_step(self, load_E: Tensor) -> None:
        self.bias += self.options["bias_update_rate"] * torch.sign(load_E.mean() - load_E).to(self.bias.dtype)
