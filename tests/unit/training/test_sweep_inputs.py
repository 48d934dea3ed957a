"""Files that a job of a sweep lacks are found before the first job starts, and looked at once for all jobs."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from moepp.config import configs_folder, register_defaults
from moepp.data import check_data
from moepp.training import inputs
from moepp.training.jobs import Job
from moepp.training.sweep import Sources, plan
from tests.data_files import numbered_documents, write_indexed, write_word_tokenizer

register_defaults()


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides with data that are there: 800 tokens below 100."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    write_indexed(tmp_path / "good", [list(range(100))] * 8)
    write_indexed(tmp_path / "large", numbered_documents([100] * 80))
    return ["model.vocab_size=256", "data.seq_len=16", "data.tokenizer=null", "train.samples=0", "data.split='50,50,0'"]


def jobs(*overrides: str) -> list[Job]:
    made = plan(Sources(str(configs_folder()), None, "config"), overrides)
    assert made is not None
    return made.jobs()


@pytest.mark.parametrize(
    ("swept", "told"),
    [
        ("data.paths=[good],[none]", "data.paths entry none names no data"),
        ("data.paths=[good],[large]", "large has token ids up to 7999 and model.vocab_size is 256"),
        ("model.vocab_size=256,64", "good has token ids up to 99 and model.vocab_size is 64"),
        ("data.seq_len=16,4096", "data.seq_len=4096 is longer than model.max_seq_len"),
        ("data.tokenizer=null,none.json", "tokenizer none.json does not exist"),
        ("data.validation={},{wiki: [none]}", "data.validation.wiki entry none names no data"),
        ("init.path=null,none", "none is not a folder"),
        ("run.resume=auto,checkpoints/step-00000007", "run.resume=checkpoints/step-00000007: "),
    ],
)
def test_what_a_job_lacks_is_found_before_the_first_starts(settings, swept, told, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    first, second = jobs(*settings, "data.paths=[good]", swept)
    assert first.error is None and told in str(second.error) and "\n" not in str(second.error)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("swept", "told"),
    [
        ("logging.wandb.mode=offline,online", "logging.wandb.mode=online needs a W&B API key"),
        ("eval.tasks=[],[sciqq]", "unknown evaluation task 'sciqq'; did you mean sciq"),
        ("eval.tasks=[],[sciq]", "sciq"),  # its documents are not there
    ],
)
def test_what_a_job_logs_to_and_is_evaluated_on_is_known_before_the_first_starts(
    settings, swept, told, tmp_path, monkeypatch
):
    for name in [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    write_word_tokenizer(tmp_path / "words.json", 100)
    (tmp_path / "documents").mkdir()
    evaluation = ["data.tokenizer=words.json", "eval.interval=1", "eval.data=documents"]
    first, second = jobs(*settings, *evaluation, "data.paths=[good]", swept)
    assert first.error is None and told in str(second.error) and "\n" not in str(second.error)


def test_a_package_that_a_sink_needs_is_missed_before_the_first_starts(settings, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name == "tensorboard" else find_spec(name, *of)
    )
    first, second = jobs(*settings, "data.paths=[good]", "logging.tensorboard=false,true")
    assert first.error is None and "the package tensorboard is not installed" in str(second.error)


def test_data_are_looked_at_once_for_all_jobs_that_share_them(settings, monkeypatch):
    looked = []
    monkeypatch.setattr(inputs, "check_data", lambda cfg: looked.append(cfg.data.paths) or check_data(cfg))
    found = jobs(*settings, "data.paths=[good],[none]", "optim.lr=1e-3,2e-3,3e-3")
    assert looked == [("good",), ("none",)]
    assert [job.error is None for job in found] == [True] * 3 + [False] * 3


def test_a_run_that_goes_on_does_not_need_its_initial_weights(settings, tmp_path):
    import yaml

    arguments = [*settings, "data.paths=[good]", "init.path=gone", "optim.lr=1e-3,2e-3"]
    made = plan(Sources(str(configs_folder()), None, "config"), arguments)
    assert made is not None
    tree, path = made._trees[0], Path(made._drafts[0].path or "")
    (path / "checkpoints/step-00000001").mkdir(parents=True)
    (path / "metrics.jsonl").write_text('{"step": 1, "tokens": 1}\n')
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    first, second = jobs(*arguments)
    assert first.error is None and "gone is not a folder" in str(second.error)


def test_tokenizers_are_compared_with_the_model(settings, tmp_path):
    write_word_tokenizer(tmp_path / "t.json", 300)
    first, second = jobs(*settings, "data.paths=[good]", "data.tokenizer=null,t.json")
    assert first.error is None and "has 302 tokens and model.vocab_size is 256" in str(second.error)
