"""The released format under every flag of its configuration, and what is refused."""

from __future__ import annotations

import json
import pickle
import zipfile

import pytest
import torch

from moepp.errors import CheckpointError
from moepp.interop import official
from moepp.model import Transformer, generate, init_parameters
from tests.official_cases import GOLDEN, Reference, released_config, released_tensors, write_released

FLAG_SETS = {
    "defaults": {},
    "linear_router": {"moe_2layer_gate": False},
    "mixtral": {"moe_use_mixtral_gating": True, "moe_2layer_gate": False},
    "mixtral_logits_norm": {"moe_use_mixtral_gating": True, "moe_use_logits_norm": True, "moe_gate_norm_std": 0.7},
    "logits_norm": {"moe_use_logits_norm": True, "moe_gate_norm_std": 2.5},
    "no_scaling": {"moe_feature_no_mul_topk": True},
    "kv_heads_absent": {"num_key_value_heads": "absent"},
    "tied": {"tie_word_embeddings": True},
    "eps_and_defaults": {"rms_norm_eps": 0.1, "rope_theta": "absent", "pad_token_id": "absent"},
    "rope_linear": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "rope_ntk": {"rope_scaling": {"type": "ntk", "factor": 3.0}},
    "rope_dynamic": {"rope_scaling": {"type": "dynamic", "factor": 3.0}},
    "no_ffn_expert": {"num_experts": [4]},
}
IDS = torch.randint(1, 37, (2, 21), generator=torch.Generator().manual_seed(3))  # 21 > max_position_embeddings = 16


def make(tmp_path, layout="safetensors", **flags):
    config = released_config(**flags)
    tensors = released_tensors(config)
    return write_released(tmp_path / "released", config, tensors, layout), config, tensors


def check_against_reference(model, reference, ids_BS, **inputs):
    out = model(ids_BS, **inputs)
    num_layers, length = len(out.topk_ids), ids_BS.shape[1]
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    for b, ids in enumerate(ids_BS.tolist()):
        logits, chosen = reference(
            ids,
            None if positions is None else positions[b].tolist(),
            None if mask is None else mask[b].tolist(),
        )
        real = slice(None) if mask is None else mask[b].bool()
        torch.testing.assert_close(out.logits[b][real].double(), logits[real], rtol=1e-4, atol=2e-4)
        for layer in range(num_layers):
            for t in range(length):
                if mask is None or mask[b, t]:
                    row = b * length + t
                    own = zip(out.topk_ids[layer][row].tolist(), out.topk_weights[layer][row].tolist(), strict=True)
                    assert dict(own) == pytest.approx(chosen[layer][t], abs=1e-4)
    assert not out.logits.isnan().any()


@torch.no_grad()
@pytest.mark.parametrize("flags", FLAG_SETS.values(), ids=FLAG_SETS)
def test_logits_and_routing_follow_the_format_text(tmp_path, flags):
    folder, config, tensors = make(tmp_path, **flags)
    model = official.load_pretrained(folder)
    check_against_reference(model, Reference(config, tensors), IDS)
    transformer = Transformer(official.read_config(folder))
    official.load_into(transformer, folder)
    transformer.eval()
    torch.testing.assert_close(transformer.logits(transformer(IDS).hidden), model(IDS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "ntk", "dynamic"])
def test_dynamic_rope_alone_remembers_the_longest_input(tmp_path, kind):
    folder, config, tensors = make(tmp_path, rope_scaling={"type": kind, "factor": 2.0})
    model, reference, short = official.load_pretrained(folder), Reference(config, tensors), IDS[:1, :8]
    before = model(short).logits
    check_against_reference(model, reference, IDS[:1])
    check_against_reference(model, reference, short)
    assert torch.equal(model(short).logits, before) == (kind != "dynamic")


@torch.no_grad()
def test_padding_and_positions_follow_the_format_text(tmp_path):
    folder, config, tensors = make(tmp_path)
    model, reference, ids = official.load_pretrained(folder), Reference(config, tensors), IDS[:, :9]
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0]])
    positions = torch.tensor([[0, 3, 4, 9, 12, 13, 20, 21, 40], [5, 4, 3, 2, 1, 0, 7, 7, 7]])
    check_against_reference(model, reference, ids, attention_mask=mask)
    check_against_reference(model, reference, ids, attention_mask=mask, position_ids=positions)
    check_against_reference(model, reference, ids, position_ids=positions)


@pytest.mark.parametrize("layout", ["sharded", "bin", "sharded-bin"])
def test_every_layout_of_files_gives_the_same_tensors(tmp_path, layout):
    folder, _, tensors = make(tmp_path, layout)
    whole, _, _ = make(tmp_path / "whole")
    state = official.load_pretrained(folder).state_dict()
    expected = official.load_pretrained(whole).state_dict()
    assert len(state) == len(expected) and all(torch.equal(state[key], expected[key]) for key in expected)
    key = "layers.1.moe.experts.down_proj"
    assert torch.equal(
        state[f"transformer.{key}"][2], tensors["model.layers.1.mlp.moe.experts.experts.2.down_proj.weight"]
    )


def test_code_prefixes_bf16_and_fp32_routers_are_read(tmp_path):
    code = {"AutoConfig": "some/repo--configuration_moe_plus_plus.MoeConfig"}
    config = released_config(auto_map=code, torch_dtype="bfloat16")
    tensors = {k: t if ".gate.wg." in k else t.bfloat16() for k, t in released_tensors(config).items()}
    model = official.load_pretrained(write_released(tmp_path, config, tensors), torch.bfloat16)
    router = model.transformer.layers[0].moe.router
    assert torch.equal(router.fc1.weight, tensors["model.layers.0.mlp.moe.gate.wg.0.weight"])
    assert router.fc1.weight.dtype == torch.float32 and router.gate_map.weight.dtype == torch.bfloat16
    assert model(IDS).logits.dtype == torch.float32


def test_absent_keys_have_the_released_defaults(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "MoE++"}))
    cfg = official.read_config(tmp_path)
    assert (cfg.vocab_size, cfg.hidden_size, cfg.num_layers, cfg.max_seq_len) == (32000, 4096, 32, 2048)
    assert (cfg.num_heads, cfg.num_kv_heads, cfg.rope_theta, cfg.norm_eps, cfg.init_std) == (32, 32, 1e4, 1e-6, 0.02)
    assert (cfg.rope_scaling, cfg.tie_embeddings, cfg.moe.num_ffn_experts, cfg.moe.ffn_hidden_size) == (
        *(None, False, 28, 11008),
    )
    assert (cfg.moe.router, cfg.moe.logits_norm_std, cfg.moe.gate_normalization) == ("mlp", None, "zero_masked")
    assert cfg.moe.scale_input_by_top_k and cfg.moe.gating_residual and cfg.moe.top_k == 2


def test_generation_stops_at_eos_pads_and_masks_like_the_released_code(tmp_path):
    folder, _, _ = make(tmp_path)
    model = official.load_pretrained(folder)
    free = model.generate(IDS[:, :5], max_new_tokens=8, eos_id=None)
    eos = free[0, 7].item()
    assert eos not in free[0, 5:7].tolist() and eos not in free[1, 5:8].tolist()
    out = model.generate(IDS[:, :5], max_new_tokens=8, eos_id=eos)
    assert out[0, 8:].unique().tolist() == [0]  # the padding token
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), IDS[:1, :5]), dim=1)
    assert torch.equal(model.generate(padded, max_new_tokens=8, eos_id=None)[:, 9:], free[:1, 5:])
    no_cache = generate(model.transformer, IDS[:, :5], 8, cache=False)
    assert torch.equal(no_cache, free)


@pytest.mark.parametrize("ep_rank", [0, 1, 2])
def test_a_rank_reads_its_own_experts_alone(tmp_path, ep_rank, monkeypatch):
    folder, _, tensors = make(tmp_path, num_experts=[10])
    cfg = official.read_config(folder)
    shard = Transformer(cfg)
    for layer in shard.layers:
        for name in ("gate_up_proj", "down_proj"):
            full = getattr(layer.moe.experts, name)
            setattr(layer.moe.experts, name, torch.nn.Parameter(torch.zeros_like(full[:2])))
    from moepp.interop.weights import TensorFolder

    read, keys = TensorFolder.read, []
    monkeypatch.setattr(TensorFolder, "read", lambda self, key, row=None: keys.append(key) or read(self, key, row))
    official.load_into(shard, folder, ep_rank, 3)
    experts = {int(key.split(".")[7]) for key in keys if ".experts.experts." in key}
    assert experts == {2 * ep_rank, 2 * ep_rank + 1, 6, 7}  # 6 and 7: constant experts, on every rank
    at = "model.layers.2.mlp.moe.experts.experts"
    assert torch.equal(shard.layers[2].moe.experts.gate_up_proj[1], tensors[f"{at}.{2 * ep_rank + 1}.up_proj.weight"])


def test_missing_unexpected_and_misshaped_keys_are_all_listed(tmp_path):
    config = released_config()
    tensors = released_tensors(config)
    del tensors["model.layers.2.mlp.moe.experts.experts.3.constant"], tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)
    tensors["model.layers.1.mlp.moe.gate.gate_map.weight"] = torch.zeros(7, 6)
    with pytest.raises(CheckpointError) as error:
        official.load_pretrained(write_released(tmp_path, config, tensors))
    message = str(error.value)
    assert "2 missing" in message and "experts.3.constant" in message and "lm_head.weight" in message
    assert "1 unexpected (model.layers.0.self_attn.q_proj.bias)" in message
    assert "gate_map.weight is [7, 6] instead of [7, 7]" in message and "\n" not in message


BAD_FLAGS = [
    ({"model_type": "llama"}, "type 'llama'"),
    ({"num_experts": 12}, "num_experts=12"),
    ({"num_experts": [3]}, r"num_experts=\[3\]"),
    ({"moe_expert_interval": 2}, "moe_expert_interval=2"),
    ({"hidden_size": "16"}, "hidden_size='16'"),
    ({"hidden_size": 18}, "not divisible"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "factor"),
    ({"rope_scaling": {"rope_type": "default"}}, "rope_scaling"),
    ({"moe_use_logits_norm": True, "moe_gate_norm_std": 0.0}, "logits_norm_std"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=lambda value: str(value)[:40])
def test_configurations_that_cannot_run_are_refused(tmp_path, flags, message):
    (tmp_path / "config.json").write_text(json.dumps(released_config(**flags)))
    with pytest.raises(CheckpointError, match=message) as error:
        official.read_config(tmp_path)
    assert "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def damage(folder, how):
    if how == "no folder":
        return folder / "nowhere"
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "config no json":
        (folder / "config.json").write_text("{")
    elif how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "truncated":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif how == "empty":
        (folder / "model.safetensors").write_bytes(b"")
    elif how == "integers":
        from safetensors.torch import save_file

        save_file({"model.norm.weight": torch.ones(16, dtype=torch.int8)}, folder / "model.safetensors")
    return folder


def damage_bin(folder, how):
    first, second = sorted(folder.glob("*.bin"))
    if how == "shard missing":
        second.unlink()
    elif how == "index empty":
        (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    elif how == "index climbs":
        (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../a.bin"}}')
    elif how == "index disagrees":
        index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
        index["weight_map"]["model.ghost"] = first.name
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    elif how == "truncated":
        second.write_bytes(second.read_bytes()[:500])
    elif how == "code":
        second.write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    elif how == "no tensors":
        torch.save([1, 2], second)
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no folder", "not a folder"),
        ("no config", "has no config.json"),
        ("config no json", "not valid JSON"),
        ("no weights", "holds no weights"),
        ("truncated", "damaged"),
        ("empty", "damaged"),
        ("integers", "quantised"),
    ],
)
def test_folders_that_are_something_else_or_damaged_are_refused(tmp_path, how, message):
    with pytest.raises(CheckpointError, match=message) as error:
        official.load_pretrained(damage(make(tmp_path)[0], how))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shard missing", "lacks 1 of the 2 files"),
        ("index empty", "no weight_map"),
        ("index climbs", "no weight_map"),
        ("index disagrees", "model.ghost"),
        ("truncated", "damaged"),
        ("code", "is not read: it holds more than tensors"),
        ("no tensors", "does not hold plain tensors by name"),
    ],
)
def test_damaged_or_dangerous_pickles_are_refused(tmp_path, how, message, capsys):
    with pytest.raises(CheckpointError, match=message) as error:
        official.load_pretrained(damage_bin(make(tmp_path, "sharded-bin")[0], how))
    assert "\n" not in str(error.value) and "ran" not in capsys.readouterr().out


def test_pickles_of_old_torch_are_read(tmp_path):
    folder, _, tensors = make(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(folder / "pytorch_model.bin")
    assert torch.equal(official.load_pretrained(folder).transformer.norm.weight, tensors["model.norm.weight"])


def test_a_tied_matrix_stored_twice_must_be_the_same(tmp_path):
    folder, config, tensors = make(tmp_path, tie_word_embeddings=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    official.load_pretrained(write_released(folder, config, tensors))
    tensors["lm_head.weight"][0, 0] += 1
    with pytest.raises(CheckpointError, match=r"differs from model\.embed_tokens"):
        official.load_pretrained(write_released(folder, config, tensors))


def test_weights_of_another_shape_are_refused_with_every_difference(tmp_path):
    folder, _, _ = make(tmp_path)
    cfg = official.read_config(write_released(tmp_path / "b", released_config(rope_theta=9.0, vocab_size=40), {}))
    with pytest.raises(CheckpointError, match=r"vocab_size=40 \(the weights have 37\).*rope_theta=9.0 \(the weights"):
        official.load_into(Transformer(cfg), folder)


@pytest.mark.parametrize("flags", FLAG_SETS.values(), ids=FLAG_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_comes_back_bitwise(tmp_path, flags, dtype):
    folder, config, tensors = make(tmp_path, **flags)
    model = official.load_pretrained(folder, dtype)
    official.save_pretrained(model, tmp_path / "again")
    again = official.load_pretrained(tmp_path / "again", dtype)
    assert again.cfg == model.cfg and again.token_ids == model.token_ids
    from moepp.interop.weights import TensorFolder

    saved = TensorFolder(tmp_path / "again")
    assert saved.shapes.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert saved.read(key).dtype == dtype  # routers too: the released loader rounds some of them otherwise
        assert torch.equal(saved.read(key), tensor.to(dtype))
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    for key, value in config.items():
        assert written[key] == value or value is None, key


def test_saved_files_carry_what_loaders_ask_for(tmp_path):
    from safetensors import safe_open

    model = official.load_pretrained(GOLDEN / "published_flags")
    assert official.save_pretrained(model, tmp_path) == ["config.json", "generation_config.json", "model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    written, golden = (json.loads((f / "config.json").read_text()) for f in (tmp_path, GOLDEN / "published_flags"))
    for unused in ("rotary_percent", "sliding_window", "transformers_version"):
        golden.pop(unused)
    assert written == golden
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}


def test_everything_the_released_code_cannot_express_is_listed(tmp_path):
    from dataclasses import replace

    cfg = official.read_config(make(tmp_path)[0])
    moe = replace(
        cfg.moe,
        num_constant_experts=3,
        num_copy_experts=0,
        num_zero_experts=2,
        top_k=1,
        gating_residual=False,
        gate_normalization="none",
    )
    model = Transformer(replace(cfg, moe=moe, moe_layer_interval=2, dense_ffn_hidden_size=8))
    init_parameters(model, 1)
    with pytest.raises(CheckpointError) as error:
        official.save_pretrained(model, tmp_path / "out")
    for part in (
        *("num_constant_experts=3", "num_copy_experts=0", "num_zero_experts=2", "top_k=1", "gating_residual=False"),
        *("moe_layer_interval=2", "gate_normalization=none", "--format moepp"),
    ):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()
