"""Fan-out over the standard library's executors: in process, a process pool, or a Dask cluster's."""

__all__ = ["one_thread", "open_pool", "seeds_for", "spread"]

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

import numpy as np

from theodolite.core.errors import InputError

T = TypeVar("T")


def spread(
    function: Callable[..., T],
    tasks: Iterable[tuple[Any, ...]],
    *,
    executor: Executor | int | None = None,
    on_result: Callable[[int, int], None] | None = None,
) -> list[T]:
    """``[function(*task) for task in tasks]``, spread over ``executor``; results in the order of the tasks.

    executor: None runs here; an int makes a pool of that many processes for this call; anything with ``submit`` (a
    ``ProcessPoolExecutor``, a Dask ``client.get_executor()``) is used as it is and left open. The first failing task
    raises and the tasks not yet started are cancelled. on_result(done, of) is called after each result (progress).

    >>> spread(pow, [(2, 3), (3, 2)])
    [8, 9]
    """
    work, found = list(tasks), list[T]()
    with open_pool(executor) as pool:
        for result in (function(*task) for task in work) if pool is None else _gather(function, work, pool):
            found.append(result)
            if on_result is not None:
                on_result(len(found), len(work))
    return found


@contextmanager
def open_pool(executor: Executor | int | None) -> Iterator[Executor | None]:
    """The executor itself, or for an int a pool of that many processes that lasts as long as the block."""
    if not isinstance(executor, int):
        yield executor
        return
    if executor < 1:
        raise InputError(f"the number of workers must be at least 1, got {executor}")
    # spawn: a forked child inherits torch's thread pools in a state it cannot use
    with ProcessPoolExecutor(executor, mp_context=get_context("spawn")) as pool:
        yield pool


def _gather(function: Callable[..., T], work: list[tuple[Any, ...]], pool: Executor) -> Iterator[T]:
    futures: list[Future[T]] = [pool.submit(function, *task) for task in work]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


@contextmanager
def one_thread(small: bool = True) -> Iterator[None]:
    """Run torch on one thread inside the block where the work is ``small``; what is gained is lost in hand-overs otherwise.

    The numbers then do not depend on the number of cores either.
    """
    import torch  # 180 MB and seconds that workers without it should not pay

    before = torch.get_num_threads()
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seeds_for(seed: int, n: int) -> list[int]:
    """``n`` independent seeds from one, the same however the work is spread."""
    return [int(child.generate_state(1)[0]) for child in np.random.SeedSequence(seed).spawn(n)]
