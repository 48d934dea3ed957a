"""Pages of runs in a real browser: on a phone and on a wide screen, light and dark, for everybody, without a network.

Needs the extra "browser" and a Chromium of the system; skipped elsewhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moepp.analysis import figures
from moepp.analysis.charts import curve_charts
from moepp.analysis.comparison import compare
from moepp.analysis.page import Page
from moepp.analysis.report import write_comparison, write_run_page
from moepp.analysis.runs import find_runs, read_run
from moepp.runs.report import ReportInputs
from tests.run_files import make_run, write_routing, write_token_tables

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'moepp[browser]'")
axe = pytest.importorskip("axe_playwright_python.base", reason="needs axe: pip install 'moepp[browser]'")

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs a Chromium of the system (apt install chromium)")

PHONE, DESK = (390, "dark"), (1400, "light")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        opened = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of a run with everything in it, one of several runs, and a short one."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_png", lambda draw: b"")
        return _write_pages(folder, patch)


def _write_pages(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Path]:
    run = make_run(folder / "runs", "a-run-with-a-rather-long-name-seed-1", seed=1)
    make_run(folder / "runs", "a-run-with-a-rather-long-name-seed-2", seed=2, shift=0.1)
    make_run(folder / "runs", "vanilla", ffn=1.5, vanilla=True)
    write_routing(run)
    write_token_tables(run)
    one = write_run_page(read_run(run), ReportInputs(samples=("Once [...] upon a time",)), folder / "one")
    # Drawing costs more than all that is looked at here: other pages show one drawing under all names.
    drawing = curve_charts([read_run(run)])[0].svg
    patch.setattr(figures, "_svg", lambda name, *_: drawing.replace("loss-over-tokens-", f"{name}-"))
    found = find_runs([str(folder / "runs")])
    several = write_comparison(found.runs, folder / "several", left_out=("x is left out",))
    page = Page("Short", "A page.")
    page.figures(curve_charts(found.runs)[:1])
    page.table(compare(found.runs), "One row per run")
    (folder / "short.html").write_text(page.render())
    return {"one": one, "several": several, "short": folder / "short.html"}


def faults(browser: Any, path: Path, width: int, scheme: str) -> list[str]:
    """Open a page and return what is wrong with it."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    requests: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    try:
        page.goto(path.as_uri())
        found = [f"request to {url}" for url in requests if url != path.as_uri()]
        found += [f"console: {text}" for text in problems]
        wide = page.evaluate("document.documentElement.scrollWidth")
        found += [f"overflow: {wide} of {width} pixels"] if wide > width else []
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        wide = page.evaluate("document.documentElement.scrollWidth")
        found += [f"overflow with everything unfolded: {wide} of {width} pixels"] if wide > width else []
        small = page.evaluate(
            "[...document.querySelectorAll('figure svg')].filter(svg => svg.getBoundingClientRect().width < 250).length"
        )
        found += [f"{small} drawings are narrower than 250 pixels"] if small else []
        page.evaluate(axe.AXE_FILE_PATH.read_text())
        # A drawing is one image with a name; its hundreds of parts cost seconds and are nothing to a reader.
        script = "axe.run({exclude: ['figure svg > *']}, {resultTypes: ['violations']})"
        violations = page.evaluate(script)["violations"]
        return found + [f"axe: {one['id']}" for one in violations if one["impact"] in ("serious", "critical")]
    finally:
        page.close()


@pytest.mark.parametrize(("width", "scheme"), [PHONE, DESK])
@pytest.mark.parametrize("name", ["one", "several"])
def test_page_fits_reads_and_fetches_nothing(browser, pages, name, width, scheme):
    assert pages[name].read_text().count("<figure>") > 5
    assert faults(browser, pages[name], width, scheme) == []


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("--muted: #9ba6b2", "--muted: #3f454b", "axe: color-contrast"),
        (".scroll { overflow-x: auto;", ".scroll {", "overflow"),
        ("<main>", '<main><img alt="" src="https://example.org/x.png">', "request to https://example.org/x.png"),
        ('role="img" aria-label', 'role="img" data-label', "axe: svg-img-alt"),
    ],
)
def test_a_page_that_is_broken_is_noticed(browser, pages, tmp_path, before, after, fault):
    text = pages["short"].read_text()
    assert before in text
    (tmp_path / "broken.html").write_text(text.replace(before, after))
    assert any(found.startswith(fault) for found in faults(browser, tmp_path / "broken.html", *PHONE))
