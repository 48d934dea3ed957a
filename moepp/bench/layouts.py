"""One training step in every kind of layout: its time on this machine, and the bytes of each kind of collective.

Processes over gloo share this machine's cores and memory, so times show the work that a layout adds (copies, sums,
smaller products) and nothing of overlap, bubbles or a network. Bytes are exact for the layout and hold anywhere: what a
rank sends to others by the usual algorithms (ring all-reduce: twice (n - 1) / n of the tensor).
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from moepp.bench.cases import ModelSize
from moepp.bench.processes import run_processes
from moepp.bench.tables import Record
from moepp.bench.timing import measure
from moepp.config import Config, from_dict, make_plan, validate
from moepp.distributed import comm
from moepp.distributed.groups import Layout, build_groups
from moepp.metrics.step_stats import StepStats
from moepp.training.build import build_engine, build_model
from moepp.training.runner import Runner, WholeModelRunner

KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "send")
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP 4": {},
    "DP 4, ZeRO-1": {"zero_stage": 1},
    "DP 4, DeepSpeed ZeRO-2": {"engine": "deepspeed", "zero_stage": 2},
    "DP 4, FSDP2 (ZeRO-3)": {"engine": "fsdp"},
    "EP 4": {"expert": 4},
    "EP 4, ZeRO-1": {"expert": 4, "zero_stage": 1},
    "EP 4, FSDP2": {"expert": 4, "engine": "fsdp"},
    "EP 2 x EDP 2, ZeRO-1": {"expert": 2, "zero_stage": 1},
    "TP 2 x DP 2, EP 4": {"tensor": 2, "expert": 4},
    "CP 2 (ulysses) x DP 2, EP 4": {"context": 2, "expert": 4},
    "CP 2 (gather) x DP 2, EP 4": {"context": 2, "expert": 4, "context_method": "gather"},
    "PP 2 x EP 2": {"pipeline": 2, "expert": 2},
    "PP 2 interleaved x EP 2": {
        "pipeline": 2,
        "expert": 2,
        "pipeline_schedule": "interleaved",
        "pipeline_chunks": 2,
    },
    "PP 2 x EP 2, FSDP2": {"pipeline": 2, "expert": 2, "engine": "fsdp"},
    "PP 2 interleaved x DP 2, FSDP2": {
        "pipeline": 2,
        "pipeline_schedule": "interleaved",
        "pipeline_chunks": 2,
        "engine": "fsdp",
    },
    "PP 2 x TP 2, EP 2": {"pipeline": 2, "tensor": 2, "expert": 2},
    "PP 4": {"pipeline": 4},
}
NUM_RANKS = 4


@dataclass(frozen=True, kw_only=True)
class Options(ModelSize):
    """What is trained, in fp32 or bf16."""

    hidden_size: int = 256
    ffn_hidden_size: int = 512
    num_heads: int = 4
    vocab_size: int = 8192
    seq_len: int = 256
    global_batch_size: int = 8
    dtype: str = "bf16"
    rounds: int = 5

    def config(self, layout: dict[str, Any]) -> Config:
        """Return the run's configuration in a layout; sequences go through the model one at a time."""
        parallel = {key: value for key, value in layout.items() if key != "engine"}
        train = {
            "steps": 1,
            "global_batch_size": self.global_batch_size,
            "micro_batch_size": 1,
            "precision": self.dtype,
        }
        empty = {section: {} for section in ("run", "optim", "guard", "checkpoint", "logging")}
        return from_dict(
            empty
            | {
                "model": asdict(self.model_config()),
                "data": {"paths": ["random"], "seq_len": self.seq_len},
                "parallel": parallel,
            }
            | {"engine": {"name": layout.get("engine", "native")}, "train": train}
        )


def run(options: Options) -> list[Record]:
    """Return one row per layout: the slowest rank's time, and the largest bytes over ranks."""
    for layout in LAYOUTS.values():
        validate(options.config(layout), NUM_RANKS)
    by_rank = run_processes(_work, NUM_RANKS, options)
    return [_row(name, [found[name] for found in by_rank]) for name in LAYOUTS]


def _row(name: str, by_rank: list[Record]) -> Record:
    slowest = max(by_rank, key=lambda found: found["ms"])
    megabytes = {f"{kind} MB": max(found["bytes"][kind] for found in by_rank) / 1e6 for kind in KINDS}
    return {
        "layout": name,
        "step ms": slowest["ms"],
        "spread": slowest["spread"],
        "parameters held M": max(found["parameters"] for found in by_rank) / 1e6,
        **megabytes,
    }


def _work(rank: int, world_size: int, options: Options) -> dict[str, Record]:
    return {name: _measure(options, layout, rank, world_size) for name, layout in LAYOUTS.items()}


def _measure(options: Options, layout: dict[str, Any], rank: int, world_size: int) -> Record:
    cfg = options.config(layout)
    groups, plan = build_groups(Layout.of(cfg.parallel, world_size), torch.device("cpu")), make_plan(cfg, world_size)
    comm_stats = comm.CommStats()
    model = build_model(cfg, groups, comm_stats)
    engine = build_engine(cfg, plan, model, groups)
    parameters = sum(_held(parameter).numel() for parameter in model.parameters())
    runner: Runner = WholeModelRunner(model, engine)
    if groups.pp_size > 1:
        from moepp.training.pipeline import PipelineRunner

        runner = PipelineRunner(model, cast(Any, engine), groups, cfg, plan, comm_stats)
    moe = cfg.model.moe
    stats = StepStats(cfg.model.moe_layers, moe, model.moe_rows)
    generator = torch.Generator().manual_seed(groups.data_rank)
    shape = (plan.micro_batch_size, options.seq_len)
    batches = [
        (
            torch.randint(options.vocab_size, shape, generator=generator),
            torch.randint(options.vocab_size, shape, generator=generator),
        )
        for _ in range(plan.accumulation_steps)
    ]
    model.train()

    def step() -> None:
        runner.train(batches, None, stats)
        engine.step(1e-4)

    times = measure(
        {"step": step}, rounds=options.rounds, clock=time.perf_counter, warmup=2, before=lambda: comm.barrier()
    )
    with CountBytes() as counted:
        step()
    timing = times["step"]
    return {"ms": timing.median, "spread": timing.spread, "parameters": parameters, "bytes": counted.sent}


def _held(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class CountBytes(TorchDispatchMode):
    """Counts what this rank sends to others, whoever calls torch's collectives; slows them down.

    Attributes:
        sent: bytes by kind of :data:`KINDS`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::").strip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        group = next((found for arg in args if (found := _group_of(arg)) is not None), None)
        count = group.size() if group is not None else 1
        others = (count - 1) / count
        if name == "allreduce":
            self.sent["all-reduce"] += round(2 * others * sum(tensor.nbytes for tensor in args[0]))
        elif name == "allgather_base":
            self.sent["all-gather"] += round(others * args[0].nbytes)
        elif name == "reduce_scatter_base":
            self.sent["reduce-scatter"] += round(others * args[1].nbytes)
        elif name == "alltoall_base" and group is not None:
            self.sent["all-to-all"] += _sent_away(args[1], args[4], group)
        elif name == "send":
            self.sent["send"] += sum(tensor.nbytes for tensor in args[0])
        elif name not in ("barrier", "recv", "recv_any_source", "wait_tensor"):
            self.sent[f"other ({name})"] += sum(x.nbytes for x in args if isinstance(x, Tensor))


def _group_of(arg: Any) -> dist.ProcessGroup | None:
    if not isinstance(arg, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(arg)
    except RuntimeError:
        return None  # a ReduceOp


def _sent_away(sent: Tensor, splits: list[int], group: dist.ProcessGroup) -> int:
    """Return the bytes of an all-to-all that go to other ranks."""
    if not splits:
        return sent.nbytes * (group.size() - 1) // group.size()
    row_bytes = sent.nbytes // max(sum(splits), 1)
    return (sum(splits) - splits[group.rank()]) * row_bytes
