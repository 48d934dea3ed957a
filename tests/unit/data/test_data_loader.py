"""Batches as a pure function of (seed, step), from disjoint splits, in the asked shares."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from moepp.data import Data
from moepp.data.indexed import open_indexed
from moepp.errors import DataError
from tests.data_files import make_config, numbered_documents, open_data, write_indexed
from tests.dist import WorkerPool

S = 8  # data.seq_len of make_config
G = 8  # train.global_batch_size of make_config
LENGTHS = [11, 3, 29, 17, 5, 2, 41, 8, 13, 7] * 4  # 544 tokens in 40 documents; train 32, validation 6, test 2
START_OF_B = 1000  # token ids of the second path


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two paths in which every token id occurs once: 0..543, and 1000.. of twice the size."""
    folder = tmp_path_factory.mktemp("data")
    a = write_indexed(folder / "a", numbered_documents(LENGTHS))
    b = write_indexed(folder / "b", numbered_documents(LENGTHS * 2, START_OF_B))
    return a, b


def _build(paths: Any, world_size: int = 1, rank: int = 0, **changes: Any) -> Data:
    return open_data(make_config(paths, **changes), world_size, rank, None)


def _step(paths: Any, step: int, world_size: int = 1, **changes: Any) -> list[list[int]]:
    """Sequences of a global batch in order, put together from all ranks and micro-steps."""
    ranks = [_build(paths, world_size, rank, **changes) for rank in range(world_size)]
    rows = [
        row
        for micro_step in range(ranks[0].plan.accumulation_steps)
        for data in ranks
        for row in data.train_batch(step, micro_step)[0].tolist()
    ]
    assert len(rows) == changes.get("train__global_batch_size", G)
    return rows


def _stream(data: Data, steps: int) -> list[list[int]]:
    return [row for step in range(steps) for row in data.train_batch(step, 0)[0].tolist()]


def test_labels_are_the_next_tokens(paths: tuple[str, str]) -> None:
    data = _build(paths[:1])
    inputs_BS, labels_BS = data.train_batch(0, 0)
    assert inputs_BS.shape == labels_BS.shape == (G, S)
    assert inputs_BS.dtype == labels_BS.dtype == torch.int64
    assert torch.equal(inputs_BS[:, 1:], labels_BS[:, :-1])
    within = [(x, y) for x, y in zip(inputs_BS[:, -1].tolist(), labels_BS[:, -1].tolist(), strict=True) if y == x + 1]
    assert len(within) >= 2  # the others end a document


def test_sequences_run_through_whole_documents(paths: tuple[str, str]) -> None:
    documents = numbered_documents(LENGTHS)
    firsts, lasts = {d[0] for d in documents}, {d[-1] for d in documents}
    for row in _stream(_build(paths[:1], train__steps=6), 6):
        for x, y in itertools.pairwise(row):
            assert y == x + 1 or (x in lasts and y in firsts)


def test_an_epoch_holds_every_sequence_once_and_each_epoch_another_order(paths: tuple[str, str]) -> None:
    data = _build(paths[:1], train__steps=30)
    per_epoch = data.num_sequences["train"]
    assert per_epoch == (sum(LENGTHS[:32]) - 1) // S == 52
    rows = _stream(data, 30)
    epochs = [rows[i * per_epoch : (i + 1) * per_epoch] for i in range(4)]
    for epoch in epochs:
        counts = Counter(token for row in epoch for token in row)
        assert max(counts.values()) == 1
        assert len(counts) == per_epoch * S
        assert max(counts) < sum(LENGTHS[:32])
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == 4


def test_splits_share_no_token(paths: tuple[str, str]) -> None:
    data = _build(paths, data__weights=[0.5, 0.5], train__steps=40, train__eval_batches=8)
    seen = {"train": {token for row in _stream(data, 40) for token in row}}
    seen["valid"] = {token for i in range(8) for row in data.eval_batch(i, 0)[0].tolist() for token in row}
    files = [open_indexed(path) for path in paths]
    seen["test"] = {int(token) for file in files for token in file.tokens_of_split("80,15,5", "test")}
    assert not (seen["train"] & seen["valid"] or seen["train"] & seen["test"] or seen["valid"] & seen["test"])
    of_a = {split: {token for token in tokens if token < START_OF_B} for split, tokens in seen.items()}
    assert max(of_a["train"]) < sum(LENGTHS[:32]) <= min(of_a["valid"])
    assert max(of_a["valid"]) < sum(LENGTHS[:38]) <= min(of_a["test"])


@pytest.mark.parametrize("weights", [None, [0.3, 0.7]])
def test_batches_do_not_depend_on_ranks_or_micro_batches(paths: tuple[str, str], weights: list[float] | None) -> None:
    for step in (0, 3):
        expected = _step(paths, step, data__weights=weights)
        for world_size, micro in ((1, 2), (1, 1), (2, None), (2, 1), (4, 2), (4, 1)):
            rows = _step(paths, step, world_size, train__micro_batch_size=micro, data__weights=weights)
            assert rows == expected, (world_size, micro)


def test_ranks_take_consecutive_runs_of_each_micro_step(paths: tuple[str, str]) -> None:
    expected = _step(paths[:1], 1)
    rank_1 = _build(paths[:1], 2, 1, train__micro_batch_size=2)
    assert rank_1.train_batch(1, 0)[0].tolist() == expected[2:4]
    assert rank_1.train_batch(1, 1)[0].tolist() == expected[6:8]


@pytest.mark.parametrize("weights", [None, [0.3, 0.7]])
def test_batches_do_not_depend_on_the_length_of_the_run(paths: tuple[str, str], weights: list[float] | None) -> None:
    long = _stream(_build(paths, data__weights=weights, train__steps=100), 100)
    for steps in (1, 7, 20, 21, 22, 50):  # one epoch of both paths is 20 steps
        data = _build(paths, data__weights=weights, train__steps=steps, train__eval_batches=steps)
        assert _stream(data, steps) == long[: steps * G]


def test_evaluation_batches_are_always_the_same(paths: tuple[str, str]) -> None:
    one = _build(paths[:1], train__eval_batches=3)
    other = _build(paths[:1], train__eval_batches=9, train__steps=90)
    for i in range(3):
        assert torch.equal(one.eval_batch(i, 0)[0], other.eval_batch(i, 0)[0])
    ranks = [_build(paths[:1], 2, rank, train__eval_batches=3) for rank in range(2)]
    rows = torch.cat([data.eval_batch(2, 0)[1] for data in ranks])
    assert torch.equal(rows, one.eval_batch(2, 0)[1])


def test_a_validation_set_is_read_whole_in_the_same_order_by_any_ranks(paths: tuple[str, str], tmp_path: Path) -> None:
    sets = [write_indexed(tmp_path / name, numbered_documents([9] * 20, start)) for name, start in
            (("c", 30_000), ("d", 40_000))]  # fmt: skip
    changes = {"data__validation": {"both": sets, "second": sets[1:]}, "train__eval_batches": 5}
    cfg = make_config(paths, **changes)

    data = open_data(cfg)
    batches = {name: [data.eval_batch(i, 0, name)[0] for i in range(5)] for name in ("both", "second")}
    second = {token for batch in batches["second"] for token in batch.flatten().tolist()}
    assert second <= set(range(40_000, 40_180)) and len(second) >= 22 * 8  # 22 sequences of 8 tokens, all of them
    both = {token // 10_000 for batch in batches["both"] for token in batch.flatten().tolist()}
    assert both == {3, 4}
    ranks = torch.cat([open_data(cfg, 2, rank).eval_batch(4, 0, "both")[0] for rank in range(2)])
    assert torch.equal(ranks, batches["both"][4])
    assert torch.equal(data.eval_batch(1, 0)[0], _build(paths, train__eval_batches=5).eval_batch(1, 0)[0])


def test_epochs_are_passes_over_the_training_part(paths: tuple[str, str]) -> None:
    data = _build(paths[:1])
    assert data.epochs(0) == 0
    assert data.epochs(3) == 3 * 8 / data.num_sequences["train"]


def test_seeds_give_other_batches(paths: tuple[str, str]) -> None:
    streams = [_stream(_build(paths[:1], run__seed=seed, train__steps=14), 14) for seed in (1, 2, 1)]
    assert streams[0] == streams[2] != streams[1]
    assert streams[0][52 : 52 + G] != streams[1][:G]  # epoch 1 of seed 1 is not epoch 0 of seed 2


@pytest.mark.parametrize(("weights", "share"), [([1.0, 3.0], 0.25), ([0.9, 0.1], 0.9), (None, 422 / 1298)])
def test_weights_are_shares_of_the_sequences(paths: tuple[str, str], weights: list[float] | None, share: float) -> None:
    rows = _stream(_build(paths, data__weights=weights, train__steps=50), 50)
    for end in (80, 200, 400):  # at any time, not only in the end
        from_a = sum(row[0] < START_OF_B for row in rows[:end])
        assert from_a == pytest.approx(share * end, abs=2)
    assert all((row[0] < START_OF_B) == (row[-1] < START_OF_B) for row in rows)


def test_a_small_path_repeats_only_after_all_of_it_was_seen(paths: tuple[str, str]) -> None:
    rows = _stream(_build(paths, data__weights=[0.5, 0.5], train__steps=50), 50)
    of_a = [tuple(row) for row in rows if row[0] < START_OF_B]
    for start in (0, 52, 104):
        tokens = [token for row in of_a[start : start + 52] for token in row]
        assert len(set(tokens)) == len(tokens) == 52 * S


def test_many_paths_never_run_out_of_sequences(tmp_path: Path) -> None:
    one_sequence_each = [write_indexed(tmp_path / f"{i}", numbered_documents([S + 1], 100 * i)) for i in range(12)]
    changes = {"data__split": "1,0,0", "data__weights": [0.945] + [0.005] * 11, "train__eval_batches": 0}
    for batch in range(1, 40):
        data = _build(one_sequence_each, train__steps=1, train__global_batch_size=batch, **changes)
        rows = data.train_batch(0, 0)[0].tolist()
        assert abs(sum(row[0] == 0 for row in rows) - 0.945 * batch) <= 3


def _open_files_and_maps(rank: int, paths: tuple[str, ...], cache_dir: str, steps: int) -> list[int]:
    data = open_data(make_config(paths, data__weights=[0.5, 0.5], train__steps=steps), 1, 0, cache_dir)
    for step in (0, steps // 2, steps - 1):
        data.train_batch(step, 0)
    maps = Path("/proc/self/maps").read_text()
    return [len(os.listdir("/proc/self/fd")), maps.count(cache_dir), len(list(Path(cache_dir).rglob("*.npy")))]


def test_long_runs_over_few_sequences_need_no_more_files(
    pool_1: WorkerPool, paths: tuple[str, str], tmp_path: Path
) -> None:
    counts = [pool_1.run(_open_files_and_maps, paths, str(tmp_path / f"{n}"), n)[0] for n in (10, 10, 100_000)]
    resumed = pool_1.run(_open_files_and_maps, paths, str(tmp_path / "100000"), 100_000)[0]  # from the cache
    assert counts[2][2] == counts[1][2] == 4  # of the two blends: 800,000 sequences are 8,000 epochs
    assert max(counts[2][0], resumed[0]) < counts[1][0] + 30 and resumed[1] <= 4


def test_a_split_without_a_sequence_is_refused_when_asked_for(paths: tuple[str, str]) -> None:
    data = _build(paths, data__split="99,0,1", train__eval_batches=0)
    assert (data.num_sequences["valid"], len(data.train_batch(0, 0)[0])) == (0, G)
    with pytest.raises(DataError, match=r"data\.split=99,0,1 .* 'valid'"):
        data.eval_batch(0, 0)


@pytest.mark.parametrize(("token", "shown"), [(700, 700), (-7, -7)])
def test_a_damaged_token_ends_in_one_line_with_its_path(tmp_path: Path, token: int, shown: int) -> None:
    """The .bin is as long as it should be, and a manifest would vouch for it."""
    good = write_indexed(tmp_path / "good", numbered_documents(LENGTHS), "int32")
    bad = write_indexed(tmp_path / "bad", [[1, 2, 3, 4, token, 6, 7, 8, 9]] * 40, "int32")
    build = {"model__vocab_size": 600, "data__weights": [1, 1]}
    for changes in (build | {"data__weights": None}, build):
        paths = [bad] if changes["data__weights"] is None else [good, bad]
        with pytest.raises(DataError, match=rf"{bad}\.bin holds the token id {shown}, .* 600; it is damaged") as caught:
            _stream(_build(paths, **changes), 4)
        assert caught.value.said_here
    named = _build([good], model__vocab_size=600, data__validation={"wiki": [bad]})
    assert len(_stream(named, 4)) == 4 * G
    with pytest.raises(DataError, match=rf"{bad}\.bin holds the token id {shown}"):
        named.eval_batch(0, 0, "wiki")


def test_indices_that_no_memory_holds_are_refused(paths: tuple[str, str]) -> None:
    with pytest.raises(DataError, match=r"so many sequences do not fit into memory; lower train\.steps"):
        _build(paths, train__steps=10**9, train__global_batch_size=10**7)


def test_steps_outside_the_run_are_an_error(paths: tuple[str, str]) -> None:
    data = _build(paths[:1])
    for step, micro_step in ((-1, 0), (0, 1), (0, -1), (1000, 0)):
        with pytest.raises(IndexError):
            data.train_batch(step, micro_step)


def _batches_of_rank(
    rank: int, paths: tuple[str, ...], cache_dir: str, steps: int, is_large: bool = True
) -> list[list[int]]:
    from moepp.data import megatron

    megatron.IN_MEMORY_ITEMS = 0 if is_large else 1 << 15
    config = make_config(paths, data__weights=[0.3, 0.7], train__steps=steps)
    data = open_data(config, 2, rank, cache_dir)
    return [row for step in range(steps) for row in data.train_batch(step, 0)[0].tolist()]


def test_ranks_share_cached_indices_and_see_the_same_data(pool_2: WorkerPool, tmp_path: Path) -> None:
    def write(lengths: list[int]) -> tuple[str, ...]:
        a = write_indexed(tmp_path / "a", numbered_documents(lengths))
        return a, write_indexed(tmp_path / "b", numbered_documents(lengths * 2, START_OF_B))

    cache = tmp_path / "cache"
    # The second round changes the data under the same names: indices of the first must not be used.
    for lengths in (LENGTHS, LENGTHS[::-1] + [31] * 30):
        paths = write(lengths)
        for is_large in (True, True, False):
            by_rank = pool_2.run(_batches_of_rank, paths, str(cache), 30, is_large)
            expected = _stream(_build(paths, data__weights=[0.3, 0.7], train__steps=30), 30)
            half = G // 2
            for rank in range(2):
                mine = [row for i in range(0, len(expected), G) for row in expected[i + rank * half :][:half]]
                assert by_rank[rank] == mine
    assert len(list(cache.iterdir())) == 2


def test_indices_that_a_killed_run_left_half_written_are_made_again(
    pool_2: WorkerPool, paths: tuple[str, str], tmp_path: Path
) -> None:
    expected = pool_2.run(_batches_of_rank, paths, str(tmp_path / "cache"), 4)
    damaged = [path for path in (tmp_path / "cache").rglob("*.npy") if "dataset" in path.name or "train" in path.name]
    for i, path in enumerate(damaged):
        path.write_bytes(path.read_bytes()[: (0, 5, -4)[i % 3]])
    assert len(damaged) == 10
    assert pool_2.run(_batches_of_rank, paths, str(tmp_path / "cache"), 4) == expected
