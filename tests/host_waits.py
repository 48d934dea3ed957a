"""Every way in which the host waits for a device, found without one.

The meta device stands for the accelerator: its tensors have no values, so whatever reads one fails, and operations are
seen before they run. What sends numbers there is a blocking copy on an accelerator, and counts as a wait too; so does a
copy that need not block, from memory whose pages are not locked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# Operations whose result, or its size, the host must know.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "bincount", "equal", "is_nonzero")
# Methods and functions that read values, or that make a device tensor of Python numbers.
METHODS = ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "new_tensor")
CONSTRUCTORS = ("tensor", "as_tensor", "asarray", "from_numpy", "nonzero", "bincount", "masked_select")


class LockedPages:
    """What :meth:`torch.Tensor.pin_memory` gave, where there is no device to lock pages for."""

    def __init__(self) -> None:
        self.kept: dict[int, torch.Tensor] = {}  # alive, or another tensor may get the address

    def lock(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        self.kept[copy.untyped_storage().data_ptr()] = copy
        return copy

    def has(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in self.kept


class _Operations(TorchDispatchMode):
    def __init__(self, found: Counter[str], locked: LockedPages) -> None:
        super().__init__()
        self.found, self.locked = found, locked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        has_mask = name.startswith("index") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1:2])
        )
        unknown_size = name.startswith("repeat_interleave") and kwargs.get("output_size") is None
        if name in READS or has_mask or unknown_size:
            self.found[name] += 1
        out = func(*args, **kwargs)
        is_copy = name in ("_to_copy", "copy_", "copy")
        does_not_block = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if is_copy and len({t.device.type for t in _tensors((args, kwargs, out))}) > 1:
            if not does_not_block:
                self.found[f"{name} between devices"] += 1
            elif not any(self.locked.has(tensor) for tensor in _tensors((args, out))):
                self.found[f"{name} of pages that are not locked"] += 1
        return out


class _Constructors(TorchFunctionMode):
    def __init__(self, found: Counter[str], device: str) -> None:
        super().__init__()
        self.found, self.device = found, device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        makes = name in ("tensor", "as_tensor", "asarray", "from_numpy") and not _tensors(args)
        if (makes or name == "new_tensor") and any(t.device.type == self.device for t in _tensors(out)):
            self.found[name] += 1
        if name in ("__getitem__", "__setitem__") and args[0].device.type == self.device:
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(index, list | range) for index in indices):  # made a tensor below what modes see
                self.found[f"{name} of a list"] += 1
        return out


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


@contextmanager
def device_waits(device: str = "meta") -> Iterator[Counter[str]]:
    """Collect what makes the host wait, by name; ``device`` is the kind that stands for the accelerator."""
    found, locked = Counter[str](), LockedPages()
    with (
        patch.object(torch.Tensor, "pin_memory", lambda tensor: locked.lock(tensor)),
        patch.object(torch.Tensor, "is_pinned", lambda tensor: locked.has(tensor)),
        _Operations(found, locked),
        _Constructors(found, device),
    ):
        yield found


@contextmanager
def counted_waits(patch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count calls of ``METHODS`` and ``CONSTRUCTORS``, for processes that must run on the CPU, as those of gloo."""
    counts: Counter[str] = Counter()
    for owner, names in ((torch.Tensor, METHODS), (torch, CONSTRUCTORS)):
        for name in names:
            original = getattr(owner, name)

            def counted(*args: Any, _original: Any = original, _name: str = name, **kwargs: Any) -> Any:
                counts[_name] += 1
                return _original(*args, **kwargs)

            patch.setattr(owner, name, counted)
    yield counts
