"""What a save writes on several ranks, what is kept of it, and what comes back."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from moepp.checkpoint import CheckpointInfo, load_training_state, saver, verify
from moepp.checkpoint import format as fmt
from moepp.checkpoint.storage import TensorReader
from moepp.engine.engine import Engine
from moepp.errors import CheckpointError
from moepp.metrics.step_stats import StepStats
from moepp.parallel.groups import build_groups
from tests.checkpoint_cases import DENSE, EXPERTS, FakeEngine, Saving, check_content, names, replaced
from tests.dist import WorkerPool


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


def _save_with_statistics(rank: int, folder: str, ep_size: int) -> list[str]:
    saving = Saving(folder, ep_size)
    numbers = {"loss_sum": 10.0 + rank, "steps": 2.0}
    saving.stats.add_state({f"stats.{name}": torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()})
    return saving.save(3)


def _load(rank: int, folder: str, ep_size: int, saved_ranks: int) -> dict[str, float]:
    groups = build_groups(ep_size, torch.device("cpu"))
    engine, stats, checkpoint = FakeEngine(groups, 99), StepStats((0,), 8, 2), Path(folder) / "step-00000003"
    load_training_state(checkpoint, cast(Engine, engine), stats, groups, saved_ranks)
    for name, expected in FakeEngine(groups, 3).state.items():
        for key, tensor in expected.items():
            assert torch.equal(engine.state[name][key], tensor), (name, key)
    return {name: float(tensor) for name, tensor in stats.state().items()}


@pytest.mark.parametrize(("ranks", "ep_size"), [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)])
def test_state_and_statistics_come_back_in_any_layout(
    pools: Callable[[int], WorkerPool], tmp_path: Path, ranks: int, ep_size: int
) -> None:
    assert pools(2).run(_save_with_statistics, str(tmp_path), 2) == [[], []]
    found = pools(ranks).run(_load, str(tmp_path), ep_size, 2)
    if ranks == 2:
        assert found == [{"stats.loss_sum": 10.0, "stats.steps": 2.0}, {"stats.loss_sum": 11.0, "stats.steps": 2.0}]
    else:  # sums add up, steps do not: every rank took the same ones
        assert found == [{"stats.loss_sum": 21.0, "stats.steps": 2.0}] + [{}] * (ranks - 1)


def test_ranks_write_equal_shares(pool_4: WorkerPool, tmp_path: Path) -> None:
    pool_4.run(_save, str(tmp_path), 2, False)
    index = TensorReader(tmp_path / "step-00000003")._index
    written = dict.fromkeys((f"__{rank}_0.distcp" for rank in range(4)), 0)
    for entry, place in index.storage_data.items():
        if not entry.fqn.startswith("rank-"):
            written[place.relative_path] += index.state_dict_metadata[entry.fqn].size.numel()
    everything = 3 * sum(torch.Size(shape).numel() for shape in (DENSE | EXPERTS).values())
    largest = 3 * max(
        torch.Size(shape).numel() // (2 if name in EXPERTS else 1) for name, shape in (DENSE | EXPERTS).items()
    )
    assert everything <= sum(written.values()) < everything + 100  # and step counts
    assert max(written.values()) <= everything / 4 + largest


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
    saving.checkpointer.leave_behind(1)
    saving.save(2)
    saving.checkpointer.leave_behind(1)


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


def _save_slowly(rank: int, folder: str) -> tuple[float, float, float]:
    """Two saves in the background while writing takes 0.5 s: blocked time of each, and total time of the first."""
    import time

    write = saver.write_tensors

    def slow(*args: Any) -> Any:
        time.sleep(0.5)
        return write(*args)

    saving = Saving(folder)
    with replaced(saver, "write_tensors", slow):
        for step in (1, 2):
            info = CheckpointInfo(step, 0, {}, {}, {}, {})
            saving.checkpointer.save(cast(Engine, FakeEngine(saving.groups, step)), saving.stats, info, background=True)
        saving.checkpointer.close()
    first, second = saving.checkpointer.reports
    return first.blocked_seconds, second.blocked_seconds, first.total_seconds


def test_training_waits_for_the_copy_only_and_for_one_save_in_flight(pool_2: WorkerPool, tmp_path: Path) -> None:
    for first, second, total in pool_2.run(_save_slowly, str(tmp_path)):
        assert first < 0.3 and total > 0.5
        assert second > 0.4, "the second waits for the first"
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
