"""What a save writes on several ranks, and what it leaves behind when it fails on one of them."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from moepp.checkpoint import Checkpointer, saver, storage, verify
from moepp.checkpoint import format as fmt
from moepp.checkpoint.index import read_index
from moepp.checkpoint.storage import TensorReader
from moepp.config import CheckpointConfig, MoEConfig
from moepp.distributed import comm
from moepp.distributed.groups import Layout, ParallelGroups, build_groups, new_cpu_group
from moepp.engine.engine import Engine
from moepp.errors import CheckpointError
from moepp.metrics.step_stats import StepStats
from tests.checkpoint_cases import make_info
from tests.dist import WorkerPool
from tests.small_disk import small_disk

Tensor = torch.Tensor
DENSE = {"embed": (64, 8), "norm": (8,), "layers.0.router.weight": (5, 8), "head": (64, 8)}
EXPERTS = {"layers.0.experts.gate_up_proj": (8, 12, 8), "layers.0.experts.down_proj": (8, 8, 6)}  # [E, ...]
KEYS = ("fp32", "exp_avg", "exp_avg_sq")


def value(name: str, key: str, shape: tuple[int, ...], step: int) -> Tensor:
    """The whole tensor that a run has after ``step``: another one for every name, key and step."""
    generator = torch.Generator().manual_seed(hash_of(f"{name} {key} {step}"))
    return torch.randn(shape, generator=generator)


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode(), "little") % (2**31)


class FakeEngine:
    """Holds state as a real engine would: dense parameters whole, of the experts this rank's share."""

    def __init__(self, groups: ParallelGroups, step: int) -> None:
        self.model = torch.nn.Module()  # no buffers
        self.groups = groups
        self.set_step(step)

    def set_step(self, step: int) -> None:
        self.state: dict[str, dict[str, Tensor]] = {}
        for name, shape in (DENSE | EXPERTS).items():
            whole = {key: value(name, key, shape, step) for key in KEYS}
            if name in EXPERTS:
                size = shape[0] // self.groups.ep_size
                own = slice(self.groups.ep_rank * size, (self.groups.ep_rank + 1) * size)
                whole = {key: tensor[own].clone() for key, tensor in whole.items()}
            self.state[name] = whole | {"step": torch.tensor(float(step))}

    def read_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        yield from self.state.items()


class Saving:
    """A checkpointer and an engine on one rank."""

    def __init__(self, folder: str, ep_size: int = 1, **cfg: Any) -> None:
        self.groups = build_groups(Layout(comm.size(), expert=ep_size), torch.device("cpu"))
        self.folder = Path(folder)
        self.checkpointer = Checkpointer(CheckpointConfig(**cfg), self.groups, self.folder, new_cpu_group())
        self.stats = StepStats((0,), MoEConfig(num_ffn_experts=8, ffn_hidden_size=4, num_zero_experts=1))

    def save(self, step: int, background: bool = False) -> list[str]:
        """The problems of one save, waited for."""
        engine = FakeEngine(self.groups, step)
        info = make_info(step, 10 * step, self.groups.world_size)
        self.checkpointer.save(cast(Engine, engine), self.stats, info, background)
        engine.set_step(10**6)  # training goes on: the save must not see it
        self.checkpointer.wait()
        return self.checkpointer.reports[-1].problems


def names(folder: Path | str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def check_content(checkpoint: Path, step: int) -> None:
    """Every value is what the whole model had, under a name that tells no layout."""
    reader = TensorReader(checkpoint)
    expected = {f"{name}/{key}": value(name, key, shape, step) for name, shape in DENSE.items() for key in KEYS}
    for name, shape in EXPERTS.items():
        for key in KEYS:
            expected |= {f"{name}.{e}/{key}": expert for e, expert in enumerate(value(name, key, shape, step))}
    found = {key: torch.full_like(tensor, torch.nan) for key, tensor in expected.items()}
    reader.fill(found)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    of_ranks = {key for key in reader.shapes if key.startswith("rank-")}
    steps = {key for key in reader.shapes if key.endswith("/step")}
    assert reader.shapes.keys() == expected.keys() | of_ranks | steps
    for key in steps:
        reader.fill({key: (number := torch.zeros(1))})
        assert number == step


def _save(rank: int, folder: str, ep_size: int, background: bool) -> list[str]:
    return Saving(folder, ep_size).save(3, background)


@pytest.mark.parametrize(("ranks", "ep_size"), [(1, 1), (2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("background", [False, True])
def test_checkpoint_holds_every_value_once_whatever_the_layout(
    pools: Callable[[int], WorkerPool], tmp_path: Path, ranks: int, ep_size: int, background: bool
) -> None:
    assert pools(ranks).run(_save, str(tmp_path), ep_size, background) == [[]] * ranks
    assert names(tmp_path) == ["step-00000003"]
    checkpoint = tmp_path / "step-00000003"
    assert verify(checkpoint) == []
    check_content(checkpoint, 3)
    files = [f"__{rank}_0.distcp" for rank in range(ranks)]
    assert names(checkpoint) == sorted([".metadata", "info.json", "manifest.json", *files])
    assert fmt.read_info(checkpoint).tokens == 30


def test_ranks_write_equal_shares(pool_4: WorkerPool, tmp_path: Path) -> None:
    pool_4.run(_save, str(tmp_path), 2, False)
    written = dict.fromkeys((f"__{rank}_0.distcp" for rank in range(4)), 0)
    for key, stored in read_index(tmp_path / "step-00000003").items():
        if not key.startswith("rank-"):
            written[stored.file] += math.prod(stored.shape)
    everything = 3 * sum(torch.Size(shape).numel() for shape in (DENSE | EXPERTS).values())
    largest = 3 * max(
        torch.Size(shape).numel() // (2 if name in EXPERTS else 1) for name, shape in (DENSE | EXPERTS).items()
    )
    assert everything <= sum(written.values()) < everything + 100  # and step counts
    assert max(written.values()) <= everything / 4 + largest


# --- failures


def _fail(rank: int, folder: str, at_rank: int, place: str, background: bool) -> Any:
    """Three saves of which the second fails on one rank; what each reported, and the folder after each."""
    saving = Saving(folder, keep=1)
    seen = []
    with contextlib.ExitStack() as stack:
        for step in (1, 2, 3):
            if step == 2 and rank == at_rank:
                stack.enter_context(BREAK[place]())
            elif step == 3:
                stack.close()
            problems = saving.save(step, background)
            seen.append((problems, names(folder)))
            torch.distributed.barrier()
    return seen


@contextlib.contextmanager
def replaced(owner: Any, name: str, function: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _raise_no_permission(*args: Any, **kwargs: Any) -> Any:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "place")


def _no_permission(owner: Any, name: str) -> Callable[[], Any]:
    return lambda: replaced(owner, name, _raise_no_permission)


class _BadDisk:
    """A stream that writes one bit wrong and says nothing."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: Any) -> int:
        wrong = bytearray(data)
        if len(wrong) > 200:
            wrong[100] ^= 4
        return self._stream.write(wrong)


def _bad_disk() -> Any:
    init = storage._HashingStream.__init__
    return replaced(storage._HashingStream, "__init__", lambda self, stream: init(self, _BadDisk(stream)))


def _lost_file() -> Any:
    """A file that is gone after it was written."""
    write = saver.write_tensors

    def write_and_lose(path: Path, *args: Any) -> Any:
        entries = write(path, *args)
        (path / f"__{torch.distributed.get_rank()}_0.distcp").unlink()
        return entries

    return replaced(saver, "write_tensors", write_and_lose)


BREAK: dict[str, Callable[[], Any]] = {
    "folder": _no_permission(saver, "_prepare"),
    "open": _no_permission(storage._HashingFileSystem, "create_stream"),
    "content": _bad_disk,
    "file": _lost_file,
    "manifest": _no_permission(fmt, "write_manifest"),
    "read": _no_permission(fmt, "checksum"),
    "rename": _no_permission(saver, "_rename"),
}
DENIED = "cannot write place: permission denied; get permission to write in"


@pytest.mark.parametrize(
    ("place", "at_rank", "message"),
    [
        ("folder", 0, f"rank 0: {DENIED}"),
        ("open", 0, f"rank 0: {DENIED}"),
        ("open", 1, f"rank 1: {DENIED}"),
        ("content", 1, "__1_0.distcp: content changed (SHA-256 differs)"),
        ("content", 0, "__0_0.distcp: content changed (SHA-256 differs)"),
        ("file", 1, "__1_0.distcp: missing"),
        ("manifest", 0, f"rank 0: {DENIED}"),
        ("read", 1, "cannot be read (Permission denied)"),
        ("rename", 0, f"rank 0: {DENIED}"),
    ],
)
@pytest.mark.parametrize("background", [False, True])
def test_failure_on_any_rank_is_known_to_all_and_leaves_earlier_checkpoints(
    pool_2: WorkerPool, tmp_path: Path, place: str, at_rank: int, message: str, background: bool
) -> None:
    first, second, third = zip(*pool_2.run(_fail, str(tmp_path), at_rank, place, background), strict=True)
    assert first == (([], ["step-00000001"]),) * 2
    assert second[0] == second[1]
    problems, left = second[0]
    assert len(problems) >= 1 and any(message in problem for problem in problems)
    assert left == ["step-00000001"], "neither a half checkpoint nor the old one pruned"
    assert third == (([], ["step-00000003"]),) * 2
    check_content(tmp_path / "step-00000003", 3)


class _Interrupted(_BadDisk):
    """A stream that Ctrl-C finds in the middle of a write."""

    def write(self, data: Any) -> int:
        raise KeyboardInterrupt


def _interrupt(rank: int, folder: str, at_rank: int, place: str) -> tuple[str, list[str]]:
    init = storage._HashingStream.__init__
    places = {
        "open": replaced(storage._HashingFileSystem, "create_stream", _raise_interrupt),
        "write": replaced(storage._HashingStream, "__init__", lambda self, stream: init(self, _Interrupted(stream))),
    }
    saving = Saving(folder)
    with places[place] if rank == at_rank else contextlib.nullcontext():
        try:
            outcome = str(saving.save(1))
        except KeyboardInterrupt:
            outcome = "interrupted"
    torch.distributed.barrier()
    return outcome, names(folder)


def _raise_interrupt(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["open", "write"])
@pytest.mark.parametrize("at_rank", [0, 1])
def test_ctrl_c_during_a_save_is_no_failed_save(pool_2: WorkerPool, tmp_path: Path, place: str, at_rank: int) -> None:
    """DCP catches KeyboardInterrupt like any other exception; without more, training would go on."""
    for outcome, left in pool_2.run(_interrupt, str(tmp_path), at_rank, place):
        assert outcome == "interrupted" and "step-00000001" not in left


@pytest.fixture(name="small_disk")
def mounted_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with small_disk(tmp_path / "disk", "1m") as folder:
        yield folder


def _fill_disk(rank: int, folder: str, background: bool) -> list[list[str]]:
    saving = Saving(folder, keep=1)
    found = [saving.save(1, background)]
    torch.distributed.barrier()
    ballast = Path(folder, "ballast")
    if rank == 0:
        usage = shutil.disk_usage(folder)
        ballast.write_bytes(bytes(usage.free - 40_000))  # one checkpoint needs more
    torch.distributed.barrier()
    found.append(saving.save(2, background))
    if rank == 0:
        ballast.unlink()
    torch.distributed.barrier()
    found.append(saving.save(3, background))
    return found


@pytest.mark.parametrize("background", [False, True])
def test_full_disk_costs_that_checkpoint_only(pool_2: WorkerPool, small_disk: Path, background: bool) -> None:
    for first, second, third in pool_2.run(_fill_disk, str(small_disk), background):
        assert first == [] and third == []
        assert len(second) >= 1
        assert all("the disk is full" in problem and f"free space at {small_disk}" in problem for problem in second)
    assert names(small_disk) == ["step-00000003"]
    check_content(small_disk / "step-00000003", 3)


# --- what stays and what goes


def _save_many(rank: int, folder: str, keep: int, keep_every: int) -> None:
    saving = Saving(folder, keep=keep, keep_every=keep_every)
    for step in range(1, 8):
        saving.save(step, background=step % 2 == 0)


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"), [(2, 3, [3, 6, 7]), (1, 0, [7]), (0, 2, [1, 2, 3, 4, 5, 6, 7])]
)
def test_newest_and_milestones_are_kept(
    pool_2: WorkerPool, tmp_path: Path, keep: int, keep_every: int, left: list[int]
) -> None:
    pool_2.run(_save_many, str(tmp_path), keep, keep_every)
    assert names(tmp_path) == [f"step-{step:08d}" for step in left]


def _save_after_remains(rank: int, folder: str) -> list[str]:
    return Saving(folder).save(3)


def test_remains_of_killed_saves_and_removals_are_cleared_away(pool_2: WorkerPool, tmp_path: Path) -> None:
    for name in (".step-00000003.tmp", ".step-00000001.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".metadata").write_text("half")
    (tmp_path / "notes").write_text("not ours")
    assert pool_2.run(_save_after_remains, str(tmp_path)) == [[], []]
    assert names(tmp_path) == ["notes", "step-00000003"]


def _go_back(rank: int, folder: str) -> None:
    saving = Saving(folder, keep=0)
    for step in (1, 2, 3):
        saving.save(step)
    saving.checkpointer.archive_after(1)
    saving.save(2)
    saving.checkpointer.archive_after(1)


def test_going_back_sets_later_checkpoints_aside(pool_2: WorkerPool, tmp_path: Path) -> None:
    pool_2.run(_go_back, str(tmp_path))
    aside = ["step-00000002.replaced-1", "step-00000002.replaced-2", "step-00000003.replaced-1"]
    assert names(tmp_path) == ["step-00000001", *aside]
    assert fmt.list_checkpoints(tmp_path) == [tmp_path / "step-00000001"]
    assert all(verify(tmp_path / name) == [] for name in aside)


def _read_all_the_time(rank: int, folder: str) -> list[str]:
    """Save and prune while another thread looks at the folder; what it saw that was not whole."""
    saving, found, done = Saving(folder, keep=1), [], threading.Event()

    def look() -> None:
        while not done.is_set():
            for path in fmt.list_checkpoints(Path(folder)):
                problems = verify(path)
                if problems and path.exists():  # else it was taken away meanwhile, as a whole
                    found.extend(problems)

    thread = threading.Thread(target=look)
    thread.start()
    for step in range(1, 40):
        saving.save(step, background=True)
    done.set()
    thread.join()
    return found


def test_reader_never_sees_half_a_checkpoint(pool_1: WorkerPool, tmp_path: Path) -> None:
    assert pool_1.run(_read_all_the_time, str(tmp_path)) == [[]]


def _save_slowly(rank: int, folder: str) -> tuple[bool, bool, list[tuple[float, float]]]:
    """Two saves in the background of which the first cannot write before the second has been asked for.

    Whether each call returned before that, and the blocked and the total seconds of each.
    """
    write, asked, may_write = saver.write_tensors, threading.Event(), threading.Event()

    def held(*args: Any) -> Any:
        assert may_write.wait(120)
        return write(*args)

    def release() -> None:
        assert asked.wait(120)
        time.sleep(1.0)  # in which the second call could return
        may_write.set()

    def save(step: int) -> bool:
        engine, info = cast(Engine, FakeEngine(saving.groups, step)), make_info(step)
        saving.checkpointer.save(engine, saving.stats, info, background=True)
        return not may_write.is_set()

    saving, releasing = Saving(folder), threading.Thread(target=release)
    releasing.start()
    with replaced(saver, "write_tensors", held):
        first = save(1)
        asked.set()
        second = save(2)
        saving.checkpointer.close()
    releasing.join()
    return first, second, [(report.blocked_seconds, report.total_seconds) for report in saving.checkpointer.reports]


def test_training_waits_for_the_copy_only_and_for_one_save_in_flight(pool_2: WorkerPool, tmp_path: Path) -> None:
    for first_is_early, second_is_early, times in pool_2.run(_save_slowly, str(tmp_path)):
        assert first_is_early and not second_is_early
        (first_blocked, first_total), (second_blocked, _) = times
        assert first_total - first_blocked > 0.9, "writing is not counted as blocked"
        assert second_blocked > 0.3, "waiting for the first is, if the call comes within 0.7 s"
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def _raise_in_background(rank: int, folder: str) -> str:
    saving = Saving(folder)
    with replaced(
        saver.comm, "gather_objects", lambda *args: (_ for _ in ()).throw(RuntimeError("gloo: peer is gone"))
    ):
        try:
            saving.save(1, background=True)
        except RuntimeError as error:
            return str(error)
    return "nothing"


def test_lost_rank_during_a_background_save_reaches_the_training_thread(pool_1: WorkerPool, tmp_path: Path) -> None:
    assert pool_1.run(_raise_in_background, str(tmp_path)) == ["gloo: peer is gone"]


def test_checkpoint_of_another_model_does_not_load(pool_1: WorkerPool, tmp_path: Path) -> None:
    pool_1.run(_save, str(tmp_path), 1, False)
    reader = TensorReader(tmp_path / "step-00000003")
    with pytest.raises(CheckpointError, match=r"head/fp32 has shape \[64, 8\], expected \[32, 8\]"):
        reader.fill({"head/fp32": torch.empty(32, 8)})
    with pytest.raises(CheckpointError, match="has no tail/fp32"):
        reader.fill({"tail/fp32": torch.empty(32, 8)})
    manifest = json.loads((tmp_path / "step-00000003/manifest.json").read_text())
    assert manifest["files"].keys() == {".metadata", "info.json", "__0_0.distcp"}
