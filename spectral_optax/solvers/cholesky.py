"""`solver="cholesky"`: α = 2 exactly, without a decomposition of any kind.

At α = 2 the map is rational in the Gram matrix, a damped Newton (ridge) step:

    U diag(σ / (σ² + d)) Vᵀ = G (GᵀG + d I)⁻¹

one Cholesky factorisation of the small side and two triangular solves.
"""

import jax
import jax.numpy as jnp

from spectral_optax.solvers._lapack import one_at_a_time
from spectral_optax.solvers._perturbation import product
from spectral_optax.solvers._problem import Problem, Solution


def _solve_right(matrix: jax.Array, shifted_gram: jax.Array) -> jax.Array:
  """X with X A = G, from A = L Lᵀ."""
  factor = jax.lax.linalg.cholesky(shifted_gram, symmetrize_input=False)

  def divide(b, transpose_a):
    return jax.lax.linalg.triangular_solve(
      factor, b, left_side=False, lower=True, transpose_a=transpose_a
    )

  return divide(divide(matrix, True), False)


_solve_right_batched = one_at_a_time(_solve_right)


def solve(problem: Problem) -> Solution:
  """See `spectral_optax.solvers` for the signature that all solvers share."""
  matrix, gram = problem.matrix, problem.gram
  assert matrix is not None
  assert gram is not None
  # Rounding moves the eigenvalues of GᵀG by about ε σ_max²; a shift below that is
  # no damping but a breakdown of the factorisation.
  trace = jnp.trace(gram, axis1=-2, axis2=-1)
  floor = 2 * jnp.finfo(gram.dtype).eps * trace + jnp.finfo(gram.dtype).tiny
  shift = jnp.maximum(jnp.asarray(problem.damping, gram.dtype), floor)
  shifted = gram + shift[:, None, None] * jnp.eye(gram.shape[-1], dtype=gram.dtype)[None]
  # A linear solve by name, so that its derivative is one more solve.
  return Solution(
    jax.lax.custom_linear_solve(
      lambda x: product(x, shifted),
      matrix,
      lambda _, b: _solve_right_batched(b, shifted),
      symmetric=True,
    )
  )
