"""`solver="svd"`: the definition, U T(Σ) Vᵀ. The reference: accurate, and slow."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from spectral_optax.solvers._lapack import one_at_a_time
from spectral_optax.solvers._perturbation import function_tangent, product
from spectral_optax.transfer import transfer

_svd = one_at_a_time(lambda matrix: jnp.linalg.svd(matrix, full_matrices=False))


@jax.custom_jvp
def _apply(matrix: jax.Array, alpha: jax.Array, damping: jax.Array) -> jax.Array:
  u, sigma, vt = _svd(matrix)
  t = transfer(sigma, alpha[:, None], damping[:, None])
  return product(u * t[:, None, :], vt)


@_apply.defjvp
def _apply_jvp(primals, tangents):
  matrix, alpha, damping = primals
  v = _svd(matrix)[2].swapaxes(-1, -2)
  return _apply(*primals), function_tangent(matrix, v, alpha, damping, tangents)


def solve(matrix: jax.Array, gram: jax.Array, alpha: ArrayLike, damping: ArrayLike) -> jax.Array:
  """See `spectral_optax.solvers` for the signature that all solvers share."""
  del gram  # Squaring would lose the small singular values.
  batch = matrix.shape[:1]
  alpha, damping = (jnp.broadcast_to(jnp.asarray(x, matrix.dtype), batch) for x in (alpha, damping))
  return _apply(matrix, alpha, damping)
