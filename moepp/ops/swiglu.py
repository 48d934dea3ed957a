"""SwiGLU between the two matrix products of an expert (arXiv 2002.05202): ``silu(gate) * up``.

Shapes: R rows, F expert width, G = 2F.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moepp.ops.backend import kernels_for


def swiglu(gate_RF: Tensor, up_RF: Tensor, act_RF: Tensor) -> None:
    """``act = silu(gate) * up``; ``act_RF`` may be ``gate_RF`` itself. No autograd."""
    if kernels := kernels_for(gate_RF):
        operands = (value for tensor in (gate_RF, up_RF, act_RF) for value in (tensor, tensor.stride(0)))
        kernels.call("swiglu", *operands, *act_RF.shape)
    else:
        torch.mul(F.silu(gate_RF), up_RF, out=act_RF)


def swiglu_backward(gate_up_RG: Tensor, grad_act_RF: Tensor, grad_gate_up_RG: Tensor, act_RF: Tensor) -> None:
    """Fill the gradient of ``gate_up_RG``, and the activation once more. ``act_RF`` may be ``grad_act_RF``."""
    num_rows, width = act_RF.shape
    if kernels := kernels_for(gate_up_RG):
        kernels.call("swiglu_backward", gate_up_RG, grad_act_RF, grad_gate_up_RG, act_RF, num_rows, width)
        return
    gate_RF, up_RF = gate_up_RG.chunk(2, dim=-1)
    grad_gate_RF, grad_up_RF = grad_gate_up_RG.chunk(2, dim=-1)
    silu_RF = F.silu(gate_RF)
    torch.mul(grad_act_RF, silu_RF, out=grad_up_RF)
    grad_silu_RF = grad_act_RF * up_RF
    torch.ops.aten.silu_backward.grad_input(grad_silu_RF, gate_RF, grad_input=grad_gate_RF)
    torch.mul(silu_RF, up_RF, out=act_RF)
