"""On the path of an accelerator the host waits for nothing, neither in forward nor in backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from moepp import MoEConfig, MoELayer
from moepp.config import ModelConfig
from moepp.metrics.step_stats import StepStats
from moepp.model import Transformer
from moepp.ops import matmul, use_grouped_products, use_kernels
from tests.devices import DEVICES
from tests.host_waits import device_waits

D, F, T = 16, 32, 24
MOEPP = MoEConfig(4, F, 1, 1, 2, tau=0.5, capacity_factor=None, z_loss_weight=0.1)
CONFIGS = {
    "dropless": MOEPP,
    "capacity": dataclasses.replace(MOEPP, capacity_factor=1.1),
    "capacity by position": dataclasses.replace(MOEPP, capacity_factor=1.1, drop_policy="position"),
    "vanilla": MoEConfig(4, F, capacity_factor=None, gating_residual=False),
    "paper's gates, MLP router": dataclasses.replace(MOEPP, router="mlp", gate_normalization="none"),
    "scaled": dataclasses.replace(MOEPP, scale_input_by_top_k=True, logits_norm_std=1.0),
    "Mixtral's gates, balance over ranks": dataclasses.replace(
        MOEPP, gate_normalization="topk_softmax", balance_loss_scope="data_parallel"
    ),
}


@contextmanager
def accelerator_path() -> Iterator[None]:
    with use_kernels("torch"), use_grouped_products():
        yield


def step(cfg: MoEConfig, device: torch.device | str, hook: Callable[..., Any] | None = None) -> None:
    layer = MoELayer(cfg, D).to(device, torch.bfloat16)
    if hook is not None:
        layer.router.register_forward_hook(hook)
    x = torch.randn(T, D, device=device).to(torch.bfloat16).requires_grad_()
    prev = torch.randn(T, cfg.num_experts, device=device) if cfg.gating_residual else None
    with accelerator_path(), device_waits(torch.device(device).type) as found:
        out = layer(x, prev)
        (out.hidden.float().square().sum() + out.aux_loss).backward()
    assert not found, f"the host waits: {dict(found)}"


@pytest.fixture(autouse=True)
def found_out(request, monkeypatch):
    """What a trial product finds out once in a process: whether products of bfloat16 can be float32."""
    can_be_float32 = getattr(request, "param", False)
    monkeypatch.setattr(matmul, "_adds_into_float32", lambda device, dtype: can_be_float32)


@pytest.mark.parametrize("found_out", [False, True], indirect=True)
@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_host_waits_for_nothing_with_all_experts_here(cfg, found_out):
    step(cfg, "meta")


@pytest.mark.parametrize("recompute", [False, True])
def test_a_models_forward_backward_and_statistics_wait_for_nothing(recompute):
    shapes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": D,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "max_seq_len": 16,
    }
    cfg = ModelConfig(moe=CONFIGS["capacity"], **shapes)
    with torch.device("meta"):
        model = Transformer(cfg).to(torch.bfloat16)
        ids = torch.zeros(2, 13, dtype=torch.int64)
    model.set_recompute(recompute)
    stats = StepStats([*cfg.moe_layers, 2], cfg.moe, rows=cfg.moe_layers)  # another rank holds the last layer
    with accelerator_path(), device_waits() as found:
        for _ in range(2):  # micro-batches
            out = model.loss(ids[:, :-1], ids[:, 1:])
            stats.add_micro_batch(out.stats, out.ce_sum, out.num_tokens)
            (out.ce_sum / out.num_tokens + out.aux_loss).backward()
        stats.commit()
    assert not found, f"the host waits: {dict(found)}"


@pytest.mark.parametrize("device", [d for d in DEVICES if d.type == "cuda"] or [None])
def test_cuda_itself_sees_no_wait(device):
    if device is None:
        pytest.skip("needs a CUDA device")
    step(MOEPP, device)  # allocates
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(MOEPP, device)
    finally:
        torch.cuda.set_sync_debug_mode(before)


WAYS: dict[str, Callable[[torch.Tensor], object]] = {
    "tolist": lambda t: t.tolist(),
    "item": lambda t: t.sum().item(),
    "float": lambda t: float(t.sum()),
    "int": lambda t: int(t.sum()),
    "bool": lambda t: bool(t.sum() > 0),
    "index": lambda t: range(5)[t.argmax()],
    "nonzero": lambda t: t.nonzero(),
    "where with one argument": lambda t: torch.where(t > 0),
    "masked indexing": lambda t: t[t > 0],
    "masked assignment of rows": lambda t: t.clone().__setitem__(t.sum(1) > 0, torch.zeros(1, device=t.device)),
    "indexing by a list": lambda t: t[[0, 1]],
    "assignment to listed columns": lambda t: t.clone().__setitem__((slice(None), [0, 1]), 0.0),
    "masked_select": lambda t: t.masked_select(t > 0),
    "unique": lambda t: t.unique(),
    "bincount": lambda t: t.argmax(1).bincount(),
    "repeat_interleave": lambda t: t.repeat_interleave(t.argmax(1), dim=0),
    "torch.tensor": lambda t: torch.tensor([1.0], device=t.device),
    "torch.tensor of one number": lambda t: torch.tensor(1.0, device=t.device),
    "new_tensor": lambda t: t.new_tensor([1.0]),
    "as_tensor": lambda t: torch.as_tensor([1.0], device=t.device),
    "to the device": lambda t: torch.ones(2).to(t.device),
    "to another tensor's place": lambda t: torch.ones(2).to(t),
    "to the device from pages that are not locked": lambda t: torch.ones(2).to(t.device, non_blocking=True),
    "copy_ from the host": lambda t: torch.empty_like(t).copy_(torch.ones(t.shape)),
    "cpu": lambda t: t.cpu(),
    "to the host": lambda t: t.to("cpu"),
    "copy_ to the host": lambda t: torch.ones(t.shape).copy_(t),
    "numpy": lambda t: t.numpy(),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_every_way_to_wait_is_seen_when_it_is_put_into_a_layer(way):
    def hook(module: Any, given: Any, logits: torch.Tensor) -> None:
        way(logits.detach())

    with pytest.raises((AssertionError, RuntimeError, NotImplementedError, TypeError)) as caught:
        step(MOEPP, "meta", hook)
    text = str(caught.value)
    assert any(word in text for word in ("the host waits", "meta", "Meta", "item", "numpy")), text
