"""What goes wrong on the way to :mod:`tests.hub_server`: statuses, dropped connections, delays."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass
class Fault:
    """A failure of the next requests that it is of.

    Attributes:
        method: HTTP method.
        path: regular expression, searched for in the path.
        status: answer with this status, instead of doing what was asked.
        message: of the error, as ``X-Error-Message``.
        headers: further headers of the answer.
        page: the answer's body, where it is no JSON.
        drop_after: close the connection once so many bytes of the body have come in, or of the answer's gone out.
        lose_answer: do what was asked, and close the connection instead of saying so.
        delay: seconds to wait first.
        times: how many requests fail; `None` is all.
    """

    method: str
    path: str
    status: int | None = None
    message: str = "as the test has it"
    headers: dict[str, str] = field(default_factory=dict)
    page: bytes | None = None
    drop_after: int | None = None
    lose_answer: bool = False
    delay: float = 0.0
    times: int | None = 1

    def is_of(self, method: str, path: str) -> bool:
        return self.times != 0 and method == self.method and re.search(self.path, path) is not None

    def use(self) -> None:
        if self.times is not None:
            self.times -= 1
