"""What attention needs to know of transformers' caches, whose classes differ between transformers 4.46 and 5.x.

Letters: S new positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache

# These hold something else than the keys and values of all positions of one decoder.
_OTHER_CACHES = ("EncoderDecoderCache", "SinkCache", "MtpCache", "DFlashCache")


@dataclass(frozen=True)
class Places:
    """Where the new positions lie among the keys."""

    num_past: int | Tensor  # positions already cached; a tensor only while torch.compile traces a static cache
    num_keys: int  # keys that attention sees; with a static cache more than past + new
    positions_S: Tensor  # of the new positions


def open_cache(past: Any, use_cache: bool, num_layers: int) -> Cache | None:
    """Return the cache to use, made from older code's tuples of (keys, values) if necessary.

    Raises:
        ValueError: a cache that does not hold the keys of all positions, or of another number of layers.
    """
    if past is None:
        return DynamicCache() if use_cache else None
    if isinstance(past, tuple | list):
        if past and len(past) != num_layers:
            raise ValueError(f"past_key_values holds {len(past)} layers, the model has {num_layers}; use its own cache")
        cache = DynamicCache()
        for layer, (key_BGPd, value_BGPd) in enumerate(past):
            cache.update(key_BGPd, value_BGPd, layer)
        return cache
    name = type(past).__name__
    sliding = getattr(past, "is_sliding", False) if isinstance(past, Cache) and name not in _OTHER_CACHES else None
    if sliding is None:
        raise ValueError(f"past_key_values is a {name}, which this decoder cannot use; use a DynamicCache")
    if any(sliding) if isinstance(sliding, list) else bool(torch.as_tensor(sliding).any()):
        raise ValueError(
            f"past_key_values is a {name} with a sliding window, but this model attends to all positions; "
            "use a DynamicCache or a StaticCache"
        )
    layers = getattr(past, "layers", None)
    if layers and getattr(past, "layer_class_to_replicate", None) is None and len(layers) < num_layers:
        raise ValueError(f"past_key_values holds {len(layers)} layers, the model has {num_layers}; use its own cache")
    return past


def to_legacy(cache: Any) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return one (keys, values) per layer."""
    if hasattr(cache, "layers"):
        return tuple((layer.keys, layer.values) for layer in cache.layers)
    return tuple(zip(cache.key_cache, cache.value_cache, strict=True))


def find_places(cache: Cache | None, num_new: int, cache_position_S: Tensor | None, device: torch.device) -> Places:
    """Return where ``num_new`` positions will be stored, before any layer has stored them.

    Raises:
        ValueError: ``cache_position`` that does not follow the cached positions, or a cache that is too short.
    """
    num_past = _given_start(cache, cache_position_S)
    if num_past is None:
        num_past = 0 if cache is None else _static(cache.get_seq_length())
    positions_S = torch.arange(num_new, device=device) + _to(num_past, device)
    if cache_position_S is not None and not torch.compiler.is_compiling():
        given_S = cache_position_S.to(device)
        if given_S.shape != positions_S.shape or not torch.equal(given_S, positions_S):
            raise ValueError(
                f"cache_position={given_S.tolist()} does not fit {num_new} new positions after {num_past} cached ones; "
                "leave it out"
            )
    limit = _limit(cache)
    if limit is None:
        return Places(num_past, int(num_past) + num_new, positions_S)
    if isinstance(num_past, int) and num_past + num_new > limit:
        raise ValueError(
            f"the {type(cache).__name__} holds at most {limit} positions, needed are {num_past + num_new}; "
            "make a longer one (max_cache_len)"
        )
    return Places(num_past, limit, positions_S)


def _given_start(cache: Cache | None, cache_position_S: Tensor | None) -> int | Tensor | None:
    """Return where to write in a static cache without a count (before 5.1); None: the cache counts itself."""
    if cache_position_S is None or not isinstance(cache, StaticCache):
        return None
    layers = getattr(cache, "layers", None)
    counts = bool(layers) and hasattr(layers[0], "cumulative_length")
    return None if counts else _static(cache_position_S[0])


def _static(number: int | Tensor) -> int | Tensor:
    """Return a plain number unless that breaks tracing."""
    is_traced = isinstance(number, Tensor) and torch.compiler.is_compiling()
    return number if is_traced else int(number)


def _to(number: int | Tensor, device: torch.device) -> int | Tensor:
    return number.to(device) if isinstance(number, Tensor) else number


def _limit(cache: Cache | None) -> int | None:
    """Return the capacity of a cache of fixed length, positions; None: it grows."""
    if cache is None:
        return None
    get_limit = getattr(cache, "get_max_cache_shape", None) or cache.get_max_length
    if getattr(cache, "layers", True):  # a cache that makes its layers as they come has none to ask
        limit = get_limit()
        return limit if limit is not None and limit > 0 else None
    return None
