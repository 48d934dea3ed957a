"""Several ranks, one evaluation: the same numbers on every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from moepp.data.tokenizer import Tokenizer
from moepp.distributed import comm
from moepp.distributed.groups import Layout, ParallelGroups, build_groups
from moepp.errors import ConfigError, DataError, EvaluationStopped, PeerError
from moepp.evaluation.backend import build_rows
from moepp.evaluation.evaluate import check_tasks, evaluate_tasks
from moepp.evaluation.scoring import Prompt
from moepp.evaluation.sharing import SharedModel
from tests.dist import WorkerPool
from tests.evaluation_cases import slow_loglikelihood, tiny_config, tiny_model, write_benchmarks, write_byte_tokenizer

LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # (ranks, expert parallel)
KINDS = [kind for kind, count in tiny_config().moe.expert_counts.items() if count]
_GROUPS: dict[int, ParallelGroups] = {}


def groups_of(ep_size: int) -> ParallelGroups:
    if ep_size not in _GROUPS:
        _GROUPS[ep_size] = build_groups(Layout(comm.size(), expert=ep_size), torch.device("cpu"))
    return _GROUPS[ep_size]


def _shared(tokenizer: str, ep_size: int, batch_size: int) -> SharedModel:
    groups = groups_of(ep_size)
    model = tiny_model(tiny_config(), groups.ep if ep_size > 1 else None)
    return SharedModel(model, Tokenizer(tokenizer), groups, batch_size)


def _evaluate(rank: int, tokenizer: str, folder: str, ep_size: int) -> dict[str, float]:
    shared = _shared(tokenizer, ep_size, 2)
    # Only the first rank needs the documents.
    data = folder if rank == 0 else "not-there"
    tasks = ["sciq", "lambada", "nq", "ai2_arc"]
    return evaluate_tasks(shared.model, shared.tokenizer, tasks, shared.groups, data, limit=7, batch_size=2)


def _stop(rank: int, tokenizer: str, folder: str, ep_size: int, at_rank: int, tasks: list[str]) -> str:
    """Evaluate until one rank is told to stop, before its third forward pass; how that ended."""
    asked = []

    def must_stop() -> bool:
        asked.append(rank)
        return rank == at_rank and len(asked) >= 3

    shared = _shared(tokenizer, ep_size, 1)
    try:
        evaluate_tasks(shared.model, shared.tokenizer, tasks, shared.groups, folder, 9, 1, must_stop)
    except EvaluationStopped:
        return f"stopped after {len(asked)}"
    return "not stopped"


PAIRS = [([3, 1, 4, 1, 5][: i % 5 + 1] * (i % 3 + 1), [9, 2, 6][: i % 3 + 1]) for i in range(7)]


def _score(rank: int, tokenizer: str, ep_size: int, number: int) -> Any:
    import numpy as np

    shared = _shared(tokenizer, ep_size, 2)
    prompts = [Prompt(np.array([7, i + 1, 8] * (i + 1), np.int32), 3 + i % 2) for i in range(number)]

    def lead() -> Any:
        rows, places, _ = build_rows(PAIRS[:number], 64)
        scores = shared.score(rows)
        return [scores[row][k] for row, k in places], shared.generate(prompts), shared.score([])

    result = shared.run(lead)
    assert shared.model.training
    return result


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json").path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_benchmarks(tmp_path_factory.mktemp("benchmarks"), 40))


@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("number", [1, 7])  # fewer batches than ranks; an uneven number
def test_scores_on_any_layout_equal_one_forward_per_request(
    pool_4: WorkerPool, tokenizer: str, ep_size: int, number: int
):
    results = pool_4.run(_score, tokenizer, ep_size, number)
    assert all(result == results[0] for result in results)
    scores, texts, nothing = results[0]
    expected = [slow_loglikelihood(tiny_model(tiny_config()), *pair) for pair in PAIRS[:number]]
    for (score, greedy), (expected_score, expected_greedy) in zip(scores, expected, strict=True):
        assert score == pytest.approx(expected_score, abs=2e-5) and greedy is expected_greedy
    assert len(texts) == number and all(texts) and nothing == []


def test_metrics_are_equal_on_every_layout(pools: Any, tokenizer: str, folder: str):
    found = {
        layout: pools(layout[0]).run(_evaluate, tokenizer, folder, layout[1], time_limit=120.0) for layout in LAYOUTS
    }
    reference = found[(1, 1)][0]
    kinds = [name for name in reference if "/share_" in name]
    assert len(reference) - len(kinds) == 2 + 2 + 1 + 2 and len(kinds) == 4 * len(KINDS)
    assert reference["eval/lambada_openai/perplexity"] > 1
    for layout, results in found.items():
        for result in results:
            assert result == pytest.approx(reference, rel=1e-5), layout


def test_texts_are_equal_on_every_layout(pools: Any, tokenizer: str):
    texts = {layout: pools(layout[0]).run(_score, tokenizer, layout[1], 7)[0][1] for layout in LAYOUTS}
    assert all(found == texts[(1, 1)] for found in texts.values())


def _fail(rank: int, tokenizer: str, user_error: bool) -> None:
    shared = _shared(tokenizer, 1, 2)

    def lead() -> None:
        raise DataError("document 3 is damaged") if user_error else ZeroDivisionError("bug")

    try:
        shared.run(lead)
    except ZeroDivisionError:
        raise PeerError("bug on rank 0") from None
    finally:
        assert comm.gather_objects(rank) == [0, 1]  # nobody is left in a collective


@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("at_rank", [0, 1])
@pytest.mark.parametrize("tasks", [["sciq"], ["nq"]], ids=["scores", "generates"])
def test_a_rank_that_must_stop_ends_the_evaluation_on_all(
    pool_2: WorkerPool, tokenizer: str, folder: str, ep_size: int, at_rank: int, tasks: list[str]
):
    """Whichever rank it is, and whether prompts are dealt to ranks or to groups of them."""
    found = pool_2.run(_stop, tokenizer, folder, ep_size, at_rank, tasks)
    assert found == ["stopped after 3"] * 2


def test_error_of_the_first_rank_is_raised_everywhere(pool_2: WorkerPool, tokenizer: str):
    assert pool_2.run(_fail, tokenizer, True, raises=DataError) == ["document 3 is damaged"] * 2


def test_bug_on_the_first_rank_stops_the_others(pool_2: WorkerPool, tokenizer: str):
    messages = pool_2.run(_fail, tokenizer, False, raises=PeerError)
    assert messages[0] == "bug on rank 0" and "rank 0 stopped" in messages[1]


def _check(rank: int, folder: str) -> None:
    check_tasks(["sciq", "bolq"], folder if rank == 0 else "not-there", groups_of(1))


def test_unknown_task_is_refused_on_every_rank(pool_2: WorkerPool, folder: str):
    messages = pool_2.run(_check, folder, raises=ConfigError)
    assert all("did you mean boolq" in message for message in messages)
