"""Layers and models that the checks run, and what they give as named tensors.

Shapes: T tokens, D width, B sequences of S tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

from moepp.bench.cases import Case, ForcedRouting, make_layer, random_tokens
from moepp.config import ModelConfig, configs_folder
from moepp.config.load import build
from moepp.model.init import init_parameters
from moepp.model.transformer import Transformer
from moepp.moe import MoELayer
from tests.gpu.report import Place, Report

Results = dict[str, Tensor | None]  # an output and gradients by name
SMALL = Case("small", 4, 2, 32, 48)
PAPER = Case("8+4", 8, 2, 768, 2048)  # MoE++ 0.6B (arXiv 2410.07348, Table 2)


def device_events(profiler: Any) -> list[Any]:
    """What ran on the GPU while a profiler looked: kernels and copies, with start, duration and stream."""
    results = profiler.profiler
    assert results is not None and results.kineto_results is not None
    events = results.kineto_results.events()
    return [event for event in events if event.device_type() == DeviceType.CUDA and not event.is_user_annotation()]


class LayerRun:
    """One layer with fixed tokens, gradients and balanced routing; the same for everyone who compares.

    Args:
        place: the device; on the CPU the layer is small.
        num_tokens: T.
        dtype: of parameters and tokens.
        case: the layer's shape, MoE++ with tau 0.75.
    """

    def __init__(self, place: Place, num_tokens: int, dtype: torch.dtype, case: Case | None = None) -> None:
        case = case or (PAPER if place.is_cuda else SMALL)
        self.layer = make_layer(case, 0.75, dtype, place.device)
        self.x_TD = random_tokens(num_tokens, case.hidden_size, dtype, place.device)
        generator = torch.Generator().manual_seed(2)
        self.grad_TD = torch.randn(self.x_TD.shape, generator=generator).to(self.x_TD)
        self.routing = ForcedRouting(self.layer, num_tokens)

    def forward(self) -> Any:
        """The layer's output."""
        with self.routing:
            return self.layer(self.x_TD)

    def backward(self, out: Any) -> None:
        """With the given gradient of the output and that of the auxiliary loss."""
        torch.autograd.backward([out.hidden, out.aux_loss], [self.grad_TD, None])

    def step(self) -> Results:
        """Output and all gradients of one forward and backward."""
        self.layer.zero_grad(set_to_none=True)
        self.x_TD.grad = None
        out = self.forward()
        self.backward(out)
        grads = {f"gradient of {name}": parameter.grad for name, parameter in self.layer.named_parameters()}
        results = {"output": out.hidden.detach(), "gradient of x": self.x_TD.grad} | grads
        return {name: None if value is None else value.clone() for name, value in results.items()}


def paper_model(name: str, num_layers: int | None = None, **changes: Any) -> ModelConfig:
    """A model of configs/model, perhaps with fewer layers."""
    import yaml

    cfg = build(
        ModelConfig, yaml.safe_load((configs_folder() / "model" / f"{name}.yaml").read_text(encoding="utf-8")), "model"
    )
    if num_layers is not None:
        changes["num_layers"] = num_layers
    return dataclasses.replace(cfg, **changes)


def step_model(place: Place) -> ModelConfig:
    """Two layers of MoE++ 0.6B, or of the demo's model on the CPU."""
    if place.is_cuda:
        return paper_model("moepp_0.6b", 2)
    return paper_model("tiny", 2, hidden_size=64, vocab_size=256)


class ModelRun:
    """A transformer with balanced routing and one batch of random tokens."""

    def __init__(
        self, place: Place, cfg: ModelConfig, dtype: torch.dtype, batch_size: int, seq_len: int, recompute: bool = False
    ) -> None:
        with torch.device("meta"):
            self.model = Transformer(cfg)
        self.model.to_empty(device=place.device).to(dtype)
        init_parameters(self.model, seed=0)
        self.model.set_recompute(recompute)
        for module in self.model.modules():
            if isinstance(module, MoELayer):
                ForcedRouting(module, batch_size * seq_len).__enter__()  # for as long as the model lives
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, cfg.vocab_size, (batch_size, seq_len + 1), generator=generator)
        self.ids_BS = ids.to(place.device)

    def loss(self) -> Tensor:
        """Cross-entropy per token and auxiliary losses."""
        out = self.model.loss(self.ids_BS[:, :-1], self.ids_BS[:, 1:])
        return out.ce_sum / out.num_tokens + out.aux_loss

    def step(self) -> Results:
        """Loss and all gradients."""
        self.model.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        grads = {f"gradient of {name}": parameter.grad for name, parameter in self.model.named_parameters()}
        return {"loss": loss.detach()} | {n: None if g is None else g.clone() for n, g in grads.items()}


def expect_same_bits(report: Report, name: str, found: Results, wanted: Results) -> None:
    """Every tensor of one equals the other's."""
    report.equal(f"{name}: what there is", sorted(found), sorted(wanted))
    for part, value in wanted.items():
        report.same_bits(f"{name}: {part}", found.get(part), value)


def expect_close(report: Report, name: str, found: Results, wanted: Results, limit: float) -> None:
    """Every tensor of one is near the other's, relative to its largest entry."""
    report.equal(f"{name}: what there is", sorted(found), sorted(wanted))
    for part, value in wanted.items():
        report.close(f"{name}: {part}", found.get(part), value, limit)
