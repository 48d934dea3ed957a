"""Write a checkpoint of any layout as a Hugging Face folder: the released MoE++ format, or the project's own."""

from __future__ import annotations

import argparse
import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moepp.arguments import add_plugin_option, add_tokenizer_options
from moepp.checkpoint import list_checkpoints, verify
from moepp.checkpoint.storage import TensorReader
from moepp.cli.model_card import TAG, model_card
from moepp.data.tokenizer import Tokenizer
from moepp.errors import CheckpointError, ConfigError
from moepp.evaluation.load import (
    DTYPES,
    FoundModel,
    document_remarks,
    find_model,
    open_tokenizer,
    print_remarks,
    tokenizer_remarks,
)
from moepp.interop import hf
from moepp.interop.hf.config import hf_config
from moepp.interop.official.config import MODEL_TYPE as RELEASED_TYPE
from moepp.interop.official.config import released_config
from moepp.interop.official.save import DTYPE_NAMES, ReadParameter, write_released
from moepp.interop.token_ids import TokenIds
from moepp.interop.weights import whole_parameters
from moepp.interop.weights.write import export_folder, read_beside, write_json
from moepp.io import files
from moepp.io.untrusted import MAX_JSON_BYTES, read_json, read_text
from moepp.runs.directory import RunDir

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
EXAMPLE = "moepp export runs/mine exported --format moepp"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "checkpoint", metavar="RUN_DIR_OR_CHECKPOINT", help="a run (its newest checkpoint) or a checkpoint"
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder to make; an earlier export in it is replaced")
    parser.add_argument(
        "--format",
        choices=("official", "moepp"),
        default="official",
        help="official (default): for the released MoE++ code; moepp: any model, with code of its own",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights (default: what the run computed in)")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of one file, e.g. 500MB (default: 5GB)"
    )
    parser.add_argument(
        "--code-repo",
        metavar="REPO",
        help="official: repository or folder with the released configuration_moe_plus_plus.py and "
        "modeling_moe_plus_plus.py (default: they will lie beside config.json)",
    )
    add_tokenizer_options(parser, "the run's")
    add_plugin_option(parser)


def run(args: argparse.Namespace) -> int:
    """Write configuration, weights, tokenizer and model card."""
    max_shard_bytes = _bytes(args.max_shard_size)
    if args.code_repo is not None and args.format != "official":
        raise ConfigError("--code-repo names the released code, and --format moepp brings its own; leave it out")
    checkpoint = _checkpoint(args.checkpoint)
    found, folder = find_model(str(checkpoint)), Path(args.folder)
    dtype = DTYPES[args.dtype or found.precision]
    tokenizer = _tokenizer(found, args.tokenizer, args.eod_token)
    eod = found.eod_id if tokenizer is None else tokenizer.eod_id
    unused = () if tokenizer is None else tuple(tokenizer.unused_ids(found.cfg.vocab_size))
    token_ids = TokenIds(bos=eod, eos=eod, pad=None, unused=unused, document_end=found.document_end)
    write = hf.write_hf
    if args.format == "moepp":
        hf_config(found.cfg, token_ids, DTYPE_NAMES[dtype])  # refuses before anything is read or written
    else:
        write = partial(write_released, code_repo=args.code_repo)
        released_config(found.cfg, token_ids, DTYPE_NAMES[dtype])
    _refuse_foreign_folder(folder, checkpoint, found, tokenizer)
    problems = verify(checkpoint)
    if problems:
        raise CheckpointError(
            f"checkpoint {checkpoint} does not verify: {'; '.join(problems)}; name another checkpoint"
        )
    with export_folder(folder) as new:
        written = write(
            _reader(checkpoint, found),
            found.cfg,
            new,
            token_ids=token_ids,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
        )
        written += _write_tokenizer(new, tokenizer, found.cfg.max_seq_len) if tokenizer is not None else []
        files.write_whole(new / "README.md", model_card(found, args.format, dtype, eod, tokenizer))
    print(f"exported {checkpoint} to {folder}: {', '.join([*written, 'README.md'])}")
    print_remarks(_remarks(found, tokenizer, args))
    if tokenizer is None:
        print("the run names no tokenizer (data.tokenizer), so none was exported; add one with --tokenizer FILE")
    if args.format == "official" and args.code_repo is None:
        print(
            "to load it, copy the released configuration_moe_plus_plus.py and modeling_moe_plus_plus.py into the folder"
        )
    return 0


def _remarks(found: FoundModel, tokenizer: Tokenizer | None, args: argparse.Namespace) -> list[str]:
    remarks = document_remarks(found) if tokenizer is None else tokenizer_remarks(found, tokenizer, args.eod_token)
    if args.format == "official" and found.document_end is not None:
        remarks.append(
            "attention stayed within documents in training, which the released format cannot say: what reads this "
            "export attends across them; --format moepp says it, and `moepp import` takes data.document_attention=true"
        )
    return remarks


def _checkpoint(place: str) -> Path:
    path = Path(place).expanduser()
    if (path / "info.json").is_file() or not RunDir(path).checkpoints.is_dir():
        found = find_model(place)  # says what is wrong with anything else
        if found.run_config is None:
            raise CheckpointError(f"{place} is a folder of weights, not a run or a checkpoint; `moepp import` it first")
        return path
    checkpoints = list_checkpoints(RunDir(path).checkpoints)
    if not checkpoints:
        raise CheckpointError(f"run {place} holds no checkpoint yet; train it until it has saved one")
    return checkpoints[-1]


def _reader(checkpoint: Path, found: FoundModel) -> ReadParameter:
    """Return parameters by name from the checkpoint's fp32 masters, one at a time."""
    reader, shapes = TensorReader(checkpoint), whole_parameters(found.cfg)

    def read(name: str, expert: int | None) -> Tensor:
        key, shape = (name, shapes[name]) if expert is None else (f"{name}.{expert}", shapes[name][1:])
        tensor = torch.empty(shape, dtype=torch.float32)
        reader.fill({f"{key}/fp32": tensor})
        return tensor

    return read


def _tokenizer(found: FoundModel, override: str | None, eod_token: str | None) -> Tokenizer | None:
    if override is not None or found.tokenizer is not None:
        return open_tokenizer(found, override, eod_token)
    if eod_token is not None:
        raise ConfigError(f"--eod-token={eod_token} needs a tokenizer, and the run names none; add --tokenizer FILE")
    return None


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, max_seq_len: int) -> list[str]:
    """So that transformers encodes every text as training did: no token added, special tokens in a text are text."""
    eod = tokenizer.eod_token
    files.write_whole(folder / "tokenizer.json", tokenizer.to_plain_json())
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": eod,  # a document starts after the end of another
            "eos_token": eod,
            "pad_token": eod,
            "padding_side": "left",
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": tokenizer.add_prefix_space,
            "split_special_tokens": True,
            "model_max_length": max_seq_len,
            "clean_up_tokenization_spaces": False,
        },
    )
    return ["tokenizer.json", "tokenizer_config.json"]


def _refuse_foreign_folder(folder: Path, checkpoint: Path, found: FoundModel, tokenizer: Tokenizer | None) -> None:
    """Refuse a folder that holds anything but an earlier export, or what the run itself is made of."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name a new folder")
    if not folder.is_dir():
        return
    if any(folder.iterdir()) and not _is_export(folder):
        raise CheckpointError(f"{folder} holds other files and no earlier export; name a new folder")
    if folder.resolve() == Path.cwd():
        raise CheckpointError(f"{folder} is the working directory, which an export would replace; name a new folder")
    cfg = found.run_config
    parts = {
        "init.path": cfg.init.path if cfg is not None else None,
        "the tokenizer": None if tokenizer is None else tokenizer.path,
        "the checkpoint": checkpoint,
    }
    for what, part in parts.items():
        if part is not None and Path(part).expanduser().resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(
                f"{folder} would be replaced, and holds {what} of the run ({part}); name a new folder"
            )
    if beside := read_beside(folder):
        raise CheckpointError(
            f"{folder} holds {', '.join(beside)}, which would be read beside the new export; move them away, or name a "
            "new folder"
        )


def _is_export(folder: Path) -> bool:
    """Return whether a folder is what this command wrote; released weights have the same type, but another card."""
    try:
        tree = read_json(folder / "config.json", error=CheckpointError)
        kind = tree.get("model_type") if isinstance(tree, dict) else None
        if kind == RELEASED_TYPE:
            return TAG in read_text(folder / "README.md", MAX_JSON_BYTES, CheckpointError)
        return kind == hf.MODEL_TYPE
    except CheckpointError:
        return False


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match.group(1)) <= 0:
        raise ConfigError(f"--max-shard-size={text} is not a size; write for example 5GB or 500MB")
    return int(float(match.group(1)) * _UNITS[match.group(2)])
