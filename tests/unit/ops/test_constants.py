"""Constants are made once per device and shape, and never where they must not outlive the call."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensorMode

from moepp.ops import constants

X = torch.zeros(1)


def make(like: torch.Tensor) -> list[torch.Tensor]:
    int64 = torch.int64
    return [constants.numbers(5, like, step=3), constants.blocks((7, 2), (1, 3), like, int64)]


def test_they_hold_what_was_asked_for_in_its_dtype():
    assert [tensor.tolist() for tensor in make(X)] == [[0, 3, 6, 9, 12], [7, 2, 2, 2]]
    assert constants.numbers(3, X, torch.uint8).tolist() == [0, 1, 2]
    halves = constants.blocks((0.5, -1.0), (2, 0), X, torch.float64)
    assert halves.tolist() == [0.5, 0.5] and halves.dtype == torch.float64


def test_they_are_made_once_for_each_device_and_shape():
    assert [a is b for a, b in zip(make(X), make(X + 1), strict=True)] == [True, True]
    assert constants.numbers(5, X, step=3) is not constants.numbers(5, X, step=2)
    assert constants.numbers(5, X).dtype != constants.numbers(5, X, torch.uint8).dtype
    assert constants.numbers(5, torch.zeros(1, device="meta")).device.type == "meta"


def test_those_made_in_inference_mode_can_be_used_in_training():
    with torch.inference_mode():
        tensor = constants.blocks((1.5,), (4,), X, torch.float32)
    weight = torch.ones(4, requires_grad=True)
    (weight * tensor).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [1.5] * 4


def test_fake_ones_do_not_outlive_their_mode_and_real_ones_do_not_enter_it():
    real = make(X)
    with FakeTensorMode():
        fake = make(torch.zeros(1))
        assert all(type(tensor) is not torch.Tensor for tensor in fake)
        assert make(torch.zeros(1))[0] is not fake[0]
    assert all(a is b for a, b in zip(make(X), real, strict=True))


def test_those_of_a_captured_graph_are_its_own(monkeypatch):
    monkeypatch.setattr(constants, "_is_captured", lambda like: True)
    first, second = make(X), make(X)
    assert all(a is not b and torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_tracer_sees_them_made(monkeypatch):
    kept = make(X)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert all(a is not b for a, b in zip(make(X), kept, strict=True))
