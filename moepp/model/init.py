"""Initialisation by parameter name and logical shape: every layout starts from bitwise the same weights.

Each parameter, and each FFN expert of the stacked expert weights by its global index, has a random stream of its
own, seeded by (seed, name[, expert]). Neither the order of the parameters nor their device, dtype or sharding matters.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from moepp.config import ModelConfig
from moepp.distributed.parameters import is_expert_parameter, split_name, tensor_dim
from moepp.errors import ConfigError
from moepp.model.transformer import Transformer
from moepp.moe.registered import RegisteredModule, persistent_buffers


@torch.no_grad()
def init_parameters(model: Transformer, seed: int, ep_rank: int = 0, ep_size: int = 1) -> None:
    """Draw every parameter of ``model`` in place: in fp32 on the CPU, then cast and copied.

    Matrices, embeddings and routers: N(0, ``cfg.init_std``). Constant experts' vectors: N(0,
    ``cfg.constant_init_std``). Norms of the model: 1. Registered parts: N(0, ``cfg.init_std``), norms inside them too,
    unless they say otherwise (:meth:`RegisteredModule.init`). Buffers: see :func:`reset_buffers`.

    Args:
        model: any dtype and device; rank ``ep_rank`` of ``ep_size`` holds the FFN experts
            [ep_rank E_local, (ep_rank + 1) E_local), and a tensor-parallel rank its heads.
        seed: of the run.

    Raises:
        ConfigError: a parameter on the meta device, or a number of experts that does not fit ``ep_size``.
    """
    reset_buffers(model)
    num_local = model.cfg.moe.num_ffn_experts / ep_size
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ConfigError(f"parameter {name} is on the meta device and has no memory; call model.to_empty() first")
        std, constant = _std(name, model.cfg), _constant(model, name)
        if constant is not None:
            parameter.fill_(constant)
        elif is_expert_parameter(name):  # the first dimension counts the experts of this rank
            if parameter.shape[0] != num_local:
                raise ConfigError(
                    f"{name} holds {parameter.shape[0]} experts, but {model.cfg.moe.num_ffn_experts} over ep_size="
                    f"{ep_size} ranks are {num_local:g} each; pass the ep_size that the model was built with"
                )
            for local, expert_weight in enumerate(parameter):
                expert = ep_rank * parameter.shape[0] + local
                expert_weight.copy_(_draw(expert_weight.shape, std, f"{seed}/{name}/{expert}"))
        elif (dim := tensor_dim(name)) is not None:
            shape, (rank, size) = list(parameter.shape), (model.sequence.tensor_rank, model.sequence.tensor_size)
            shape[dim] *= size
            parameter.copy_(_draw(torch.Size(shape), std, f"{seed}/{name}").chunk(size, dim)[rank])
        else:
            parameter.copy_(_draw(parameter.shape, std, f"{seed}/{name}"))


def _constant(model: Transformer, name: str) -> float | None:
    """Return the value that fills a parameter; ``None``: it is drawn."""
    module: nn.Module = model
    path = name.split(".")
    for depth, part in enumerate(path[:-1], 1):
        module = module.get_submodule(part)
        if isinstance(module, RegisteredModule) and (value := module.init(".".join(path[depth:]))) is not None:
            return value
    return 1.0 if split_name(name)[0] is None and name.endswith("norm.weight") else None


@torch.no_grad()
def reset_buffers(model: nn.Module) -> None:
    """Give every buffer its value at the start; in memory that :meth:`to_empty` made there is none.

    Raises:
        ConfigError: a module with a buffer does not say which, or has a name or dtype that no checkpoint can hold.
    """
    for module in model.modules():
        if isinstance(module, RegisteredModule):
            module.reset_buffers()
            module.require_names()
    list(persistent_buffers(model))  # of dtypes that a checkpoint can hold


def _std(name: str, cfg: ModelConfig) -> float:
    """Return the standard deviation of a parameter."""
    return cfg.constant_init_std if split_name(name) == ("zero_computation", ["value"]) else cfg.init_std


def random_stream(key: str) -> torch.Generator:
    """Return a generator on the CPU whose numbers depend on ``key`` alone."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))


def _draw(shape: torch.Size, std: float, key: str) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=random_stream(key))
