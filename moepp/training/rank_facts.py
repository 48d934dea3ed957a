"""What each rank of a run brings of its own, for comparison: configuration, packages, files, processor.

Two moments: before the ranks connect (nothing is read but the installed code), and before anything is built (the data
files, which may be copies on each host).
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import torch

from moepp.config import Config, to_dict
from moepp.config.compare import flatten
from moepp.data.identity import sampled_digest
from moepp.data.manifest import read_manifest, sha256_of
from moepp.errors import DataError
from moepp.ops.cpu.build import library
from moepp.runs.environment import code_facts, cpu_name, plugin_facts

_ALL_BLOCKS, _MOST_BLOCKS, _FEWEST_BLOCKS = 4096, 64, 2  # of 4 kB, of all files together and of one


def start_facts(cfg: Config, device: torch.device) -> dict[str, str]:
    """Return what no rank may differ in: every key, packages, plugins and the kind of device."""
    config = {key: _text(value) for key, value in flatten(to_dict(cfg)).items()}
    return {**config, **code_facts(), **plugin_facts(cfg.runtime.plugins), "the device": device.type}


def file_facts(cfg: Config) -> dict[str, str]:
    """Return the size and digest of each file of the data, the tokenizer and the initial weights, by path.

    A digest covers the manifest's checksum, if there is one, and blocks spread over the file. So a copy that
    differs in few places only, beside an old manifest, may pass.

    Raises:
        DataError: a file cannot be read.
    """
    # Benchmarks (eval.data) are no part: the first rank alone reads them.
    prefixes = dict.fromkeys([*cfg.data.paths, *itertools.chain(*cfg.data.validation.values())])
    paths = [f"{prefix}{suffix}" for prefix in prefixes for suffix in (".idx", ".bin")]
    paths += _files_in(cfg.init.path) if cfg.init.path is not None else []
    blocks = max(_FEWEST_BLOCKS, min(_MOST_BLOCKS, _ALL_BLOCKS // len(paths)))
    facts = {}
    try:
        for path in paths:
            facts[path] = f"({os.path.getsize(path):,} bytes, digest {sampled_digest(Path(path), blocks)[:12]})"
        for prefix in prefixes:
            manifest = read_manifest(prefix)
            if manifest is not None:
                checksums = f"{manifest.bin_sha256[:12]}, {manifest.idx_sha256[:12]}, {manifest.tokenizer_sha256[:12]}"
                facts[f"{prefix}.json"] = f"(checksums {checksums})"
        if cfg.data.tokenizer is not None:
            facts[cfg.data.tokenizer] = f"(sha256 {sha256_of(cfg.data.tokenizer)[:12]})"
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}; check that it is whole") from error
    return facts


def processor_facts(device: torch.device, precision: torch.dtype) -> dict[str, str]:
    """Return what decides the last bits of results and speed: ranks may differ, with a remark."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    if device.type != "cpu":
        return {}
    kernels = library(precision)
    extras = ", ".join(
        name
        for name, there in (
            ("amx", kernels is not None and kernels.has_amx),
            ("avx2 experts", kernels is not None and kernels.has_avx2_experts),
        )
        if there
    )
    return {
        "processor": cpu_name(),
        "torch's instruction set": torch.backends.cpu.get_cpu_capability(),
        "compiled kernels": "none" if kernels is None else f"there ({extras})" if extras else "there",
    }


def _files_in(folder: str) -> list[str]:
    return [str(path) for path in sorted(Path(folder).iterdir()) if path.is_file()] if Path(folder).is_dir() else []


def _text(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
