"""Printing on a terminal or into a file: names of files are no markup, and tables are whole."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

WIDEST = 10_000  # columns of a table


def plain_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Prints photo[copy].png and a:cat:.png as they are."""
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False)


def print_whole(console: Console, table: Table) -> None:
    """At its natural width, whatever the terminal's is: a number that is cut short is a wrong number."""
    natural = console.measure(table, options=console.options.update(width=WIDEST)).maximum
    console.width = max(console.width, natural)
    console.print(table, highlight=False)
