"""What stands between the MoE layer's matrix products: compiled kernels where there are some, else torch operations.

Where ``triton`` is set, Triton's kernels take the place of both.

Shapes: T tokens, D width, K slots of a token, R rows of FFN slots, F expert width, C constant experts, P outputs,
E experts, S = T·K slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moepp.kernels import Library, compiled, compiled_for, row_kernels

MAX_TOP_K = 8  # of the compiled kernel, which scans K times
_NORMALIZATIONS = ("none", "zero_masked", "topk_softmax")  # numbered as in moepp/kernels/routing.c


def _required(tensor: Tensor) -> Library:
    kernels = compiled(tensor)
    assert kernels is not None
    return kernels


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def swiglu(gate_RF: Tensor, up_RF: Tensor, act_RF: Tensor, triton: bool = False) -> None:
    """``act = silu(gate) * up``; ``act_RF`` may be ``gate_RF`` itself. No autograd."""
    if kernels := row_kernels(gate_RF, triton):
        operands = (value for tensor in (gate_RF, up_RF, act_RF) for value in (tensor, tensor.stride(0)))
        kernels.call("swiglu", *operands, *act_RF.shape)
    else:
        torch.mul(F.silu(gate_RF), up_RF, out=act_RF)


def swiglu_backward(
    gate_up_RG: Tensor, grad_act_RF: Tensor, grad_gate_up_RG: Tensor, act_RF: Tensor, triton: bool = False
) -> None:
    """Fill the gradient of ``gate_up_RG`` [R, 2F], and the activation once more. ``act_RF`` may be ``grad_act_RF``."""
    num_rows, width = act_RF.shape
    if kernels := row_kernels(gate_up_RG, triton):
        kernels.call("swiglu_backward", gate_up_RG, grad_act_RF, grad_gate_up_RG, act_RF, num_rows, width)
        return
    gate_RF, up_RF = gate_up_RG.chunk(2, dim=-1)
    grad_gate_RF, grad_up_RF = grad_gate_up_RG.chunk(2, dim=-1)
    sigmoid_RF = torch.sigmoid(gate_RF)
    silu_RF = gate_RF * sigmoid_RF
    torch.mul(grad_act_RF, silu_RF, out=grad_up_RF)
    torch.mul(grad_act_RF * up_RF, sigmoid_RF + silu_RF * (1 - sigmoid_RF), out=grad_gate_RF)
    torch.mul(silu_RF, up_RF, out=act_RF)


class TritonSwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` [R, F] of gate_up [R, 2F] by Triton's kernels; keeps gate_up alone for backward."""

    @staticmethod
    def forward(ctx: Any, gate_up_RG: Tensor) -> Tensor:
        gate_up_RG = gate_up_RG.contiguous()
        ctx.save_for_backward(gate_up_RG)
        act_RF = gate_up_RG.new_empty(len(gate_up_RG), gate_up_RG.shape[1] // 2)
        gate_RF, up_RF = gate_up_RG.chunk(2, dim=-1)
        swiglu(gate_RF, up_RF, act_RF, triton=True)
        ctx.kernels, ctx.shape = row_kernels(gate_up_RG, triton=True), act_RF.shape
        return act_RF

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_act_RF: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gate_up_RG,) = ctx.saved_tensors
        grad_gate_up_RG = torch.empty_like(gate_up_RG)
        ctx.kernels.call("swiglu_backward", gate_up_RG, grad_act_RF.contiguous(), grad_gate_up_RG, None, *ctx.shape)
        return grad_gate_up_RG


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in float32 at least, whatever the dtypes and autocast."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype))


def project(x_TD: Tensor, weight_PD: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`linear_fp32` for few outputs, and x again for its next use.

    What uses x afterwards should take the returned one: then the gradient from there comes in here and is added to
    in the same pass, instead of autograd summing gradients of the size of x.
    """
    if compiled(x_TD):
        return _Project.apply(x_TD.contiguous(), weight_PD.float().contiguous())
    return linear_fp32(x_TD, weight_PD), x_TD


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_PD: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_TD, weight_PD)
        ctx.set_materialize_grads(False)
        ctx.sizes = (*x_TD.shape, weight_PD.shape[0])
        ctx.kernels = _required(x_TD)
        out_TP = weight_PD.new_empty(x_TD.shape[0], weight_PD.shape[0])
        ctx.kernels.call("project", x_TD, weight_PD, out_TP, *ctx.sizes)
        return out_TP, x_TD.view_as(x_TD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TP: Tensor | None, grad_later_TD: Tensor | None) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad_TP is None:
            return grad_later_TD, None
        x_TD, weight_PD = ctx.saved_tensors
        grad_x_TD, grad_weight_PD = torch.empty_like(x_TD), torch.zeros_like(weight_PD)
        inputs = (x_TD, weight_PD, grad_TP.contiguous(), _dense(grad_later_TD))
        ctx.kernels.call("project_backward", *inputs, grad_x_TD, grad_weight_PD, *ctx.sizes)
        return grad_x_TD, grad_weight_PD


def has_gates(logits_TE: Tensor, top_k: int) -> bool:
    """Whether :func:`gates` and :func:`affine_coefficients` can be used for these logits."""
    return compiled(logits_TE) is not None and logits_TE.dtype == torch.float32 and top_k <= MAX_TOP_K


def gates(logits_TE: Tensor, top_k: int, first_zero: int, normalization: str) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities [T, E], chosen experts [T, K] (int64) and gate weights [T, K] as ``router.compute_gates`` has them.

    Among experts of equal probability the lower number is chosen.
    """
    return _Gates.apply(logits_TE, top_k, first_zero, _NORMALIZATIONS.index(normalization))


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, top_k: int, first_zero: int, normalization: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = logits_TE.contiguous()
        num_tokens, num_experts = logits_TE.shape
        probs_TE, weights_TK = torch.empty_like(logits_TE), logits_TE.new_empty(num_tokens, top_k)
        ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int64)
        ctx.kernels, ctx.sizes = _required(logits_TE), (num_tokens, num_experts, top_k, first_zero, normalization)
        ctx.kernels.call("gates", logits_TE, probs_TE, ids_TK, weights_TK, *ctx.sizes)
        ctx.save_for_backward(probs_TE, ids_TK, weights_TK)
        ctx.mark_non_differentiable(ids_TK)
        ctx.set_materialize_grads(False)
        return probs_TE, ids_TK, weights_TK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_probs_TE: Tensor | None, _: None, grad_weights_TK: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        probs_TE, ids_TK, weights_TK = ctx.saved_tensors
        grad_weights_TK = torch.zeros_like(weights_TK) if grad_weights_TK is None else grad_weights_TK.contiguous()
        grad_logits_TE = torch.empty_like(probs_TE)
        inputs = (probs_TE, ids_TK, weights_TK, _dense(grad_probs_TE), grad_weights_TK)
        ctx.kernels.call("gates_backward", *inputs, grad_logits_TE, *ctx.sizes)
        return grad_logits_TE, None, None, None


def affine_coefficients(
    ids_TK: Tensor, weights_TK: Tensor, alpha_logits_TC2: Tensor, first_constant: int, first_zero: int
) -> tuple[Tensor, Tensor]:
    """Scale [T] and coefficients [T, C] of the zero-computation experts, see :mod:`moepp.moe.zero_computation`."""
    return _AffineCoefficients.apply(ids_TK, weights_TK, alpha_logits_TC2, first_constant, first_zero)


class _AffineCoefficients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids_TK: Tensor, weights_TK: Tensor, alpha_logits_TC2: Tensor, first_constant: int, first_zero: int
    ) -> tuple[Tensor, Tensor]:
        inputs = (ids_TK.contiguous(), weights_TK.contiguous(), alpha_logits_TC2.contiguous())
        (num_tokens, top_k), num_constant = ids_TK.shape, alpha_logits_TC2.shape[1]
        ctx.kernels, ctx.sizes = _required(weights_TK), (num_tokens, top_k, num_constant, first_constant, first_zero)
        scale_T, coefficients_TC = weights_TK.new_empty(num_tokens), weights_TK.new_empty(num_tokens, num_constant)
        ctx.kernels.call("affine", *inputs, scale_T, coefficients_TC, *ctx.sizes)
        ctx.save_for_backward(*inputs)
        return scale_T, coefficients_TC

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_scale_T: Tensor, grad_coefficients_TC: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ids_TK, weights_TK, alpha_logits_TC2 = ctx.saved_tensors
        grads = (torch.empty_like(weights_TK), torch.empty_like(alpha_logits_TC2))
        inputs = (ids_TK, weights_TK, alpha_logits_TC2, grad_scale_T.contiguous(), grad_coefficients_TC.contiguous())
        ctx.kernels.call("affine_backward", *inputs, *grads, *ctx.sizes)
        return None, *grads, None, None


@dataclass(frozen=True)
class SlotOrder:
    """Slots sorted by expert; slot t·K + k is the k-th of token t.

    Attributes:
        slots_S: slot numbers, those of expert 0 first, in the order of tokens; beyond ``counts_E.sum()`` undefined.
        counts_E: slots of each expert, int64.
        positions_TK: where each slot lies in ``slots_S``, or -1 where it has no expert.
    """

    slots_S: Tensor
    counts_E: Tensor
    positions_TK: Tensor


@torch.no_grad()
def sort_slots(experts_TK: Tensor, num_experts: int) -> SlotOrder:
    """Sort the slots of experts below ``num_experts`` (int64); the others are left out. No host synchronisation."""
    experts_S = experts_TK.flatten()
    counts_E = experts_S.new_empty(num_experts)
    slots_S, positions_S = torch.empty_like(experts_S), torch.empty_like(experts_S)
    if kernels := compiled_for(experts_S.device, torch.float32):
        kernels.call("sort_slots", experts_S, slots_S, counts_E, positions_S, experts_S.numel(), num_experts)
    else:
        torch.argsort(experts_S.clamp(max=num_experts), stable=True, out=slots_S)
        counts_E = count_experts(experts_S, num_experts)
        positions_S.scatter_(0, slots_S, torch.arange(experts_S.numel(), device=experts_S.device))
        positions_S.masked_fill_(experts_S >= num_experts, -1)
    return SlotOrder(slots_S, counts_E, positions_S.view_as(experts_TK))


def count_experts(experts_S: Tensor, num_experts: int) -> Tensor:
    """How often each of the first ``num_experts`` experts occurs: int64 [E]; no host synchronisation."""
    if kernels := compiled_for(experts_S.device, torch.float32):
        counts_E = experts_S.new_empty(num_experts)
        kernels.call("count_experts", experts_S.contiguous(), counts_E, experts_S.numel(), num_experts)
        return counts_E
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts_S.device)
    counts.scatter_add_(0, experts_S.clamp(max=num_experts), torch.ones_like(experts_S))
    return counts[:num_experts]


@dataclass(frozen=True)
class RowOrder:
    """Which slot each row of [R, D] belongs to, and the way back: the row of each slot, or -1."""

    slots_R: Tensor
    positions_TK: Tensor

    @cached_property
    def token_ids_R(self) -> Tensor:
        """The token of each row."""
        return self.slots_R // self.positions_TK.shape[1]


@dataclass(frozen=True)
class Affine:
    """An affine function of every token not yet carried out: ``scale · x + coefficients @ values``.

    A scale or coefficient of exactly 0 stands for an expert that was not selected: it may get no gradient.
    """

    x_TD: Tensor
    scale_T: Tensor  # float32
    coefficients_TC: Tensor  # float32
    values_CD: Tensor

    def value(self) -> Tensor:
        """[T, D] in x's dtype."""
        dtype = self.x_TD.dtype
        scaled_TD = self.x_TD * self.scale_T.to(dtype).unsqueeze(-1)
        return torch.addmm(scaled_TD, self.coefficients_TC.to(dtype), self.values_CD.to(dtype))


def gather_rows(x_TD: Tensor, order: RowOrder, triton: bool = False) -> tuple[Tensor, Tensor]:
    """The token of every row, [R, D]; and x again for its next use, as in :func:`project`."""
    return _Gather.apply(x_TD, order.token_ids_R, order.positions_TK, row_kernels(x_TD, triton))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, token_ids_R: Tensor, positions_TK: Tensor, kernels: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(positions_TK)
        ctx.set_materialize_grads(False)
        ctx.kernels, ctx.shape = kernels, x_TD.shape
        return x_TD.index_select(0, token_ids_R), x_TD.view_as(x_TD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_RD: Tensor | None, grad_later_TD: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad_RD is None:
            return grad_later_TD, None, None, None
        (positions_TK,) = ctx.saved_tensors
        if ctx.kernels is None:
            start_TD = grad_RD.new_zeros(ctx.shape) if grad_later_TD is None else grad_later_TD
            return _add_rows(start_TD, grad_RD, positions_TK), None, None, None
        grad_RD = grad_RD.contiguous()
        grad_x_TD = grad_RD.new_empty(ctx.shape)
        inputs = (grad_RD, positions_TK, None, _dense(grad_later_TD), None, None, None)
        ctx.kernels.call("combine", *inputs, grad_x_TD, *ctx.shape, positions_TK.shape[1], 0)
        return grad_x_TD, None, None, None


def combine_rows(
    rows_RD: Tensor, order: RowOrder, weights_TK: Tensor, affine: Affine | None, triton: bool = False
) -> Tensor:
    """Each token's weighted rows, plus its affine part if any: [T, D] in the rows' dtype.

    Gate weights are float32; a weighted row is rounded to the rows' dtype once, or only their sum is.
    """
    if kernels := row_kernels(rows_RD, triton):
        parts = (None, None, None, None)
        if affine is not None:
            parts = (affine.x_TD, affine.scale_T, affine.coefficients_TC, affine.values_CD.to(rows_RD.dtype))
        return _Combine.apply(kernels, rows_RD, order.positions_TK, weights_TK, *parts)
    weights_R = weights_TK.flatten().index_select(0, order.slots_R)
    weighted_RD = (rows_RD * weights_R.unsqueeze(-1)).to(rows_RD.dtype)
    start_TD = rows_RD.new_zeros(len(weights_TK), rows_RD.shape[1]) if affine is None else affine.value()
    return _AddRows.apply(start_TD, weighted_RD, order.token_ids_R, order.positions_TK)


def _add_rows(start_TD: Tensor, rows_RD: Tensor, positions_TK: Tensor) -> Tensor:
    """Each token's rows added to its start, slot after slot and rounded once: always the same bits.

    ``index_add`` on an accelerator adds in the order in which its threads come, and rounds each time.
    """
    if not len(rows_RD):
        return start_TD.clone()
    total_TD = start_TD.to(torch.promote_types(rows_RD.dtype, torch.float32), copy=True)
    for position_T in positions_TK.unbind(1):
        rows_TD = rows_RD.index_select(0, position_T.clamp(min=0))
        total_TD += rows_TD.masked_fill((position_T < 0).unsqueeze(1), 0)
    return total_TD.to(rows_RD.dtype)


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, start_TD: Tensor, rows_RD: Tensor, token_ids_R: Tensor, positions_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_ids_R)
        return _add_rows(start_TD, rows_RD, positions_TK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (token_ids_R,) = ctx.saved_tensors
        return grad_TD, grad_TD.index_select(0, token_ids_R), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Any, *tensors: Tensor | None) -> Tensor:
        tensors = tuple(map(_dense, tensors))
        rows_RD, positions_TK, weights_TK, x_TD, scale_T, coefficients_TC, values_CD = tensors
        assert rows_RD is not None and positions_TK is not None
        ctx.save_for_backward(*tensors)
        ctx.kernels = kernels
        ctx.sizes = (positions_TK.shape[0], rows_RD.shape[1], positions_TK.shape[1])
        ctx.sizes += (0 if values_CD is None else values_CD.shape[0],)
        out_TD = rows_RD.new_empty(ctx.sizes[:2])
        affine = (x_TD, scale_T, coefficients_TC, values_CD)
        ctx.kernels.call("combine", rows_RD, positions_TK, weights_TK, *affine, out_TD, *ctx.sizes)
        return out_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        grads = [None if tensor is None else torch.empty_like(tensor) for tensor in saved]
        grad_rows_RD, _, grad_weights_TK, grad_x_TD, grad_scale_T, grad_coefficients_TC, grad_values_CD = grads
        if grad_values_CD is not None:  # is summed over tokens, in float32
            grad_values_CD = torch.zeros_like(grad_values_CD, dtype=torch.float32)
        affine = (grad_x_TD, grad_scale_T, grad_coefficients_TC, grad_values_CD)
        ctx.kernels.call(
            "combine_backward", grad_TD.contiguous(), *saved, grad_rows_RD, grad_weights_TK, *affine, *ctx.sizes
        )
        if grad_values_CD is not None:
            grad_values_CD = grad_values_CD.to(grad_TD.dtype)
        return None, grad_rows_RD, None, grad_weights_TK, grad_x_TD, grad_scale_T, grad_coefficients_TC, grad_values_CD
