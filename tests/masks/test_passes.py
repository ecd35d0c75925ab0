"""Groups: every matrix once, in order, within the bound."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrosa.errors import DoesNotFitError
from qrosa.masks.passes import group_matrices


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(50, 400))
def test_groups_partition_in_order_within_the_bound(sizes: list[int], weights: int) -> None:
    named = {f"m{i}": size for i, size in enumerate(sizes)}
    groups = group_matrices(named, 4 * weights)
    assert [path for group in groups for path in group] == list(named)
    assert all(sum(named[path] for path in group) <= weights for group in groups)


def test_no_bound_is_one_group() -> None:
    assert group_matrices({"a": 10, "b": 20}) == [["a", "b"]]


def test_nothing_to_group() -> None:
    assert group_matrices({}) == []


def test_a_matrix_above_the_bound_is_named() -> None:
    with pytest.raises(DoesNotFitError, match=r"statistic of b takes 8\.0 MiB, 4\.0 MiB") as caught:
        group_matrices({"a": 10, "b": 2 << 20}, 4 << 20)
    assert "8MB" in caught.value.hint
