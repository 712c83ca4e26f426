"""`solver="rational"`: 0 ≤ α ≤ 2 as a few damped Newton steps, by products alone.

    U T(Σ) Vᵀ = G f(GᵀG),        f(GᵀG) ≈ c I + Σ cᵢ (GᵀG + pᵢ I)⁻¹

with poles pᵢ and weights of `_mixture`, as many as the tolerance asks for, and the
inverses of `_inverse`, all poles of all matrices at once. α = 2 is one pole, exactly.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from spectral_optax.solvers import _mixture
from spectral_optax.solvers._inverse import weighted_inverses
from spectral_optax.solvers._problem import Problem, Solution, known

# The turning point σ* that the number of poles for a traced d is made for.
USUAL_TURN = 0.06
# What least squares on interpolated poles reaches.
SMALLEST_TRACED_TOLERANCE = 1e-2


def _static(
  alpha: ArrayLike, damping: ArrayLike, largest: ArrayLike, tolerance: float
) -> tuple[_mixture.Mixture, np.ndarray]:
  alpha, damping, largest = np.broadcast_arrays(
    *(np.atleast_1d(np.asarray(x, np.float64)) for x in (alpha, damping, largest))
  )
  log_turn, reach, delta = _mixture.turning_point(alpha, damping, largest, np)
  return _mixture.fit(alpha, reach, delta, tolerance), log_turn


def static_fit(
  alpha: ArrayLike, damping: ArrayLike, largest: float, tolerance: float
) -> tuple[float, int]:
  """The largest error that T has with as many poles as it takes or there may be; and those."""
  _, _, delta = _mixture.turning_point(
    np.asarray(alpha, np.float64), np.asarray(damping, np.float64), largest, np
  )
  if np.any((np.asarray(alpha) > 0.1) & ~_mixture.turn_is_seen(delta)):
    return np.inf, 0  # λ* is below what GᵀG in float32 can show.
  mixture = _static(alpha, damping, largest, tolerance)[0]
  return float(mixture.error.max()), mixture.poles.shape[1]


def _mixtures(problem: Problem) -> tuple[_mixture.Mixture, np.ndarray | jax.Array]:
  """The mixtures in units of λ*, and log λ*, (batch,)."""
  if known(problem.alpha) and known(problem.damping):
    return _static(problem.alpha, problem.damping, problem.largest, problem.tolerance)
  assert problem.gram is not None
  alpha, damping = (jnp.asarray(x, problem.gram.dtype) for x in (problem.alpha, problem.damping))
  log_turn, reach, delta = _mixture.turning_point(alpha, damping, problem.largest)
  usual = float(np.log(problem.largest.max() / USUAL_TURN**2))
  return _mixture.traced_fit(
    alpha, reach, delta, tolerance=problem.tolerance, usual_reach=usual
  ), log_turn


def solve(problem: Problem) -> Solution:
  """f(GᵀG); see `spectral_optax.solvers` for the signature that all solvers share."""
  gram = problem.gram
  assert gram is not None
  dtype, n = gram.dtype, gram.shape[-1]
  mixture, log_turn = _mixtures(problem)
  to = lambda x: jnp.asarray(x, dtype)
  # In units of `gram`, so that the large matrix stays as it is.
  turn = jnp.exp(to(log_turn)) * problem.unit
  # f in units of λ*^(-α/2).
  scale = jnp.exp(to(-problem.alpha / 2 * log_turn)) * problem.gain
  poles = to(mixture.poles) * turn[:, None]
  weights = scale[:, None] * to(mixture.weights) * poles
  # Rounding moves the eigenvalues of GᵀG by about ε σ_max²: a pole below that would be
  # met by an eigenvalue on its other side.
  size = jnp.sqrt(jnp.sum(jnp.square(gram), axis=(-2, -1)))
  floor = 4 * jnp.finfo(dtype).eps * size + jnp.finfo(dtype).tiny
  shift = jnp.maximum(poles, floor[:, None])
  total = _inverses(gram, weights, shift, problem.half)
  constant = scale * to(mixture.constant)
  unit = jnp.eye(n, dtype=dtype)[None]
  return Solution(total + constant[:, None, None] * unit, to(mixture.error))


def _inverses(
  gram: jax.Array, weights: jax.Array, shift: jax.Array, half: bool = False
) -> jax.Array:
  """Σ weights (A + shift I)⁻¹: (batch, n, n), (batch, poles), (batch, poles) -> (batch, n, n)."""

  def together(gram, weights, shift, precision='highest'):
    unit = jnp.eye(gram.shape[-1], dtype=gram.dtype)[None, None]
    shifted = gram[:, None] + shift[:, :, None, None] * unit
    return weighted_inverses(shifted, weights, shift / 2, precision)

  def one_by_one(*batch):  # What a CPU works on stays in its cache.
    if len(gram) == 1:
      return together(*batch)
    return jax.lax.map(lambda one: together(*(x[None] for x in one))[0], batch)

  # On a TPU "high" is three passes in bfloat16, in place of six, and keeps sixteen bits.
  fewer = {'tpu': functools.partial(together, precision='high')} if half else {}
  return jax.lax.platform_dependent(gram, weights, shift, cpu=one_by_one, **fewer, default=together)
