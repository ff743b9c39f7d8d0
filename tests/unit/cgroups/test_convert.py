import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.cgroups import convert


@pytest.mark.parametrize(
    ("shares", "weight"), [(0, 1), (2, 1), (1024, 100), (262144, 10000), (999999, 10000)]
)
def test_known_weights(shares: int, weight: int) -> None:
    assert convert.shares_to_weight(shares) == weight


def test_weights_grow_with_shares() -> None:
    weights = [convert.shares_to_weight(shares) for shares in range(2, 5000)]
    assert weights == sorted(weights)
    assert {convert.shares_to_weight(512), convert.shares_to_weight(2048)} == {59, 174}


def test_every_weight_has_shares_that_give_it() -> None:
    for weight in range(convert.MIN_WEIGHT, convert.MAX_WEIGHT + 1):
        shares = convert.weight_to_shares(weight)
        assert convert.shares_to_weight(shares) == weight
        if weight < convert.MAX_WEIGHT:
            assert convert.shares_to_weight(shares + 1) > weight


@given(st.integers(-1, 1 << 50).filter(bool), st.integers(1000, 1_000_000))
def test_cpu_max_and_back(quota: int, period: int) -> None:
    assert convert.parse_cpu_max(convert.cpu_max(quota, period)) == (quota, period)


@given(st.integers(-1, 1 << 61))
def test_limits_and_back(limit: int) -> None:
    assert convert.parse_max(convert.to_max(limit)) == limit
    assert convert.parse_v1_limit(f"{limit}\n") == limit


def test_v1_shows_no_limit_as_an_enormous_one() -> None:
    assert convert.parse_v1_limit("9223372036854771712\n") == convert.UNLIMITED
    assert convert.parse_v1_limit(b"max\n") == convert.UNLIMITED


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_swap_and_back(swap: int, memory: int) -> None:
    both = convert.memory_and_swap(swap, memory)
    assert convert.swap_max(both, memory) == swap


def test_no_limit_of_swap() -> None:
    assert convert.swap_max(-1, 4096) == -1
    assert convert.memory_and_swap(-1, 4096) == -1
    assert convert.memory_and_swap(0, -1) == -1


@pytest.mark.parametrize(("both", "memory"), [(4095, 4096), (4096, -1)])
def test_swap_that_does_not_fit(both: int, memory: int) -> None:
    with pytest.raises(ValueError, match="memory limit"):
        convert.swap_max(both, memory)
