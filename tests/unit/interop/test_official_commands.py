"""`moepp import` and `moepp export`: released weights into a run, runs out to folders, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from moepp.checkpoint import read_info
from moepp.cli.main import main
from moepp.config import from_dict
from moepp.interop import hf, official
from moepp.interop.weights import TensorFolder
from moepp.model import Transformer, init_parameters
from tests.data_files import numbered_documents, write_indexed, write_word_tokenizer
from tests.official_cases import GOLDEN, released_config, released_tensors, write_released

ROOT = Path(__file__).resolve().parents[3]
RELEASED = GOLDEN / "published_flags"


def same_tensors(a: Path, b: Path) -> bool:
    one, other = TensorFolder(a), TensorFolder(b)
    return one.shapes == other.shapes and all(torch.equal(one.read(key), other.read(key)) for key in one.shapes)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made from released weights, with a tokenizer and a dataset of its own."""
    folder = tmp_path_factory.mktemp("imported")
    source = folder / "released"
    shutil.copytree(RELEASED, source)
    write_word_tokenizer(source / "tokenizer.json", 100)
    data = write_indexed(folder / "words", numbered_documents([20] * 5) * 20)
    options = [f"data.paths=[{data}]", "train.precision=fp32", "data.split='80,20,0'"]
    assert main(["import", str(source), str(folder / "run"), *options]) == 0
    return folder


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error


def test_import_makes_a_run_at_step_0_with_a_whole_configuration(imported):
    run = imported / "run"
    cfg = from_dict(yaml.safe_load((run / "config.yaml").read_text()))
    assert cfg.model == official.read_config(RELEASED)
    assert cfg.data.tokenizer == str(imported / "released" / "tokenizer.json") and cfg.train.precision == "fp32"
    info = read_info(run / "checkpoints" / "step-00000000")
    assert (info.step, info.tokens) == (0, 0)


def test_what_was_imported_is_exported_bitwise(imported, tmp_path, capsys):
    run = str(imported / "run")
    assert main(["export", run, str(tmp_path / "official"), "--code-repo", "some/repo"]) == 0
    assert same_tensors(tmp_path / "official", RELEASED)
    written = json.loads((tmp_path / "official" / "config.json").read_text())
    assert written["auto_map"]["AutoConfig"] == "some/repo--configuration_moe_plus_plus.MoeConfig"
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (101, 101, None)
    assert main(["export", run, str(tmp_path / "own"), "--format", "moepp", "--max-shard-size", "0.3MB"]) == 0
    assert len(list((tmp_path / "own").glob("*.safetensors"))) > 3
    # and in again, from the project's own format
    assert main(["import", str(tmp_path / "own"), str(tmp_path / "run"), "train.precision=fp32"]) == 0
    assert main(["export", str(tmp_path / "run" / "checkpoints" / "step-00000000"), str(tmp_path / "again")]) == 0
    assert same_tensors(tmp_path / "again", RELEASED)
    assert main(["export", run, str(tmp_path / "bf16"), "--dtype", "bf16"]) == 0
    one, other = TensorFolder(tmp_path / "bf16"), TensorFolder(RELEASED)
    assert all(torch.equal(one.read(key), other.read(key).bfloat16()) for key in other.shapes)
    assert (tmp_path / "bf16" / "model.safetensors").stat().st_mode & 0o077 == 0o666 & ~umask() & 0o077


def umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_the_tokenizer_goes_along_and_transformers_reads_it(imported, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    assert main(["export", str(imported / "run"), str(tmp_path / "x"), "--format", "moepp"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    assert tokenizer("w3 w5 w99").input_ids == [3, 5, 99]
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.padding_side) == ("<|endoftext|>", 101, "left")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "x", trust_remote_code=True)
    assert config.eos_token_id == 101 and config.model_type == "moepp"


def test_the_model_card_tells_data_configuration_and_evaluation(imported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(imported / "run", run)
    records = [{"step": 0, "tokens": 0, "eval/loss": 3.25}, {"step": 7, "tokens": 70, "eval/loss": 1.0}]
    records += [{"step": 0, "tokens": 0, "eval/wiki/loss": 3.75}, {"step": 7, "tokens": 70, "eval/wiki/loss": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result = {"name": "sciq", "metrics": {"acc": 0.4321}, "stderr": {"acc": 0.02}, "chance": 0.25, "shots": 0}
    result |= {"documents": 10, "requests": 40, "truncated": 0, "origin": "files", "notes": [], "tasks": {}}
    (run / "eval").mkdir()
    (run / "eval" / "00000000-20300101T000000.json").write_text(json.dumps({"results": [result]}))
    assert main(["export", str(run), str(tmp_path / "x")]) == 0
    card = (tmp_path / "x" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for part in (
        "words",
        "16 FFN, 2 constant",
        "0 training tokens",
        "tau: 0.75",
        "3.2500 nats",
        "set wiki: 3.7500 nats",
        "SciQ",
        "43.2",
        "## Fine-tuning",
        "26 ids from 102 on have no token",
    ):
        assert part in card, part
    assert "1.0000 nats" not in card and str(tmp_path) not in card


@pytest.mark.slow
def test_a_run_continues_from_the_import_with_other_data(imported, tmp_path):
    """The README's commands, as processes."""
    run = tmp_path / "run"
    shutil.copytree(imported / "run", run)
    data = write_indexed(tmp_path / "other", numbered_documents([30] * 4) * 30)
    command = [sys.executable, "train.py", "--config-dir", str(run), "model=imported", f"run.dir={run}"]
    command += [f"data.paths=[{data}]", "data.tokenizer=null", "data.seq_len=16", "data.split='80,20,0'"]
    command += ["engine=native", "train.precision=fp32", "train.global_batch_size=2", "train.log_interval=1"]
    command += ["train.eval_batches=0", "train.samples=0", "optim.warmup_steps=0", "optim.lr=1e-3"]
    command += ["logging.wandb.mode=disabled", "logging.progress=false", "model.moe.capacity_factor=null"]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    command += ["train.steps=2"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step-00000000" in (run / "log" / "rank-0.txt").read_text()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert [record["step"] for record in records if "train/loss" in record] == [1, 2]
    model = official.load_pretrained(RELEASED)
    likely = [cross_entropy(model, document) for document in numbered_documents([30] * 4)]
    assert min(likely) - 1.0 < losses[0] < max(likely) + 1.0  # a fresh model would be at ln 128 = 4.85
    assert main(["export", str(run), str(tmp_path / "trained")]) == 0
    assert not same_tensors(tmp_path / "trained", RELEASED)


@torch.no_grad()
def cross_entropy(model: official.OfficialModel, document: list[int]) -> float:
    ids = torch.tensor([document])
    logits = model(ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()


def test_bad_imports_are_refused_before_anything_is_made(tmp_path, capsys):
    run = tmp_path / "run"
    refused(["import", str(tmp_path / "nowhere"), str(run)], "not a folder", capsys)
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    refused(["import", str(tmp_path / "llama"), str(run)], "type 'llama'", capsys)
    config = released_config()
    tensors = released_tensors(config)
    tensors.pop("model.norm.weight")
    folder = write_released(tmp_path / "broken", config, tensors)
    refused(["import", str(folder), str(run)], "1 missing (model.norm.weight)", capsys)
    refused(["import", str(RELEASED), str(run), "trian.steps=1"], "train.steps", capsys)
    refused(["import", str(RELEASED), str(run), "model.vocab_size=5"], "vocab_size=5 (the weights have 128)", capsys)
    assert not run.exists()


def test_import_leaves_existing_runs_and_folders_alone(imported, tmp_path, capsys):
    refused(["import", str(RELEASED), str(imported / "run")], "already holds a run", capsys)
    (tmp_path / "notes.txt").write_text("mine")
    refused(["import", str(RELEASED), str(tmp_path)], "holds other files", capsys)


def test_bad_exports_are_refused(imported, tmp_path, capsys):
    run, out = str(imported / "run"), str(tmp_path / "out")
    refused(["export", str(RELEASED), out], "not a run or a checkpoint", capsys)
    refused(["export", str(tmp_path), out], "neither a run", capsys)
    refused(["export", run, out, "--max-shard-size", "big"], "--max-shard-size=big", capsys)
    refused(["export", run, out, "--format", "moepp", "--code-repo", "a/b"], "--code-repo", capsys)
    refused(["export", run, out, "--tokenizer", str(tmp_path / "no.json")], "no.json does not exist", capsys)
    large = write_word_tokenizer(tmp_path / "large.json", 500)
    refused(["export", run, out, "--tokenizer", large], "has 502 tokens, but the model knows 128", capsys)
    assert not Path(out).exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    refused(["export", run, str(tmp_path / "mine")], "holds other files", capsys)
    refused(["export", run, str(tmp_path / "large.json")], "is a file", capsys)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000000"
    shutil.copytree(imported / "run", tmp_path / "run")
    data = next(checkpoint.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-10])
    refused(["export", str(checkpoint), out], "does not verify", capsys)
    assert not Path(out).exists()


def test_only_an_earlier_export_is_replaced(imported, tmp_path, capsys):
    run, model = str(imported / "run"), tmp_path / "model"

    def kept(message: str, *more: str) -> None:
        before = {path.name: path.read_bytes() for path in model.iterdir()}
        refused(["export", run, str(model), *more], message, capsys)
        assert {path.name: path.read_bytes() for path in model.iterdir()} == before

    shutil.copytree(RELEASED, model)  # released weights have a generation_config.json, too
    (model / "generation_config.json").write_text("{}")
    kept("holds other files and no earlier export")
    for config in ('{"model_type": "llama"}', "[]", "{", "{}"):
        (model / "config.json").write_text(config)
        kept("holds other files and no earlier export")
    refused(["export", run, str(imported / "released")], "no earlier export", capsys)
    shutil.rmtree(model)
    for form in ("official", "moepp"):
        assert main(["export", run, str(model), "--format", form]) == 0
        (model / "notes.md").write_text("mine")
    capsys.readouterr()
    assert (model / "modeling_moepp.py").exists() and (model / "notes.md").read_text() == "mine"
    for name in ("special_tokens_map.json", "chat_template.jinja", "pytorch_model-00001-of-00002.bin", "vocab.json"):
        (model / name).write_text("")
        kept(f"holds {name}, which would be read beside the new export; move them away")
        (model / name).unlink()
    kept("would be replaced, and holds the tokenizer of the run", "--tokenizer", str(model / "tokenizer.json"))
    shutil.copytree(imported / "run", tmp_path / "run")
    info = tmp_path / "run/checkpoints/step-00000000/info.json"
    tree = json.loads(info.read_text())
    tree["config"]["init"]["path"] = str(model)
    info.write_text(json.dumps(tree))
    run = str(tmp_path / "run")
    kept(f"would be replaced, and holds init.path of the run ({model})")


def test_a_model_that_the_released_code_cannot_express_is_refused_with_a_hint(tmp_path, capsys):
    from dataclasses import replace

    cfg = official.read_config(RELEASED)
    cfg = replace(cfg, moe=replace(cfg.moe, top_k=3, num_copy_experts=2))
    model = Transformer(cfg)
    init_parameters(model, 1)
    hf.save_pretrained(model, tmp_path / "own", official.TokenIds(None, None, None))
    run = str(tmp_path / "it's [a], b=c")
    assert main(["import", str(tmp_path / "own"), run]) == 0
    message = "num_copy_experts=2 (it has 1); model.moe.top_k=3 (it has 2); use --format moepp"
    refused(["export", run, str(tmp_path / "x")], message, capsys)
    assert not (tmp_path / "x").exists()
    assert main(["export", run, str(tmp_path / "x"), "--format", "moepp", "--dtype", "fp32"]) == 0
    assert same_tensors(tmp_path / "x", tmp_path / "own")
    assert "names no tokenizer" in capsys.readouterr().out


@pytest.mark.slow
def test_the_model_cards_snippet_runs_without_a_question(imported, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path / "x"
    assert main(["export", str(imported / "run"), str(folder), "--format", "moepp"]) == 0
    snippet = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "AutoTokenizer" in snippet and "AutoModelForCausalLM" in snippet
    snippet = snippet.replace("path/to/this/folder", str(folder)).replace('tokenizer("The"', 'tokenizer("w3 w5"')
    environ = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("w3 w5") and len(done.stdout.split()) > 4
    said = (done.stdout + done.stderr).lower()
    for sign in ("[y/n]", "trust_remote_code", "model of type", "warning", "not supported"):
        assert sign not in said, done.stderr
