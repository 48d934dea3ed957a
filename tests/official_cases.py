"""Released-format checkpoints with random weights, and a slow reference of the released forward.

The reference goes token by token and expert by expert in float64, reads the released keys directly, and shares
nothing with the product.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
FLAGS = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "num_experts": [7],
    "rope_theta": 50.0,
    "pad_token_id": 0,
}


def released_config(**flags) -> dict:
    config = {"model_type": "MoE++", "architectures": ["MoeForCausalLM"], **FLAGS, **flags}
    return {key: value for key, value in config.items() if value != "absent"}


def released_tensors(config: dict, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the released keys, large enough for varied routing."""
    width, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    experts, heads = config["num_experts"][0], config["num_attention_heads"]
    kv_width = width // heads * config.get("num_key_value_heads", heads)
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, width)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (width, width) for n in "qo"}
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (kv_width, width) for n in "kv"}
        if config.get("moe_2layer_gate", True):
            shapes[f"{at}.mlp.moe.gate.wg.0.weight"] = (8 * experts, width)
            shapes[f"{at}.mlp.moe.gate.wg.2.weight"] = (experts, 8 * experts)
        else:
            shapes[f"{at}.mlp.moe.gate.wg.weight"] = (experts, width)
        shapes[f"{at}.mlp.moe.gate.gate_map.weight"] = (experts, experts)
        for e in range(experts - 4):
            shapes[f"{at}.mlp.moe.experts.experts.{e}.up_proj.weight"] = (2 * ffn, width)
            shapes[f"{at}.mlp.moe.experts.experts.{e}.down_proj.weight"] = (width, ffn)
        for e in (experts - 4, experts - 3):
            shapes[f"{at}.mlp.moe.experts.experts.{e}.constant"] = (width,)
            shapes[f"{at}.mlp.moe.experts.experts.{e}.wg.weight"] = (2, width)
    generator = torch.Generator().manual_seed(seed)
    return {
        key: 1 + 0.2 * torch.randn(shape, generator=generator)
        if "norm" in key
        else torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 1.0)
        for key, shape in shapes.items()
    }


def write_released(folder: Path, config: dict, tensors: dict[str, Tensor], layout: str = "safetensors") -> Path:
    """Layouts: safetensors, sharded, bin, sharded-bin."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, suffix = ("model", "safetensors") if "bin" not in layout else ("pytorch_model", "bin")
    keys = sorted(tensors)
    half = len(keys) // 2
    parts = [keys] if "sharded" not in layout else [keys[:half], keys[half:]]
    names = [f"{stem}.{suffix}"] if len(parts) == 1 else [f"{stem}-0000{i + 1}-of-00002.{suffix}" for i in range(2)]
    for name, part in zip(names, parts, strict=True):
        shard = {key: tensors[key] for key in part}
        if suffix == "bin":
            torch.save(shard, folder / name)
        else:
            save_file(shard, folder / name, metadata={"format": "pt"})
    if len(parts) > 1:
        weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


class Reference:
    """The released forward in float64."""

    def __init__(self, config: dict, tensors: dict[str, Tensor]) -> None:
        self.config = config
        self.weights = {key: tensor.double() for key, tensor in tensors.items()}
        self.longest = 0

    def __call__(self, ids_S: list[int], positions: list[int] | None = None, valid: list[int] | None = None):
        """One sequence -> (logits [S, V], chosen experts [layers][S] as {expert: weight})."""
        c, w = self.config, self.weights
        self.longest = max(self.longest, len(ids_S))
        positions = list(range(len(ids_S))) if positions is None else positions
        valid = [1] * len(ids_S) if valid is None else valid
        hidden = [w["model.embed_tokens.weight"][i] for i in ids_S]
        previous: list[Tensor] | None = None
        chosen = []
        for layer in range(c["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            normed = [self.norm(h, f"{at}.input_layernorm") for h in hidden]
            hidden = [h + a for h, a in zip(hidden, self.attention(at, normed, positions, valid), strict=True)]
            normed = [self.norm(h, f"{at}.post_attention_layernorm") for h in hidden]
            logits = [self.router(at, x, None if previous is None else previous[t]) for t, x in enumerate(normed)]
            chosen.append([self.choose(r) for r in logits])
            hidden = [h + self.experts(at, x, g) for h, x, g in zip(hidden, normed, chosen[-1], strict=True)]
            previous = logits
        head = w["model.embed_tokens.weight" if c.get("tie_word_embeddings", False) else "lm_head.weight"]
        return torch.stack([head @ self.norm(h, "model.norm") for h in hidden]), chosen

    def norm(self, x: Tensor, name: str) -> Tensor:
        eps = self.config.get("rms_norm_eps", 1e-6)
        return self.weights[f"{name}.weight"] * x / math.sqrt(sum(v * v for v in x.tolist()) / len(x) + eps)

    def rotate(self, x: Tensor, position: int) -> Tensor:
        c, d = self.config, len(x)
        theta, position_, scaling = c.get("rope_theta", 1e4), float(position), c.get("rope_scaling")
        if scaling is not None:
            factor, limit = scaling["factor"], c["max_position_embeddings"]
            if scaling["type"] == "linear":
                position_ /= factor
            elif scaling["type"] == "ntk":
                theta *= factor
            elif self.longest > limit:
                theta *= (factor * self.longest / limit - (factor - 1)) ** (d / (d - 2))
        out = x.clone()
        for i in range(d // 2):
            angle = position_ / theta ** (2 * i / d)
            a, b = x[i].item(), x[i + d // 2].item()
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + d // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def attention(self, at: str, x: list[Tensor], positions: list[int], valid: list[int]) -> list[Tensor]:
        c, w = self.config, self.weights
        heads = c["num_attention_heads"]
        group, d = heads // c.get("num_key_value_heads", heads), c["hidden_size"] // heads
        q, k, v = ([w[f"{at}.self_attn.{n}_proj.weight"] @ t for t in x] for n in "qkv")
        out = []
        for i in range(len(x)):
            parts = []
            for head in range(heads):
                own, shared = slice(head * d, (head + 1) * d), slice(head // group * d, (head // group + 1) * d)
                query = self.rotate(q[i][own], positions[i])
                seen = [j for j in range(i + 1) if valid[j]] or [i]  # padding rows: anything finite
                scores = torch.stack([query @ self.rotate(k[j][shared], positions[j]) for j in seen]) / math.sqrt(d)
                weights = torch.softmax(scores, 0)
                parts.append(sum(weights[n] * v[j][shared] for n, j in enumerate(seen)))
            out.append(w[f"{at}.self_attn.o_proj.weight"] @ torch.cat(parts))
        return out

    def router(self, at: str, x: Tensor, previous: Tensor | None) -> Tensor:
        gate = f"{at}.mlp.moe.gate"
        if self.config.get("moe_2layer_gate", True):
            logits = self.weights[f"{gate}.wg.2.weight"] @ torch.tanh(self.weights[f"{gate}.wg.0.weight"] @ x)
        else:
            logits = self.weights[f"{gate}.wg.weight"] @ x
        return logits if previous is None else logits + self.weights[f"{gate}.gate_map.weight"] @ previous

    def choose(self, logits: Tensor) -> dict[int, float]:
        c = self.config
        if c.get("moe_use_logits_norm", False):
            mean = logits.mean()
            std = math.sqrt(((logits - mean) ** 2).sum() / (len(logits) - 1))
            logits = logits / (std / c.get("moe_gate_norm_std", 1.0))
        best = sorted(range(len(logits)), key=lambda e: -logits[e].item())[:2]
        exp = {e: math.exp(logits[e].item()) for e in best}
        if not c.get("moe_use_mixtral_gating", False) and len(logits) - 1 in exp:
            exp[len(logits) - 1] = 0.0
        return {e: value / sum(exp.values()) for e, value in exp.items()}

    def experts(self, at: str, x: Tensor, gates: dict[int, float]) -> Tensor:
        c, count = self.config, self.config["num_experts"][0]
        if not (c.get("moe_use_mixtral_gating", False) or c.get("moe_feature_no_mul_topk", False)):
            x = 2 * x
        total = torch.zeros_like(x)
        for e, gate in gates.items():
            own = f"{at}.mlp.moe.experts.experts.{e}"
            if e < count - 4:
                up = self.weights[f"{own}.up_proj.weight"] @ x
                half = len(up) // 2
                y = self.weights[f"{own}.down_proj.weight"] @ (up[:half] * torch.sigmoid(up[:half]) * up[half:])
            elif e < count - 2:
                a, b = torch.softmax(self.weights[f"{own}.wg.weight"] @ x, 0)
                y = a * x + b * self.weights[f"{own}.constant"]
            else:
                y = x if e == count - 2 else torch.zeros_like(x)
            total = total + gate * y
        return total
