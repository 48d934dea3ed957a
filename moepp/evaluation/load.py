"""The model to evaluate: a run directory, one of its checkpoints, or a folder of exported or released weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moepp import comm, hf, official
from moepp.checkpoint import list_checkpoints, load_model, read_info
from moepp.checkpoint.resume import verify_together
from moepp.config import Config, ModelConfig, from_dict
from moepp.data.tokenizer import Tokenizer
from moepp.errors import CheckpointError, ConfigError
from moepp.evaluation.results import Subject
from moepp.model.transformer import Transformer
from moepp.parallel.groups import ParallelGroups
from moepp.run_dir import RunDir
from moepp.weights.files import read_json

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class FoundModel:
    """A model that was found but not read yet.

    Attributes:
        cfg: its shapes.
        precision: "bf16" or "fp32", what it was trained in (fp32 where that is not known).
        subject: what to call it.
        tokenizer: path of its tokenizer.json; None: it names none.
        run_dir, run_config: of a run.
        fill: reads the weights into a model, this rank's share; collective.
    """

    cfg: ModelConfig
    precision: str
    subject: Subject
    tokenizer: Path | None
    fill: Callable[[Transformer, ParallelGroups], None]
    run_dir: RunDir | None = None
    run_config: Config | None = None


def find_model(place: str) -> FoundModel:
    """Look at a run directory (its newest checkpoint), a checkpoint, or a folder with a Hugging Face config.json.

    Raises:
        CheckpointError: it is none of these, holds no checkpoint, or cannot be read.
    """
    path = Path(place).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{place} is not a folder; name a run directory, a checkpoint or a folder of weights")
    if (path / "info.json").is_file():
        return _find_checkpoint(path, place)
    if RunDir(path).config_file.is_file() and RunDir(path).checkpoints.is_dir():
        checkpoints = list_checkpoints(RunDir(path).checkpoints)
        if not checkpoints:
            raise CheckpointError(f"run {place} holds no checkpoint yet; train it until it has saved one")
        return _find_checkpoint(checkpoints[-1], place)
    if (path / "config.json").is_file():
        return _find_folder(path, place)
    raise CheckpointError(
        f"{place} is neither a run (config.yaml, checkpoints/) nor a checkpoint (info.json) nor a folder of weights "
        "(config.json); name one of these"
    )


def open_tokenizer(found: FoundModel, override: str | None) -> Tokenizer:
    """The model's tokenizer, or the one that the user names.

    Raises:
        ConfigError: there is none, or it has more tokens than the model.
        DataError: it cannot be read, or has no end-of-document token.
    """
    path = override if override is not None else found.tokenizer
    if path is None:
        raise ConfigError(f"{found.subject.source} names no tokenizer; give its tokenizer.json with --tokenizer")
    tokenizer = Tokenizer(str(path))
    if tokenizer.vocab_size > found.cfg.vocab_size:
        raise ConfigError(
            f"tokenizer {path} has {tokenizer.vocab_size} tokens, but the model knows {found.cfg.vocab_size}; "
            "give the tokenizer that it was trained with"
        )
    _ = tokenizer.eod_id
    return tokenizer


def build_model(found: FoundModel, groups: ParallelGroups, precision: str | None = None) -> Transformer:
    """This rank's share of the model with its weights, on this rank's device; collective.

    Args:
        precision: "bf16" or "fp32"; None: the model's own.

    Raises:
        ConfigError: the experts cannot be divided over the EP group.
        CheckpointError: damaged files, or weights that do not fit.
    """
    with torch.device("meta"):
        model = Transformer(found.cfg, ep_group=groups.ep)
    model.to_empty(device=groups.device)
    model.to(DTYPES[precision or found.precision])
    found.fill(model, groups)
    return model.eval()


def _find_checkpoint(checkpoint: Path, place: str) -> FoundModel:
    info = read_info(checkpoint)
    try:
        cfg = from_dict(info.config)
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint}: info.json has a configuration of another version ({error})") from error
    run_dir = checkpoint.resolve().parent.parent

    def fill(model: Transformer, groups: ParallelGroups) -> None:
        problems = verify_together(checkpoint, groups)
        if problems:
            raise CheckpointError(
                f"checkpoint {checkpoint} does not verify: {'; '.join(problems)}; name another checkpoint"
            )
        comm.run_together(lambda: load_model(checkpoint, model, groups.ep_rank), groups.world)

    return FoundModel(
        cfg=replace(cfg.model, moe=replace(cfg.model.moe, triton_kernels=False)),  # the same function on any machine
        precision=cfg.train.precision,
        subject=Subject(place, info.step, info.tokens),
        tokenizer=None if cfg.data.tokenizer is None else Path(cfg.data.tokenizer),
        fill=fill,
        run_dir=RunDir(run_dir) if (run_dir / "config.yaml").is_file() else None,
        run_config=cfg,
    )


def _find_folder(folder: Path, place: str) -> FoundModel:
    """The released format or the project's own, whichever config.json names; the released one where it is another."""
    form = hf if read_json(folder / "config.json").get("model_type") == hf.MODEL_TYPE else official

    def fill(model: Transformer, groups: ParallelGroups) -> None:
        comm.run_together(lambda: form.load_into(model, folder, groups.ep_rank, groups.ep_size), groups.world)

    tokenizer = folder / "tokenizer.json"
    return FoundModel(
        cfg=form.read_config(folder),
        precision="fp32",
        subject=Subject(place),
        tokenizer=tokenizer if tokenizer.is_file() else None,
        fill=fill,
    )
