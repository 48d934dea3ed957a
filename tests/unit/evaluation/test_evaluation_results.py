"""Numbers of the results, the table and the file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from lm_eval.api.metrics import mean_stderr, pooled_sample_stderr
from lm_eval.api.registry import get_aggregation

from moepp.data.tokenizer import Tokenizer
from moepp.distributed.groups import ParallelGroups
from moepp.errors import MoeppError, WriteError
from moepp.evaluation.data import open_source
from moepp.evaluation.evaluate import check_tasks, evaluate_all, evaluate_tasks
from moepp.evaluation.results import (
    BenchmarkResult,
    Subject,
    accuracy_stderr,
    flat_metrics,
    table_text,
    write_results,
)
from moepp.evaluation.sharing import SharedModel
from moepp.evaluation.tasks import load_benchmarks, quiet_harness
from moepp.model.transformer import Transformer
from tests.evaluation_cases import (
    one_process,
    slow_loglikelihood,
    tiny_config,
    tiny_model,
    write_benchmarks,
    write_byte_tokenizer,
)


@pytest.fixture(scope="module")
def groups() -> Iterator[ParallelGroups]:
    with one_process() as groups:
        yield groups


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(tiny_config())


def test_standard_errors_are_the_harness_ones():
    rng = random.Random(2)
    tasks = [[float(rng.random() < p) for _ in range(n)] for p, n in ((0.3, 40), (0.8, 15), (0.5, 7))]
    for values in tasks:
        assert accuracy_stderr([sum(values) / len(values)], [len(values)]) == pytest.approx(mean_stderr(values))
    sizes = [len(values) for values in tasks]
    pooled = pooled_sample_stderr([mean_stderr(values) for values in tasks], sizes)
    assert accuracy_stderr([sum(v) / len(v) for v in tasks], sizes) == pytest.approx(float(pooled))
    assert math.isnan(accuracy_stderr([1.0], [1]))


def test_accuracy_equals_a_plain_loop_over_the_documents(
    model: Transformer, tokenizer: Tokenizer, groups: ParallelGroups, folder: Path
):
    found = evaluate_tasks(model, tokenizer, ["sciq"], groups, str(folder))
    correct = correct_normalised = 0
    documents = [json.loads(line) for line in (folder / "sciq/test.jsonl").read_text().splitlines()]
    for doc in documents:
        context = f"{doc['support']}\nQuestion: {doc['question']}\nAnswer:"
        choices = [doc["distractor1"], doc["distractor2"], doc["distractor3"], doc["correct_answer"]]
        scores = []
        for choice in choices:
            continuation = tokenizer.encode(f"{context} {choice}")[len(tokenizer.encode(context)) :]
            scores.append(slow_loglikelihood(model, tokenizer.encode(context), continuation)[0])
        correct += scores.index(max(scores)) == 3
        per_character = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        correct_normalised += per_character.index(max(per_character)) == 3
    assert found["eval/sciq/acc"] == pytest.approx(correct / len(documents))
    assert found["eval/sciq/acc_norm"] == pytest.approx(correct_normalised / len(documents))


def test_group_counts_documents_and_knows_chance(
    model: Transformer, tokenizer: Tokenizer, groups: ParallelGroups, folder: Path
):
    benchmarks = load_benchmarks(["ai2_arc"], open_source(str(folder)))
    (result,) = evaluate_all(SharedModel(model, tokenizer, groups, 8), benchmarks)
    assert result.documents == 13 + 12 and result.requests == 13 * 4 + 12 * 3
    assert result.chance == pytest.approx((13 / 4 + 12 / 3) / 25)
    parts = result.tasks
    assert result.metrics["acc"] == pytest.approx(
        (13 * parts["arc_easy"]["acc"] + 12 * parts["arc_challenge"]["acc"]) / 25
    )


def test_limit_takes_the_first_documents(
    model: Transformer, tokenizer: Tokenizer, groups: ParallelGroups, folder: Path
):
    benchmarks = load_benchmarks(["lambada", "nq"], open_source(str(folder)), shots=2)
    lines: list[str] = []
    results = evaluate_all(SharedModel(model, tokenizer, groups, 8), benchmarks, limit=4, report=lines.append)
    assert [r.documents for r in results] == [4, 4] and [r.chance for r in results] == [0.0, 0.0]
    assert lines[0].startswith("1/2 LAMBADA: 4 documents, 4 requests in")


def test_evaluation_leaves_random_generators_and_training_mode_alone(
    model: Transformer, tokenizer: Tokenizer, groups: ParallelGroups, folder: Path
):
    random.seed(4)
    torch.manual_seed(4)
    before = random.getstate(), torch.get_rng_state()
    evaluate_tasks(model, tokenizer, ["boolq", "nq"], groups, str(write_benchmarks(folder, 40)), limit=2)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert model.training


def test_a_perplexity_beyond_all_numbers_is_infinite():
    """A model that diverged, or text whose one word is a paragraph, costs no results of other benchmarks."""
    for name in ("perplexity", "weighted_perplexity"):
        aggregate: Any = get_aggregation(name)
        items: Any = [-800.0] if name == "perplexity" else [(-7500.0, 1)]
        with quiet_harness():
            assert aggregate(items) == math.inf
            assert aggregate([-2.0] if name == "perplexity" else [(-4.0, 2)]) == pytest.approx(math.exp(2))
        with pytest.raises(OverflowError):
            aggregate(items)


def test_mistakes_show_before_training(groups: ParallelGroups, folder: Path):
    check_tasks(["sciq"], str(folder), groups)
    with pytest.raises(MoeppError, match="unknown evaluation task"):
        check_tasks(["sciqq"], str(folder), groups)


RESULTS = [
    BenchmarkResult("sciq", {"acc": 0.5, "acc_norm": 0.25}, {"acc": 0.1, "acc_norm": 0.2}, 0.25, 0, 1000, 4000, 0, "x"),
    BenchmarkResult("nq_open", {"exact_match": 0.1}, {"exact_match": 0.01}, 0.0, 32, 50, 50, 10, "x", ("other split",)),
    BenchmarkResult("wikitext", {"word_perplexity": 20.5}, {}, None, 0, 62, 62, 0, "y"),
]


def test_table_shows_scores_chance_and_what_deviates():
    text = table_text(RESULTS, Subject("runs/demo", 300, 2_457_600))
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert text.startswith("runs/demo, step 300, 2,457,600 training tokens\n")
    assert lines["SciQ"][1:] == ["50.0", "10.0", "25.0", "25.0", "0", "1,000", "x"]
    assert lines["NQ-open*†"][1:] == ["10.0", "1.0", "0.0", "32", "50", "x"]
    assert lines["average"][1:] == ["30.0", "12.5"]  # benchmarks without an accuracy do not count
    assert "word_perplexity 20.5" in text
    assert "* NQ-open: other split" in text and "20% of the prompts did not fit" in text


def test_metrics_are_flat_and_named_by_task():
    assert flat_metrics(RESULTS)["eval/nq_open/exact_match"] == 0.1


def test_file_holds_everything(tmp_path: Path):
    path = tmp_path / "eval" / "a.json"
    single = BenchmarkResult("sciq", {"acc": 1.0}, {"acc": math.nan}, 0.25, 0, 1, 4, 0, "x")
    write_results(path, [*RESULTS, single], Subject("run", 3, 4), {"limit": 1})
    content = json.loads(path.read_text())
    assert content["subject"] == {"source": "run", "step": 3, "tokens": 4}
    assert content["results"][1]["notes"] == ["other split"] and content["settings"] == {"limit": 1}
    assert content["results"][3]["stderr"] == {"acc": None}


def test_unwritable_file_is_a_clear_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"cannot write .* is not a folder"):
        write_results(tmp_path / "file" / "a.json", RESULTS, Subject("run"), {})
