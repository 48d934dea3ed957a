"""Starting from a dense Llama-format checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moepp.config import InitConfig, ModelConfig, MoEConfig, RopeScalingConfig, split_layers
from moepp.errors import CheckpointError, ConfigError
from moepp.interop import upcycle
from moepp.model import Transformer, init_parameters
from moepp.model.part import ModelPart
from tests.data_files import numbered_documents, write_indexed

ROOT = Path(__file__).resolve().parents[3]

CFG = ModelConfig(
    vocab_size=23,
    hidden_size=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=32,
    rope_theta=500.0,
    norm_eps=1e-5,
    init_std=0.4,
    moe=MoEConfig(
        num_ffn_experts=4, ffn_hidden_size=20, num_zero_experts=1, num_copy_experts=1, num_constant_experts=2
    ),
)
LLAMA = {
    "model_type": "llama",
    "vocab_size": 23,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
SEED = 77


def dense_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"model.embed_tokens.weight": (23, 16), "model.norm.weight": (16,), "lm_head.weight": (23, 16)}
    for layer in range(3):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{n}_layernorm.weight": (16,) for n in ("input", "post_attention")}
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (16, 16) for n in "qo"}
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (8, 16) for n in "kv"}
        shapes |= {f"{at}.mlp.{n}_proj.weight": (20, 16) for n in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (16, 20)
    return {key: 0.1 + torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def write_dense(folder: Path, tensors: dict[str, Tensor], **changes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    save_file(tensors, folder / "model.safetensors")
    return folder


def upcycled(folder: Path, cfg: ModelConfig = CFG, ep: tuple[int, int] = (0, 1), **init) -> Transformer:
    model = Transformer(cfg)
    rank, size = ep
    local = cfg.moe.num_ffn_experts // size
    for layer in model.layers:
        for name in ("gate_up_proj", "down_proj"):
            full = getattr(layer.moe.experts, name)
            setattr(layer.moe.experts, name, torch.nn.Parameter(torch.empty_like(full[:local])))
    init_parameters(model, SEED, rank, size)
    upcycle.load_into(model, folder, InitConfig(path=str(folder), format="dense", **init), SEED, rank, size)
    return model


def test_every_expert_is_the_dense_ffn_and_the_router_is_fresh(tmp_path):
    tensors = dense_tensors()
    model = upcycled(write_dense(tmp_path, tensors))
    fresh = Transformer(CFG)
    init_parameters(fresh, SEED)
    for i, layer in enumerate(model.layers):
        at = f"model.layers.{i}.mlp"
        gate_up = torch.cat((tensors[f"{at}.gate_proj.weight"], tensors[f"{at}.up_proj.weight"]))
        for expert in range(4):
            assert torch.equal(layer.moe.experts.gate_up_proj[expert], gate_up)
            assert torch.equal(layer.moe.experts.down_proj[expert], tensors[f"{at}.down_proj.weight"])
        assert torch.equal(layer.self_attn.k_proj.weight, tensors[f"model.layers.{i}.self_attn.k_proj.weight"])
        for part in (
            "router.weight",
            "router.gate_map.weight",
            "zero_computation.alpha_proj",
            "zero_computation.value",
        ):
            assert torch.equal(layer.moe.get_parameter(part), fresh.layers[i].moe.get_parameter(part))
    for name in ("embed_tokens", "norm", "lm_head"):
        assert torch.equal(
            getattr(model, name).weight, tensors[("" if name == "lm_head" else "model.") + f"{name}.weight"]
        )


@torch.no_grad()
def test_with_ffn_experts_alone_the_model_computes_what_the_dense_one_did(tmp_path):
    """K equal experts whose weights sum to 1 are the dense FFN."""
    tensors = dense_tensors()
    cfg = replace(CFG, moe=MoEConfig(num_ffn_experts=4, ffn_hidden_size=20, gate_normalization="topk_softmax"))
    model = upcycled(write_dense(tmp_path, tensors), cfg).eval()
    dense_cfg = replace(CFG, moe_layer_interval=9, dense_ffn_hidden_size=20)  # no layer is an MoE layer
    dense = Transformer(dense_cfg).eval()
    dense.load_state_dict({key.removeprefix("model."): tensor for key, tensor in tensors.items()})
    ids = torch.arange(14).view(2, 7)
    torch.testing.assert_close(model(ids).hidden, dense(ids).hidden, rtol=1e-4, atol=1e-4)


def test_noise_is_relative_and_differs_by_expert_and_layer(tmp_path):
    tensors = dense_tensors()
    tensors["model.layers.1.mlp.down_proj.weight"] *= 50
    model = upcycled(write_dense(tmp_path, tensors), noise_std=0.1)
    noises = []
    for layer in (0, 1):
        dense = tensors[f"model.layers.{layer}.mlp.down_proj.weight"]
        for expert in range(4):
            noise = model.layers[layer].moe.experts.down_proj[expert].detach() - dense
            assert noise.std().item() == pytest.approx(0.1 * dense.std().item(), rel=0.2)
            noises.append((noise / noise.std()).flatten())
    likeness = torch.stack(noises) @ torch.stack(noises).t() / noises[0].numel()
    assert (likeness - torch.eye(8)).abs().max() < 0.3


def test_reinitialised_units_are_whole_and_differ_by_expert(tmp_path):
    tensors = dense_tensors()
    model = upcycled(write_dense(tmp_path, tensors), reinit_fraction=0.25)
    chosen = set()
    for i, layer in enumerate(model.layers):
        at = f"model.layers.{i}.mlp"
        gate, up, down = (tensors[f"{at}.{n}_proj.weight"] for n in ("gate", "up", "down"))
        for expert in range(4):
            own_gate, own_up = layer.moe.experts.gate_up_proj[expert].chunk(2)
            own_down = layer.moe.experts.down_proj[expert]
            changed = (own_gate != gate).all(1)
            assert changed.sum() == 5  # of 20 hidden units
            assert torch.equal((own_gate != gate).any(1), changed)
            assert torch.equal((own_up != up).all(1), changed) and torch.equal((own_up != up).any(1), changed)
            assert torch.equal((own_down != down).all(0), changed) and torch.equal((own_down != down).any(0), changed)
            chosen.add(tuple(changed.tolist()))
    assert len(chosen) == 12
    everything = upcycled(tmp_path, reinit_fraction=1.0).layers[0].moe.experts.gate_up_proj[0, :20]
    assert everything.mean().item() == pytest.approx(gate.mean().item(), abs=0.15)
    assert everything.std().item() == pytest.approx(gate.std().item(), rel=0.15)


def test_all_layouts_start_from_the_same_weights(tmp_path):
    folder = write_dense(tmp_path, dense_tensors())
    options = {"noise_std": 0.1, "reinit_fraction": 0.5}
    whole = upcycled(folder, **options)
    for rank in (0, 1):
        half = upcycled(folder, ep=(rank, 2), **options)
        for name, parameter in half.named_parameters():
            expected = whole.get_parameter(name)
            expected = expected[2 * rank : 2 * rank + 2] if ".experts." in name else expected
            assert torch.equal(parameter, expected), name


def test_stages_of_a_pipeline_start_from_the_weights_of_the_whole_model(tmp_path):
    folder = write_dense(tmp_path, dense_tensors())
    options = {"noise_std": 0.1, "reinit_fraction": 0.5}
    whole, seen = upcycled(folder, **options), set()
    for stages in ((0,), (1,)):
        part = Transformer(CFG, part=ModelPart.of_stages(split_layers(CFG.num_layers, 2), stages))
        init_parameters(part, SEED)
        upcycle.load_into(part, folder, InitConfig(path=str(folder), format="dense", **options), SEED)
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter, whole.get_parameter(name)), name
            seen.add(name)
    assert seen == {name for name, _ in whole.named_parameters()}


def test_dense_layers_between_keep_their_ffn(tmp_path):
    tensors = dense_tensors()
    cfg = replace(CFG, moe_layer_interval=2, dense_ffn_hidden_size=20)
    model = Transformer(cfg)
    init_parameters(model, SEED)
    init = InitConfig(path=str(tmp_path), format="dense")
    upcycle.load_into(model, write_dense(tmp_path, tensors), init, SEED)
    assert torch.equal(model.layers[2].mlp.up_proj.weight, tensors["model.layers.2.mlp.up_proj.weight"])
    assert torch.equal(model.layers[1].moe.experts.down_proj[3], tensors["model.layers.1.mlp.down_proj.weight"])


def test_newer_and_older_llama_folders_are_read(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    cfg = replace(CFG, rope_scaling=RopeScalingConfig("linear", 4.0), tie_embeddings=True)
    tensors = dense_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # pickled files name the matrix twice
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    newer = {"rope_parameters": rope, "rope_theta": None, "tie_word_embeddings": True, "head_dim": 4}
    folder = write_dense(tmp_path, tensors, **newer)
    assert torch.equal(upcycled(folder, cfg).embed_tokens.weight, tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 24}, r"ffn_hidden_size=20 \(the weights have 24: the dense FFN is copied whole"),
        ({"hidden_size": 32, "vocab_size": 24}, r"vocab_size=23 \(the weights have 24\); model.hidden_size=16"),
        ({"head_dim": 8}, "head size=4"),
        ({"rope_theta": 1e6}, "rope_theta=500.0"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"model_type": "gpt2"}, "type 'gpt2'"),
        ({"attention_bias": True}, "biases"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, changes, message):
    folder = write_dense(tmp_path, dense_tensors(), **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        upcycle.check_folder(folder, CFG)
    assert "\n" not in str(error.value)


def test_missing_and_extra_tensors_are_listed(tmp_path):
    tensors = dense_tensors()
    tensors["model.layers.0.self_attn.q_proj.bias"] = tensors.pop("model.layers.2.mlp.gate_proj.weight")
    with pytest.raises(CheckpointError, match=r"missing \(model\.layers\.2\.mlp\.gate.*unexpected \(.*q_proj\.bias"):
        upcycle.check_folder(write_dense(tmp_path, tensors), CFG)


def test_noise_without_a_dense_source_is_refused():
    with pytest.raises(ConfigError, match=r"noise_std=0\.1"):
        InitConfig(noise_std=0.1)
    with pytest.raises(ConfigError, match=r"reinit_fraction=1\.5"):
        InitConfig(format="dense", reinit_fraction=1.5)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_sharded_run_starts_from_the_dense_model(tmp_path, wrong):
    """Two processes; with noise and without training drops, the first loss is near the dense model's."""
    folder = write_dense(tmp_path / "dense", dense_tensors())
    data = write_indexed(tmp_path / "words", numbered_documents([20]) * 80)
    model = ["num_layers=3", "hidden_size=16", "num_heads=4", "num_kv_heads=2", "vocab_size=23", "max_seq_len=32"]
    model += [
        "rope_theta=500.0",
        "norm_eps=1e-5",
        f"moe.ffn_hidden_size={16 if wrong else 20}",
        "moe.num_ffn_experts=4",
    ]
    model += ["moe.num_zero_experts=0", "moe.num_copy_experts=0", "moe.num_constant_experts=0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    command += [*(f"model.{key}" for key in model), f"init.path={folder}", "init.format=dense", "init.noise_std=0.001"]
    command += [f"run.dir={tmp_path / 'run'}", "parallel.expert=2", f"data.paths=[{data}]", "data.tokenizer=null"]
    command += ["data.seq_len=19", "data.split='90,10,0'", "engine=native", "train.precision=fp32", "train.steps=1"]
    command += ["train.global_batch_size=2", "train.log_interval=1", "train.eval_batches=0", "train.samples=0"]
    command += ["logging.wandb.mode=disabled", "logging.progress=false"]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=200)
    if wrong:
        assert done.returncode != 0
        assert "ffn_hidden_size=16 (the weights have 20: the dense FFN is copied whole" in done.stderr
        return
    assert done.returncode == 0, done.stderr[-2000:]
    dense_cfg = replace(CFG, moe_layer_interval=9, dense_ffn_hidden_size=20)
    dense = Transformer(dense_cfg).eval()
    dense.load_state_dict({key.removeprefix("model."): tensor for key, tensor in dense_tensors().items()})
    tokens = torch.arange(20)  # every sequence is a rotation of these: documents follow one another
    losses = []
    for start in range(20):
        sequence = tokens.roll(-start)[None]
        out = dense.loss(sequence[:, :-1], sequence[:, 1:])
        losses.append((out.ce_sum / out.num_tokens).item())
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert min(losses) - 0.1 < record["train/loss"] < max(losses) + 0.1
    assert min(losses) > 3.6  # far from ln 23 = 3.1, where a fresh model starts
