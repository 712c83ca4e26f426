"""From a matrix G = U Σ Vᵀ to U T(Σ) Vᵀ: one file a method, one signature.

    solve(matrix, gram, alpha, damping) -> update

  matrix   (batch, m, n) with m ≥ n, float32 or float64, already normalised.
  gram     (batch, n, n), its Gram matrix GᵀG.
  alpha    curvature exponent, a number or an array (batch,).
  damping  d, likewise.
  update   (batch, m, n).

Callers of `solve_batch` and `apply_transfer` need not care: orientation, dtype,
normalisation and bad numbers are dealt with here, once for all methods. A new
solver is a new file and a line in `SOLVERS`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from spectral_optax.solvers import cholesky, gram, svd
from spectral_optax.solvers._lapack import one_at_a_time

SOLVERS = {
  'svd': svd.solve,
  'gram': gram.solve,
  'cholesky': cholesky.solve,
}
NORMALIZATIONS = ('rms', 'spectral', 'frobenius', None)


def _is_exactly_two(alpha: Any) -> bool:
  """Whether α is 2 and known while tracing: no JAX array, no schedule."""
  known = isinstance(alpha, int | float | np.ndarray | np.generic)
  return known and bool(np.all(np.asarray(alpha) == 2))


def choose_solver(solver: str, alpha: Any) -> str:
  """The method that runs: `solver`, or for "auto" the cheapest exact one for α."""
  if solver != 'auto':
    return solver
  return 'cholesky' if _is_exactly_two(alpha) else 'gram'


def check_solver(solver: str, normalize: str | None) -> None:
  """Raises ValueError for an unknown solver or normalisation."""
  if solver != 'auto' and solver not in SOLVERS:
    raise ValueError(f'solver must be "auto" or one of {sorted(SOLVERS)}, got {solver!r}.')
  if normalize not in NORMALIZATIONS:
    raise ValueError(f'normalize must be one of {NORMALIZATIONS}, got {normalize!r}.')


def check_hyperparams(solver: str, alpha: Any, damping: Any, where: str = '') -> None:
  """Raises ValueError for α, d or a solver that make no sense together.

  Traced values cannot be looked at and are let through.
  """
  for name, value in (('alpha', alpha), ('damping', damping)):
    if isinstance(value, jax.core.Tracer):
      continue
    numbers = np.asarray(value)
    if np.iscomplexobj(numbers) or not np.all((numbers >= 0) & np.isfinite(numbers)):
      meaning = 'a curvature exponent' if name == 'alpha' else 'a damping'
      raise ValueError(f'{name} is {meaning}: finite and not negative, got {value}{where}.')
  if solver == 'cholesky' and not _is_exactly_two(alpha):
    raise ValueError(
      f'solver="cholesky" computes alpha = 2 alone, as a Python number that is known'
      f' while tracing; got alpha = {alpha}{where}. Use solver="gram" or "auto".'
    )


class Spectrum(NamedTuple):
  """What is known of the spectra of a batch of matrices, without decomposing them.

  Attributes:
    participation_ratio: (batch,), (Σσ²)² / Σσ⁴ = ‖G‖⁴_F / ‖GᵀG‖²_F, between 1 and
      the rank: how many directions carry the energy.
    sigma_max: (batch,), a power-iteration estimate of the largest singular value,
      in the units of G; approached from below.
    sigma_max_vector: (batch, n), the unit singular vector that goes with it.
  """

  participation_ratio: jax.Array
  sigma_max: jax.Array
  sigma_max_vector: jax.Array


def _gram(matrix: jax.Array) -> jax.Array:
  return jnp.einsum('bij,bik->bjk', matrix, matrix, precision='highest')


def _spectral_norm(matrix: jax.Array) -> jax.Array:
  largest = lambda g: jnp.linalg.eigvalsh(g, symmetrize_input=False)[-1]
  return jnp.sqrt(jnp.maximum(one_at_a_time(largest)(_gram(matrix)), 0))


def _normalize(matrix: jax.Array, normalize: str | None) -> tuple[jax.Array, jax.Array]:
  """(Ĝ, c) with G = c Ĝ and Ĝ of unit size; c (batch, 1, 1), one for a zero matrix."""
  # In two steps: squares of entries of size 1e±30 would leave float32.
  largest = jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True)
  largest = jnp.where(largest > 0, largest, 1)
  matrix = matrix / largest
  if normalize == 'spectral':
    size = _spectral_norm(matrix)[:, None, None]
  else:
    size = jnp.sqrt(jnp.sum(jnp.square(matrix), axis=(-2, -1), keepdims=True))
    if normalize == 'rms':
      size /= math.sqrt(min(matrix.shape[-2:]))
  size = jnp.where(size > 0, size, 1)
  return matrix / size, largest * size


def _spectrum(gram_matrix: jax.Array, scale: jax.Array, start: jax.Array) -> Spectrum:
  """Participation ratio, and two warm-started power iterations for σ_max."""
  trace = jnp.trace(gram_matrix, axis1=-2, axis2=-1)
  squares = jnp.sum(jnp.square(gram_matrix), axis=(-2, -1))
  ratio = jnp.where(squares > 0, jnp.square(trace) / jnp.where(squares > 0, squares, 1), 0)

  def unit(v):
    norm = jnp.linalg.norm(v, axis=-1, keepdims=True)
    return jnp.where(norm > 0, v / jnp.where(norm > 0, norm, 1), 0)

  apply = lambda v: jnp.einsum('bij,bj->bi', gram_matrix, v, precision='highest')
  # The longest column is never orthogonal to all leading directions: it starts the
  # first step, and lets a new leader in when the old one has been overtaken.
  column = jnp.argmax(jnp.diagonal(gram_matrix, axis1=-2, axis2=-1), axis=-1)
  column = jnp.take_along_axis(gram_matrix, column[:, None, None], axis=-2)[:, 0]
  v = start + 0.1 * unit(column)
  for _ in range(2):
    v = unit(apply(v))
  rayleigh = jnp.maximum(jnp.sum(v * apply(v), axis=-1), 0)
  return Spectrum(ratio, scale[:, 0, 0] * jnp.sqrt(rayleigh), v)


def solve_batch(
  matrix: jax.Array,
  alpha: ArrayLike,
  damping: ArrayLike,
  *,
  normalize: str | None,
  solver: str,
  start: jax.Array | None = None,
) -> tuple[jax.Array, Spectrum]:
  """U T(Σ) Vᵀ and the spectra of a batch of matrices of one shape.

  Args:
    matrix: (batch, m, n), float32 or float64.
    alpha: Curvature exponent, a number or (batch,).
    damping: d, a number or (batch,).
    normalize: See `apply_transfer`.
    solver: A key of `SOLVERS`.
    start: (batch, min(m, n)), where the power iteration for σ_max starts; zeros or
      None for none.

  Returns:
    The update (batch, m, n) and a `Spectrum`. A matrix with a NaN or an infinity
    in it gives an update, and a spectrum, of NaN, and a zero vector.
  """
  wide = matrix.shape[-2] < matrix.shape[-1]
  if wide:
    matrix = matrix.swapaxes(-1, -2)
  finite = jnp.all(jnp.isfinite(matrix), axis=(-2, -1), keepdims=True)
  # The solvers see zeros: not every LAPACK comes back from a NaN.
  matrix = jnp.where(finite, matrix, 0)
  unit, scale = _normalize(matrix, normalize)
  if normalize is None:
    # T acts on σ as it comes. Where its powers would overflow, T(cσ; α, d) is
    # c^(1-α) T(σ; α, d c^-α).
    large, power = jnp.maximum(scale[:, 0, 0], 1), jnp.asarray(alpha, matrix.dtype)
    given = matrix / large[:, None, None]
    gram_matrix = _gram(given)
    update = SOLVERS[solver](given, gram_matrix, alpha, damping * large**-power)
    update *= (large ** (1 - power))[:, None, None]
  else:
    given, gram_matrix = unit, _gram(unit)
    update = SOLVERS[solver](given, gram_matrix, alpha, damping)
  update = jnp.where(finite, update, jnp.nan)
  if start is None:
    start = jnp.zeros(matrix.shape[::2], matrix.dtype)
  unit_gram = gram_matrix if given is unit else _gram(unit)
  spectrum = _spectrum(unit_gram, scale, start)
  finite = finite[:, 0, 0]
  spectrum = Spectrum(
    jnp.where(finite, spectrum.participation_ratio, jnp.nan),
    jnp.where(finite, spectrum.sigma_max, jnp.nan),
    spectrum.sigma_max_vector,
  )
  return update.swapaxes(-1, -2) if wide else update, spectrum


def apply_transfer(
  matrix: ArrayLike,
  *,
  alpha: ArrayLike,
  damping: ArrayLike = 0.1,
  normalize: str | None = 'rms',
  solver: str = 'auto',
) -> jax.Array:
  r"""``U diag(T(σ)) Vᵀ`` with ``T(σ) = σ / (σ^α + d)``, for G = U Σ Vᵀ.

  The pure function under `scale_by_spectral_transfer`; jit, vmap and scan over it,
  over α and over d as you like.

  Args:
    matrix: G, shape (..., m, n); every leading index is a matrix of its own. Any
      real float dtype; bfloat16 and float16 are computed in float32.
    alpha: Curvature exponent α ≥ 0 (not a learning rate); a number, or an array
      that broadcasts against the leading axes. May be traced.
    damping: d ≥ 0, likewise; in units of the normalised ``σ^α``. d = 0 gives
      directions that are there by rounding alone their full weight.
    normalize: What σ is divided by before T: ``"rms"``, the root mean square
      singular value ‖G‖_F / √min(m, n) (default); ``"spectral"``, σ_max;
      ``"frobenius"``, ‖G‖_F; or None, nothing (the published formula). All but
      None make the result independent of the scale of G.
    solver: ``"svd"`` (reference), ``"gram"`` (any α), ``"cholesky"`` (α = 2) or
      ``"auto"`` (default): cholesky for a plain α = 2, else gram.

  Returns:
    Same shape and dtype as `matrix`. Zero for a zero matrix; NaN throughout for a
    matrix that holds a NaN or an infinity.

  Raises:
    ValueError: fewer than two axes, an unknown solver or normalisation, α or d
      negative or not finite, α that does not broadcast, or ``"cholesky"`` with an
      α that is traced or not 2.
    TypeError: complex or integer `matrix`.
  """
  matrix = jnp.asarray(matrix)
  if matrix.ndim < 2:
    raise ValueError(f'matrix must have shape (..., m, n), got {matrix.shape}.')
  if not jnp.issubdtype(matrix.dtype, jnp.floating):
    raise TypeError(f'matrix must be real and floating, got dtype {matrix.dtype}.')
  check_solver(solver, normalize)
  solver = choose_solver(solver, alpha)
  check_hyperparams(solver, alpha, damping)
  batch = matrix.shape[:-2]
  if matrix.size == 0:
    return matrix
  dtype = jnp.promote_types(matrix.dtype, jnp.float32)

  def flat(value, name):
    if jnp.ndim(value) == 0:
      return value
    if jnp.broadcast_shapes(jnp.shape(value), batch) != batch:
      raise ValueError(
        f'{name} of shape {jnp.shape(value)} does not broadcast against the leading'
        f' axes {batch} of a matrix of shape {matrix.shape}.'
      )
    return jnp.broadcast_to(value, batch).reshape(-1)

  update, _ = solve_batch(
    matrix.reshape(-1, *matrix.shape[-2:]).astype(dtype),
    flat(alpha, 'alpha'),
    flat(damping, 'damping'),
    normalize=normalize,
    solver=solver,
  )
  return update.reshape(matrix.shape).astype(matrix.dtype)
