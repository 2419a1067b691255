"""A table of the programs that `make test-compile` compiled."""

from __future__ import annotations

import jax
import pytest
from rich.console import Console
from rich.table import Table

ROWS: list[tuple[str, ...]] = []


@pytest.fixture(autouse=True)
def _promotion_of_third_parties():
    """Allow what tokamax does in its kernels; the rest of the suite is strict."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def report():
    """Add a program to the table: its name, bytes, seconds to compile, and a remark."""

    def add(name: str, chip: str, bytes: int, seconds: float, remark: str = "") -> None:
        ROWS.append((name, chip, f"{bytes / 2**20:,.1f}", f"{seconds:.1f}", remark))

    return add


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary():
    if ROWS:
        table = Table("program", "chip", "MiB", "compiled in s", "remark")
        for row in ROWS:
            table.add_row(*row)
        Console(width=140).print(table)
