"""What fits to f(λ) = 1/(λ^(α/2) + d), λ = σ², have in common: an interval, and least squares.

In units of the turning point λ* = d^(2/α), x = λ/λ*,

    f = λ*^(-α/2) / (x^(α/2) + δ),        x in [0, e^R],    δ = 1

(δ is another number only where λ* is held inside of what float32 can tell apart). A family
of functions (`_mixture`, `_logistic`) is fitted to that in NumPy where α and d are known
while tracing, and in JAX, with a number of terms that is not traced, where they are not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from spectral_optax.solvers._problem import Problem, known

# The turning point σ* that the number of terms for a traced d is made for.
USUAL_TURN = 0.04
# What least squares in float32 reach.
SMALLEST_TRACED_TOLERANCE = 1e-2

# GᵀG in float32 tells eigenvalues apart down to e^-16 of the largest.
MAX_REACH = 16.0
MIN_REACH = 1.0


def turning_point(alpha: Any, damping: Any, largest: Any, xp: Any = jnp) -> tuple[Any, Any, Any]:
  """(log λ*, R, δ) of a map on λ in [0, largest]; `xp` is `numpy` or `jax.numpy`."""
  alpha, damping = xp.asarray(alpha), xp.asarray(damping)
  log_largest = xp.log(xp.asarray(largest, alpha.dtype))
  with np.errstate(divide='ignore'):
    log_damping = xp.maximum(xp.log(damping), -1e4)
  turn = 2 / xp.maximum(alpha, 1e-3) * log_damping
  held = xp.clip(turn, log_largest - MAX_REACH, log_largest - MIN_REACH)
  return held, log_largest - held, xp.exp(log_damping - alpha / 2 * held)


def turn_is_seen(delta: Any) -> Any:
  """Whether λ* is not held from below; as wide of 1 as rounding in float32 takes δ."""
  return delta > 0.99


def points(alpha: Any, reach: Any, delta: Any, num: int, xp: Any = np) -> Any:
  """Values of x up to e^R, (batch, num): 0, and logarithmic from where f begins to fall.

  Where λ* is held from below (δ < 1), f falls before that, in what float32 cannot see:
  points begin at λ*, and what is below gets the fit's own flat end.
  """
  seen = turn_is_seen(delta)
  # x^(α/2) = e^-7: from there down f is flat to a thousandth.
  low = xp.where(seen, -14 / xp.maximum(alpha, 0.25), 0.0)
  steps = xp.linspace(0, 1, num - 1, dtype=alpha.dtype)[None]
  x = xp.exp(low[:, None] + (reach - low)[:, None] * steps)
  return xp.concatenate([xp.where(seen, 0.0, 1.0)[:, None].astype(x.dtype), x], axis=1)


def denominator(x: Any, alpha: Any, delta: Any) -> Any:
  """x^(α/2) + δ, (batch, num), in JAX."""
  # At x = 0 a power has no derivative by α, and needs none.
  power = jnp.where(
    x > 0, jnp.where(x > 0, x, 1) ** (alpha[:, None] / 2), jnp.where(alpha > 0, 0.0, 1.0)[:, None]
  )
  return power + delta[:, None]


def least_squares_of_one(columns: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Weights with columns @ weights ≈ 1, and the largest error: (batch, num, count).

  By modified Gram-Schmidt with the right side as one more column, which is backward stable:
  weights cancel where f is smallest, and normal equations would lose all digits there. In
  loops of products, without a decomposition of any kind.
  """
  dtype, count = columns.dtype, columns.shape[-1]
  scale = jnp.max(jnp.abs(columns), axis=1, keepdims=True)
  given = columns / scale
  index = jnp.arange(count + 1)
  last = jnp.ones_like(given[:, :, :1])

  def orthogonalize(left, k):
    q = jnp.take(left, k, axis=2)
    norm = jnp.sqrt(jnp.sum(jnp.square(q), axis=1))
    # What the columns before it have made up already is noise, and gets no weight.
    q = jnp.where(norm > 10 * jnp.finfo(dtype).eps, 1 / norm, 0)[:, None] * q
    row = jnp.where(index[None] > k, jnp.sum(q[:, :, None] * left, axis=1), 0)
    return left - q[:, :, None] * row[:, None], (row, norm)

  start = jnp.concatenate([given, last], axis=-1)
  _, (rows, norms) = jax.lax.scan(orthogonalize, start, index[:-1])

  def substitute(solution, row_norm_k):
    row, norm, k = row_norm_k
    rest = row[:, -1] - jnp.sum(row[:, :-1] * solution, axis=1)
    return jnp.where(index[None, :-1] == k, (rest / norm)[:, None], solution), None

  solution, _ = jax.lax.scan(
    substitute, jnp.zeros_like(given[:, 0]), (rows, norms, index[:-1]), reverse=True
  )
  made = jnp.einsum('bij,bj->bi', given, solution, precision='highest')
  return solution / scale[:, 0], jnp.max(jnp.abs(made - 1), axis=1)


class Family(NamedTuple):
  """Functions that f is approximated by; what is fitted has an `error`, (batch,).

  Attributes:
    fit: (alpha, reach, delta, tolerance), NumPy arrays (batch,), to what is fitted.
    traced_fit: (alpha, reach, delta, *, tolerance, usual_reach), the same in JAX.
    usual_terms: (reach, tolerance) to how many terms `traced_fit` takes.
    terms: From what is fitted to how many terms it has.
  """

  fit: Callable[..., Any]
  traced_fit: Callable[..., Any]
  usual_terms: Callable[[float, float], int]
  terms: Callable[[Any], int]


def _usual_reach(largest: ArrayLike) -> float:
  return float(np.log(np.max(largest) / USUAL_TURN**2))


def _static(
  family: Family, alpha: ArrayLike, damping: ArrayLike, largest: ArrayLike, tolerance: float
) -> tuple[Any, np.ndarray]:
  alpha, damping, largest = np.broadcast_arrays(
    *(np.atleast_1d(np.asarray(x, np.float64)) for x in (alpha, damping, largest))
  )
  log_turn, reach, delta = turning_point(alpha, damping, largest, np)
  return family.fit(alpha, reach, delta, tolerance), log_turn


def terms(
  family: Family, alpha: ArrayLike, damping: ArrayLike, largest: float, tolerance: float
) -> tuple[float, int]:
  """The largest error that T has with as many terms as it takes or there may be; and those.

  For α or d that are traced, what can be expected of usual ones.
  """
  if not (known(alpha) and known(damping)):
    if tolerance < SMALLEST_TRACED_TOLERANCE:
      return np.inf, 0
    return tolerance, family.usual_terms(_usual_reach(largest), tolerance)
  _, _, delta = turning_point(
    np.asarray(alpha, np.float64), np.asarray(damping, np.float64), largest, np
  )
  if np.any((np.asarray(alpha) > 0.1) & ~turn_is_seen(delta)):
    return np.inf, 0  # λ* is below what GᵀG in float32 can show.
  fitted, _ = _static(family, alpha, damping, largest, tolerance)
  return float(fitted.error.max()), family.terms(fitted)


def approximate(family: Family, problem: Problem) -> tuple[Any, np.ndarray | jax.Array]:
  """What is fitted, in units of λ*, and log λ*, (batch,)."""
  if known(problem.alpha) and known(problem.damping):
    return _static(family, problem.alpha, problem.damping, problem.largest, problem.tolerance)
  assert problem.gram is not None
  alpha, damping = (jnp.asarray(x, problem.gram.dtype) for x in (problem.alpha, problem.damping))
  log_turn, reach, delta = turning_point(alpha, damping, problem.largest)
  usual = _usual_reach(problem.largest)

  def make():
    return family.traced_fit(alpha, reach, delta, tolerance=problem.tolerance, usual_reach=usual)

  return make() if problem.fits is None else problem.fits.of(make), log_turn
