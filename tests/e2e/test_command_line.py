"""The real commands: ``python``, ``torchrun`` and ``deepspeed`` start the same training, a sweep makes a run each."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from moepp.checkpoint import list_checkpoints, verify
from tests.data_files import write_indexed, write_word_tokenizer

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
STEPS = 4
LIMIT_SECONDS = 240.0
SECRET = "do-not-write-me-anywhere-5187"
SETTINGS = [
    "model.hidden_size=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.vocab_size=64",
    "model.moe.num_ffn_experts=4",
    "model.moe.ffn_hidden_size=16",
    "model.init_std=0.2",
    "data.seq_len=16",
    "data.split='80,20,0'",
    f"train.steps={STEPS}",
    "train.global_batch_size=8",
    "train.log_interval=1",
    "train.eval_interval=2",
    "train.eval_batches=1",
    "train.samples=1",
    "train.precision=fp32",
    "optim.warmup_steps=0",
]
STEP_METRICS = {
    *("train/loss", "train/balance_loss", "train/grad_norm", "optim/lr"),
    *("throughput/tokens_per_second", "throughput/tokens_per_second_per_device"),
    "memory/host_peak_bytes",
    *("routing/ffn_per_token", "routing/drop_fraction", "comm/dispatch_bytes", "comm/dispatch_bytes_vanilla"),
    *(f"routing/layer_{i}/share_{kind}" for i in (0, 1) for kind in ("ffn", "constant", "copy", "zero")),
    *(f"routing/layer_{i}/max_over_mean" for i in (0, 1)),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings that name data of its own: 60 documents of 40 tokens."""
    folder = tmp_path_factory.mktemp("data")
    documents = [[(5 * i + j * j) % 62 for j in range(40)] for i in range(60)]
    write_indexed(folder / "text", documents[:30])
    write_indexed(folder / "code", documents[30:])
    write_word_tokenizer(folder / "tokenizer.json", num_words=62)
    return [f"data.paths=[{folder}/text,{folder}/code]", f"data.tokenizer={folder}/tokenizer.json"]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Start ``command`` in ``folder`` as a user would, without a terminal."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environ = inherited | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MY_API_TOKEN": SECRET,
    }
    return subprocess.run(
        command,
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        stdin=subprocess.DEVNULL,
    )


def train(launcher: list[str], folder: Path, *settings: str) -> tuple[list[dict[str, Any]], Path]:
    """A run that must succeed; its records and its directory, which is runs/tiny below ``folder``."""
    done = run([*launcher, str(ROOT / "train.py"), *SETTINGS, *settings], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    run_dir = folder / "runs" / "tiny"
    return read_records(run_dir), run_dir


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def check_run_directory(run_dir: Path, ranks: int) -> None:
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "routing.jsonl", "samples.json"):
        assert (run_dir / name).stat().st_size > 0, name
    assert (run_dir / "wandb").is_dir()
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == [f"step-{STEPS:08d}"]
    assert sorted(path.name for path in (run_dir / "log").iterdir()) == [f"rank-{rank}.txt" for rank in range(ranks)]
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["train"]["steps"] == STEPS and config["model"]["moe"]["num_ffn_experts"] == 4
    environment = json.loads((run_dir / "environment.json").read_text())
    assert "torch" in str(environment) and "cpu" in str(environment)
    for path in run_dir.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), f"{path} holds the process environment"


def check_records(records: list[dict[str, Any]]) -> None:
    steps = [record for record in records if "train/loss" in record]
    evaluations = [record for record in records if "eval/loss" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert [record["step"] for record in evaluations] == [2, 4]
    for record in records:
        assert record["tokens"] == record["step"] * 8 * 16
    for record in steps:
        assert record.keys() >= STEP_METRICS, STEP_METRICS - record.keys()
        assert "throughput/mfu" not in record  # the peak of this device is unknown
        for layer in (0, 1):
            shares = [record[f"routing/layer_{layer}/share_{kind}"] for kind in ("ffn", "constant", "copy", "zero")]
            assert sum(shares) == pytest.approx(1)


OF_SEVERAL_RANKS = ("comm/balance_bytes", "comm/layer_", "time/")  # where there is another rank alone
NUMBERS = {"train/loss", "train/grad_norm", "train/balance_loss", "eval/loss", "optim/lr", "routing/ffn_per_token"}


@pytest.fixture(scope="module")
def one_process(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    return train([sys.executable], tmp_path_factory.mktemp("one"), *data)


def test_python_trains_in_one_process_into_a_complete_run_directory(one_process):
    records, run_dir = one_process
    check_run_directory(run_dir, ranks=1)
    check_records(records)
    assert list((run_dir / "wandb").glob("offline-run-*/*.wandb")), "W&B is offline by default"
    media = {path.name.split("_")[0] for path in run_dir.glob("wandb/offline-run-*/files/media/*/*/*")}
    assert media >= {"experts", "ffn", "gates", "types", "positions", "frequencies", "losses", "kinds", "text"}
    rows = pq.read_table(run_dir / "tokens/kinds.parquet").to_pylist()
    assert [(row["source"], row["layer"]) for row in rows] == [("text", 0), ("text", 1), ("code", 0), ("code", 1)]
    assert all(sum(row[kind] for kind in ("ffn", "constant", "copy", "zero")) == pytest.approx(1) for row in rows)
    assert all(record["comm/dispatch_bytes"] == 0 for record in records if "train/loss" in record)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


LAUNCHERS = {
    "torchrun": lambda: [f"{BIN}/torchrun", "--standalone", "--nproc_per_node", "2"],
    "deepspeed": lambda: [
        *(f"{BIN}/deepspeed", "--num_gpus", "2", "--master_addr", "127.0.0.1"),
        *("--master_port", str(_free_port())),
    ],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launcher_trains_the_same_on_two_processes_with_expert_parallelism(one_process, data, tmp_path, launcher):
    wanted, _ = one_process
    settings = [*data, "parallel.expert=2", "logging.wandb.mode=disabled"]
    records, run_dir = train(LAUNCHERS[launcher](), tmp_path, *settings)
    check_run_directory(run_dir, ranks=2)
    check_records(records)
    assert all(record["comm/dispatch_bytes"] > 0 for record in records if "train/loss" in record)
    for record, one in zip(records, wanted, strict=True):
        kept, wanted_keys = ({k for k in line if not k.startswith(OF_SEVERAL_RANKS)} for line in (record, one))
        assert kept == wanted_keys and record["step"] == one["step"]
        for name in NUMBERS & record.keys():
            assert record[name] == pytest.approx(one[name], rel=1e-5), (record["step"], name)


# train.py as a terminal starts it; tests in the background of a shell have SIGINT ignored.
FOREGROUND = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
root = sys.argv.pop(1)
sys.path.insert(0, root)
runpy.run_path(f"{root}/train.py", run_name="__main__")
"""


def test_sweep_trains_every_job_that_can_be_trained(data, tmp_path):
    """With the default engine, which keeps state of its process group; one value is refused, the others train."""
    settings = [*SETTINGS, *data, "train.steps=1", "train.samples=0", "logging.wandb.mode=disabled"]
    done = run([sys.executable, str(ROOT / "train.py"), "-m", *settings, "model.moe.tau=0.25,-1,1.0"], tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: job 1 (model.moe.tau=-1): model.moe.tau=-1.0 ")
    assert "Traceback" not in done.stderr and "sweep: 2 of 3 jobs done" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny-0", "tiny-2"]
    runs = [tmp_path / "runs" / "tiny-0", tmp_path / "runs" / "tiny-2"]
    assert [yaml.safe_load((path / "config.yaml").read_text())["model"]["moe"]["tau"] for path in runs] == [0.25, 1.0]
    first, second = (read_records(path)[0] for path in runs)
    assert first["train/loss"] == second["train/loss"] and first["train/balance_loss"] != second["train/balance_loss"]


@pytest.mark.slow  # tests/unit/training/test_sweep_jobs.py has the delivery of signals, with stand-ins for training
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "interrupted; start the same command to continue from the newest checkpoint"),
        (signal.SIGTERM, 75, "stopped by SIGTERM after step "),
    ],
)
def test_signal_from_the_terminal_ends_the_run_at_work_and_the_sweep_goes_on_later(data, tmp_path, number, code, said):
    """Real training, in the foreground of a shell: the signal goes to the whole process group."""
    settings = [*SETTINGS, *data, "engine=native", "train.samples=0", "logging.wandb.mode=disabled"]
    settings += ["checkpoint.interval=1", "optim.schedule=constant", "optim.lr=1e-3,3e-3"]
    command = [sys.executable, "-c", FOREGROUND, str(ROOT), "-m", *settings]
    log = tmp_path / "log"
    process = subprocess.Popen(
        [*command, "train.steps=100000"], cwd=tmp_path, stdout=log.open("w"), stderr=subprocess.STDOUT, process_group=0
    )
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not list((tmp_path / "runs" / "tiny-0" / "checkpoints").glob("step-*")):
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()
            time.sleep(0.05)
        os.killpg(process.pid, number)
        assert process.wait(LIMIT_SECONDS) == code, log.read_text()
    finally:
        process.kill()
        process.wait()
    output = log.read_text()
    assert output.count(said) == 1 and "Traceback" not in output, output
    assert "sweep: 0 of 2 jobs done" in output and "not started" in output
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny-0"]
    checkpoints = list_checkpoints(tmp_path / "runs" / "tiny-0" / "checkpoints")
    assert checkpoints and verify(checkpoints[-1]) == []


# Something in the second step swallows every exception, as DCP does in a save and the interpreter in callbacks.
SWALLOWING = """
import os, signal
from moepp.training.trainer import Trainer
log = Trainer.log
def log_and_swallow(self, result):
    log(self, result)
    try:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        pass
Trainer.log = log_and_swallow
"""


@pytest.mark.slow
def test_ctrl_c_ends_training_even_where_a_library_swallows_it(data, tmp_path):
    settings = [*SETTINGS, *data, "engine=native", "train.samples=0", "logging.wandb.mode=disabled"]
    start, rest = FOREGROUND.split("runpy.run_path")
    done = run([sys.executable, "-c", f"{start}{SWALLOWING}runpy.run_path{rest}", str(ROOT), *settings], tmp_path)
    assert done.returncode == 130 and "interrupted" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert [record["step"] for record in read_records(tmp_path / "runs" / "tiny")][-1] == 2


def test_sweep_under_a_launcher_is_refused_once(data, tmp_path):
    done = run(
        [*LAUNCHERS["torchrun"](), str(ROOT / "train.py"), "-m", *SETTINGS, *data, "optim.lr=1e-3,3e-3"], tmp_path
    )
    assert done.returncode != 0 and not (tmp_path / "runs").exists()
    [message] = re.findall(r"error: -m .*", done.stdout + done.stderr)
    assert "2 processes" in message and "launch/slurm/sweep.sbatch" in message


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launcher_shows_bad_input_once_and_fails(data, tmp_path, launcher):
    done = run([*LAUNCHERS[launcher](), str(ROOT / "train.py"), *SETTINGS, *data, "parallel.expert=3"], tmp_path)
    assert done.returncode != 0
    # The launchers add reports of their own about the processes that failed; ours is one line, from one rank.
    [message] = re.findall(r"error: parallel\.expert.*", done.stdout + done.stderr)
    assert "parallel.expert=3 does not divide the 2 processes" in message
    assert "Traceback" not in (done.stdout + done.stderr).split(message)[0]
    assert not (tmp_path / "runs").exists()


def test_own_model_file_may_leave_keys_out(data, tmp_path):
    """A key that no file gives a value can be overridden, through train.py and `moepp train` alike."""
    (tmp_path / "mine" / "model").mkdir(parents=True)
    text = (ROOT / "configs" / "model" / "tiny.yaml").read_text().replace("  tau: 0.75\n", "")
    (tmp_path / "mine" / "model" / "mine.yaml").write_text(text)
    for program in ([sys.executable, str(ROOT / "train.py")], [sys.executable, "-m", "moepp.cli.main", "train"]):
        shown = ["--config-dir", "mine", "--cfg", "job", "model=mine", "model.moe.tau=0.5"]
        done = run([*program, *shown], tmp_path)
        assert done.returncode == 0, done.stderr
        assert yaml.safe_load(done.stdout)["model"]["moe"]["tau"] == 0.5
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-m --info config", "error: --info and --multirun exclude one another"),
        ("--resolve", "error: --resolve changes what --cfg and --help show"),
        ("--package run", "error: --package run chooses a part of what --cfg shows"),
        ("--cfg nothing", "error: argument --cfg/-c: invalid choice: 'nothing'"),
        ("--config-name nothing", "error: --config-name nothing does not exist"),
        ("-m --config-dir nothing", "error: --config-dir nothing is not a folder"),
        (
            "train.steps 100",
            "error: 'train.steps' cannot be read: it has no equals sign; write key=value, as train.steps=100",
        ),
        ("data.paths=[a=b]", "quote a text with commas, brackets, blanks or equals signs"),
        ("+model=tiny", "error: model is chosen already; write model=NAME without a plus"),
        ("-m model=tiny optim.lrr=1,2", "error: unknown configuration key optim.lrr; did you mean optim.lr?"),
    ],
)
def test_command_line_that_contradicts_itself_is_refused_in_one_line(server, arguments, message):
    process = server.start_alone(arguments.split())
    assert process.wait(limit_seconds=LIMIT_SECONDS) == [2], process.output(0)
    output = process.output(0)
    assert message in output and output.count("\n") == 1


def test_plain_command_shows_bad_input_in_one_line(tmp_path):
    done = run([sys.executable, str(ROOT / "train.py"), "optim.lr=fast"], tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: optim.lr='fast' has the wrong type str; give a number\n"


TWICE = """
import sys, yaml
from moepp.config import from_dict
from moepp.training.run import run_training
for config in sys.argv[1:]:
    with open(config) as f:
        run_training(from_dict(yaml.safe_load(f)))
"""


@pytest.mark.slow
def test_two_runs_in_one_process_do_not_disturb_each_other(data, tmp_path):
    """As a launcher plugin or a notebook starts them: DeepSpeed must not keep the first run's process groups."""
    settings = [*SETTINGS, *data, "logging.wandb.mode=disabled"]
    shown = run([sys.executable, str(ROOT / "train.py"), "--cfg", "job", "--resolve", *settings], tmp_path)
    config = yaml.safe_load(shown.stdout)
    for name in ("a", "b"):
        config["run"]["name"] = name
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    done = run([sys.executable, "-c", TWICE, "a.yaml", "b.yaml"], tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (read_records(tmp_path / "runs" / name) for name in ("a", "b"))
    assert [r["train/loss"] for r in first if "train/loss" in r] == [
        r["train/loss"] for r in second if "train/loss" in r
    ]
