"""``info.json`` of a checkpoint: everything but the tensors, and the rules that its values keep."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from moepp.io.untrusted import show

MAX_COUNT = 10**15  # steps, tokens and the like; more than any training has
MAX_RANKS = 10**6
_MAX_LOSSES, _MAX_TEXT, _MAX_TOKEN_ID = 10**6, 200, 2**31 - 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ENGINES, _PRECISIONS, _ZERO_STAGES = ("native", "deepspeed"), ("fp32", "bf16"), 3
_COUNTS = ("seed", "next_batch", "skipped_batches", "rewinds", "skipped_steps", "skipped_in_a_row")


@dataclass(frozen=True)
class CheckpointInfo:
    """Contents of ``info.json``.

    Attributes:
        step: optimizer steps done.
        tokens: training tokens seen.
        layout: world_size, expert, engine, zero_stage, precision of the run that saved it.
        config: the resolved configuration.
        versions: package versions.
        run_state: what the trainer and the metrics keep besides tensors.
        eod_id: token that ends the documents that were trained on; None: not known (checkpoints before it was kept).
        tokenizer_sha256: of the tokenizer.json that made them; None: not known.
    """

    step: int
    tokens: int
    layout: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, Any]
    run_state: dict[str, Any]
    eod_id: int | None = None
    tokenizer_sha256: str | None = None


def info_from(tree: Any) -> CheckpointInfo:
    """The information in a JSON value, checked; more keys of layout and run_state than are known may be there.

    Raises:
        ValueError: a key is missing or unknown, or a value is of another type or out of range.
    """
    keys = {field.name for field in fields(CheckpointInfo)}
    needed = {field.name for field in fields(CheckpointInfo) if field.default is MISSING}
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
    return CheckpointInfo(**tree)


def _check_layout(layout: Mapping[str, Any]) -> None:
    for key in ("world_size", "expert"):
        _require_count(f"layout.{key}", layout.get(key), MAX_RANKS, minimum=1)
    divides = layout["world_size"] % layout["expert"] == 0
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
