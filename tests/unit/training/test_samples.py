"""Texts that a run draws for people to read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moepp.training import samples
from tests.evaluation_cases import write_byte_tokenizer


@pytest.mark.parametrize("special", [True, False])
def test_ends_of_documents_are_no_part_of_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, special: bool
) -> None:
    tokenizer = write_byte_tokenizer(tmp_path / "tokenizer.json", special)
    end, prompt, new = tokenizer.eod_id, tokenizer.encode("one"), tokenizer.encode(" two")
    drawn = torch.tensor([[*prompt, end, *prompt, *new, end]])
    monkeypatch.setattr(samples, "generate", lambda *_, eos_id, **__: drawn if eos_id == end else None)
    monkeypatch.setattr(samples.comm, "broadcast_object", lambda value: value)
    monkeypatch.setattr(samples.comm, "on_first_rank", lambda call: call())
    batch = torch.tensor([[*prompt, end, *prompt]])
    parts: Any = SimpleNamespace(
        cfg=SimpleNamespace(
            data=SimpleNamespace(tokenizer=tokenizer.path),
            model=SimpleNamespace(vocab_size=272, max_seq_len=64),
            run=SimpleNamespace(seed=1),
            train=SimpleNamespace(samples=1),
        ),
        groups=SimpleNamespace(device=torch.device("cpu")),
        data=SimpleNamespace(eval_batch=lambda *_: (batch, batch)),
        model=None,
    )
    samples.write_samples(parts, tmp_path, end)
    assert json.loads((tmp_path / "samples.json").read_text()) == [{"prompt": "oneone", "continuation": " two"}]
