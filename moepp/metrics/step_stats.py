"""Training statistics from the forward passes to one record per log interval.

L MoE layers, E experts of all kinds (FFN first), C columns of layer statistics, O columns of observations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moepp.config import MoEConfig
from moepp.metrics.routing import COLUMNS, COUNTS, RoutingTable
from moepp.metrics.values import Value
from moepp.moe.observation import num_columns
from moepp.moe.stats import MoEStats


class StepStats:
    """Adds up losses and routing statistics on the device and reduces them over ranks once per log interval.

    Feed it the outputs of training forward passes only: evaluation and recomputed forwards are never passed in, so
    nothing is counted twice.

        stats.add_micro_batch(...)      # each micro-batch; no host synchronisation
        stats.commit(dispatch_bytes)    # each optimizer step
        stats.values()                  # each log interval; starts the next interval
    """

    def __init__(
        self,
        moe_layers: Sequence[int],
        moe: MoEConfig,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Start the first interval.

        Args:
            moe_layers: transformer layer index of each MoE layer of the model.
            moe: of the layers.
            rows: which of the MoE layers this rank holds, ascending, as the stats passed later; other ranks of a
                pipeline add those of the others. None: all.
        """
        self.moe_layers = tuple(moe_layers)
        self.moe = moe
        self._rows = list(range(len(self.moe_layers)) if rows is None else rows)
        firsts = [row for row in self._rows if row - 1 not in self._rows]
        lasts = [row for row in self._rows if row + 1 not in self._rows]
        self._runs = list(zip(firsts, lasts, strict=True))  # of rows beside each other, in ascending order
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
        if self.moe_layers and not stats:
            new["layers"], new["load"] = (
                loss_sum.new_zeros(shape) for shape in (self._layers_shape(), self._load_shape())
            )
        elif stats:
            columns_LC = _columns(stats)
            # Weighed by the tokens behind them, means add up over micro-batches and ranks of any size.
            columns_LC[:, len(COUNTS) :] *= columns_LC[:, :1]
            new["layers"] = self._placed(columns_LC)
            new["load"] = self._placed(torch.stack([layer.load_E.detach() for layer in stats]).to(torch.float64))
            seen = [layer.observation for layer in stats if layer.observation is not None]
            if seen:
                new["observed"] = self._placed(torch.stack(seen))
        _accumulate(self._pending, new)

    def _placed(self, own: Tensor) -> Tensor:
        """Put rows of this rank's layers where they belong among those of all layers, zeros in the others."""
        if len(self._rows) == len(self.moe_layers):
            return own
        table = own.new_zeros(len(self.moe_layers), *own.shape[1:])
        for first, last in self._runs:  # indexing by a list would copy the list to the device, and wait for the copy
            start = self._rows.index(first)
            table[first : last + 1] = own[start : start + last - first + 1]
        return table

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
        if self.moe_layers and "observed" not in self._pending and "observed" not in self._interval:
            self._pending["observed"] = zero.new_zeros(self._observed_shape())
        _accumulate(self._interval, self._pending)
        self._pending = {}

    def discard(self) -> None:
        """Forget the micro-batches of a step that was not taken."""
        self._pending = {}

    def clear(self) -> None:
        """Forget everything since the last :meth:`values`."""
        self._pending, self._interval = {}, {}

    def state(self) -> dict[str, Tensor]:
        """Return this rank's sums since the last :meth:`values`, by name; call it between steps."""
        return {f"stats.{name}": tensor for name, tensor in self._interval.items()}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of :meth:`state` after the first committed step."""
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("loss_sum", "loss_tokens", "dispatch_bytes", "steps"), ())
        if self.moe_layers:
            shapes |= {"layers": self._layers_shape(), "load": self._load_shape(), "observed": self._observed_shape()}
        return {f"stats.{name}": shape for name, shape in shapes.items()}

    def _layers_shape(self) -> tuple[int, int]:
        return len(self.moe_layers), len(COLUMNS) + len(self.moe.expert_counts)

    def _load_shape(self) -> tuple[int, int]:
        return len(self.moe_layers), self.moe.num_experts

    def _observed_shape(self) -> tuple[int, int]:
        return len(self.moe_layers), num_columns(self.moe)

    def add_state(self, state: Mapping[str, Tensor]) -> None:
        """Add sums that :meth:`state` returned, of this rank or, in another layout, of several."""
        _accumulate(self._interval, {name.removeprefix("stats."): tensor for name, tensor in state.items()})

    def values(self) -> dict[str, Value]:
        """Return the sums since the last call, for :func:`reduce_values`; zeros for what this rank has none of."""
        names = {name.removeprefix("stats."): shape for name, shape in self.state_shapes().items()}
        sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in names.items()} | self._interval
        self._interval = {}
        values = {
            "train/loss": Value.mean(sums["loss_sum"], sums["loss_tokens"]),
            "dispatch_bytes": Value.sum(sums["dispatch_bytes"]),
            # Every rank takes the same number of steps, so the maximum over ranks is that number.
            "steps": Value.max(sums["steps"]),
        }
        if self.moe_layers:
            values |= {name: Value.sum(sums[name]) for name in ("layers", "load", "observed")}
        return values

    def routing(self, reduced: Mapping[str, Tensor]) -> RoutingTable | None:
        """Return what the reduced :meth:`values` say of the layers; None without MoE layers or steps."""
        if not self.moe_layers or float(reduced["steps"]) == 0:
            return None
        return RoutingTable(
            self.moe_layers,
            self.moe,
            reduced["layers"].numpy(),
            reduced["load"].numpy(),
            reduced["observed"].numpy(),
            bytes_sent=float(reduced["dispatch_bytes"]) / float(reduced["steps"]),
        )


@torch.no_grad()
def _columns(stats: Sequence[MoEStats]) -> Tensor:
    """Return counts, means and shares of the layers, fp64 [L, C], in as many operations for any number of layers."""
    scalars = [torch.stack([getattr(layer, name) for layer in stats]).to(torch.float64) for name in COLUMNS]
    shares = torch.stack([layer.share_Z for layer in stats]).to(torch.float64)
    return torch.cat((torch.stack(scalars, dim=1), shares), dim=1)


def _accumulate(into: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    for name, tensor in new.items():
        into[name] = into[name] + tensor if name in into else tensor
