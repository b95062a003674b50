"""A TCP proxy between two peers that cuts, flips bits, delays or swallows what goes through it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time


class Proxy:
    """Forwards connections to `target`. The switches may be changed at any time, by any thread."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.delay_s = 0.0  # each way
        self.swallow = False  # a partition without a reset: nothing is forwarded, nothing is closed
        self.flip_every = 0  # bytes; 0: never
        self.flipped = 0
        self.forwarded = 0
        self._since = 0
        self._sockets: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Close every connection."""
        for one in list(self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._target, timeout=5)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                self._sockets |= {near, far}
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                while self.swallow:
                    time.sleep(0.01)
                if self.delay_s:
                    time.sleep(self.delay_s)
                self._since += len(data)
                if self.flip_every and self._since >= self.flip_every:
                    self._since = 0
                    self.flipped += 1
                    data = data[:-1] + bytes([data[-1] ^ 1])
                self.forwarded += len(data)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for one in (source, sink):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            self._sockets -= {source}
            source.close()
