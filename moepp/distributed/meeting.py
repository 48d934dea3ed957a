"""The ranks meet at a key-value store before anything else, and start only if all of them want the same.

Rank 0 names the meeting, for a launcher's store may outlive several starts and hold what an earlier one left. Each rank
brings a digest of its facts (configuration, versions, ...) or the error that keeps it from starting; rank 0 compares
and says what comes of it. Where digests differ, one rank of each kind brings its facts as well. A rank that agrees
sends a few hundred bytes and asks for nothing but the verdict.

    start/meeting                   name of the meeting, and the number of ranks that rank 0 expects
    start/<meeting>/arrived         ranks that are there
    start/<meeting>/taken/<rank>    processes that say they are this rank
    start/<meeting>/rank/<rank>     the rank's digest
    start/<meeting>/problem/<n>     n-th error of a rank that cannot start (numbers: given; problems: written)
    start/<meeting>/verdict         "agreed", "facts" (of whom), or "refused" (why, and who says so)
    start/<meeting>/facts/<rank>    the facts, where asked for; the verdict is then start/<meeting>/differences
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from moepp.distributed.agreement import SHOWN_GROUPS, Facts, describe_differences, digest_of, group_ranks, name_ranks
from moepp.distributed.launch import LaunchEnvironment
from moepp.errors import ConfigError, LaunchError, PeerError

GRACE_SECONDS = 2.0  # after a rank's error, for the others to say whether they have the same
REMARK_SECONDS = 30.0  # until a rank says for whom it waits
NAME_SECONDS = 5.0  # for a name server that stumbles
CONNECT_SECONDS = 30.0  # for one connection
_PROCESS = uuid.uuid4().hex[:12]
REMEDY = "start all ranks with the same command, packages and files"


def join_store(launch: LaunchEnvironment, timeout_seconds: float) -> Store:
    """Return the store where the ranks meet: rank 0 keeps it, unless the launcher does.

    Raises:
        LaunchError: its place cannot be right: a name that does not resolve, a port that is taken.
        PeerError: nobody answers there in time.
    """
    if launch.master is None:
        return HashStore()
    host, port = launch.master
    keeps = launch.rank == 0 and not outlives_starts()
    _require_name(host, launch)
    if not keeps:
        _wait_for_server(launch, timeout_seconds)
    limit = timedelta(seconds=min(timeout_seconds, CONNECT_SECONDS))
    try:
        store = _in_time(
            lambda: TCPStore(host, port, is_master=keeps, timeout=limit, wait_for_workers=False, multi_tenant=True),
            limit.total_seconds(),
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        if "EADDRINUSE" in reason or "address already in use" in str(error).lower():
            raise _misplaced(
                f"MASTER_PORT={port} is in use on {socket.gethostname()}; choose another port, or end the process that "
                "has it"
            ) from error
        raise _misplaced(
            f"rank {launch.rank} on {socket.gethostname()} finds no store of a run at MASTER_ADDR:MASTER_PORT="
            f"{place(launch)} ({reason}); MASTER_ADDR must be rank 0's host, and the port free there"
        ) from error
    store.set_timeout(timedelta(seconds=timeout_seconds))
    return store


def _misplaced(message: str) -> LaunchError:
    error = LaunchError(message)
    error.cannot_meet = True
    return error


def _in_time(connect: Callable[[], Store], seconds: float) -> Store:
    """Return what ``connect`` does. torch's own limit does not hold where something takes connections and is silent.

    Raises:
        Exception: as ``connect``.
        RuntimeError: it has not returned in twice the time, and waits on in its thread.
    """
    outcome: queue.SimpleQueue[Store | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put(connect())
        except Exception as error:  # all of them: one that stayed here would look like silence
            outcome.put(error)

    threading.Thread(target=run, name="connect", daemon=True).start()
    try:
        found = outcome.get(timeout=2 * seconds)
    except queue.Empty:
        raise RuntimeError("what listens there does not answer") from None
    if isinstance(found, Exception):
        raise found
    return found


def meet(store: Store, launch: LaunchEnvironment, facts: Facts, timeout_seconds: float) -> Store:
    """Agree with all other ranks on ``facts``; the same outcome on every rank.

    Returns:
        A store for this start alone.

    Raises:
        ConfigError: the ranks differ, or some cannot start; names them.
        LaunchError: two processes have one rank, or another number of ranks.
        PeerError: a rank has not come in time, or rank 0 was lost.
    """
    if launch.world_size == 1:
        return store
    try:
        if launch.rank == 0:
            name = announce_meeting(store, launch)
            _arrive(store, launch, f"start/{name}", facts)
            verdict = _judge(store, launch, f"start/{name}", facts, timeout_seconds)
        else:
            name, verdict = _attend(store, launch, facts, timeout_seconds)
    except RuntimeError as error:
        raise PeerError(
            f"rank {launch.rank} lost the store at {place(launch)}, which rank 0 or the launcher keeps, while the "
            "ranks were meeting; look for rank 0's error"
        ) from error
    if verdict["is"] == "refused":
        _part(store, launch, name)
        kind = {"config": ConfigError, "launch": LaunchError, "peer": PeerError}[verdict["kind"]]
        error = kind(verdict["message"])
        error.said_here = launch.rank in verdict["speakers"]
        raise error
    return PrefixStore(f"run/{name}", store)


def _part(store: Store, launch: LaunchEnvironment, name: str) -> None:
    """Rank 0, which may keep the store, leaves a meeting last."""
    with contextlib.suppress(RuntimeError):
        if launch.rank != 0:
            store.add(f"start/{name}/heard", 1)
            return
        others = store.add(f"start/{name}/arrived", 0) - 1
        _wait_until(lambda: store.add(f"start/{name}/heard", 0) >= others, GRACE_SECONDS)


def announce_meeting(store: Store, launch: LaunchEnvironment) -> str:
    """Return the name of this process's meeting (rank 0), the same at every call."""
    name = f"{_PROCESS}-{os.getpid()}"  # forked processes share the first part
    store.set("start/meeting", json.dumps({"name": name, "world_size": launch.world_size}))
    return name


def current_meeting(store: Store) -> str:
    """Return the meeting that rank 0 announced last, perhaps of an earlier start; empty if there is none."""
    return json.loads(store.get("start/meeting"))["name"] if store.check(["start/meeting"]) else ""


def take_place(store: Store, name: str, rank: int) -> bool:
    """Return whether this process is the first to come to the meeting as ``rank``."""
    return store.add(f"start/{name}/taken/{rank}", 1) == 1


def tell_problem(store: Store, name: str, rank: int, text: str, kind: str = "config") -> None:
    """Tell rank 0 what keeps this rank from starting; rank 0 ends the meeting with it."""
    key = f"start/{name}"
    number = store.add(f"{key}/numbers", 1)
    store.set(f"{key}/problem/{number}", json.dumps({"rank": rank, "text": text, "kind": kind}))
    store.add(f"{key}/problems", 1)


def refuse_all(store: Store, name: str, problem: str) -> None:
    """Rank 0 that cannot start: tell whoever is at the meeting, or comes."""
    _publish(store, f"start/{name}/verdict", _refusal("config", f"rank 0 cannot start: {problem}", []))


def refusal_of(store: Store, name: str) -> str:
    """Return why the meeting was refused; empty where it was not."""
    for key in (f"start/{name}/differences", f"start/{name}/verdict"):
        if store.check([key]):
            return json.loads(store.get(key)).get("message", "")
    return ""


def outlives_starts() -> bool:
    """Return whether torchrun's own store is the meeting place; it keeps entries of earlier starts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def place(launch: LaunchEnvironment) -> str:
    """Host and port where the ranks meet."""
    host, port = launch.master or ("", 0)
    return f"{host}:{port}"


def _require_name(host: str, launch: LaunchEnvironment) -> None:
    problem: list[Exception] = []

    def resolves() -> bool:
        try:
            return bool(socket.getaddrinfo(host, None))
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be encoded
            problem[:] = [error]
            return False

    if not _wait_until(resolves, NAME_SECONDS):
        raise _misplaced(
            f"MASTER_ADDR={host} is not known to rank {launch.rank} on {socket.gethostname()} "
            f"({getattr(problem[0], 'strerror', problem[0])}); name rank 0's host"
        )


def _wait_for_server(launch: LaunchEnvironment, seconds: float) -> None:
    """Until something listens where rank 0 should; says after a while that it waits."""
    assert launch.master is not None
    address, problem = launch.master, "no answer"
    start, remarked = time.monotonic(), False
    while True:
        left = start + seconds - time.monotonic()
        try:
            with socket.create_connection(address, timeout=max(min(left, CONNECT_SECONDS), 0.1)) as connection:
                if connection.getsockname() != connection.getpeername():  # on one host a socket may meet itself
                    return
        except OSError as error:
            problem = error.strerror or str(error)
        waited = time.monotonic() - start
        where = f"rank {launch.rank} on {socket.gethostname()}"
        if waited >= seconds:
            raise PeerError(
                f"{where} cannot reach rank 0 at MASTER_ADDR:MASTER_PORT={place(launch)} within "
                f"{seconds:g} s ({problem}); check that rank 0 was started, its error, and the address"
            )
        if waited > REMARK_SECONDS and not remarked:
            print(f"{where} waits for rank 0 at {place(launch)} ({problem})", file=sys.stderr, flush=True)
            remarked = True
        time.sleep(min(0.1 + waited / 20, 1.0))


def _arrive(store: Store, launch: LaunchEnvironment, key: str, facts: Facts) -> None:
    expected, name, host = (
        json.loads(store.get("start/meeting"))["world_size"],
        key[len("start/") :],
        socket.gethostname(),
    )
    if launch.world_size != expected:
        text = f"has WORLD_SIZE {launch.world_size} instead of {expected} (on {host}); check the launcher"
        tell_problem(store, name, launch.rank, text, "launch")
    elif not take_place(store, name, launch.rank):
        text = f"was started twice: RANK={launch.rank} is given to two processes (one is on {host}); check the launcher"
        tell_problem(store, name, launch.rank, text, "launch")
    else:
        store.set(f"{key}/rank/{launch.rank}", digest_of(facts))
        store.add(f"{key}/arrived", 1)


def _attend(store: Store, launch: LaunchEnvironment, facts: Facts, seconds: float) -> tuple[str, dict[str, Any]]:
    """Any rank but 0: take part in the newest meeting; returns its name and the verdict.

    One that has ended without this rank is of an earlier start, and so is one that rank 0 replaces.
    """
    deadline = time.monotonic() + seconds + 2 * GRACE_SECONDS  # rank 0 speaks first
    name, verdict = "", None
    while verdict is None:
        if not _wait_until(functools.partial(_is_replaced, store, name), deadline - time.monotonic()):
            message = f"rank 0 gave no answer at {place(launch)}; look for its error"
            return "", _refusal("peer", message, [launch.rank])
        name = current_meeting(store)
        verdict = _attend_one(store, launch, name, facts, deadline)
    return name, verdict


def _attend_one(
    store: Store, launch: LaunchEnvironment, name: str, facts: Facts, deadline: float
) -> dict[str, Any] | None:
    """Return the verdict of one meeting, or None where it is not of this start."""
    key = f"start/{name}"
    if store.check([f"{key}/verdict"]):
        verdict = json.loads(store.get(f"{key}/verdict"))
        patience = GRACE_SECONDS if outlives_starts() else 0
        refused = verdict["is"] == "refused" and not _wait_until(lambda: _is_replaced(store, name), patience)
        return verdict if refused else None
    _arrive(store, launch, key, facts)
    _wait_until(lambda: store.check([f"{key}/verdict"]) or _is_replaced(store, name), deadline - time.monotonic())
    if store.check([f"{key}/verdict"]):
        return _follow(store, launch, key, facts, deadline - time.monotonic())
    return None


def _is_replaced(store: Store, name: str) -> bool:
    return current_meeting(store) not in ("", name)


def _follow(store: Store, launch: LaunchEnvironment, key: str, facts: Facts, seconds: float) -> dict[str, Any]:
    """Return the verdict, after sending this rank's facts if rank 0 asks for them."""
    verdict = json.loads(store.get(f"{key}/verdict"))
    if verdict["is"] != "facts":
        return verdict
    if launch.rank in verdict["of"]:
        store.set(f"{key}/facts/{launch.rank}", json.dumps(dict(facts)))
    if not _wait_until(lambda: store.check([f"{key}/differences"]), seconds):
        return _refusal("peer", f"rank 0 gave no answer at {place(launch)}; look for its error", [launch.rank])
    return json.loads(store.get(f"{key}/differences"))


def _judge(store: Store, launch: LaunchEnvironment, key: str, facts: Facts, seconds: float) -> dict[str, Any]:
    """Return the verdict of rank 0, which waits for all ranks, compares their facts and publishes it."""

    def counted(what: str) -> int:
        return store.add(f"{key}/{what}", 0)

    def ended() -> bool:
        return counted("arrived") >= launch.world_size or counted("problems") > 0

    patience = min(REMARK_SECONDS, seconds)
    if not _wait_until(ended, patience) and seconds > patience:
        missing = name_ranks(_missing(store, launch, key))
        print(f"rank 0 waits at {place(launch)} for {missing} of {launch.world_size}", file=sys.stderr, flush=True)
        _wait_until(ended, seconds - patience)
    if counted("problems") > 0:
        _wait_until(lambda: counted("arrived") + counted("problems") >= launch.world_size, GRACE_SECONDS)
        return _publish(store, f"{key}/verdict", _refuse_problems(store, key))
    if counted("arrived") < launch.world_size:
        message = (
            f"{name_ranks(_missing(store, launch, key))} of {launch.world_size} did not come to {place(launch)} within "
            f"parallel.timeout_seconds={seconds:g}; check that all were started, and look for their errors"
        )
        return _publish(store, f"{key}/verdict", _refusal("peer", message, range(launch.world_size)))
    digests = [text.decode() for text in _get_all(store, [f"{key}/rank/{r}" for r in range(launch.world_size)])]
    groups = group_ranks(digests)
    if len(groups) == 1:
        return _publish(store, f"{key}/verdict", {"is": "agreed"})
    return _compare(store, key, facts, groups, seconds)


def _compare(store: Store, key: str, facts: Facts, groups: list[list[int]], seconds: float) -> dict[str, Any]:
    """Return in what the ranks differ, after asking one rank of each kind for its facts (rank 0)."""
    asked = [group[0] for group in groups[: 1 + SHOWN_GROUPS]]
    _publish(store, f"{key}/verdict", {"is": "facts", "of": asked})
    keys = [f"{key}/facts/{rank}" for rank in asked if rank != 0]
    if not _wait_until(lambda: store.check(keys), seconds):
        return _publish(store, f"{key}/differences", _refusal("peer", "a rank was lost while the ranks compared", [0]))
    brought = iter(_get_all(store, keys))
    told = describe_differences(groups, [facts if rank == 0 else json.loads(next(brought)) for rank in asked])
    speakers = {0, *(group[0] for group in groups)}
    return _publish(store, f"{key}/differences", _refusal("config", f"{told}; {REMEDY}", speakers))


def _refuse_problems(store: Store, key: str) -> dict[str, Any]:
    keys = [f"{key}/problem/{number}" for number in range(1, store.add(f"{key}/numbers", 0) + 1)]
    problems = [json.loads(store.get(key)) for key in keys if store.check([key])]
    ranks: dict[str, list[int]] = {}
    for problem in problems:
        ranks.setdefault(problem["text"], []).append(problem["rank"])
    told = []
    for text, who in list(ranks.items())[:SHOWN_GROUPS]:
        told.append(f"{name_ranks(who)}{' ' if problems[0]['kind'] == 'launch' else ' cannot start: '}{text}")
    return _refusal(problems[0]["kind"], "; ".join(told), [0])


def _refusal(kind: str, message: str, speakers: Any) -> dict[str, Any]:
    return {"is": "refused", "kind": kind, "message": message, "speakers": sorted(speakers)}


def _publish(store: Store, key: str, verdict: dict[str, Any]) -> dict[str, Any]:
    store.set(key, json.dumps(verdict))
    return verdict


def _missing(store: Store, launch: LaunchEnvironment, key: str) -> list[int]:
    return [rank for rank in range(launch.world_size) if not store.check([f"{key}/rank/{rank}"])]


def _get_all(store: Store, keys: list[str]) -> list[bytes]:
    if not keys:
        return []
    return store.multi_get(keys)  # pyright: ignore[reportAttributeAccessIssue]


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Return whether the condition came true in time; asks less and less often."""
    deadline, pause = time.monotonic() + seconds, 0.005
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(pause, max(deadline - time.monotonic(), 0)))
        pause = min(2 * pause, 0.25)
    return True
