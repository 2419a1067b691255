"""Several processes as one run."""

from __future__ import annotations

import re

import jax

from reverie_jax.errors import UserError


def join(text: str) -> None:
    """Joins the other processes of a run; does nothing for "". Call it before jax does anything.

    Args:
        text: "auto" reads the scheduler's word (SLURM, Open MPI, Kubernetes, TPU metadata); "address:port,processes,number"
            says it.

    Raises:
        UserError: it is neither, or the others cannot be reached.
    """
    if not text:
        return
    match = re.fullmatch(r"(\S+:\d+),(\d+),(\d+)", text)
    if text != "auto" and match is None:
        raise UserError(f"--distributed {text}: must be auto, or address:port,processes,number")
    if match is not None and not int(match[3]) < int(match[2]):
        raise UserError(f"--distributed {text}: processes are numbered from 0 to {int(match[2]) - 1}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # without effect where there are accelerators
    try:
        if match is None:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(match[1], int(match[2]), int(match[3]))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--distributed {text}: {' '.join(str(error).split())}") from None
