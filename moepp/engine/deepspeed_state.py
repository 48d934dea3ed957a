"""Reading and writing fp32 parameters and optimizer state inside DeepSpeed's ZeRO partitions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moepp.config import OptimConfig
from moepp.engine.engine import Fetch, OwnPart, state_keys


def read_zero_state(model: nn.Module, optimizer: Any, optim: OptimConfig) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield each parameter's full fp32 value and optimizer state, assembled one at a time (collective)."""
    _link_optimizer_state(optimizer, optim)
    step = _any_step(optimizer, optim)
    for name, parameter in model.named_parameters():
        yield name, _read(name, parameter, optim) | ({} if step is None else {"step": step})


def _read(name: str, parameter: nn.Parameter, optim: OptimConfig) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state = {"fp32": safe_get_full_fp32_param(parameter)}
    for key in state_keys(optim):
        state[key] = safe_get_full_optimizer_state(parameter, key)
    return {key: _found(name, key, value) for key, value in state.items()}


@torch.no_grad()
def write_zero_state(model: nn.Module, optimizer: Any, optim: OptimConfig, fetch: Fetch) -> None:
    """Fill every parameter's partition from ``fetch``, then the model's own weights (collective)."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    _link_optimizer_state(optimizer, optim)
    step = torch.zeros(())
    for name, parameter in model.named_parameters():
        buffers = {key: torch.empty_like(parameter, dtype=torch.float32) for key in ("fp32", *state_keys(optim))}
        if state_keys(optim):
            buffers["step"] = step
        fetch(name, buffers)
        safe_set_full_fp32_param(parameter, buffers["fp32"])
        for key in state_keys(optim):
            safe_set_full_optimizer_state(parameter, buffers[key], key)
    for entry in optimizer.optimizer.state.values():
        if "step" in entry:
            entry["step"].copy_(step)
    optimizer.update_lp_params()


def own_zero_parts(model: nn.Module) -> Iterator[OwnPart]:
    """Yield this rank's partition of each parameter, after the gradients are summed and before the step."""
    parameter: Any  # DeepSpeed puts attributes of its own on parameters
    for name, parameter in model.named_parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:  # all of it lies in other ranks' partitions
            continue
        gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
        weight, place = mapping.get_hp_fragment(), mapping.lp_fragment_address
        if gradient.numel() != weight.numel():  # the bf16 optimizer keeps whole gradients
            gradient = gradient.narrow(0, place.start, place.numel)
        yield OwnPart(name, gradient, weight, 1)


def _found(name: str, key: str, value: Tensor | None) -> Tensor:
    assert value is not None, f"DeepSpeed has no {key} of {name}"
    return value


def _partitions(optimizer: Any) -> list[Tensor]:
    """Return this rank's flat fp32 partitions, one per parameter group."""
    return [parameter for group in optimizer.optimizer.param_groups for parameter in group["params"]]


def _link_optimizer_state(optimizer: Any, optim: OptimConfig) -> None:
    """Make every parameter group's optimizer state reachable by parameter.

    Before the first step there is none, so it is created as the optimizer would; after it DeepSpeed links only the
    first group until asked again.
    """
    for partition in _partitions(optimizer):
        state = optimizer.optimizer.state[partition]
        if state_keys(optim) and not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=partition.device)
            for key in state_keys(optim):
                state[key] = torch.zeros_like(partition)
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


def _any_step(optimizer: Any, optim: OptimConfig) -> Tensor | None:
    """Return the number of updates so far, the same for all parameters, which are updated together."""
    if not state_keys(optim):
        return None
    return optimizer.optimizer.state[_partitions(optimizer)[0]]["step"]
