"""Training runs that must give the same numbers on every layout, and the table of how well they do.

A :class:`Setting` says what is trained, a :class:`Layout` on which ranks and how. :func:`train` runs one pair in a
worker of ``tests/dist.py`` through the product's own configuration, model, engine, loader and trainer; only the data
and, for one-sided routing, some initial weights are made here. ``python -m tests.parity`` prints the README's table.

Everything is fp32 and dropless, and the balance loss counts the global batch. The numbers compared are the loss and the
gradient norm of each of 20 steps, the balance loss, and the evaluation loss at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from moepp.config import Config, RunPlan, from_dict, make_plan
from moepp.data import Corpora, Data, Vocabulary
from moepp.distributed import comm
from moepp.distributed.groups import ParallelGroups, build_groups
from moepp.distributed.layout import Layout as RankLayout
from moepp.distributed.stage_clock import StageClock
from moepp.metrics.sinks import SinkGroup
from moepp.metrics.throughput import Throughput
from moepp.model.transformer import Transformer
from moepp.training.build import build_engine, build_model
from moepp.training.trainer import Parts, Trainer
from tests.dist import WorkerPool

TOLERANCE = 1e-5  # relative, over all steps
STEPS = 20
SEED = 54  # with it no choice of experts hangs on rounding in any setting of the tests
GLOBAL_BATCH = 8
SEQ_LEN = 16
VOCAB = 32
EVAL_BATCHES = 2
SECTIONS = [section.name for section in dataclasses.fields(Config)]
Tensor = torch.Tensor


@dataclass(frozen=True)
class Setting:
    """What is trained; its numbers belong to it, whatever the layout."""

    optimizer: str = "adamw"
    one_sided: bool = False  # see make_one_sided
    grad_clip: float | None = 0.3  # below every gradient norm, so that each step is clipped
    model: tuple[tuple[str, Any], ...] = ()  # changes of model.*, for example (("tie_embeddings", True),)
    moe: tuple[tuple[str, Any], ...] = ()  # changes of model.moe.*
    optim: tuple[tuple[str, Any], ...] = ()  # changes of optim.*
    steps: int = STEPS
    seq_len: int = SEQ_LEN
    precision: str = "fp32"
    document_end: int | None = None  # attention stays within documents that this token ends
    validation: tuple[str, ...] = ()  # more validation data, by name


@dataclass(frozen=True)
class Layout:
    """Ranks, and how the work is spread over them."""

    ranks: int = 1
    ep: int = 1
    engine: str = "native"
    zero: int = 0
    micro_batch: int | None = None  # sequences per rank and forward; None: no accumulation
    recompute: bool = False
    exchange_chunks: int = 1
    pipeline: int = 1
    chunks: int = 1  # above 1: the interleaved schedule
    layers: tuple[int, ...] | None = None  # of each stage
    device: str = "cpu"  # of every rank: with "cuda" all share one GPU, over gloo
    tensor: int = 1
    context: int = 1
    context_method: str = "ulysses"

    def __str__(self) -> str:
        engine = f"{self.engine} z{self.zero}" if self.zero or self.engine == "deepspeed" else self.engine
        extras = [f"micro-batch {self.micro_batch}"] * (self.micro_batch is not None) + ["recompute"] * self.recompute
        sizes = {"PP": self.pipeline, "VPP": self.chunks}
        extras += [f"{name}{size}" for name, size in sizes.items() if size > 1]
        extras += [f"layers {self.layers}"] * (self.layers is not None)
        extras += [f"exchange in {self.exchange_chunks}"] * (self.exchange_chunks > 1)
        extras += [self.device] * (self.device != "cpu")
        extras += [f"TP{self.tensor}"] * (self.tensor > 1)
        extras += [f"CP{self.context} {self.context_method}"] * (self.context > 1)
        return ", ".join([f"{self.ranks} x EP{self.ep}", engine, *extras])


@dataclass
class History:
    """What a run measured: one entry per step, and the evaluation after the last."""

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    balance_loss: list[float] = field(default_factory=list)
    eval_loss: list[float] = field(default_factory=list)
    records: list[dict[str, float]] = field(default_factory=list)  # as they were logged
    rows: int = 0  # rows that this rank's FFN experts computed, over all forwards and layers
    margin: float = float("inf")  # smallest gap of router logits that decided a choice of this rank's tokens

    def log(self, record: Mapping[str, float], step: int, tokens: int) -> None:
        """Take a record of the trainer: a :class:`moepp.metrics.sinks.Sink`."""
        self.records.append(dict(record))
        names = {"loss": "train/loss", "grad_norm": "train/grad_norm", "balance_loss": "train/balance_loss"}
        for name, key in (names | {"eval_loss": "eval/loss"}).items():
            if key in record:
                getattr(self, name).append(record[key])

    def close(self) -> None:
        """Nothing to write out."""


@dataclass(frozen=True)
class Deviation:
    """Largest relative differences of two histories."""

    loss: float
    grad_norm: float
    balance_loss: float
    eval_loss: float

    @property
    def worst(self) -> float:
        return max(self.loss, self.grad_norm, self.balance_loss, self.eval_loss)


def deviation(reference: History, observed: History) -> Deviation:
    """Compare two histories entry by entry; a missing or non-finite entry is an infinite deviation."""

    def worst(name: str) -> float:
        wanted, given = getattr(reference, name), getattr(observed, name)
        if len(wanted) != len(given):
            return float("inf")
        relative = [abs(g - w) / abs(w) for w, g in zip(wanted, given, strict=True)]
        return max((r if r == r else float("inf") for r in relative), default=float("inf"))

    return Deviation(**{name: worst(name) for name in ("loss", "grad_norm", "balance_loss", "eval_loss")})


def make_config(setting: Setting, layout: Layout) -> Config:
    """The run's configuration, through the same door as the command line's."""
    is_sgd = setting.optimizer == "sgd"
    moe = {
        "num_ffn_experts": 8,
        "num_constant_experts": 2,
        "num_copy_experts": 1,
        "num_zero_experts": 1,
        "ffn_hidden_size": 12,
        "top_k": 2,
        "tau": 0.6,
        "capacity_factor": None,
        # Large weights: an error of scale in either loss is far above the tolerance.
        # One-sided routing is what the balance loss works against.
        "balance_loss_weight": 0.02 if setting.one_sided else 0.3,
        "balance_loss_scope": "global_batch",
        "z_loss_weight": 0.02,
    }
    model = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "max_seq_len": setting.seq_len,
        "init_std": 0.2,
    }
    tree = {section: {} for section in SECTIONS} | {
        "run": {"seed": SEED},
        "model": model | dict(setting.model) | {"moe": moe | dict(setting.moe)},
        "data": {
            "paths": ["made-in-memory"],
            "seq_len": setting.seq_len,
            "validation": {name: ["made-in-memory"] for name in setting.validation},
        },
        "optim": {
            "name": setting.optimizer,
            "lr": 0.5 if is_sgd else 0.01,
            "min_lr": 0.05 if is_sgd else 0.001,
            "warmup_steps": 3,
            "weight_decay": 0.1,
            "grad_clip": setting.grad_clip,
        }
        | dict(setting.optim),
        "parallel": {
            "expert": layout.ep,
            "zero_stage": layout.zero,
            "exchange_chunks": layout.exchange_chunks,
            "tensor": layout.tensor,
            "context": layout.context,
            "context_method": layout.context_method,
            "pipeline": layout.pipeline,
            "pipeline_schedule": "interleaved" if layout.chunks > 1 else "1f1b",
            "pipeline_chunks": layout.chunks,
            "pipeline_layers": layout.layers,
        },
        "engine": {"name": layout.engine},
        "train": {
            "steps": setting.steps,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": layout.micro_batch,
            "precision": setting.precision,
            "recompute": layout.recompute,
            "eval_batches": EVAL_BATCHES,
            "log_interval": 1,
        },
    }
    return from_dict(tree)


def make_sequences(count: int, seed: int, vocab_size: int = VOCAB, seq_len: int = SEQ_LEN) -> list[dict[str, Tensor]]:
    """Sequences that can be learnt: each token mostly follows from the one before.

    The first half of every global batch uses the lower half of the vocabulary, the second half the upper one. All
    sequences of a batch begin differently and no token repeats the one before it: equal contexts would give equal gate
    weights, and rounding alone would say which of them a capacity drops.
    """
    generator = torch.Generator().manual_seed(seed)
    half = vocab_size // 2
    sequences = []
    for i in range(count):
        low = 0 if i % GLOBAL_BATCH < GLOBAL_BATCH // 2 else half
        noise = torch.randint(0, 3, (seq_len + 1,), generator=generator).tolist()
        ids = [(i % GLOBAL_BATCH * 3 + i // GLOBAL_BATCH * 5) % half]
        for n in noise[1:]:
            following = (5 * ids[-1] + 3 + n) % half
            ids.append(following if following != ids[-1] else (following + 7) % half)
        tokens = torch.tensor(ids) + low
        sequences.append({"tokens": tokens[:-1], "labels": tokens[1:]})
    return sequences


def make_data(cfg: Config, plan: RunPlan, data_rank: int) -> Data:
    """The product's loader over sequences made in memory."""
    evaluation = EVAL_BATCHES * GLOBAL_BATCH
    training, shape = cfg.train.steps * GLOBAL_BATCH, (cfg.model.vocab_size, cfg.data.seq_len)
    datasets = {
        "train": make_sequences(training, 1, *shape),
        "valid": make_sequences(evaluation, 2, *shape),
        "test": None,
    } | {f"valid {name}": make_sequences(evaluation, 3 + i, *shape) for i, name in enumerate(cfg.data.validation)}
    sizes = {"train": training, "valid": evaluation, "test": 0}
    return Data(datasets, cfg, plan, data_rank, num_sequences=sizes, vocab_size=shape[0], eod=None)


@torch.no_grad()
def make_one_sided(model: Transformer) -> None:
    """Route by vocabulary half: the lower one to FFN experts 0..3, the upper one to zero-computation experts.

    FFN experts 4..7 get nothing, to the last step. So with EP=2 one rank never receives a row, with EP=4 two; until
    training has moved the router, half of the ranks send none, and with two EP groups one of them exchanges nothing
    at all. Two coordinates of the embedding carry it: the half, and a constant.
    """
    num_ffn, weights = model.cfg.moe.num_ffn_experts, dict(model.named_parameters())
    if model.part.has_embedding:
        embedding_VD = weights["embed_tokens.weight"]
        embedding_VD[: VOCAB // 2, 0], embedding_VD[VOCAB // 2 :, 0] = 2.0, -2.0
        embedding_VD[:, 1] = 2.0
    for i in model.part.layers:
        router_ED = weights[f"layers.{i}.moe.router.weight"]
        router_ED[:4, 0], router_ED[num_ffn:, 0] = 4.0, -4.0
        router_ED[4:num_ffn, 1] = -8.0
        weights[f"layers.{i}.moe.router.gate_map.weight"].mul_(0.1)


def train(
    rank: int,
    setting: Setting,
    layout: Layout,
    sabotage: Callable[..., Any] | None = None,
    inspect: Callable[[Trainer], Any] | None = None,
) -> History:
    """Train ``setting`` on this rank of ``layout``; to be run on a pool of ``layout.ranks`` workers.

    ``sabotage(model, groups)`` is a context manager that breaks something from before the engine is built to the end;
    ``inspect`` gets the trainer after the last step.
    """
    os.environ.setdefault("DS_ACCELERATOR", layout.device)
    cfg, sizes = make_config(setting, layout), (layout.pipeline, layout.context, layout.tensor)
    groups = group_of(layout.ep, layout.device, *sizes)
    plan = make_plan(cfg, groups.world_size)
    comm_stats = comm.CommStats(clock=StageClock(groups.device))
    model = build_model(cfg, groups, comm_stats, setting.document_end)
    if setting.one_sided:
        make_one_sided(model)
    history = History()
    _watch(model, history)
    with contextlib.ExitStack() as stack:
        stack.enter_context(sabotage(model, groups) if sabotage is not None else contextlib.nullcontext())
        parts = Parts(
            cfg=cfg,
            plan=plan,
            groups=groups,
            model=model,
            engine=build_engine(cfg, plan, model, groups, comm_stats.clock),
            corpora=Corpora((), Vocabulary(None, None, None)),  # the batches are those of make_data
            data=make_data(cfg, plan, groups.data_rank),
            comm_stats=comm_stats,
            sinks=SinkGroup([history]),
            throughput=Throughput(groups.world_size, None),
            checkpointer=cast(Any, None),  # nothing is saved: the steps are taken one by one
            versions={},
        )
        trainer = Trainer(parts)
        for _ in range(cfg.train.steps):
            trainer.log(trainer.train_step())
        trainer.evaluator.validate(trainer.step, trainer.tokens)
    if inspect is not None:
        inspect(trainer)
    return history


_GROUPS: dict[tuple[RankLayout, str], ParallelGroups] = {}


def group_of(
    expert: int = 1, device: str = "cpu", pipeline: int = 1, context: int = 1, tensor: int = 1
) -> ParallelGroups:
    """This worker's process groups for a layout, made once: every gloo group holds sockets."""
    layout = RankLayout(comm.size(), pipeline, context, tensor, expert)
    if (layout, device) not in _GROUPS:
        _GROUPS[layout, device] = build_groups(layout, torch.device(device))
    return _GROUPS[layout, device]


def _watch(model: Transformer, history: History) -> None:
    """Note what the routing does, from outside."""
    top_k = model.cfg.moe.top_k

    def count_rows(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        history.rows += args[0].shape[0]

    def note_margin(module: torch.nn.Module, args: Any, logits_TE: Tensor) -> None:
        sorted_TE = logits_TE.detach().sort(dim=-1, descending=True).values
        history.margin = min(history.margin, float((sorted_TE[:, top_k - 1] - sorted_TE[:, top_k]).min()))

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(count_rows)
        elif name.endswith(".router"):
            module.register_forward_hook(note_margin)


REFERENCE = Layout()  # one process, native engine
RANKS_AND_EP = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
ENGINES = [("native", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)]


def layouts(accumulate: bool = False, recompute: bool = False) -> list[Layout]:
    """Every engine and ZeRO stage on every number of ranks and EP size."""
    micro_batch = {1: 2, 2: 2, 4: 1}
    return [
        Layout(ranks, ep, engine, zero, micro_batch[ranks] if accumulate else None, recompute)
        for ranks, ep in RANKS_AND_EP
        for engine, zero in ENGINES
    ]


def print_table() -> None:
    """The README's parity table: worst relative deviation from one process, over SGD and AdamW and both routings."""
    settings = [Setting(optimizer, one_sided) for optimizer in ("sgd", "adamw") for one_sided in (False, True)]
    with contextlib.ExitStack() as stack:
        pools = {ranks: WorkerPool(ranks) for ranks, _ in RANKS_AND_EP}
        for pool in pools.values():
            stack.callback(pool.close)
        references = {setting: pools[1].run(train, setting, REFERENCE)[0] for setting in settings}
        print("| processes | EP | engine | loss | grad norm | loss, accumulation + recompute | grad norm |")
        print("|---|---|---|---|---|---|---|")
        for plain in layouts():
            full = next(x for x in layouts(True, True) if _same_place(x, plain))
            cells = []
            for layout in (plain, full):
                found = [
                    deviation(references[setting], pools[layout.ranks].run(train, setting, layout)[0])
                    for setting in settings
                ]
                cells += [f"{max(d.loss for d in found):.1e}", f"{max(d.grad_norm for d in found):.1e}"]
            engine = f"deepspeed, ZeRO-{plain.zero}" if plain.engine == "deepspeed" else "native"
            print(f"| {plain.ranks} | {plain.ep} | {engine} | {' | '.join(cells)} |", flush=True)


def _same_place(a: Layout, b: Layout) -> bool:
    return (a.ranks, a.ep, a.engine, a.zero) == (b.ranks, b.ep, b.engine, b.zero)


if __name__ == "__main__":
    # Workers unpickle `train` by its module's name, which is not __main__ there.
    from tests.parity import print_table as print_table_of_module

    print_table_of_module()
