"""Real ``train.py`` processes that start in a fraction of a second: forked from a server that has imported everything.

    run = server.start(run_dir, ranks=2, overrides=[...])    # server: fixture of tests/e2e, a TrainServer
    run.kill(1, signal.SIGKILL)                              # one rank, by number
    codes = run.wait()                                       # exit code of each rank; -9 for SIGKILL, as in subprocess

Each rank runs ``train.py`` as ``__main__`` with the environment that torchrun would give it, its output in
``run.output(rank)``. No launcher watches over the ranks, so what a rank does when another dies is its own doing.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.data_files import write_indexed
from tests.faults import inject

ROOT = Path(__file__).resolve().parents[1]
START_LIMIT_SECONDS = 120.0
RUN_LIMIT_SECONDS = 120.0  # a run of seconds, on a machine that is busy with other things
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

# A model and a batch as small as they can be while every part of a MoE++ layer is in use.
TINY = (
    "data.tokenizer=null",
    "data.seq_len=16",
    "data.split='90,10,0'",
    "model.vocab_size=64",
    "model.hidden_size=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.moe.num_ffn_experts=4",
    "model.moe.ffn_hidden_size=16",
    "train.global_batch_size=8",
    "train.log_interval=1",
    "train.eval_interval=0",
    "train.eval_batches=1",
    "train.samples=0",
    "train.precision=fp32",
    "optim.warmup_steps=0",
    "optim.lr=1e-2",
    "logging.wandb.mode=disabled",
    "logging.progress=false",
)


SEQUENCES_PER_EPOCH = 60  # about: 7.5 steps of 8 sequences

# What a run imports, sooner or later: once in the server, not in each of its children. Not what starts a thread, as
# pyarrow does.
PRELOADED = (
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "hydra._internal.core_plugins.basic_sweeper",
    "hydra._internal.hydra",
    "hydra.core.override_parser.overrides_parser",
    "moepp.analysis.token_tables",
    "moepp.cli.train",
    "moepp.data.megatron",
    "moepp.engine.deepspeed",
    "moepp.engine.fsdp",
    "moepp.engine.native",
    "moepp.training.main",
    "moepp.training.pipeline",
    "moepp.training.run",
    "moepp.training.token_tables",
    "torch._dynamo",
)


def write_corpus(prefix: Path, seed: int = 0) -> str:
    """Text without meaning for :data:`TINY`; returns the override that names it."""
    draw = random.Random(seed)
    documents = [[draw.randrange(64) for _ in range(draw.randrange(20, 60))] for _ in range(27)]
    return f"data.paths=[{write_indexed(prefix, documents)}]"


def records(run_dir: Path, after: int = 0) -> list[dict[str, Any]]:
    """metrics.jsonl of a run from the step after ``after``, without times and memory, which no two runs share."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith(("throughput/", "time/", "memory/"))}
        for line in lines
        if line["step"] > after
    ]


def without_skips(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Training records without what only counts the steps and batches that a rewind left out."""
    counts = ("train/skipped_steps", "data/sequences", "data/epoch")
    return [{key: value for key, value in line.items() if key not in counts} for line in found if "train/loss" in line]


def checkpoint_names(run_dir: Path) -> list[str]:
    """Everything in checkpoints/, whole or not."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@dataclass
class TrainRun:
    """The processes of one start of a run, by rank."""

    server: TrainServer
    run_dir: Path
    logs: list[Path]
    pids: list[int] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)

    def kill(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank; a rank that has ended already is left alone."""
        if rank not in self.poll():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def poll(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (code := self.server.ask({"poll": pid})) is not None:
                self.codes[rank] = code
        return self.codes

    def wait(self, ranks: Sequence[int] | None = None, limit_seconds: float = RUN_LIMIT_SECONDS) -> list[int]:
        """Exit codes of ``ranks`` (all), by rank.

        Raises:
            TimeoutError: a rank is still running; everything is killed and the message has the ends of the outputs.
        """
        wanted = list(range(len(self.pids)) if ranks is None else ranks)
        deadline = time.monotonic() + limit_seconds
        while not set(wanted) <= self.poll().keys():
            if time.monotonic() > deadline:
                missing = [rank for rank in wanted if rank not in self.codes]
                outputs = "\n".join(f"--- rank {r}:\n{self.output(r)[-3000:]}" for r in range(len(self.pids)))
                self.end()
                raise TimeoutError(f"ranks {missing} still ran after {limit_seconds} s\n{outputs}")
            time.sleep(0.02)
        return [self.codes[rank] for rank in wanted]

    def end(self) -> None:
        """Kill whatever still runs."""
        for rank in range(len(self.pids)):
            self.kill(rank, signal.SIGKILL)
        while len(self.poll()) < len(self.pids):
            time.sleep(0.02)

    def output(self, rank: int) -> str:
        """Standard output and error of one rank."""
        return self.logs[rank].read_text(errors="replace") if self.logs[rank].exists() else ""

    def wait_for(self, text: str, limit_seconds: float = RUN_LIMIT_SECONDS, rank: int = 0) -> None:
        """Until ``text`` is in the output of a rank, or the rank ends without."""
        deadline = time.monotonic() + limit_seconds
        while text not in self.output(rank):
            if time.monotonic() > deadline or rank in self.poll():
                output = self.output(rank)
                self.end()
                raise TimeoutError(f"rank {rank} never wrote {text!r}:\n{output[-3000:]}")
            time.sleep(0.01)


class TrainServer:
    """Starts runs; ends what is left of them when it is closed."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="moepp-train-"))
        self._runs: list[TrainRun] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.train_processes"],
            cwd=ROOT,
            env=os.environ | THREADS | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read(START_LIMIT_SECONDS) == "ready"

    def start(
        self,
        run_dir: Path,
        ranks: int,
        overrides: Sequence[str] = (),
        faults: Sequence[Sequence[Any]] = (),
        differing: Mapping[int, Sequence[str]] | None = None,
    ) -> TrainRun:
        """Start ``train.py`` on ``ranks`` processes with :data:`TINY` and ``overrides``.

        ``faults`` are calls of :func:`tests.faults.inject`: (name, rank, arguments...); ``differing`` are overrides of
        some ranks alone, which come last.
        """
        port = _free_port()
        number = len(self._runs)
        logs = [self._folder / f"start-{number}-rank-{rank}.txt" for rank in range(ranks)]
        run = TrainRun(self, run_dir, logs)
        self._runs.append(run)
        given = {override.partition("=")[0] for override in overrides}
        defaults = [override for override in TINY if override.partition("=")[0] not in given]
        for rank in range(ranks):
            variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            request = {
                "argv": ["train.py", f"run.dir={run_dir}", *defaults, *overrides, *(differing or {}).get(rank, ())],
                "environ": variables,
                "log": str(logs[rank]),
                "faults": [list(fault) for fault in faults],
            }
            run.pids.append(self.ask(request))
        return run

    def start_alone(self, arguments: Sequence[str]) -> TrainRun:
        """Start ``train.py`` in one process with ``arguments`` and nothing else."""
        log = self._folder / f"start-{len(self._runs)}-alone.txt"
        run = TrainRun(self, self._folder, [log])
        self._runs.append(run)
        run.pids.append(self.ask({"argv": ["train.py", *arguments], "environ": {}, "log": str(log), "faults": []}))
        return run

    def train(
        self,
        run_dir: Path,
        ranks: int,
        overrides: Sequence[str] = (),
        faults: Sequence[Sequence[Any]] = (),
        exit_codes: Sequence[int] | None = None,
    ) -> TrainRun:
        """A run to its end, which must be ``exit_codes`` (all 0)."""
        run = self.start(run_dir, ranks, overrides, faults)
        codes = run.wait()
        outputs = "\n".join(f"--- rank {rank}:\n{run.output(rank)[-3000:]}" for rank in range(ranks))
        assert codes == list(exit_codes or [0] * ranks), f"exit codes {codes}\n{outputs}"
        return run

    def ask(self, request: dict[str, Any]) -> Any:
        """One request to the server process, one answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read(RUN_LIMIT_SECONDS)

    def close(self) -> None:
        """End all processes."""
        for run in self._runs:
            run.end()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(120)

    def __enter__(self) -> TrainServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _read(self, limit_seconds: float) -> Any:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], limit_seconds)[0]:
            self._process.kill()
            raise TimeoutError("the server that forks training processes does not answer")
        return json.loads(self._process.stdout.readline())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve() -> None:
    """Fork a child per request; the only thread, so that forking is safe."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the imports print is not an answer
    for module in PRELOADED:
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a module of PRELOADED has started threads: {threads}"
    ended: dict[int, int] = {}
    _reply(answers, "ready")
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            _reply(answers, _exit_code(request["poll"], ended))
            continue
        pid = os.fork()
        if pid == 0:
            _become_rank(request)
        _reply(answers, pid)


def _reply(stream: Any, answer: Any) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


def _exit_code(pid: int, ended: dict[int, int]) -> int | None:
    if pid not in ended:
        found, status = os.waitpid(pid, os.WNOHANG)
        if not found:
            return None
        ended[pid] = os.waitstatus_to_exitcode(status)
    return ended[pid]


def _become_rank(request: dict[str, Any]) -> None:
    code = 1
    try:
        descriptor = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(request["environ"])
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
        for fault in request["faults"]:
            inject(*fault)
        sys.argv = request["argv"]
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
