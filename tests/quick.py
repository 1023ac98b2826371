"""Flags with which XLA compiles quickly, as compiling is most of the time that tests take.

Programs stay the same; their machine code is left unoptimised, which halves the time. XLA of JAX 0.10 also hands each
fused loop to a second compiler, which takes most of the rest; with the one before it a fifth is left in all.
"""

from importlib.metadata import version

FLAGS = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # where there is no such flag any more, XLA refuses to start
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
