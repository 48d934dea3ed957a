"""FFN experts per token by what the token is, where it stands, how frequent and how hard it is.

The questions of MoE++ (arXiv 2410.07348), Figs. 5, 6 and 8. Letters: N sequences, S tokens of each, V token types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from moepp.analysis.observe import Observed
from moepp.analysis.token_view import TokenView, layer_indices, pool

Rows = list[dict[str, Any]]
Decode = Callable[[Sequence[int]], str]
Texts = Callable[[Sequence[int]], list[str]]
FOLDER = "tokens"  # of a run: where training leaves the tables
LEAST_READ = 5  # times that a token type must be read to be in a table
_CONTEXT = 8  # tokens before an example
_EXAMPLES = 3
_BUCKETS = 10
_BINS = 20
_TEXT_TOKENS = 240


def token_tables(
    sources: Mapping[str, TokenView], decode: Decode | None = None, texts: Texts | None = None
) -> dict[str, Rows]:
    """Return every table by its name: of all sources together, and the kinds of each.

    Args:
        sources: what was read, by the name of the data.
        decode: text of token ids; None: ids are shown.
        texts: text of each token as it stands among others; None: each is decoded by itself.
    """
    seen = pool(list(sources.values()))
    return {
        "types": by_type(seen, decode, texts=texts),
        "positions": by_position(seen),
        "frequencies": by_frequency(seen),
        "losses": by_loss(seen),
        "kinds": kinds_by_layer(sources),
        "text": text_tokens(seen, decode, texts) if decode is not None else [],
    }


def by_type(seen: TokenView, decode: Decode | None = None, least: int = LEAST_READ, texts: Texts | None = None) -> Rows:
    """Return one row per token type that occurs ``least`` times or more, the most FFN experts first.

    Columns: token, text, count, ffn_per_token (mean over layers and occurrences), ffn_std (over occurrences), loss (of
    the token that follows, mean, nats), examples (with the tokens before).
    """
    ids, ffn, losses = seen.input_ids_NS.ravel(), seen.ffn_NS.ravel(), seen.losses_NS.ravel()
    length = seen.input_ids_NS.shape[1]
    order = np.argsort(ids, kind="stable")
    types, starts, counts = np.unique(ids[order], return_index=True, return_counts=True)
    rows = []
    for token, start, count in zip(types.tolist(), starts, counts.tolist(), strict=True):
        if count < least:
            continue
        places = order[start : start + count]
        text = str(token) if decode is None else _texts([token], decode, texts)[0]
        row = {"token": token, "text": text, "count": count}
        row |= {"ffn_per_token": float(ffn[places].mean()), "ffn_std": float(ffn[places].std())}
        row |= {"loss": float(losses[places].mean()), "examples": []}
        for place in places[:: max(1, count // _EXAMPLES)][:_EXAMPLES]:
            first = max(place - place % length, place - _CONTEXT)
            row["examples"].append(decode(ids[first : place + 1].tolist()) if decode else str(ids[place]))
        rows.append(row)
    return sorted(rows, key=lambda row: (-row["ffn_per_token"], row["token"]))


def explained_by_type(types: Rows) -> float | None:
    """Return the share of the variance of FFN experts per token that the token's type explains, adjusted for chance.

    That is 1 - (within types / (n - V)) / (all / (n - 1)), of the types in the table; 0 or less: nothing. None where
    all tokens use equally many experts, or every type has a single token.
    """
    counts, means, stds = (np.array([row[name] for row in types]) for name in ("count", "ffn_per_token", "ffn_std"))
    n = counts.sum()
    within = float((counts * stds**2).sum())
    total = within + float((counts * (means - np.average(means, weights=counts)) ** 2).sum()) if n else 0.0
    if n <= len(types) or total <= 1e-12 * n:
        return None
    return 1 - within / (n - len(types)) * (n - 1) / total


def by_position(seen: TokenView) -> Rows:
    """Return FFN experts and loss by the token's position in its sequence, in up to 16 buckets."""
    length = seen.input_ids_NS.shape[1]
    edges = np.unique(np.linspace(0, length, min(length, 16) + 1).astype(int))
    rows = []
    for low, high in pairwise(edges):
        part = (slice(None), slice(low, high))
        rows.append({"first": int(low), "last": int(high) - 1} | _means(seen, part))
    return rows


def by_frequency(seen: TokenView) -> Rows:
    """Return FFN experts and loss by how often the token occurs here, in tenths of all tokens from rare to frequent."""
    ids = seen.input_ids_NS
    counts = np.bincount(ids.ravel())[ids]
    return _by_rank(seen, counts, "count")


def by_loss(seen: TokenView) -> Rows:
    """Return FFN experts by the loss of the token that follows, in tenths of all tokens from easy to hard."""
    return _by_rank(seen, seen.losses_NS, "loss_of_next")


def _by_rank(seen: TokenView, values_NS: np.ndarray, name: str) -> Rows:
    order = np.argsort(values_NS.ravel(), kind="stable")
    rows = []
    for number, places in enumerate(np.array_split(order, min(_BUCKETS, len(order)))):
        values = values_NS.ravel()[places]
        part = np.unravel_index(places, values_NS.shape)
        bounds = {f"{name}_min": float(values[0]), f"{name}_max": float(values[-1])}
        rows.append({"tenth": number + 1, **bounds} | _means(seen, part))
    return rows


def _means(seen: TokenView, part: Any) -> dict[str, Any]:
    """Return means over tokens; ``ffn_error`` is the standard error, as if tokens were independent."""
    ffn = seen.ffn_NS[part]
    return {
        "tokens": int(ffn.size),
        "ffn_per_token": float(ffn.mean()),
        "ffn_error": float(ffn.std() / np.sqrt(ffn.size)),
        "loss": float(seen.losses_NS[part].mean()),
    }


def kinds_by_layer(sources: Mapping[str, TokenView]) -> Rows:
    """Return the share of each expert kind by data source and MoE layer; the shares of a row sum to 1.

    ``layer`` is the index of the transformer layer, from 0, as in metrics.
    """
    rows = []
    for source, seen in sources.items():
        for row, layer in enumerate(layer_indices(seen.layers, len(next(iter(seen.shares.values()))))):
            shares = {kind: float(share_L[row]) for kind, share_L in seen.shares.items()}
            rows.append({"source": source, "layer": layer, "tokens": int(seen.ffn_NS.size)} | shares)
    return rows


def text_tokens(seen: TokenView, decode: Decode, texts: Texts | None = None) -> Rows:
    """Return the beginning of the first sequence, token by token; joined, the column text reads as that text."""
    ids, ffn = seen.input_ids_NS[0][:_TEXT_TOKENS].tolist(), seen.ffn_NS[0][:_TEXT_TOKENS].tolist()
    pairs = zip(_texts(ids, decode, texts), ffn, strict=True)
    return [{"position": n, "text": text, "ffn_per_token": value} for n, (text, value) in enumerate(pairs)]


def _texts(ids: Sequence[int], decode: Decode, texts: Texts | None) -> list[str]:
    return [decode([i]) for i in ids] if texts is None else texts(ids)


def gate_weights(seen: Observed, cut: Observed | None) -> Rows:
    """Return how the gate weights of the first and second choice are distributed, with and without residuals (Fig. 6).

    Columns: residuals ("with", "without": cut from a model that has them; "none": of one that has none), layer (index
    of the transformer layer), choice (1 is the best), mean, std, histogram (shares of 20 equal bins of [0, 1]).
    """
    rows = []
    for name, one in (("with" if seen.cfg.gating_residual else "none", seen), ("without", cut)):
        if one is None:
            continue
        for layer, weights in zip(layer_indices(one.layers, len(one.weights_LNSK)), one.weights_LNSK, strict=True):
            for choice in range(min(2, weights.shape[-1])):
                values = weights[..., choice].ravel()
                histogram = np.histogram(values, bins=_BINS, range=(0, 1))[0] / values.size
                row = {"residuals": name, "layer": layer, "choice": choice + 1}
                row |= {"mean": float(values.mean()), "std": float(values.std()), "histogram": histogram.tolist()}
                rows.append(row)
    return rows
