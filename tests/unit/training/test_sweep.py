"""Sweeps up to their first process: one directory per job, every job checked, what is shown, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from moepp.config import configs_folder, register_defaults
from moepp.errors import ConfigError
from moepp.training.jobs import Job
from moepp.training.sweep import Plan, Sources, plan

register_defaults()
CONFIGS = configs_folder()
SOURCES = Sources(str(CONFIGS), None, "config")


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own, no launcher around, and data that are there (test_sweep_inputs.py: that are not)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moepp.training.inputs.InputChecks.check", lambda *_: None)
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def make(*overrides: str, sources: Sources = SOURCES) -> Plan:
    made = plan(sources, overrides)
    assert made is not None
    return made


def jobs(*overrides: str) -> list[Job]:
    return make(*overrides).jobs()


def places(*overrides: str) -> list[str]:
    found = jobs(*overrides)
    assert [job.error for job in found] == [None] * len(found)
    for job in found:
        assert job.tree is not None and job.path is not None
        run = job.tree["run"]
        assert str(Path(run["dir"] or f"runs/{run['name']}").resolve()) == job.path
    return [str(Path(job.path or "").relative_to(Path.cwd())) for job in found]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.moe.tau=0.25,0.5"], ["runs/tiny-0", "runs/tiny-1"]),
        (["run.name=fixed", "optim.lr=1e-3,3e-3"], ["runs/fixed-0", "runs/fixed-1"]),
        (["run.name=fixed"], ["runs/fixed-0"]),
        (["run.name=a,b"], ["runs/a", "runs/b"]),
        (["run.name=a,b", "optim.lr=1e-3,3e-3"], ["runs/a-0", "runs/a-1", "runs/b-2", "runs/b-3"]),
        (["run.name='tau-${model.moe.tau}'", "model.moe.tau=0.25,0.5"], ["runs/tau-0.25", "runs/tau-0.5"]),
        (["run.name='tau-${model.moe.tau}'", "model.moe.tau=0.25"], ["runs/tau-0.25"]),
        (["run.name='tau-${model.moe.tau}'", "optim.lr=1e-3,3e-3"], ["runs/tau-0.75-0", "runs/tau-0.75-1"]),
        (["run.name='n${hydra:job.num}'", "optim.lr=1e-3,3e-3"], ["runs/n0", "runs/n1"]),
        (["run.dir=out/", "optim.lr=1e-3,3e-3"], ["out-0", "out-1"]),
        (["run.dir=out,./out"], ["out-0", "out-1"]),
        (["run.dir=out,out/inner"], ["out-0", "out/inner-1"]),
        (["run.dir='out/${run.name}'", "optim.lr=1e-3,3e-3"], ["out/tiny-0", "out/tiny-1"]),
        (["engine=glob(*)", "train.samples=0"], ["runs/tiny-0", "runs/tiny-1", "runs/tiny-2"]),
        (["model.moe.tau=range(0.25,0.6,0.25)"], ["runs/tiny-0", "runs/tiny-1"]),
        (["sweep=tau", "model.moe.tau=0.3,0.4"], ["runs/tiny-0", "runs/tiny-1"]),
    ],
    ids=lambda value: " ".join(value) if value and "=" in value[0] else "",
)
def test_every_job_has_a_directory_of_its_own(overrides, expected):
    assert places(*overrides) == expected


def test_links_to_one_folder_are_one_directory(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert [Path(job.path or "").name for job in jobs("run.dir=real,link")] == ["real-0", "link-1"]


def test_jobs_get_their_values_and_numbers():
    first, second = jobs("model.moe.tau=0.25,0.5", "train.steps=7")
    assert (first.title, second.title) == ("job 0 (model.moe.tau=0.25)", "job 1 (model.moe.tau=0.5)")
    assert first.tree is not None and second.tree is not None
    assert [tree["model"]["moe"]["tau"] for tree in (first.tree, second.tree)] == [0.25, 0.5]
    assert [tree["train"]["steps"] for tree in (first.tree, second.tree)] == [7, 7]
    assert [tree["run"]["name"] for tree in (first.tree, second.tree)] == ["tiny-0", "tiny-1"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.moe.top_k=2,99"], "model.moe.top_k=99 must lie between"),
        (["engine=native,nope"], "engine=nope does not exist"),
        (["parallel.expert=1,2"], "parallel.expert=2 does not divide the 1 processes"),
        (["optim.lr=1e-3,fast"], "optim.lr='fast' has the wrong type"),
        (["run.name=a,b/c"], "run.name='b/c' must be a plain folder name"),
        (["run.name=a,'${nothing}'"], "run.name does not resolve"),
        (["run.dir=a,/proc/version/x"], "/proc/version is a file"),
    ],
)
def test_bad_value_among_good_ones_is_found_before_the_first_job(overrides, message, tmp_path):
    good, bad = jobs(*overrides)
    assert good.error is None and message in str(bad.error)
    assert list(tmp_path.iterdir()) == []


def test_mending_a_bad_value_does_not_rename_the_others():
    bad = [job.path for job in jobs("model.moe.top_k=2,99,1")]
    good = [job.path for job in jobs("model.moe.top_k=2,3,1")]
    assert bad == good


def pretend_to_train(job: Job) -> None:
    """What a run leaves of which the sweep looks."""
    assert job.path is not None
    (Path(job.path) / "checkpoints" / "step-00000001").mkdir(parents=True)
    (Path(job.path) / "metrics.jsonl").write_text('{"step": 1, "tokens": 1}\n')
    (Path(job.path) / "config.yaml").write_text(yaml.safe_dump(job.tree))


def test_sweep_started_again_finds_its_own_directories():
    for job in jobs("optim.lr=1e-3,3e-3"):
        pretend_to_train(job)
    assert [job.error for job in jobs("optim.lr=1e-3,3e-3", "train.steps=1000", "checkpoint.interval=5")] == [None] * 2


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (["optim.lr=3e-3,1e-3"], "optim.lr: 0.001 -> 0.003"),  # the same values in another order
        (["optim.weight_decay=0.1,0.2", "optim.lr=5e-3"], "optim.lr: 0.001 -> 0.005"),
        (["model.moe.tau=0.1,0.2"], "model.moe.tau: 0.75 -> 0.1"),
    ],
)
def test_run_of_other_values_is_not_taken_for_a_job(other, difference):
    for job in jobs("optim.lr=1e-3,3e-3"):
        pretend_to_train(job)
    first, _ = jobs(*other)
    assert "already holds a" in str(first.error) and difference in str(first.error)


def test_folder_of_something_else_is_refused_before_the_first_job(tmp_path):
    (tmp_path / "runs" / "tiny-1").mkdir(parents=True)
    (tmp_path / "runs" / "tiny-1" / "thesis.tex").touch()
    first, second = jobs("optim.lr=1e-3,3e-3")
    assert first.error is None and "is not a run but holds other files" in str(second.error)


def test_key_that_the_model_file_leaves_out_can_be_swept(tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    text = (CONFIGS / "model" / "tiny.yaml").read_text().replace("  tau: 0.75\n", "")
    (tmp_path / "mine" / "model" / "mine.yaml").write_text(text)
    sources = Sources(str(CONFIGS), "mine", "config")
    made = make("model=mine", "model.moe.tau=0.25,0.5", sources=sources)
    shutil.rmtree(tmp_path / "mine")
    trees = [job.tree for job in made.jobs() if job.tree is not None]
    assert [tree["model"]["moe"]["tau"] for tree in trees] == [0.25, 0.5]


def test_configuration_of_every_job_is_shown(capsys):
    assert make("model.moe.tau=0.25,0.5").show("job", None, resolve=True) == 0
    shown = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [document["model"]["moe"]["tau"] for document in shown] == [0.25, 0.5]
    assert [document["run"]["name"] for document in shown] == ["tiny-0", "tiny-1"]
    assert "hydra" not in shown[0] and shown[0]["data"]["seq_len"] == 256
    assert make("model.moe.tau=0.25,-1").show("all", "hydra.job.num", resolve=False) == 2
    output = capsys.readouterr()
    assert list(yaml.safe_load_all(output.out)) == [0, 1]
    assert output.err.startswith("error: job 1 (model.moe.tau=-1): model.moe.tau=-1")


def test_package_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="--package nope is not in the configuration"):
        make("model.moe.tau=0.25,0.5").show("job", "nope", resolve=False)


def test_sweep_over_several_processes_is_refused(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"a launcher has started 2 processes; .*sweep\.sbatch"):
        make("optim.lr=1,2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert len(jobs("optim.lr=1e-3,2e-3")) == 2
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name)
    for size, rank in (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK")):  # by mpirun
        with monkeypatch.context() as started:
            started.setenv(size, "2")
            with pytest.raises(ConfigError, match=rf"{size}=2 but RANK and WORLD_SIZE are not set, .*\${rank}"):
                make("optim.lr=1,2")
            started.setenv(size, "1")
            assert len(jobs("optim.lr=1e-3,2e-3")) == 2


def test_setting_that_would_be_ignored_is_refused():
    with pytest.raises(ConfigError, match=r"hydra\.sweep\.dir=x has no effect"):
        make("optim.lr=1,2", "hydra.sweep.dir=x")
