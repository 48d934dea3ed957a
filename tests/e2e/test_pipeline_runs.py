"""``train.py`` with a pipeline: the run of one process, also when it was killed and went on in another schedule."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from moepp.cli.main import main
from moepp.errors import PeerError, Preempted
from tests.data_files import write_word_tokenizer
from tests.faults import ALL
from tests.train_processes import TINY, TrainServer, checkpoint_names, records

RUN = [
    "engine=native",
    "model.num_layers=4",
    "train.steps=8",
    "train.micro_batch_size=2",
    "train.log_interval=2",
    "train.eval_interval=4",
    "checkpoint.interval=3",
]
ONE_FORWARD_ONE_BACKWARD = ["parallel.pipeline=2"]
INTERLEAVED = ["parallel.pipeline=2", "parallel.pipeline_schedule=interleaved", "parallel.pipeline_chunks=2"]


def measured(run_dir: Path) -> list[dict[str, Any]]:
    """Records without what the layout decides: bytes sent."""
    return [{k: v for k, v in record.items() if not k.startswith("comm/")} for record in records(run_dir)]


def require_same(observed: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Bit for bit, but for the norm, which is summed over stages in fp64."""
    assert len(observed) == len(wanted)
    for one, other in zip(observed, wanted, strict=True):
        norm = "train/grad_norm"
        assert one.get(norm) == (pytest.approx(other[norm], rel=1e-14) if norm in other else None)
        assert one | {norm: None} == other | {norm: None}


def exported(run_dir: Path) -> dict[str, Any]:
    """The weights of the newest checkpoint, as one process reads it."""
    assert main(["export", str(run_dir), str(run_dir / "exported"), "--format", "moepp"]) == 0
    tensors: dict[str, Any] = {}
    for file in sorted((run_dir / "exported").glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def test_pipeline_run_killed_and_continued_is_the_run_of_one_process(
    server: TrainServer, corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [corpus, *RUN]
    server.train(tmp_path / "alone", 1, options)
    (tmp_path / "inputs").mkdir()
    record = ("record_inputs", ALL, str(tmp_path / "inputs"))
    run = server.train(tmp_path / "whole", 2, [*options, *ONE_FORWARD_ONE_BACKWARD], [record])
    read = [(tmp_path / "inputs" / f"rank-{rank}.txt").read_text().split() for rank in (0, 1)]
    assert read[0][1::3] == read[1][1::3] and len(set(read[0][1::3])) == 8, "both stages read the same text"
    assert "2 ranks, PP 2, EP 1" in run.output(0)
    wanted = measured(tmp_path / "alone")
    require_same(measured(tmp_path / "whole"), wanted)

    killed = server.start(tmp_path / "parts", 2, [*options, *ONE_FORWARD_ONE_BACKWARD], [("kill_at", 1, 6)])
    assert killed.wait() == [PeerError.exit_code, -signal.SIGKILL]
    assert checkpoint_names(tmp_path / "parts") == ["step-00000003"]
    info = json.loads((tmp_path / "parts" / "checkpoints" / "step-00000003" / "info.json").read_text())
    assert info["layout"]["pipeline"] == 2
    server.train(tmp_path / "parts", 2, [*options, *INTERLEAVED])
    require_same(measured(tmp_path / "parts"), wanted)

    alone, parts = exported(tmp_path / "alone"), exported(tmp_path / "parts")
    assert alone.keys() == parts.keys()
    assert [name for name in alone if not (alone[name] == parts[name]).all()] == []
    tokenizer = str(write_word_tokenizer(tmp_path / "tokenizer.json", 62))
    texts = []
    for name in ("alone", "parts"):
        capsys.readouterr()
        assert main(["generate", str(tmp_path / name), "--prompt", "w1 w2", "--tokenizer", tokenizer]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0].split()) > 2


@pytest.mark.slow
def test_pipeline_checkpoint_continues_with_expert_parallel_ranks(
    server: TrainServer, corpus: str, tmp_path: Path
) -> None:
    free = ["model.moe.capacity_factor=null", "model.moe.balance_loss_scope=global_batch"]
    options = [corpus, *RUN, *free]
    server.train(tmp_path / "alone", 1, options)
    stop = ("stop_signal_at", 1, 4, int(signal.SIGTERM))
    server.train(tmp_path / "run", 2, [*options, *INTERLEAVED], [stop], exit_codes=[Preempted.exit_code] * 2)
    server.train(tmp_path / "run", 2, [*options, "parallel.expert=2"])
    for one, other in zip(records(tmp_path / "alone"), records(tmp_path / "run"), strict=True):
        for key in ("train/loss", "train/grad_norm", "eval/loss"):
            assert other.get(key) == (pytest.approx(one[key], rel=1e-5) if key in one else None)


def test_work_on_the_whole_model_is_refused_before_anything_starts(
    server: TrainServer, corpus: str, tmp_path: Path
) -> None:
    key = "train.samples=1"
    overrides = [override for override in TINY if not override.startswith(key.partition("=")[0])]
    run = server.train(
        tmp_path / "run", 2, [*overrides, corpus, *RUN, *ONE_FORWARD_ONE_BACKWARD, key], exit_codes=[2, 2]
    )
    assert run.output(0).count("error:") == 1 and "parallel.pipeline=2 splits it" in run.output(0)
    assert not (tmp_path / "run").exists()
