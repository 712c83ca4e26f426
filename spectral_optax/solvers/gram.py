"""`solver="gram"`: any α ≥ 0 from the eigenvectors of the small-side Gram matrix.

T(σ) = σ f(σ), f(σ) = 1 / (σ^α + d), so with GᵀG = V Σ² Vᵀ

    U T(Σ) Vᵀ = (G V) diag(f(σ)) Vᵀ

and the left singular vectors are never needed. σ_k is taken as ‖G v_k‖, which
keeps the digits that the square root of a small eigenvalue has lost.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from spectral_optax.solvers._derivative import function_tangent
from spectral_optax.solvers._lapack import one_at_a_time
from spectral_optax.transfer import transfer_ratio

_eigenvectors = one_at_a_time(lambda gram: jnp.linalg.eigh(gram, symmetrize_input=False)[1])


@jax.custom_jvp
def _apply(
    matrix: jax.Array, gram: jax.Array, alpha: jax.Array, damping: jax.Array
) -> jax.Array:
  v = _eigenvectors(gram)
  gv = jnp.matmul(matrix, v, precision='highest')
  sigma = jnp.linalg.norm(gv, axis=-2)
  gv *= transfer_ratio(sigma, alpha[:, None], damping[:, None])[:, None, :]
  return jnp.matmul(gv, v.swapaxes(-1, -2), precision='highest')


@_apply.defjvp
def _apply_jvp(primals, tangents):
  # The Gram matrix is a function of the matrix: its own tangent says nothing new.
  matrix, gram, alpha, damping = primals
  tangents = (tangents[0], *tangents[2:])
  return _apply(*primals), function_tangent(matrix, _eigenvectors(gram), alpha, damping, tangents)


def solve(
    matrix: jax.Array, gram: jax.Array, alpha: ArrayLike, damping: ArrayLike
) -> jax.Array:
  """See `spectral_optax.solvers` for the signature that all solvers share."""
  batch = matrix.shape[:1]
  alpha, damping = (
      jnp.broadcast_to(jnp.asarray(x, matrix.dtype), batch) for x in (alpha, damping)
  )
  return _apply(matrix, gram, alpha, damping)
