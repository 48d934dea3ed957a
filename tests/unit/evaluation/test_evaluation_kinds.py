"""Expert kinds by benchmark: counts against a plain loop over unpadded sequences, and where they are shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from moepp.analysis.report import write_run_page
from moepp.analysis.runs import read_run
from moepp.analysis.task_kinds import task_kinds
from moepp.analysis.validation_charts import benchmarks
from moepp.distributed.groups import ParallelGroups
from moepp.errors import RunError
from moepp.evaluation.data import open_source
from moepp.evaluation.evaluate import evaluate_all
from moepp.evaluation.kinds import KindCounts
from moepp.evaluation.results import BenchmarkResult, Subject, flat_metrics, read_results, table_text, write_results
from moepp.evaluation.scoring import Prompt, Row
from moepp.evaluation.sharing import SharedModel
from moepp.evaluation.tasks import load_benchmarks
from moepp.model.transformer import Transformer
from moepp.moe import MoELayer
from moepp.runs.report import ReportInputs
from tests.evaluation_cases import one_process, tiny_config, tiny_model, write_benchmarks, write_byte_tokenizer
from tests.run_files import change_config, make_run


@pytest.fixture(scope="module")
def groups() -> Iterator[ParallelGroups]:
    with one_process() as groups:
        yield groups


@pytest.fixture
def shared(groups: ParallelGroups, tmp_path: Path) -> SharedModel:
    return SharedModel(tiny_model(tiny_config()), write_byte_tokenizer(tmp_path / "tokenizer.json"), groups, 3)


def slow_counts(model: Transformer, sequences: list[list[int]]) -> dict[str, list[int]]:
    """Count by hand, one sequence at a time."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    names = [kind for kind, count in layers[0].cfg.expert_counts.items() for _ in range(count)]
    counts = {kind: [0] * len(layers) for kind in dict.fromkeys(names)}
    seen: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda layer, _, out: seen.append(layer.router.choose(out.router_logits).topk_ids_TK)
        )
        for layer in layers
    ]
    model.eval()
    for sequence in sequences:
        seen.clear()
        with torch.no_grad():
            model(torch.tensor([sequence]))
        for number, ids_TK in enumerate(seen):
            for expert in ids_TK.flatten().tolist():
                counts[names[expert]][number] += 1
    for hook in hooks:
        hook.remove()
    return counts


def test_choices_of_every_token_but_padding_are_counted(shared: SharedModel):
    sequences = [[3, 1, 4, 1, 5, 9, 2, 6][: 2 + 3 * i % 7] for i in range(7)]
    answer = (np.array([7], np.int32),)
    rows = [Row(np.array(sequence, np.int32), answer) for sequence in sequences]
    shared.run(lambda: shared.score(rows))
    assert shared.kinds.tokens == sum(map(len, sequences))
    assert shared.kinds.choices == slow_counts(shared.model, sequences)
    prompts = [Prompt(np.array(sequence, np.int32), 4) for sequence in sequences]
    before = shared.kinds
    shared.run(lambda: shared.generate(prompts))
    assert shared.kinds - before == before, "what the model writes is not counted"


def test_each_benchmark_has_its_own_shares(shared: SharedModel, tmp_path: Path):
    data = open_source(str(write_benchmarks(tmp_path / "data", 40)))
    both = evaluate_all(shared, load_benchmarks(["sciq", "boolq"], data), limit=3)
    [alone] = evaluate_all(shared, load_benchmarks(["boolq"], data), limit=3)
    assert both[1].kinds == alone.kinds != both[0].kinds and both[1].tokens == alone.tokens > 0
    layers = [sum(shares) for shares in zip(*alone.kinds.values(), strict=True)]
    assert layers == pytest.approx([1.0] * len(layers)) and alone.layers == list(range(len(layers)))
    flat = flat_metrics(both)
    assert flat["eval/boolq/share_ffn"] == pytest.approx(np.mean(alone.kinds["ffn"]))
    assert "expert kinds, % of choices" in table_text(both, Subject("x"))


def test_counts_add_and_subtract():
    a, b = KindCounts(3, {"ffn": [2, 4], "zero": [4, 2]}), KindCounts(1, {"ffn": [1, 0], "zero": [1, 2]})
    assert (a + b) - b == a == KindCounts() + a
    assert a.shares == {"ffn": [1 / 3, 2 / 3], "zero": [2 / 3, 1 / 3]} and KindCounts().shares == {}


def result(name: str, ffn: float) -> BenchmarkResult:
    kinds = {"ffn": [ffn, ffn + 0.2], "zero": [1 - ffn, 0.8 - ffn]}
    return BenchmarkResult(name, {"acc": 0.5}, {"acc": 0.1}, 0.25, 0, 10, 40, 0, "here", tokens=100, kinds=kinds)


def test_the_page_of_a_run_shows_the_newest_shares_of_each_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moepp.analysis.figures._png", lambda draw: b"png")
    monkeypatch.setattr("moepp.analysis.figures._svg", lambda *_: "<svg></svg>")
    path = make_run(tmp_path, "run")
    with (path / "metrics.jsonl").open("a") as file:
        shares = {"eval/piqa/share_ffn": 0.3, "eval/piqa/share_zero": 0.7, "eval/sciq/share_ffn": 0.9}
        file.write(json.dumps({"step": 40, "tokens": 4000, "eval/piqa/acc": 0.5} | shares) + "\n")
    for name, ffn in (("00000020-a", 0.1), ("00000040-a", 0.4)):
        write_results(path / f"eval/{name}.json", [result("sciq", ffn)], Subject("run", 20, 2000), {})
    rows, source, remarks = task_kinds(read_run(path))
    assert [(row["source"], row["layer"], row["ffn"]) for row in rows] == [
        ("sciq", 0, 0.4),
        ("sciq", 1, pytest.approx(0.6)),
        ("piqa", None, 0.3),
    ]
    write_results(path / "eval/00000060-a.json", [replace(result("sciq", 0.2), layers=[1, 3])], Subject("run"), {})
    assert [row["layer"] for row in task_kinds(read_run(path))[0][:2]] == [1, 3], "as metrics name them"
    change_config(path, model__num_layers=4, model__moe_layer_interval=2, model__dense_ffn_hidden_size=8)
    (path / "eval/00000060-a.json").unlink()
    assert [row["layer"] for row in task_kinds(read_run(path))[0][:2]] == [1, 3], "files that do not say so"
    assert source == "eval/00000040-a.json, eval/<task>/share_<kind>" and not remarks
    assert list(benchmarks([read_run(path)])) == ["piqa/acc"], "shares are no results of a benchmark"
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 50, "tokens": 5000, "eval/sciq/share_ffn": 0.75}) + "\n")
    later, *_ = [row for row in task_kinds(read_run(path))[0] if row["source"] == "sciq"]
    assert (later["layer"], later["ffn"]) == (None, 0.75), "training went on after `moepp eval`"
    (path / "eval/00000040-a.json").rename(path / "eval/00000050-a.json")
    (path / "eval/00000051-a.json").write_text("{")
    page = write_run_page(read_run(path), ReportInputs(), tmp_path / "page").read_text()
    assert "Expert kinds by evaluation task" in page and "Share of FFN experts: 50.0% (sciq) to 30.0% (piqa)" in page
    assert "Expert kinds by task: " in page and "00000051-a.json" in page


@pytest.mark.parametrize("kinds", [{"ffn": [2.0]}, {"ffn": ["x"]}, {"ffn": [0.5], "zero": [0.5, 0.5]}, {"ffn": []}])
def test_damaged_shares_are_refused(tmp_path: Path, kinds: dict):
    write_results(tmp_path / "r.json", [replace(result("sciq", 0.4), kinds=kinds)], Subject("run"), {})
    with pytest.raises(RunError, match="is not a file that `moepp eval` wrote"):
        read_results(tmp_path / "r.json")
    write_results(tmp_path / "l.json", [replace(result("sciq", 0.4), layers=[1])], Subject("run"), {})
    with pytest.raises(RunError, match="not as many layers"):
        read_results(tmp_path / "l.json")
    write_results(tmp_path / "old.json", [result("sciq", 0.4)], Subject("run"), {})
    content = json.loads((tmp_path / "old.json").read_text())
    del content["results"][0]["kinds"], content["results"][0]["tokens"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert read_results(tmp_path / "old.json")[0].kinds == {}, "files of before it was counted"
