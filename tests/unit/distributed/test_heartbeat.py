"""Which silence counts as the loss of a rank, with an imitated clock and imitated hosts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from torch.distributed import HashStore

from moepp.distributed import heartbeat
from moepp.distributed.heartbeat import Heartbeat, Process, announce_state

LIMIT = 20.0


class Ranks:
    """Heartbeats of several ranks on one clock; ``hosts[r]`` is where rank r is, ``states`` what the system says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hosts: list[str]) -> None:
        self.now, self.store, self.states = 1000.0, HashStore(), dict.fromkeys(range(len(hosts)), "running")
        monkeypatch.setattr(Process, "state", lambda process: self.states[process.pid])
        self.beats: list[Heartbeat] = []
        for rank, host in enumerate(hosts):
            process = Process(host, f"system of {host}", rank, "")
            monkeypatch.setattr(Process, "own", lambda process=process: process)
            self.beats.append(Heartbeat(self.store, rank, len(hosts), LIMIT, lambda: self.now))

    def run(self, seconds: float, silent: tuple[int, ...] = ()) -> dict[int, tuple[int, float]]:
        """Let time pass; returns for each rank whom it found lost first, and after how long."""
        start, found = self.now, {}
        while self.now < start + seconds:
            self.now += 0.5
            for rank, beat in enumerate(self.beats):
                if rank not in silent and (lost := beat.beat()) is not None:
                    found.setdefault(rank, (lost, self.now - start))
        return found


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ranks]:
    return lambda *hosts: Ranks(monkeypatch, list(hosts))


@pytest.mark.parametrize("hosts", [("a", "a"), ("a", "b"), ("a", "a", "b", "b"), ("a", "b", "c")])
def test_ranks_that_run_are_never_lost(ranks, hosts):
    assert ranks(*hosts).run(10 * LIMIT) == {}


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_silent_rank_on_another_host_is_found_by_the_one_after_it(ranks, lost):
    found = ranks("a", "b", "c").run(3 * LIMIT, silent=(lost,))
    assert list(found) == [(lost + 1) % 3]
    (who, after) = found[(lost + 1) % 3]
    assert who == lost and LIMIT <= after <= 1.2 * LIMIT


def test_of_several_silent_ranks_the_last_is_found(ranks):
    assert ranks("a", "b", "c", "d").run(3 * LIMIT, silent=(1, 2))[3][0] == 2


def test_a_dead_process_on_the_same_host_is_found_at_once(ranks):
    group = ranks("a", "a", "b", "b")
    group.run(5)
    group.states[0] = "gone"
    assert group.run(5, silent=(0,)) == {1: (0, 0.5)}


def test_a_frozen_process_is_found_after_the_limit(ranks):
    group = ranks("a", "a", "a")
    group.states[1] = "stopped"
    found = group.run(3 * LIMIT, silent=(1,))
    assert found[2][0] == 1 and LIMIT <= found[2][1] <= 1.2 * LIMIT and list(found) == [2]


@pytest.mark.parametrize("silent", [0, 1, 2, 3])
def test_neighbours_on_a_host_vouch_for_a_process_that_holds_the_interpreter(ranks, silent):
    """On either side, so that the first and the last rank of a host are covered, whom another host watches."""
    assert ranks("a", "a", "b", "b").run(5 * LIMIT, silent=(silent,)) == {}


def test_a_rank_alone_on_its_host_may_be_silent_while_it_says_so(ranks):
    group = ranks("a", "b", "c")
    announce_state(group.store, 1, "busy")
    assert group.run(5 * LIMIT, silent=(1,)) == {}
    announce_state(group.store, 1, "")
    assert group.run(3 * LIMIT, silent=(1,))[2][0] == 1


def test_a_rank_that_is_busy_and_dead_is_found_on_its_host(ranks):
    group = ranks("a", "a")
    announce_state(group.store, 1, "busy")
    group.states[1] = "gone"
    assert group.run(2, silent=(1,)) == {0: (1, 0.5)}


def test_a_rank_that_is_done_may_go(ranks):
    group = ranks("a", "a", "b")
    for rank in (1, 2):
        announce_state(group.store, rank, "done")
        group.states[rank] = "gone"
    assert group.run(5 * LIMIT, silent=(1, 2)) == {}


def test_nobody_is_judged_for_the_time_in_which_the_judge_was_held_up(ranks):
    """A job that the scheduler suspends: all ranks stop and go on, one a little later than the others."""
    group = ranks("a", "b", "c")
    group.run(5)
    group.now += 3600
    assert group.run(0.8 * LIMIT, silent=(1,)) == {}
    assert group.run(5 * LIMIT) == {}
    group.now += 3600
    assert group.run(3 * LIMIT, silent=(1,))[2][0] == 1


def test_lost_ranks_are_named_with_their_hosts(ranks):
    group = ranks("node01", "node02")
    assert group.beats[0].place_of(1) == "rank 1 on node02" and group.beats[0].place_of(7) == "rank 7"


def test_what_the_system_says_of_a_process():
    child = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None and child.stdout.readline()
        fields = heartbeat._read_stat(child.pid)
        assert fields is not None
        process = Process("here", "", child.pid, fields[19])
        assert process.state() == "running" == Process.own().state()
        assert Process("here", "", child.pid, "123").state() == "gone"  # the number was given to another process
        os.kill(child.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 120
        while process.state() != "stopped" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.state() == "stopped"
        child.kill()
        while process.state() != "gone" and time.monotonic() < deadline:  # a zombie: nobody has waited for it
            time.sleep(0.01)
        assert process.state() == "gone"
    finally:
        child.kill()
        child.wait()
    assert process.state() == "gone"


def test_processes_of_one_system_find_each_other():
    own = Process.own()
    assert own.pid == os.getpid() and own.host and len(own.system.split()) == 2 and own == Process.own()


class LostStore:
    """A store whose keeper has ended."""

    def check(self, keys: list[str]) -> bool:
        raise RuntimeError("Connection reset by peer")


def test_places_of_ranks_are_known_when_the_store_is_gone(ranks):
    some = ranks("a", "b", "c", "d", "e", "f")
    some.run(5.0)
    fresh = ranks("a", "b").beats[0]
    for beat in (*some.beats, fresh):
        beat._store = LostStore()  # type: ignore[assignment]
    assert [some.beats[0].host_of(rank) for rank in range(6)] == ["a", "b", "c", "d", "e", "f"]
    assert some.beats[0].place_of(4) == "rank 4 on e"
    assert fresh.place_of(1) == "rank 1"
