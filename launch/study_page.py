"""The tables and plots of docs/study.md from docs/study/*.csv: ``python launch/study_page.py``.

Fills in what stands on the page between ``<!-- NAME -->`` and ``<!-- /NAME -->``, and draws docs/study/*.png.
"""

from __future__ import annotations

import csv
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, FOLDER = DOCS / "study.md", DOCS / "study"
Rows = list[dict[str, Any]]


def read(name: str) -> Rows:
    """Return the rows of a table in docs/study."""
    with open(FOLDER / f"{name}.csv", newline="") as stream:
        return list(csv.DictReader(stream))


@dataclass(frozen=True)
class Curve:
    """Evaluations of one run."""

    name: str
    steps: list[int]
    tokens: list[int]
    losses: list[float]
    ffn_rows: list[float]
    ffn_per_token: list[float]
    max_over_mean: list[float]

    @property
    def twin(self) -> str:
        setting, seed = self.name.rsplit("-", 1)
        return f"{setting.replace('moepp', 'vanilla') if setting.startswith('moepp_') else 'vanilla'}-{seed}"

    def loss_at(self, tokens: int) -> float | None:
        """Return the validation loss after exactly this many tokens; None if the run has not got there."""
        return self.losses[self.tokens.index(tokens)] if tokens in self.tokens else None

    def loss_at_rows(self, ffn_rows: float) -> float | None:
        """Return the validation loss once so many FFN rows were computed, on a line between evaluations."""
        at = bisect_left(self.ffn_rows, ffn_rows)
        if at == 0 or at == len(self.ffn_rows):
            return None
        share = (ffn_rows - self.ffn_rows[at - 1]) / (self.ffn_rows[at] - self.ffn_rows[at - 1])
        return self.losses[at - 1] + share * (self.losses[at] - self.losses[at - 1])


def curves() -> dict[str, Curve]:
    """Return the validation curve of every run."""
    found: dict[str, Curve] = {}
    for row in read("curves"):
        one = found.setdefault(row["run"], Curve(row["run"], [], [], [], [], [], []))
        one.steps.append(int(row["step"]))
        one.tokens.append(int(row["tokens"]))
        one.losses.append(float(row["eval_loss"]))
        one.ffn_rows.append(float(row["ffn_rows"]))
        one.ffn_per_token.append(float(row["ffn_per_token"]))
        one.max_over_mean.append(float(row["max_over_mean"]))
    return found


def mixture(rows: Rows) -> float:
    """Return the loss over the sources by their weights in training."""
    return sum(float(row["weight"]) * float(row["loss"]) for row in rows) / sum(float(row["weight"]) for row in rows)


# --- the page ---------------------------------------------------------------------------------------------------------

EARLY, LAST = 2_457_600, 8_192_000  # tokens at which runs are compared
OTHER_PAIRS = [f"{model}_{how}-seed1" for how in ("lr_0.001", "lr_0.008", "init_0.1") for model in ("moepp", "vanilla")]
MAIN, VANILLA = "moepp-seed1", "vanilla-seed1"
TITLES = {
    "moepp": "MoE++, τ = 0.75",
    "vanilla": "vanilla twin",
    "tau_0.25": "MoE++, τ = 0.25",
    "tau_0.5": "MoE++, τ = 0.5",
    "tau_1": "MoE++, τ = 1",
    "no_gating_residual": "no gating residual",
    "constant_init_0.02": "constant vectors start at N(0, 0.02)",
    "no_constant": "no constant experts",
    "no_copy": "no copy expert",
    "no_zero": "no zero expert",
    "only_zero": "zero expert alone",
    "beta_0.001": "β = 0.001",
    "vanilla_beta_0.001": "vanilla twin, β = 0.001",
    "vanilla_gating_residual": "vanilla twin with gating residual",
    "moepp_lr_0.001": "MoE++, learning rate 1e-3",
    "vanilla_lr_0.001": "vanilla twin, learning rate 1e-3",
    "moepp_init_0.1": "MoE++, initial weights N(0, 0.1)",
    "vanilla_init_0.1": "vanilla twin, initial weights N(0, 0.1)",
    "moepp_lr_0.008": "MoE++, learning rate 8e-3",
    "vanilla_lr_0.008": "vanilla twin, learning rate 8e-3",
    "balance_micro_batch": "balance over micro-batches of 1,024 tokens",
}


def title(name: str) -> str:
    """Return what a run is called on the page."""
    setting, seed = name.rsplit("-", 1)
    return TITLES[setting] + ("" if seed == "seed1" else f", seed {seed[-1]}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, with the empty lines that it needs around it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n"


def number(value: float | None, pattern: str = "{:.3f}") -> str:
    """Return a number as text with a true minus sign; a dash for none."""
    return "–" if value is None else pattern.format(value).replace("-", "−")


def equal_tokens(tokens: int, names: Sequence[str]) -> str:
    """Compare the runs that got to ``tokens``: loss, cost, and the twin's loss at equal tokens and expert FLOPs."""
    found, rows = curves(), []
    for name in names:
        one = found.get(name)
        if one is None or (loss := one.loss_at(tokens)) is None:
            continue
        at = one.tokens.index(tokens)
        twin = found.get(one.twin)
        same_tokens = twin.loss_at(tokens) if twin else None
        same_flops = twin.loss_at_rows(one.ffn_rows[at]) if twin else None
        is_twin = name.startswith("vanilla")
        rows.append(
            [
                title(name),
                number(loss),
                "" if is_twin or same_tokens is None else number(loss - same_tokens, "{:+.3f}"),
                number(one.ffn_rows[at] / one.tokens[at], "{:.2f}"),
                "" if is_twin else number(same_flops),
                "" if is_twin or same_flops is None else number(loss - same_flops, "{:+.3f}"),
                number(one.max_over_mean[at], "{:.2f}"),
            ]
        )
    header = ["run", "loss, nats", "minus twin, equal tokens", "FFN experts per token"]
    header += ["twin's loss at equal expert FLOPs", "minus twin, equal expert FLOPs", "FFN load, max/mean"]
    return table(header, rows)


def ablations() -> str:
    """Compare every run with MoE++ of the same seed, early and at the end; runs that got to the end come first."""
    found, rows = curves(), []
    for name, one in found.items():
        setting, seed = name.rsplit("-", 1)
        base = found.get(f"moepp-{seed}")
        if setting == "moepp" or base is None:
            continue
        early, last = (_difference(one, base, tokens) for tokens in (EARLY, LAST))
        if early is None:
            continue
        at = one.tokens.index(EARLY if last is None else LAST)
        cells = [title(name), number(one.losses[at]), number(early, "{:+.3f}"), number(last, "{:+.3f}")]
        cells += [number(one.ffn_rows[at] / one.tokens[at], "{:.2f}"), number(one.max_over_mean[at], "{:.2f}")]
        rows.append(((last is None, early if last is None else last), cells))
    header = ["run", "loss where it ends, nats", "minus MoE++ of the same seed, 2.46 M tokens", "8.19 M tokens"]
    header += ["FFN experts per token", "FFN load, max/mean"]
    return table(header, [cells for _, cells in sorted(rows, key=lambda row: row[0])])


def _difference(one: Curve, base: Curve, tokens: int) -> float | None:
    loss, reference = one.loss_at(tokens), base.loss_at(tokens)
    return None if loss is None or reference is None else loss - reference


def seeds() -> str:
    """Tabulate the pair over its seeds: mean and standard deviation of each, and of their difference by seed."""
    found, rows = curves(), []
    ones = [one for name, one in found.items() if name.rsplit("-", 1)[0] == "moepp" and one.twin in found]
    for tokens in (EARLY, LAST):
        both = [(one.loss_at(tokens), found[one.twin].loss_at(tokens)) for one in ones]
        rows.append([f"{tokens / 1e6:.2f} million tokens, the curves' 32,768 tokens", *_spread(both)])
    by_run = _sources_at_the_end()
    measured = [one for one in ones if one.name in by_run and one.twin in by_run]
    both = [(mixture(by_run[one.name]), mixture(by_run[one.twin])) for one in measured]
    rows.append(["8.19 million tokens, the mixture of larger sets", *_spread(both)])
    return table(["measured at", "seeds", "MoE++", "vanilla twin", "MoE++ minus twin", "by seed"], rows)


def _spread(pairs: Sequence[tuple[float | None, float | None]]) -> list[str]:
    full = [(one, twin) for one, twin in pairs if one is not None and twin is not None]
    gaps = [one - twin for one, twin in full]

    def cell(values: Sequence[float], pattern: str) -> str:
        text = number(fmean(values), pattern)
        return f"{text} ± {stdev(values):.3f}" if len(values) > 1 else text

    ones, twins = [one for one, _ in full], [twin for _, twin in full]
    by_seed = ", ".join(number(gap, "{:+.3f}") for gap in gaps)
    return [str(len(full)), cell(ones, "{:.3f}"), cell(twins, "{:.3f}"), cell(gaps, "{:+.3f}"), by_seed]


def progress() -> str:
    """Tell which runs are how far."""
    rows = [[f"`{one.name}`", f"{one.steps[-1]:,}", f"{one.tokens[-1] / 1e6:.2f}"] for one in curves().values()]
    return table(["run", "steps of 1,000", "million tokens"], rows)


def larger_set() -> str:
    """Tabulate the loss of the checkpoints at the last step on every source's validation documents."""
    done = _sources_at_the_end()
    if VANILLA not in done:
        return "\n"
    names = [row["source"] for row in done[VANILLA]]
    rows = []
    for name, own in sorted(done.items(), key=lambda item: mixture(item[1])):
        losses = [number(float(row["loss"]), "{:.2f}") for row in own]
        rows.append([title(name), number(mixture(own)), *losses])
    return table(["run", "mixture", *names], rows)


def _sources_at_the_end() -> dict[str, Rows]:
    by_run: dict[str, Rows] = {}
    for row in read("sources"):
        by_run.setdefault(row["run"], []).append(row)
    return {name: rows for name, rows in by_run.items() if rows[0]["step"] == "1000"}


def layers() -> str:
    """Tabulate how each layer of some runs routes at the end of what was trained."""
    rows = []
    for row in read("layers"):
        if row["run"] in (MAIN, VANILLA, "tau_0.25-seed1", "no_gating_residual-seed1"):
            shares = [number(float(row[f"share_{kind}"]), "{:.2f}") for kind in ("ffn", "constant", "copy", "zero")]
            load = number(float(row["max_over_mean"]), "{:.2f}")
            rows.append([title(row["run"]), f"{int(row['step']):,}", row["layer"], *shares, load])
    header = ["run", "step", "layer", "FFN", "constant", "copy", "zero", "FFN load, max/mean"]
    return table(header, rows)


def long_context() -> str:
    """Tabulate routing within and beyond the 256 tokens of training, by position."""
    rows = []
    for row in _read_if_there("long-context"):
        if row["first"] in ("128", "256", "896"):
            position = f"{row['first']}–{row['last']}"
            numbers = [number(float(row[key])) for key in ("agreement", "entropy", "loss", "loss_in_windows")]
            rows.append([title(row["model"]), row["residuals"], position, *numbers])
    header = [
        "run",
        "gating residuals",
        "position",
        "agreement",
        "router entropy, nats",
        "loss",
        "loss in windows of 256",
    ]
    return table(header, rows)


def robustness() -> str:
    """Tabulate the rise of the loss when a share of the tokens is swapped, by the token's loss without."""
    rows: dict[tuple[str, str], list[str]] = {}
    for row in _read_if_there("robustness"):
        start = [title(row["model"]), f"{float(row['share']):.0%}"]
        rows.setdefault((row["model"], row["share"]), start).append(number(float(row["increase"]), "{:+.3f}"))
    header = ["run", "tokens swapped", "all tokens", "easiest quarter", "second", "third", "hardest quarter"]
    return table(header, [row for (_, share), row in rows.items() if float(share) > 0])


def communication() -> str:
    """Tabulate bytes between 8 expert-parallel ranks."""
    rows = []
    for row in _read_if_there("communication"):
        if row["ranks"] == "8":
            sent = [f"{float(row[key]):,.0f}" for key in ("bytes_per_token", "vanilla", "everything_sharded")]
            rows.append([title(row["model"]), *sent, *(f"{float(row[key]):.1%}" for key in ("saved", "balanced"))])
    header = ["run", "bytes per token", "vanilla MoE", "all experts sharded", "saved", "saved at perfect balance"]
    return table(header, rows)


def _read_if_there(name: str) -> Rows:
    return read(name) if (FOLDER / f"{name}.csv").exists() else []


def filled(page: str) -> str:
    """Return the page with every table between its marks made anew.

    Raises:
        KeyError: a mark that names no table.
    """
    pair = [f"{setting}-seed{n}" for n in (1, 2, 3) for setting in ("moepp", "vanilla")]
    main = [*pair, "tau_0.25-seed1", "tau_0.5-seed1", "tau_1-seed1", "no_gating_residual-seed1"]
    parts: dict[str, str] = {
        "main": equal_tokens(LAST, [*main, *OTHER_PAIRS]),
        "seeds": seeds(),
        "early": equal_tokens(EARLY, [*main, *OTHER_PAIRS]),
        "layers": layers(),
        "ablations": ablations(),
        "progress": progress(),
        "larger-set": larger_set(),
        "long-context": long_context(),
        "robustness": robustness(),
        "communication": communication(),
    }
    return re.sub(
        r"<!-- (\S+) -->.*?<!-- /\1 -->", lambda m: f"<!-- {m[1]} -->{parts[m[1]]}<!-- /{m[1]} -->", page, flags=re.S
    )


def draw_plots() -> None:
    """Write the page's figures, on white."""
    found = curves()
    main = [n for n in (MAIN, VANILLA, "tau_0.25-seed1", "tau_0.5-seed1", "tau_1-seed1") if n in found]
    lines = {title(n): ([t / 1e6 for t in found[n].tokens[1:]], found[n].losses[1:]) for n in main}
    _plot("loss-tokens", lines, "training tokens, millions", "validation loss, nats")
    lines = {title(n): ([r / 1e6 for r in found[n].ffn_rows[1:]], found[n].losses[1:]) for n in main}
    _plot("loss-flops", lines, "tokens × FFN experts per token, millions", "validation loss, nats")
    base, lines = found[MAIN], {}
    drawn = ("vanilla", "no_constant", "no_copy", "no_zero", "no_gating_residual", "beta_0.001")
    for one in (found[name] for setting in drawn if (name := f"{setting}-seed1") in found):
        both = [(t, loss, base.loss_at(t)) for t, loss in zip(one.tokens, one.losses, strict=True)]
        gaps = [(t / 1e6, loss - reference) for t, loss, reference in both if reference is not None]
        lines[title(one.name)] = ([t for t, _ in gaps], [gap for _, gap in gaps])
    _plot("ablations", lines, "training tokens, millions", "loss minus MoE++'s, nats")


def _plot(name: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> None:
    from moepp.analysis import figures

    def draw(axes: Any, palette: Any) -> None:
        for number_, (label, (xs, ys)) in enumerate(lines.items()):
            axes.plot(xs, ys, label=label, linewidth=1.6, **palette.line(number_))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        figures.legend(axes)

    (FOLDER / f"{name}.png").write_bytes(figures.Figure(name, name, y, draw).png)


def main() -> None:
    """Draw the plots and fill the page's tables."""
    draw_plots()
    PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
