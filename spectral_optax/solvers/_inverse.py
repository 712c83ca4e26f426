"""Inverses of symmetric positive definite matrices by matrix products.

With the Cholesky factor A = L Lᵀ and W = L⁻¹, A⁻¹ = Wᵀ W. Blocks are eliminated by
products, many matrices at once; inside a block, LAPACK on a CPU, its counterpart on a GPU and
a loop on a TPU, where that is slow to compile. Eliminating with an explicit A₁₁⁻¹ would
be a third cheaper, and loses as many digits again as A has lost: T needs them where a
momentum has one direction far above the rest.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from spectral_optax.solvers._lapack import in_a_loop
from spectral_optax.solvers._perturbation import transpose

# Rows in a pivot of the loop.
PIVOT = 32
# How many blocks a matrix is cut into above so many columns: the fewest that are as fast as any
# (LAPACK on a CPU, two cores, 64 to 2048 columns), since each takes a while to compile. A loop is
# cut as small as ever.
BLOCKS_ABOVE = {0: 1, 96: 2, 192: 4}
LOOP_BLOCKS_ABOVE = {0: 1, 64: 4}


def _matmul(a: jax.Array, b: jax.Array, precision: str) -> jax.Array:
  return jnp.matmul(a, b, precision=precision, preferred_element_type=a.dtype)


# From a pivot's A (batch, b, b), a bound on its eigenvalues and a precision to its W.
Pivot = Callable[[jax.Array, jax.Array, str], jax.Array]


def inverse_factor(
  matrix: jax.Array, least: jax.Array, pivot_of: Pivot, precision: str = 'highest'
) -> list[jax.Array]:
  """W = L⁻¹ of A = L Lᵀ, by block rows (batch, rows, columns up to theirs).

  Args:
    matrix: A, (batch, n, n).
    least: (batch,), below the smallest eigenvalue. No pivot is smaller; one that
      rounding has made so is put there.
    pivot_of: `lapack`, `batched` or `eliminate`: the first on a CPU, the last on a TPU.
    precision: Of the products.
  """
  n = matrix.shape[-1]
  blocks_above = BLOCKS_ABOVE if pivot_of is lapack else LOOP_BLOCKS_ABOVE
  blocks = blocks_above[max(above for above in blocks_above if above < n)]
  if blocks == 1:
    return [pivot_of(matrix, least, precision)]
  size = -(-n // (blocks * PIVOT)) * PIVOT
  starts = list(range(0, n, size))
  # Below the diagonal of block column j, updated as columns to its left are eliminated.
  columns = [matrix[:, s:, s : s + size] for s in starts]
  rows: list[jax.Array | None] = [None] * len(starts)
  for k, start in enumerate(starts):
    width = columns[k].shape[-1]
    pivot = pivot_of(columns[k][:, :width], least, precision)
    row, left = pivot, rows[k]
    if left is not None:
      row = jnp.concatenate([_matmul(pivot, left, precision), pivot], axis=-1)
    rows[k] = row
    if start + width == n:
      break
    factor = _matmul(columns[k][:, width:], transpose(pivot), precision)
    below = _matmul(factor, row, precision)
    for j in range(k + 1, len(starts)):
      at = starts[j] - start - width
      wide = columns[j].shape[-1]
      here = factor[:, at : at + wide]
      columns[j] -= _matmul(factor[:, at:], transpose(here), precision)
      part = -below[:, at : at + wide]
      old = rows[j]
      if old is not None:
        part += jnp.pad(old, ((0, 0), (0, 0), (0, part.shape[-1] - old.shape[-1])))
      rows[j] = part
  return [row for row in rows if row is not None]


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def weighted_inverses(
  matrix: jax.Array,
  weights: jax.Array,
  least: jax.Array,
  pivot_of: Pivot,
  precision: str = 'highest',
) -> jax.Array:
  """Σ weights A⁻¹ over the second axis: (batch, n, n).

  Args:
    matrix: A, (batch, count, n, n), symmetric positive definite.
    weights: (batch, count).
    least: (batch, count), see `inverse_factor`.
    pivot_of: See `inverse_factor`.
    precision: Of the products.
  """
  batch, count, n, _ = matrix.shape
  rows = inverse_factor(matrix.reshape(-1, n, n), least.reshape(-1), pivot_of, precision)
  total = jnp.zeros((batch, n, n), matrix.dtype)
  for row in rows:  # Wᵀ W by block rows, which end at the diagonal.
    height, width = row.shape[-2:]
    right = row.reshape(batch, count, height, width)
    left = right * weights[:, :, None, None]
    part = _matmul(
      transpose(left.reshape(batch, count * height, width)),
      right.reshape(batch, count * height, width),
      precision,
    )
    total += jnp.pad(part, ((0, 0), (0, n - width), (0, n - width)))
  return total


@weighted_inverses.defjvp
def _weighted_inverses_jvp(pivot_of, precision, primals, tangents):
  """D A⁻¹ = -A⁻¹ dA A⁻¹, and nothing of how it was computed."""
  matrix, weights, least = primals
  d_matrix, d_weights, _ = tangents
  each = weighted_inverses(
    matrix.reshape(-1, 1, *matrix.shape[2:]),
    jnp.ones((weights.size, 1), weights.dtype),
    least.reshape(-1, 1),
    pivot_of,
    precision,
  ).reshape(matrix.shape)
  turned = _matmul(each, _matmul(d_matrix, each, precision), precision)
  whole = lambda weights, x: jnp.einsum('bk,bkij->bij', weights, x, precision='highest')
  return whole(weights, each), whole(d_weights, each) - whole(weights, turned)


def _factor(matrix: jax.Array) -> jax.Array:
  factor = jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
  unit = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
  return jax.lax.linalg.triangular_solve(factor, unit, left_side=False, lower=True)


_factor_in_a_loop = in_a_loop(_factor)


# Pivots of one size are traced once: a jitted function remembers.
@functools.partial(jax.jit, static_argnums=2)
def lapack(matrix: jax.Array, least: jax.Array, precision: str) -> jax.Array:
  """W of one block on a CPU."""
  del least, precision
  return _factor_in_a_loop(matrix)


@functools.partial(jax.jit, static_argnums=2)
def batched(matrix: jax.Array, least: jax.Array, precision: str) -> jax.Array:
  """By what a GPU has in LAPACK's place; never on a CPU."""
  del least, precision
  return jax.vmap(_factor)(matrix)


@functools.partial(jax.jit, static_argnums=2)
def eliminate(matrix: jax.Array, least: jax.Array, precision: str) -> jax.Array:
  """W from [A | I] by forward elimination: a pivot of rows at a time, in a loop.

  With R = L_kk⁻¹ [row k], rows below lose Cᵀ R, C what R has to the left in their columns:
  [A | I] becomes [Lᵀ | L⁻¹].
  """
  n = matrix.shape[-1]
  size = PIVOT if n > PIVOT else 1
  padded = -(-n // size) * size
  if padded != n:
    matrix = jnp.pad(matrix, ((0, 0), (0, padded - n), (0, padded - n)))
    matrix += jnp.diag(jnp.arange(padded) >= n).astype(matrix.dtype)[None]
  unit = jnp.broadcast_to(jnp.eye(padded, dtype=matrix.dtype), matrix.shape)
  index = jnp.arange(padded) // size

  def body(k, both):
    row = jax.lax.dynamic_slice_in_dim(both, k * size, size, axis=1)
    pivot = jax.lax.dynamic_slice_in_dim(row, k * size, size, axis=2)
    if size == 1:
      row = row * jax.lax.rsqrt(jnp.maximum(pivot, least[:, None, None]))
      below = jnp.where(index > k, row[:, 0, :padded], 0)
      both = both - below[:, :, None] * row
    else:
      row = _matmul(eliminate(pivot, least, precision), row, precision)
      below = jnp.where(index > k, row[:, :, :padded], 0)
      both = both - _matmul(transpose(below), row, precision)
    return jax.lax.dynamic_update_slice_in_dim(both, row, k * size, axis=1)

  both = jax.lax.fori_loop(0, padded // size, body, jnp.concatenate([matrix, unit], axis=-1))
  return both[:, :n, padded : padded + n]
