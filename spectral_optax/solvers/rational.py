"""`solver="rational"`: 0 ≤ α ≤ 2 as a few damped Newton steps, by products alone.

    U T(Σ) Vᵀ = G f(GᵀG),        f(GᵀG) ≈ c I + Σ cᵢ (GᵀG + pᵢ I)⁻¹

with poles pᵢ and weights of `_mixture`, as many as the tolerance asks for, and the
inverses of `_inverse`, all poles of all matrices at once. α = 2 is one pole, exactly.
"""

import functools

import jax
import jax.numpy as jnp

from spectral_optax.solvers import _mixture
from spectral_optax.solvers._fitting import Family, approximate
from spectral_optax.solvers._inverse import batched, eliminate, lapack, weighted_inverses
from spectral_optax.solvers._problem import Problem, Solution

FAMILY = Family(
  _mixture.fit, _mixture.traced_fit, _mixture.usual_poles, lambda found: found.poles.shape[1]
)


def solve(problem: Problem) -> Solution:
  """f(GᵀG); see `spectral_optax.solvers` for the signature that all solvers share."""
  gram = problem.gram
  assert gram is not None
  dtype, n = gram.dtype, gram.shape[-1]
  mixture, log_turn = approximate(FAMILY, problem)
  to = problem.take
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

  def together(gram, weights, shift, pivot_of, precision='highest'):
    unit = jnp.eye(gram.shape[-1], dtype=gram.dtype)[None, None]
    shifted = gram[:, None] + shift[:, :, None, None] * unit
    return weighted_inverses(shifted, weights, shift / 2, pivot_of, precision)

  def one_by_one(gram, weights, shift):  # What a CPU works on stays in its cache.
    if len(gram) == 1:
      return together(gram, weights, shift, pivot_of=lapack)

    def step(both, at):  # Each takes its Gram matrix's place: no second batch of them.
      i, *numbers = at
      one = jax.lax.dynamic_slice_in_dim(both, i, 1)
      found = together(one, *(x[None] for x in numbers), pivot_of=lapack)
      return jax.lax.dynamic_update_slice_in_dim(both, found, i, 0), None

    return jax.lax.scan(step, gram, (jnp.arange(len(gram)), weights, shift))[0]

  return jax.lax.platform_dependent(
    gram,
    weights,
    shift,
    cpu=one_by_one,
    # On a TPU "high" is three passes in bfloat16, in place of six, and keeps sixteen bits.
    tpu=functools.partial(together, pivot_of=eliminate, precision='high' if half else 'highest'),
    default=functools.partial(together, pivot_of=batched),
  )
