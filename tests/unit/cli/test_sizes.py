"""Sizes, bandwidths, durations and names as people type them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silofs import limits
from silofs.cli import sizes
from silofs.errors import BadName, BadSize, SiloError, UserError
from silofs.names import check_name


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20G", 20 << 30),
        ("20GiB", 20 << 30),
        ("20GB", 20 * 10**9),
        ("20g", 20 << 30),
        ("1.5G", 3 << 29),
        ("512MiB", 512 << 20),
        ("4096", 4096),
        ("4096B", 4096),
        ("4K", 4096),
        ("1P", 1 << 50),
        (" 1 T ", 1 << 40),
        ("0.000001GB", 1000),
    ],
)
def test_bytes(text: str, size: int) -> None:
    assert sizes.parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "G", "-1G", "+1G", "1X", "1.G", "1e9", "0x10", "20Gi B", "١G", "1_000", "nan", "1.5B", "9" * 99]
)
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(BadSize):
        sizes.parse_bytes(text)


@pytest.mark.parametrize("text", ["0", "1", "511", "512", "4095", "4097", "20000000001", "1.1P", "2P"])
def test_what_is_no_size_of_a_volume(text: str) -> None:
    with pytest.raises(BadSize):
        sizes.parse_size(text)


@given(st.integers(limits.SIZE_MIN // 512, limits.SIZE_MAX // 512), st.sampled_from(["", "B"]))
def test_every_allowed_size_is_read_back(sectors: int, unit: str) -> None:
    assert sizes.parse_size(f"{sectors * 512}{unit}") == sectors * 512


@given(st.integers(0, 1023), st.sampled_from("KMGTP"))
def test_binary_and_decimal_units(number: int, prefix: str) -> None:
    power = "KMGTP".index(prefix) + 1
    assert sizes.parse_bytes(f"{number}{prefix}") == sizes.parse_bytes(f"{number}{prefix}iB") == number * 1024**power
    assert sizes.parse_bytes(f"{number}{prefix}B") == number * 1000**power


@given(st.text(max_size=60))
def test_no_text_raises_anything_else(text: str) -> None:
    for parse in (sizes.parse_size, sizes.parse_bandwidth, sizes.parse_duration, sizes.parse_target):
        try:
            parse(text)
        except SiloError as error:
            assert error.exit_code == 2


@pytest.mark.parametrize(
    ("text", "seconds"), [("1h", 3600), ("90", 90), ("90s", 90), ("5m", 300), ("2d", 172800), ("500ms", 0.5), ("0", 0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert sizes.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1s", "1 week", "1w", "inf", "1H"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UserError):
        sizes.parse_duration(text)


@pytest.mark.parametrize(("text", "rate"), [("200M", 200 << 20), ("200MB/s", 200 * 10**6), ("1", 1)])
def test_bandwidths(text: str, rate: int) -> None:
    assert sizes.parse_bandwidth(text) == rate


@pytest.mark.parametrize("text", ["0", "-5", "fast", ""])
def test_what_is_no_bandwidth(text: str) -> None:
    with pytest.raises(BadSize, match="is no bandwidth") as caught:
        sizes.parse_bandwidth(text)
    assert "bytes per second" in caught.value.hint


def test_targets() -> None:
    assert sizes.parse_target("vm1") == ("vm1", None)
    assert sizes.parse_target("vm1@daily") == ("vm1", "daily")
    assert sizes.parse_snapshot("vm1@daily") == ("vm1", "daily")
    for text in ("vm1@", "@daily", "vm1@a@b", "@", "a/b@c"):
        with pytest.raises(BadName):
            sizes.parse_target(text)
    with pytest.raises(BadName):
        sizes.parse_snapshot("vm1")
    with pytest.raises(BadName):
        sizes.parse_volume("vm1@daily")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\0b", "-rf", ".hidden", "_x", "a b", "ä", "vm1.img", "a" * 129, "a\n", "٣"]
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(BadName) as caught:
        check_name(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@given(st.text(max_size=200))
def test_a_name_that_passes_is_a_plain_file_name(name: str) -> None:
    try:
        check_name(name)
    except BadName:
        return
    assert name.isascii()
    assert name[0].isalnum()
    assert not set(name) & set("/\0\n\r\t @*?'\"\\")
    assert len(name) <= 128


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1 << 20, "1.0 MiB"), (1 << 50, "1.0 PiB")])
def test_sizes_for_people(size: int, text: str) -> None:
    assert sizes.show_size(size) == text
