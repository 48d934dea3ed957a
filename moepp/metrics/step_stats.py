"""Training statistics from the forward passes to one record per log interval.

L MoE layers, E experts of all kinds (FFN first), C columns of layer statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moepp.metrics.values import Reduce, Value, reduce_values
from moepp.moe.stats import MoEStats

_MEANS = ("balance_loss", "drop_fraction")  # over this rank's tokens, as are the shares that follow them
_COUNTS = ("num_tokens", "ffn_assignments", "remote_assignments")
_COLUMNS = (*_COUNTS, *_MEANS)


class StepStats:
    """Adds up losses and routing statistics on the device and reduces them over ranks once per log interval.

    Feed it the outputs of training forward passes only: evaluation and recomputed forwards are never passed in, so
    nothing is counted twice.

        stats.add_micro_batch(...)      # each micro-batch; no host synchronisation
        stats.commit(dispatch_bytes)    # each optimizer step
        stats.reduce(...)               # each log interval; starts the next interval
    """

    def __init__(
        self,
        moe_layers: Sequence[int],
        expert_counts: Mapping[str, int],
        top_k: int,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Start the first interval.

        Args:
            moe_layers: transformer layer index of each MoE layer of the model.
            expert_counts: experts of each kind, in the order of ``share_Z`` and ``load_E``; "ffn" comes first.
            top_k: K.
            rows: which of the MoE layers this rank holds, in the order of the stats passed later; other ranks of a
                pipeline add those of the others. None: all.
        """
        self.moe_layers = tuple(moe_layers)
        self.expert_counts = dict(expert_counts)
        self.top_k = top_k
        self._rows = list(range(len(self.moe_layers)) if rows is None else rows)
        self._pending: dict[str, Tensor] = {}
        self._interval: dict[str, Tensor] = {}

    def add_micro_batch(self, stats: Sequence[MoEStats], loss_sum: Tensor, num_loss_tokens: Tensor | int) -> None:
        """Add one training forward pass of this rank.

        Args:
            stats: one per MoE layer that this rank holds.
            loss_sum: cross-entropy summed over this rank's predicted tokens, nats.
            num_loss_tokens: how many tokens that sum covers.
        """
        if len(stats) != len(self._rows):
            raise ValueError(f"got statistics of {len(stats)} MoE layers, expected {len(self._rows)}")
        loss_sum = loss_sum.detach().to(torch.float64)
        new = {
            "loss_sum": loss_sum,
            "loss_tokens": loss_sum.new_zeros(()) + num_loss_tokens,
        }
        if self.moe_layers:
            new["layers"], new["load"] = (
                loss_sum.new_zeros(shape) for shape in (self._layers_shape(), self._load_shape())
            )
        if stats:
            columns_LC = torch.stack([_columns(layer) for layer in stats]).to(torch.float64)
            # Weighed by the tokens behind them, means add up over micro-batches and ranks of any size.
            columns_LC[:, len(_COUNTS) :] *= columns_LC[:, :1]
            new["layers"][self._rows] = columns_LC
            new["load"][self._rows] = torch.stack([layer.load_E.detach() for layer in stats]).to(torch.float64)
        _accumulate(self._pending, new)

    def step_load(self) -> Tensor:
        """Choices of each expert in each MoE layer since the last :meth:`commit`, on this rank: a copy, [L, E] fp64."""
        return self._pending["load"].clone()

    def commit(self, dispatch_bytes: int = 0) -> None:
        """Close an optimizer step in which this rank sent ``dispatch_bytes`` of rows to other ranks."""
        if not self._pending:
            raise ValueError("commit() without a micro-batch since the last commit")
        zero = self._pending["loss_sum"].new_zeros(())
        self._pending["dispatch_bytes"] = zero + dispatch_bytes
        self._pending["steps"] = zero + 1
        _accumulate(self._interval, self._pending)
        self._pending = {}

    def discard(self) -> None:
        """Forget the micro-batches of a step that was not taken."""
        self._pending = {}

    def clear(self) -> None:
        """Forget everything since the last :meth:`reduce`."""
        self._pending, self._interval = {}, {}

    @property
    def is_empty(self) -> bool:
        """No step was committed since the last :meth:`reduce`."""
        return not self._interval

    def state(self) -> dict[str, Tensor]:
        """Return this rank's sums since the last :meth:`reduce`, by name; call it between steps."""
        return {f"stats.{name}": tensor for name, tensor in self._interval.items()}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of :meth:`state` after the first committed step."""
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("loss_sum", "loss_tokens", "dispatch_bytes", "steps"), ())
        if self.moe_layers:
            shapes |= {"layers": self._layers_shape(), "load": self._load_shape()}
        return {f"stats.{name}": shape for name, shape in shapes.items()}

    def _layers_shape(self) -> tuple[int, int]:
        return len(self.moe_layers), len(_COLUMNS) + len(self.expert_counts)

    def _load_shape(self) -> tuple[int, int]:
        return len(self.moe_layers), sum(self.expert_counts.values())

    def add_state(self, state: Mapping[str, Tensor]) -> None:
        """Add sums that :meth:`state` returned, of this rank or, in another layout, of several."""
        _accumulate(self._interval, {name.removeprefix("stats."): tensor for name, tensor in state.items()})

    def reduce(self, sum_reduce: Reduce, max_reduce: Reduce) -> dict[str, float]:
        """Return metrics over all ranks and all steps committed since the last call; every rank calls it.

        - ``train/loss``: mean over tokens, nats.
        - ``train/balance_loss``: sum over layers of L_b (Eq. 7, without its weight), mean over tokens.
        - ``routing/ffn_per_token``, ``routing/drop_fraction``: mean over MoE layers, each a mean over tokens.
        - ``routing/layer_<i>/share_<kind>``: of the router's choices, before drops; they sum to 1.
        - ``routing/layer_<i>/max_over_mean``: busiest FFN expert over the mean; absent if no FFN expert was chosen.
        - ``comm/dispatch_bytes``: rows sent to other ranks, per step, over all ranks.
        - ``comm/dispatch_bytes_vanilla``: the same if all K assignments of each token were FFN ones, with each layer's
          observed remote share: ``bytes * sum_l(K T remote_l / ffn_l) / sum_l(remote_l)``.
        """
        if not self._interval:
            raise ValueError("reduce() without a committed step since the last call")
        sums, self._interval = self._interval, {}
        values = {"train/loss": Value.mean(sums["loss_sum"], sums["loss_tokens"])}
        values["comm/dispatch_bytes"] = Value.sum(sums["dispatch_bytes"])
        # Every rank takes the same number of steps, so the maximum over ranks is that number.
        values["steps"] = Value.max(sums["steps"])
        if self.moe_layers:
            columns_LC = sums["layers"]
            balance_loss = columns_LC[:, _COLUMNS.index("balance_loss")].sum()
            values["train/balance_loss"] = Value.mean(balance_loss, columns_LC[0, 0])
            values["layers"] = Value.sum(columns_LC)
            values["load"] = Value.sum(sums["load"])
        reduced = reduce_values(values, sum_reduce, max_reduce)

        metrics = {name: float(reduced[name]) for name in values if "/" in name and name in reduced}
        metrics["comm/dispatch_bytes"] /= float(reduced["steps"])
        metrics["comm/dispatch_bytes_vanilla"] = 0.0
        if self.moe_layers:
            self._add_routing(metrics, reduced["layers"], reduced["load"])
        return metrics

    def _add_routing(self, metrics: dict[str, float], layers_LC: Tensor, load_LE: Tensor) -> None:
        column = {name: layers_LC[:, c] for c, name in enumerate(_COLUMNS)}
        tokens_L, ffn_L, remote_L = (column[name] for name in _COUNTS)
        per_token = tokens_L.clamp(min=1)  # a layer without tokens has zeros to divide
        metrics["routing/ffn_per_token"] = float((ffn_L / per_token).mean())
        metrics["routing/drop_fraction"] = float((column["drop_fraction"] / per_token).mean())
        for row, index in enumerate(self.moe_layers):
            prefix = f"routing/layer_{index}"
            for kind, share in zip(self.expert_counts, layers_LC[row, len(_COLUMNS) :], strict=True):
                metrics[f"{prefix}/share_{kind}"] = float(share / per_token[row])
            load_E = load_LE[row, : self.expert_counts["ffn"]]
            if load_E.sum() > 0:
                metrics[f"{prefix}/max_over_mean"] = float(load_E.max() / load_E.mean())
        if remote_L.sum() > 0:
            vanilla_L = self.top_k * tokens_L * remote_L / ffn_L.clamp(min=1)
            growth = float(vanilla_L.sum() / remote_L.sum())
            metrics["comm/dispatch_bytes_vanilla"] = metrics["comm/dispatch_bytes"] * growth


def _columns(layer: MoEStats) -> Tensor:
    """Return counts, means and shares of one layer, [C]."""
    scalars = torch.stack([getattr(layer, name).detach() for name in _COLUMNS])
    return torch.cat((scalars, layer.share_Z.detach().to(scalars.dtype)))


def _accumulate(into: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    for name, tensor in new.items():
        into[name] = into[name] + tensor if name in into else tensor
