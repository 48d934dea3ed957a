"""The project's own Hugging Face format: code that computes what training computes, and files that come back."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from moepp.config import ModelConfig, MoEConfig, RopeScalingConfig
from moepp.errors import CheckpointError
from moepp.interop import hf, official
from moepp.interop.weights import TensorFolder
from moepp.model import Transformer, generate, init_parameters
from tests.hf_checks import CLOSE, check_folder

ROOT = Path(__file__).resolve().parents[3]
NO_TOKENS = official.TokenIds(None, None, None)
MOE = MoEConfig(
    num_ffn_experts=5,
    ffn_hidden_size=24,
    num_zero_experts=2,
    num_copy_experts=1,
    num_constant_experts=3,
    top_k=3,
    router="mlp",
    gate_normalization="zero_masked",
    scale_input_by_top_k=True,
)
CFG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=64,
    init_std=0.3,
    moe_layer_interval=2,
    dense_ffn_hidden_size=20,
    moe=MOE,
)
# What the released code cannot express is here in one combination or other.
CONFIGS = {
    "mlp_interval": CFG,
    "tied_paper": replace(
        CFG,
        tie_embeddings=True,
        moe_layer_interval=1,
        dense_ffn_hidden_size=None,
        moe=replace(MOE, router="linear", gate_normalization="none", scale_input_by_top_k=False, top_k=1),
    ),
    "vanilla_mixtral": replace(
        CFG,
        moe=MoEConfig(num_ffn_experts=4, ffn_hidden_size=16, gate_normalization="topk_softmax", gating_residual=False),
    ),
    "norm_dynamic": replace(
        CFG,
        max_seq_len=8,
        rope_scaling=RopeScalingConfig("dynamic", 2.0),
        moe=replace(MOE, logits_norm_std=1.5, num_constant_experts=0),
    ),
    "linear_rope": replace(CFG, rope_scaling=RopeScalingConfig("linear", 2.0), num_kv_heads=4),
    "ntk_rope": replace(CFG, rope_scaling=RopeScalingConfig("ntk", 4.0), moe=replace(MOE, num_copy_experts=0)),
}


def make_model(cfg: ModelConfig) -> Transformer:
    model = Transformer(cfg)
    init_parameters(model, 3)
    return model.eval()


@torch.no_grad()
def export(folder: Path, cfg: ModelConfig) -> Transformer:
    """A folder with what training's model computes, in ``expected.pt``."""
    model = make_model(cfg)
    hf.save_pretrained(model, folder, NO_TOKENS)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, cfg.vocab_size, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, 9:] = 0
    positions = torch.randint(0, 40, ids.shape, generator=generator)
    labels = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), dim=1)
    loss = model.loss(ids, labels)
    expected = {
        "ids": ids,
        "mask": mask,
        "positions": positions,
        "logits": model.logits(model(ids).hidden),
        "padded_logits": model.logits(model(ids, attention_mask=mask).hidden),
        "positioned_logits": model.logits(model(ids, positions).hidden),
        "loss": loss.ce_sum / loss.num_tokens,
        "prompt": ids[:, :6],
        "greedy": generate(model, ids[:, :6], 9),
    }
    torch.save(expected, folder / "expected.pt")
    return model


@pytest.fixture(autouse=True, scope="module")
def own_module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies remote code into a cache in the home folder; here it goes elsewhere, and away again."""
    import transformers.dynamic_module_utils as modules

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        # Without the caches that other modules' tests have put there: Python would look for the code in those.
        patch.setattr(sys, "path", [place for place in sys.path if not Path(place, "transformers_modules").is_dir()])
        patch.setenv("HF_HUB_OFFLINE", "1")
        forget_remote_code()
        yield
    forget_remote_code()


def forget_remote_code() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]
    importlib.invalidate_caches()


# Dynamic RoPE keeps the angles of cached keys, so decoding in pieces is not the same there (nor in training).
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "norm_dynamic"])
def test_the_code_computes_what_training_computes(tmp_path, name):
    folder = tmp_path / name
    export(folder, CONFIGS[name])
    check_folder(folder)


@torch.no_grad()
def test_dynamic_rope_beyond_the_trained_positions_is_that_of_training(tmp_path):
    from transformers import AutoModelForCausalLM

    export(tmp_path / "dynamic", CONFIGS["norm_dynamic"])
    want = torch.load(tmp_path / "dynamic" / "expected.pt")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dynamic", trust_remote_code=True).eval()
    torch.testing.assert_close(model(want["ids"]).logits, want["logits"], **CLOSE)
    out = model.generate(want["prompt"], max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert torch.equal(out, want["greedy"])


OLD_VERSIONS = {
    "4.46.3": ("tokenizers==0.20.3", "huggingface_hub==0.36.0"),
    "4.57.6": ("tokenizers==0.22.1", "huggingface_hub==0.36.0"),
    "5.0.0": ("tokenizers==0.22.1", "huggingface_hub==1.3.4"),
}


def check_in_version(version: str, folder: Path) -> None:
    target = folder.parent / "packages"
    wanted = [f"transformers=={version}", *OLD_VERSIONS[version]]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(target)]
    try:
        installed = subprocess.run([*pip, *wanted], capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        pytest.skip(f"pip did not install transformers {version} in time")
    if installed.returncode != 0:
        pytest.skip(f"pip cannot install transformers {version}: {installed.stderr.strip()[-200:]}")
    exported = sorted(folder.iterdir())
    environ = os.environ | {
        "PYTHONPATH": f"{target}{os.pathsep}{ROOT}",
        "HF_MODULES_CACHE": str(folder.parent / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.hf_checks", *map(str, exported)]
    checked = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=ROOT, timeout=240)
    assert checked.returncode == 0, checked.stderr[-3000:]
    assert {f"{path.name}:{version}" for path in exported} <= set(checked.stdout.split()), checked.stdout


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders, so different that together they use all of the code."""
    folder = tmp_path_factory.mktemp("exported")
    for name in ("mlp_interval", "tied_paper"):
        export(folder / name, CONFIGS[name])
    return folder


# The oldest and the newest of those that are not installed; those between are exhaustive.
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "version", ["4.46.3", "5.0.0", pytest.param("4.57.6", marks=pytest.mark.exhaustive)], ids=lambda version: version
)
def test_the_code_works_in_other_versions_of_transformers(exported, tmp_path_factory, version, two_at_a_time):
    def check(version: str) -> None:
        copy = tmp_path_factory.mktemp("transformers") / "exported"
        shutil.copytree(exported, copy)
        check_in_version(version, copy)

    two_at_a_time("version", check)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_comes_back_bitwise(tmp_path, name, dtype):
    model = make_model(CONFIGS[name]).to(dtype)
    hf.save_pretrained(model, tmp_path, official.TokenIds(3, 4, None))
    again = Transformer(hf.read_config(tmp_path)).to(dtype)
    hf.load_into(again, tmp_path)
    state = again.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert again.cfg == CONFIGS[name]
    hf.save_pretrained(again, tmp_path / "again", official.TokenIds(3, 4, None))
    for file in ("config.json", "generation_config.json", "model.safetensors", "modeling_moepp.py"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_a_rank_reads_its_own_experts_alone(tmp_path, monkeypatch):
    cfg = replace(CFG, moe=replace(MOE, num_ffn_experts=6))
    model = make_model(cfg)
    hf.save_pretrained(model, tmp_path, NO_TOKENS)
    shard = make_model(cfg)
    for layer in (shard.layers[1], shard.layers[3]):
        for name in ("gate_up_proj", "down_proj"):
            full = getattr(layer.moe.experts, name)
            setattr(layer.moe.experts, name, torch.nn.Parameter(torch.zeros_like(full[:2])))
    read, rows = TensorFolder.read, set()

    def spy(self, key, row=None):
        if ".experts." in key:
            rows.add(row)
        return read(self, key, row)

    monkeypatch.setattr(TensorFolder, "read", spy)
    hf.load_into(shard, tmp_path, ep_rank=2, ep_size=3)
    assert rows == {4, 5}
    assert torch.equal(shard.layers[3].moe.experts.down_proj, model.layers[3].moe.experts.down_proj[4:])


def test_bad_folders_are_refused(tmp_path):
    model = make_model(CFG)
    hf.save_pretrained(model, tmp_path, NO_TOKENS)
    config = json.loads((tmp_path / "config.json").read_text())

    def refused(changes: dict, message: str) -> None:
        tree = {key: value for key, value in (config | changes).items() if value != "absent"}
        (tmp_path / "config.json").write_text(json.dumps(tree))
        with pytest.raises(CheckpointError, match=message) as error:
            hf.load_into(model, tmp_path)
        assert "\n" not in str(error.value)

    refused({"model_type": "MoE++"}, "type 'MoE\\+\\+', not 'moepp'")
    refused({"router": "absent"}, "lacks router")
    refused({"num_ffn_experts": "5"}, "num_ffn_experts='5'")
    refused({"router": "linear"}, r"model.moe.router=mlp \(the weights have linear\)")
    refused({"num_hidden_layers": 3, "rotary_theta": 9.0}, r"num_layers=4 .*have 3\); model.rope_theta=10000")


def test_shards_hold_what_one_file_holds(tmp_path):
    model = make_model(CFG)
    hf.save_pretrained(model, tmp_path / "one", NO_TOKENS)
    files = hf.write_hf(
        lambda name, e: model.state_dict()[name] if e is None else model.state_dict()[name][e],
        CFG,
        tmp_path / "many",
        token_ids=NO_TOKENS,
        dtype=torch.float32,
        max_shard_bytes=20_000,
    )
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 3 and all((tmp_path / "many" / name).stat().st_size < 35_000 for name in shards)
    one, many = TensorFolder(tmp_path / "one"), TensorFolder(tmp_path / "many")
    assert one.shapes == many.shapes and all(torch.equal(one.read(key), many.read(key)) for key in one.shapes)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    hf.save_pretrained(model, tmp_path / "many", NO_TOKENS)  # an export over an export leaves no old shard behind
    assert sorted(p.name for p in (tmp_path / "many").glob("*.safetensors*")) == ["model.safetensors"]
