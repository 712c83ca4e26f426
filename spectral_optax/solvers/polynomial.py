"""`solver="polynomial"`: any α ≥ 0 from products of n x n matrices alone.

    U T(Σ) Vᵀ = G f(A),   A = GᵀG,        f(A) ≈ (c I + Σ wₖ Yₖ)²
    Y₀ = A/(2 λ_max),   Yₖ₊₁ = r (Yₖ - Yₖ²)

the logistic map of a matrix, with weights of `_logistic`, as many steps as the tolerance
asks for. A step is one product, whatever the longer side of G is; no inverse, no
factorisation, no solve, and one loop to compile. K products cannot give a degree above 2^K,
which this has.

Rounding: Y is small where λ is, and keeps its digits there; nothing is subtracted from one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectral_optax.solvers import _logistic, _symmetric
from spectral_optax.solvers._fitting import Family, approximate
from spectral_optax.solvers._problem import Problem, Solution

# From this tolerance on, and for α up to 2, eight bits will do for Y: what they round off is
# relative, at every scale of λ, and moves T by 0.01 to 0.02 (tests).
COARSE = 0.1


class Layout(NamedTuple):
  """How a sum of iterates is computed: the same sum, for machines of different kinds.

  Attributes:
    chunk: Numbers of Y that are worked on at once, to stay near the units.
    levels: How often what is symmetric is cut (`_symmetric`); of less gain each time.
    cut_from: From this side on.
    unroll: Whether steps are written out: a launch of a kernel costs more than a step of a
      small matrix, and a loop is a few launches more.
  """

  chunk: int
  levels: int
  cut_from: int
  unroll: bool


# On a CPU a second cut would take a few percent off the time and triple what there is to compile.
IN_CACHE = Layout(chunk=2**21, levels=1, cut_from=512, unroll=False)
FEW_KERNELS = Layout(chunk=2**26, levels=0, cut_from=0, unroll=True)
FEW_FLOPS = Layout(chunk=2**21, levels=2, cut_from=512, unroll=False)

# Products of n x n matrices: a step is one, and so is the square.
FAMILY = Family(
  _logistic.fit,
  _logistic.traced_fit,
  lambda reach, tolerance: _logistic.usual_steps(reach, tolerance) + 1,
  lambda found: found.weights.shape[1] - 1,
)


def float32_product(a: jax.Array, b: jax.Array) -> jax.Array:
  """In float32, or float64, throughout."""
  return jnp.matmul(a, b, precision='highest')


def bfloat16_product(a: jax.Array, b: jax.Array) -> jax.Array:
  """Rounded to bfloat16, accumulated in float32."""
  half = jnp.bfloat16
  return jnp.matmul(a.astype(half), b.astype(half), preferred_element_type=a.dtype)


def sixteen_bit_product(a: jax.Array, b: jax.Array) -> jax.Array:
  """Of both sixteen bits, but for the product of the lower eight."""
  a_high, b_high = (x.astype(jnp.bfloat16).astype(x.dtype) for x in (a, b))
  cross = bfloat16_product(a_high, b - b_high) + bfloat16_product(a - a_high, b_high)
  return bfloat16_product(a_high, b_high) + cross


def solve(problem: Problem) -> Solution:
  """f(GᵀG); see `spectral_optax.solvers` for the signature that all solvers share."""
  gram = problem.gram
  assert gram is not None
  expansion, log_turn = approximate(FAMILY, problem)
  to = problem.take
  r, weights = to(expansion.rate), to(expansion.weights)
  # Rounding makes eigenvalues of GᵀG negative, where the map runs away: none is left so.
  floor = 4 * jnp.finfo(gram.dtype).eps * jnp.sqrt(jnp.sum(jnp.square(gram), axis=(-2, -1)))
  unit = jnp.eye(gram.shape[-1], dtype=gram.dtype)[None]
  at = lambda x: x[:, None, None]
  y = at(to(0.5 / problem.largest) / problem.unit) * (gram + at(floor) * unit)
  run = lambda *how: functools.partial(_sum_of_iterates, product=how[0], layout=how[1])
  product = float32_product
  if problem.half:  # Units for bfloat16 are an accelerator's.
    eight = problem.tolerance >= COARSE and bool(np.all(np.asarray(problem.alpha) <= 2))
    product = bfloat16_product if eight else sixteen_bit_product
  f = jax.lax.platform_dependent(
    y,
    r,
    weights,
    cpu=run(float32_product, IN_CACHE),
    tpu=run(product, FEW_FLOPS),
    default=run(product, FEW_KERNELS),
  )
  # f in units of λ*^(-α/2).
  scale = jnp.exp(to(-problem.alpha / 2 * log_turn)) * problem.gain
  return Solution(f * scale[:, None, None], to(expansion.error))


def _at_once(count: int, n: int, chunk: int) -> int:
  """How many of `count` matrices, a divisor of that."""
  most = max(1, chunk // n**2)
  return max(size for size in range(1, min(count, most) + 1) if count % size == 0)


def _sum_of_iterates(
  y: jax.Array,
  r: jax.Array,
  weights: jax.Array,
  product: _symmetric.Product,
  layout: Layout = IN_CACHE,
) -> jax.Array:
  """(c I + Σ wₖ Yₖ)² from Y₀, (batch, n, n), r, (batch,), and weights, (batch, K + 2)."""
  count, n = y.shape[:2]
  size = _at_once(count, n, layout.chunk)
  if size < count:
    split = lambda x: x.reshape(-1, size, *x.shape[1:])
    together = functools.partial(_sum_of_iterates, product=product, layout=layout)
    found = jax.lax.map(lambda some: together(*some), tuple(map(split, (y, r, weights))))
    return found.reshape(y.shape)
  cut = _symmetric.sizes(n, layout.levels, layout.cut_from)
  scaled = lambda factor, y: jax.tree.map(lambda x: factor[:, None, None] * x, y)
  plus = lambda x, y: jax.tree.map(jnp.add, x, y)
  minus = lambda x, y: jax.tree.map(jnp.subtract, x, y)
  unit = _symmetric.split(jnp.eye(n, dtype=y.dtype)[None], cut)
  y = _symmetric.split(y, cut)
  total = plus(scaled(weights[:, 0], unit), scaled(weights[:, 1], y))

  # The square to end with is one more step of the same loop, compiled once:
  #   x ← r (x - x²) for the iterates, then x ← total, then x ← -(0 - x²).
  steps = weights.shape[1] - 2
  ones, zeros = jnp.ones_like(weights[:, :1]), jnp.zeros_like(weights[:, :1])
  factors = (
    jnp.concatenate([jnp.broadcast_to(r[:, None], (count, steps)), -ones], axis=1),
    jnp.concatenate([jnp.broadcast_to(ones, (count, steps)), zeros], axis=1),
    jnp.concatenate([weights[:, 2:], zeros], axis=1),
  )

  def step(both, at_step):
    (rate, keep, weight), last = at_step
    x, total = both
    x = scaled(rate, minus(scaled(keep, x), _symmetric.square(x, cut, product)))
    total = plus(total, scaled(weight, x))
    return (jax.tree.map(lambda x, t: jnp.where(last, t, x), x, total), total), None

  over = jax.tree.map(jnp.transpose, factors), jnp.arange(steps + 1) == steps - 1
  (x, _), _ = jax.lax.scan(step, (y, total), over, unroll=layout.unroll)
  return _symmetric.join(x)
