"""The model to evaluate: a run directory, one of its checkpoints, or a folder of exported or released weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from moepp.checkpoint import CheckpointInfo, list_checkpoints, load_model, read_info
from moepp.checkpoint.format import total_size
from moepp.checkpoint.resume import verify_together
from moepp.config import Config, ModelConfig, from_stored
from moepp.data.manifest import read_manifest, sha256_of
from moepp.data.tokenizer import Tokenizer
from moepp.distributed import comm
from moepp.distributed.groups import ParallelGroups
from moepp.errors import CheckpointError, ConfigError, DataError, PluginError
from moepp.evaluation.results import Subject
from moepp.interop import hf, official
from moepp.interop.token_ids import read_token_id
from moepp.interop.weights import require_room, weight_bytes
from moepp.interop.weights.files import read_json
from moepp.io.untrusted import printable
from moepp.model.init import reset_buffers
from moepp.model.precision import DTYPES
from moepp.model.transformer import Transformer
from moepp.moe import ExpertParallel
from moepp.runs.directory import RunDir


@dataclass(frozen=True)
class FoundModel:
    """A model that was found but not read yet.

    Attributes:
        cfg: its shapes.
        precision: "bf16" or "fp32", what it was trained in (fp32 where that is not known).
        subject: what to call it.
        tokenizer: path of its tokenizer.json; None: it names none.
        eod_id: token that ended the documents it was trained on; None: not known.
        tokenizer_sha256: of the tokenizer.json that made them; None: not known.
        document_end: the same (in exports that were tuned to another one: that of pretraining), if attention stays
            within documents; None: it does not.
        run_dir, run_config: of a run.
        fill: reads the weights into a model, this rank's share; collective.
    """

    cfg: ModelConfig
    precision: str
    subject: Subject
    tokenizer: Path | None
    fill: Callable[[Transformer, ParallelGroups], None]
    eod_id: int | None = None
    tokenizer_sha256: str | None = None
    document_end: int | None = None
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


def open_tokenizer(found: FoundModel, override: str | None, eod_token: str | None = None) -> Tokenizer:
    """Return the model's tokenizer, or the one that the user names, with the end-of-document token that training saw.

    Args:
        override: path of a tokenizer.json.
        eod_token: for models that do not know theirs; others refuse another one. Without it the token is then found
            by its name, which :func:`tokenizer_remarks` tells.

    Raises:
        ConfigError: there is no tokenizer, it has more tokens than the model, or ``eod_token`` is not the token that
            the model was trained with.
        DataError: it cannot be read, is another one than the run's data were made with, or has no end-of-document
            token.
    """
    path = override if override is not None else found.tokenizer
    if path is None:
        raise ConfigError(f"{found.subject.source} names no tokenizer; give its tokenizer.json with --tokenizer")
    tokenizer = Tokenizer(str(path), eod_token, eod_id=found.eod_id, named_by="--tokenizer")
    if tokenizer.vocab_size > found.cfg.vocab_size:
        raise ConfigError(
            f"tokenizer {path} has {tokenizer.vocab_size} tokens, but the model knows {found.cfg.vocab_size}; "
            "give the tokenizer that it was trained with"
        )
    if override is None and _is_other_tokenizer(found, tokenizer):
        raise DataError(
            f"tokenizer {path} is not the one that the data of {found.subject.source} were prepared with (their "
            "checksums differ); name that one with --tokenizer, or this one, if it encodes the same"
        )
    if found.eod_id is not None and tokenizer.eod_id != found.eod_id:
        raise ConfigError(
            f"--eod-token={eod_token} is token {tokenizer.eod_id} of {path}, and the documents that "
            f"{found.subject.source} was trained on end with token {found.eod_id} ({tokenizer.token(found.eod_id)}); "
            "leave it out"
        )
    return tokenizer


def tokenizer_remarks(found: FoundModel, tokenizer: Tokenizer, eod_token: str | None) -> list[str]:
    """Return the assumptions behind the ``tokenizer`` that :func:`open_tokenizer` returned."""
    remarks = document_remarks(found)
    if _is_other_tokenizer(found, tokenizer):
        remarks.append(f"{tokenizer.path} is another file than the tokenizer that the training data were prepared with")
    if found.eod_id is None and eod_token is None:
        remarks.append(
            f"{found.subject.source} does not tell which token ends a document; {tokenizer.eod_token} (id "
            f"{tokenizer.eod_id}) is taken by its name, --eod-token names another"
        )
    return remarks


def document_remarks(found: FoundModel) -> list[str]:
    """Return a line if the model's attention stayed within documents, and what ended them is not known any more."""
    cfg = found.run_config
    if cfg is None or not cfg.data.document_attention or found.document_end is not None:
        return []
    return [
        f"attention stayed within documents in training, and neither {found.subject.source} nor its data tell which "
        "token ended them any more: here it crosses them"
    ]


def print_remarks(remarks: list[str]) -> None:
    """Print a line each on standard error."""
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr, flush=True)


def _is_other_tokenizer(found: FoundModel, tokenizer: Tokenizer) -> bool:
    return found.tokenizer_sha256 not in (None, sha256_of(tokenizer.path))


def build_model(found: FoundModel, groups: ParallelGroups, precision: str | None = None) -> Transformer:
    """Return this rank's share of the model with its weights, on this rank's device; collective.

    Args:
        precision: "bf16" or "fp32"; None: the model's own.

    Raises:
        ConfigError: the experts cannot be divided over the EP group.
        CheckpointError: damaged files, or weights that do not fit.
    """
    with torch.device("meta"):
        model = Transformer(found.cfg, ExpertParallel(groups.ep), document_end=found.document_end)
    model.to(DTYPES[precision or found.precision])  # first: memory of float32 is never needed
    model.to_empty(device=groups.device)
    reset_buffers(model)
    found.fill(model, groups)
    return model.eval()


def _find_checkpoint(checkpoint: Path, place: str) -> FoundModel:
    info = read_info(checkpoint)
    try:
        cfg = from_stored(info.config)
        require_room(cfg.model, total_size(checkpoint), f"{checkpoint}: info.json", torch.float32.itemsize)
    except PluginError as error:
        raise PluginError(f"{checkpoint}: {error}") from error
    except ConfigError as error:
        reason = printable(error)
        raise CheckpointError(f"{checkpoint}: info.json has a configuration of another version ({reason})") from error
    run_dir = checkpoint.resolve().parent.parent

    def fill(model: Transformer, groups: ParallelGroups) -> None:
        problems = verify_together(checkpoint, groups)
        if problems:
            raise CheckpointError(
                f"checkpoint {checkpoint} does not verify: {'; '.join(problems)}; name another checkpoint"
            )
        comm.run_together(lambda: load_model(checkpoint, model, groups.ep_rank), groups.world)

    eod_id = info.eod_id if info.eod_id is not None else _eod_of_data(cfg, info)
    return FoundModel(
        cfg=cfg.model,
        precision=cfg.train.precision,
        subject=Subject(place, info.step, info.tokens),
        tokenizer=None if cfg.data.tokenizer is None else Path(cfg.data.tokenizer),
        fill=fill,
        eod_id=eod_id,
        tokenizer_sha256=info.tokenizer_sha256,
        document_end=eod_id if cfg.data.document_attention else None,
        run_dir=RunDir(run_dir) if (run_dir / "config.yaml").is_file() else None,
        run_config=cfg,
    )


def _eod_of_data(cfg: Config, info: CheckpointInfo) -> int | None:
    """Return the end-of-document token of the run's data if they are still in place, unchanged.

    For checkpoints of versions that did not keep it.
    """
    identity = info.run_state.data
    for prefix in cfg.data.paths:
        try:
            manifest = read_manifest(prefix)
        except DataError:
            continue
        if manifest is not None and identity.get(prefix, {}).get("content") == manifest.bin_sha256:
            return manifest.eod_id
    return None


def eod_of_folder(folder: Path) -> int | None:
    """Return the end-of-document token of a folder of weights: ``eos_token_id``, if the tokenizer agrees.

    Of a list of ids it is the one that the folder's tokenizer_config.json names.
    Released configurations often carry the default of the format instead. So the number counts where the folder's
    tokenizer marks that token as special or its tokenizer_config.json names it, or where there is no tokenizer.
    """
    eos_id = read_token_id(folder / "config.json", read_json(folder / "config.json"), "eos")
    if eos_id is None:
        return None
    if not (folder / "tokenizer.json").is_file():
        return eos_id
    tokenizer = Tokenizer(str(folder / "tokenizer.json"), named_by="--tokenizer")
    token = tokenizer.token(eos_id) if 0 <= eos_id < tokenizer.vocab_size else None
    if token is None:
        return None
    has_settings = (folder / "tokenizer_config.json").is_file()
    named = read_json(folder / "tokenizer_config.json").get("eos_token") if has_settings else None
    named = named.get("content") if isinstance(named, dict) else named
    return eos_id if tokenizer.is_special(eos_id) or named == token else None


def document_end_of_folder(folder: Path) -> int | None:
    """Return the token that ends documents if the model's attention stays within them; None: it does not, or unsaid.

    The released format has no place for it.
    """
    return hf.read_document_end(folder) if _form_of(folder) is hf else None


def _form_of(folder: Path) -> ModuleType:
    """Return the format that config.json names; the released one for any other name."""
    return hf if read_json(folder / "config.json").get("model_type") == hf.MODEL_TYPE else official


def _find_folder(folder: Path, place: str) -> FoundModel:
    form = _form_of(folder)

    def fill(model: Transformer, groups: ParallelGroups) -> None:
        comm.run_together(lambda: form.load_into(model, folder, groups.ep_rank, groups.ep_size), groups.world)

    cfg = form.read_config(folder)
    require_room(cfg, weight_bytes(folder), folder / "config.json")
    tokenizer = folder / "tokenizer.json"
    return FoundModel(
        cfg=cfg,
        precision="fp32",
        subject=Subject(place),
        tokenizer=tokenizer if tokenizer.is_file() else None,
        fill=fill,
        eod_id=eod_of_folder(folder),
        document_end=document_end_of_folder(folder),
    )
