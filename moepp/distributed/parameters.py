"""Where each parameter lies: what is cut over which ranks, who holds copies of the same part, and what decays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from moepp.distributed import comm
from moepp.distributed.groups import ParallelGroups

# What a parameter may belong to. Routers and zero-computation experts may be registered, and have any names inside.
COMPONENTS = ("embed_tokens", "self_attn", "router", "experts", "zero_computation", "mlp", "lm_head")
# Tensor parallelism cuts the heads: rows of the projections to them, columns of the one from them.
_TENSOR_DIMS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1}


@dataclass(frozen=True)
class Placement:
    """How a parameter is spread over the ranks of a pipeline stage.

    Attributes:
        kind: "dense": whole on every rank; "tensor": cut over the tensor-parallel ranks; "expert": cut over the
            expert-parallel ranks.
        dim: the dimension that is cut, in equal parts; None: none.
    """

    kind: str
    dim: int | None

    def group(self, groups: ParallelGroups) -> comm.Group:
        """Return the ranks that hold the same part as this one: over them its gradient is summed."""
        return {"dense": groups.stage, "tensor": groups.dpcp, "expert": groups.edp}[self.kind]

    def copies(self, groups: ParallelGroups) -> int:
        """Return how many ranks hold the same part: so often the world counts it when every rank counts its own."""
        return comm.size(self.group(groups))

    def part(self, groups: ParallelGroups) -> tuple[int, int]:
        """(index, count): which of how many parts this rank holds."""
        parts = {
            "dense": (0, 1),
            "tensor": (groups.tp_rank, groups.tp_size),
            "expert": (groups.ep_rank, groups.ep_size),
        }
        return parts[self.kind]


DENSE, EXPERT = Placement("dense", None), Placement("expert", 0)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with the same reduction and the same weight decay, by name."""

    name: str
    placement: Placement
    decay: bool
    parameters: dict[str, nn.Parameter]


def split_name(name: str) -> tuple[str | None, list[str]]:
    """Return which of :data:`COMPONENTS` a parameter belongs to (None: a norm), and its path inside of that.

    The first in the name decides: what a registered part calls its own modules means nothing here.
    """
    path = name.split(".")
    place = next((place for place, word in enumerate(path) if word in COMPONENTS), None)
    return (None, path) if place is None else (path[place], path[place + 1 :])


def is_expert_parameter(name: str) -> bool:
    """Return whether the parameter is stacked over FFN experts (dimension 0) and so sharded over the EP group."""
    return split_name(name)[0] == "experts"


def tensor_dim(name: str) -> int | None:
    """Return the dimension along which tensor parallelism cuts the parameter; None: it is whole on every rank."""
    component, path = split_name(name)
    return _TENSOR_DIMS.get(path[0]) if component == "self_attn" else None


def placement_of(name: str, tensor_parallel: bool = True) -> Placement:
    """Return where the parameter lies; without ``tensor_parallel`` attention is dense like the rest."""
    if is_expert_parameter(name):
        return EXPERT
    dim = tensor_dim(name) if tensor_parallel else None
    return DENSE if dim is None else Placement("tensor", dim)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay applies to matrices; norms and vectors are left alone.

    The first dimension of a zero-computation expert's parameter counts experts: constant vectors are [C, D].
    """
    return parameter.dim() >= (3 if split_name(name)[0] == "zero_computation" else 2)


def group_parameters(
    named_parameters: Iterable[tuple[str, nn.Parameter]], tensor_parallel: bool = False
) -> list[ParameterGroup]:
    """Split into dense/tensor/expert x decay/no-decay.

    Every parameter is in exactly one group; empty groups are left out. The two cuts of tensor parallelism are
    reduced alike and share a group, whose ``placement.dim`` says nothing of one parameter.
    """
    groups = [
        ParameterGroup(f"{placement.kind}_{'decay' if decay else 'no_decay'}", placement, decay, {})
        for placement in (DENSE, Placement("tensor", None), EXPERT)
        for decay in (True, False)
    ]
    for name, parameter in named_parameters:
        kind, decay = placement_of(name, tensor_parallel).kind, decays(name, parameter)
        for group in groups:
            if group.placement.kind == kind and group.decay == decay:
                group.parameters[name] = parameter
    return [group for group in groups if group.parameters]
