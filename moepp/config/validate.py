"""Rules between sections of the configuration, checked before anything expensive starts."""

from __future__ import annotations

from moepp.config.parallel_rules import validate_parallel, validate_work
from moepp.config.plan import RunPlan, make_plan
from moepp.config.schema import Config, require


def validate(cfg: Config, world_size: int) -> RunPlan:
    """Check every rule that involves several sections or the number of ranks; return the numbers that follow.

    Raises:
        ConfigError: names the values, the rule and the remedy.
    """
    validate_parallel(cfg, world_size)
    plan = make_plan(cfg, world_size)
    validate_work(cfg, plan)
    require(
        not cfg.eval.tasks or cfg.data.tokenizer is not None,
        f"eval.tasks={list(cfg.eval.tasks)} needs a tokenizer and data.tokenizer is null; set data.tokenizer",
    )
    both = sorted(cfg.data.validation.keys() & set(cfg.eval.tasks))
    require(
        not both,
        f"data.validation and eval.tasks both name {', '.join(both)}, and their metrics would be mixed up; "
        "rename the set of data.validation",
    )
    require(
        cfg.data.seq_len <= cfg.model.max_seq_len,
        f"data.seq_len={cfg.data.seq_len} is longer than model.max_seq_len={cfg.model.max_seq_len}; "
        "lower data.seq_len or raise model.max_seq_len",
    )
    for key, values, limit, what in (
        ("steps", cfg.profile.steps, cfg.train.steps, f"train.steps={cfg.train.steps}"),
        ("ranks", cfg.profile.ranks if cfg.profile.steps else (), world_size - 1, f"the last of {world_size} ranks"),
    ):
        late = [value for value in values if value > limit]
        require(
            not late, f"profile.{key}={list(values)} names {late}, beyond {what}: no trace would be written; lower it"
        )
    return plan
