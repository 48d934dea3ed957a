"""Tiny data for tests: indexed files written by hand (not through Megatron's writer), tokenizers, configurations."""

from __future__ import annotations

import dataclasses
import itertools
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moepp.config import Config, from_dict, make_plan
from moepp.data import Data, build_data, open_corpora

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def write_indexed(prefix: Path, documents: Sequence[Sequence[int]], dtype: str = "uint16") -> str:
    """PREFIX.bin and PREFIX.idx from the format's description alone; returns the prefix."""
    kind = np.dtype(dtype)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.bin").write_bytes(b"".join(np.array(d, dtype=kind).tobytes() for d in documents))
    lengths = [len(document) for document in documents]
    offsets = [sum(lengths[:i]) * kind.itemsize for i in range(len(lengths))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, CODES[dtype])
    index += struct.pack("<QQ", len(documents), len(documents) + 1)
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(lengths)}q", *offsets)
    index += struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1))
    Path(f"{prefix}.idx").write_bytes(index)
    return str(prefix)


def numbered_documents(lengths: Sequence[int], start: int = 0) -> list[list[int]]:
    """Documents in which no token id occurs twice: consecutive ids from ``start``."""
    edges = [start + sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return [list(range(begin, end)) for begin, end in itertools.pairwise(edges)]


def write_word_tokenizer(path: Path, num_words: int = 20, eod: str | None = "<|endoftext|>", **extra: Any) -> str:
    """A word-level tokenizer.json written by hand: 'w<i>' has id i, then <unk>, then the end-of-document token."""
    vocabulary = {f"w{i}": i for i in range(num_words)} | {"<unk>": num_words}
    added = [] if eod is None else [{"id": num_words + 1, "content": eod, "special": True}]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [flags | token for token in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    path.write_text(json.dumps(tree | extra))
    return str(path)


def make_config(paths: Sequence[str], **changes: Any) -> Config:
    """A tiny configuration; ``changes`` are dotted keys with two underscores: ``train__steps=3``."""
    tree: dict[str, Any] = {field.name: {} for field in dataclasses.fields(Config)} | {
        "run": {"seed": 7},
        "model": {
            "vocab_size": 60_000,
            "hidden_size": 8,
            "num_layers": 1,
            "num_heads": 1,
            "num_kv_heads": 1,
            "max_seq_len": 4096,
            "moe": {"num_ffn_experts": 2, "ffn_hidden_size": 8},
        },
        "data": {"paths": list(paths), "seq_len": 8, "split": "80,15,5"},
        "train": {"steps": 4, "global_batch_size": 8, "eval_batches": 2},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    return from_dict(tree)


def open_data(cfg: Config, world_size: int = 1, rank: int = 0, cache_dir: str | None = None) -> Data:
    """The loader of one rank, as a run opens it."""
    return build_data(cfg, make_plan(cfg, world_size), open_corpora(cfg), rank, cache_dir)
