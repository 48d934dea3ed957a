"""W&B offline: what is in its file afterwards; online: refused without a key, before anything starts."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moepp.config.schema import LoggingConfig, WandbConfig
from moepp.errors import ConfigError
from moepp.metrics import SinkGroup, open_sinks, require_wandb_login, require_wandb_settings
from moepp.metrics.jsonl import read_records
from moepp.metrics.wandb import WandbSink, why_not_own

ROOT = Path(__file__).resolve().parents[3]
BLOCK_BYTES, HEADER_BYTES = 32768, 7


def wandb_records(path: Path) -> list[Any]:
    """The records of a W&B file: a 7-byte file header, then LevelDB log framing around protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    Record: Any = vars(wandb_internal_pb2)["Record"]  # made at import: type checkers do not see it

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    records, message, position = [], b"", HEADER_BYTES
    while position + HEADER_BYTES <= len(data):
        left_in_block = BLOCK_BYTES - position % BLOCK_BYTES
        if left_in_block < HEADER_BYTES:
            position += left_in_block
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        message += data[position + HEADER_BYTES : position + HEADER_BYTES + length]
        position += HEADER_BYTES + length
        if kind in (1, 4):  # full, last
            records.append(Record.FromString(message))
            message = b""
    return records


def history(records: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def own_steps(records: list[Any]) -> list[int]:
    """W&B's own step of each row."""
    return [record.history.step.num for record in records if record.WhichOneof("record_type") == "history"]


def offline_files(run_dir: Path) -> list[Path]:
    return sorted(p for p in run_dir.glob("wandb/offline-run-*/run-*.wandb") if not p.parent.is_symlink())


@pytest.fixture
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without W&B credentials."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    return home


def test_offline_run_holds_config_axis_and_records_and_a_resumed_part_has_the_same_id(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config = {"model": {"hidden_size": 64}, "run": {"seed": 7}}
    cfg = WandbConfig("offline", "some-project", entity="a-team", group="seeds", tags=("one", "two"), notes="a remark")
    record = {"train/loss": 4.5, "routing/layer_0/share_ffn": 0.625}

    sink = WandbSink(run_dir, cfg, "first-name", config, is_resumed=False)
    sink.log(record, 10, 5120)
    sink.log({"eval/loss": 4.25}, 10, 5120)
    sink.log({"train/loss": 4.125}, 15, 7680)
    sink.close()
    (file,) = offline_files(run_dir)
    records = wandb_records(file)
    assert history(records) == [
        {"step": 10, "tokens": 5120, "train/loss": 4.5, "routing/layer_0/share_ffn": 0.625, "eval/loss": 4.25},
        {"step": 15, "tokens": 7680, "train/loss": 4.125},
    ]
    assert own_steps(records) == [10, 15]
    run = next(r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name) == ("some-project", "first-name")
    assert (run.entity, run.run_group, list(run.tags), run.notes) == ("a-team", "seeds", ["one", "two"], "a remark")
    stored = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert stored["model"] == {"hidden_size": 64}
    metrics = [r.metric for r in records if r.WhichOneof("record_type") == "metric"]
    assert any(metric.glob_name == "*" and metric.step_metric == "tokens" for metric in metrics)

    resumed = WandbSink(run_dir, cfg, "first-name", config, is_resumed=True)
    resumed.log({"train/loss": 4.0}, 20, 10240)
    resumed.close()
    (other,) = set(offline_files(run_dir)) - {file}
    records = wandb_records(other)
    assert next(r.run.run_id for r in records if r.WhichOneof("record_type") == "run") == run.run_id
    assert history(records) == [{"step": 20, "tokens": 10240, "train/loss": 4.0}]
    assert own_steps(records) == [20]  # disjoint from the first part's


def test_copied_run_keeps_its_id_and_belongs_to_its_new_place_once_it_is_trained_there(tmp_path: Path) -> None:
    cfg = WandbConfig(mode="offline", project="some-project")
    run_dir, copy = tmp_path / "run", tmp_path / "copy"
    run_dir.mkdir()
    WandbSink(run_dir, cfg, "name", {}, is_resumed=False).close()
    assert why_not_own(run_dir) is None
    shutil.copytree(run_dir, copy)
    assert why_not_own(copy) == "it was trained in another place"
    first, _ = (run_dir / "wandb/run-id").read_text().splitlines()
    sink = WandbSink(copy, cfg, "name", {}, is_resumed=True)
    sink.close()
    assert sink.run_id == first and why_not_own(copy) is None and why_not_own(run_dir) is None


def fake_config(mode: str) -> Any:
    logging = LoggingConfig(wandb=WandbConfig(mode=mode))
    return SimpleNamespace(logging=logging, run=SimpleNamespace(name="n"), train=SimpleNamespace(steps=5))


def test_disabled_never_imports_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with open_sinks(tmp_path, fake_config("disabled"), start_step=0) as sinks:
        sinks.log({"train/loss": 1.5}, 1, 64)
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 1, "tokens": 64, "train/loss": 1.5}]
    assert not (tmp_path / "wandb").exists()


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict] = []

    def define_metric(self, *_: object, **__: object) -> None: ...

    def log(self, record: dict, step: int | None) -> None:
        if len(self.logged) == 1:
            raise RuntimeError("service died")
        self.logged.append(record)

    def finish(self) -> None: ...


def test_failing_wandb_is_reported_once_and_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, ended = FakeRun(), []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run, lambda: ended.append(True)))
    sink = WandbSink(tmp_path, WandbConfig(), "n", {}, is_resumed=False)
    for step in (1, 2, 3):
        sink.log({"a": 1.0}, step, step)
    sink.close()
    assert [row["step"] for row in run.logged] == [1]
    assert ended == [True]  # without teardown, the file may still be incomplete
    assert len(caplog.messages) == 1 and "step 2" in caplog.messages[0] and "service died" in caplog.messages[0]


@pytest.mark.usefixtures("no_login")
def test_online_without_a_key_is_refused_without_importing_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"logging\.wandb\.mode=online needs .* key .*; run `wandb login`") as caught:
        require_wandb_login("online")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        WandbSink(tmp_path, replace(WandbConfig(), mode="online"), "n", {}, is_resumed=False)
    require_wandb_login("offline")
    require_wandb_login("disabled")


@pytest.mark.parametrize(
    ("name", "value"), [("WANDB_MODE", "bogus"), ("WANDB_INIT_TIMEOUT", "soon"), ("WANDB_X_FILE_STREAM_RETRY_MAX", "x")]
)
def test_variables_that_wandb_refuses_are_said_before_training(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}={value} in the environment .*; correct or unset it") as caught:
        require_wandb_settings("offline")
    assert "\n" not in str(caught.value)
    require_wandb_settings("disabled")


@pytest.mark.parametrize("value", ["online", "offline", "disabled", "dryrun"])
def test_variables_that_wandb_takes_pass(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WANDB_MODE", value)
    require_wandb_settings("offline")


def test_online_with_a_key_in_the_environment_passes(no_login: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    require_wandb_login("online")


def test_online_with_a_netrc_entry_passes_for_that_server_only(no_login: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = no_login / ".netrc"
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {'0' * 40}\n")
    netrc.chmod(0o600)
    require_wandb_login("online")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    with pytest.raises(ConfigError, match=r"wandb\.example\.org"):
        require_wandb_login("online")


def test_online_with_a_key_in_the_settings_file_passes(no_login: Path) -> None:
    settings = no_login / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://wandb.example.org\n")
    with pytest.raises(ConfigError, match=r"wandb\.example\.org"):
        require_wandb_login("online")
    settings.write_text(f"[default]\napi_key = {'0' * 40}\n")
    require_wandb_login("online")


def test_own_step_increases_after_a_rewind_and_is_left_to_wandb_in_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int | None] = []
    run = FakeRun()
    run.log = lambda record, step: seen.append(step)  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run))
    sink = WandbSink(tmp_path, WandbConfig(), "n", {}, is_resumed=False)
    group = SinkGroup([sink])
    for step in (10, 11, 12):
        group.log({"a": 1.0}, step, step)
    group.rewind(10, offset=2)  # steps 11 and 12 are computed again, on other batches
    group.log({"a": 1.0}, 11, 11)
    sink.step_offset = None
    group.log({"a": 1.0}, 5, 5)
    group.close()
    assert seen == [10, 11, 12, 13, None]


def fake_wandb(run: Any, teardown: Callable[[], None] = lambda: None, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(init=lambda **_: run, Settings=dict, teardown=teardown, **more)


@pytest.mark.parametrize("failing", ["finish", "teardown", "both"])
def test_failure_at_the_end_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    ended: list[str] = []

    def end(name: str) -> Callable[[], None]:
        def call() -> None:
            ended.append(name)
            if failing in (name, "both"):
                raise ConnectionResetError("Connection lost")

        return call

    run = FakeRun()
    run.finish = end("finish")  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run, end("teardown")))
    with SinkGroup([WandbSink(tmp_path, WandbConfig(), "n", {}, is_resumed=False)]):
        pass
    assert ended == ["finish", "teardown"]  # the second takes back what would run at exit
    (message,) = caplog.messages
    assert "W&B failed to finish: ConnectionResetError: Connection lost" in message


@pytest.mark.parametrize("hanging", ["log", "finish"])
def test_service_that_hangs_is_killed_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hanging: str
) -> None:
    killed, entered = threading.Event(), threading.Event()

    def hang(*_: object, **__: object) -> None:
        entered.set()
        assert killed.wait(120)
        raise ConnectionResetError("Connection lost")

    run = FakeRun()
    setattr(run, hanging, hang)
    process = SimpleNamespace(kill=killed.set)
    setup = SimpleNamespace(_connection=SimpleNamespace(_proc=SimpleNamespace(_process=process)))
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(run, setup=lambda: setup))
    monkeypatch.setattr("moepp.metrics.wandb._FINISH_SECONDS", {"offline": 0.2})
    monkeypatch.setattr("moepp.metrics.wandb._MAX_WAITING", 3)
    sink = WandbSink(tmp_path, WandbConfig(), "n", {}, is_resumed=False)
    sink.log({"a": 1.0}, 1, 1)
    if hanging == "log":
        assert entered.wait(120)
        for step in range(2, 10):
            sink.log({"a": 1.0}, step, step)  # never waits
    sink.close()
    assert killed.is_set() and not sink._thread.is_alive()
    (message,) = caplog.messages
    assert "does not take records" in message if hanging == "log" else "to finish within 0.2 s" in message


PROGRAM = """
import json, os, sys, time
from pathlib import Path
import moepp.metrics.wandb as ours
from moepp.config.schema import WandbConfig

def start(name, git=False):
    sink = ours.WandbSink(Path(sys.argv[1], name), WandbConfig(git=git), "n", {}, is_resumed=False)
    sink.log({"a": 1.0}, 1, 1)
    return sink

start("default").close()
start("asked", git=True).close()
ours._FINISH_SECONDS["offline"] = 3.0
for number in (9, 19):
    print("signal", number, file=sys.stderr, flush=True)
    sink = start(f"signal-{number}")
    service = sink._wandb.setup()._connection._proc._process
    os.kill(service.pid, number)
    if number == 9:
        service.wait(120)
    for step in range(2, 50):
        sink.log({"a": 1.0}, step, step)
    sink.close()
    assert service.wait(120) == -9
print("closed", flush=True)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, subprocess.CompletedProcess[str]]:
    """A process in a checkout full of secrets that starts W&B four times; its folder, commit and output."""
    folder = tmp_path_factory.mktemp("wandb")
    path = folder / "hidden-checkout"
    path.mkdir()
    git = ["git", "-C", str(path), "-c", "user.name=n", "-c", "user.email=hidden-user@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "remote", "add", "origin", "https://joe:hidden-token@hidden-host.example/x.git"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    (path / "program.py").write_text(PROGRAM)
    for name in ("default", "asked", "signal-9", "signal-19"):
        (folder / name).mkdir()
    environ = os.environ | {"PYTHONPATH": str(ROOT), "SERVICE_TOKEN": "hidden-variable"}
    command = [sys.executable, str(path / "program.py"), str(folder), "hidden-argument"]
    return folder, head, subprocess.run(command, cwd=path, env=environ, timeout=250, capture_output=True, text=True)


def told_of_this_machine(run_dir: Path, head: str) -> dict[str, bool]:
    """Which of the secrets are in a W&B file."""
    (file,) = offline_files(run_dir)
    content = file.read_bytes()
    secrets = {
        "remote": "hidden-host.example",
        "token": "hidden-token",
        "commit": head,
        "path": "hidden-checkout",
        "interpreter": sys.executable,
        "argument": "hidden-argument",
        "host": f"host: {socket.gethostname()}",
        "email": "hidden-user",
        "environment": "hidden-variable",
    }
    text = str(wandb_records(file)).replace('"', "").encode() + content
    return {name: secret.encode() in text for name, secret in secrets.items()}


def test_wandb_file_tells_nothing_of_the_machine_unless_asked(checkout: Any) -> None:
    folder, head, _ = checkout
    assert not any(told_of_this_machine(folder / "default", head).values())


def test_wandb_file_names_remote_command_line_and_host_when_asked_but_never_secrets(checkout: Any) -> None:
    folder, head, _ = checkout
    told = told_of_this_machine(folder / "asked", head)
    assert all(told[name] for name in ("remote", "commit", "argument", "path", "interpreter", "host"))
    assert not any(told[name] for name in ("token", "environment", "email"))


def test_real_service_that_dies_or_stops_does_not_hold_up_the_end(checkout: Any) -> None:
    """The way of ending a service that hangs is no public one of wandb's: this finds out when it has changed."""
    *_, done = checkout
    assert done.returncode == 0 and "closed" in done.stdout, done.stderr
    killed, stopped = done.stderr.split("signal 9\n")[1].split("signal 19\n")
    assert "W&B failed at step" in killed and "W&B failed to finish within 3 s" in stopped
    for said in (killed, stopped):
        assert said.count("W&B failed") == 1 and "Traceback" not in said
