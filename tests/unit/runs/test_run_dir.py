"""Who gets a run directory, what it holds, and what is refused."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from moepp.errors import RunError
from moepp.io import files
from moepp.runs.directory import RunClaim, RunDir, check_run_dir
from moepp.runs.environment import describe_environment
from moepp.runs.lock import RunLock

CONFIG: dict[str, Any] = {
    "run": {"name": "a", "dir": None, "seed": 1234, "resume": "auto"},
    "model": {
        "hidden_size": 64,
        "norm_eps": 1e-6,
        "moe": {"top_k": 2, "tau": 0.75, "capacity_factor": None, "balance_rule": "heterogeneous"},
    },
    "data": {"paths": ["data/demo/text"], "weights": None, "split": "96,3,1", "cache_dir": None},
    "optim": {"name": "adamw", "lr": 5e-4, "betas": (0.9, 0.95), "eps": 1e-8},
    "parallel": {"expert": 1},
    "engine": {"name": "deepspeed"},
    "train": {"steps": 100, "global_batch_size": 8, "log_interval": 10},
    "logging": {"progress": True},
}
ENVIRONMENT = {"python": "3.11.2", "device": "cpu", "world_size": 2}


def changed(**values: Any) -> dict[str, Any]:
    """CONFIG with dotted keys (written with two underscores) changed."""
    config = copy.deepcopy(CONFIG)
    for key, value in values.items():
        *sections, name = key.split("__")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    return config


def claim(path: Path, config: dict[str, Any] = CONFIG, resume: str = "auto") -> RunClaim:
    return RunDir.claim(path, config, ENVIRONMENT, resume)


def finished_run(path: Path, checkpoint: bool = True) -> RunDir:
    """A run that logged a record and, if asked, left a checkpoint."""
    with claim(path) as held:
        held.run_dir.metrics_file.write_text('{"step": 10, "tokens": 100}\n')
        if checkpoint:
            (held.run_dir.checkpoints / "step-00000010").mkdir()
    return held.run_dir


def refusal(path: Path, config: dict[str, Any] = CONFIG, resume: str = "auto") -> str:
    with pytest.raises(RunError) as caught:
        claim(path, config, resume)
    message = str(caught.value)
    assert all(
        line.startswith("  ") and "->" in line for line in message.splitlines()[1:]
    )  # one line, then differences
    return message


def test_new_run_gets_every_part_of_the_layout(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a"
    with claim(path) as held:
        assert not held.has_checkpoints
        assert yaml.safe_load((path / "config.yaml").read_text()) == json.loads(json.dumps(CONFIG))
        assert json.loads((path / "environment.json").read_text()) == ENVIRONMENT
        assert (path / "metrics.jsonl").read_text() == ""
        assert all((path / folder).is_dir() for folder in ("checkpoints", "wandb", "log"))


def test_relative_path_stays_valid_after_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with claim(Path("runs/a")) as held:
        monkeypatch.chdir("/")
        assert held.run_dir.config_file == tmp_path / "runs" / "a" / "config.yaml"
        assert held.run_dir.config_file.exists()


HOLD = """
import sys, time
from moepp.runs.directory import RunDir
claim = RunDir.claim(sys.argv[1], {"run": {}}, {})
if sys.argv[2] == "fork":
    import os
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
else:
    print("held", flush=True)
time.sleep(60)
"""


def start_holder(path: Path, how: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_directory_of_a_running_process_is_refused_and_free_once_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    process, _ = start_holder(path, "plain")
    try:
        message = refusal(path, {"run": {}})
        assert f"in use by process {process.pid} on {os.uname().nodename}" in message
    finally:
        process.kill()
        process.wait()
    claim(path, {"run": {}}).release()


def test_forked_child_that_outlives_a_killed_run_does_not_keep_the_directory(tmp_path: Path) -> None:
    path = tmp_path / "a"
    process, child = start_holder(path, "fork")
    try:
        assert "in use" in refusal(path, {"run": {}})
        process.kill()
        process.wait()
        os.kill(int(child), 0)  # still there
        RunDir.claim(path, {"run": {}}, ENVIRONMENT, wait_seconds=20.0).release()  # once the child has got to run
    finally:
        process.kill()
        os.kill(int(child), signal.SIGKILL)


def test_claim_waits_for_a_process_that_is_about_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a"
    process, _ = start_holder(path, "plain")
    timer = threading.Timer(0.5, process.kill)
    try:
        timer.start()
        RunDir.claim(path, {"run": {}}, ENVIRONMENT, "auto", wait_seconds=20.0).release()
        assert f"in use by process {process.pid}" in (said := capsys.readouterr().err) and "waiting 20 s" in said
    finally:
        timer.cancel()
        process.kill()
        process.wait()


def test_claim_waits_no_longer_than_told(tmp_path: Path) -> None:
    held, start = claim(tmp_path / "a"), time.monotonic()
    with pytest.raises(RunError, match="in use"):
        RunDir.claim(tmp_path / "a", CONFIG, ENVIRONMENT, "auto", wait_seconds=0.5)
    assert 0.5 <= time.monotonic() - start < 30
    held.release()


def test_second_claim_in_one_process_is_refused_until_release(tmp_path: Path) -> None:
    held = claim(tmp_path / "a")
    assert "in use" in refusal(tmp_path / "a")
    held.release()
    held.release()
    claim(tmp_path / "a").release()


def test_refused_claim_frees_the_lock(tmp_path: Path) -> None:
    finished_run(tmp_path / "a")
    refusal(tmp_path / "a", resume="never")
    claim(tmp_path / "a").release()


def test_never_refuses_a_directory_with_a_run(tmp_path: Path) -> None:
    finished_run(tmp_path / "a")
    assert "already holds a run and run.resume=never" in refusal(tmp_path / "a", resume="never")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints"])
def test_each_trace_of_a_run_is_enough_to_refuse(tmp_path: Path, name: str) -> None:
    if name == "checkpoints":
        (tmp_path / name / "step-00000001").mkdir(parents=True)
    else:
        (tmp_path / name).write_text('{"step": 1, "tokens": 2}\n')
    assert "already holds a run" in refusal(tmp_path, resume="never")
    refusal(tmp_path, resume="auto")


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"model__hidden_size": 128}, "model.hidden_size: 64 -> 128"),
        ({"model__moe__tau": 0.5}, "model.moe.tau: 0.75 -> 0.5"),
        ({"model__moe__capacity_factor": 1.1}, "model.moe.capacity_factor: None -> 1.1"),
        ({"data__paths": ["x", "y"]}, "data.paths: ['data/demo/text'] -> ['x', 'y']"),
        ({"data__added": 1}, "data.added: absent -> 1"),
        ({"run__seed": 1}, "run.seed: 1234 -> 1"),
        ({"optim__name": "sgd"}, "optim.name: adamw -> sgd"),
        ({"train__global_batch_size": 16}, "train.global_batch_size: 8 -> 16"),
    ],
)
def test_auto_refuses_a_run_that_differs_in_what_it_trains(tmp_path: Path, change: dict[str, Any], shown: str) -> None:
    run_dir = finished_run(tmp_path / "a")
    before = run_dir.config_file.read_bytes(), run_dir.metrics_file.read_bytes()
    message = refusal(tmp_path / "a", changed(**change))
    assert "already holds another run" in message and shown in message and "run.name" in message
    assert (run_dir.config_file.read_bytes(), run_dir.metrics_file.read_bytes()) == before


def test_every_difference_has_a_line(tmp_path: Path) -> None:
    finished_run(tmp_path / "a")
    config = changed()
    config["model"] = {f"key_{i}": i for i in range(20)}
    message = refusal(tmp_path / "a", config)
    lines = message.split("\n  ")[1:]
    assert lines[:20] == [f"model.key_{i}: absent -> {i}" for i in range(20)]
    assert sorted(lines[20:]) == ["model.hidden_size: 64 -> absent", "model.moe.capacity_factor: None -> 1.1"]


def test_auto_continues_with_changed_length_and_layout_and_keeps_the_old_config(tmp_path: Path) -> None:
    run_dir = finished_run(tmp_path / "a")
    old = run_dir.config_file.read_bytes()
    config = changed(
        optim__lr=1e-3, train__steps=200, parallel__expert=2, engine__name="native", logging__progress=False,
        train__log_interval=5, data__cache_dir="elsewhere", run__name="b",
    )  # fmt: skip
    with claim(tmp_path / "a", config) as held:
        assert held.has_checkpoints
    assert yaml.safe_load(run_dir.config_file.read_text())["train"]["steps"] == 200
    assert (run_dir.path / "config.1.yaml").read_bytes() == old
    assert run_dir.metrics_file.read_text() == '{"step": 10, "tokens": 100}\n'
    claim(tmp_path / "a", changed(train__steps=300)).release()
    assert yaml.safe_load((run_dir.path / "config.2.yaml").read_text())["train"]["steps"] == 200


def test_a_start_opens_no_file_that_its_owner_has_closed(tmp_path: Path) -> None:
    run_dir = finished_run(tmp_path / "a", checkpoint=False)
    (run_dir.path / "routing.jsonl").write_text('{"step": 10, "tokens": 100}\n')
    private = ("config.yaml", "environment.json", "metrics.jsonl", "routing.jsonl")
    for name in private:
        (run_dir.path / name).chmod(0o600)
    with claim(run_dir.path, changed(train__steps=200)) as held:
        run_dir.config_file.unlink()
        held.check()
    names = [path for path in run_dir.path.iterdir() if path.name.split(".")[0] in ("config", "environment", "metrics")]
    names += run_dir.path.glob("routing*")
    assert {"config.1.yaml", "metrics.jsonl.1", "routing.jsonl.1", *private} <= {path.name for path in names}
    assert {path.name for path in names if path.stat().st_mode & 0o077} == set()


def test_same_config_keeps_no_copies(tmp_path: Path) -> None:
    finished_run(tmp_path / "a")
    claim(tmp_path / "a").release()
    assert not list((tmp_path / "a").glob("*.1.*"))


def test_without_checkpoints_auto_starts_over_and_keeps_the_old_metrics(tmp_path: Path) -> None:
    run_dir = finished_run(tmp_path / "a", checkpoint=False)
    (run_dir.checkpoints / "step-00000010.tmp").mkdir()  # an unfinished save is no checkpoint
    for number in (1, 2):
        with claim(tmp_path / "a") as held:
            assert not held.has_checkpoints
            assert (tmp_path / "a" / f"metrics.jsonl.{number}").read_text() == '{"step": 10, "tokens": 100}\n'
            assert run_dir.metrics_file.read_text() == ""
            run_dir.metrics_file.write_text('{"step": 10, "tokens": 100}\n')


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_start_that_failed_before_its_first_record_can_be_taken_over(tmp_path: Path, resume: str) -> None:
    claim(tmp_path / "a").release()
    claim(tmp_path / "a", changed(model__hidden_size=128), resume).release()
    assert yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["model"]["hidden_size"] == 128


def test_checkpoint_path_is_accepted_from_its_own_run_or_into_a_new_one(tmp_path: Path) -> None:
    run_dir = finished_run(tmp_path / "a")
    checkpoint = str(run_dir.checkpoints / "step-00000010")
    with claim(tmp_path / "a", resume=checkpoint) as held:
        assert held.has_checkpoints
    with claim(tmp_path / "b", resume=checkpoint) as held:
        assert not held.has_checkpoints
        held.run_dir.metrics_file.write_text('{"step": 11, "tokens": 110}\n')
    assert "is not one of its checkpoints" in refusal(tmp_path / "b", resume=checkpoint)


def test_folder_with_other_files_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    assert "holds other files ('thesis.tex')" in refusal(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_notes_beside_a_run_do_not_disturb(tmp_path: Path) -> None:
    finished_run(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("good run")
    claim(tmp_path / "a").release()


@pytest.mark.parametrize("config", ["", "[1, 2]", "a: [", None])
def test_run_without_a_readable_config_is_refused(tmp_path: Path, config: str | None) -> None:
    run_dir = finished_run(tmp_path / "a")
    run_dir.config_file.unlink()
    if config is not None:
        run_dir.config_file.write_text(config)
    assert "without a readable config.yaml" in refusal(tmp_path / "a")


@pytest.mark.parametrize("below", ["", "deeper/a"])
def test_path_through_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(tmp_path / "file" / below)
    assert f"because {tmp_path / 'file'} is a file" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root ignores permissions")
def test_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "is not writable" in refusal(tmp_path / "closed" / "a")


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a file system that nobody can write")
def test_file_system_that_takes_no_folders_is_refused() -> None:
    message = refusal(Path("/proc/moepp-run"))
    assert "/proc/moepp-run is not writable" in message


def test_second_start_after_the_lock_was_removed_stops_the_first(tmp_path: Path) -> None:
    """As where locks are not passed on between hosts: what is in use looks free."""
    first = claim(tmp_path / "a")
    first.check()
    (tmp_path / "a" / ".lock").unlink()
    with claim(tmp_path / "a") as second:
        for _ in range(2):
            with pytest.raises(RunError, match=f"was taken over by process {os.getpid()} on .*this run stops"):
                first.check()
        second.check()
    first.release()
    first.check()  # released: it writes nothing any more


def test_start_on_another_host_that_sees_no_lock_stops_the_first(tmp_path: Path) -> None:
    first = claim(tmp_path / "a")
    (tmp_path / "a" / ".lock").write_text("process 7 on elsewhere\n0123\n")
    with pytest.raises(RunError, match="was taken over by process 7 on elsewhere"):
        first.check()


def test_lock_that_is_just_gone_is_made_again(tmp_path: Path) -> None:
    first = claim(tmp_path / "a")
    (tmp_path / "a" / ".lock").unlink()
    first.check()
    assert "in use by process" in refusal(tmp_path / "a")
    first.check()
    first.release()
    claim(tmp_path / "a").release()


def test_lock_that_is_removed_while_a_start_waits_for_it_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classic race: the holder's file is opened, then unlinked, then locked; nobody else would see that lock."""
    path, opened = tmp_path / ".lock", []
    open_own = files.open_own

    def open_and_lose(*args: Any) -> int:
        descriptor = open_own(*args)
        opened.append(descriptor)
        if len(opened) == 1:
            path.unlink()
        return descriptor

    monkeypatch.setattr(files, "open_own", open_and_lose)
    with pytest.raises(RunError, match="in use"):
        RunLock.acquire(path)
    lock = RunLock.acquire(path, wait_seconds=5.0)
    monkeypatch.undo()
    with pytest.raises(RunError, match="in use"):
        RunLock.acquire(path)
    lock.release()


@pytest.mark.parametrize("how", ["removed", "renamed", "replaced"])
def test_directory_that_is_gone_stops_the_run_and_is_not_made_again(tmp_path: Path, how: str) -> None:
    held = claim(tmp_path / "a")
    shutil.rmtree(tmp_path / "a") if how == "removed" else (tmp_path / "a").rename(tmp_path / "b")
    if how == "replaced":
        claim(tmp_path / "a").release()
    with pytest.raises(RunError, match="was removed, renamed or replaced while this run used it"):
        held.check()
    assert (tmp_path / "a").exists() == (how == "replaced")


def test_config_that_was_removed_is_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with claim(tmp_path / "a") as held:
        before = held.run_dir.config_file.read_bytes()
        held.run_dir.config_file.unlink()
        held.check()
        assert held.run_dir.config_file.read_bytes() == before
        assert "config.yaml was removed" in caplog.messages[0]


PLANTED = [".lock", "config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "log", "wandb"]


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("beside_a_run", [False, True])
def test_planted_link_is_refused_and_its_aim_untouched(tmp_path: Path, name: str, beside_a_run: bool) -> None:
    run, aim = tmp_path / "run", tmp_path / "aim"
    if beside_a_run:
        finished_run(run)
        (run / name).rename(aim) if name != ".lock" else aim.write_text("mine")
        (run / name).unlink(missing_ok=True)
    else:
        run.mkdir()
        aim.mkdir() if name in ("checkpoints", "log", "wandb") else aim.write_text("mine")
    (run / name).symlink_to(aim)
    before = sorted(aim.iterdir()) if aim.is_dir() else aim.read_bytes()
    refusal(run)
    assert before == (sorted(aim.iterdir()) if aim.is_dir() else aim.read_bytes())
    assert (run / name).is_symlink()


def test_names_that_used_to_be_predictable_are_not_written(tmp_path: Path) -> None:
    run, aim = tmp_path / "run", tmp_path / "aim"
    finished_run(run)
    aim.write_text("mine")
    for name in ("config.yaml.tmp", "environment.json.tmp", "metrics.jsonl.tmp"):
        (run / name).symlink_to(aim)
    claim(run).release()
    assert aim.read_text() == "mine" and not (run / "config.yaml").is_symlink()


def test_planted_hard_link_as_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / "aim").write_text("mine")
    (tmp_path / "run").mkdir()
    os.link(tmp_path / "aim", tmp_path / "run" / ".lock")
    assert "is a hard link" in refusal(tmp_path / "run")
    assert (tmp_path / "aim").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make folders of another user")
def test_run_of_another_user_is_refused(tmp_path: Path) -> None:
    finished_run(tmp_path / "theirs")
    os.chown(tmp_path / "theirs" / ".lock", 12345, -1)
    assert "belongs to user 12345); write to a folder of your own" in refusal(tmp_path / "theirs")
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    os.chown(open_to_all, 12345, -1)
    open_to_all.chmod(0o777)
    assert "belongs to user 12345 and everybody may write to it); use a folder of your own" in refusal(open_to_all)
    assert list(open_to_all.iterdir()) == []


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "pwrite"])
def test_full_disk_at_the_start_says_so_and_the_next_start_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    message = refusal(tmp_path / "a")
    assert "the disk is full" in message and "free space at /" in message and "permission" not in message
    monkeypatch.undo()
    claim(tmp_path / "a").release()
    finished_run(tmp_path / "b")
    monkeypatch.setattr(os, call, full)
    refusal(tmp_path / "b", changed(train__steps=200))
    monkeypatch.undo()
    assert (tmp_path / "b" / "metrics.jsonl").read_text() == '{"step": 10, "tokens": 100}\n'
    claim(tmp_path / "b", changed(train__steps=200)).release()


def test_unfinished_import_is_no_run_and_can_be_repeated(tmp_path: Path) -> None:
    def importing(path: Path) -> RunClaim:
        return RunDir.claim(path, CONFIG, ENVIRONMENT, "never", importing=True)

    path = tmp_path / "a"
    for left in (".step-00000000.tmp", "step-00000000"):  # killed while saving, and between that and the end
        with importing(path) as held:
            (held.run_dir.checkpoints / left).mkdir()
        for resume in ("auto", "never"):
            assert "holds an import that was not finished; repeat" in refusal(path, resume=resume)
    with importing(path) as held:
        assert list(held.run_dir.checkpoints.iterdir()) == []
        (held.run_dir.checkpoints / "step-00000000").mkdir()
        held.finish_import()
    with claim(path) as held:
        assert held.has_checkpoints
    with pytest.raises(RunError, match="already holds a run"):
        importing(path)


def test_start_killed_in_its_first_save_can_be_taken_over(tmp_path: Path) -> None:
    with claim(tmp_path / "a") as held:
        (held.run_dir.checkpoints / ".step-00000005.tmp").mkdir()
    claim(tmp_path / "a", changed(model__hidden_size=128)).release()


def test_environment_names_versions_and_commit_and_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "hunter2-secret-value")
    environment = describe_environment("NVIDIA H200", world_size=16)
    text = json.dumps(environment)
    assert "hunter2" not in text and "SOME_SERVICE_TOKEN" not in text
    assert environment["device"] == "NVIDIA H200" and environment["world_size"] == 16
    assert environment["packages"]["torch"].startswith("2.") and environment["packages"]["wandb"]
    root = Path(__file__).resolve().parents[3]
    if (root / ".git").exists():
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
        assert environment["git"]["commit"] == head.stdout.strip()
        assert isinstance(environment["git"]["dirty"], bool)


def test_looking_ahead_sees_unfinished_imports_and_lets_data_have_moved(tmp_path: Path) -> None:
    RunDir.claim(tmp_path / "a", CONFIG, ENVIRONMENT, "never", importing=True).release()
    with pytest.raises(RunError, match="holds an import that was not finished"):
        check_run_dir(tmp_path / "a", CONFIG)
    finished_run(tmp_path / "b")
    assert check_run_dir(tmp_path / "b", changed(data__paths=["elsewhere/text"])) is not None
    with pytest.raises(RunError, match="already holds another run"):
        check_run_dir(tmp_path / "b", changed(run__seed=1))
