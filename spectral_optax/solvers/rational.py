"""`solver="rational"`: 0 ≤ α ≤ 2 as a few damped Newton steps, by products alone.

    U T(Σ) Vᵀ ≈ G (c I + Σ cᵢ (GᵀG + pᵢ I)⁻¹)

with poles pᵢ and weights of `_mixture`, as many as the tolerance asks for, and the
inverses of `_inverse`, all poles of all matrices at once. α = 2 is one pole, exactly.
"""

import jax
import jax.numpy as jnp
import numpy as np

from spectral_optax.solvers import _mixture
from spectral_optax.solvers._inverse import weighted_inverses
from spectral_optax.solvers._perturbation import product
from spectral_optax.solvers._problem import Problem, Solution, known

# σ² from here up counts as usual when the number of poles for a traced d is chosen.
USUAL_TURN = 0.06**2


def _mixtures(problem: Problem) -> tuple[_mixture.Mixture, np.ndarray | jax.Array]:
  """The mixtures in units of λ*, and log λ*, (batch,)."""
  if known(problem.alpha) and known(problem.damping):
    alpha, damping = (np.asarray(x, np.float64) for x in (problem.alpha, problem.damping))
    log_turn, reach, delta = _mixture.turning_point(alpha, damping, problem.largest, np)
    return _mixture.fit(alpha, reach, delta, problem.tolerance), log_turn
  alpha, damping = (jnp.asarray(x, problem.matrix.dtype) for x in (problem.alpha, problem.damping))
  log_turn, reach, delta = _mixture.turning_point(alpha, damping, problem.largest)
  usual = float(np.log(problem.largest / USUAL_TURN))
  return _mixture.traced_fit(
    alpha, reach, delta, tolerance=problem.tolerance, usual_reach=usual
  ), log_turn


def function_of_gram(problem: Problem, precision: str = 'highest') -> tuple[jax.Array, jax.Array]:
  """f(GᵀG) with G f(GᵀG) = U T(Σ) Vᵀ, (batch, n, n), and the error of T, (batch,)."""
  gram = problem.gram
  assert gram is not None
  dtype, n = gram.dtype, gram.shape[-1]
  mixture, log_turn = _mixtures(problem)
  to = lambda x: jnp.asarray(x, dtype)
  turn = jnp.exp(to(log_turn))[:, None]
  scale = jnp.exp(to(-problem.alpha / 2 * log_turn))[:, None]  # f in units of λ*^(-α/2).
  poles = to(mixture.poles) * turn
  weights = scale * to(mixture.weights) * poles
  # Rounding moves the eigenvalues of GᵀG by about ε σ_max²: a pole below that would be
  # met by an eigenvalue on its other side.
  size = jnp.sqrt(jnp.sum(jnp.square(gram), axis=(-2, -1)))
  floor = 4 * jnp.finfo(dtype).eps * size + jnp.finfo(dtype).tiny
  shift = jnp.maximum(poles, floor[:, None])
  unit = jnp.eye(n, dtype=dtype)[None, None]
  shifted = gram[:, None] + shift[:, :, None, None] * unit
  total = weighted_inverses(shifted, weights, shift / 2, precision)
  constant = scale[:, 0] * to(mixture.constant)
  return total + constant[:, None, None] * unit[0], to(mixture.error)


def solve(problem: Problem) -> Solution:
  """See `spectral_optax.solvers` for the signature that all solvers share."""
  f, error = function_of_gram(problem)
  return Solution(product(problem.matrix, f), error)
