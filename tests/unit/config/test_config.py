"""The typed configuration: types, ranges, rules between sections, and messages that name value, rule and remedy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from moepp.config import (
    Config,
    from_dict,
    from_hydra,
    known_keys,
    make_plan,
    refuse_incomplete_overrides,
    refuse_unknown_options,
    to_dict,
    unknown_key_message,
    validate,
)
from moepp.config.suggest import _SYNONYMS
from moepp.errors import ConfigError

SECTIONS: dict[str, Any] = {section.name: {} for section in dataclasses.fields(Config)} | {
    "model": {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_seq_len": 32,
        "moe": {"num_ffn_experts": 4, "ffn_hidden_size": 8},
    },
    "data": {"paths": ["a"], "seq_len": 16},
    "train": {"steps": 3, "global_batch_size": 8},
}


def make(**changes: Any) -> Config:
    """The configuration with dotted keys changed; '__' stands for the dot."""
    tree = OmegaConf.create(SECTIONS)
    for key, value in changes.items():
        OmegaConf.update(tree, key.replace("__", "."), value, force_add=True)
    return from_hydra(tree)


def refusal(world_size: int = 1, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(make(**changes), world_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_dictionaries_come_back_the_same():
    cfg = make(optim__betas=[0.8, 0.9], data__weights=[2], checkpoint__async=True, model__moe__capacity_factor=None)
    assert cfg.optim.betas == (0.8, 0.9) and cfg.data.weights == (2.0,) and cfg.checkpoint.async_ is True
    assert from_dict(to_dict(cfg)) == cfg
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(cfg)))) == cfg


def test_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().train.steps = 4  # type: ignore[misc]


def test_whole_numbers_serve_as_numbers_and_numbers_as_texts():
    cfg = make(optim__lr=1, run__name=7)
    assert isinstance(cfg.optim.lr, float) and cfg.run.name == "7"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.steps", "many", "train.steps='many' has the wrong type str; give an integer"),
        ("train.steps", 2.5, "train.steps=2.5 has the wrong type float; give an integer"),
        ("train.steps", True, "train.steps=True has the wrong type bool; give an integer"),
        ("train.steps", None, "train.steps=null is not allowed; give an integer"),
        ("train.recompute", 1, "train.recompute=1 has the wrong type int; give true or false"),
        ("optim.lr", "fast", "optim.lr='fast' has the wrong type str; give a number"),
        ("optim.lr", float("inf"), "optim.lr=inf is not a finite number; give one"),
        ("optim.betas", [0.9, float("nan")], "optim.betas[1]=nan is not a finite number; give one"),
        ("data.paths", "a", "data.paths='a' has the wrong type str; give a list, for example data.paths=[a]"),
        ("data.paths", ["a", ["b"]], "data.paths[1]=['b'] has the wrong type list; give a text"),
        (
            "data.validation",
            "data/x",
            "data.validation='data/x' has the wrong type str; give a mapping of names and lists, for example "
            "data.validation={wiki: [data/wiki/text]} or data.validation.wiki=[data/wiki/text]",
        ),
        ("eval.limit", "all", "eval.limit='all' has the wrong type str; give an integer or null"),
        ("model.moe", None, "model.moe=null is not allowed; give a mapping"),
        ("model.moe", 3, "model.moe=3 must be a mapping of keys; `train.py --help` lists them"),
    ],
)
def test_wrong_type_is_named_with_what_to_give(key, value, expected):
    assert refusal(**{key.replace(".", "__"): value}) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("optim.learning_rat", "unknown configuration key optim.learning_rat; "),
        ("model.moe.num_ffn_expert", "did you mean model.moe.num_ffn_experts"),
        ("train.stepps", "did you mean train.steps"),
        ("run.zzz", "known keys: run.dir, run.name, run.resume, run.seed"),
    ],
)
def test_unknown_key_comes_with_the_nearest_known_ones(key, expected):
    assert expected in refusal(**{key.replace(".", "__"): 1})


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        # What other trainers call it.
        ("optim.learning_rate", "did you mean optim.lr?"),
        ("optim.learning_rat", "did you mean optim.lr?"),
        ("optim.wd", "did you mean optim.weight_decay?"),
        ("optim.max_grad_norm", "did you mean optim.grad_clip?"),
        ("train.batch_size", "did you mean train.global_batch_size or eval.batch_size?"),
        ("train.max_steps", "did you mean train.steps?"),
        ("train.gradient_accumulation_steps", "did you mean train.micro_batch_size?"),
        ("model.n_layers", "did you mean model.num_layers?"),
        ("model.d_model", "did you mean model.hidden_size?"),
        ("model.num_experts", "did you mean model.moe.num_ffn_experts?"),
        ("parallel.ep", "did you mean parallel.expert?"),
        ("data.path", "did you mean data.paths"),
        # The right word in the wrong section, or in none.
        ("train.seed", "did you mean run.seed?"),
        ("model.top_k", "did you mean model.moe.top_k?"),
        ("lr", "did you mean optim.lr?"),
        ("tau", "did you mean model.moe.tau?"),
        ("logging.mode", "did you mean logging.wandb.mode?"),
        # Spelt wrongly.
        ("optim.weight_dcay", "did you mean optim.weight_decay?"),
        ("optim.lrr", "did you mean optim.lr?"),
        ("model.taus", "did you mean model.moe.tau?"),
        ("trian.steps", "did you mean train.steps or "),
        ("parallel.tp", "known keys: parallel.context, parallel.context_method, parallel.exchange_chunks"),
    ],
)
def test_unknown_key_suggests_what_was_meant(key, expected):
    assert expected in unknown_key_message(key, known_keys())


def test_every_synonym_stands_for_a_key():
    assert set(_SYNONYMS) <= set(known_keys())


def test_unknown_key_far_from_all_others_does_not_list_a_hundred():
    assert (
        unknown_key_message("zzz", known_keys())
        == "unknown configuration key zzz; `train.py --help` lists the known ones"
    )


def test_missing_and_unresolved_values_are_named():
    assert refusal(train__steps="???") == "train.steps=??? has no value; set it"
    assert refusal(run__name="${nothing}").startswith("run.name does not resolve: ")
    tree = {name: dict(section) for name, section in SECTIONS.items()}
    del tree["train"]["steps"]
    with pytest.raises(ConfigError, match=r"train\.steps is missing and has no default; set it"):
        from_dict(tree)


@pytest.mark.parametrize("option", ["--train.steps=5", "--steps", "-x"])
def test_option_that_hydra_does_not_have_is_refused(option):
    with pytest.raises(ConfigError, match=f"{option} is not an option; write settings as key=value"):
        refuse_unknown_options(["optim.lr=1", option])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.steps", "100"],
            "'train.steps' cannot be read: it has no equals sign; write key=value, as train.steps=100",
        ),
        (["a=b", "train.steps"], "write key=value, as train.steps=VALUE"),
        (["train.steps", "a=b"], "write key=value, as train.steps=VALUE"),
        (["train.steps=", "100"], "train.steps= '100' cannot be read: no blank may follow the equals sign"),
        (["=3"], "'=3' cannot be read: it names no key"),
        ([""], "write key=value, as key=VALUE"),
    ],
)
def test_setting_without_equals_sign_is_refused_with_how_it_is_written(overrides, message):
    with pytest.raises(ConfigError) as caught:
        refuse_incomplete_overrides(overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_settings_with_equals_signs_and_deletions_pass():
    refuse_incomplete_overrides([])
    refuse_incomplete_overrides(["a=", "~b", "~c=d", "+e='='", "++f=1", "g@h=i"])


def test_options_of_hydra_pass():
    refuse_unknown_options(["-m", "--multirun", "--cfg", "job", "--config-name=other", "a=-1", "~b", "+c=d"])


def test_fixed_keys_exist():
    fixed = """
        run.name run.dir run.seed run.resume
        model.vocab_size model.hidden_size model.num_layers model.num_heads model.num_kv_heads model.max_seq_len
        model.rope_theta model.norm_eps model.init_std model.constant_init_std
        model.tie_embeddings
        model.moe.num_ffn_experts model.moe.num_zero_experts model.moe.num_copy_experts model.moe.num_constant_experts
        model.moe.ffn_hidden_size model.moe.top_k model.moe.router model.moe.gating_residual model.moe.logits_norm_std
        model.moe.gate_normalization model.moe.scale_input_by_top_k model.moe.tau model.moe.capacity_factor
        model.moe.balance_loss_weight model.moe.z_loss_weight
        data.paths data.weights data.seq_len data.split data.validation data.tokenizer data.document_attention
        optim.lr optim.min_lr optim.warmup_steps optim.schedule optim.betas optim.weight_decay optim.grad_clip
        parallel.expert parallel.zero_stage parallel.exchange_chunks parallel.timeout_seconds parallel.heartbeat_seconds
        runtime.device runtime.backend runtime.kernels runtime.compile
        parallel.pipeline parallel.pipeline_schedule parallel.pipeline_chunks parallel.pipeline_layers
        parallel.tensor parallel.context parallel.context_method
        train.steps train.global_batch_size train.micro_batch_size train.precision train.recompute train.eval_interval
        train.eval_batches train.log_interval
        checkpoint.interval checkpoint.keep checkpoint.async
        logging.wandb.mode logging.wandb.project logging.wandb.group logging.wandb.tags
        logging.tensorboard logging.progress logging.routing logging.routing_interval logging.csv
        logging.token_tables
    """
    assert set(fixed.split()) <= set(known_keys())


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model__num_heads": 3}, ["model.hidden_size=16", "not divisible by model.num_heads=3"]),
        ({"model__num_kv_heads": 3}, ["model.num_heads=4", "not divisible by model.num_kv_heads=3"]),
        ({"model__hidden_size": 12}, ["odd head size 3"]),
        ({"logging__routing": "full"}, ["logging.routing='full' is not one of brief, detailed"]),
        ({"logging__routing_interval": -1}, ["logging.routing_interval=-1 is below its minimum 0"]),
        ({"data__validation": {"a/b": ["x"]}}, ["data.validation names 'a/b'", "letters, digits, _ and -"]),
        ({"data__validation": {"wiki": []}}, ["data.validation.wiki is empty"]),
        ({"data__validation": {"wiki": "x"}}, ["data.validation.wiki", "a list", "data.validation.wiki=[x]"]),
        (
            {"data__validation": {"piqa": ["x"]}, "eval__tasks": ["piqa"], "data__tokenizer": "t"},
            ["data.validation and eval.tasks both name piqa"],
        ),
        ({"engine__reduce_bucket_size": 0}, ["engine.reduce_bucket_size=0 is below its minimum 1"]),
        ({"engine__allgather_bucket_size": 7}, ["engine.allgather_bucket_size=7 is not an even number"]),
        (
            {"engine__name": "native", "engine__overlap_comm": True},
            ["engine.overlap_comm=true has no effect with native"],
        ),
        ({"engine__overlap_comm": True}, ["engine.overlap_comm=true has no effect", "train.precision=bf16"]),
        (
            {"parallel__zero_stage": 0, "train__precision": "fp32", "engine__allgather_bucket_size": 100},
            ["engine.allgather_bucket_size=100 has no effect with deepspeed, parallel.zero_stage=0"],
        ),
        (
            {"engine__overlap_comm": True, "train__precision": "fp32", "train__micro_batch_size": 2},
            ["engine.overlap_comm=true with ZeRO 1 and several micro-batches", "set parallel.zero_stage=2"],
        ),
        ({"runtime__device": "gpu"}, ["runtime.device='gpu' is not one of auto, cpu, cuda, xpu"]),
        ({"runtime__backend": "nccl"}, ["runtime.backend='nccl' is not one of auto, gloo"]),
        ({"parallel__heartbeat_seconds": 0.5}, ["parallel.heartbeat_seconds=0.5 is below its minimum 1"]),
        ({"model__moe_layer_interval": 2}, ["model.moe_layer_interval=2", "set model.dense_ffn_hidden_size"]),
        ({"model__moe__top_k": 5}, ["model.moe.top_k=5", "between 1 and the 4 experts"]),
        ({"model__moe__top_k": 0}, ["model.moe.top_k=0"]),
        ({"model__moe__num_ffn_experts": 0}, ["0 experts of every kind", "raise num_ffn_experts"]),
        ({"model__moe__num_zero_experts": -1}, ["model.moe.num_zero_experts=-1", "below its minimum 0"]),
        ({"model__moe__capacity_factor": 0}, ["model.moe.capacity_factor=0.0", "greater than 0"]),
        ({"model__moe__tau": -0.5}, ["model.moe.tau=-0.5"]),
        ({"model__moe__router": "hash"}, ["'hash' is not one of linear, mlp"]),
        ({"model__moe__gate_normalization": "l2"}, ["none, zero_masked, topk_softmax"]),
        ({"model__moe__drop_policy": "random"}, ["weight, position"]),
        ({"model__moe__balance_loss_scope": "node"}, ["micro_batch, data_parallel, global_batch"]),
        ({"data__paths": []}, ["data.paths is empty"]),
        ({"data__weights": [1, 2]}, ["data.weights has 2 entries and data.paths 1"]),
        ({"data__weights": [0]}, ["data.weights", "greater than 0"]),
        ({"data__split": "1,1"}, ["data.split='1,1'", "write for example '96,3,1'"]),
        ({"data__split": "0,1,1"}, ["data.split='0,1,1'"]),
        ({"data__split": "90,-5,15"}, ["data.split='90,-5,15'"]),
        ({"data__seq_len": 33}, ["data.seq_len=33", "model.max_seq_len=32"]),
        ({"optim__name": "adam"}, ["'adam' is not one of adamw, sgd"]),
        ({"optim__schedule": "step"}, ["cosine, linear, constant"]),
        ({"optim__lr": 0}, ["optim.lr=0.0"]),
        ({"optim__lr": 1e-5, "optim__min_lr": 5e-5}, ["optim.min_lr=5e-05", "between 0 and optim.lr=1e-05"]),
        ({"optim__betas": [0.9, 1.0]}, ["optim.betas=[0.9, 1.0]", "in [0, 1)"]),
        ({"optim__betas": [0.9]}, ["optim.betas=[0.9]"]),
        ({"optim__grad_clip": 0}, ["optim.grad_clip=0.0"]),
        ({"optim__weight_decay": -1}, ["optim.weight_decay=-1.0"]),
        ({"parallel__expert": 0}, ["parallel.expert=0", "below its minimum 1"]),
        ({"parallel__zero_stage": 4}, ["parallel.zero_stage=4", "0, 1, 2, 3"]),
        ({"parallel__zero_stage": 3}, ["parallel.zero_stage=3", "set it to 0, 1 or 2", "engine=fsdp"]),
        ({"parallel__pipeline": 0}, ["parallel.pipeline=0", "below its minimum 1"]),
        ({"parallel__tensor": 0}, ["parallel.tensor=0"]),
        ({"parallel__context": -1}, ["parallel.context=-1"]),
        ({"parallel__pipeline_chunks": 0}, ["parallel.pipeline_chunks=0"]),
        ({"parallel__pipeline_layers": [2, 0]}, ["parallel.pipeline_layers", "below its minimum 1"]),
        ({"parallel__pipeline_schedule": "gpipe"}, ["'gpipe' is not one of 1f1b, interleaved"]),
        ({"parallel__context_method": "ring"}, ["'ring' is not one of ulysses, gather"]),
        (
            {"parallel__zero_stage": 2, "engine__name": "native"},
            ["parallel.zero_stage=2", "engine=deepspeed"],
        ),
        ({"parallel__zero_stage": 3, "engine__name": "native"}, ["parallel.zero_stage=3", "engine=fsdp"]),
        (
            {"parallel__zero_stage": 1, "engine__name": "fsdp"},
            ["parallel.zero_stage=1", "set it to 3"],
        ),
        ({"train__samples": 1, "engine__name": "fsdp"}, ["train.samples=1", "engine=fsdp"]),
        ({"parallel__zero_stage": 0}, ["train.precision=bf16", "set parallel.zero_stage=1, or use engine=native"]),
        ({"engine__name": "megatron"}, ["'megatron' is not one of deepspeed, native, fsdp"]),
        ({"train__steps": 0}, ["train.steps=0", "below its minimum 1"]),
        ({"train__precision": "fp16"}, ["bf16, fp32"]),
        ({"train__micro_batch_size": 3}, ["train.global_batch_size=8", "make it a multiple of 3"]),
        ({"train__log_interval": 0}, ["train.log_interval=0"]),
        ({"checkpoint__keep": -1}, ["checkpoint.keep=-1"]),
        ({"logging__wandb__mode": "on"}, ["offline, online, disabled"]),
        (
            {"logging__wandb__project": "a/b"},
            ["logging.wandb.project='a/b' has /", "set another logging.wandb.project"],
        ),
        ({"logging__wandb__project": "a:b%c"}, ["has % :"]),
        ({"logging__wandb__project": "x" * 129}, ["must be 1 to 128 printable characters"]),
        ({"logging__wandb__project": ""}, ["must be 1 to 128 printable characters"]),
        ({"run__name": "a\nb"}, ["run.name='a\\nb' holds the control character '\\n'"]),
        ({"run__name": "ä" * 128}, ["at most 255 bytes"]),
        ({"run__dir": ""}, ["run.dir is empty"]),
        ({"run__name": "a/b"}, ["run.name='a/b'", "remove slashes, or set run.dir"]),
        ({"run__name": ""}, ["run.name=''"]),
        ({"run__seed": -1}, ["run.seed=-1"]),
        ({"parallel__timeout_seconds": 1e300}, ["parallel.timeout_seconds=1e+300 is above its maximum 100,000,000"]),
        ({"parallel__heartbeat_seconds": 1e9}, ["parallel.heartbeat_seconds=1000000000.0 is above its maximum"]),
        ({"data__paths": ["a", "b"], "data__weights": [1e308, 1e308]}, ["data.weights entry=1e+308 is above its"]),
        ({"train__steps": 10**18}, ["train.steps=1000000000000000000 is above its maximum 1,000,000,000; lower it"]),
        ({"train__log_interval": 2**63}, ["train.log_interval=9223372036854775808 is above its maximum"]),
        ({"optim__eps": 1e300}, ["optim.eps=1e+300 is above its maximum 1,000,000,000,000"]),
        ({"model__vocab_size": 10**13}, ["model.vocab_size=10000000000000 is above its maximum 1,000,000,000"]),
        ({"model__num_layers": 10**9}, ["model.num_layers=1000000000 is above its maximum 10,000"]),
        ({"model__moe__num_copy_experts": 10**7}, ["model.moe.num_copy_experts=10000000 is above its maximum 100,000"]),
    ],
)
def test_impossible_value_is_refused(changes, parts):
    message = refusal(**changes)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("world_size", "changes", "parts"),
    [
        (2, {"parallel__expert": 3}, ["parallel.expert=3", "does not divide the 2 processes"]),
        (4, {"parallel__expert": 4, "model__moe__num_ffn_experts": 6}, ["does not divide", "num_ffn_experts=6"]),
        (2, {"parallel__exchange_chunks": 2}, ["parallel.exchange_chunks=2", "parallel.expert=1", "raise"]),
        (
            2,
            {"parallel__expert": 2, "parallel__exchange_chunks": 4},
            ["exchange_chunks=4", "the 2 FFN experts", "lower"],
        ),
        (8, {"parallel__expert": 8}, ["parallel.expert=8 exceeds model.moe.num_ffn_experts=4", "lower"]),
        (3, {}, ["train.global_batch_size=8", "micro_batch_size 2 x 3 processes", "a multiple of 6"]),
        (16, {}, ["train.global_batch_size=8", "1 x 16 processes"]),
        (4, {"train__micro_batch_size": 4}, ["4 x 4 processes", "a multiple of 16"]),
    ],
)
def test_layout_that_does_not_fit_the_processes_is_refused(world_size, changes, parts):
    message = refusal(world_size, **changes)
    assert all(part in message for part in parts), message


def test_layouts_that_fit_pass():
    validate(make(), 1)
    for world_size, ep in ((2, 1), (2, 2), (4, 2), (8, 4)):
        validate(make(parallel__expert=ep), world_size)
    validate(make(model__moe={"num_ffn_experts": 0, "num_copy_experts": 2}, parallel__expert=1), 2)
    validate(make(parallel__zero_stage=0, train__precision="fp32"), 1)


def test_batch_is_split_over_ranks_and_micro_batches():
    plans = [validate(make(), n) for n in (1, 2, 8)]
    assert [(plan.micro_batch_size, plan.accumulation_steps) for plan in plans] == [(8, 1), (4, 1), (1, 1)]
    small = [validate(make(train__micro_batch_size=2), n) for n in (1, 2, 4)]
    assert [plan.accumulation_steps for plan in small] == [4, 2, 1]
    assert {plan.tokens_per_step for plan in plans + small} == {8 * make().data.seq_len}


def test_a_rewind_has_batches_to_go_on_with():
    steps = make().train.steps
    assert validate(make(guard__spike_sigma=5.0), 1).train_batches == steps
    rewinds = {"guard__spike_sigma": 5.0, "guard__spike_action": "rewind", "guard__max_rewinds": 3}
    assert validate(make(**rewinds, checkpoint__interval=5), 1).train_batches == steps + 3 * 2 * 5


def test_zero_stage_defaults_to_what_the_engine_can_do():
    assert make_plan(make(), 1).zero_stage == 1
    assert make_plan(make(engine__name="native"), 1).zero_stage == 0
    assert make_plan(make(parallel__zero_stage=2), 1).zero_stage == 2
