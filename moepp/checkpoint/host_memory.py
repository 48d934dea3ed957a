"""Host memory that a checkpoint is staged in.

Behind an accelerator it is page-locked, which makes copies about five times as fast and lets them run one after another
without the host waiting for each. Locking takes long, so the blocks are kept from one save to the next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BLOCK_BYTES = 256 * 2**20  # a power of 2: torch's allocator of page-locked memory rounds up to one
ALIGNMENT = 512


class HostMemory:
    """Copies of tensors that outlive their sources.

        memory.start()                      # forget the copies of the save before
        copies = [memory.copy(t) for t in tensors]
        memory.finish()                     # now they hold their values

    On the CPU every copy is an ordinary tensor.

    Args:
        device: where tensors come from.
        block_bytes: size of a block; a larger tensor gets one of its own.
        allocate: makes a block of so many bytes.
        synchronize: waits until the copies of the calling thread are done.
    """

    def __init__(
        self,
        device: torch.device,
        block_bytes: int = BLOCK_BYTES,
        allocate: Callable[[int], Tensor] | None = None,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        self._is_used = device.type != "cpu"
        self._block_bytes = block_bytes
        self._allocate = allocate if allocate is not None else _page_locked
        self._synchronize = synchronize or (lambda: torch.accelerator.current_stream(device).synchronize())
        self._blocks: list[Tensor] = []
        self._block, self._used = 0, 0  # the block being filled, and the bytes of it in use

    def start(self) -> None:
        """Let the next copies take the place of those before."""
        self._block, self._used = 0, 0

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy of ``tensor`` in host memory, whose values are there after :meth:`finish`."""
        tensor = tensor.detach()
        if not self._is_used:
            return tensor.to("cpu", copy=True)
        copied = self._take(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return copied.copy_(tensor, non_blocking=True)

    def finish(self) -> None:
        """Wait for all copies since :meth:`start`."""
        if self._is_used:
            self._synchronize()

    def _take(self, size: int) -> Tensor:
        """Return the next ``size`` bytes, of the first block from the present one on that has room for them."""
        while self._block < len(self._blocks) and self._used + size > self._blocks[self._block].numel():
            self._block, self._used = self._block + 1, 0
        if self._block == len(self._blocks):
            self._blocks.append(self._allocate(max(size, self._block_bytes)))
        start, self._used = self._used, self._used + -(-size // ALIGNMENT) * ALIGNMENT
        return self._blocks[self._block][start : start + size]


def _page_locked(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        logger.warning("%.0f MB of host memory cannot be page-locked, so saving is slower: %s", size / 1e6, reason)
        return torch.empty(size, dtype=torch.uint8)
