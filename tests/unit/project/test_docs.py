"""The pages build, and name no link, command, option, key, metric or file that does not exist."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from moepp.config import MoEConfig, known_keys
from moepp.distributed.stage_clock import STAGES
from moepp.metrics.norms import MODULES, ModuleNorms
from moepp.metrics.routing import COLUMNS, RoutingTable
from moepp.metrics.stage_times import stage_metrics
from moepp.moe.observation import num_columns
from tests import docs_checks
from tests.docs_checks import ROOT, blocks, broken_links, missing_files, wrong_commands, wrong_keys

PAGES = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / f"{n}.md" for n in ("README", "CONTRIBUTING", "SECURITY"))]
# Names of the past, beside the numbers that were measured under them.
HISTORY = ROOT / "docs/benchmarks.md"
MAX_README_LINES = 180
METRIC = re.compile(r"(?:train|optim|throughput|memory|routing|comm|eval|time|norm|data)/[a-z_]+(?![\w/.-])")
NEEDED = ("mkdocs", "material", "mkdocstrings", "latex2mathml")

page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_hooks"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_site_builds_without_a_warning(tmp_path):
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"{', '.join(absent)} not installed; pip install -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    keys = (tmp_path / "site/configuration/index.html").read_text()
    assert "<code>optim.lr</code>" in keys
    assert "MoELayer" in (tmp_path / "site/api/index.html").read_text()
    for built in (tmp_path / "site").rglob("*.html"):
        text = built.read_text()
        assert not re.search(r"EQUATION\d|<script[^>]* src=\"https?:|<link[^>]* href=\"https?:[^>]*stylesheet", text)


def test_figure_and_page_of_the_rooms_show_every_room():
    """Every package of moepp, in the order in which they may import."""
    rooms = {path.parent.name for path in (ROOT / "moepp").glob("*/__init__.py")}
    figure, page = ((ROOT / "docs" / name).read_text() for name in ("rooms.svg", "architecture.md"))
    drawn = re.findall(r'font-weight="bold">(\w+)</text>', figure)
    assert rooms <= set(drawn) and {room for room in rooms if f"`moepp/{room}/`" not in page} == set()
    layers = re.search(r"^layers = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert layers is not None
    rank = {name: i for i, name in enumerate(re.findall(r"\w+", layers[1]))}
    places = re.findall(r'<rect x="(\d+)" y="(\d+)" width="\d+" height="52"', figure)
    assert len(places) == len(drawn)
    for (_, y), name in zip(places, drawn, strict=True):
        for (_, other_y), other in zip(places, drawn, strict=True):
            assert int(y) >= int(other_y) or rank[name] < rank[other] or y == other_y, (name, other)


@page
def test_links_lead_somewhere(page):
    assert broken_links(page, page.read_text()) == []


@page
def test_commands_shown_exist(page):
    assert wrong_commands(page.read_text()) == []


@page
def test_configuration_keys_named_exist(page):
    if page != HISTORY:
        assert wrong_keys(page.read_text()) == []


@page
def test_files_named_exist(page):
    if page != HISTORY:
        assert missing_files(page.read_text()) == []


@page
def test_python_shown_is_python(page):
    for block in blocks(page.read_text(), "python"):
        if not block.lstrip().startswith("return"):  # a line cut out of a function
            ast.parse(block)


@pytest.mark.parametrize(
    "text",
    [
        "```sh\nmoepp trian\n```",
        "```sh\nmoepp export runs/a b --fromat moepp\n```",
        "```sh\nmoepp checkpoint prune runs/a --kep 2\n```",
        "```sh\nmoepp train optim.learning_rate=1\n```",
        "```sh\nRESTARTS=3 launch/torchrun.sh experiment=moepp_3b\n```",
        "```sh\nlaunch/absent.sh\n```",
        "```sh\ntorchrun --nprocs 2 train.py\n```",
        "```sh\ntorchrun --nproc_per_node 2 train.py \\\n    paralel.expert=2\n```",
        "```sh\npython train.py && python -m tests.absent\n```",
        "```sh\npytest tests/unit/test_absent_*\n```",
        "Run `moepp reports runs/a`.",
    ],
)
def test_check_of_commands_notices(text):
    assert wrong_commands(text)


def test_checks_of_names_notice(tmp_path):
    (tmp_path / "b.md").write_text("# A heading, here\n")
    links = "[a](a.md) [b](b.md) [c](b.md#a-heading-here) [d](b.md#another) [e](https://example.org)"
    assert broken_links(tmp_path / "x.md", links) == ["a.md", "b.md#another"]
    assert wrong_keys("`optim.lr=1` `optim.rate` `train.py` `run.dir/config.yaml` `model.moe`") == ["optim.rate"]
    assert missing_files("`moepp/moe/layer.py` `moepp/absent.py` `tests/unit`") == ["moepp/absent.py"]


def test_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= MAX_README_LINES


def test_readme_layer_runs():
    namespace: dict[str, object] = {}
    for block in blocks((ROOT / "README.md").read_text(), "python"):
        exec(block, namespace)
    assert namespace["out"].hidden.shape == (16, 768)


def test_configuration_page_lists_every_key_with_its_type():
    table = hooks().keys_as_markdown()
    listed = set(re.findall(r"^\| `([a-z0-9_.]+)` \| <code>[^<]+</code> \|", table, re.MULTILINE))
    assert {key for key in known_keys() if key not in listed} == set()
    assert {key for key in listed if not docs_checks.is_key(key)} == set()


def test_every_key_has_a_meaning():
    rows = [line for line in hooks().keys_as_markdown().splitlines() if line.startswith("| `")]
    assert [row for row in rows if row.endswith("|  |")] == []


def test_configuration_page_takes_comments_of_several_lines():
    table = hooks().keys_as_markdown()
    row = next(line for line in table.splitlines() if line.startswith("| `init.format`"))
    assert "released MoE++" in row and "random" in row  # the first and the last line of its comment


def test_metrics_page_lists_every_metric_and_no_other():
    text = (ROOT / "docs/metrics.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`([a-z]+/[^`]+)`", row)}
    sources = [path.read_text() for path in sorted((ROOT / "moepp").rglob("*.py"))]
    strings = "\n".join(text for source in sources for text in re.findall(r'"[^"\n]*"', source))
    written = {name for name in METRIC.findall(strings) if not name.endswith("_")} - {"data/demo"}  # a folder
    assert {name for name in listed if not name.startswith("eval/<")} == written | metrics_with_composed_names()


def metrics_with_composed_names() -> set[str]:
    moe = MoEConfig(
        num_ffn_experts=2, ffn_hidden_size=4, num_constant_experts=1, num_copy_experts=1, num_zero_experts=1
    )
    columns = len(COLUMNS) + len(moe.expert_counts)
    observed_LO = np.ones((1, num_columns(moe)))
    table = RoutingTable((0,), moe, np.ones((1, columns)), np.ones((1, moe.num_experts)), observed_LO, bytes_sent=1.0)
    stages, norms = torch.ones(2, len(STAGES) + 1), torch.ones(2, len(MODULES), 2)
    names = [*table.summary(), *table.keys_per_layer(), *stage_metrics({"stages": stages})]
    names += ModuleNorms(1, torch.device("cpu")).metrics({"norms": norms}, by_layer=True)
    return {name.replace("layer_0", "layer_<i>") for name in names}


def test_messages_quoted_in_troubleshooting_are_those_of_the_program():
    text = (ROOT / "docs/troubleshooting.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)
    quoted = [span for row in rows for span in re.findall(r"`([a-z][a-z ]+ [a-z]+)`", row) if "moepp " not in span]
    sources = "\n".join(path.read_text() for path in sorted((ROOT / "moepp").rglob("*.py")))
    assert quoted and [span for span in quoted if span not in sources] == []


def test_every_page_is_on_the_site():
    listed = re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("figure", sorted((ROOT / "docs").glob("*.svg")), ids=lambda path: path.name)
def test_figure_is_readable_on_any_background(figure: Path):
    text = figure.read_text()
    width, height = re.findall(r'viewBox="0 0 (\d+) (\d+)"', text)[0]
    assert re.search(rf'<rect width="{width}" height="{height}"[^>]* fill="#fff"', text)
