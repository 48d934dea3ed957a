"""What a checkpoint holds, and how it comes out of and back into the engines.

One key per global parameter and state: ``<name>/fp32``, ``<name>/exp_avg``, ...; FFN experts, stacked in memory, get
a key each: ``<name>.<global expert>/fp32``. So nothing in it depends on the layout. Each key is written by one rank:
dense parameters are dealt out over the ranks of their pipeline stage, experts over the ranks that hold them; no rank
gathers the model. What tensor parallelism cuts is joined first, one parameter at a time.

Buffers, which are the same on every rank of a stage, are ``<name>/buffer``, written by its first one.

``rank-<r>/...`` holds what belongs to one rank: random number generators and statistics not yet logged.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from moepp.checkpoint.host_memory import HostMemory
from moepp.checkpoint.storage import Part, TensorReader
from moepp.distributed import comm
from moepp.distributed.groups import ParallelGroups
from moepp.distributed.parameters import is_expert_parameter, tensor_dim
from moepp.engine.engine import Engine, StateSource
from moepp.errors import CheckpointError, TrainingError
from moepp.io.untrusted import printable
from moepp.moe.registered import persistent_buffers

_BUFFER = "/buffer"


class Statistics(Protocol):
    """Sums of this rank that are not logged yet."""

    def state(self) -> dict[str, Tensor]:
        """Return copies of the sums by name."""
        ...

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes that :meth:`state` has, once there is something to keep."""
        ...

    def add_state(self, state: dict[str, Tensor]) -> None:
        """Add sums of another moment or rank."""
        ...


def stage(source: StateSource, stats: Statistics, groups: ParallelGroups, memory: HostMemory) -> dict[str, Tensor]:
    """Copy this rank's share of the training state to host memory; collective.

    The copies are good until the next call with the same ``memory``.

    Extra memory: the share itself and, while ZeRO's shares or tensor-parallel parts are assembled, one parameter (of
    the native engine: one bucket).

    Raises:
        TrainingError: a buffer is not the same on every rank.
    """
    staged: dict[str, Tensor] = {}
    memory.start()
    dense_load, expert_load = [0] * groups.stage_size, [0] * groups.edp_size
    rank_of_stage = comm.rank(groups.stage)
    for name, state in source.read_state():
        is_expert = is_expert_parameter(name)
        load, own = (expert_load, rank_of_stage // groups.ep_size) if is_expert else (dense_load, rank_of_stage)
        owner = load.index(min(load))
        load[owner] += state["fp32"].numel()
        dim = tensor_dim(name)
        if dim is not None and owner // groups.tp_size == own // groups.tp_size:  # tensor-parallel peers of the owner
            state = {key: x if key == "step" else _joined(x, dim, groups.tp) for key, x in state.items()}
        if owner == own:
            for key, tensor in _keys(name, state, groups.ep_rank).items():
                staged[key] = memory.copy(tensor)
                del tensor
        del state  # the next parameter is assembled before the loop would forget this one
    buffers = _buffers(source.model)
    _require_same(buffers, groups)
    if rank_of_stage == 0:
        staged |= {key: memory.copy(buffer) for key, buffer in buffers.items()}
    for key, tensor in (stats.state() | _rng_state(groups.device)).items():
        staged[f"rank-{groups.rank}/{key}"] = memory.copy(tensor)
    memory.finish()
    return staged


def load_training_state(
    path: Path, engine: Engine, stats: Statistics, groups: ParallelGroups, saved_ranks: int
) -> None:
    """Restore parameters, buffers, optimizer state, statistics and, in an unchanged number of ranks, random generators.

    Args:
        path: a verified checkpoint.
        saved_ranks: number of ranks that wrote it.

    Raises:
        CheckpointError: it does not fit the model or the optimizer.
    """
    reader = TensorReader(path)
    engine.write_state(
        lambda name, buffers: _fill(reader, name, buffers, groups.ep_rank, groups.tp_rank, groups.tp_size)
    )
    _load_buffers(reader, engine.model, groups.pp)
    _load_stats(reader, stats, groups, saved_ranks)
    if saved_ranks == groups.world_size:
        rng = {key: torch.empty_like(tensor) for key, tensor in _rng_state(groups.device).items()}
        prefix = f"rank-{groups.rank}/"
        if all(prefix + key in reader.shapes for key in rng):  # absent when the kind of device changed
            reader.fill({prefix + key: tensor for key, tensor in rng.items()})
            _set_rng_state(rng, groups.device)


@torch.no_grad()
def load_model(path: Path, model: nn.Module, ep_rank: int = 0) -> None:
    """Fill a model's weights (an EP shard of it reads its own experts only) for evaluation, generation or export.

    Raises:
        CheckpointError: the checkpoint does not fit the model.
    """
    reader = TensorReader(path)
    for name, parameter in model.named_parameters():
        _fill(reader, name, {"fp32": parameter.data}, ep_rank)
    _load_buffers(reader, model)


def _joined(part: Tensor, dim: int, tp: comm.Group) -> Tensor:
    """Join the tensor-parallel ranks' parts along ``dim``."""
    return part if comm.size(tp) == 1 else torch.cat(comm.all_gather_equal(part.detach(), tp).unbind(), dim)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {f"{name}{_BUFFER}": buffer for name, buffer in persistent_buffers(model)}


def _require_same(buffers: dict[str, Tensor], groups: ParallelGroups) -> None:
    """Refuse to keep one rank's value for what differs; costs nothing where there are no buffers."""
    if not buffers:
        return
    digests = {
        key: hashlib.sha256(
            buffer.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for key, buffer in buffers.items()
    }
    for other, theirs in enumerate(comm.gather_objects(digests, groups.stage)):
        for key, digest in digests.items() if theirs != digests else ():
            if theirs.get(key) != digest:
                raise TrainingError(
                    f"buffer {key.removesuffix(_BUFFER)} differs between the ranks (here and on rank {other}), so no "
                    "checkpoint can hold it; update it in after_optimizer_step, from the load of all ranks"
                )


@torch.no_grad()
def _load_buffers(reader: TensorReader, model: nn.Module, pp: comm.Group | None = None) -> None:
    """Fill the buffers; those of other pipeline stages, which the ranks of ``pp`` hold, are left to them."""
    wanted = _buffers(model)
    of_all_stages = set(wanted) if pp is None else set().union(*comm.gather_objects(set(wanted), pp))
    if extra := sorted(key for key in reader.shapes if key.endswith(_BUFFER) and key not in of_all_stages):
        raise CheckpointError(
            f"{reader.path} holds the buffer {printable(extra[0].removesuffix(_BUFFER))}, which the model does not "
            "have; use the configuration and the plugins that it was saved with"
        )
    for key, buffer in wanted.items():
        if reader.dtypes.get(key, buffer.dtype) != buffer.dtype:
            raise CheckpointError(
                f"{reader.path}: {key} is {reader.dtypes[key]}, and the model's is {buffer.dtype}; use the plugins "
                "that it was saved with"
            )
    reader.fill(wanted)


def _keys(name: str, state: dict[str, Tensor], ep_rank: int) -> dict[str, Tensor]:
    """Return the checkpoint keys of one parameter's state; scalars become one-element tensors."""
    out: dict[str, Tensor] = {}
    num_local = state["fp32"].shape[0] if is_expert_parameter(name) else 0
    for key, tensor in state.items():
        if key == "step":
            out[f"{name}/step" if not num_local else f"{name}.{ep_rank * num_local}/step"] = tensor.reshape(1)
        elif num_local:
            for local in range(num_local):
                out[f"{name}.{ep_rank * num_local + local}/{key}"] = tensor[local]
        else:
            out[f"{name}/{key}"] = tensor
    return out


def _fill(
    reader: TensorReader, name: str, buffers: dict[str, Tensor], ep_rank: int, tp_rank: int = 0, tp_size: int = 1
) -> None:
    targets = _keys(name, buffers, ep_rank)
    dim = tensor_dim(name) if tp_size > 1 else None
    if dim is not None:
        parts = {key: targets.pop(key) for key in list(targets) if not key.endswith("/step")}
        reader.fill(parts, Part(dim, tp_rank, tp_size))
    if "step" in buffers and is_expert_parameter(name):
        # Written by whichever rank held the first expert of its shard; expert 0 is always the first of one.
        own = next(key for key in targets if key.endswith("/step"))
        targets[f"{name}.0/step"] = targets.pop(own)
    reader.fill(targets)


def _load_stats(reader: TensorReader, stats: Statistics, groups: ParallelGroups, saved_ranks: int) -> None:
    """Give each rank its statistics back; in another layout the first rank gets the sum of all."""
    if saved_ranks == groups.world_size:
        sources = {groups.rank}
    else:
        sources = _ranks_with_statistics(reader) if groups.rank == 0 else set()
    for number, rank in enumerate(sorted(sources)):
        prefix = f"rank-{rank}/"
        saved = {key.removeprefix(prefix): shape for key, shape in reader.shapes.items() if _is_statistic(key, prefix)}
        # An older release kept fewer sums: the others begin at zero.
        if saved and not saved.items() <= stats.state_shapes().items():
            raise CheckpointError(
                f"{reader.path}: the statistics of rank {rank} are of another model; "
                "use the configuration that it was saved with, or another checkpoint"
            )
        sums = {key: torch.empty(shape, dtype=torch.float64, device=groups.device) for key, shape in saved.items()}
        reader.fill({prefix + key: tensor for key, tensor in sums.items()})
        if number:
            sums.pop("stats.steps", None)  # all ranks took the same steps: they do not add up
        stats.add_state(sums)


def _is_statistic(key: str, prefix: str) -> bool:
    return key.startswith(f"{prefix}stats.")


def _ranks_with_statistics(reader: TensorReader) -> set[int]:
    matches = (re.match(r"rank-([0-9]{1,9})/stats\.", key) for key in reader.shapes)
    return {int(match[1]) for match in matches if match}


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"rng.cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[f"rng.{device.type}"] = torch.get_device_module(device).get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    try:
        torch.set_rng_state(state["rng.cpu"])
        if device.type != "cpu":
            torch.get_device_module(device).set_rng_state(state[f"rng.{device.type}"], device)
    except RuntimeError as error:
        raise CheckpointError(
            f"the checkpoint's random number generators are damaged ({printable(error, 100)}); use another checkpoint"
        ) from error
