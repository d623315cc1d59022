"""One kind of progress bar for everything that moves weights: bytes, on stderr."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn


@contextlib.contextmanager
def byte_bar(label: str, total_bytes: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yields the function that moves the bar on by a number of bytes."""
    columns = (label, BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(label, total=total_bytes)
        yield lambda size_bytes: bar.advance(task, size_bytes)
