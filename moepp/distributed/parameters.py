"""Which parameters are sharded over experts, and which decay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with the same reduction and the same weight decay, by name."""

    name: str
    expert: bool
    decay: bool
    parameters: dict[str, nn.Parameter]


def is_expert_parameter(name: str) -> bool:
    """Return whether the parameter is stacked over FFN experts (dimension 0) and so sharded over the EP group."""
    return ".experts." in f".{name}"


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay applies to matrices; norms and vectors are left alone.

    The first dimension of a zero-computation expert's parameter counts experts: constant vectors are [C, D].
    """
    return parameter.dim() >= (3 if ".zero_computation." in f".{name}" else 2)


def group_parameters(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[ParameterGroup]:
    """Split into dense/expert x decay/no-decay; every parameter is in exactly one group, empty groups are left out."""
    groups = [
        ParameterGroup(f"{kind}_{'decay' if decay else 'no_decay'}", kind == "expert", decay, {})
        for kind in ("dense", "expert")
        for decay in (True, False)
    ]
    for name, parameter in named_parameters:
        for group in groups:
            if group.expert == is_expert_parameter(name) and group.decay == decays(name, parameter):
                group.parameters[name] = parameter
    return [group for group in groups if group.parameters]
