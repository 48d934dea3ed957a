"""All ranks end with the same error: the first says it, and the others leave without a word of their own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from moepp.distributed import meeting, refusal
from moepp.distributed.launch import LaunchEnvironment

MESSAGE = "optim.lr=-1 must be above 0; raise it"


class EndsWithTheFirst:
    """The store that the first rank keeps, and takes with it once all others have said that they leave."""

    def __init__(self, store: HashStore) -> None:
        self._store = store
        self._is_gone = False

    def __getattr__(self, name: str) -> Any:
        def call(key: Any, *rest: Any) -> Any:
            if self._is_gone:
                raise RuntimeError("Connection reset by peer")
            self._is_gone = str(key).endswith("/left")
            return getattr(self._store, name)(key, *rest)

        return call


@pytest.mark.parametrize(("said", "has_printed"), [(MESSAGE, True), ("seed=x is no number", False)])
def test_rank_asks_for_nothing_more_once_it_has_said_that_it_leaves(monkeypatch, said, has_printed):
    kept = HashStore()
    kept.set("start/meeting", json.dumps({"name": "m", "world_size": 2}))
    meeting.refuse_all(kept, "m", said)
    kept.set("start/m/printed", "yes")
    monkeypatch.setattr(meeting, "join_store", lambda *_: EndsWithTheFirst(kept))
    launch = LaunchEnvironment(1, 2, 1, ("127.0.0.1", 1))
    assert refusal._first_has_printed(launch, MESSAGE) is has_printed
    assert kept.add("start/m/left", 0) == 1
