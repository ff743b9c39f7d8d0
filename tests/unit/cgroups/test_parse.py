import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.cgroups import parse

names = st.from_regex(r"[a-z_]{1,20}", fullmatch=True)
numbers = st.integers(0, (1 << 64) - 1)
devices = st.tuples(st.integers(0, 4095), st.integers(0, 1 << 20))


@given(st.dictionaries(names, numbers))
def test_flat_keyed(values: dict[str, int]) -> None:
    text = "".join(f"{key} {value}\n" for key, value in values.items())
    found = parse.flat_keyed(text.encode())
    assert {key.decode(): int(value) for key, value in found.items()} == values


@given(st.dictionaries(devices, st.dictionaries(names, numbers)))
def test_nested_keyed(values: dict[tuple[int, int], dict[str, int]]) -> None:
    lines = [
        f"{major}:{minor} " + " ".join(f"{key}={value}" for key, value in pairs.items())
        for (major, minor), pairs in values.items()
    ]
    found = parse.nested_keyed("\n".join(lines).encode())
    assert {
        parse.device_number(device): {key.decode(): int(value) for key, value in pairs.items()}
        for device, pairs in found.items()
    } == values


def test_device_operations() -> None:
    text = b"254:0 Read 4096\n254:0 Write 0\n254:0 Total 4096\nTotal 4096\n"
    assert parse.device_operations(text) == {
        (b"254:0", b"Read"): 4096,
        (b"254:0", b"Write"): 0,
        (b"254:0", b"Total"): 4096,
    }


def test_pressure() -> None:
    text = (
        b"some avg10=0.18 avg60=0.04 avg300=0.09 total=4404348\n"
        b"full avg10=0.00 avg60=0.00 avg300=0.00 total=7\n"
    )
    assert parse.pressure(text) == parse.Pressure(
        parse.PressureLine(0.18, 0.04, 0.09, 4404348), parse.PressureLine(0.0, 0.0, 0.0, 7)
    )


def test_pressure_without_the_full_line() -> None:
    text = b"some avg10=1.00 avg60=2.00 avg300=3.00 total=4\n"
    assert parse.pressure(text).full == parse.NO_PRESSURE


@given(st.sets(st.integers(0, 300), min_size=1))
def test_number_list(wanted: set[int]) -> None:
    assert parse.number_list(",".join(map(str, wanted))) == wanted
    assert parse.number_list(f"{min(wanted)}-{max(wanted)}") >= wanted


@pytest.mark.parametrize(
    "text", ["", "a", "1,", "-1", "3-1", "1-", "0-99999999", "0x1", "1 2", "٣", "65536"]
)
def test_not_a_number_list(text: str) -> None:
    with pytest.raises(ValueError, match="not a list"):
        parse.number_list(text)


@given(st.binary(max_size=200))
def test_any_text_is_parsed_or_refused(data: bytes) -> None:
    for function in (
        parse.flat_keyed,
        parse.nested_keyed,
        parse.device_operations,
        parse.pressure,
    ):
        try:
            function(data)
        except ValueError:
            pass
