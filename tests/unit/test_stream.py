"""The format of streams: what is written is read, and nothing else is; samples of released versions stay readable."""

from __future__ import annotations

import random
import resource
from pathlib import Path

import msgspec
import pytest
import zstandard
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from silofs import stream
from silofs.blocks import PAGE
from silofs.errors import BadFormat, BadStream, SiloError
from silofs.limits import STREAM_RUNS
from silofs.stream import DATA, ZERO, Decoder, Encoder, Frame, Head

HEAD = Head("vm1", "b", b"B" * 16, 1 << 30, 1_700_000_000_000_000_000, b"A" * 16, "vm1@a", 1 << 29)
GOLDEN = Path(__file__).parents[1] / "golden" / "stream-v1.bin"


class Bytes:
    """What `read` of a decoder is given."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def read(self, length: int) -> bytes:
        part = self.data[self.at : self.at + length]
        self.at += len(part)
        return part


def decode(data: bytes) -> tuple[Head, list[Frame]]:
    decoder = Decoder(Bytes(data).read)
    return decoder.head, list(decoder.frames())


def sample() -> list[bytes]:
    """Header, three frames, the end."""
    encoder = Encoder(HEAD)
    noise = random.Random(1).randbytes(3 * PAGE)
    return [
        encoder.header,
        encoder.frame(100, [(3, 1, DATA), (7, 90, ZERO), (98, 2, DATA)], noise),
        encoder.frame(4096, [(100, 16, DATA)], b"text " * (16 * PAGE // 5) + b"."),
        encoder.frame(1 << 18, [((1 << 18) - 5, 5, ZERO)], b""),
        encoder.end(),
    ]


def test_there_and_back() -> None:
    parts = sample()
    head, frames = decode(b"".join(parts))
    assert head == HEAD
    assert [(frame.first, frame.end) for frame in frames] == [(0, 100), (100, 4096), (4096, 1 << 18)]
    assert frames[0].runs == ((3, 1, DATA), (7, 90, ZERO), (98, 2, DATA))
    assert bytes(frames[0].data) == random.Random(1).randbytes(3 * PAGE)
    assert bytes(frames[1].data[:10]) == b"text text "
    assert len(parts[1]) > 3 * PAGE  # noise stays raw
    assert len(parts[2]) < PAGE  # text does not


def test_a_sample_of_version_1() -> None:
    data = GOLDEN.read_bytes()
    head, frames = decode(data)
    assert head == HEAD
    assert [frame.runs for frame in frames] == [frame.runs for frame in decode(b"".join(sample()))[1]]
    assert blake3(b"".join(bytes(frame.data) for frame in frames)).hexdigest()[:16] == "5700735ca1364758"
    # What does not go through zstd is written as it was then, byte for byte.
    assert data.startswith(b"".join(sample()[:2]))


@given(st.data())
def test_a_changed_stream_is_refused(data: st.DataObject) -> None:
    """Flipped, cut, spliced: an error of ours, and no frame that was not written."""
    parts = sample()
    sound = decode(b"".join(parts))[1]
    what = data.draw(st.sampled_from(["flip", "cut", "swap", "drop", "insert", "twice"]))
    if what == "flip":
        whole = bytearray(b"".join(parts))
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] ^= 1 << data.draw(st.integers(0, 7))
    elif what == "cut":
        whole = bytearray(b"".join(parts))
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        one, other = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda pair: pair[0] != pair[1]))
        if what == "swap":
            parts[one], parts[other] = parts[other], parts[one]
        elif what == "drop":
            del parts[one]
        elif what == "twice":
            parts.insert(one, parts[one])
        else:
            parts.insert(one, data.draw(st.binary(max_size=200)) or b"x")
        whole = bytearray(b"".join(parts))
    if what == "twice" and one == 4:
        assert decode(bytes(whole))[1] == sound  # what follows the end is not read
        return
    seen: list[Frame] = []
    with pytest.raises((BadStream, BadFormat)) as caught:
        seen.extend(Decoder(Bytes(bytes(whole)).read).frames())
    assert seen == sound[: len(seen)]
    assert "\n" not in caught.value.message


@given(st.binary(max_size=400))
def test_bytes_that_are_no_stream(data: bytes) -> None:
    for front in (b"", stream.MAGIC, sample()[0]):
        with pytest.raises(SiloError):
            decode(front + data)


def sealed(body: bytes) -> bytes:
    front = stream.PREFIX.pack(stream.MAGIC, stream.VERSION, 0, len(body)) + body
    return front + blake3(front).digest(stream.SUM_BYTES)


@pytest.mark.parametrize(
    "changes",
    [
        {"volume": "../x"},
        {"snapshot": "a/b"},
        {"uuid": b"short"},
        {"base": b"short"},
        {"size": -1},
        {"size": 1 << 60},
        {"base_size": -1},
        {"created_ns": -1},
        {"base_name": "x" * 400},
        {"volume": 7},
    ],
)
def test_a_header_of_nonsense_with_a_sound_checksum(changes: dict[str, object]) -> None:
    body = msgspec.msgpack.encode(list({**msgspec.structs.asdict(HEAD), **changes}.values()))
    with pytest.raises(BadStream):
        Decoder(Bytes(sealed(body)).read)


def test_another_version_is_refused_as_such() -> None:
    data = bytearray(sample()[0])
    data[8] = 9
    with pytest.raises(BadFormat, match="version 9"):
        Decoder(Bytes(bytes(data)).read)


def framed(
    *, kind: int = stream.PAGES, codec: int, payload: bytes, raw: int, end: int = 100, length: int = -1
) -> bytes:
    """A stream with one frame whose checksum is right, whatever it says."""
    encoder = Encoder(HEAD)
    head = stream.FRAME.pack(kind, codec, 0, len(payload) if length < 0 else length, raw, 0, 0, end)
    return encoder.header + head + payload + encoder.chain.sum_of(head, payload)


def test_bombs_are_refused_before_they_are_unpacked() -> None:
    huge = zstandard.ZstdCompressor().compress(bytes(1 << 30))
    no_size = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 26))
    two = zstandard.ZstdCompressor().compress(bytes(PAGE)) * 2
    run = stream.COUNT.pack(1) + stream.RUN.pack(0, 1, DATA)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for wrong in (
        framed(codec=stream.ZSTD, payload=huge, raw=1 << 30),
        framed(codec=stream.ZSTD, payload=huge, raw=len(run) + PAGE),
        framed(codec=stream.ZSTD, payload=no_size, raw=PAGE),
        framed(codec=stream.ZSTD, payload=two, raw=PAGE),
        framed(codec=stream.ZSTD, payload=b"no frame of zstd", raw=PAGE),
        framed(codec=7, payload=b"", raw=0),
        framed(kind=9, codec=0, payload=b"", raw=0),
        framed(codec=stream.RAW, payload=b"", raw=0, length=(1 << 32) - 1),
        framed(codec=stream.RAW, payload=b"", raw=0),
        framed(codec=stream.RAW, payload=stream.COUNT.pack(STREAM_RUNS + 1), raw=4),
        framed(codec=stream.RAW, payload=stream.COUNT.pack((1 << 32) - 1), raw=4),
        framed(codec=stream.RAW, payload=run, raw=len(run)),
        framed(codec=stream.RAW, payload=run + bytes(2 * PAGE), raw=len(run) + 2 * PAGE),
        framed(codec=stream.RAW, payload=run + bytes(PAGE), raw=len(run) + PAGE, end=1 << 40),
        framed(codec=stream.RAW, payload=run + bytes(PAGE), raw=len(run) + PAGE, end=0),
        framed(codec=stream.RAW, payload=stream.COUNT.pack(1) + stream.RUN.pack(5, 1 << 31, ZERO), raw=20),
        framed(codec=stream.RAW, payload=stream.COUNT.pack(1) + stream.RUN.pack(5, 0, ZERO), raw=20),
        framed(codec=stream.RAW, payload=stream.COUNT.pack(1) + stream.RUN.pack(5, 1, 3), raw=20),
        framed(kind=stream.END, codec=stream.RAW, payload=bytes(48), raw=48, end=1 << 18),
    ):
        with pytest.raises(BadStream):
            decode(wrong)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_the_end_counts_everything() -> None:
    """A stream that was put together with sound frames only, and an end that was not."""
    encoder = Encoder(HEAD)
    whole = encoder.header + encoder.frame(100, [(3, 1, DATA)], b"a" * PAGE)
    encoder.chain.data_pages += 1
    with pytest.raises(BadStream, match="as a whole"):
        decode(whole + encoder.end())
