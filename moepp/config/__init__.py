"""Typed configuration: schema, loading from Hydra, and validation."""

from moepp.config.command_line import (
    missing_known_key,
    refuse_incomplete_overrides,
    refuse_unknown_options,
)
from moepp.config.composition import composition_error
from moepp.config.defaults import register_defaults
from moepp.config.folder import configs_folder
from moepp.config.load import from_dict, from_hydra, from_stored, import_plugin, import_plugins, known_keys, to_dict
from moepp.config.model import ModelConfig, MoEConfig, RopeScalingConfig
from moepp.config.plan import RunPlan, make_plan
from moepp.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvalConfig,
    GuardConfig,
    InitConfig,
    LoggingConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    RuntimeConfig,
    TrainConfig,
    WandbConfig,
)
from moepp.config.stages import split_layers
from moepp.config.suggest import unknown_key_message
from moepp.config.validate import validate

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "GuardConfig",
    "InitConfig",
    "LoggingConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RopeScalingConfig",
    "RunConfig",
    "RunPlan",
    "RuntimeConfig",
    "TrainConfig",
    "WandbConfig",
    "composition_error",
    "configs_folder",
    "from_dict",
    "from_hydra",
    "from_stored",
    "import_plugin",
    "import_plugins",
    "known_keys",
    "make_plan",
    "missing_known_key",
    "refuse_incomplete_overrides",
    "refuse_unknown_options",
    "register_defaults",
    "split_layers",
    "to_dict",
    "unknown_key_message",
    "validate",
]
