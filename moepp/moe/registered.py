"""The base of modules that can be registered from outside the package: routers and expert kinds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moepp.errors import ConfigError
from moepp.io.untrusted import show
from moepp.ops.backend import is_plain

# What a checkpoint can hold.
BUFFER_DTYPES = ("float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool")


class RegisteredModule(nn.Module):
    """A module that may own parameters and buffers.

    What it computes is a function of its arguments, parameters and buffers: it draws no random numbers and changes no
    buffer (:func:`without_side_effects`), because layers are computed again where activations are not kept, and routers
    on steps that are logged.

    Buffers keep their dtype (fp32 unless said otherwise) whatever the model's precision. They are part of every
    checkpoint and must be the same on every rank at all times. A class that registers one defines
    :meth:`reset_buffers`.
    """

    updates_after_step: ClassVar[bool] = False
    """Whether ``after_optimizer_step`` wants to be called; it costs one all-reduce per step, for all parts together."""

    computed_by: ClassVar[tuple[str, ...]] = ("forward",)
    """Methods that :meth:`flops_per_token` counts."""

    def flops_per_token(self) -> float | None:
        """Return the operations of one forward, per token of the layer; ``None``: unknown.

        Matrix products alone count, a multiply-add as 2, as in :mod:`moepp.model.accounting`: 0 for a module without
        any. While one part of a model is unknown, so is its utilisation (MFU), which is then left out of the metrics.
        """
        return None

    def init(self, name: str) -> float | None:
        """Return the initial value of the parameter ``name`` (relative to this module); ``None``: drawn.

        All are drawn from N(0, ``model.init_std``), the weight of a norm among them: return 1 for it.
        """
        return None

    def reset_buffers(self) -> None:
        """Fill every buffer with its value at the start of training.

        Models are built without memory, so what the constructor put into a buffer is lost.
        """
        if next(self.buffers(), None) is not None:
            raise ConfigError(
                f"{type(self).__qualname__} registers the buffer {next(self.named_buffers())[0]} and has no "
                "reset_buffers(); define it to fill the buffer with its first value"
            )

    def require_names(self) -> None:
        """Refuse names of parameters and buffers that would be mistaken for others, or that no checkpoint can hold.

        Raises:
            ConfigError: one with characters beyond ASCII, or inside a module called ``experts``, which is what tells
                the sharded FFN experts from everything else.
        """
        for name in (*dict(self.named_parameters()), *dict(self.named_buffers())):
            if not name.isascii() or "experts" in name.split("."):
                raise ConfigError(
                    f"{type(self).__qualname__} has a parameter or buffer {name!r}; give it a name in ASCII without a "
                    "part `experts`, which means the sharded FFN experts"
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = [(module, name, value) for module in self.modules() for name, value in module.named_buffers("", False)]
        super()._apply(fn, recurse)
        for module, name, value in kept:
            new = module.get_buffer(name)
            if new.dtype != value.dtype:  # a precision, which is meant for weights: take the value from before it
                module._buffers[name] = value.to(new.device)
        return self


def require_tensor(value: Any, what: str, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return what a registered part gave back, once its kind, shape, device (that of ``like``) and dtype are right.

    Raises:
        ConfigError: they are not.
    """
    if not isinstance(value, Tensor):
        raise ConfigError(f"{what} returned {show(value)}; return a tensor of shape {list(shape)}")
    if value.dtype != dtype:
        raise ConfigError(f"{what} returned {value.dtype}; return {dtype}, for example by .to({dtype})")
    if tuple(value.shape) != shape or value.device != like.device:
        raise ConfigError(
            f"{what} returned shape {list(value.shape)} on {value.device}; return shape {list(shape)} on {like.device}"
        )
    return value


@contextmanager
def without_side_effects(what: str, like: Tensor, module: nn.Module | None = None) -> Iterator[None]:
    """Refuse what a registered part does within it besides computing; nothing waits for the device.

    A layer whose activations are not kept is computed a second time in backward, and so are routers on steps that are
    logged: other random numbers or another buffer would give gradients and statistics of another function.

    Args:
        what: the part, for messages.
        like: a tensor that it is given; where it computes.
        module: whose buffers stay as they are.

    Raises:
        ConfigError: torch's random state has changed, of the host or the device, or a buffer.
    """
    if torch.compiler.is_compiling() or not is_plain(like):  # traced: nothing is computed
        yield
        return
    random, buffers = _random_states(like.device), _versions(module)
    yield
    if not all(map(torch.equal, random, _random_states(like.device))):
        raise ConfigError(
            f"{what} drew random numbers, and would draw others when the layer is computed again; compute with its "
            "arguments, parameters and buffers alone"
        )
    for name, (buffer, version) in _versions(module).items():
        before, version_before = buffers.get(name, (buffer, version))
        if buffer is not before or version != version_before:
            raise ConfigError(
                f"{what} changed its buffer {name} while it computed, and would do so again when the layer is computed "
                "again; change it in after_optimizer_step"
            )


def _random_states(device: torch.device) -> list[Tensor]:
    """Return the states of torch's generators of the host and the device; they lie on the host."""
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _versions(module: nn.Module | None) -> dict[str, tuple[Tensor, int]]:
    """Return each buffer and how often it was written to, which torch does not count for those of inference mode."""
    buffers = () if module is None else persistent_buffers(module)
    return {name: (buffer, -1 if buffer.is_inference() else buffer._version) for name, buffer in buffers}


def known_flops(module: RegisteredModule) -> float | None:
    """Return :meth:`RegisteredModule.flops_per_token`, or ``None`` if a subclass has changed what was counted.

    Raises:
        ConfigError: it is no number, or below 0.
    """
    classes = type(module).__mro__

    def depth(name: str) -> int:
        return next(i for i, cls in enumerate(classes) if name in vars(cls))

    flops = module.flops_per_token()
    if flops is None or depth("flops_per_token") > min(map(depth, module.computed_by)):
        return None
    if isinstance(flops, bool) or not isinstance(flops, int | float) or not 0 <= flops < math.inf:
        raise ConfigError(
            f"{type(module).__qualname__}.flops_per_token() returned {show(flops)}; return a number of at least 0, or "
            "None where it is unknown"
        )
    return float(flops)


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and buffer of everything that a checkpoint holds besides parameters.

    Raises:
        ConfigError: a dtype that checkpoints do not hold.
    """
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] in module._non_persistent_buffers_set:
                continue
            if str(buffer.dtype).removeprefix("torch.") not in BUFFER_DTYPES:
                raise ConfigError(
                    f"buffer {name} is {buffer.dtype}, and checkpoints hold {', '.join(BUFFER_DTYPES)}; use one of them"
                )
            yield name, buffer
