"""Bytes over the loopback interface with nothing around them: what no client of a Hub can be faster than."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

__all__ = ["BareServer", "receive", "send"]

_PIECE = 1 << 20
_UP, _DOWN = b"u", b"d"


class BareServer:
    """Takes bytes and forgets them, or gives those it was made with; a context manager."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]

    def __enter__(self) -> BareServer:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection:
                if connection.recv(1) == _DOWN:
                    connection.sendall(self._content)
                    continue
                buffer = bytearray(_PIECE)
                while connection.recv_into(buffer):
                    pass
                connection.sendall(b"k")


def send(path: Path, port: int) -> None:
    """Send a file, and return once the other side has all of it."""
    with socket.create_connection(("127.0.0.1", port)) as connection, path.open("rb", buffering=0) as file:
        connection.sendall(_UP)
        while piece := file.read(_PIECE):
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)


def receive(path: Path, port: int) -> None:
    """Write what the server gives into a file."""
    buffer = memoryview(bytearray(_PIECE))
    with socket.create_connection(("127.0.0.1", port)) as connection, path.open("wb", buffering=0) as file:
        connection.sendall(_DOWN)
        while length := connection.recv_into(buffer):
            file.write(buffer[:length])
