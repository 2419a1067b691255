"""Multi-process runs: joining the processes of a cluster."""

from __future__ import annotations

import re

import jax

from reverie_jax.errors import UserError


def join(text: str) -> None:
    """Join the other processes of a run. Call it before any other JAX function; "" does nothing.

    Args:
        text: "auto" detects the cluster (SLURM, Open MPI, Kubernetes, TPU metadata); "address:port,processes,index" names
            the coordinator, the number of processes and the index of this one.

    Raises:
        UserError: the text has neither form, or the coordinator cannot be reached.
    """
    if not text:
        return
    match = re.fullmatch(r"(\S+:\d+),(\d+),(\d+)", text)
    if text != "auto" and match is None:
        raise UserError(f"--distributed {text}: must be auto, or address:port,processes,index")
    if match is not None and not int(match[3]) < int(match[2]):
        raise UserError(f"--distributed {text}: the index must be between 0 and {int(match[2]) - 1}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # no effect on accelerators
    try:
        if match is None:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(match[1], int(match[2]), int(match[3]))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--distributed {text}: {' '.join(str(error).split())}") from None
