"""What every test runs under: eight CPU devices, strict rank promotion, annotations checked while they run."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # both are read once, when jax is imported
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jaxtyping

# Shapes and dtypes in annotations become assertions. Not in the pytrees: a transformation may fill one with anything.
PYTREES = {"types", "metrics"}
ROOMS = pathlib.Path(__file__).parents[1].joinpath("pjpo").iterdir()
jaxtyping.install_import_hook([f"pjpo.{room.stem}" for room in ROOMS if room.stem not in PYTREES], "beartype.beartype")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")  # [B] + [B, N] is a mistake until someone writes the axis

import hypothesis

hypothesis.settings.register_profile("pjpo", deadline=None, derandomize=True)  # the first example compiles
hypothesis.settings.load_profile("pjpo")
