"""What the routers did in a log interval: a few numbers for the whole model, some for each layer, all in a history.

Letters: L MoE layers, E experts of every kind (FFN first), C columns of layer statistics, O of observations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moepp.config import MoEConfig
from moepp.moe.observation import BINS, MEANS, gate_names

COUNTS = ("num_tokens", "ffn_assignments", "remote_assignments")
COLUMNS = (*COUNTS, "balance_loss", "drop_fraction")  # the means are weighed by tokens, as the shares that follow them
MAX_LAYERS = 32  # that have keys of their own; routing.jsonl has all of them


@dataclass(frozen=True)
class RoutingSnapshot:
    """One line of routing.jsonl.

    Attributes:
        step, tokens: when it was taken; it covers the steps since the record before.
        layers: index of the transformer layer of each of the L MoE layers.
        kinds: experts of each kind, in the order of experts.
        share_LE: of a layer's choices before drops, those of each expert; a row sums to 1.
        per_layer: metrics by name, [L]; NaN where there is none.
        gates: histograms of gate weights by choice, [L, 20], shares of equal parts of [0, 1]: "first" and "second",
            and with the ending "_without_residual" what they were in this layer without its gating residual.
    """

    step: int
    tokens: int
    layers: tuple[int, ...]
    kinds: dict[str, int]
    share_LE: np.ndarray
    per_layer: dict[str, np.ndarray]
    gates: dict[str, np.ndarray]


@dataclass(frozen=True)
class RoutingTable:
    """Of all ranks and all steps of an interval.

    Attributes:
        layers: index of the transformer layer of each MoE layer.
        moe: of the layers.
        sums_LC: :data:`COLUMNS` and the shares of the kinds, the means multiplied by tokens.
        load_LE: choices of each expert, before drops.
        observed_LO: see :mod:`moepp.moe.observation`; zeros where nothing was observed.
        bytes_sent: rows sent to other ranks per step, all layers.
    """

    layers: Sequence[int]
    moe: MoEConfig
    sums_LC: np.ndarray
    load_LE: np.ndarray
    observed_LO: np.ndarray
    bytes_sent: float

    @cached_property
    def per_layer(self) -> dict[str, np.ndarray]:
        """Metrics of each layer, [L]; NaN where there is none."""
        column = {name: self.sums_LC[:, index] for index, name in enumerate(COLUMNS)}
        tokens_L = column["num_tokens"]
        per_token = np.maximum(tokens_L, 1)  # a layer without tokens has zeros to divide
        found = {"ffn_per_token": column["ffn_assignments"] / per_token}
        found |= {name: column[name] / per_token for name in ("drop_fraction", "balance_loss")}
        for index, kind in enumerate(self.moe.expert_counts, start=len(COLUMNS)):
            found[f"share_{kind}"] = self.sums_LC[:, index] / per_token
        ffn_LE = self.load_LE[:, : self.moe.expert_counts["ffn"]]
        if ffn_LE.shape[1]:
            mean_L = _where(ffn_LE.sum(axis=1) > 0, ffn_LE.mean(axis=1))
            found["max_over_mean"] = ffn_LE.max(axis=1) / mean_L
            found["load_cv"] = ffn_LE.std(axis=1) / mean_L
        return found | self._observed | self._bytes

    @cached_property
    def _bytes(self) -> dict[str, np.ndarray]:
        """Bytes of each layer: all rows that are sent are equally long."""
        tokens_L, ffn_L, remote_L = (self.sums_LC[:, COLUMNS.index(name)] for name in COUNTS)
        if remote_L.sum() == 0:
            return {}
        per_row = self.bytes_sent / remote_L.sum()
        vanilla_L = self.moe.top_k * tokens_L * remote_L / np.maximum(ffn_L, 1)
        return {"dispatch_bytes": per_row * remote_L, "dispatch_bytes_vanilla": per_row * vanilla_L}

    @cached_property
    def _observed(self) -> dict[str, np.ndarray]:
        if not self.observed_LO[:, 0].any():
            return {}
        tokens_L = _where(self.observed_LO[:, 0] > 0, self.observed_LO[:, 0])
        found = {name: self.observed_LO[:, 1 + index] / tokens_L for index, name in enumerate(MEANS)}
        first, names = 1 + len(MEANS), gate_names(self.moe)
        for index, name in enumerate(names):
            mean_L = self.observed_LO[:, first + index] / tokens_L
            square_L = self.observed_LO[:, first + len(names) + index] / tokens_L
            found[f"gate_{name}"] = mean_L
            found[f"gate_{name}_std"] = np.sqrt(np.maximum(square_L - mean_L**2, 0))
        return found

    @property
    def gates(self) -> dict[str, np.ndarray]:
        """Histograms of gate weights, [L, 20] shares."""
        if not self._observed:
            return {}
        names = gate_names(self.moe)
        first = 1 + len(MEANS) + 2 * len(names)
        tokens_L1 = np.maximum(self.observed_LO[:, :1], 1)
        counts_LO = self.observed_LO[:, first:]
        return {name: counts_LO[:, i * BINS : (i + 1) * BINS] / tokens_L1 for i, name in enumerate(names)}

    def summary(self) -> dict[str, float]:
        """Return the metrics of the whole model, as many whatever its size."""
        means = {name: values_L for name, values_L in self.per_layer.items() if not name.endswith("_std")}
        found = {
            "comm/dispatch_bytes": self.bytes_sent,
            "comm/dispatch_bytes_vanilla": float(means.pop("dispatch_bytes_vanilla", np.zeros(1)).sum()),
        }
        means.pop("dispatch_bytes", None)
        for name, metric in (("balance_loss", "train/balance_loss"), ("z_loss", "train/z_loss")):
            if name in means:
                found[metric] = float(means.pop(name).sum())
        for name in ("max_over_mean", "load_cv"):
            if name in means and not np.isnan(means[name]).all():
                found[f"routing/{name}_worst"] = float(np.nanmax(means[name]))
        for name, values_L in means.items():
            if not np.isnan(values_L).all():
                found[f"routing/{name}"] = float(np.nanmean(values_L))
        return found

    def keys_per_layer(self) -> dict[str, float]:
        """Return the metrics of each layer, or of :data:`MAX_LAYERS` evenly spaced ones of more."""
        found: dict[str, float] = {}
        for name, values_L in self.per_layer.items():
            family = "comm" if name.startswith("dispatch_bytes") else "routing"
            for row in spaced(len(self.layers)):
                if name not in ("ffn_per_token",) and not name.endswith("_std") and not np.isnan(values_L[row]):
                    found[f"{family}/layer_{self.layers[row]}/{name}"] = float(values_L[row])
        return found

    def snapshot(self, step: int, tokens: int) -> RoutingSnapshot:
        """Return all of it, for the history."""
        chosen_L1 = np.maximum(self.load_LE.sum(axis=1, keepdims=True), 1)
        return RoutingSnapshot(
            step,
            tokens,
            tuple(self.layers),
            dict(self.moe.expert_counts),
            self.load_LE / chosen_L1,
            dict(self.per_layer),
            self.gates,
        )


def spaced(count: int, limit: int = MAX_LAYERS) -> list[int]:
    """Return the numbers below ``count``, or ``limit`` evenly spaced ones with the first and the last."""
    if count <= limit:
        return list(range(count))
    return [round(i * (count - 1) / (limit - 1)) for i in range(limit)]


def _where(known_L: np.ndarray, values_L: np.ndarray) -> np.ndarray:
    return np.where(known_L, values_L, np.nan)
