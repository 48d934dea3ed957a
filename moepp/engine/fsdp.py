"""ZeRO stage 3 by torch's FSDP2: parameters, gradients and optimizer state exist in shares alone.

A layer is a unit: its weights are gathered before its forward and again before its backward, and forgotten after each;
embedding, last norm and output layer stay gathered from forward to backward, as the loss reads them outside of both.
Every parameter is shared by the ranks that would hold copies of it, so FFN experts lie on the expert-data-parallel ones
and everything else on those of the stage. Shares are fp32; in bf16 the gathered weights are rounded, and gradients are
summed in fp32 after each micro-batch. The next layer is gathered while this one computes.

With N parameters over P ranks a rank holds 16 N / P bytes (weights, gradients, AdamW's moments) and the gathered
weights of embedding, output layer and one or two layers. At the start it holds all N weights in the model's precision,
and cuts them into shares layer by layer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from moepp.config import OptimConfig
from moepp.distributed import comm
from moepp.distributed.groups import ParallelGroups
from moepp.distributed.parameters import decays, placement_of
from moepp.distributed.stage_clock import StageClock
from moepp.engine.engine import Fetch, OwnPart, StepResult, Watch, make_optimizer, optimizer_entry
from moepp.engine.norms import global_norm, squared_norms
from moepp.errors import ConfigError

# Private names, and new ones: a mesh for each parameter.
_fsdp_common = import_module("torch.distributed.fsdp._fully_shard._fsdp_common")


def why_no_fsdp() -> str | None:
    """Return why this torch cannot run the engine; None: it can."""
    if hasattr(_fsdp_common, "ShardPlacementResult") and hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        return None
    return f"torch {torch.__version__} has no fully_shard with a mesh for each parameter; it came with 2.13"


def require_fsdp() -> None:
    """Refuse the engine where torch is too old for it.

    Raises:
        ConfigError: it is.
    """
    if why := why_no_fsdp():
        raise ConfigError(f"engine=fsdp: {why}; install it, or use engine=native with parallel.zero_stage=1")


@dataclass(frozen=True)
class _Share:
    """One parameter's part on this rank.

    Attributes:
        parameter: as FSDP2 keeps it.
        master: what the optimizer updates: the same memory.
    """

    name: str
    parameter: DTensor
    master: nn.Parameter

    def own(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a tensor shaped like the whole parameter; a view, perhaps empty."""
        [placement], mesh = self.parameter.placements, self.parameter.device_mesh
        assert isinstance(placement, Shard)
        chunks = whole.chunk(mesh.size(), placement.dim)
        rank = mesh.get_local_rank()
        return chunks[rank] if rank < len(chunks) else whole.narrow(placement.dim, 0, 0)

    def whole(self, own: Tensor) -> Tensor:
        """Return the whole of what every rank has a part of (collective)."""
        like = self.parameter
        shared = DTensor.from_local(
            own.detach(), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        return shared.full_tensor()


class FSDPEngine:
    """Masters in shares over the ranks that hold the same parameters; see the module's text.

    Args:
        model: on this rank's device, in its precision, whole; its layers are the elements of its ``nn.ModuleList``.
        groups: over which ranks.
        optim: of the optimizer.
        accumulation_steps: micro-batches for each :meth:`step`.
        clock: measures the optimizer; gradients are summed within backward.

    Attributes:
        loss_scale: as of :class:`moepp.engine.native.NativeEngine`.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: ParallelGroups,
        optim: OptimConfig,
        accumulation_steps: int,
        clock: StageClock | None = None,
    ) -> None:
        require_fsdp()
        self.model = model
        self._clock = clock if clock is not None else StageClock()
        self.loss_scale = 1.0 / (accumulation_steps * groups.stage_size)
        self._groups = groups
        self._optim = optim
        _shard(model, groups)
        self._shares = [
            _Share(name, parameter, nn.Parameter(parameter.to_local().detach()))
            for name, parameter in model.named_parameters()
            if isinstance(parameter, DTensor)
        ]
        groups_of_decay = {
            decay: [share.master for share in self._shares if decays(share.name, share.master) == decay]
            for decay in (True, False)
        }
        self._optimizer = make_optimizer(
            [
                {"params": masters, "weight_decay": optim.weight_decay if decay else 0.0}
                for decay, masters in groups_of_decay.items()
                if masters
            ],
            optim,
        )

    def backward(self, loss: Tensor) -> None:
        (loss * self.loss_scale).backward()

    def begin_backward(self, layers: range) -> None:
        # After a backward torch looks at every unit, and would sum zeros for layers that it did not go through.
        for index, layer in enumerate(self.model.get_submodule("layers").children()):
            if isinstance(layer, FSDPModule):
                layer.set_reduce_scatter_unused_params(index in layers, recurse=False)

    def step(self, lr: float, update: bool = True, watch: Watch | None = None) -> StepResult:
        with self._clock.stage("optimizer"):
            return self._update(lr, update, watch)

    def _update(self, lr: float, update: bool, watch: Watch | None) -> StepResult:
        for share in self._shares:
            gradient = share.parameter.grad
            assert gradient is None or isinstance(gradient, DTensor)
            # Zeros where no loss reached a parameter: other engines decay it too.
            share.master.grad = torch.zeros_like(share.master) if gradient is None else gradient.to_local()
            share.parameter.grad = None
        gradients = [_gradient(share.master) for share in self._shares]
        squares = squared_norms(gradients, self._groups.device)
        if watch is not None:
            parts = zip(self._shares, gradients, strict=True)
            watch([OwnPart(share.name, gradient, share.master, 1) for share, gradient in parts], squares)
        grad_norm = global_norm([(squares.sum(), 1)], self._groups.world, self._groups.device)
        skipped = not update or not math.isfinite(grad_norm)
        if not skipped:
            limit = self._optim.grad_clip
            if limit is not None and grad_norm > limit:
                torch._foreach_mul_(  # pyright: ignore[reportPrivateImportUsage]
                    gradients, limit / (grad_norm + 1e-6)
                )
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self._forget_gathered()
        for share in self._shares:
            share.master.grad = None
        return StepResult(grad_norm, skipped)

    def _forget_gathered(self) -> None:
        """Let the next forward gather new weights."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def read_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for share in self._shares:
            own = {"fp32": share.master} | optimizer_entry(share.master, self._optimizer, self._optim)
            step = {"step": own.pop("step")} if "step" in own else {}
            yield share.name, {key: share.whole(tensor) for key, tensor in own.items()} | step

    @torch.no_grad()
    def write_state(self, fetch: Fetch) -> None:
        for share in self._shares:
            own = {"fp32": share.master.data} | optimizer_entry(share.master, self._optimizer, self._optim)
            step = {"step": own.pop("step")} if "step" in own else {}
            whole = {key: torch.empty(share.parameter.shape, device=self._groups.device) for key in own}
            fetch(share.name, whole | step)
            for key, target in own.items():
                target.copy_(share.own(whole[key]))
        self._forget_gathered()


def _gradient(master: nn.Parameter) -> Tensor:
    assert master.grad is not None
    return master.grad


def _shard(model: nn.Module, groups: ParallelGroups) -> None:
    """Make every layer, and what is in none, a unit of FSDP2."""
    # Torch warns of writing into outputs that are views, which nobody does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    device = groups.device.type
    meshes = {group: DeviceMesh.from_group(group, device) for group in (groups.stage, groups.dpcp, groups.edp)}
    infos = {group: _fsdp_common.FSDPMeshInfo(mesh, shard_mesh_dim=0) for group, mesh in meshes.items()}
    is_bf16 = next(model.parameters()).dtype == torch.bfloat16
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if is_bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # router logits stay fp32
    )
    # By number: whoever holds a whole parameter keeps its memory, which torch frees once it is cut.
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def place(parameter: nn.Parameter) -> Any:
        group = placement_of(names[id(parameter)], groups.tp_size > 1).group(groups)
        return _fsdp_common.ShardPlacementResult(Shard(_dim_to_cut(parameter.shape, comm.size(group))), infos[group])

    layers = [layer for child in model.children() if isinstance(child, nn.ModuleList) for layer in child]
    for module in [*(layer for layer in layers if next(layer.parameters(), None) is not None), model]:
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.float()  # the master
        unit = fully_shard(
            module,
            mesh=meshes[groups.stage],
            mp_policy=policy,
            shard_placement_fn=place,
            reshard_after_forward=module is not model,
        )
        # The loss is scaled once for all parameters, so gradients are summed and not divided.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        if module is not model:  # a stage within a pipeline has nothing to do with what is in no layer
            unit.set_reduce_scatter_unused_params(True, recurse=False)
    _gather_ahead(model)
    if groups.pp_size > 1:
        _let_stages_run(model)


def _gather_ahead(model: nn.Module) -> None:
    """Gather each layer's weights while its neighbour computes.

    By itself torch does so only after the model's own forward, which stages do not call, and one layer at a time as the
    host comes to them: too late where it waits for the counts of an exchange.
    """
    layers = list(model.get_submodule("layers").children())
    for before, after in pairwise(layers):
        if isinstance(before, FSDPModule) and isinstance(after, FSDPModule):
            before.set_modules_to_forward_prefetch([after])
            after.set_modules_to_backward_prefetch([before])


def _let_stages_run(model: Any) -> None:
    """Let the stages of a pipeline gather what is in no layer, which the model's own forward, not called, would do."""
    register_fsdp_forward_method(model, "run_as_forward")
    model.run_as_forward(lambda: None)  # torch takes the first unit that runs for the root
    model.reshard()


def _dim_to_cut(shape: torch.Size, ranks: int) -> int:
    """Return the first dimension that ``ranks`` share equally, or else 0, the one that FSDP2 cuts unequally."""
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)
