"""`solver="polynomial"`: any α from products alone, in bfloat16 where there is a unit for it.

    Xₖ₊₁ = Xₖ (a + b Aₖ + c Aₖ²),   Aₖ = XₖᵀXₖ,   X₀ = G/S,        U T(Σ) Vᵀ ≈ Σ wₖ Xₖ

The steps of a Newton-Schulz iteration for the polar factor, but all iterates are used, not
the last alone: the k-th rises as steeply as its steps make it and then stays of size one,
and sums of them rise, turn and fall like T does. `_composite` has the steps and weights, as
many as the tolerance asks for. No inverse, no factorisation, no solve.

Rounding: the turning point σ* can be far below the largest σ. A product with Xₖ in bfloat16
moves singular values by about 2⁻⁹ of their root mean square, and σ* is met at the level of
σ; in GᵀG, σ*² would be lost. So the iteration is on the m x n matrix. In float32 and for a
tall matrix it is on n x n matrices, Xₖ = X₀ Qₖ, with G multiplied once at the end.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from spectral_optax.solvers import _composite
from spectral_optax.solvers._perturbation import transpose
from spectral_optax.solvers._problem import BFLOAT16_TOLERANCE, Problem, Solution, known

# Below `BFLOAT16_TOLERANCE` products are in float32 everywhere; so too where T at the largest
# σ there can be is that much less than its peak: what bfloat16 rounds of iterates that cancel
# there would be as large as the update of a matrix of rank one.
BFLOAT16_LEAST = 1e-3

Product = Callable[[jax.Array, jax.Array], jax.Array]


def float32_product(left: jax.Array, right: jax.Array) -> jax.Array:
  """In float32, or float64, throughout."""
  return jnp.matmul(left, right, precision='highest')


def bfloat16_product(left: jax.Array, right: jax.Array) -> jax.Array:
  """Rounded to bfloat16, accumulated in float32."""
  both = jnp.matmul(
    left.astype(jnp.bfloat16), right.astype(jnp.bfloat16), preferred_element_type=jnp.float32
  )
  return both.astype(left.dtype)


def static_error(alpha: ArrayLike, damping: ArrayLike, largest: float, tolerance: float) -> float:
  """The largest error that T has with as many steps as there may be."""
  alpha, damping, largest_square = _float64(alpha, damping, largest)
  _, reach, delta = _composite.turning_point(alpha, damping, largest_square)
  if np.any((alpha > 0.1) & (delta <= 0.99)):
    return np.inf  # σ* is below what G in float32 can show.
  return float(_composite.fit(alpha, reach, delta, 3, tolerance).error.max())


def products(count: int, degree: int, on_gram: bool) -> tuple[int, int]:
  """How many (m x n)(n x n) or Gram products, and (n x n)(n x n) ones, GᵀG included."""
  if count == 0:
    return 0, 0
  inside = degree // 2 - 1  # A², for the coefficients of B.
  if on_gram:
    return 2, count * (inside + 3) - 3  # Q₁ = B₀ is free, and A_K not needed.
  return 2 * count, count * inside


def _float64(*values: ArrayLike) -> list[np.ndarray]:
  return list(np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, np.float64)) for v in values)))


def _plan(problem: Problem, ratio: float) -> tuple[_composite.Composite, np.ndarray, np.ndarray]:
  """Steps and weights with the fewest products, log σ*, and log S; `ratio` is m/n."""
  alpha, damping, largest = _float64(problem.alpha, problem.damping, problem.largest)
  turn, reach, delta = _composite.turning_point(alpha, damping, largest)
  fits = {
    degree: _composite.fit(alpha, reach, delta, degree, problem.tolerance)
    # Steps of degree 5 are fewer, at one more product each: for small n.
    for degree in ((3,) if ratio < 2 else (3, 5))
  }

  def cost(degree):
    fit = fits[degree]
    tall, square = products(fit.steps.shape[1], degree, False)
    error = fit.error.max()
    return error if error > problem.tolerance else 0, tall * ratio + square

  return fits[min(fits, key=cost)], turn, turn + reach


def _polynomial(
  a: jax.Array, step: jax.Array, product: Product, constant: jax.Array | None = None
) -> jax.Array:
  """B = s₀ + s₁ A + s₂ A², or without the constant if there is none."""
  at = lambda i: step[:, i, None, None]
  b = at(1) * a
  if step.shape[1] == 3:
    b += at(2) * product(a, a)
  return b if constant is None else b + at(0) * constant


def _rectangular(
  x: jax.Array, gram: jax.Array | None, steps: jax.Array, weights: jax.Array, product: Product
) -> jax.Array:
  """Σ wₖ Xₖ by products with the matrices themselves; `steps` (K, batch, 2 or 3)."""
  total = weights[0, :, None, None] * x

  def advance(both, now, gram=None):
    x, total = both
    step, weight = now
    a = product(transpose(x), x) if gram is None else gram
    # Xₖ itself is added unrounded: what is small stays exact to first order.
    x = step[:, 0, None, None] * x + product(x, _polynomial(a, step, product))
    return (x, total + weight[:, None, None] * x), None

  both, _ = advance((x, total), (steps[0], weights[1]), gram)
  (_, total), _ = jax.lax.scan(advance, both, (steps[1:], weights[2:]))
  return total


def _on_gram(
  x: jax.Array, a: jax.Array, steps: jax.Array, weights: jax.Array, product: Product
) -> jax.Array:
  """X₀ Σ wₖ Qₖ with Qₖ₊₁ = Qₖ Bₖ, Aₖ₊₁ = Aₖ Bₖ²: all of them commute."""
  unit = jnp.eye(a.shape[-1], dtype=a.dtype)[None]
  b = _polynomial(a, steps[0], product, unit)
  total = weights[0, :, None, None] * unit + weights[1, :, None, None] * b

  def advance(state, now):
    a, b, q, total = state
    step, weight = now
    a = product(product(a, b), b)
    b = _polynomial(a, step, product, unit)
    q = product(q, b)
    return (a, b, q, total + weight[:, None, None] * q), None

  (_, _, _, total), _ = jax.lax.scan(advance, (a, b, b, total), (steps[1:], weights[2:]))
  return product(x, total)


def solve(problem: Problem) -> Solution:
  """See `spectral_optax.solvers` for the signature that all solvers share.

  α and d are known while tracing. `error` is the largest relative error of the sum over
  [0, S], rounding aside.
  """
  matrix = problem.matrix
  assert matrix is not None
  if not _bfloat16_is_enough(problem):
    return solve_with(problem, float32_product)
  # Units for bfloat16 are an accelerator's.
  update, error = jax.lax.platform_dependent(
    cpu=lambda: solve_with(problem, float32_product)[:2],
    default=lambda: solve_with(problem, bfloat16_product)[:2],
  )
  return Solution(update, error)


def _bfloat16_is_enough(problem: Problem) -> bool:
  assert problem.matrix is not None
  if problem.tolerance < BFLOAT16_TOLERANCE or problem.matrix.dtype != jnp.float32:
    return False
  if not known(problem.alpha) or not known(problem.damping):
    return False
  alpha, damping, largest = _float64(problem.alpha, problem.damping, problem.largest)
  _, reach, delta = _composite.turning_point(alpha, damping, largest)
  targets = (
    _composite.points(float(a), float(r), float(d), 300)[1]
    for a, r, d in zip(alpha, reach, delta, strict=True)
  )
  return all(t[-1] >= BFLOAT16_LEAST * t.max() for t in targets)


def solve_with(problem: Problem, product: Product) -> Solution:
  """`solve` with products of one kind."""
  matrix = problem.matrix
  assert matrix is not None
  dtype = matrix.dtype
  m, n = matrix.shape[-2:]
  fit, turn, top = _plan(problem, m / n)
  to = functools.partial(jnp.asarray, dtype=dtype)
  size = np.exp(top)[:, None, None]
  x = matrix / to(size)
  # Scanned over steps: (K, batch, ...).
  steps = to(fit.steps.swapaxes(0, 1))
  weights = to((fit.weights * np.exp((1 - np.asarray(problem.alpha)) * turn)[:, None]).T)
  error = to(fit.error)
  count, degree = len(steps), 2 * steps.shape[-1] - 1
  if count == 0:  # T is a line.
    return Solution(weights[0, :, None, None] * x, error)
  gram = None if problem.gram is None else problem.gram / to(size**2)
  cost = [
    tall * m / n + square
    for tall, square in (products(count, degree, on_gram) for on_gram in (False, True))
  ]
  if product is float32_product and cost[1] < cost[0]:
    gram = product(transpose(x), x) if gram is None else gram
    return Solution(_on_gram(x, gram, steps, weights, product), error)
  return Solution(_rectangular(x, gram, steps, weights, product), error)
