"""`solver="svd"`: the definition, U T(Σ) Vᵀ. The reference: accurate, and slow."""

import jax
import jax.numpy as jnp

from spectral_optax.solvers._lapack import one_at_a_time
from spectral_optax.solvers._perturbation import function_tangent, product
from spectral_optax.solvers._problem import Problem, Solution
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


def solve(problem: Problem) -> Solution:
  """See `spectral_optax.solvers` for the signature that all solvers share."""
  matrix = problem.matrix
  assert matrix is not None
  alpha, damping = (jnp.asarray(x, matrix.dtype) for x in (problem.alpha, problem.damping))
  return Solution(_apply(matrix, alpha, damping))
