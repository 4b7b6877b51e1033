"""As much of Ray as the project uses, in this process: a task is done when it is handed over."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from types import ModuleType
from typing import Any

from pbe.errors import UserError


class Task:
    """A call that was handed over."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    def future(self) -> Future[Any]:
        made: Future[Any] = Future()
        try:
            made.set_result(self.call())
        except UserError as error:
            made.set_exception(type("RayTaskError", (Exception,), {"cause": error})("a long traceback"))
        return made


class StandIn(ModuleType):
    """Stands in ``sys.modules`` for Ray.

    Attributes:
        started: options of ``ray.init``; None before it.
        asked: the resources and retries that tasks were to have, in order.
        handed: number of tasks so far; ``when_handed`` is called with it for each.
        cancelled: number of cancelled tasks.
    """

    def __init__(self, **resources: float) -> None:
        super().__init__("ray")
        self.resources = resources
        self.started: dict[str, Any] | None = None
        self.asked: list[dict[str, Any]] = []
        self.handed, self.cancelled = 0, 0
        self.when_handed: Callable[[int], None] = lambda number: None

    def is_initialized(self) -> bool:
        return self.started is not None

    def init(self, **options: Any) -> None:
        self.started = options

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, **options: int) -> Callable[[Callable[..., Any]], Any]:
        self.asked.append(options)
        return self._of

    def _of(self, function: Callable[..., Any]) -> Any:
        outer = self

        class Remote:
            def options(self, **options: int) -> Remote:
                outer.asked.append(options)
                return self

            def remote(self, *arguments: Any) -> Task:
                outer.handed += 1
                outer.when_handed(outer.handed)
                return Task(lambda: function(*arguments))

        return Remote()

    def cancel(self, task: Task) -> None:
        self.cancelled += 1

    def wait(self, tasks: list[Task], num_returns: int, timeout: float) -> None:
        assert num_returns == len(tasks)
