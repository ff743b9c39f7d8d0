"""Ids inside and outside of a user namespace."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.errors import InvalidArgument
from nodeagent.linux.userns import Extent, outside
from nodeagent.sandbox.idmaps import IdMaps

MAPS = IdMaps(5, (Extent(0, 1000, 10), Extent(10, 5000, 1)), (Extent(0, 2000, 1),))


def test_ids_of_several_extents() -> None:
    assert [MAPS.uid(inside) for inside in (0, 9, 10)] == [1000, 1009, 5000]
    assert MAPS.gid(0) == 2000


@pytest.mark.parametrize("inside", [11, 2**32 - 2])
def test_an_id_that_is_not_mapped_is_named(inside: int) -> None:
    with pytest.raises(InvalidArgument, match=f"uid {inside}: not mapped"):
        MAPS.uid(inside)
    with pytest.raises(InvalidArgument, match=f"gid {inside}: not mapped"):
        MAPS.gid(inside)


@given(st.integers(0, 2**32 - 2))
def test_the_node_has_no_other_ids(number: int) -> None:
    assert IdMaps(-1).uid(number) == IdMaps(-1).gid(number) == number


@given(st.integers(0, 2**31), st.integers(0, 2**31), st.integers(1, 2**31), st.integers(0, 2**32))
def test_one_extent(inside: int, beyond: int, length: int, number: int) -> None:
    extents = [Extent(inside, beyond, length)]
    if inside <= number < inside + length:
        assert outside(number, extents) - beyond == number - inside
    else:
        with pytest.raises(ValueError, match="not mapped"):
            outside(number, extents)
