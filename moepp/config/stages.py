"""Which layers a pipeline stage holds."""

from __future__ import annotations

from collections.abc import Sequence


def split_layers(num_layers: int, num_stages: int, given: Sequence[int] | None = None) -> tuple[range, ...]:
    """Return the layers of each stage, consecutive, first stage first.

    Args:
        num_layers: of the model; at least ``num_stages``.
        num_stages: ranks of the pipeline times chunks.
        given: layers per stage; they sum to ``num_layers``. None: the same number each; where that does not come out
            even, the embedding and the output layer count as a layer each, and earlier stages take what is left over.
    """
    if given is None:
        given = [num_layers // num_stages] * num_stages if num_layers % num_stages == 0 else None
    if given is None:
        given = [1] * num_stages
        ends = [0] * num_stages
        ends[0] += 1
        ends[-1] += 1
        for _ in range(num_layers - num_stages):
            least = min(range(num_stages), key=lambda stage: given[stage] + ends[stage])
            given[least] += 1
    starts = [sum(given[:stage]) for stage in range(num_stages)]
    return tuple(range(start, start + count) for start, count in zip(starts, given, strict=True))
