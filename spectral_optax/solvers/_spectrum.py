"""What is known of spectra on the way, without decomposing anything."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectral_optax.solvers._problem import Leading

# σ_max under `normalize="spectral"` is an estimate from below; by how much σ may then
# exceed 1 without leaving the interval that T is made for. Power iteration is least
# accurate where leading σ are close, and there it misses little: after k steps from a
# start that has s of the leader, σ is within log(1/s)/(2k) of σ_max.
SPECTRAL_SLACK = 0.1
MOST_STEPS, LEAST_STEPS, STILL = 300, 4, 1e-6


class Spectrum(NamedTuple):
  """What is known of the spectra of a batch of matrices, without decomposing them.

  Attributes:
    participation_ratio: (batch,), (Σσ²)² / Σσ⁴ = ‖G‖⁴_F / ‖GᵀG‖²_F, between 1 and
      the rank: how many directions carry the energy. With "low_rank", which does not
      see the whole spectrum, as if what it left out were flat.
    sigma_max: (batch,), an estimate of the largest singular value, in the units of G;
      approached from below.
    transfer_error: (batch,), how far T may be off, relative, rounding aside.
    basis: (batch, n, r), leading right singular vectors, where the next step starts.
  """

  participation_ratio: jax.Array
  sigma_max: jax.Array
  transfer_error: jax.Array
  basis: jax.Array


def _unit(v: jax.Array) -> jax.Array:
  norm = jnp.sqrt(jnp.sum(jnp.square(v), axis=1, keepdims=True))
  return v / jnp.where(norm > 0, norm, 1)


def multiply_gram(gram: jax.Array) -> Callable[[jax.Array], jax.Array]:
  """From columns V, (batch, n, k), to GᵀG V."""
  return lambda v: jnp.matmul(gram, v, precision='highest')


def multiply_twice(matrix: jax.Array) -> Callable[[jax.Array], jax.Array]:
  """The same without GᵀG."""
  gram = lambda v: jnp.matmul(matrix, v, precision='highest')
  return lambda v: jnp.einsum('bmn,bmk->bnk', matrix, gram(v), precision='highest')


# Of the fixed vector of signs in what a power iteration starts from, the last leader being one.
PROBE = 0.01


def _start(
  multiply: Callable[[jax.Array], jax.Array], basis: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The last leader and a fixed vector of signs, each one step on: x / ‖x‖², and ‖x‖².

  A step more brings it, (batch, n, 1), to a length of about one, wherever the units of G are.
  The second starts the first step, and lets a new leader in when the old one has been
  overtaken: hardly a direction is orthogonal to all those signs.
  """
  batch, n, _ = basis.shape
  signs = np.random.default_rng(0).choice([-1.0, 1.0], n)
  probe = jnp.broadcast_to(jnp.asarray(signs, basis.dtype)[None, :, None], (batch, n, 1))
  both = multiply(jnp.concatenate([basis[:, :, :1], probe], axis=-1))
  # Lengths from one small product: reductions, and more roots, would be more to compile.
  products = jnp.einsum('bni,bnj->bij', both, both, precision='highest')
  leader, across, other = (products[:, i, j, None] for i, j in ((0, 0), (0, 1), (1, 1)))
  warm = (leader > 0) & (other > 0)
  share = jnp.sqrt(jnp.where(warm, PROBE**2 * leader / jnp.where(warm, other, 1), 1))
  square = leader + 2 * share * across + share**2 * other
  x = both[:, :, :1] + share[:, None] * both[:, :, 1:]
  return x / jnp.where(square > 0, square, 1)[:, None], square


def follow(multiply: Callable[[jax.Array], jax.Array], basis: jax.Array) -> Leading:
  """σ_max two power iterations on from `basis`: a value to log, which may lag behind."""
  start, start_square = _start(multiply, basis)
  v = multiply(start)
  square = jnp.sum(jnp.square(v), axis=1)
  unit = v * jax.lax.rsqrt(jnp.where(square > 0, square, 1))[:, None]
  return Leading(jnp.sqrt(jnp.sqrt(square * start_square)), unit)


def converge(multiply: Callable[[jax.Array], jax.Array], basis: jax.Array) -> Leading:
  """σ_max by as many power iterations as it takes: few from a warm basis.

  Ends when no σ of the batch moves by more than a millionth, which from a cold start
  leaves σ within 1e-3 of σ_max for every matrix of the tests.
  """

  def more(carry):
    count, _, before, sigma = carry
    moving = jnp.any(jnp.abs(sigma - before) > STILL * sigma)
    return (count < LEAST_STEPS) | (moving & (count < MOST_STEPS))

  def step(carry):
    count, v, _, before = carry
    v = multiply(v)
    sigma = jnp.sqrt(jnp.sqrt(jnp.sum(jnp.square(v), axis=1)))
    return count + 1, _unit(v), before, sigma

  start = jax.lax.stop_gradient(_unit(_start(multiply, basis)[0]))
  zeros = jnp.zeros((len(basis), 1), basis.dtype)
  # A loop without a derivative, and none is needed: σ_max is stationary in its vector.
  frozen = lambda carry: jax.tree.map(jax.lax.stop_gradient, step(carry))
  _, v, _, _ = jax.lax.while_loop(more, frozen, (0, start, zeros, zeros))
  v = jax.lax.stop_gradient(v)
  sigma = jnp.sqrt(jnp.maximum(jnp.sum(v * multiply(v), axis=1), 0))
  return Leading(sigma, v)


def _ratio(energy: jax.Array, squares: jax.Array) -> jax.Array:
  return jnp.where(squares > 0, jnp.square(energy) / jnp.where(squares > 0, squares, 1), 0)


def energy(gram: jax.Array) -> jax.Array:
  """Σσ², the trace of (batch, n, n)."""
  # As a stride through memory; a diagonal found by its indices is a pass over the matrix. A product
  # with ones is less to compile than a sum.
  batch, n, _ = gram.shape
  diagonal = gram.reshape(batch, n * n)[:, :: n + 1]
  return jnp.matmul(diagonal, jnp.ones([n], gram.dtype), precision='highest')


def participation_ratio(gram: jax.Array, trace: jax.Array | None = None) -> jax.Array:
  """(Σσ²)² / Σσ⁴ of (batch, n, n), scale-free; `trace` is Σσ² where that is known."""
  trace = energy(gram) if trace is None else trace
  return _ratio(trace, jnp.sum(jnp.square(gram), axis=(-2, -1)))


def participation_ratio_of_leading(matrix: jax.Array, leading: Leading) -> jax.Array:
  """The same where only leading σ are known: what is left out counts as flat."""
  lead = jnp.square(leading.sigma)
  energy = jnp.sum(jnp.square(matrix), axis=(-2, -1))
  rest = jnp.maximum(energy - jnp.sum(lead, axis=-1), 0)
  left_out = max(matrix.shape[-1] - lead.shape[-1], 1)
  return _ratio(energy, jnp.sum(jnp.square(lead), axis=-1) + jnp.square(rest) / left_out)
