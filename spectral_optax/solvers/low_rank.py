"""`solver="low_rank"`: the leading directions exactly, all others by one number.

    U T(Σ) Vᵀ ≈ G (c I + V (f(C) - c I) Vᵀ),        C = Vᵀ GᵀG V,

with V an orthonormal basis of r leading right singular vectors, found by subspace
iteration from where the last step ended: a few products with r columns. The directions
left out, whose σ² lies in [0, μ], get the middle c of what f is there, (f(0) + f(μ))/2;
as μ → 0 that is G/d and a correction of rank r. It is a good map where the left out
directions are below the turning point, and `error` says when it is not.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from spectral_optax.solvers._lapack import one_at_a_time
from spectral_optax.solvers._perturbation import product, transpose
from spectral_optax.solvers._problem import Leading, Problem, Solution
from spectral_optax.transfer import transfer_ratio

ITERATIONS = 2
# What there is to choose from; the last is what the basis in the state has room for.
RANKS = (16, 64)


def _decompose(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
  values, vectors = jnp.linalg.eigh(gram, symmetrize_input=False)
  return values[::-1], vectors[:, ::-1]


_eigh = one_at_a_time(_decompose)


_orthonormal = one_at_a_time(lambda columns: jnp.linalg.qr(columns)[0])


def ritz(problem: Problem, iterations: int = ITERATIONS) -> tuple[Leading, jax.Array, jax.Array]:
  """Leading singular values and vectors V by subspace iteration, with GV and residuals.

  Returns:
    The `Leading`, GV of shape (batch, m, r), and the norms (batch, r) of
    GᵀG v - σ² v, which say how far V is from invariant.
  """
  matrix, basis = problem.matrix, problem.basis
  assert matrix is not None
  n, r = basis.shape[-2:]
  if r == n:  # Everything leads.
    v = jnp.broadcast_to(jnp.eye(n, dtype=basis.dtype), basis.shape)
  else:
    v = _subspace(matrix, basis, iterations)
  gv = product(matrix, v)
  values, turn = _eigh(product(transpose(gv), gv))
  v, gv = product(v, turn), product(gv, turn)
  residual = product(transpose(matrix), gv) - v * values[:, None, :]
  sigma = jnp.sqrt(jnp.maximum(values, 0))
  return Leading(sigma, v), gv, jnp.sqrt(jnp.sum(jnp.square(residual), axis=-2))


def _subspace(matrix: jax.Array, basis: jax.Array, iterations: int) -> jax.Array:
  # The longest columns of what the basis leaves out let a new leader in.
  left_out = matrix - product(product(matrix, basis), transpose(basis))
  lengths = jnp.sum(jnp.square(left_out), axis=-2)
  longest = jax.lax.top_k(lengths, basis.shape[-1])[1]
  rows = jnp.take_along_axis(left_out, longest[:, None, :], axis=-1)
  probe = product(transpose(matrix), rows)
  size = jnp.sqrt(jnp.sum(jnp.square(probe), axis=-2, keepdims=True))
  v = basis + 0.1 * probe / jnp.where(size > 0, size, 1)
  for _ in range(iterations):
    v = _orthonormal(product(transpose(matrix), product(matrix, v)))
  return v


def solve(problem: Problem) -> Solution:
  """See `spectral_optax.solvers` for the signature that all solvers share.

  With as many directions as the basis has columns; or, if the rank is the solver's to
  choose, with the fewest of `RANKS` whose bound meets the tolerance for all of the batch.
  """
  most = problem.basis.shape[-1]
  ranks = [r for r in RANKS if r < most] if problem.choose_rank else []

  def from_rank(i: int) -> Solution:
    rank = [*ranks, most][i]
    found = _widened(_with_rank(problem, rank), problem)
    if rank == most:
      return found
    good = jnp.all(found.error <= problem.tolerance)
    return jax.lax.cond(good, lambda: found, lambda: from_rank(i + 1))

  return from_rank(0)


def _widened(found: Solution, problem: Problem) -> Solution:
  """With columns for as many directions as the problem's basis has."""
  assert found.leading is not None
  assert problem.matrix is not None
  sigma, basis = found.leading
  (batch, n, most), rank = problem.basis.shape, sigma.shape[-1]
  if rank == most:
    return found
  # What was left out counts as flat, as it does where nothing more is known.
  energy = jnp.sum(jnp.square(problem.matrix), axis=(-2, -1))
  rest = jnp.maximum(energy - jnp.sum(jnp.square(sigma), axis=-1), 0) / (n - rank)
  flat = jnp.broadcast_to(jnp.sqrt(rest)[:, None], (batch, most - rank))
  leading = Leading(
    jnp.concatenate([sigma, flat], axis=-1),
    jnp.concatenate([basis, problem.basis[:, :, rank:]], axis=-1),
  )
  return found._replace(leading=leading)


def _with_rank(problem: Problem, rank: int) -> Solution:
  problem = problem._replace(basis=problem.basis[:, :, :rank])
  matrix = problem.matrix
  assert matrix is not None
  alpha, damping = (jnp.asarray(x, matrix.dtype)[:, None] for x in (problem.alpha, problem.damping))
  leading, gv, residual = ritz(problem)
  squares = jnp.square(leading.sigma)

  def f(value: ArrayLike) -> jax.Array:
    return transfer_ratio(jnp.sqrt(value), alpha, damping)

  # What is left out: its energy, its columns, and how large its σ² can be once the
  # basis has found the leaders.
  energy = jnp.sum(jnp.square(matrix), axis=(-2, -1))[:, None]
  rest = jnp.maximum(energy - jnp.sum(squares, axis=-1, keepdims=True), 0)
  columns = jnp.sum(jnp.square(matrix), axis=-2) - jnp.einsum(
    'bnr,br->bn', jnp.square(leading.basis), squares, precision='highest'
  )
  seen = jnp.max(columns, axis=-1, keepdims=True)
  spread = jnp.sqrt(jnp.sum(jnp.square(residual), axis=-1, keepdims=True))
  mu = jnp.minimum(jnp.maximum(squares[:, -1:] + spread, seen), rest)
  at_zero, at_mu = f(jnp.zeros_like(mu)), f(mu)
  middle = (at_zero + at_mu) / 2

  correction = gv * (f(squares) - middle)[:, None, :]
  update = middle[:, :, None] * matrix + product(correction, transpose(leading.basis))

  # Left out directions are off by at most (f(0) - f(μ))/2 times their σ; the basis, by
  # what its residuals turn, to first order: f is convex, so that its divided
  # differences towards [0, μ] are at most (f(0) - f(σ²))/σ².
  slope = (at_zero - f(squares)) / jnp.where(squares > 0, squares, 1)
  turned = jnp.sum(jnp.square(residual * slope) * (squares + mu), axis=-1, keepdims=True)
  off = (at_zero - at_mu) / 2 * jnp.sqrt(rest) + jnp.sqrt(turned)
  size = jnp.sqrt(jnp.sum(jnp.square(update), axis=(-2, -1)))
  # Of the exact update, which is at least this large; 0/0 for a zero matrix.
  exact = size - off[:, 0]
  error = jnp.where(exact > 0, off[:, 0] / jnp.where(exact > 0, exact, 1), jnp.inf)
  error = jnp.where(energy[:, 0] > 0, error, 0)
  return Solution(update, error, leading)


def leading_directions(
  matrices: jax.Array, count: int, iterations: int = 4
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Leading singular triples of a batch of matrices, from nothing, without an SVD of them.

  By subspace iteration with twice as many columns as are asked for. Where σ are close, the
  vectors are of the space that theirs span; u and v belong together in any case, and
  σ = |G v| along them.

  Args:
    matrices: (batch, rows, columns), float32 or float64. What is not finite counts as zero.
    count: k ≤ min(rows, columns).
    iterations: Of the subspace.

  Returns:
    u (batch, k, rows), σ (batch, k) in decreasing order, v (batch, k, columns); u is zero
    where σ is.
  """
  finite = jnp.isfinite(matrices).all((1, 2), keepdims=True)
  matrices = jnp.where(finite, matrices, 0)
  scale = jnp.max(jnp.abs(matrices), axis=(1, 2), keepdims=True)
  matrices = matrices / jnp.where(scale > 0, scale, 1)
  wide = matrices.shape[1] < matrices.shape[2]
  tall = transpose(matrices) if wide else matrices
  batch, _, n = tall.shape
  problem = Problem(
    matrix=tall,
    gram=None,
    alpha=np.zeros(batch),
    damping=np.zeros(batch),
    largest=np.zeros(batch),
    tolerance=0.0,
    basis=jnp.zeros((batch, n, min(2 * count, n)), tall.dtype),
  )
  leading, left, _ = ritz(problem, iterations)
  left, right = left[:, :, :count], leading.basis[:, :, :count]
  sigma = jnp.sqrt(jnp.sum(jnp.square(left), axis=1))
  left = left / jnp.where(sigma > 0, sigma, 1)[:, None, :]
  left, right = transpose(left), transpose(right)
  u, v = (right, left) if wide else (left, right)
  return u, sigma * scale[:, :, 0], v
