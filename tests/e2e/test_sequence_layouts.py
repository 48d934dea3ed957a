"""Runs whose ranks share sequences measure what one process does, continue each other's checkpoints, keep documents."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moepp.checkpoint import read_info
from moepp.cli.main import main
from moepp.data.prepare.pipeline import PrepareOptions, prepare
from moepp.data.prepare.readers import ReadOptions
from moepp.evaluation.load import build_model, find_model
from tests.data_files import write_word_tokenizer
from tests.dist import WorkerPool
from tests.parity import group_of
from tests.train_processes import TrainServer, records

STEPS, SAVED = 6, 3
TOLERANCE = 1e-5
OPTIONS = [
    "engine.name=native",
    "data.seq_len=16",
    "data.document_attention=true",
    "model.num_heads=4",
    "model.num_kv_heads=4",
    "model.init_std=0.2",
    f"train.steps={STEPS}",
    f"checkpoint.interval={SAVED}",
    "checkpoint.keep=0",
]
LAYOUTS = {
    "one": (1, []),
    "ulysses": (2, ["parallel.context=2", "parallel.expert=2"]),
    "gather": (2, ["parallel.context=2", "parallel.context_method=gather"]),
    "tensor": (2, ["parallel.tensor=2", "parallel.expert=2"]),
    "both": (4, ["parallel.tensor=2", "parallel.context=2", "parallel.expert=4", "parallel.context_method=gather"]),
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name short documents: several in each sequence."""
    folder, draw = tmp_path_factory.mktemp("documents"), random.Random(1)
    tokenizer = write_word_tokenizer(folder / "tokenizer.json", 40)
    lines = (" ".join(f"w{draw.randrange(40)}" for _ in range(draw.randrange(2, 12))) for _ in range(300))
    (folder / "text.txt").write_text("\n".join(lines))
    read = ReadOptions(text_unit="line")
    prepare([str(folder / "text.txt")], PrepareOptions(str(folder / "text"), tokenizer, read=read, progress=False))
    return [f"data.paths=[{folder / 'text'}]", f"data.tokenizer={tokenizer}"]


@pytest.fixture(scope="module")
def trained(server: TrainServer, documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``trained(name, *more)``: the run of that layout."""
    folder, done = tmp_path_factory.mktemp("runs"), set()

    def get(name: str, *more: str) -> Path:
        run = folder / f"{name}{len(more)}"
        if run not in done:
            ranks, layout = LAYOUTS[name]
            server.train(run, ranks, [*documents, *OPTIONS, *layout, *more])
            done.add(run)
        return run

    return get


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    names = ("train/loss", "train/grad_norm", "train/balance_loss", "eval/loss", "routing/drop_fraction")
    assert any("eval/loss" in line for line in found)
    for line, reference in zip(found, expected, strict=True):
        for name in names:
            assert (name in line) == (name in reference)
            if name in line:
                assert line[name] == pytest.approx(reference[name], rel=TOLERANCE, abs=0), (line["step"], name)


@pytest.mark.parametrize(
    "name", ["gather", "tensor", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ulysses", "both"))]
)
def test_losses_are_those_of_one_process(trained, name):
    assert_close(records(trained(name)), records(trained("one")))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("gather", "tensor"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("tensor", "ulysses"), ("both", "one"), ("one", "both"))
        ),
    ],
)
def test_checkpoint_of_one_layout_continues_in_another(server, documents, trained, tmp_path, source, target):
    checkpoint = trained(source) / "checkpoints" / f"step-{SAVED:08d}"
    ranks, layout = LAYOUTS[target]
    server.train(tmp_path / "run", ranks, [*documents, *OPTIONS, *layout, f"run.resume={checkpoint}"])
    assert_close(records(tmp_path / "run"), records(trained("one"), after=SAVED))


def test_documents_make_a_difference_and_are_part_of_the_run(server, documents, trained, tmp_path):
    run = trained("one")
    crossing = trained("one", "data.document_attention=false")
    losses = [[line["train/loss"] for line in records(folder) if "train/loss" in line] for folder in (run, crossing)]
    assert all(abs(one - other) > 1e-4 for one, other in zip(*losses, strict=True))
    again = [*documents, *OPTIONS, "data.document_attention=false", f"train.steps={STEPS + 1}"]
    stopped = server.start(run, 1, again)
    assert stopped.wait() == [2]
    assert "data.document_attention: True -> False" in stopped.output(0)


def _hidden(rank: int, run: str, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return build_model(find_model(run), group_of(1))(ids).hidden


def test_commands_keep_attention_within_documents(pool_1: WorkerPool, trained, tmp_path):
    run = trained("one")
    end = read_info(run / "checkpoints" / f"step-{STEPS:08d}").eod_id
    assert end is not None and find_model(str(run)).document_end == end
    assert find_model(str(trained("one", "data.document_attention=false"))).document_end is None
    ids = torch.tensor([[3, 4, 5, end, 6, 7, 8]])
    [packed], [alone] = (pool_1.run(_hidden, str(run), part) for part in (ids, ids[:, 4:]))
    torch.testing.assert_close(packed[:, 4:], alone, rtol=1e-5, atol=1e-5)
    assert main(["export", str(run), str(tmp_path / "out"), "--format", "moepp"]) == 0
    assert "attention stayed within documents" in (tmp_path / "out" / "README.md").read_text()
    assert find_model(str(tmp_path / "out")).document_end == end


@pytest.mark.slow
@pytest.mark.parametrize("form", ["moepp", "official"])
def test_exported_weights_start_a_run_whose_ranks_share_heads(server, documents, trained, tmp_path, form):
    assert main(["export", str(trained("tensor")), str(tmp_path / "out"), "--format", form]) == 0
    starts = [f"init.path={tmp_path / 'out'}", f"init.format={form}"]
    runs = {name: tmp_path / name for name in ("one", "both")}
    for name, folder in runs.items():
        ranks, layout = LAYOUTS[name]
        server.train(folder, ranks, [*documents, *OPTIONS, *layout, *starts])
    assert_close(records(runs["both"]), records(runs["one"]))
    assert records(runs["one"])[0]["train/loss"] < records(trained("one"))[0]["train/loss"] - 0.01
