"""The DeepSpeed engine: ZeRO 0, 1, 2 with expert parallelism.

DeepSpeed sees our expert layer as plain parameters marked with their expert-parallel group; its own MoE layer is
never used. Where it goes wrong (ZeRO-0 with expert parallelism and clipping), the norm and the clipping are ours.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moepp.config import EngineConfig, OptimConfig
from moepp.distributed.groups import ParallelGroups
from moepp.distributed.parameters import group_parameters, is_expert_parameter, placement_of
from moepp.distributed.stage_clock import StageClock
from moepp.engine.deepspeed_state import own_zero_parts, read_zero_state, write_zero_state
from moepp.engine.engine import Fetch, OwnPart, StepResult, Watch, make_optimizer, read_plain_state, write_plain_state
from moepp.engine.norms import global_norm, rough_squared_norms, squared_norms
from moepp.errors import ConfigError


def _import_deepspeed(groups: ParallelGroups) -> Any:
    """Import DeepSpeed and let it adopt the process group that exists already."""
    os.environ.setdefault("DS_ACCELERATOR", groups.device.type)  # otherwise it probes for devices, and may differ

    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)  # it warns of every optimizer but its own
    # DeepSpeed calls collectives under names that torch is about to retire.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated")
    # Its shared-memory collectives are compiled at first use; a build that is killed leaves a lock on which every
    # later run hangs. gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with _local_rank(groups.device):
        deepspeed.init_distributed(verbose=False)
    return deepspeed


@contextlib.contextmanager
def _local_rank(device: torch.device) -> Iterator[None]:
    """Set LOCAL_RANK for a while to what DeepSpeed takes it for: the index of the device, which it makes current.

    The launcher's value is another where a process sees one device alone; a later run must find that value again.
    """
    given = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device.index or 0) if device.type != "cpu" else given or "0"
    try:
        yield
    finally:
        if given is None:
            os.environ.pop("LOCAL_RANK", None)
        else:
            os.environ["LOCAL_RANK"] = given


def _mark_experts(model: nn.Module, groups: ParallelGroups) -> None:
    """Tell DeepSpeed which parameters are sharded over the EP group, by the attributes its own layer would set."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups as deepspeed_groups

    deepspeed_groups._create_expert_and_data_parallel(groups.ep_size)
    group_name = f"ep_size_{groups.ep_size}"
    for name, parameter in model.named_parameters():
        if is_expert_parameter(name):
            parameter.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]
            parameter.group_name = group_name  # pyright: ignore[reportAttributeAccessIssue]

    class Marker(MoE):
        """No parameters; makes the engine see a model with MoE layers."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = groups.ep_size
            self.num_local_experts = 1
            self.ep_size = groups.ep_size
            self.expert_group_name = group_name

        def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
            """Do nothing: the groups exist already."""

    model.add_module("deepspeed_marker", Marker())


class DeepSpeedEngine:
    """ZeRO over the data-parallel ranks (dense) and expert-data-parallel ranks (FFN experts)."""

    def __init__(
        self,
        model: nn.Module,
        groups: ParallelGroups,
        optim: OptimConfig,
        accumulation_steps: int,
        micro_batch_size: int,
        zero_stage: int,
        settings: EngineConfig | None = None,
        clock: StageClock | None = None,
    ) -> None:
        if zero_stage not in (0, 1, 2):
            raise ConfigError(f"parallel.zero_stage={zero_stage} is not one of 0, 1, 2; choose one of them")
        deepspeed = _import_deepspeed(groups)
        self.model = model
        self._groups = groups
        self._optim = optim
        self._zero_stage = zero_stage
        self._clock = clock if clock is not None else StageClock()
        is_bf16 = next(model.parameters()).dtype == torch.bfloat16
        parameter_groups = [
            {
                "params": list(group.parameters.values()),
                "name": group.name,
                "weight_decay": optim.weight_decay if group.decay else 0.0,
            }
            for group in group_parameters(model.named_parameters())
        ]
        if groups.ep_size > 1:
            from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

            _mark_experts(model, groups)
            parameter_groups = split_params_into_different_moe_groups_for_optimizer(parameter_groups)
        config = _config(accumulation_steps, micro_batch_size, is_bf16)
        config["gradient_clipping"] = optim.grad_clip or 0.0 if zero_stage > 0 else 0.0  # without ZeRO it is ours
        # Elsewhere DeepSpeed 0.19.8 loses gradients of more than two buckets; the configuration refuses to ask for it.
        may_overlap = zero_stage == 2 or accumulation_steps == 1
        is_default = may_overlap and groups.device.type != "cpu"
        config["zero_optimization"] = _zero_config(zero_stage, settings or EngineConfig(), is_default)
        # It prints its memory use whatever the log level.
        with contextlib.redirect_stdout(io.StringIO()), _local_rank(groups.device):
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=make_optimizer(parameter_groups, optim), config=config, dist_init_required=False
            )
        # It sums gradients within its backward.
        for owner, name in ((self._engine, "allreduce_gradients"), (self._engine.optimizer, "reduce_ipg_grads")):
            if hasattr(owner, name):
                setattr(owner, name, self._clock.timed("reduction", getattr(owner, name)))

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch; nothing is reduced or updated before the boundary

    def step(self, lr: float, update: bool = True, watch: Watch | None = None) -> StepResult:
        with self._clock.stage("optimizer"):
            return self._update(lr, update, watch)

    def _update(self, lr: float, update: bool, watch: Watch | None) -> StepResult:
        optimizer = self._engine.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        if self._zero_stage == 0:
            return self._step_without_zero(update, watch)
        if watch is not None:  # the norm is DeepSpeed's
            parts = list(own_zero_parts(self.model))
            watch(parts, rough_squared_norms([part.gradient for part in parts], self._groups.device))
        if not update:
            self._make_gradient_infinite()
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        skipped = bool(optimizer.overflow) or not math.isfinite(norm)
        return StepResult(norm if not skipped else math.inf, skipped)

    def _make_gradient_infinite(self) -> None:
        """DeepSpeed discards a gradient that is not finite; that is how an update is skipped on request."""
        optimizer = self._engine.optimizer
        if hasattr(optimizer, "fp32_groups_gradients_flat"):
            optimizer.fp32_groups_gradients_flat[0].fill_(math.inf)
        else:
            for partition in optimizer.averaged_gradients[0]:
                partition.fill_(math.inf)

    def _step_without_zero(self, update: bool, watch: Watch | None) -> StepResult:
        """ZeRO-0: the gradients are in ``.grad``, already averaged; norm and clipping over all experts are ours."""
        parts = [
            OwnPart(name, parameter.grad, parameter, placement_of(name, tensor_parallel=False).copies(self._groups))
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        ]
        squares = squared_norms([part.gradient for part in parts], self._groups.device)
        if watch is not None:
            watch(parts, squares)
        copies = [part.copies for part in parts]
        norm = global_norm(zip(squares.unbind(), copies, strict=True), self._groups.world, self._groups.device)
        skipped = not update or not math.isfinite(norm)
        limit = self._optim.grad_clip
        for parameter in self.model.parameters():
            if skipped:
                parameter.grad = None
            elif parameter.grad is not None and limit is not None and norm > limit:
                parameter.grad.mul_(limit / (norm + 1e-6))
        self._engine.step()
        return StepResult(norm, skipped)

    def read_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        optimizer = self._engine.optimizer
        if self._zero_stage == 0:
            names, parameters = zip(*self.model.named_parameters(), strict=True)
            yield from read_plain_state(names, parameters, optimizer, self._optim)
        else:
            yield from read_zero_state(self.model, optimizer, self._optim)

    def write_state(self, fetch: Fetch) -> None:
        optimizer = self._engine.optimizer
        if self._zero_stage == 0:
            names, parameters = zip(*self.model.named_parameters(), strict=True)
            write_plain_state(names, parameters, optimizer, self._optim, fetch)
        else:
            write_zero_state(self.model, optimizer, self._optim, fetch)


def require_accelerator(device: torch.device) -> None:
    """Refuse DeepSpeed's own variable for the kind of device where it contradicts the run's.

    Raises:
        ConfigError: DS_ACCELERATOR names another kind.
    """
    named = os.environ.get("DS_ACCELERATOR", device.type)
    if named != device.type:
        raise ConfigError(
            f"DS_ACCELERATOR={named}, but this run computes on {device.type}; unset it, or set runtime.device={named}"
        )


def _zero_config(stage: int, settings: EngineConfig, overlaps: bool) -> dict[str, Any]:
    """Return DeepSpeed's section; ``overlaps``: unless the settings say otherwise."""
    if stage == 0:
        return {"stage": 0}
    return {
        "stage": stage,
        "overlap_comm": overlaps if settings.overlap_comm is None else settings.overlap_comm,
        "reduce_bucket_size": settings.reduce_bucket_size,
        "allgather_bucket_size": settings.allgather_bucket_size,
    }


def _config(accumulation_steps: int, micro_batch_size: int, is_bf16: bool) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "zero_allow_untested_optimizer": True,
        # immediate_grad_update: move each gradient to the fp32 buffer at once. Without it, micro-batches after the
        # first are counted twice when the loss is computed outside the engine's own forward.
        "bf16": {"enabled": is_bf16, "check_grad_overflow": is_bf16, "immediate_grad_update": is_bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }
