"""Machines to plan for: figures of chips, and devices to compile for without them."""

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
from reverie_jax.models.attention import cudnn
from reverie_jax.models.sharding import MESH_AXES, make_mesh
from reverie_jax.train.plan.gpus import gpu_devices

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, with its vendor's figures.

    Attributes:
        hbm: bytes of memory. TPU: what the compiler allows a program, named in its error for a larger one.
        flops: peak dense bfloat16 FLOP/s.
        bandwidth: of the memory, in bytes/s.
        link: bytes/s into the chip over one link of the interconnect (TPU), or over all links (GPU: NVLink or PCIe).
        dimensions: of the torus of links; 0 for a switch that connects all chips.
    """

    hbm: int
    flops: float
    bandwidth: float
    link: float
    dimensions: int = 0


# TPU: cloud.google.com/tpu/docs (system architecture) and jax-ml.github.io/scaling-book (one link, one direction).
# GPU: NVIDIA's data sheets; memory in units of 10**9 bytes, dense bfloat16 with float32 sums, links in one direction.
CHIPS: dict[str, Chip] = {
    "v5e": Chip(int(15.75 * GIB), 197e12, 0.819e12, 4.5e10, 2),
    "v5p": Chip(int(95.74 * GIB), 459e12, 2.765e12, 9e10, 3),
    "v6e": Chip(int(31.25 * GIB), 918e12, 1.64e12, 9e10, 2),
    "a100-40": Chip(40 * 10**9, 312e12, 1.555e12, 3e11),
    "a100": Chip(80 * 10**9, 312e12, 2.04e12, 3e11),
    "h100": Chip(80 * 10**9, 989e12, 3.35e12, 4.5e11),
    "h200": Chip(141 * 10**9, 989e12, 4.8e12, 4.5e11),
    "b200": Chip(180 * 10**9, 2250e12, 8e12, 9e11),
    "l4": Chip(24 * 10**9, 121e12, 0.3e12, 3.2e10),
    "l40s": Chip(48 * 10**9, 362e12, 0.864e12, 3.2e10),
    "rtx4090": Chip(24 * 10**9, 165.2e12, 1.008e12, 3.2e10),
    "rtx5090": Chip(32 * 10**9, 209.5e12, 1.792e12, 6.4e10),
}


_TPU_KINDS = {"v4": "v4", "v5 lite": "v5e", "v5litepod": "v5e", "v5": "v5p", "v6 lite": "v6e"}
"""Keys of `CHIPS` by `jax.Device.device_kind` without "TPU "."""
_CARDS = ("l40s", "l4", "rtx4090", "rtx5090")
"""In this order: "l4" is in "l40s"."""


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip of `jax.Device.device_kind`; None for an unknown one."""
    kind = device_kind.lower()
    if kind.startswith("tpu "):
        name = kind.removeprefix("tpu ")
        return CHIPS.get(_TPU_KINDS.get(name, name))
    if "a100" in kind and "40gb" in kind:
        return CHIPS["a100-40"]
    plain = kind.replace(" ", "")
    return next((CHIPS[name] for name in ("h200", "h100", "a100", "b200", *_CARDS) if name in plain), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind and their arrangement: `v5e:2x4`, `h200:8`."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """Figures of one chip."""
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def is_tpu(self) -> bool:
        """Whether the chips are TPUs."""
        return self.chip.dimensions > 0

    @property
    def interconnect(self) -> float:
        """Bytes/s into a chip over all its links; an upper bound, which a corner of an unwrapped torus does not reach."""
        if not self.is_tpu:
            return self.chip.link
        return self.chip.link * max(1, sum(min(2, side - 1) for side in self.shape))

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Parse a topology's name.

        Raises:
            UserError: the chip is unknown, or the shape is invalid for it.
        """
        kind, colon, shape = text.partition(":")
        if kind not in CHIPS:
            raise UserError(f"--topology {text}: unknown chip {kind!r}; choose from {', '.join(CHIPS)}")
        dimensions = CHIPS[kind].dimensions
        example = {0: f"{kind}:8", 2: f"{kind}:2x4", 3: f"{kind}:2x2x1"}[dimensions]
        if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
            raise UserError(f"--topology {text}: write it as {example}")
        sides = tuple(map(int, shape.split("x")))
        if len(sides) != (dimensions or 1):
            raise UserError(f"--topology {text}: {kind} is {dimensions or 1}-dimensional; write it as {example}")
        return cls(text, kind, sides)


def silence_libtpu() -> None:
    """Configure libtpu to compile without a TPU: no metadata query, no lock file, and only JAX's CPU backend.

    The lock is for programs that run on the chips: a compiler must neither wait for it nor remove it.
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


def can_compile(topology: Topology) -> bool:
    """Return whether a plan for these chips is compiled: always for TPUs, for GPUs if their compiler is installed."""
    return topology.is_tpu or cudnn.is_installed()


def compile_devices(topology: Topology) -> list[Any]:
    """Return abstract devices of a topology, for compiling only.

    Raises:
        UserError: the compiler is not installed, or does not know the topology.
    """
    if not topology.is_tpu:
        return gpu_devices(topology.kind, topology.chips, topology.chip.hbm, topology.chip.bandwidth)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning for a TPU needs the TPU compiler: pip install -e '.[tpu]' in the checkout (no TPU is needed); "
            "GPU topologies such as h200:8 are estimated without it"
        )
    silence_libtpu()
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        lines = str(error).strip().splitlines()
        raise UserError(f"--topology {topology.name}: {lines[0] if lines else type(error).__name__}") from None
    return list(description.devices)


def plan_mesh(topology: Topology, sizes: dict[str, int], devices: list[Any] | None = None) -> Mesh | AbstractMesh:
    """Return the mesh of a plan: over devices to compile for, or an abstract one.

    Args:
        topology: chips.
        sizes: chips by axis (data, fsdp, tensor); their product is the number of chips.
        devices: of `compile_devices`; None for an abstract mesh.
    """
    if devices is None:
        shape = tuple(sizes[name] for name in MESH_AXES)
        return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    return make_mesh(**sizes, devices=list(np.asarray(devices, object).flat))
