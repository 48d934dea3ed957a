"""info.json and manifest.json that somebody else has written: one line, no harm to other checkpoints."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from moepp import MoEConfig
from moepp.checkpoint import format as fmt
from moepp.checkpoint.state import _load_stats, _ranks_with_statistics, _set_rng_state
from moepp.checkpoint.storage import TensorReader, write_tensors
from moepp.cli.main import main
from moepp.errors import CheckpointError
from moepp.metrics.step_stats import StepStats
from tests.checkpoint_cases import make_info

INFO = asdict(make_info(10, 20, world_size=4, expert=2))


def write(checkpoints: Path, step: int, info: Any = None) -> Path:
    folder = checkpoints / fmt.checkpoint_name(step)
    folder.mkdir(parents=True)
    files = write_tensors(folder, {"w/fp32": torch.ones(3)}, None)
    text = json.dumps(asdict(make_info(step)) if info is None else info)
    files |= {fmt.INFO: fmt.write_durably(folder / fmt.INFO, text)}
    fmt.write_manifest(folder, files)
    return folder


def changed(**changes: Any) -> dict[str, Any]:
    """INFO with other values; section__key reaches into a section, and ... takes a key out."""
    tree = copy.deepcopy(INFO)
    for key, value in changes.items():
        section, _, inner = key.partition("__")
        place, name = (tree[section], inner) if inner else (tree, section)
        if value is ...:
            del place[name]
        else:
            place[name] = value
    return tree


SINCE_PIPELINES = ("pipeline", "context", "tensor")
BAD_INFOS: list[Any] = [
    *([], 3, "x", {}),
    # Older checkpoints lack the end-of-document token and the tokenizer.
    *({key: INFO[key] for key in INFO if key != lost} for lost in INFO if lost not in ("eod_id", "tokenizer_sha256")),
    INFO | {"more": 1},
    *(changed(**{key: value}) for key in ("step", "tokens") for value in ("x", None, True, 1.0, -1, 10**30, [], {})),
    *(changed(**{key: v}) for key in ("layout", "config", "versions", "run_state") for v in (None, [], "x", 1)),
    *(changed(**{f"layout__{key}": ...}) for key in INFO["layout"].keys() - set(SINCE_PIPELINES)),
    *(changed(**{f"run_state__{key}": ...}) for key in INFO["run_state"] if key != "wandb_run_id"),
    *(changed(layout__world_size=value) for value in (10**9, 10**30, 0, -1, True, "4", None, 1.5)),
    *(changed(layout__expert=value) for value in (0, 3, 8, False, "2")),
    *(changed(**{f"layout__{key}": value}) for key in SINCE_PIPELINES for value in (0, -1, 3, "2", True, None)),
    *(changed(layout__engine=value) for value in ("\x1b[2J", "other", ["native"], None, 1)),
    *(changed(layout__precision=value) for value in ("fp8", {}, None)),
    *(changed(layout__zero_stage=value) for value in (-1, 4, True, "1")),
    *(changed(run_state__recent_losses=value) for value in ("x", [None], ["1"], [True], [10**39 * 10**300], {})),
    *(changed(run_state__data=value) for value in (None, [], {"a": 1}, {"a": None})),
    *(changed(run_state__wandb_run_id=value) for value in (1, "a\nb", "x" * 10**4, [])),
    *(changed(run_state__skipped_batches=value) for value in (-1, 10**20, "0", None, True)),
    *(changed(versions={"torch": value}) for value in (1, [], "\x1b]0;x\x07", "x" * 10**5)),
    changed(step=9),  # another step than the folder's name says
    changed(step=10**9),
]
BAD_TEXTS = [
    "",
    "null",
    "{",
    "[" * 10**5,
    '{"step": ' + "9" * 5000 + "}",
    '{"step": NaN}',
    b"\xff\xfe",
    '{"a": 1, "a": 2}',
]


@pytest.mark.parametrize("number", range(len(BAD_INFOS) + len(BAD_TEXTS)))
def test_bad_information_is_one_line_and_the_list_goes_on(
    tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = tmp_path / "checkpoints"
    write(checkpoints, 5)
    bad = write(checkpoints, 10, BAD_INFOS[number] if number < len(BAD_INFOS) else None)
    if number >= len(BAD_INFOS):
        text = BAD_TEXTS[number - len(BAD_INFOS)]
        (bad / fmt.INFO).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError) as caught:
        fmt.read_info(bad)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 700 and "info.json cannot be read" in message
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    _header, good, shown = capsys.readouterr().out.splitlines()
    assert good.endswith("verified") and "info.json cannot be read" in shown and shown.isprintable()
    assert main(["checkpoint", "diff", str(tmp_path), "5", "10"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_layout_of_a_time_before_pipelines_is_read(tmp_path: Path) -> None:
    old = changed(**{f"layout__{key}": ... for key in SINCE_PIPELINES})
    assert asdict(fmt.read_info(write(tmp_path, 10, old))) == changed()
    split = changed(layout__world_size=8, layout__pipeline=2, layout__tensor=2, layout__context=2)
    assert asdict(fmt.read_info(write(tmp_path / "split", 10, split))) == split


def test_good_information_is_read(tmp_path: Path) -> None:
    more = changed(layout__more=1, run_state__more={"a": [1]}, versions={"torch": "2.13.0", "triton": None})
    known = changed(versions={"torch": "2.13.0", "triton": None})
    assert asdict(fmt.read_info(write(tmp_path, 10, more))) == known  # what a later version adds is passed over
    without = changed(run_state__wandb_run_id=...)  # no run of W&B
    assert asdict(fmt.read_info(write(tmp_path / "third", 10, without))) == changed()
    seed = changed(run_state__seed=2**64 - 1, run_state__recent_losses=[1, 2.5], run_state__data={"a": {"tokens": 1}})
    renamed = write(tmp_path / "other", 10, seed).rename(tmp_path / "best")
    assert asdict(fmt.read_info(renamed)) == seed  # a copy under a name of its own


def test_steps_of_nine_digits_are_found_in_order(tmp_path: Path) -> None:
    steps = [5, 99_999_999, 100_000_000, 2_000_000_000]
    for step in reversed(steps):
        write(tmp_path, step)
    for name in ("step-0100000001", "step-٠٠٠٠٠٠٠٧", "step-0000007", "step-" + "9" * 40, "step-00000001\n"):
        (tmp_path / name).mkdir()
    assert [fmt.step_of(path) for path in fmt.list_checkpoints(tmp_path)] == steps
    assert [fmt.step_of(path) for path in fmt.prunable(tmp_path, 1, 0)] == steps[:-1]
    place = fmt.archive_checkpoint(tmp_path / "step-100000000")
    assert fmt.list_archived(tmp_path) == [place] and fmt.step_of(place) == 10**8


# --- manifest

BAD_MANIFESTS: list[Callable[[dict[str, Any]], Any]] = [
    lambda tree: None,
    lambda tree: [],
    lambda tree: {},
    lambda tree: tree | {"files": None},
    lambda tree: tree | {"files": []},
    lambda tree: tree | {"files": "x"},
    lambda tree: tree | {"format": "\x1b[2J"},
    lambda tree: tree | {"format": ["x"] * 10**5},
    *(
        (lambda tree, value=value: tree | {"files": tree["files"] | {"info.json": value}})
        for value in (None, [], 1, {}, {"size": 1}, {"sha256": "0" * 64}, *({"size": 1, "sha256": s} for s in (1, "x")))
    ),
    *(
        (lambda tree, size=size: tree | {"files": tree["files"] | {"info.json": {"size": size, "sha256": "0" * 64}}})
        for size in (-1, True, "1", 1.0, None)
    ),
    *(
        (lambda tree, name=name: tree | {"files": tree["files"] | {name: {"size": 1, "sha256": "0" * 64}}})
        for name in ("", ".", "..", "../x", "/etc/passwd", "a/b", "a\nb", "\x1b[2J", "a\0b", "x" * 300, "\u202ex")
    ),
]


@pytest.mark.parametrize("number", range(len(BAD_MANIFESTS)))
def test_bad_manifests_are_one_line(tmp_path: Path, number: int) -> None:
    folder = write(tmp_path, 10)
    tree = json.loads((folder / fmt.MANIFEST).read_text())
    (folder / fmt.MANIFEST).write_text(json.dumps(BAD_MANIFESTS[number](tree)))
    [problem] = fmt.verify(folder)
    assert problem.isprintable() and len(problem) < 600


@pytest.mark.parametrize("text", BAD_TEXTS, ids=range(len(BAD_TEXTS)))
def test_manifests_that_are_no_json_are_one_line(tmp_path: Path, text: str | bytes) -> None:
    folder = write(tmp_path, 10)
    (folder / fmt.MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
    [problem] = fmt.verify(folder)
    assert problem.isprintable() and "manifest.json" in problem and len(problem) < 600


# --- what belongs to ranks


class OneRank:
    rank, world_size, device = 0, 1, torch.device("cpu")


def test_statistics_are_those_of_the_model(tmp_path: Path) -> None:
    moe = MoEConfig(num_ffn_experts=4, ffn_hidden_size=8, num_constant_experts=2, num_zero_experts=2)
    good = {name: torch.ones(shape) for name, shape in StepStats((0, 1), moe).state_shapes().items()}
    older = {name: value for name, value in good.items() if name != "stats.observed"}
    cases = {"good": good, "older release": older, "unknown": good | {"stats.x": torch.ones(1)}}
    cases["shape"] = good | {"stats.load": torch.ones(1000, 1000)}
    cases["one expert more"] = good | {"stats.load": torch.ones(2, 9)}
    cases["one expert less"] = good | {"stats.load": torch.ones(2, 7)}
    cases["another kind"] = good | {"stats.layers": good["stats.layers"].new_ones(2, good["stats.layers"].shape[1] + 1)}
    cases["few experts"] = good | {"stats.load": torch.ones(2, 3)}
    cases["scalar"] = good | {"stats.load": torch.ones(())}
    for name, state in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        write_tensors(folder, {f"rank-{rank}/{key}": value for key, value in state.items() for rank in (0, 7)}, None)
        reader, stats = TensorReader(folder), StepStats((0, 1), moe)
        assert _ranks_with_statistics(reader) == {0, 7}
        for saved_ranks, loss in ((1, 1.0), (10**6, 2.0)):  # as many ranks as now, or others
            stats.clear()
            if name in ("good", "older release"):
                _load_stats(reader, stats, OneRank(), saved_ranks)  # type: ignore[arg-type]
                assert stats.state()["stats.loss_sum"] == loss and stats.state()["stats.steps"] == 1
            else:
                with pytest.raises(CheckpointError, match="statistics of rank 0"):
                    _load_stats(reader, stats, OneRank(), saved_ranks)  # type: ignore[arg-type]


def test_damaged_generators_are_one_line() -> None:
    before = torch.get_rng_state()
    for value in (0, 255):
        with pytest.raises(CheckpointError, match="random number generators are damaged"):
            _set_rng_state({"rng.cpu": torch.full_like(before, value)}, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
