"""What Flax has under different names in the versions that we support."""

from flax import nnx

# 0.12.6, the newest that runs with JAX 0.9, has it under its older name.
as_pure = getattr(nnx, 'as_pure', None) or nnx.pure
