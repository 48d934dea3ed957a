"""In what the ranks differ, in words: "rank 1 has optim.lr 0.5 instead of 0.002".

Facts are a flat mapping from a name that a user knows (a key of the configuration, a package) to a value as text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

from moepp.distributed import comm

Facts = Mapping[str, str]

SHOWN_FACTS, SHOWN_GROUPS, SHOWN_CHARACTERS = 5, 4, 80
ABSENT = "nothing"


def find_differences(facts: Facts, group: comm.Group) -> tuple[str, bool]:
    """Compare the facts of all ranks of a group; collective.

    Returns:
        In what they differ (empty: in nothing), and whether this rank is one that should say so.
    """
    digest = digest_of(facts)
    if comm.agree_on_digest(digest, group):
        return "", False
    groups = group_ranks(comm.gather_objects(digest, group))
    leaders = [ranks[0] for ranks in groups]
    asked = leaders[: 1 + SHOWN_GROUPS]
    own = comm.rank(group)
    brought = comm.gather_objects(dict(facts) if own in asked else None, group)
    return describe_differences(groups, [brought[rank] for rank in asked]), own in (0, *leaders)


def digest_of(facts: Facts) -> str:
    """32 hexadecimal digits, the same for the same facts in whatever order."""
    return hashlib.blake2b(json.dumps(sorted(facts.items())).encode(), digest_size=16).hexdigest()


def group_ranks(digests: Sequence[str]) -> list[list[int]]:
    """Ranks with the same digest, by rank; the largest group first, of equal ones the one with the lowest rank."""
    groups: dict[str, list[int]] = {}
    for rank, digest in enumerate(digests):
        groups.setdefault(digest, []).append(rank)
    return sorted(groups.values(), key=lambda ranks: (-len(ranks), ranks[0]))


def describe_differences(groups: Sequence[Sequence[int]], facts: Sequence[Facts]) -> str:
    """Return each group's differences from the first one, the first few of them.

    Args:
        groups: ranks of the same facts, as :func:`group_ranks` orders them.
        facts: of each group; groups beyond the end of it are only counted.
    """
    told = []
    for ranks, own in list(zip(groups, facts, strict=False))[1 : 1 + SHOWN_GROUPS]:
        keys = [key for key in dict.fromkeys([*facts[0], *own]) if facts[0].get(key) != own.get(key)]
        shown = [f"{key} {_show(own, key)} instead of {_show(facts[0], key)}" for key in keys[:SHOWN_FACTS]]
        more = f" and {len(keys) - SHOWN_FACTS} more differences" if len(keys) > SHOWN_FACTS else ""
        verb = "has" if len(ranks) == 1 else "have"
        told.append(f"{name_ranks(ranks)} {verb} {', '.join(shown)}{more}")
    rest = [rank for group in groups[1 + len(told) :] for rank in group]
    if rest:
        told.append(f"{name_ranks(rest)} differ{'s' if len(rest) == 1 else ''}, too")
    return "; ".join(told)


def name_ranks(ranks: Iterable[int]) -> str:
    """Return "rank 3", "ranks 8-15" or "ranks 0, 2, 5-7"; the list is cut where it gets long."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    names = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in spans]
    if len(names) > 8:
        names = [*names[:8], f"... ({sum(b - a + 1 for a, b in spans)} of them)"]
    return f"rank{'' if len(spans) == 1 and spans[0][0] == spans[0][1] else 's'} {', '.join(names)}"


def _show(facts: Facts, key: str) -> str:
    if key not in facts:
        return ABSENT
    text = ascii(facts[key])[1:-1]
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
