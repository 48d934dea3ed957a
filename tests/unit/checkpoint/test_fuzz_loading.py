"""Mutated checkpoints, weights, configurations and results: each is read, or refused in one line.

None crashes the process, hangs for more than 10 seconds, takes memory beyond its limit, or leaves a file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from moepp.checkpoint import format as fmt
from moepp.checkpoint.storage import write_tensors
from moepp.config import to_dict
from moepp.evaluation.results import BenchmarkResult, Subject, write_results
from moepp.interop import hf
from moepp.interop.official import TokenIds
from moepp.interop.weights import whole_parameters
from tests.checkpoint_cases import make_info
from tests.data_files import make_config
from tests.evaluation_cases import tiny_config
from tests.fuzz_loading import KINDS
from tests.official_cases import released_config, released_tensors

ROOT = Path(__file__).resolve().parents[3]
INPUTS, SAMPLE = 120, 8  # of each kind, in the slow suite and in the default one


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole example of everything that is mutated."""
    place = tmp_path_factory.mktemp("template")
    cfg = make_config(paths=["nowhere"])
    cfg = replace(cfg, model=replace(cfg.model, vocab_size=16, max_seq_len=8))
    checkpoint = place / "step-00000010"
    checkpoint.mkdir()
    tensors = {f"{name}/fp32": torch.zeros(shape) for name, shape in whole_parameters(cfg.model).items()}
    tensors |= {"lm_head.weight/step": torch.ones(1), "rank-0/rng.cpu": torch.zeros(8)}
    files = write_tensors(checkpoint, tensors, None)
    info = json.dumps(asdict(make_info(10, config=to_dict(cfg))))
    fmt.write_manifest(checkpoint, files | {fmt.INFO: fmt.write_durably(checkpoint / fmt.INFO, info)})
    _write_weights(place)
    run = place / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(cfg)))
    lines = ({"step": step, "tokens": 10 * step, "train/loss": 1 / step, "x": None} for step in range(1, 5))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = BenchmarkResult("piqa", {"acc": 0.5}, {"acc": 0.1}, 0.5, 0, 10, 20, 0, "here", ("a note",))
    write_results(run / "results.json", [result], Subject("run", 1, 2), {})
    return place


def _write_weights(place: Path) -> None:
    config = released_config()
    tensors = released_tensors(config)
    for name in ("weights", "shards", "bin"):
        (place / name).mkdir()
        (place / name / "config.json").write_text(json.dumps(config))
    save_file(tensors, place / "weights" / "model.safetensors")
    torch.save(tensors, place / "bin" / "pytorch_model.bin")
    keys = sorted(tensors)
    halves = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, names in halves.items():
        save_file({key: tensors[key] for key in names}, place / "shards" / name)
    weight_map = {key: name for name, names in halves.items() for key in names}
    (place / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    cfg, own = tiny_config(), place / "own"
    own.mkdir()
    (own / "config.json").write_text(json.dumps(hf.config.hf_config(cfg, TokenIds(), "float32")))
    shapes = ((n if n.startswith("lm_head") else f"model.{n}", s) for n, s in whole_parameters(cfg).items())
    save_file({key: torch.zeros(shape) for key, shape in shapes}, own / "model.safetensors")


def outcomes(template: Path, workplace: Path, kind: str, count: int) -> dict[int, str]:
    """How each input ended; a process that died on one is started again behind it."""
    ended: dict[int, str] = {}
    first = 0
    while first < count:
        command = [sys.executable, "-m", "tests.fuzz_loading", str(template), str(workplace), kind]
        command += [str(first), str(count - first)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"number"')]
        assert lines, done.stderr[-2000:]
        ended |= {line["number"]: line["outcome"] for line in lines if "outcome" in line}
        last = lines[-1]["number"]
        if last not in ended:
            ended[last] = f"DIED with {done.returncode}: {done.stderr[-500:]}"
        first = last + 1
    return ended


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_mutated_is_read(template: Path, tmp_path: Path, kind: str) -> None:
    """Else the mutated would be refused for another reason."""
    folder, _, read = KINDS[kind]
    read(shutil.copytree(template / folder, tmp_path / folder))


def check(ended: dict[int, str], kind: str, count: int) -> None:
    counts = Counter(ended.values())
    print(f"{kind}: {count} inputs, {counts['read']} read, {counts['refused']} refused")
    bad = {number: outcome for number, outcome in ended.items() if outcome not in ("read", "refused")}
    assert not bad, f"{kind}: {bad}"
    assert len(ended) == count and "refused" in ended.values()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_read_or_refused(
    template: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, two_at_a_time: Callable[..., dict[int, str]]
) -> None:
    folder = tmp_path_factory.mktemp
    check(two_at_a_time("kind", lambda kind: outcomes(template, folder("mutated"), kind, INPUTS)), kind, INPUTS)


@pytest.mark.parametrize("kind", ["index"])
def test_a_few_mutated_files_are_read_or_refused(template: Path, tmp_path: Path, kind: str) -> None:
    check(outcomes(template, tmp_path, kind, SAMPLE), kind, SAMPLE)
