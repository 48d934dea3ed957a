"""Faults to inject into one training process, before ``train.py`` starts; see ``tests/train_processes.py``.

Each is a function of this module whose arguments are plain numbers and strings; the first is the rank that it hits
(``ALL``: every rank). Steps count from 1, as in the log.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

ALL = -1


def inject(name: str, *args: Any) -> None:
    """Apply one fault if it is meant for this process."""
    rank, *rest = args
    if rank in (ALL, int(os.environ["RANK"])):
        globals()[name](*rest)


def change_folder(path: str) -> None:
    """Relative paths mean other files on this rank, as on a host with copies of its own."""
    os.chdir(path)


def search_folder(path: str) -> None:
    """Modules of a folder can be imported on this rank, as by its PYTHONPATH."""
    sys.path.insert(0, path)


def die_in(module: str, function: str) -> None:
    """The rank is killed when it gets to a function of the project."""
    setattr(importlib.import_module(module), function, lambda *args: os.kill(os.getpid(), signal.SIGKILL))


def other_version(package: str) -> None:
    """This rank's host has another version of a package."""
    from moepp.runs import environment

    version = environment._version
    environment._version = lambda name: "0.0.1" if name == package else version(name)


def other_processor(name: str) -> None:
    """This rank's host has another processor."""
    from moepp.training import rank_facts

    rank_facts.cpu_name = lambda: name


def raise_at(step: int) -> None:
    """An error of the program."""

    def act(trainer: Any) -> None:
        if trainer.step + 1 == step:
            raise ValueError("injected error")

    _before_each_step(act)


def fail_in_evaluation(step: int) -> None:
    """An error of the program while the model is evaluated."""

    def act(evaluator: Any, number: int) -> None:
        if number == step:
            raise ValueError("injected error")

    _before_each_evaluation_batch(act)


def stop_signal_in_evaluation(step: int, number: int) -> None:
    """A scheduler ends the time while the third held-out batch is read."""
    batches = []

    def act(evaluator: Any, now: int) -> None:
        batches.append(now)
        if batches.count(step) == 3:
            os.kill(os.getpid(), number)

    _before_each_evaluation_batch(act)


def no_memory(where: str) -> None:
    """Memory does not suffice: in the second "step", or in its "evaluation"."""
    import torch

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    if where == "step":
        _before_each_step(lambda trainer: fail() if trainer.step == 1 else None)
    else:
        _before_each_evaluation_batch(fail)


def _before_each_evaluation_batch(act: Any) -> None:
    """``act(evaluator, step)`` before each held-out batch is read."""
    from moepp.training.evaluation import Evaluator

    validate, batches = Evaluator.validate, Evaluator._batches
    steps = []

    def validate_step(self: Any, step: int, *args: Any) -> None:
        steps.append(step)
        validate(self, step, *args)

    def read(self: Any, *args: Any) -> Any:
        act(self, steps[-1])
        return batches(self, *args)

    Evaluator.validate, Evaluator._batches = validate_step, read  # type: ignore[method-assign]


def hang_at(step: int, seconds: float) -> None:
    """A rank that is busy with something else."""

    def act(trainer: Any) -> None:
        if trainer.step + 1 == step:
            time.sleep(seconds)

    _before_each_step(act)


def stop_signal_at(step: int, number: int) -> None:
    """What a scheduler sends."""

    def act(trainer: Any) -> None:
        if trainer.step + 1 == step:
            os.kill(os.getpid(), signal.Signals(number))

    _before_each_step(act)


def slow_steps(seconds: float) -> None:
    """Time for the test to act."""
    _before_each_step(lambda trainer: time.sleep(seconds))


def scale_loss_of_batches(first: int, last: int, factor: float) -> None:
    """Batches whose loss is broken (a factor that is not finite) or spikes; batches count from 0."""
    from moepp.training.trainer import Trainer

    train_step = Trainer.train_step

    def step(self: Any) -> Any:
        batch = self.step + self.skipped_batches
        loss_of_model = self.model.loss
        if first <= batch <= last:

            def scaled(*args: Any) -> Any:
                import dataclasses

                out = loss_of_model(*args)
                return dataclasses.replace(out, ce_sum=out.ce_sum * factor)

            self.model.loss = scaled
        try:
            return train_step(self)
        finally:
            self.model.loss = loss_of_model

    Trainer.train_step = step  # type: ignore[method-assign]


def scale_reported_loss_of_batches(first: int, last: int, factor: float) -> None:
    """As the fault above, whatever computes the loss: a pipeline's stages, too."""
    import torch

    from moepp.training.trainer import Trainer

    train_step = Trainer.train_step

    def step(self: Any) -> Any:
        train = self.runner.train
        if first <= self.step + self.skipped_batches <= last:
            self.runner.train = lambda *args: train(*args) * torch.tensor([factor, 1.0], dtype=torch.float64)
        try:
            return train_step(self)
        finally:
            self.runner.train = train

    Trainer.train_step = step  # type: ignore[method-assign]


def infinite_auxiliary_loss_of_batch(batch: int) -> None:
    """A loss that is not finite although its gradient is."""
    import dataclasses

    from moepp.training.trainer import Trainer

    train_step = Trainer.train_step

    def step(self: Any) -> Any:
        loss_of_model = self.model.loss
        if self.step + self.skipped_batches == batch:
            self.model.loss = lambda *args: dataclasses.replace(
                out := loss_of_model(*args), aux_loss=out.aux_loss + math.inf
            )
        try:
            return train_step(self)
        finally:
            self.model.loss = loss_of_model

    Trainer.train_step = step  # type: ignore[method-assign]


def disk_full_at(step: int) -> None:
    """Writing this rank's tensor file of this step's checkpoint fails half way."""
    from moepp.checkpoint import storage

    class FullDisk:
        def __init__(self, stream: Any) -> None:
            self._stream, self._left = stream, 1000

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)

        def write(self, data: Any) -> int:
            self._left -= len(data)
            if self._left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._stream.write(data)

    init = storage._HashingStream.__init__

    def limited(self: Any, stream: Any) -> None:
        path = Path(stream.name)
        hit = path.parent.name == f".step-{step:08d}.tmp" and path.name == f"__{os.environ['RANK']}_0.distcp"
        disk: Any = FullDisk(stream) if hit else stream
        init(self, disk)

    storage._HashingStream.__init__ = limited  # type: ignore[method-assign]


def fill_disk_before_samples(folder: str) -> None:
    """The disk of ``folder`` is full when training is done and saved: a file takes what is left."""
    from moepp.training import run

    write_samples = run.write_samples

    def filled(*args: Any) -> None:
        with contextlib.suppress(OSError), Path(folder, "ballast").open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))
        write_samples(*args)

    run.write_samples = filled


def slow_writing(seconds: float) -> None:
    """Time for the test to act while a checkpoint is written: a pause before each tensor file and each renaming."""
    from moepp.checkpoint import format as fmt
    from moepp.checkpoint import saver

    def slowed(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            time.sleep(seconds)
            return function(*args, **kwargs)

        return call

    saver.write_tensors = slowed(saver.write_tensors)
    saver._rename = slowed(saver._rename)
    fmt.verify = slowed(fmt.verify)


def _before_each_step(act: Any) -> None:
    from moepp.training.trainer import Trainer

    train_step = Trainer.train_step

    def step(self: Any) -> Any:
        act(self)
        return train_step(self)

    Trainer.train_step = step  # type: ignore[method-assign]


def record_inputs(folder: str) -> None:
    """Append to ``folder/rank-<r>.txt`` a line per training step: the batch's digest, and a random number drawn."""
    import hashlib

    import torch

    from moepp.data.reader import BatchReader

    read = BatchReader.read
    seen = hashlib.sha256()

    def recorded(self: Any, *args: Any) -> Any:
        batches = read(self, *args)  # what is trained on, not what is read ahead
        for batch in batches:
            seen.update(batch[0].numpy().tobytes())
        return batches

    def act(trainer: Any) -> None:
        nonlocal seen
        line = f"{trainer.step} {seen.hexdigest()[:16]} {float(torch.rand(())):.9f}\n"
        with Path(folder, f"rank-{os.environ['RANK']}.txt").open("a") as stream:
            stream.write(line)
        seen = hashlib.sha256()

    BatchReader.read = recorded  # type: ignore[method-assign]
    _after_each_step(act)


def _after_each_step(act: Any) -> None:
    from moepp.training.trainer import Trainer

    train_step = Trainer.train_step

    def step(self: Any) -> Any:
        result = train_step(self)
        act(self)
        return result

    Trainer.train_step = step  # type: ignore[method-assign]


def measure_saves(folder: str) -> None:
    """Write to ``folder/rank-<r>.json`` what a save stages on this rank and how far memory rises meanwhile, bytes."""
    import ctypes
    import gc
    import json

    from moepp.checkpoint import saver

    save, stage = saver.Checkpointer.save, saver.stage
    measured: dict[str, int] = {}

    def memory(field: str) -> int:
        text = Path("/proc/self/status").read_text()
        return 1024 * int(text.partition(f"{field}:")[2].split()[0])

    def staged(engine: Any, *args: Any) -> Any:
        measured["largest"] = max(4 * 3 * parameter.numel() for parameter in engine.model.parameters())
        result = stage(engine, *args)
        measured["staged"] = sum(tensor.nbytes for tensor in result.values())
        return result

    def measured_save(self: Any, *args: Any) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = memory("VmRSS")
        save(self, *args)
        measured["peak"] = memory("VmHWM") - before
        Path(folder, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(measured))

    saver.stage = staged
    saver.Checkpointer.save = measured_save  # type: ignore[method-assign]


def leave_out_batch(first: int, end: int | None = None) -> None:
    """A data stream without batches ``first`` to ``end`` - 1."""
    from moepp.data.loader import Data

    train_batch = Data.train_batch
    end = first + 1 if end is None else end

    def shifted(self: Any, step: int, micro_step: int) -> Any:
        return train_batch(self, step if step < first else step + end - first, micro_step)

    Data.train_batch = shifted  # type: ignore[method-assign]


def break_gradient_at(step: int) -> None:
    """One entry of one gradient becomes infinite in the backward pass; the loss is fine."""
    import torch

    hooks: list[Any] = []

    def act(trainer: Any) -> None:
        while hooks:
            hooks.pop().remove()
        if trainer.step + 1 == step:
            first = torch.tensor([0])
            norm = next(
                parameter for name, parameter in trainer.model.named_parameters() if name.endswith("norm.weight")
            )
            hooks.append(norm.register_hook(lambda grad: grad.index_fill(0, first, math.inf)))

    _before_each_step(act)


def kill_at(step: int) -> None:
    """A rank that is gone from one moment to the next."""

    def act(trainer: Any) -> None:
        if trainer.step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)

    _before_each_step(act)


def wait_for_wandb(seconds: float) -> None:
    """Training waits so long for a W&B service that does not finish."""
    from moepp.metrics import wandb

    wandb._FINISH_SECONDS = dict.fromkeys(wandb._FINISH_SECONDS, seconds)
