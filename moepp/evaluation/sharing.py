"""Several ranks, one evaluation: rank 0 runs the harness and asks, all ranks compute.

Rank 0 broadcasts each set of sequences. It is sorted by length and cut into batches that do not depend on the number of
ranks; batches are dealt out in turn, and every rank runs the same number of forward passes, because with expert
parallelism each pass needs all ranks of the group: a rank without a batch left runs one token that counts nowhere.
Prompts to be continued are dealt to EP groups instead, whose ranks must write the same text in step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from moepp.data.tokenizer import Tokenizer
from moepp.distributed import comm
from moepp.distributed.groups import ParallelGroups
from moepp.errors import EvaluationStopped, MoeppError, PeerError
from moepp.evaluation.kinds import KindCounts, counted_kinds
from moepp.evaluation.scoring import Prompt, Row, continue_prompts, score_rows
from moepp.model.transformer import Transformer

T = TypeVar("T")
_IDLE = [Row(np.zeros(1, np.int32), (np.zeros(1, np.int32),))]


class SharedModel:
    """A model on all ranks, driven by rank 0 inside :meth:`run`.

    Args:
        model: this rank's share, on its device.
        batch_size: sequences per rank and forward pass.
        must_stop: asked on every rank before each forward pass; None: never.

    Attributes:
        kinds: experts that the tokens of all requests have chosen so far, over all ranks.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        groups: ParallelGroups,
        batch_size: int,
        must_stop: Callable[[], bool] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.groups = groups
        self.batch_size = batch_size
        self._must_stop = must_stop
        self.kinds = KindCounts()
        self._own_kinds = KindCounts()  # of this rank, in the present set of requests

    def run(self, lead: Callable[[], T]) -> T:
        """Call ``lead`` on rank 0, where :meth:`score` and :meth:`generate` may be used; its result on every rank.

        Collective. The model is in eval mode meanwhile.

        Raises:
            MoeppError: whatever ``lead`` raised, on every rank (:class:`PeerError` on the others for other errors).
            EvaluationStopped: on every rank, because one must stop.
        """
        with _eval_mode(self.model):
            return self._lead(lead) if self.groups.rank == 0 else self._follow()

    def score(self, rows: Sequence[Row]) -> list[list[tuple[float, bool]]]:
        """As :func:`moepp.evaluation.scoring.score_rows`, any number of rows; rank 0 only, inside :meth:`run`."""
        return self._ask("score", rows)

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """As :func:`moepp.evaluation.scoring.continue_prompts`, any prompts; rank 0 only, inside :meth:`run`."""
        return self._ask("generate", prompts)

    def _lead(self, lead: Callable[[], T]) -> T:
        error: MoeppError = PeerError("rank 0 stopped while it evaluated; see its output")
        result, done = None, False
        try:
            result = lead()
            done = True
            return result
        except MoeppError as problem:
            error = problem
            raise
        finally:
            comm.broadcast_object(("end", result if done else (type(error), str(error)), done), self.groups.world)

    def _follow(self) -> Any:
        while True:
            kind, content, done = comm.broadcast_object(None, self.groups.world)
            if kind != "end":
                with contextlib.suppress(EvaluationStopped):  # rank 0 tells what ends
                    self._answer(kind, content)
            elif done:
                return content
            else:
                raise content[0](content[1])

    def _ask(self, kind: str, content: Sequence[Any]) -> list[Any]:
        if not content:
            return []
        comm.broadcast_object((kind, list(content), False), self.groups.world)
        return self._answer(kind, content)

    def _answer(self, kind: str, content: Sequence[Any]) -> list[Any]:
        """Do this rank's share of the work and return everyone's results in the order of ``content``."""
        self._own_kinds = KindCounts()
        own = self._score_own(content) if kind == "score" else self._generate_own(content)
        parts = comm.gather_objects((own, self._own_kinds), self.groups.world)
        for _, counts in parts:
            self.kinds += counts
        merged = {index: result for part, _ in parts for index, result in part}
        return [merged[index] for index in range(len(content))]

    def _score_own(self, rows: Sequence[Row]) -> list[tuple[int, Any]]:
        groups = self.groups
        batches = _batches(rows, [()] * len(rows), self.batch_size)
        results: list[tuple[int, Any]] = []
        for first in range(0, len(batches), groups.world_size):
            self._end_if_asked()
            own = first + groups.rank
            batch = batches[own] if own < len(batches) else []
            asked = [rows[i] for i in batch]
            lengths = torch.tensor([len(row.input_ids) for row in asked or _IDLE])
            mask_BS = torch.arange(int(lengths.max())) < lengths[:, None]  # padded on the right
            with counted_kinds(self.model, mask_BS) as counts:
                scores = score_rows(self.model, asked or _IDLE)
            results += zip(batch, scores, strict=False)
            self._own_kinds += counts[0] if counts and asked else KindCounts()
        return results

    def _generate_own(self, prompts: Sequence[Prompt]) -> list[tuple[int, Any]]:
        groups = self.groups
        keys = [(prompt.max_new_tokens, prompt.until, prompt.sampling) for prompt in prompts]
        batches = _batches(prompts, keys, self.batch_size)
        results: list[tuple[int, Any]] = []
        for first in range(0, len(batches), groups.edp_size):
            self._end_if_asked()
            number = first + groups.rank // groups.ep_size
            if number >= len(batches):
                continue
            batch = batches[number]
            lengths = torch.tensor([len(prompts[i].input_ids) for i in batch])
            longest = int(lengths.max())
            mask_BS = torch.arange(longest) >= longest - lengths[:, None]  # padded on the left
            with counted_kinds(self.model, mask_BS) as counts:
                texts = continue_prompts(self.model, self.tokenizer, [prompts[i] for i in batch], number)
            results += zip(batch, texts, strict=True)
            self._own_kinds += counts[0] if counts and groups.ep_rank == 0 else KindCounts()
        return results if groups.ep_rank == 0 else []

    def _end_if_asked(self) -> None:
        if self._must_stop is not None and comm.agree_on_flag(self._must_stop(), self.groups.world):
            raise EvaluationStopped("a signal has come")


def _batches(items: Sequence[Row | Prompt], keys: Sequence[Any], batch_size: int) -> list[list[int]]:
    """Return indices in batches of equal key, longest first, so that running out of memory shows at once."""
    order = sorted(range(len(items)), key=lambda i: (-len(items[i].input_ids), i))
    by_key: dict[Any, list[int]] = {}
    for index in order:
        by_key.setdefault(keys[index], []).append(index)
    return [group[i : i + batch_size] for group in by_key.values() for i in range(0, len(group), batch_size)]


@contextlib.contextmanager
def _eval_mode(model: Transformer) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
