"""`solver="gram"`: any α ≥ 0 from the eigenvectors of the small-side Gram matrix.

T(σ) = σ f(σ²), f(λ) = 1 / (λ^(α/2) + d), so with GᵀG = V Σ² Vᵀ

    U T(Σ) Vᵀ = G f(GᵀG) = (G V) f(Σ²) Vᵀ

and the left singular vectors are never needed.
"""

import jax
import jax.numpy as jnp

from spectral_optax.solvers._lapack import one_at_a_time
from spectral_optax.solvers._perturbation import (
  divided_differences,
  function_tangent,
  product,
  transpose,
)
from spectral_optax.solvers._problem import Problem, Solution
from spectral_optax.transfer import transfer_ratio

_eigenvectors = one_at_a_time(lambda gram: jnp.linalg.eigh(gram, symmetrize_input=False)[1])


@jax.custom_jvp
def _apply(matrix: jax.Array, gram: jax.Array, alpha: jax.Array, damping: jax.Array) -> jax.Array:
  alpha, damping = alpha[:, None], damping[:, None]
  v = _eigenvectors(gram)
  gv = product(matrix, v)
  # (G V)ᵀ(G V) would be Σ². Its diagonal keeps the digits of σ_k that a small
  # eigenvalue has lost; what is off the diagonal is how far rounding has turned V,
  # further than the rounding of GᵀG itself would, and is put right to first order.
  squares = product(transpose(gv), gv)
  x = jnp.diagonal(squares, axis1=-2, axis2=-1)
  f = transfer_ratio(jnp.sqrt(x), alpha, damping)
  diagonal = jnp.eye(gram.shape[-1], dtype=bool)[None]
  f = jnp.where(diagonal, f[:, None, :], divided_differences(x, alpha, damping) * squares)
  return product(gv, product(f, transpose(v)))


@_apply.defjvp
def _apply_jvp(primals, tangents):
  # The Gram matrix is a function of the matrix: its own tangent says nothing new.
  matrix, gram, alpha, damping = primals
  tangents = (tangents[0], *tangents[2:])
  return _apply(*primals), function_tangent(matrix, _eigenvectors(gram), alpha, damping, tangents)


def solve(problem: Problem) -> Solution:
  """See `spectral_optax.solvers` for the signature that all solvers share."""
  matrix, gram = problem.matrix, problem.gram
  assert matrix is not None
  assert gram is not None
  alpha, damping = (jnp.asarray(x, matrix.dtype) for x in (problem.alpha, problem.damping))
  return Solution(_apply(matrix, gram, alpha, damping))
