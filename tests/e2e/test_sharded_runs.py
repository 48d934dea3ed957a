"""``train.py`` with ZeRO-1 and with FSDP2: the run of one process, and each continues what the other has saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from moepp.cli.main import main
from tests.data_files import write_word_tokenizer
from tests.evaluation_cases import write_benchmarks
from tests.train_processes import TrainServer, checkpoint_names, records

ZERO_1 = ["engine.name=native", "parallel.zero_stage=1", "parallel.expert=2"]
FSDP = ["engine.name=fsdp", "parallel.expert=2", "train.micro_batch_size=2"]
# A schedule that does not ask how long the run is: half of it is a run of its own.
RUN = ["optim.schedule=constant", "train.steps=6", "train.log_interval=3", "train.eval_interval=3"]
RUN += ["checkpoint.interval=3", "checkpoint.keep=0"]
NAMES = ("train/loss", "train/grad_norm", "train/balance_loss", "eval/loss")


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, reference in zip(found, expected, strict=True):
        for name in NAMES:
            assert (name in line) == (name in reference)
            if name in line:
                assert line[name] == pytest.approx(reference[name], rel=1e-5), (line["step"], name)


@pytest.mark.parametrize(
    ("first", "second"), [(ZERO_1, FSDP), pytest.param(FSDP, ZERO_1, marks=pytest.mark.slow)], ids=["zero-1", "fsdp"]
)
def test_run_that_changes_its_engine_is_the_run_of_one_process(
    server: TrainServer, corpus: str, tmp_path: Path, first: list[str], second: list[str]
) -> None:
    server.train(tmp_path / "alone", 1, [corpus, *RUN, "engine.name=native"])
    whole = server.train(tmp_path / "whole", 2, [corpus, *RUN, *first])
    stage = 1 if first is ZERO_1 else 3
    assert f"ZeRO {stage}" in whole.output(0)
    assert_close(records(tmp_path / "whole"), records(tmp_path / "alone"))

    folder = tmp_path / "parts"
    server.train(folder, 2, [corpus, *RUN, *first, "train.steps=3"])
    assert checkpoint_names(folder) == ["step-00000003"]
    info = json.loads((folder / "checkpoints" / "step-00000003" / "info.json").read_text())
    assert (info["layout"]["engine"], info["layout"]["zero_stage"]) == (first[0].split("=")[1], stage)
    server.train(folder, 4, [corpus, *RUN, *second])
    wanted = [line for line in records(tmp_path / "alone") if line["step"] > 3]
    assert_close([line for line in records(folder) if line["step"] > 3], wanted)

    weights = []
    for name in ("alone", "parts"):
        assert main(["export", str(tmp_path / name), str(tmp_path / f"{name}-exported"), "--format", "moepp"]) == 0
        [file] = (tmp_path / f"{name}-exported").glob("*.safetensors")
        weights.append(load_file(file))
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).norm() <= 1e-4 * tensor.norm(), name


SPLIT = {
    "zero-1": ZERO_1,
    "fsdp": FSDP,
    "pipeline": ["engine.name=native", "parallel.pipeline=2", "train.micro_batch_size=2"],
    "tensor": ["engine.name=native", "parallel.tensor=2", "parallel.expert=2"],
    "context": ["engine.name=native", "parallel.context=2"],
}


@pytest.mark.parametrize("layout", SPLIT)
def test_commands_read_what_a_split_model_saved(
    server: TrainServer, corpus: str, tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The export is read by other code than the checkpoint, and both say the same in one process."""
    server.train(tmp_path / "run", 2, [corpus, *SPLIT[layout], "train.steps=2", "model.init_std=0.2"])
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "exported"), "--format", "moepp"]) == 0
    tokenizer = ["--tokenizer", str(write_word_tokenizer(tmp_path / "tokenizer.json", 62))]
    data = ["--tasks", "sciq", "--data", str(write_benchmarks(tmp_path / "benchmarks", 3))]
    texts, results = [], []
    for name in ("run", "exported"):
        place, file = str(tmp_path / name), tmp_path / f"{name}.json"
        capsys.readouterr()
        assert main(["generate", place, "--prompt", "w1 w2", "--max-new-tokens", "20", *tokenizer]) == 0
        texts.append(capsys.readouterr().out)
        assert main(["eval", place, *data, *tokenizer, "--output", str(file)]) == 0
        results.append(json.loads(file.read_text()))
    assert texts[0] == texts[1] and len(texts[0].split()) > 10
    assert results[0]["results"] == results[1]["results"] != []


def test_fsdp_refuses_what_one_rank_would_have_to_run_alone(server: TrainServer, corpus: str, tmp_path: Path) -> None:
    run = server.start(tmp_path / "run", 2, [corpus, *RUN, *FSDP, "train.samples=2"])
    assert run.wait() == [2, 2]
    assert run.output(0).count("error:") == 1 and "engine=fsdp splits it" in run.output(0)
