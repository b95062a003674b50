"""The reference store: a bytearray for each volume and a list of snapshots. What a real store must agree with."""

from __future__ import annotations

from dataclasses import dataclass, field

from silofs.blocks import PAGE, ZERO_PAGE


@dataclass
class ReferenceVolume:
    """One volume: its bytes now, and its bytes at every snapshot."""

    data: bytearray
    snapshots: dict[str, bytes] = field(default_factory=dict)

    def write(self, offset: int, data: bytes) -> None:
        """Bytes beyond the end are dropped: who writes there grows the volume first."""
        end = min(offset + len(data), len(self.data))
        if offset < end:
            self.data[offset:end] = data[: end - offset]

    def zero(self, first_page: int, end_page: int) -> None:
        start, end = first_page * PAGE, min(end_page * PAGE, len(self.data))
        if start < end:
            self.data[start:end] = bytes(end - start)

    def resize(self, size: int) -> None:
        """What is cut off is gone; what is added is zero."""
        if size < len(self.data):
            del self.data[size:]
        else:
            self.data.extend(bytes(size - len(self.data)))


class Reference:
    """Volumes by name."""

    def __init__(self) -> None:
        self.volumes: dict[str, ReferenceVolume] = {}

    def create(self, name: str, size: int) -> None:
        self.volumes[name] = ReferenceVolume(bytearray(size))

    def delete(self, name: str) -> None:
        del self.volumes[name]

    def rename(self, old: str, new: str) -> None:
        self.volumes[new] = self.volumes.pop(old)

    def snapshot(self, name: str, snapshot: str) -> None:
        volume = self.volumes[name]
        volume.snapshots[snapshot] = bytes(volume.data)

    def clone(self, name: str, snapshot: str, new: str) -> None:
        self.volumes[new] = ReferenceVolume(bytearray(self.volumes[name].snapshots[snapshot]))

    def rollback(self, name: str, snapshot: str) -> None:
        volume = self.volumes[name]
        volume.data = bytearray(volume.snapshots[snapshot])


def nonzero_pages(data: bytes | bytearray) -> int:
    """Pages that hold something: what a store may not count fewer of."""
    padded = bytes(data) + bytes(-len(data) % PAGE)
    return sum(padded[at : at + PAGE] != ZERO_PAGE for at in range(0, len(padded), PAGE))
