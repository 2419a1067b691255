"""NVIDIA GPUs to compile for without a GPU: what XLA asks a driver about a chip, as text."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax

from reverie_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's GPU compiler wants to know of a chip (NVIDIA's data sheets and CUDA's table of compute capabilities).

    Attributes:
        name: of the device.
        capability: compute capability.
        cores: streaming multiprocessors.
        fpus: float32 units of a core.
        threads: of a core.
        shared: bytes of shared memory of a core; a block may take 1 KiB less.
        l2: bytes of the L2 cache.
        clock: in GHz.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    fpus: int
    threads: int
    shared: int
    l2: int
    clock: float

    def target_config(self, memory: int, bandwidth: float) -> str:
        """Return XLA's `GpuTargetConfigProto` as text.

        Args:
            memory: bytes of the chip's memory.
            bandwidth: of the memory, in bytes/s.
        """
        major, minor = self.capability
        return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {self.cores} fpus_per_core: {self.fpus} clock_rate_ghz: {self.clock}
          threads_per_block_limit: 1024 threads_per_core_limit: {self.threads} threads_per_warp: 32
          shared_memory_per_block: 49152 shared_memory_per_core: {self.shared}
          shared_memory_per_block_optin: {self.shared - 1024}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          memory_bandwidth: {int(bandwidth)} l2_cache_size: {self.l2} device_memory_size: {memory}
          runtime_version: "12.8.0" driver_version: "13.0.0" compile_time_toolkit_version: "12.8.0"
          dnn_version: "9.10.0"
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        device_description_str: "{self.name}"
        """


_KIB, _MIB = 2**10, 2**20
_A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 164 * _KIB, 40 * _MIB, 1.41)
_H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 228 * _KIB, 50 * _MIB, 1.98)

GPUS: dict[str, Gpu] = {
    "a100-40": dataclasses.replace(_A100, name="NVIDIA A100-SXM4-40GB"),
    "a100": _A100,
    "h100": _H100,
    "h200": dataclasses.replace(_H100, name="NVIDIA H200"),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 128, 2048, 228 * _KIB, 126 * _MIB, 1.965),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 128, 1536, 100 * _KIB, 48 * _MIB, 2.04),
    "l40s": Gpu("NVIDIA L40S", (8, 9), 142, 128, 1536, 100 * _KIB, 96 * _MIB, 2.52),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 128, 1536, 100 * _KIB, 72 * _MIB, 2.52),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090", (12, 0), 170, 128, 1536, 100 * _KIB, 96 * _MIB, 2.41),
}


def gpu_devices(kind: str, count: int, memory: int, bandwidth: float) -> list[Any]:
    """Return abstract devices of one host, for compiling only.

    Args:
        kind: key of `GPUS`.
        count: devices.
        memory: bytes of a device's memory.
        bandwidth: of its memory, in bytes/s.

    Raises:
        UserError: the compiler does not know the chip.
    """
    # The plugin would compare its version with the driver's.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    jax.devices("cpu")  # registers the plugins; CUDA is not initialized
    from jax.experimental import topologies

    config = GPUS[kind].target_config(memory, bandwidth)
    try:
        description = topologies.get_topology_desc("", platform="cuda", topology=f"1x1x{count}", target_config=config)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        lines = str(error).strip().splitlines()
        raise UserError(f"--topology {kind}:{count}: {lines[0] if lines else type(error).__name__}") from None
    return list(description.devices)
