"""Three questions that MoE++ (arXiv 2410.07348) leaves open, as measurements on checkpoints.

Letters: N sequences, S tokens of each, L MoE layers, K experts per token, D width, P expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moepp.analysis.observe import Change, Observed, observe
from moepp.analysis.token_tables import Rows
from moepp.config import ModelConfig
from moepp.model.accounting import balanced_ffn_per_token
from moepp.model.transformer import Transformer

SWAP_SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)
DIRECTIONS, PASSES = 2, 2  # there and back, in forward and in backward


def communication(
    name: str,
    seen: Observed,
    cfg: ModelConfig,
    element_bytes: int,
    sizes: Sequence[int],
    measured: float | None = None,
) -> Rows:
    """Return bytes that cross ranks per token and step, by expert-parallel size.

    Tokens are spread evenly over the ranks, so an expert is remote for (P - 1)/P of them. The observed routing counts,
    without drops.

    Columns: model, tau (None of a model without zero-computation experts), ranks, bytes_per_token (FFN assignments
    alone travel), vanilla (all K choices are FFN experts) and everything_sharded (zero-computation experts live on
    ranks too, so all K assignments are sent), saved (against that), balanced (what a perfect balance loss would save),
    measured (``measured``: the share that a run's own counters say).
    """
    rows, num_layers = [], len(seen.ids_LNSK)
    per_assignment = cfg.hidden_size * element_bytes * DIRECTIONS * PASSES * num_layers
    for size in sizes:
        remote = (size - 1) / size
        sent = float(seen.ffn_NS.mean()) * remote * per_assignment
        everything = cfg.moe.top_k * remote * per_assignment
        vanilla = min(cfg.moe.top_k, cfg.moe.num_ffn_experts) * remote * per_assignment
        tau = cfg.moe.tau if cfg.moe.num_zero_computation_experts else None
        row = {"model": name, "tau": tau, "ranks": size, "bytes_per_token": sent, "vanilla": vanilla}
        row |= {"everything_sharded": everything, "saved": 1 - sent / everything}
        row |= {"balanced": 1 - balanced_ffn_per_token(cfg.moe) / cfg.moe.top_k, "measured": measured}
        rows.append(row)
    return rows


def long_context(name: str, model: Transformer, tokens_NX: np.ndarray, trained_length: int) -> Rows:
    """Return how routing changes with position, beyond the length that the model was trained with.

    Each token is read twice: in its whole sequence, and in windows of the trained length that overlap by half and count
    in their later half.

    Columns: model, residuals ("with residuals", "residuals cut", or "without residuals" of a model that has none),
    trained_length, first and last position, agreement (share of a token's K experts that are the
    same in both, mean over layers), entropy (of the router, nats), loss in the whole sequence and in windows.
    """
    rows = []
    length = tokens_NX.shape[1] - 1
    step = max(trained_length // 2, 1)
    has_residuals = model.cfg.moe.gating_residual
    variants = {"with residuals": True, "residuals cut": False} if has_residuals else {"without residuals": True}
    for label, residuals in variants.items():
        change = Change(residuals=residuals)
        whole = observe(model, tokens_NX, change)
        ids_LNSK, losses_NS = _in_windows(model, tokens_NX, trained_length, step, change)
        for first in range(0, length, step):
            part = slice(first, min(first + step, length))
            same = whole.ids_LNSK[:, :, part, :, None] == ids_LNSK[:, :, part, None, :]
            row = {"model": name, "residuals": label, "trained_length": trained_length}
            row |= {"first": first, "last": part.stop - 1}
            row |= {
                "agreement": float(same.any(axis=-1).mean()),
                "entropy": float(whole.entropy_LNS[:, :, part].mean()),
            }
            row |= {"loss": float(whole.losses_NS[:, part].mean()), "loss_in_windows": float(losses_NS[:, part].mean())}
            rows.append(row)
    return rows


def _in_windows(
    model: Transformer, tokens_NX: np.ndarray, window: int, step: int, change: Change
) -> tuple[np.ndarray, np.ndarray]:
    """Chosen experts and losses of every token, read in windows."""
    length = tokens_NX.shape[1] - 1
    ids, losses, done = [], [], 0
    for start in range(0, length, step):
        stop = min(start + window, length)
        if stop <= done:
            break
        seen = observe(model, tokens_NX[:, start : stop + 1], change)
        new = slice(done - start, stop - start)
        ids.append(seen.ids_LNSK[:, :, new])
        losses.append(seen.losses_NS[:, new])
        done = stop
    return np.concatenate(ids, axis=2), np.concatenate(losses, axis=1)


def robustness(
    name: str, model: Transformer, tokens_NX: np.ndarray, shares: Sequence[float] = SWAP_SHARES, seed: int = 0
) -> Rows:
    """Return the loss when a share of the tokens has its choices swapped between FFN and zero-computation experts.

    Columns: model, share, quarter (of all tokens by their loss without a swap, 1 the easiest; 0 all), tokens, loss,
    increase.
    """
    base = observe(model, tokens_NX)
    order = np.argsort(base.losses_NS.ravel(), kind="stable")
    quarters = [np.arange(len(order)), *np.array_split(order, 4)]
    rows = []
    for share in shares:
        seen = base if share == 0 else observe(model, tokens_NX, Change(swap_share=share, seed=seed))
        for number, places in enumerate(quarters):
            loss, before = (float(one.losses_NS.ravel()[places].mean()) for one in (seen, base))
            row = {"model": name, "share": share, "quarter": number, "tokens": len(places)}
            rows.append(row | {"loss": loss, "increase": loss - before})
    return rows
