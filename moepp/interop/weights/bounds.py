"""Whether files can hold the model that a configuration beside them describes, before anything of that size is made."""

from __future__ import annotations

from moepp.config import ModelConfig
from moepp.errors import CheckpointError
from moepp.model.accounting import count_parameters

MAX_LAYERS, MAX_EXPERTS = 10_000, 1_000_000  # of a model that somebody else describes; experts over all layers
SMALLEST_ELEMENT = 2  # bytes, of the dtypes that are read


def require_room(cfg: ModelConfig, stored_bytes: int, where: object, element_bytes: int = SMALLEST_ELEMENT) -> None:
    """Raise :class:`CheckpointError` if ``stored_bytes`` cannot hold all parameters; takes no time for any numbers.

    Args:
        where: what describes the model, for the message.
        element_bytes: least size of one parameter there.
    """
    experts = cfg.num_layers * cfg.moe.num_experts
    if cfg.num_layers > MAX_LAYERS or experts > MAX_EXPERTS:
        raise CheckpointError(
            f"{where} describes {cfg.num_layers:,} layers with {cfg.moe.num_experts:,} experts each, more than "
            f"{MAX_LAYERS:,} layers or {MAX_EXPERTS:,} experts that any model read here may have; correct it"
        )
    parameters = count_parameters(cfg).total
    if parameters * element_bytes > stored_bytes:
        raise CheckpointError(
            f"{where} describes {parameters:,} parameters, and the {stored_bytes:,} bytes of its weights cannot hold "
            "them; copy the whole folder again, or correct the description"
        )
