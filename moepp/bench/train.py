"""The whole training step: ours, our vanilla twin, and the same architecture in transformers.

Every contestant goes through the same engine (fp32 masters, fp32 gradients, clipping, fused AdamW), so what differs is
the model. Peak memory is taken in a process of its own for each.

Shapes: B sequences, S tokens per sequence, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import resource
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moepp.bench.cases import ForcedRouting, ModelSize
from moepp.bench.host_memory import keep_freed_memory
from moepp.bench.processes import run_processes
from moepp.bench.tables import Record
from moepp.bench.timing import clock_for, summarize, threads
from moepp.config import OptimConfig
from moepp.distributed import comm
from moepp.distributed.groups import Layout, build_groups
from moepp.engine.gradients import BUCKET_ELEMENTS
from moepp.engine.native import NativeEngine
from moepp.io import files
from moepp.model.accounting import balanced_ffn_per_token, count_parameters, flops_per_token
from moepp.model.init import init_parameters
from moepp.model.transformer import Transformer
from moepp.moe import MoELayer
from moepp.ops import choose_kernels

STAGES = ("forward", "backward", "optimizer")
OURS, VANILLA = "moepp MoE++", "moepp vanilla"
TRANSFORMERS = ("transformers eager", "transformers grouped_mm")


@dataclass(frozen=True, kw_only=True)
class Options(ModelSize):
    """Shape of the model and of the batch; ``tau`` is the MoE++ model's."""

    dtype: torch.dtype
    device: torch.device
    batch_size: int = 8
    rounds: int = 5
    kernels: str = "auto"

    @property
    def num_tokens(self) -> int:
        return self.batch_size * self.seq_len


class Step:
    """One contestant's training step on random tokens, timed by stage."""

    def __init__(self, name: str, options: Options, bucket_elements: int = BUCKET_ELEMENTS) -> None:
        self.options = options
        choose_kernels(options.kernels, options.device)  # a process that was started for it has chosen none
        self.clock = clock_for(options.device, torch.get_num_threads())
        torch.manual_seed(0)
        build = _build_transformers if name in TRANSFORMERS else _build_ours
        model, self.loss = build(name, options)
        groups = build_groups(Layout(comm.size()), options.device)
        self.engine = NativeEngine(model, groups, OptimConfig(), 1, bucket_elements=bucket_elements)
        shape = (options.batch_size, options.seq_len + 1)
        tokens = torch.randint(0, options.vocab_size, shape, generator=torch.Generator().manual_seed(1))
        self.tokens = tokens.to(options.device)

    def run(self) -> dict[str, float]:
        """Return milliseconds of each stage."""
        marks = [self.clock()]
        loss = self.loss(self.tokens[:, :-1], self.tokens[:, 1:])
        marks.append(self.clock())
        self.engine.backward(loss)
        marks.append(self.clock())
        self.engine.step(lr=1e-4)
        marks.append(self.clock())
        return {stage: (b - a) * 1e3 for stage, a, b in zip(STAGES, marks[:-1], marks[1:], strict=True)}


def _build_ours(name: str, options: Options) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    model = Transformer(options.model_config(vanilla=name == VANILLA)).to(options.device, options.dtype)
    init_parameters(model, seed=0)
    for module in model.modules():
        if isinstance(module, MoELayer):
            ForcedRouting(module, options.num_tokens).__enter__()  # for as long as the model lives

    def loss(input_ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        out = model.loss(input_ids_BS, labels_BS)
        return out.ce_sum / out.num_tokens + out.aux_loss

    return model, loss


def _build_transformers(name: str, options: Options) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.ffn_hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        num_key_value_heads=options.num_heads,
        max_position_embeddings=options.seq_len,
        num_local_experts=options.num_ffn,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    config._experts_implementation = name.rpartition(" ")[2]
    model: Any = MixtralForCausalLM(config)
    model.to(device=options.device, dtype=options.dtype)

    def loss(input_ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        return model(input_ids=input_ids_BS, labels=input_ids_BS, shift_labels=labels_BS.contiguous()).loss

    return model, loss


def run(options: Options, with_scaling: bool) -> dict[str, list[Record]]:
    """Return tables ``step`` and ``scaling`` (empty unless asked for)."""
    # In processes of their own, so that models' memory is given back.
    [records] = run_processes(_compare, 1, torch.get_num_threads(), options)
    for record in records:
        if "skipped" not in record:
            [record["peak MB"]] = run_processes(_peak_memory, 1, record["contestant"], options)
    return {"step": records} | ({"scaling": _scaling(options)} if with_scaling else {})


def _compare(_rank: int, _world_size: int, num_threads: int, options: Options) -> list[Record]:
    with threads(num_threads):
        return compare(options)


def compare(options: Options) -> list[Record]:
    """Time the steps of all contestants in this process, interleaved; it must have joined a process group."""
    steps, skipped = {}, []
    for name in (OURS, VANILLA, *TRANSFORMERS):
        try:
            steps[name] = Step(name, options)
        except ImportError as error:
            skipped.append({"contestant": name, "skipped": str(error)})
    times = _interleaved(steps, options.rounds)
    fastest_peer = min((_total(times[name]) for name in TRANSFORMERS if name in times), default=None)
    records: list[Record] = []
    for name, stages in times.items():
        total = _total(stages)
        records.append(
            {
                "contestant": name,
                "tokens/s": options.num_tokens / total * 1e3,
                "step ms": total,
                "spread": summarize([sum(one.values()) for one in stages]).spread,
                **{f"{stage} ms": statistics.median(one[stage] for one in stages) for stage in STAGES},
                "x fastest transformers": fastest_peer / total if fastest_peer else None,
            }
        )
    return records + skipped


def _interleaved(steps: Mapping[str, Step], rounds: int, warmup: int = 1) -> dict[str, list[dict[str, float]]]:
    times: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for turn in range(warmup + rounds):
        for name, step in steps.items():
            elapsed = step.run()
            if turn >= warmup:
                times[name].append(elapsed)
    return times


def _total(stages: list[dict[str, float]]) -> float:
    return statistics.median(sum(one.values()) for one in stages)


def _peak_memory(_rank: int, _world_size: int, name: str, options: Options) -> float:
    """Return the peak megabytes of two steps: resident size, or torch's allocation on an accelerator."""
    keep_freed_memory()
    step = Step(name, options)
    for _ in range(2):
        step.run()
    if options.device.type != "cpu":
        return torch.accelerator.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count what the parent held when it forked
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _scaling(options: Options) -> list[Record]:
    """Return the results of changing one quantity at a time, each in its own process."""
    variants: dict[str, list[tuple[int, Options]]] = {
        "sequence length": [
            (
                options.seq_len * factor,
                replace(options, seq_len=options.seq_len * factor, batch_size=max(options.batch_size // factor, 1)),
            )
            for factor in (1, 2, 4)
        ],
        "tokens per rank": [
            (options.num_tokens * factor, replace(options, batch_size=options.batch_size * factor))
            for factor in (1, 2, 4)
        ],
        "FFN experts": [(experts, replace(options, num_ffn=experts)) for experts in (4, 8, 16)],
        "layers": [(layers, replace(options, num_layers=layers)) for layers in (1, 2, 4)],
    }
    records = []
    for what, points in variants.items():
        [found] = run_processes(_scale, 1, torch.get_num_threads(), what, points)
        records += found
    return records


def _scale(
    _rank: int, _world_size: int, num_threads: int, what: str, points: list[tuple[int, Options]]
) -> list[Record]:
    with threads(num_threads):
        return [record for value, options in points for record in _scale_point(what, value, options)]


def _scale_point(what: str, value: int, options: Options) -> list[Record]:
    """Return rows with operations per step beside the time, which explain its growth."""
    steps = {name: Step(name, options) for name in (OURS, VANILLA)}
    records = []
    for name, stages in _interleaved(steps, options.rounds).items():
        cfg = options.model_config(vanilla=name == VANILLA)
        flops = flops_per_token(cfg, options.seq_len, balanced_ffn_per_token(cfg.moe)).forward_backward or 0.0
        total, gflop = _total(stages), flops * options.num_tokens / 1e9
        records.append(
            {
                "varied": what,
                "value": value,
                "model": name,
                "tokens": options.num_tokens,
                "step ms": total,
                "tokens/s": options.num_tokens / total * 1e3,
                "GFLOP": gflop,
                "GFLOP/s": gflop / total * 1e3,
                "M parameters": count_parameters(cfg).total / 1e6,
                "optimizer ms": statistics.median(one["optimizer"] for one in stages),
            }
        )
    return records


def plot_scaling(records: list[Record], path: str) -> None:
    """Draw one panel per varied quantity: step time over it, both models."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    varied = list(dict.fromkeys(record["varied"] for record in records))
    figure, axes = pyplot.subplots(1, len(varied), figsize=(4 * len(varied), 3.2), squeeze=False)
    for axis, what in zip(axes[0], varied, strict=True):
        for model in (OURS, VANILLA):
            points = [(r["value"], r["step ms"]) for r in records if r["varied"] == what and r["model"] == model]
            axis.plot(*zip(*points, strict=True), marker="o", label=model)
        axis.set(xlabel=what, ylabel="step, ms", xscale="log", yscale="log")
        axis.legend()
    figure.tight_layout()
    with files.new_file(path) as stream:
        figure.savefig(stream, format=Path(path).suffix[1:] or "png", dpi=120)
    pyplot.close(figure)


def describe(options: Options) -> Record:
    """Return the settings as a record."""
    values = dataclasses.asdict(options)
    return {key: str(value) if key in ("dtype", "device") else value for key, value in values.items()}
