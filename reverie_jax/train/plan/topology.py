"""Machines to plan for: what a chip has, and devices that can be compiled for without being there."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from reverie_jax.errors import UserError
from reverie_jax.models.sharding import MESH_AXES, make_mesh

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, as its maker publishes it.

    Attributes:
        hbm: memory, in bytes. TPU: what the compiler lets a program use, which it names when a program is too large.
        flops: peak dense bfloat16 rate, in FLOP/s.
        bandwidth: of its memory, in bytes/s.
        link: bytes/s into the chip over one link of the interconnect (TPU), or over all of them (GPU, NVLink).
        dimensions: of the torus that the links make; 0 where a switch joins all chips.
    """

    hbm: int
    flops: float
    bandwidth: float
    link: float
    dimensions: int = 0


# TPU: cloud.google.com/tpu/docs (system architecture) and jax-ml.github.io/scaling-book (rates of one link, one way).
# GPU: NVIDIA's data sheets of the SXM parts; memory in units of 10**9 bytes, NVLink one way.
CHIPS: dict[str, Chip] = {
    "v5e": Chip(int(15.75 * GIB), 197e12, 0.819e12, 4.5e10, 2),
    "v5p": Chip(int(95.74 * GIB), 459e12, 2.765e12, 9e10, 3),
    "v6e": Chip(int(31.25 * GIB), 918e12, 1.64e12, 9e10, 2),
    "a100-40": Chip(40 * 10**9, 312e12, 1.555e12, 3e11),
    "a100": Chip(80 * 10**9, 312e12, 2.04e12, 3e11),
    "h100": Chip(80 * 10**9, 989e12, 3.35e12, 4.5e11),
    "h200": Chip(141 * 10**9, 989e12, 4.8e12, 4.5e11),
}


_SPOKEN = {"v4": "v4", "v5 lite": "v5e", "v5litepod": "v5e", "v5": "v5p", "v6 lite": "v6e"}
"""TPUs as `jax.Device.device_kind` calls them, behind "TPU "."""


def chip_of(device_kind: str) -> Chip | None:
    """The chip that a device says that it is; None where it is none of `CHIPS`."""
    kind = device_kind.lower()
    if kind.startswith("tpu "):
        found = _SPOKEN.get(kind.removeprefix("tpu "), kind.removeprefix("tpu "))
        return CHIPS.get(found)
    if "a100" in kind and "40gb" in kind:
        return CHIPS["a100-40"]
    return next((CHIPS[name] for name in ("h200", "h100", "a100") if name in kind), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind and how they are joined: `v5e:2x4`, `h200:8`."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def is_tpu(self) -> bool:
        return self.chip.dimensions > 0

    @property
    def interconnect(self) -> float:
        """Bytes/s into a chip over all its links: an upper bound, that a corner of an unwrapped torus does not reach."""
        if not self.is_tpu:
            return self.chip.link
        return self.chip.link * max(1, sum(min(2, side - 1) for side in self.shape))

    @classmethod
    def parse(cls, text: str) -> Topology:
        """A topology from its name.

        Raises:
            UserError: no such kind of chip, or no shape for it.
        """
        kind, colon, shape = text.partition(":")
        if kind not in CHIPS:
            raise UserError(f"--topology {text}: unknown kind of chip {kind!r}; there is {', '.join(CHIPS)}")
        dimensions = CHIPS[kind].dimensions
        example = {0: f"{kind}:8", 2: f"{kind}:2x4", 3: f"{kind}:2x2x1"}[dimensions]
        if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
            raise UserError(f"--topology {text}: write it as {example}")
        sides = tuple(map(int, shape.split("x")))
        if len(sides) != (dimensions or 1):
            raise UserError(f"--topology {text}: {kind} is {dimensions or 1}-dimensional; write it as {example}")
        return cls(text, kind, sides)


def silence_libtpu() -> None:
    """Lets libtpu compile where no TPU is: no query for one, no lock on one, and no JAX backend but the CPU.

    The lock is for programs that run on the chips: a compiler beside one must neither wait for it nor remove it.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)


def tpu_devices(topology: Topology) -> list[Any]:
    """Devices of a TPU topology, none of which is there.

    Raises:
        UserError: libtpu is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning for a TPU needs its compiler: pip install 'reverie-jax[tpu]' (no TPU is needed); "
            "GPU topologies, as h200:8, are estimated without"
        )
    silence_libtpu()
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        said = str(error).strip().splitlines()
        raise UserError(f"--topology {topology.name}: {said[0] if said else type(error).__name__}") from None
    return list(found.devices)


def plan_mesh(topology: Topology, sizes: dict[str, int], devices: list[Any] | None = None) -> Mesh | AbstractMesh:
    """The mesh of a plan: over devices that can be compiled for, or of sizes alone.

    Args:
        sizes: data, fsdp and tensor, whose product is the number of chips.
    """
    if devices is None:
        shape = tuple(sizes[name] for name in MESH_AXES)
        return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    return make_mesh(**sizes, devices=list(np.asarray(devices, object).flat))
