"""Cutting a flat buffer into buckets: every parameter in exactly one, in order, shared equally by the ranks."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moepp.engine.buckets import cut


# The same examples in every run, however slow the machine is.
@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=30),
    bucket_elements=st.integers(1, 2000),
    align=st.sampled_from([1, 3, 64]),
    multiple=st.integers(1, 9),
)
def test_parameters_lie_one_after_the_other_in_buckets_that_ranks_share_equally(
    sizes, bucket_elements, align, multiple
):
    starts, spans = cut(sizes, bucket_elements, align, multiple)
    assert [index for span in spans for index in range(span.first, span.first + span.size)] == list(range(len(sizes)))
    end = 0
    for span in spans:
        assert span.start == end and span.length % multiple == 0
        place = span.start
        for index in range(span.first, span.first + span.size):
            assert starts[index] == place, "no gap but for the alignment"
            place += -(-sizes[index] // align) * align
        assert 0 <= span.stop - place < multiple, "no more padding than needed"
        end = span.stop
        filled = [-(-sizes[i] // align) * align for i in range(span.first, span.first + span.size)]
        assert sum(filled[1:]) < bucket_elements, "ends with the parameter that makes it long enough"
        assert span is spans[0] or sum(filled) >= bucket_elements


def test_without_alignment_nothing_is_padded():
    starts, spans = cut([5, 7, 9], 10)
    assert starts == [0, 5, 12]
    assert [(span.start, span.stop, span.first, span.size) for span in spans] == [(0, 5, 0, 1), (5, 21, 1, 2)]
