"""``info.json`` of a checkpoint: everything but the tensors, and the rules that its values keep."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from moepp.config import Config, RunPlan
from moepp.io.untrusted import show

MAX_COUNT = 10**15  # steps, tokens and the like; more than any training has
MAX_RANKS = 10**6
_MAX_LOSSES, _MAX_TEXT, _MAX_TOKEN_ID = 10**6, 200, 2**31 - 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ENGINES, _PRECISIONS, _ZERO_STAGES = ("native", "deepspeed", "fsdp"), ("fp32", "bf16"), 3
_COUNTS = ("seed", "next_batch", "skipped_batches", "rewinds", "skipped_steps", "skipped_in_a_row")


@dataclass(frozen=True)
class SavedLayout:
    """How the run that saved a checkpoint was laid out."""

    world_size: int
    expert: int  # ranks that share the experts
    engine: str
    zero_stage: int
    precision: str
    pipeline: int = 1
    context: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, cfg: Config, plan: RunPlan) -> SavedLayout:
        """Return the layout of a run."""
        parallel = cfg.parallel
        return cls(
            plan.world_size,
            parallel.expert,
            cfg.engine.name,
            plan.zero_stage,
            cfg.train.precision,
            parallel.pipeline,
            parallel.context,
            parallel.tensor,
        )


@dataclass(frozen=True)
class RunState:
    """What the trainer and the metrics keep besides tensors.

    Attributes:
        seed: of the run.
        next_batch: global batch that the next step trains on.
        skipped_batches: global batches left out by rewinds.
        rewinds: how often a spike sent the run back.
        skipped_steps: steps whose update was left out.
        skipped_in_a_row: of those, the newest ones without a step in between.
        recent_losses: window of the spike guard, nats.
        data: what tells each dataset from another one, by path; empty: nothing was trained on, any data may follow.
        wandb_run_id: None: there is no W&B run.
    """

    seed: int
    next_batch: int = 0
    skipped_batches: int = 0
    rewinds: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    wandb_run_id: str | None = None

    @classmethod
    def fresh(cls, seed: int) -> RunState:
        """Return the state before the first step."""
        return cls(seed)


@dataclass(frozen=True)
class CheckpointInfo:
    """Contents of ``info.json``.

    Attributes:
        step: optimizer steps done.
        tokens: training tokens seen.
        layout: of the run that saved it.
        config: the resolved configuration.
        versions: package versions.
        run_state: of the trainer and the metrics.
        eod_id: token that ends the documents that were trained on; None: not known (checkpoints before it was kept).
        tokenizer_sha256: of the tokenizer.json that made them; None: not known.
    """

    step: int
    tokens: int
    layout: SavedLayout
    config: dict[str, Any]
    versions: dict[str, Any]
    run_state: RunState
    eod_id: int | None = None
    tokenizer_sha256: str | None = None


def info_from(tree: Any) -> CheckpointInfo:
    """Return the information in a JSON value, checked; unknown keys of layout and run_state are ignored.

    Raises:
        ValueError: a key is missing or unknown, or a value is of another type or out of range.
    """
    keys = _names(CheckpointInfo)
    needed = {entry.name for entry in fields(CheckpointInfo) if entry.default is MISSING}
    if not isinstance(tree, dict) or not needed <= tree.keys() <= keys:
        found = (
            sorted(tree.keys() - keys or needed - tree.keys())[:3] if isinstance(tree, dict) else type(tree).__name__
        )
        raise ValueError(f"it must be an object of {', '.join(sorted(keys))}; look at {show(found)}")
    for key in ("layout", "config", "versions", "run_state"):
        _require(isinstance(tree[key], dict), key, tree[key], "an object")
    _require_count("step", tree["step"])
    _require_count("tokens", tree["tokens"], MAX_COUNT * 1000)
    _check_layout(tree["layout"])
    _check_run_state(tree["run_state"])
    if tree.get("eod_id") is not None:
        _require_count("eod_id", tree["eod_id"], _MAX_TOKEN_ID)
    sha256 = tree.get("tokenizer_sha256")
    _require(sha256 is None or _is_sha256(sha256), "tokenizer_sha256", sha256, "64 hexadecimal digits or null")
    for package, version in tree["versions"].items():
        _require(version is None or _is_text(version), f"versions.{show(package)}", version, "a text")
    layout, run_state = _known(SavedLayout, tree["layout"]), _known(RunState, tree["run_state"])
    return CheckpointInfo(**tree | {"layout": SavedLayout(**layout), "run_state": RunState(**run_state)})


def _names(kind: type) -> set[str]:
    return {entry.name for entry in fields(kind)}


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key in _names(kind)}


def _check_layout(layout: Mapping[str, Any]) -> None:
    for key in ("world_size", "expert"):
        _require_count(f"layout.{key}", layout.get(key), MAX_RANKS, minimum=1)
    shared = 1
    for key in ("pipeline", "context", "tensor"):
        _require_count(f"layout.{key}", layout.get(key, 1), MAX_RANKS, minimum=1)
        shared *= layout.get(key, 1)
    _require(layout["world_size"] % shared == 0, "layout.world_size", layout["world_size"], f"a multiple of {shared}")
    divides = layout["world_size"] // layout.get("pipeline", 1) % layout["expert"] == 0
    _require(divides, "layout.expert", layout["expert"], f"a divisor of world_size={layout['world_size']}")
    _require_count("layout.zero_stage", layout.get("zero_stage"), _ZERO_STAGES)
    for key, choices in (("engine", _ENGINES), ("precision", _PRECISIONS)):
        value = layout.get(key)
        _require(isinstance(value, str) and value in choices, f"layout.{key}", value, " or ".join(choices))


def _check_run_state(state: Mapping[str, Any]) -> None:
    for key in _COUNTS:
        _require_count(f"run_state.{key}", state.get(key), (1 << 64) - 1 if key == "seed" else MAX_COUNT)
    losses = state.get("recent_losses")
    _require(
        isinstance(losses, list) and len(losses) <= _MAX_LOSSES and all(map(_is_number, losses)),
        "run_state.recent_losses",
        losses,
        "a list of numbers",
    )
    data = state.get("data")
    is_by_path = isinstance(data, dict) and all(isinstance(value, dict) for value in data.values())
    _require(is_by_path, "run_state.data", data, "an object per path")
    run_id = state.get("wandb_run_id")
    _require(run_id is None or _is_text(run_id), "run_state.wandb_run_id", run_id, "a text or null")


def _require_count(key: str, value: Any, maximum: int = MAX_COUNT, minimum: int = 0) -> None:
    is_count = type(value) is int and minimum <= value <= maximum
    _require(is_count, key, value, f"an integer from {minimum} to {maximum:,}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= _MAX_TEXT


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _require(condition: bool, key: str, value: Any, rule: str) -> None:
    if not condition:
        raise ValueError(f"{key}={show(value)} must be {rule}")
