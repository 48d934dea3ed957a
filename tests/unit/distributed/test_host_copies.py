"""Whatever goes from the host to a device goes through locked pages, and the host does not wait for it."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moepp.data.reader import BatchReader
from moepp.distributed.device import lock_pages, to_device
from moepp.evaluation import scoring
from moepp.evaluation.scoring import Prompt, Row
from moepp.model.generate import Sampling, sample
from moepp.training.pipeline import PipelineRunner
from moepp.training.trainer import Trainer
from tests.host_waits import device_waits

META = torch.device("meta")  # stands for the accelerator
PACKAGE = Path(__file__).parents[3] / "moepp"
OTHER_WAYS = {  # files that may send tensors in another way
    "checkpoint/host_memory.py": "from a device, into pages that it has locked",
    "distributed/device.py": "the way itself",
    "moe/registered.py": "buffers of a user's part, when it is made",
}
NOT_TRAINING = ("bench", "interop/hf/code")  # measure on their own; a module for transformers


class Model:
    """Looks like a model on an accelerator, and computes nothing."""

    embed_tokens = SimpleNamespace(weight=torch.empty(0, device=META))
    cfg = SimpleNamespace(vocab_size=32)

    def __call__(self, ids_BS: torch.Tensor) -> Any:
        assert ids_BS.device == META
        return SimpleNamespace(hidden=torch.empty(*ids_BS.shape, 16, device=META))


MODEL: Any = Model()


def test_locked_pages_are_not_locked_again_and_the_cpu_wants_none():
    with device_waits() as found:
        first = lock_pages(torch.arange(3), META)
        assert lock_pages(first, META) is first and to_device(first, META).device == META
        tensor = torch.arange(3)
        assert to_device(tensor, torch.device("cpu")) is tensor
    assert not found


def test_batches_of_training_and_evaluation():
    trainer: Any = SimpleNamespace(groups=SimpleNamespace(device=META))
    reader = BatchReader.__new__(BatchReader)
    batch = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)
    reader._data, reader._device = SimpleNamespace(train_batch=lambda *_: batch), META  # pyright: ignore
    reader._plan = SimpleNamespace(accumulation_steps=2)  # pyright: ignore
    with device_waits() as found:
        ahead = reader._read(0)
        assert all(tensor.is_pinned() for pair in ahead for tensor in pair)
        for pair in (*ahead, batch):  # those of evaluation are not read ahead
            assert all(moved.device == META for moved in Trainer.to_device(trainer, pair))
    assert not found


def test_sequences_that_are_scored(monkeypatch):
    def logprobs(model: Any, hidden: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert hidden.shape == (2, 16) and target.device == META
        return torch.zeros(2), torch.ones(2, dtype=torch.bool)

    monkeypatch.setattr(scoring, "_token_logprobs", logprobs)  # which reads results
    rows = [Row(np.arange(5, dtype=np.int32), (np.array([1, 2], dtype=np.int32),)), Row(np.zeros(3, np.int32), ())]
    with device_waits() as found:
        assert scoring.score_rows(MODEL, rows) == [[(0.0, True)], []]
    assert set(found) == {"_local_scalar_dense"}, "of results, which are in the host's memory"


def test_prompts_and_tokens_that_are_never_drawn(monkeypatch):
    given: list[torch.Tensor] = []

    def stream(model: Any, ids: torch.Tensor, *_: Any, attention_mask: torch.Tensor, **__: Any) -> tuple[()]:
        given.extend((ids, attention_mask))
        return ()

    monkeypatch.setattr(scoring, "stream", stream)
    monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))
    tokenizer: Any = SimpleNamespace(eod_id=0, unused_ids=lambda size: [7])
    with device_waits() as found:
        assert scoring.continue_prompts(MODEL, tokenizer, [Prompt(np.arange(3, dtype=np.int32), 4)], 0) == [""]
        assert sample(torch.zeros(1, 8, device=META), Sampling(0.0, never=(1, 2))).device == META
    assert [tensor.device for tensor in given] == [META, META] and not found


def test_choices_that_a_pipeline_counts():
    runner: Any = PipelineRunner.__new__(PipelineRunner)
    cfg = SimpleNamespace(moe_layers=(0, 1, 2), moe=SimpleNamespace(num_experts=4))
    runner._model, runner._groups = SimpleNamespace(cfg=cfg, moe_rows=(0, 2)), SimpleNamespace(device=META)
    load = SimpleNamespace(load_E=torch.ones(4, device=META))
    runner._run = lambda *_, **__: [[SimpleNamespace(stats=[load]), SimpleNamespace(stats=[load])]] * 2
    runner._forward_schedule = lambda: None
    with device_waits() as found:
        assert runner.count_choices([]).shape == (3, 4)
    assert not found


def copies(source: str) -> list[str]:
    """Calls that send a tensor to a device, or make one there of what the host has."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name, text = ast.unparse(call.func).rpartition(".")[2], ast.unparse(call)
        given = [ast.unparse(value) for value in [*call.args, *(keyword.value for keyword in call.keywords)]]
        to_a_device = name == "to" and any("device" in value for value in given)
        makes = name in ("tensor", "as_tensor", "asarray") and any(keyword.arg == "device" for keyword in call.keywords)
        if to_a_device or makes or name in ("new_tensor", "cuda", "pin_memory") or "non_blocking=True" in given:
            found.append(f"line {call.lineno}: {text}")
    return found


def test_there_is_no_other_way_to_a_device():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        if name not in OTHER_WAYS and not name.startswith(NOT_TRAINING) and (lines := copies(path.read_text())):
            found[name] = lines
    assert found == {}, "use moepp.distributed.device.to_device"


@pytest.mark.parametrize(
    "source",
    [
        "x.to(device)",
        "x.to(self.groups.device, non_blocking=True)",
        "torch.tensor(ids, device=y.device)",
        "torch.as_tensor(ids, device=device)",
        "y.new_tensor([1])",
        "x.cuda()",
        "x.pin_memory()",
    ],
)
def test_other_ways_are_found(source):
    assert len(copies(source)) == 1


def test_what_sends_nothing_is_not_taken_for_it():
    assert copies("x.to(dtype); torch.zeros(3, device=d); model.to_empty(device=d); torch.tensor(1)") == []
