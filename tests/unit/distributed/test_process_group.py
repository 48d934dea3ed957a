"""What is set before the default process group is made."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moepp.distributed import groups
from moepp.distributed.launch import LaunchEnvironment

WARNS = "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING"


@pytest.mark.parametrize(("given", "wanted"), [(None, "false"), ("true", "true")])
def test_nccl_is_told_not_to_warn_before_it_reads_that(monkeypatch, given, wanted):
    monkeypatch.setenv(WARNS, "")  # so that what the code sets is undone
    monkeypatch.delenv(WARNS) if given is None else monkeypatch.setenv(WARNS, given)
    seen: list[Any] = []
    for name in ("join_store", "meet", "require_own_devices", "connect"):
        monkeypatch.setattr(groups, name, lambda *_: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backends, **_: seen.append((backends, os.environ[WARNS])))
    groups.init_process_group(LaunchEnvironment(0, 1, 0), torch.device("cuda", 0), 10.0)
    assert seen == [("cpu:gloo,cuda:nccl", wanted)]
