"""Tables of the command line."""

import sys
from collections.abc import Collection, Sequence

import typer
from rich.console import Console
from rich.table import Table


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()) -> None:
    """A table as wide as the terminal allows; in a pipe one line a row, with tabs between the columns.

    Args:
        right: columns of numbers.
    """
    if not sys.stdout.isatty():
        for row in [header, *rows]:
            typer.echo("\t".join(row))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in header:
        table.add_column(
            column, justify="right" if column in right else "left", no_wrap=column == "name", overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)
