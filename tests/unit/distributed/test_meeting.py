"""Ranks that disagree do not start: who differs in what, on every rank, without a wait for those that cannot come."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from moepp.distributed import meeting
from moepp.distributed.agreement import describe_differences, digest_of, group_ranks, name_ranks
from moepp.distributed.launch import LaunchEnvironment
from moepp.distributed.meeting import join_store, meet
from moepp.errors import ConfigError, LaunchError, MoeppError, PeerError

FACTS = {"optim.lr": "0.002", "train.steps": "100", "torch": "2.13.0", "moepp's source": "0123456789ab"}
SECONDS = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(*actions: Callable[[], Any]) -> list[Any]:
    """What each action returns, or the error it raises; each in a thread."""
    outcomes: list[Any] = [None] * len(actions)

    def run(place: int, action: Callable[[], Any]) -> None:
        try:
            outcomes[place] = action()
        except Exception as error:
            outcomes[place] = error

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(actions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a rank still waits"
    return outcomes


def rank_of(
    rank: int, world_size: int, port: int, facts: Mapping[str, str] = FACTS, seconds: float = SECONDS
) -> Callable[[], Any]:
    launch = LaunchEnvironment(rank, world_size, rank, ("127.0.0.1", port))
    return lambda: meet(join_store(launch, seconds), launch, facts, seconds)


def meeting_of(facts: Sequence[Mapping[str, str]]) -> list[Any]:
    port = free_port()
    return together(*(rank_of(rank, len(facts), port, own) for rank, own in enumerate(facts)))


def messages(outcomes: Sequence[Any], kind: type[MoeppError] = ConfigError) -> set[str]:
    assert all(type(outcome) is kind for outcome in outcomes), outcomes
    return {str(outcome) for outcome in outcomes}


def test_ranks_that_agree_get_a_store_of_their_own():
    stores = meeting_of([FACTS, dict(reversed(FACTS.items())), FACTS])
    stores[0].set("word", "said")
    assert [store.get("word") for store in stores] == [b"said"] * 3


def test_one_process_meets_nobody():
    launch = LaunchEnvironment(0, 1, 0)
    store = join_store(launch, 1)
    assert meet(store, launch, FACTS, 1) is store


@pytest.mark.parametrize(
    ("changes", "told", "speakers"),
    [
        ({1: {"optim.lr": "0.5"}}, "rank 1 has optim.lr 0.5 instead of 0.002", {0, 1}),
        ({0: {"optim.lr": "0.5"}}, "rank 0 has optim.lr 0.5 instead of 0.002", {0, 1}),
        (
            {3: {"train.steps": "7", "torch": "2.12.1"}},
            "rank 3 has train.steps 7 instead of 100, torch 2.12.1 instead of",
            {0, 3},
        ),
        ({2: {"x": "1"}, 3: {"x": "1"}}, "ranks 2, 3 have x 1 instead of nothing", {0, 2}),
        (
            {1: {"optim.lr": "1"}, 2: {"optim.lr": "2"}},
            "rank 1 has optim.lr 1 instead of 0.002; rank 2 has optim.lr 2 in",
            {0, 1, 2},
        ),
        ({1: {"moepp's source": "ab"}}, "rank 1 has moepp's source ab instead of 0123456789ab", {0, 1}),
    ],
)
def test_every_rank_says_who_differs_in_what(changes, told, speakers):
    outcomes = meeting_of([FACTS | changes.get(rank, {}) for rank in range(5)])
    (message,) = messages(outcomes)
    assert message.startswith(told) and message.endswith("start all ranks with the same command, packages and files")
    # Ranks that differ have to find it in their own logs, too.
    assert {rank for rank, outcome in enumerate(outcomes) if outcome.said_here} == speakers


def test_agreeing_costs_each_rank_a_few_requests_and_bytes(monkeypatch):
    sent: dict[int, list[int]] = {}

    class Counting:
        def __init__(self, store: Any) -> None:
            self._store = store

        def __getattr__(self, name: str) -> Any:
            def call(*args: Any) -> Any:
                size = sum(len(str(arg)) for arg in args)
                sent.setdefault(threading.get_ident(), []).append(size)
                return getattr(self._store, name)(*args)

            return call

    monkeypatch.setattr(meeting, "PrefixStore", lambda prefix, store: (prefix, store))
    port, big = free_port(), {f"key{i}": "v" * 50 for i in range(1000)}

    def rank(rank: int) -> Callable[[], Any]:
        launch = LaunchEnvironment(rank, 4, rank, ("127.0.0.1", port))
        return lambda: meet(Counting(join_store(launch, SECONDS)), launch, big, SECONDS)  # type: ignore[arg-type]

    outcomes = together(*(rank(r) for r in range(4)))
    assert len({prefix for prefix, _ in outcomes}) == 1
    assert all(sum(sizes) < 3000 for sizes in sent.values()), {k: sum(v) for k, v in sent.items()}


def test_rank_that_cannot_start_is_named_at_once_by_all():
    port = free_port()

    def failing() -> None:
        launch = LaunchEnvironment(2, 4, 2, ("127.0.0.1", port))
        store = join_store(launch, SECONDS)
        while not (name := meeting.current_meeting(store)):
            time.sleep(0.01)
        assert meeting.take_place(store, name, 2)
        meeting.tell_problem(store, name, 2, "optim.lr=-1 must be above 0; raise it")

    start = time.monotonic()
    outcomes = together(rank_of(0, 4, port), rank_of(1, 4, port), failing, rank_of(3, 4, port))
    assert messages([outcomes[0], outcomes[1], outcomes[3]]) == {
        "rank 2 cannot start: optim.lr=-1 must be above 0; raise it"
    }
    assert time.monotonic() - start < SECONDS


def test_other_number_of_ranks_is_refused():
    port = free_port()
    first, third = together(rank_of(0, 3, port), rank_of(1, 2, port))
    assert messages([first, third], LaunchError) == {str(first)}
    assert str(first).startswith("rank 1 has WORLD_SIZE 2 instead of 3 (on ")


def test_rank_given_twice_is_refused():
    port = free_port()
    outcomes = together(rank_of(0, 3, port), rank_of(1, 3, port), rank_of(1, 3, port))
    (message,) = messages(outcomes, LaunchError)
    assert message.startswith("rank 1 was started twice: RANK=1 is given to two processes")


def test_rank_that_does_not_come_is_named_in_time(monkeypatch, capfd):
    monkeypatch.setattr(meeting, "REMARK_SECONDS", 0.2)
    port = free_port()
    outcomes = together(rank_of(0, 4, port, seconds=1.0), rank_of(2, 4, port, seconds=1.0))
    (message,) = messages(outcomes, PeerError)
    assert message.startswith(f"ranks 1, 3 of 4 did not come to 127.0.0.1:{port} within parallel.timeout_seconds=1;")
    # On a busy machine rank 2 may come after the remark.
    assert re.search(rf"rank 0 waits at 127.0.0.1:{port} for ranks (1, 3|1-3) of 4", capfd.readouterr().err)


def test_what_an_earlier_start_left_in_the_launchers_store_is_ignored(monkeypatch):
    """torchrun's own store outlives a restart: an old meeting, agreed or broken off, must count for nothing."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for old_verdict in ("agreed", None):
        server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        old = "start/old"
        server.set("start/meeting", '{"name": "old", "world_size": 2}')
        for rank in range(2):
            server.set(f"{old}/rank/{rank}", digest_of({"optim.lr": "old"}))
            server.add(f"{old}/taken/{rank}", 1)
            server.add(f"{old}/arrived", 1)
        if old_verdict:
            server.set(f"{old}/verdict", '{"is": "agreed"}')

        def late(action: Callable[[], Any]) -> Callable[[], Any]:
            def act() -> Any:
                time.sleep(0.5)
                return action()

            return act

        first, second = together(late(rank_of(0, 2, server.port)), rank_of(1, 2, server.port))
        first.set("word", "new")
        assert second.get("word") == b"new"


def test_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (error,) = together(rank_of(0, 2, port))
    assert type(error) is LaunchError and f"MASTER_PORT={port} is in use" in str(error)


def test_master_that_is_not_there_is_named_in_time():
    port = free_port()
    start = time.monotonic()
    (error,) = together(rank_of(1, 2, port, seconds=1.0))
    assert type(error) is PeerError and "cannot reach rank 0" in str(error) and f"127.0.0.1:{port}" in str(error)
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("host", ["no-such-host.invalid", "node01..cluster"])  # the second cannot even be asked for
def test_master_whose_name_is_unknown_is_named(monkeypatch, host):
    monkeypatch.setattr(meeting, "NAME_SECONDS", 0.1)
    launch = LaunchEnvironment(1, 2, 1, (host, 29500))
    with pytest.raises(LaunchError, match=rf"MASTER_ADDR={host} is not known to rank 1 on "):
        join_store(launch, 1.0)


def test_something_else_at_the_port_is_no_store(monkeypatch):
    monkeypatch.setattr(meeting, "CONNECT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=_answer_like_a_web_server, args=(other,), daemon=True).start()
        (error,) = together(rank_of(1, 2, other.getsockname()[1], seconds=1.0))
    assert type(error) is LaunchError and "finds no store of a run" in str(error)


def test_silence_at_the_port_is_no_store(monkeypatch):
    """Something that takes connections and never says a word, as a program that hangs does."""
    monkeypatch.setattr(meeting, "CONNECT_SECONDS", 0.5)
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as other:
        (error,) = together(rank_of(1, 2, other.getsockname()[1], seconds=60.0))
    assert type(error) is LaunchError and "finds no store of a run" in str(error) and error.cannot_meet
    assert time.monotonic() - start < 30


def _answer_like_a_web_server(server: socket.socket) -> None:
    kept = []
    while True:
        try:
            kept.append(server.accept()[0])
            kept[-1].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        except OSError:
            return


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        ([3], "rank 3"),
        ([8, 9, 10, 15, 11], "ranks 8-11, 15"),
        ([0, 1], "ranks 0, 1"),
        (range(0, 40, 2), "ranks 0, 2, 4, 6, 8, 10, 12, 14, ... (20 of them)"),
    ],
)
def test_ranks_are_named_in_short(ranks, name):
    assert name_ranks(ranks) == name


def test_differences_are_cut_where_they_get_long():
    groups = group_ranks(["b", "a", "a", "c", "d", "e", "f", "a"])
    assert groups == [[1, 2, 7], [0], [3], [4], [5], [6]]
    many = {f"key{i}": "\x1b[31m" + "v" * 500 for i in range(20)}
    told = describe_differences(groups, [{}, many, many, many, many])
    assert told.count("and 15 more differences") == 4 and told.endswith("; rank 6 differs, too")
    assert "\x1b" not in told and len(told) < 3000
