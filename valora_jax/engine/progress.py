"""The bar that shows how far a call of the engine is."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def generating(total: int, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar on stderr; yields what sets it to (answered prompts, tokens so far)."""
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tokens_column = TextColumn("{task.fields[tokens]} tokens")
    console = Console(stderr=True)
    with Progress(*columns, tokens_column, console=console, disable=not shown) as bar:
        task = bar.add_task("generating", total=total, tokens=0)
        yield lambda finished, tokens: bar.update(task, completed=finished, tokens=tokens)
