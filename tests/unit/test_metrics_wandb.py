"""W&B offline: what is in its file afterwards; online: refused without a key, before anything starts."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moepp.config.schema import LoggingConfig, WandbConfig
from moepp.errors import ConfigError
from moepp.metrics import open_sinks, require_wandb_login
from moepp.metrics.jsonl import read_records
from moepp.metrics.wandb import WandbSink

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
    cfg = WandbConfig(mode="offline", project="some-project")
    record = {"train/loss": 4.5, "routing/layer_0/share_ffn": 0.625}

    sink = WandbSink(run_dir, cfg, "first-name", config, is_resumed=False)
    sink.log(record, 10, 5120)
    sink.log({"eval/loss": 4.25}, 10, 5120)
    sink.close()
    (file,) = offline_files(run_dir)
    records = wandb_records(file)
    assert history(records) == [
        {"step": 10, "tokens": 5120, "train/loss": 4.5, "routing/layer_0/share_ffn": 0.625},
        {"step": 10, "tokens": 5120, "eval/loss": 4.25},
    ]
    run = next(r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name) == ("some-project", "first-name")
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

    def log(self, record: dict) -> None:
        if len(self.logged) == 1:
            raise RuntimeError("service died")
        self.logged.append(record)

    def finish(self) -> None: ...


def test_failing_wandb_is_reported_once_and_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, ended = FakeRun(), []
    fake = SimpleNamespace(init=lambda **_: run, Settings=dict, teardown=lambda: ended.append(True))
    monkeypatch.setitem(sys.modules, "wandb", fake)
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
