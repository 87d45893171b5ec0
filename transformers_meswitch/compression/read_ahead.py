"""Reading the next module while the one before is worked on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

from .sources import Parameters

__all__ = ["ReadAhead"]


class ReadAhead:
    """Parameters of which a thread reads the module that was announced; see :class:`~.sources.Parameters`.

    Two modules are in memory at most, the one that was asked for last and the one announced. A context, which ends the
    thread.

    Args:
        parameters: what to read.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._announced: tuple[str, Future[dict[str, Tensor]]] | None = None
        self.tied = parameters.tied
        self.modules = parameters.modules

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.shutdown(cancel_futures=True)

    def shapes(self, module: str) -> dict[str, tuple[int, ...]]:
        """See :meth:`~.sources.Parameters.shapes`."""
        return self._parameters.shapes(module)

    def of(self, module: str) -> dict[str, Tensor]:
        """See :meth:`~.sources.Parameters.of`; a failure to read ahead is raised here."""
        announced, self._announced = self._announced, None
        if announced is not None and announced[0] == module:
            return announced[1].result()
        return self._parameters.of(module)

    def announce(self, module: str) -> None:
        """Begin to read a module; one announced before and not asked for is let go."""
        self._announced = module, self._reader.submit(self._parameters.of, module)
