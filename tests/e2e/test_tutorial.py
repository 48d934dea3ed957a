"""docs/tutorial.md works as it is written: every block is run, in order, in a copy of the project.

The model alone is smaller than the demo's. What comes after training is two strands that need nothing of each other,
and each is run in its order beside the other: most of their time goes to start programs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.docs_checks import FENCE, ROOT

SMALL_MODEL = """model:
  hidden_size: 64
  num_layers: 2
  num_heads: 4
  num_kv_heads: 2
  moe: {ffn_hidden_size: 128}
"""
ACTIVATE = "source .venv/bin/activate"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The files that training needs, where nothing of this checkout is touched."""
    folder = tmp_path / "project"
    for name in ("moepp", "configs", "data_tools"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def run_block(language: str, body: str, project: Path) -> str:
    """Run a block, or put a configuration where the text says; its output."""
    if language == "yaml":
        body = body.replace("model:\n", SMALL_MODEL)
        assert SMALL_MODEL in body
        (project / "configs/experiment/mine.yaml").write_text(body)
    if language not in ("sh", "python"):
        return ""
    command = ["bash", "-euo", "pipefail", "-c", body] if language == "sh" else [sys.executable, "-c", body]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=project,
        timeout=600,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(project), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"{body}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_blocks(text: str, project: Path) -> str:
    """Run the blocks of a part of the page; the output of the last that prints."""
    output = ""
    for language, body in FENCE.findall(text):
        if body.strip() != ACTIVATE:
            output = run_block(language, body, project) or output
            print(output)
    return output


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_tutorial_works_as_written(project):
    training, rest = (ROOT / "docs/tutorial.md").read_text().split("\n## 5. Sweep\n")
    comparison, use = rest.split("\n## 7. Generate and evaluate\n")
    run_blocks(training, project)
    with ThreadPoolExecutor(2) as strands:
        _, output = strands.map(lambda text: run_blocks(text, project), (comparison, use))
    assert output.startswith("The import statement"), output  # the last block prints the exported model's text
    assert (project / "runs/mine/checkpoints/step-00000080").is_dir()
    records = [json.loads(line) for line in (project / "runs/mine/metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert losses[-1] < losses[0] - 0.5
    assert (project / "comparison/report.html").stat().st_size > 1000
    assert {path.name for path in (project / "runs").iterdir()} == {"mine", "tau-0.25", "tau-0.75"}
