"""Calls of functions as tasks of a Ray cluster: the engine ``ray`` of packing, evaluation and ablations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

from pbe.errors import UserError

T = TypeVar("T")
STOP_SECONDS = 130.0  # for cancelled tasks to end; a training writes its checkpoint first


class RayCluster:
    """The cluster that ``RAY_ADDRESS`` names, or one of this machine.

    Every node has to see the project, its Python and all files under the same paths: results are files in
    shared folders. What a lost node was at is done again on another one.

    Args:
        cpus: cores that a task takes.
    """

    def __init__(self, cpus: int = 1) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError("--engine ray needs Ray: pip install ray") from error
        self.ray: Any = ray
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        self.cpus = cpus
        self.remote = ray.remote(max_retries=3, num_cpus=cpus)(_call_in)
        self.tasks: list[Any] = []

    def count(self, resource: str) -> int:
        """Return how many ``GPU`` or ``CPU`` all nodes have together."""
        return int(self.ray.cluster_resources().get(resource, 0))

    def submit(self, function: Callable[..., T], *arguments: Any, gpus: int = 0) -> Future[T]:
        """Hand over a call, to be made in a folder of this one's name, with ``gpus`` where there are some."""
        remote = self.remote.options(num_gpus=gpus if self.count("GPU") else 0)
        self.tasks.append(remote.remote(os.getcwd(), function, *arguments))
        future: Future[T] = self.tasks[-1].future()
        return future

    def completed(
        self, function: Callable[..., T], calls: Sequence[Sequence[Any]], *, most: int = 0, gpus: int = 0
    ) -> Iterator[T]:
        """Yield the results of calls as they end, ``most`` at a time (0: as many as there is room for).

        The first failure is raised, and ends the other ones.
        """
        waiting, pending = list(reversed(calls)), set[Future[T]]()
        try:
            while waiting or pending:
                while waiting and len(pending) < (most or len(calls)):
                    pending.add(self.submit(function, *waiting.pop(), gpus=gpus))
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield result_of(future, "a task")
        finally:
            self.stop()

    def stop(self) -> None:
        """End all tasks, and wait for them."""
        for task in self.tasks:
            self.ray.cancel(task)
        if self.tasks:
            self.ray.wait(self.tasks, num_returns=len(self.tasks), timeout=STOP_SECONDS)
        self.tasks.clear()


def result_of(future: Future[T], name: str) -> T:
    """Return what a finished call gave, or raise what it raised, also where that was on another machine."""
    error = future.exception()
    if error is None:
        return future.result()
    cause = getattr(error, "cause", error)  # of the error that Ray makes of a task's
    if isinstance(cause, UserError):
        raise cause
    if type(cause).__module__.startswith("ray."):
        raise UserError(f"{name} was lost: {str(cause).splitlines()[0]}") from error
    raise error


def _call_in(folder: str, function: Callable[..., T], *arguments: Any) -> T:
    os.chdir(folder)
    return function(*arguments)
