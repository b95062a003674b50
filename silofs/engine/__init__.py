"""Asynchronous volumes over the store, the write log, the caches and the peers (docs/write-path.md)."""

from silofs.engine.engine import Engine
from silofs.engine.remote import Remote
from silofs.engine.threads import Threads
from silofs.engine.volume import Gate, VolumeState

__all__ = ["Engine", "Gate", "Remote", "Threads", "VolumeState"]
