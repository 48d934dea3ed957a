"""Run the harness on a model that may be spread over several ranks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.evaluator import evaluate as harness_evaluate

from moepp.data.tokenizer import Tokenizer
from moepp.distributed import comm
from moepp.distributed.groups import ParallelGroups
from moepp.errors import ConfigError
from moepp.evaluation.backend import HarnessModel
from moepp.evaluation.data import open_source
from moepp.evaluation.results import ACCURACIES, BenchmarkResult, accuracy_stderr, flat_metrics
from moepp.evaluation.sharing import SharedModel
from moepp.evaluation.tasks import Benchmark, load_benchmarks, quiet_harness
from moepp.model.transformer import Transformer

DEFAULT_BATCH_SIZE = 8


def evaluate_tasks(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    groups: ParallelGroups,
    data_folder: str | None = None,
    limit: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    must_stop: Callable[[], bool] | None = None,
) -> dict[str, float]:
    """Evaluate during training; collective, the same result on every rank.

    Neither the model's training flag nor any global random number generator is changed.

    Args:
        tasks: as for :func:`moepp.evaluation.names.resolve_names`.
        data_folder: as for :func:`moepp.evaluation.data.open_source`.
        limit: documents per task; None: all.
        batch_size: sequences per rank and forward pass.
        must_stop: asked on every rank before each forward pass; None: never.

    Returns:
        ``eval/<task>/<metric>`` -> value, accuracies as fractions; ``eval/<task>/share_<kind>`` -> share of an expert
        kind in the choices of its tokens, mean over layers.

    Raises:
        ConfigError, DataError: an unknown task, or documents that are missing or damaged.
        EvaluationStopped: on every rank, because one must stop.
    """

    def lead() -> dict[str, float]:
        benchmarks = load_benchmarks(tasks, open_source(data_folder))
        return flat_metrics([evaluate_benchmark(shared, benchmark, limit) for benchmark in benchmarks])

    shared = SharedModel(model, tokenizer, groups, batch_size, must_stop)
    return shared.run(lead)


def check_tasks(tasks: Sequence[str], data_folder: str | None, groups: ParallelGroups) -> None:
    """Read everything that :func:`evaluate_tasks` will need, so that mistakes show before training; collective.

    Raises:
        ConfigError, DataError: as :func:`evaluate_tasks`.
    """
    comm.on_first_rank(lambda: load_benchmarks(tasks, open_source(data_folder)), groups.world)


def evaluate_all(
    shared: SharedModel,
    benchmarks: Sequence[Benchmark],
    limit: int | None = None,
    report: Callable[[str], None] | None = None,
) -> list[BenchmarkResult]:
    """Evaluate one benchmark after the other; collective, the same result on every rank.

    Args:
        benchmarks: on rank 0; not looked at elsewhere.
        limit: documents per task; None: all.
        report: gets a line after each benchmark; None: silent, without a progress bar.
    """

    def lead() -> list[BenchmarkResult]:
        results = []
        for number, benchmark in enumerate(benchmarks, start=1):
            start = time.perf_counter()
            result = evaluate_benchmark(shared, benchmark, limit, progress=report is not None)
            results.append(result)
            if report is not None:
                seconds = time.perf_counter() - start
                report(
                    f"{number}/{len(benchmarks)} {result.title}: {result.documents:,} documents, "
                    f"{result.requests:,} requests in {seconds:.0f} s"
                )
        return results

    return shared.run(lead)


def evaluate_benchmark(
    shared: SharedModel, benchmark: Benchmark, limit: int | None = None, progress: bool = False
) -> BenchmarkResult:
    """Return one benchmark, on rank 0 inside :meth:`SharedModel.run`.

    Every benchmark is a harness run of its own, so that its numbers do not depend on which others are evaluated.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} leaves no document; use 1 or more, or none for all")
    backend, before = HarnessModel(shared, progress), shared.kinds
    with quiet_harness():
        # Standard errors of accuracies are computed below, without the harness's bootstrap of perplexities.
        found: Any = harness_evaluate(
            lm=backend, task_dict={"tasks": benchmark.tasks}, limit=limit, bootstrap_iters=0, log_samples=False
        )
    by_task = {name: _metrics(found["results"][name]) for name in benchmark.tasks}
    sizes = {name: int(found["results"][name]["sample_len"]) for name in benchmark.tasks}
    metrics, stderr = _pool(by_task, sizes)
    kinds = shared.kinds - before
    return BenchmarkResult(
        name=benchmark.name,
        metrics=metrics,
        stderr=stderr,
        chance=_chance(benchmark) if stderr else None,
        shots=benchmark.shots,
        documents=sum(sizes.values()),
        requests=backend.num_requests,
        truncated=backend.num_truncated,
        origin=benchmark.origin,
        notes=benchmark.notes,
        tasks=by_task if len(by_task) > 1 else {},
        tokens=kinds.tokens,
        kinds=kinds.shares,
        layers=list(shared.model.cfg.moe_layers) if kinds.shares else [],
    )


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """Return the harness's ``metric,filter`` keys without the filter, unless a metric has several."""
    keys = [
        key for key, value in found.items() if "," in key and "_stderr" not in key and isinstance(value, int | float)
    ]
    count = Counter(key.partition(",")[0] for key in keys)
    return {key.partition(",")[0] if count[key.partition(",")[0]] == 1 else key: float(found[key]) for key in keys}


def _pool(by_task: dict[str, dict[str, float]], sizes: dict[str, int]) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics over all documents of the tasks, standard errors of the accuracies)."""
    metrics, stderr = {}, {}
    shared_names = set.intersection(*(set(metrics) for metrics in by_task.values()))
    total = sum(sizes.values())
    for metric in next(iter(by_task.values())):
        if metric in shared_names:
            metrics[metric] = sum(by_task[name][metric] * sizes[name] for name in by_task) / total
        if metric in shared_names and metric in ACCURACIES:
            stderr[metric] = accuracy_stderr(
                [by_task[name][metric] for name in by_task], [sizes[name] for name in by_task]
            )
    return metrics, stderr


def _chance(benchmark: Benchmark) -> float:
    """Return the expected accuracy of a random answer: 0 where text is predicted or generated."""
    per_document: list[float] = []
    for task in benchmark.tasks.values():
        choices = Counter(instance.doc_id for instance in task.instances)
        is_choice = task.OUTPUT_TYPE == "multiple_choice"
        per_document += [1 / number if is_choice else 0.0 for number in choices.values()]
    return sum(per_document) / len(per_document)
