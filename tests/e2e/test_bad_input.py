"""What a user can get wrong: one line that names value, rule and remedy, on the first rank alone, before training.

Each case is a real start of ``train.py``; every rank must exit with code 2 within the time limit.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.data_files import numbered_documents, write_indexed, write_word_tokenizer
from tests.train_processes import TINY, TrainRun, TrainServer

LIMIT_SECONDS = 120.0
EXIT_BAD_INPUT = 2


@pytest.fixture(scope="module")
def server() -> Iterator[TrainServer]:
    with pytest.MonkeyPatch.context() as patch:  # a machine where nobody is logged in to W&B
        for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
            patch.delenv(name, raising=False)
        patch.setenv("HOME", "/nonexistent")
        with TrainServer() as started:
            yield started


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``good`` data of 40 documents with 20 tokens each, ids below 64, and files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("files")
    good = [[(7 * i + j) % 64 for j in range(20)] for i in range(40)]
    for name in ("good", "truncated", "cut_index", "no_bin"):
        write_indexed(folder / name, good)
    os.truncate(folder / "truncated.bin", 101)
    os.truncate(folder / "cut_index.idx", 60)
    (folder / "no_bin.bin").unlink()
    write_indexed(folder / "empty", [])
    write_indexed(folder / "large_ids", numbered_documents([20] * 40))
    write_indexed(folder / "negative", [[-3, *row] for row in good], "int32")
    write_indexed(folder / "one_document", good[:1])
    (folder / "not_an_index.idx").write_text("no magic number here, only text" * 20)
    (folder / "not_an_index.bin").write_bytes(bytes(400))
    write_word_tokenizer(folder / "tokenizer.json", num_words=62)
    write_word_tokenizer(folder / "large_tokenizer.json", num_words=500)
    (folder / "no_json.json").write_text("{oh")
    (folder / "other.json").write_text('{"vocab": 3}')
    (folder / "plain_file").write_text("text")
    (folder / "own/model").mkdir(parents=True)
    (folder / "own/model/mine.yaml").write_text("num_layers: [")
    (folder / "notes").mkdir()
    (folder / "notes" / "todo.txt").write_text("mine")
    return folder


@dataclass(frozen=True)
class Bad:
    """A command line that must be refused; ``{files}`` and ``{run}`` stand for folders."""

    overrides: tuple[str, ...]
    parts: tuple[str, ...]  # that the message must contain
    ranks: int = 1


def bad(overrides: str, *parts: str, ranks: int = 1) -> Bad:
    return Bad(tuple(overrides.split("  ")), parts, ranks)


CASES = {
    # The command line.
    "mistyped key": bad("optim.learning_rat=1", "unknown configuration key optim.learning_rat", "optim."),
    "mistyped section": bad("trian.steps=3", "unknown configuration key trian.steps", "did you mean train.steps"),
    "mistyped key deep down": bad("model.moe.num_ffn_expert=4", "did you mean model.moe.num_ffn_experts"),
    "unknown key added": bad("+model.foo=1", "unknown configuration key model.foo"),
    "missing configuration": bad("engine=natve", "engine=natve does not exist", "one of deepspeed, fsdp, native"),
    "missing model": bad("model=huge", "model=huge does not exist", "moepp_0.6b"),
    "setting with dashes": bad("--train.steps=5", "--train.steps=5 is not an option", "without dashes"),
    "no equals sign": bad("train.steps", "'train.steps' cannot be read", "write key=value"),
    "bracket left open": bad("optim.betas=[0.9,", "cannot be read", "key=[a,b]"),
    "list without brackets": bad("data.split=90,5,5", "data.split=90,5,5 gives several values", "add -m to sweep"),
    "own file that is no YAML": bad("--config-dir={files}/own  model=mine", "own/model/mine.yaml line 1: ", ranks=2),
    "reference to nothing": bad("run.name='${nothing}'", "run.name does not resolve", "'nothing' not found"),
    # Types and choices.
    "text for a number": bad("train.steps=many", "train.steps='many' has the wrong type", "give an integer"),
    "fraction for a whole number": bad("model.hidden_size=64.5", "model.hidden_size=64.5", "give an integer"),
    "null": bad("train.steps=null", "train.steps=null is not allowed", "give an integer"),
    "not a number": bad("optim.lr=nan", "optim.lr=nan is not a finite number"),
    "bad choice": bad("train.precision=fp16", "'fp16' is not one of bf16, fp32"),
    "unknown engine": bad("engine.name=megatron", "'megatron' is not one of deepspeed, native"),
    "path without a list": bad("data.paths=somewhere", "data.paths='somewhere' has the wrong type str; give a list"),
    # Sizes.
    "heads": bad("model.num_heads=3", "model.hidden_size=16 is not divisible by model.num_heads=3"),
    "key-value heads": bad("model.num_kv_heads=3", "model.num_heads=2 is not divisible by model.num_kv_heads=3"),
    "more choices than experts": bad("model.moe.top_k=9", "model.moe.top_k=9", "8 experts", "lower top_k"),
    "no experts": bad(
        "model.moe.num_ffn_experts=0  model.moe.num_zero_experts=0  model.moe.num_copy_experts=0"
        "  model.moe.num_constant_experts=0",
        "0 experts of every kind",
        "raise num_ffn_experts",
    ),
    "negative": bad("model.num_layers=-1", "model.num_layers=-1 is below its minimum 1"),
    "micro-batch": bad("train.micro_batch_size=3", "train.global_batch_size=8 is not divisible", "a multiple of 3"),
    "sequence longer than the model": bad("data.seq_len=300", "data.seq_len=300 is longer than model.max_seq_len=256"),
    "learning rates": bad("optim.min_lr=1", "optim.min_lr=1.0 must lie between 0 and optim.lr"),
    "ZeRO with the native engine": bad("engine=native  parallel.zero_stage=2", "zero_stage=2 is not supported"),
    "ZeRO-0 with bf16": bad("parallel.zero_stage=0  train.precision=bf16", "set parallel.zero_stage=1"),
    "EP and one process": bad("parallel.expert=2", "parallel.expert=2 does not divide the 1 processes"),
    # Data.
    "missing data": bad("data.paths=[{files}/none]", "{files}/none names no data", "moepp prepare"),
    "half of the data": bad("data.paths=[{files}/no_bin]", "no_bin.bin"),
    "path with its ending": bad("data.paths=[{files}/good.bin]", "without its ending"),
    "truncated data": bad("data.paths=[{files}/truncated]", "{files}/truncated", "prepare"),
    "truncated index": bad("data.paths=[{files}/cut_index]", "{files}/cut_index.idx"),
    "no index at all": bad("data.paths=[{files}/not_an_index]", "{files}/not_an_index.idx"),
    "empty corpus": bad("data.paths=[{files}/empty]", "{files}/empty is an empty corpus", "0 documents"),
    "no paths": bad("data.paths=[]", "data.paths is empty"),
    "sequence longer than the data": bad(
        "model.max_seq_len=4096  data.seq_len=1000", "720 training tokens", "lower data.seq_len"
    ),
    "too little held out": bad("data.paths=[{files}/good,{files}/one_document]", "one_document", "validation tokens"),
    "vocabulary too small": bad("data.paths=[{files}/large_ids]", "token ids up to 799", "at least 800"),
    "negative ids": bad("data.paths=[{files}/negative]", "negative token id -3"),
    "weights": bad("data.weights=[1,2]", "data.weights has 2 entries and data.paths 1"),
    "split": bad("data.split='a,b,c'", "data.split='a,b,c' is not three shares", "'96,3,1'"),
    "split without training": bad("data.split='0,1,1'", "data.split='0,1,1'"),
    "missing tokenizer": bad("data.tokenizer={files}/none.json", "tokenizer {files}/none.json does not exist"),
    "tokenizer that is no JSON": bad("data.tokenizer={files}/no_json.json", "no_json.json is not valid JSON"),
    "JSON that is no tokenizer": bad("data.tokenizer={files}/other.json", "is not a tokenizer.json"),
    "tokenizer too large": bad("data.tokenizer={files}/large_tokenizer.json", "502 tokens and model.vocab_size is 64"),
    "cache": bad("data.cache_dir={files}/plain_file/cache", "data.cache_dir=", "cannot be created"),
    # Memory.
    "model that no memory holds": bad(
        "model.vocab_size=1000000000  model.hidden_size=100000000", "do not fit into the memory", "`moepp plan`"
    ),
    # Run directory, logging.
    "no permission": bad("run.dir=/proc/run", "run.dir=/proc/run is not writable", "choose another place"),
    "run directory below a file": bad("run.dir={files}/plain_file/run", "{files}/plain_file is a file"),
    "folder of something else": bad("run.dir={files}/notes", "is not a run but holds other files ('todo.txt')"),
    "name with a slash": bad("run.name=a/b", "run.name='a/b' must be a plain folder name"),
    "checkpoint that does not exist": bad("run.resume={files}/step-00000001", "{files}/step-00000001 is not a folder"),
    "resume mistyped": bad("run.resume=atuo", "run.resume=atuo"),
    "weights that do not exist": bad("init.path={files}/none", "{files}/none is not a folder"),
    "W&B online without a key": bad("logging.wandb.mode=online", "needs a W&B API key", "wandb login"),
    "benchmarks without a tokenizer": bad("eval.tasks=[arc_easy]", "eval.tasks=['arc_easy'] needs a tokenizer"),
    # Several processes: nobody hangs, and only the first speaks.
    "EP that does not divide the processes": bad("parallel.expert=3", "does not divide the 2 processes", ranks=2),
    "EP that does not divide the experts": bad(
        "parallel.expert=2  model.moe.num_ffn_experts=3",
        "parallel.expert=2 does not divide model.moe.num_ffn_experts=3",
        ranks=2,
    ),
    "more processes than experts": bad(
        "parallel.expert=2  model.moe.num_ffn_experts=1", "parallel.expert=2 exceeds", "=1", "lower", ranks=2
    ),
    "batch over processes": bad("train.global_batch_size=7", "not divisible by micro_batch_size 3 x 2", ranks=2),
    "mistyped key, two processes": bad("optim.lrr=1", "unknown configuration key optim.lrr", ranks=2),
    "missing data, two processes": bad("data.paths=[{files}/none]", "{files}/none names no data", ranks=2),
    "empty corpus, two processes": bad("data.paths=[{files}/empty]", "is an empty corpus", ranks=2),
    "no permission, two processes": bad("run.dir=/proc/run", "run.dir=/proc/run is not writable", ranks=2),
    "W&B without a key, two processes": bad("logging.wandb.mode=online", "needs a W&B API key", ranks=2),
    "no checkpoint, two processes": bad("run.resume={files}/step-00000001", "is not a folder", ranks=2),
}


def expect_refusal(run: TrainRun, parts: Sequence[str], lines: int = 0) -> None:
    """Every rank exits with code 2; the first has written one line, the others nothing.

    ``lines`` more of them may follow, indented: a list of differences.
    """
    codes = run.wait(limit_seconds=LIMIT_SECONDS)
    outputs = [run.output(rank) for rank in range(len(run.pids))]
    assert codes == [EXIT_BAD_INPUT] * len(codes), outputs
    # Checkpoints and weights are looked at last, when the run has said on standard output that it prepares itself.
    first, *others = [line for line in outputs[0].splitlines() if not line.startswith("preparing ")]
    assert first.startswith("error: ") and len(others) == lines, outputs[0]
    assert all(line.startswith("  ") for line in others), outputs[0]
    assert outputs[1:] == [""] * (len(outputs) - 1)
    for part in parts:
        assert part in outputs[0], f"{part!r} is not in: {outputs[0]}"
    assert "Traceback" not in outputs[0] and len(outputs[0]) < 600, outputs[0]


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_in_one_line(server, files, tmp_path, name):
    case = CASES[name]

    def fill(text: str) -> str:
        return text.replace("{files}", str(files))

    overrides = [fill(override) for override in case.overrides]
    if not any(override.startswith("data.paths") for override in overrides):
        overrides.append(f"data.paths=[{files}/good]")
    run = server.start(tmp_path / "run", case.ranks, overrides)
    expect_refusal(run, [fill(part) for part in case.parts])
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not metrics.exists() or metrics.stat().st_size == 0, "refused only after training had begun"


def test_good_input_is_accepted(server, files, tmp_path):
    """What the cases change works as it is; so it is their change that is refused."""
    for ranks in (1, 2):
        good = [f"data.paths=[{files}/good]", "train.steps=1", f"data.tokenizer={files}/tokenizer.json"]
        server.train(tmp_path / f"run-{ranks}", ranks, good)


@pytest.mark.parametrize("ranks", [1, 2])
def test_directory_of_another_run_is_refused_and_kept(server, files, tmp_path, ranks):
    good = [f"data.paths=[{files}/good]", "train.steps=1", "engine=native"]
    server.train(tmp_path / "run", ranks, good)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for changes, parts in (
        (["model.num_layers=1"], ["already holds another run", "model.num_layers: 2 -> 1", "choose another run.name"]),
        (["run.seed=5", "optim=sgd"], ["run.seed: 1234 -> 5", "optim.name: adamw -> sgd"]),
    ):
        expect_refusal(server.start(tmp_path / "run", ranks, [*good, *changes]), parts, lines=len(changes))
    never = server.start(tmp_path / "run", ranks, [*good, "run.resume=never"])
    expect_refusal(never, ["already holds a run and run.resume=never", "run.resume=auto"])
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


class Pair:
    """Two ranks of one run that are given different command lines, or time."""

    def __init__(self, server: TrainServer, folder: Path) -> None:
        self.server = server
        self.run = server.start(folder / "run", 0)  # no processes yet
        self.run.logs.extend(folder / f"rank-{rank}.txt" for rank in (0, 1))
        self.port = _free_port()
        self._pids: dict[int, int] = {}

    def start(self, rank: int, *overrides: str) -> None:
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port), "GLOO_SOCKET_IFNAME": "lo"}
        request: dict[str, Any] = {
            "argv": ["train.py", f"run.dir={self.run.run_dir}", *TINY, *overrides],
            "environ": variables | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            "log": str(self.run.logs[rank]),
            "faults": [],
        }
        self._pids[rank] = self.server.ask(request)
        if len(self._pids) == 2:
            self.run.pids.extend(self._pids[rank] for rank in (0, 1))

    def has_ended(self, rank: int) -> bool:
        return self.server.ask({"poll": self._pids[rank]}) is not None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_no_rank_leaves_before_the_first_has_spoken(server, tmp_path):
    """Launchers end all ranks as soon as one exits; the reason must have been printed by then."""
    pair = Pair(server, tmp_path)
    pair.start(1, "optim.lrr=1")
    time.sleep(3)
    assert not pair.has_ended(1)
    pair.start(0, "optim.lrr=1")
    expect_refusal(pair.run, ["unknown configuration key optim.lrr"])
