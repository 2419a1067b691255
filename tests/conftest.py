"""Every test runs with strict dtypes and ranks, warnings as errors, and shapes checked where a signature states them."""

import gc
import os
import tempfile
from pathlib import Path

# Four devices on the CPU: meshes are tested without an accelerator. Each step is awaited: many queued ones deadlock.
# Compiling is most of the suite's time: LLVM does little, and a program is compiled once for all workers and their children.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="reverie-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401

install_import_hook("reverie_jax", "tests.typecheck.check")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40, print_blob=True)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Drop compiled programs long before a process has Linux' maximum of mappings (65,530), at which XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def tiny_config():
    """LLaVA at a size that compiles in a second; key/value heads are fewer than heads, no size divides another by chance."""
    from reverie_jax.models import TextConfig, VisionConfig, VLMConfig

    return VLMConfig(
        vision=VisionConfig(hidden=32, layers=3, heads=2, mlp=48, image_size=24, patch_size=8),
        text=TextConfig(vocab=99, hidden=48, layers=2, heads=4, kv_heads=2, head_dim=12, mlp=64),
        image_token_id=3,
    )


@pytest.fixture
def tiny_model(tiny_config):
    from flax import nnx

    from reverie_jax.models import VisionLanguageModel

    return VisionLanguageModel(tiny_config, rngs=nnx.Rngs(0))
