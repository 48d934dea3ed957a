"""Figures of the questions that the paper leaves open: traffic, long contexts, swapped routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moepp.analysis.figures import Figure
from moepp.analysis.model_pages import line_figure
from moepp.analysis.token_tables import Rows


def _pick(rows: Rows, x: str, y: str, **wanted: object) -> tuple[list[float], list[float]]:
    """Return (x, y) columns of the rows that have these values."""
    part = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return [row[x] for row in part], [row[y] for row in part]


def communication_figures(rows: Rows) -> list[Figure]:
    """Draw bytes per token by expert-parallel size, and what is saved by tau."""
    source = "communication.parquet"
    names = list(dict.fromkeys(row["model"] for row in rows))
    lines = {name: _pick(rows, "ranks", "bytes_per_token", model=name) for name in names}
    lines["everything sharded"] = _pick(rows, "ranks", "everything_sharded", model=names[0])
    last = {row["model"]: row for row in rows}
    saved = ", ".join(f"{name} {row['saved']:.0%}" for name, row in last.items())
    caption = (
        "Saved against sharding every kind over the ranks, which sends all choices as a vanilla MoE of the same top-k "
        f"does: {saved}. The share is the same for every number of ranks: it is that of choices that are no FFN expert."
    )
    measured = [f"{name} {row['measured']:.0%}" for name, row in last.items() if row["measured"] is not None]
    if measured:
        caption += f" Counted while training, with its drops: {', '.join(measured)}."
    title = "Expert-parallel traffic by number of ranks"
    labels = ("expert-parallel ranks", "bytes per token and step")
    figures = [line_figure("communication", title, caption, lines, labels, source)]
    points = sorted((row["tau"], row["saved"], row["balanced"]) for row in last.values() if row["tau"] is not None)
    if len({tau for tau, *_ in points}) > 1:
        taus = [tau for tau, *_ in points]
        lines = {"measured": (taus, [saved for _, saved, _ in points])}
        lines["perfect balance loss"] = (taus, [balanced for *_, balanced in points])
        most = max(points, key=lambda point: point[1])
        off = max(abs(saved - balanced) for _, saved, balanced in points)
        caption = (
            f"Most is saved at tau {most[0]:g} ({most[1]:.0%}). What is measured is up to {off:.1%} of the traffic "
            "away from what a perfect balance loss gives."
        )
        labels = ("tau", "share of the traffic saved")
        figures.append(line_figure("saved-by-tau", "Traffic saved by tau", caption, lines, labels, source))
    return figures


def long_context_figures(rows: Rows) -> list[Figure]:
    """Draw agreement, entropy and loss by position."""
    figures = []
    trained = {row["model"]: row["trained_length"] for row in rows}
    series = list(dict.fromkeys((row["model"], row["residuals"]) for row in rows))
    several = len({model for model, _ in series}) > 1
    for column, title, unit in (
        ("agreement", "Routing beyond the trained length", "share of experts as in a window"),
        ("entropy", "Router entropy by position", "entropy of the router, nats"),
        ("loss", "Loss by position", "cross-entropy, nats per token"),
    ):
        lines, ends = {}, []
        for model, residuals in series:
            label = f"{model}, {residuals}" if several else residuals
            x, y = lines[label] = _pick(rows, "first", column, model=model, residuals=residuals)
            within = [value for place, value in zip(x, y, strict=True) if place < trained[model]]
            ends.append(f"{label}: {sum(within) / len(within):.3f} within the trained length, {y[-1]:.3f} at the end")
        caption = f"{'; '.join(ends)}. {_trained_text(trained)}"
        if column == "agreement":
            caption += " The first window is the beginning of the sequence itself, so it agrees by construction."
        labels = ("position in the sequence", unit)
        figures.append(line_figure(f"long-{column}", title, caption, lines, labels, "long-context.parquet"))
    return figures


def _trained_text(trained: Mapping[str, int]) -> str:
    if len(set(trained.values())) == 1:
        return f"Trained on {next(iter(trained.values()))} tokens."
    return f"Trained on sequences of {', '.join(f'{length} ({model})' for model, length in trained.items())} tokens."


_QUARTERS = {0: "all tokens", 1: "easiest quarter", 2: "second", 3: "third", 4: "hardest quarter"}


def robustness_figures(rows: Rows) -> list[Figure]:
    """Draw the loss that swapped routing costs, by how hard the token is."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    return [_robustness(rows, name, "" if len(names) == 1 else f"-{n}") for n, name in enumerate(names)]


def _robustness(rows: Rows, name: str, ending: str) -> Figure:
    lines = {label: _pick(rows, "share", "increase", model=name, quarter=n) for n, label in _QUARTERS.items()}
    shares, all_tokens = lines["all tokens"]
    ends: Sequence[tuple[float, str]] = sorted((y[-1], label) for label, (_, y) in lines.items())
    (least, easy), (most, hard) = ends[0], ends[-1]
    caption = (
        f"With the routing of {shares[-1]:.0%} of the tokens swapped, the loss of all changes by {all_tokens[-1]:+.3f} "
        f"nats: most for the {hard} ({most:+.3f}), least for the {easy} ({least:+.3f})."
    )
    title = "Loss when routing is swapped" + (f": {name}" if ending else "")
    labels = ("share of tokens with swapped routing", "change of the loss, nats")
    return line_figure(f"robustness{ending}", title, caption, lines, labels, "robustness.parquet")
