"""How far the logits are from the released code's, as a Markdown table: ``python -m tests.golden_parity``."""

from __future__ import annotations

import numpy as np
import torch

from moepp import official
from moepp.model import Transformer
from tests.official_cases import GOLDEN


@torch.no_grad()
def main() -> None:
    """Print the largest absolute difference of the logits on every golden checkpoint."""
    print("| checkpoint | run in | `official.load_pretrained` | training `Transformer` | choices of experts |")
    print("| --- | --- | ---: | ---: | --- |")
    for case, dtype in (
        ("default", torch.float32),
        ("published_flags", torch.float32),
        ("published_flags_bf16", torch.float32),
        ("published_flags_bf16", torch.bfloat16),
    ):
        suffix = "_bf16run" if dtype == torch.bfloat16 else ""
        with np.load(GOLDEN / case / "expected.npz") as arrays:
            ids, logits, topk = (
                torch.from_numpy(arrays[k]) for k in ("input_ids", f"logits{suffix}", f"topk_idx{suffix}")
            )
        out = official.load_pretrained(GOLDEN / case, dtype)(ids)
        same = "all equal" if torch.equal(torch.stack(out.topk_ids), topk) else "DIFFERENT"
        model = Transformer(official.read_config(GOLDEN / case)).to(dtype).eval()
        official.load_into(model, GOLDEN / case)
        trained = model.logits(model(ids).hidden)
        differences = [(found.float() - logits).abs().max().item() for found in (out.logits, trained)]
        print(f"| {case} | {str(dtype)[6:]} | {differences[0]:.1e} | {differences[1]:.1e} | {same} |")


if __name__ == "__main__":
    main()
