"""Why curvature follows σ_k^α: the Spectral Alignment Decomposition.

A. Calvo, "Spectral Asymptotics of Neural Network Loss Landscapes", arXiv:2606.02596, the
section on the decomposition. The Gauss–Newton curvature of a layer is nearly a Kronecker
product of two second moments, of the errors δ_i at its outputs and of its inputs a_i:

    C_δ = (1/B) Σ_i δ_i δ_iᵀ,      C_A = (1/N) Σ_i a_i a_iᵀ,      H ≈ C_δ ⊗ C_A.

Along the k-th singular direction u_k v_kᵀ of the gradient that is

    h_k^Kron = (u_kᵀ C_δ u_k) (v_kᵀ C_A v_k) = Φ_k Λ_k,
    Λ_k = λ_k(C_δ) λ_k(C_A)                     eigenvalues, in decreasing order
    Φ_k = ρ_k^δ ρ_k^A                           alignment of the two pairs of bases
    ρ_k^δ = u_kᵀ C_δ u_k / λ_k(C_δ),   ρ_k^A = v_kᵀ C_A v_k / λ_k(C_A),

and the exact curvature is h_k = χ_k h_k^Kron, which defines the curvature ratio χ_k. Slopes
against log σ_k of the same points add up:

    α = β + φ + χ,    slopes of log Λ_k, of log Φ_k, and of log χ_k.

The paper states the case β = 2: α = 2 + d log Φ_k / d log σ_k. Everything in here is NumPy in
double precision: small eigenvalues do not survive single precision.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import numpy as np
from jax.typing import ArrayLike

from spectral_optax import layout
from spectral_optax.curvature.capturing import LayerCapture
from spectral_optax.curvature.fits import MIN_POINTS, masked_line
from spectral_optax.curvature.report import CurvatureReport

_NAN = float('nan')

# Fields of a `KroneckerAlignment`: per direction, and slopes on log σ_k.
_VALUES = (
  'sigma',
  'rho_delta',
  'rho_activation',
  'eigenvalues_delta',
  'eigenvalues_activation',
  'phi',
  'eigenvalue_product',
  'h_kronecker',
  'concentration_ratio',
)
_SLOPES = (
  'beta',
  'phi_slope',
  'rho_delta_slope',
  'rho_activation_slope',
  'alpha_kronecker',
  'chi_slope',
  'alpha',
)


@dataclasses.dataclass(frozen=True, eq=False)
class KroneckerAlignment:
  """The decomposition of one matrix: values per direction k = 1..K, and slopes.

  A slope is of a natural logarithm on log σ_k, by least squares over the points `used`: the k
  with σ_k above rounding and with λ_k(C_δ), λ_k(C_A), Φ_k and, where it was given, h_k positive.
  The same points for all of them, so that they add up to rounding.

  Attributes:
    sigma: σ_k of the gradient, (K,).
    rho_delta: ρ_k^δ, on the side of the errors (the columns of the gradient, u_k), (K,).
    rho_activation: ρ_k^A, on the side of the inputs (its rows, v_k), (K,).
    eigenvalues_delta: λ_k(C_δ), decreasing, (K,); 0 where it is rounding.
    eigenvalues_activation: λ_k(C_A), likewise.
    phi: Φ_k, (K,); NaN where an eigenvalue is 0.
    eigenvalue_product: Λ_k, (K,).
    h_kronecker: h_k^Kron, (K,).
    concentration_ratio: ``mean_i[(u_kᵀδ_i)² (v_kᵀa_i)²] / (mean_i[(u_kᵀδ_i)²]
      mean_i[(v_kᵀa_i)²])``, (K,): the mean of products over the product of means. 1 where
      errors do not depend on inputs, which is when the Kronecker product is exact.
    curvature: The exact h_k, (K,), if given.
    curvature_ratio: χ_k, (K,), if h_k was given; negative where h_k is.
    beta: β.
    phi_slope: φ, the slope of log Φ_k: the sum of the next two.
    rho_delta_slope: Of log ρ_k^δ.
    rho_activation_slope: Of log ρ_k^A.
    alpha_kronecker: Of log h_k^Kron, β + φ.
    chi_slope: Of log χ_k; NaN without h_k.
    alpha: Of log h_k, β + φ + the slope of χ; NaN without h_k.
    r_squared: Of the lines of log h_k^Kron on log σ_k ("alpha_kronecker") and, with h_k, of
      log h_k on log σ_k² ("sigma_squared"; on log σ_k it is the same), on log h_k^Kron
      ("kronecker") and, if it was given, on the log of the Gauss–Newton curvature
      ("gauss_newton"; over the points where that is positive as well).
    r_squared_linear: The same of h_k itself on σ_k², h_k^Kron and the Gauss–Newton
      curvature, over all k with σ_k above rounding, whatever the sign of h_k. The few
      largest decide it.
    used: Which k the slopes are of, bool, (K,).
    num_points: How many those are.
    num_zero: How many k have a σ_k, an eigenvalue or a Φ_k of zero, up to rounding.
    num_nonpositive: How many of the others have h_k ≤ 0.
    reason: Why there are no slopes; empty where there are.
  """

  sigma: np.ndarray
  rho_delta: np.ndarray
  rho_activation: np.ndarray
  eigenvalues_delta: np.ndarray
  eigenvalues_activation: np.ndarray
  phi: np.ndarray
  eigenvalue_product: np.ndarray
  h_kronecker: np.ndarray
  concentration_ratio: np.ndarray
  curvature: np.ndarray | None
  curvature_ratio: np.ndarray | None
  beta: float
  phi_slope: float
  rho_delta_slope: float
  rho_activation_slope: float
  alpha_kronecker: float
  chi_slope: float
  alpha: float
  r_squared: Mapping[str, float]
  r_squared_linear: Mapping[str, float]
  used: np.ndarray
  num_points: int
  num_zero: int
  num_nonpositive: int
  reason: str = ''

  def to_dict(self) -> dict[str, Any]:
    """Plain lists, numbers and strings, for JSON; NaN stays NaN."""
    plain = lambda x: x.tolist() if isinstance(x, np.ndarray) else x
    content = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
    mappings = {name: dict(x) for name, x in content.items() if isinstance(x, Mapping)}
    return {**content, **mappings}

  @classmethod
  def from_dict(cls, content: Mapping[str, Any]) -> 'KroneckerAlignment':
    """What `to_dict` gave, with None (as JSON writers put it) read as NaN."""
    number = lambda x: _NAN if x is None else x
    fields: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
      value = content[f.name]
      if f.name == 'used':
        value = np.asarray(value, bool)
      elif isinstance(value, list):
        value = np.array([number(x) for x in value], np.float64)
      elif isinstance(value, Mapping):
        value = {name: number(x) for name, x in value.items()}
      elif f.name not in ('curvature', 'curvature_ratio'):
        value = number(value)
      fields[f.name] = value
    return cls(**fields)


def kronecker_alignment(
  gradient: ArrayLike,
  activations: ArrayLike,
  errors: ArrayLike,
  top_k: int = 20,
  *,
  num_samples: int | None = None,
  curvature: ArrayLike | None = None,
  curvature_gauss_newton: ArrayLike | None = None,
  rank_tolerance: float | None = None,
) -> KroneckerAlignment:
  """Decomposes the curvature along a gradient's singular directions.

  The gradient is as this library sees a matrix, and as Flax stores a kernel: rows are the
  layer's inputs, columns its outputs, the transpose of the paper's G. So its *left*
  singular vectors are the paper's v_k and meet C_A, its *right* ones are u_k and meet C_δ.

  Scale: errors are those of the samples' own losses, *not* divided by their number (as
  `curvature.flax.capture` delivers them), so that with the mean loss
  ``gradient = activationsᵀ errors / num_samples``. With one row for each sample, C_δ and C_A
  are both means, the paper's. With N > B rows, positions of a sequence or patches of an
  image, C_δ is the sum over positions of the mean over samples and C_A the mean over
  both, which is what makes ``C_δ ⊗ C_A`` the curvature where positions do not depend on
  each other. No slope depends on it.

  Args:
    gradient: (n, m), of which the singular directions are taken.
    activations: a_i, (N, n).
    errors: δ_i, (N, m).
    top_k: K, how many directions; at most min(n, m) are there.
    num_samples: B; None for N.
    curvature: Exact h_k along the leading directions of this very gradient, (K,).
    curvature_gauss_newton: Exact curvature of the Gauss–Newton matrix along them, (K,).
    rank_tolerance: Singular values up to this part of the largest count as zero. None for
      what rounding leaves, as in `measure`: max(n, m) times the precision of `gradient`.

  Returns:
    A `KroneckerAlignment`. Its slopes are NaN, with a `reason`, where fewer than
    three points are left, where all σ_k are the same, the gradient is zero or a value is
    not finite (then all values per direction are NaN too).

  Raises:
    ValueError: shapes that do not match; `top_k` or `num_samples` below 1.
    TypeError: complex, integer or traced arrays.
  """
  g, eps = _matrix('gradient', gradient)
  a, _ = _matrix('activations', activations)
  d, _ = _matrix('errors', errors)
  _check_shapes(g, a, d)
  if top_k < 1:
    raise ValueError(f'top_k must be at least 1, got {top_k}.')
  if num_samples is not None and num_samples < 1:
    raise ValueError(f'num_samples must be at least 1, got {num_samples}.')
  rows = len(a)
  samples = rows if num_samples is None else num_samples
  k = min(top_k, *g.shape)
  h = None if curvature is None else _curvature('curvature', curvature, k)
  h_gn = curvature_gauss_newton
  h_gn = None if h_gn is None else _curvature('curvature_gauss_newton', h_gn, k)
  if not all(np.isfinite(x).all() for x in (g, a, d)):
    return _nothing(k, h, 'not finite')
  if not g.any():
    return _nothing(k, h, 'the gradient is zero')
  if not all(np.isfinite(x).all() for x in (h, h_gn) if x is not None):
    return _nothing(k, h, 'not finite')

  left, sigma, right = np.linalg.svd(g, full_matrices=False)
  left, sigma, right = left[:, :k], sigma[:k], right[:k].T
  tolerance = max(g.shape) * eps if rank_tolerance is None else rank_tolerance
  is_direction = sigma > tolerance * sigma[0]  # The others are rounding.
  # (v_kᵀ a_i)² and (u_kᵀ δ_i)², (N, K).
  in_squares, out_squares = (a @ left) ** 2, (d @ right) ** 2
  in_moment = in_squares.sum(0) / rows  # v_kᵀ C_A v_k
  out_moment = out_squares.sum(0) / samples  # u_kᵀ C_δ u_k
  eigenvalues_activation = _leading_eigenvalues(a, k) / rows
  eigenvalues_delta = _leading_eigenvalues(d, k) / samples

  rho_activation = _ratio(in_moment, eigenvalues_activation)
  rho_delta = _ratio(out_moment, eigenvalues_delta)
  phi = rho_delta * rho_activation
  product = eigenvalues_delta * eigenvalues_activation
  h_kron = out_moment * in_moment
  # The scales of C_δ and C_A cancel.
  concentration = _ratio(
    (in_squares * out_squares).mean(0), in_squares.mean(0) * out_squares.mean(0)
  )

  there = is_direction & (product > 0) & (phi > 0)
  used = there if h is None else there & (h > 0)
  chi = None if h is None else _ratio(h, h_kron)
  log_sigma = _log(sigma)
  line = lambda y: masked_line(log_sigma, _log(y), used)
  slope = lambda y: float(line(y).slope)
  parts = {
    'beta': slope(product),
    'phi_slope': slope(phi),
    'rho_delta_slope': slope(rho_delta),
    'rho_activation_slope': slope(rho_activation),
    'alpha_kronecker': slope(h_kron),
    'chi_slope': _NAN if chi is None else slope(chi),
    'alpha': _NAN if h is None else slope(h),
  }
  r_squared = {'alpha_kronecker': float(line(h_kron).r_squared)}
  r_squared_linear = {}
  if h is not None:
    against = {'sigma_squared': sigma**2, 'kronecker': h_kron, 'gauss_newton': h_gn}
    for name, x in against.items():
      if x is None:
        continue
      log = masked_line(_log(x), _log(h), used & (x > 0))
      linear = masked_line(x, h, is_direction)
      r_squared[name] = float(log.r_squared) if log.num_points >= MIN_POINTS else _NAN
      r_squared_linear[name] = float(linear.r_squared) if linear.num_points >= MIN_POINTS else _NAN
  points, reason = int(used.sum()), ''
  if points < MIN_POINTS:
    reason = f'{points} positive points of {k}, fewer than {MIN_POINTS}'
  elif np.ptp(log_sigma[used]) < 16 * eps:
    reason = 'all σ are the same'
  if reason:
    parts, r_squared = dict.fromkeys(parts, _NAN), dict.fromkeys(r_squared, _NAN)
  return KroneckerAlignment(
    sigma=sigma,
    rho_delta=rho_delta,
    rho_activation=rho_activation,
    eigenvalues_delta=eigenvalues_delta,
    eigenvalues_activation=eigenvalues_activation,
    phi=phi,
    eigenvalue_product=product,
    h_kronecker=h_kron,
    concentration_ratio=concentration,
    curvature=h,
    curvature_ratio=chi,
    **parts,
    r_squared=r_squared,
    r_squared_linear=r_squared_linear,
    used=used,
    num_points=points,
    num_zero=int((~there).sum()),
    num_nonpositive=int((there & ~used).sum()),
    reason=reason,
  )


def align_report(
  report: CurvatureReport,
  captured: Mapping[str, LayerCapture],
  *,
  gradients: Any | None = None,
  weight_dimension_numbers: layout.WeightDimNumOrFn | None = None,
) -> CurvatureReport:
  """Adds the decomposition of every captured layer to a report.

  Args:
    report: What `measure` found, of the same parameters.
    captured: What `curvature.flax.capture` or `capture_layers` gave, of the samples that were
      measured, or of some of them.
    gradients: Gradient of the loss that was measured, a tree like the parameters; None
      where `captured` has all samples that were measured, and its own gradient is that.
    weight_dimension_numbers: As handed to `measure`; only for `gradients`.

  Returns:
    The report with `alignment`: by `LayerCurvature.name`, for the layers in `captured`.

  Raises:
    ValueError: the gradient has other singular values than those in the report, so that
      its directions are not those that h_k was measured along; or a captured layer is
      not in the report.
  """
  if unknown := set(captured) - {layer.path for layer in report.layers}:
    raise ValueError(f'{min(unknown)!r} was captured, and is not in the report.')
  if gradients is None:
    matrices = {path: layer.gradient() for path, layer in captured.items()}
    batch_shapes = {path: m.shape[:-2] for path, m in matrices.items()}
  else:
    views = layout.matrix_views(gradients, weight_dimension_numbers)
    leaves = layout.leaves_by_path(gradients)
    matrices = {path: views[path].to_matrices(leaves[path]) for path in captured}
    batch_shapes = {path: views[path].batch_shape for path in captured}
  found = {}
  for layer in report.layers:
    if layer.path not in captured:
      continue
    own = captured[layer.path]
    gradient = np.asarray(matrices[layer.path])
    gradient = gradient.reshape(*batch_shapes[layer.path], *gradient.shape[-2:])[layer.index]
    result = kronecker_alignment(
      gradient,
      np.asarray(own.activations)[layer.index],
      np.asarray(own.errors)[layer.index],
      len(layer.h),
      num_samples=own.num_samples,
      curvature=layer.h,
      curvature_gauss_newton=layer.h_gauss_newton,
      rank_tolerance=report.settings.get('rank_tolerance'),
    )
    measured = np.asarray(layer.sigma)
    if not np.allclose(result.sigma, measured, rtol=1e-2, atol=1e-3 * measured.max(initial=0)):
      raise ValueError(
        f'The gradient of {layer.name!r} has singular values {result.sigma[:3]}..., and the'
        f' report {measured[:3]}...: it was measured on other data. Capture the samples that were'
        ' measured, or pass gradients=, the gradient over all of them.'
      )
    found[layer.name] = result
  return dataclasses.replace(report, alignment=found)


# ---------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------


def _leading_eigenvalues(x: np.ndarray, k: int) -> np.ndarray:
  """The k largest eigenvalues of xᵀx, decreasing, through the smaller side."""
  gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
  values = np.linalg.eigvalsh(gram)[::-1]
  # Rounding, of both signs, beyond the rank.
  values = np.where(values > len(gram) * np.finfo(float).eps * values[0], values, 0)
  return np.concatenate([values, np.zeros(max(0, k - len(values)))])[:k]


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.where(b > 0, a, np.nan) / np.where(b > 0, b, 1)


def _log(x: np.ndarray) -> np.ndarray:
  return np.log(np.where(x > 0, x, 1))


def _nothing(k: int, h: np.ndarray | None, reason: str) -> KroneckerAlignment:
  return KroneckerAlignment(
    **{name: np.full(k, np.nan) for name in _VALUES},
    **dict.fromkeys(_SLOPES, _NAN),
    curvature=h,
    curvature_ratio=None if h is None else np.full(k, np.nan),
    r_squared={},
    r_squared_linear={},
    used=np.zeros(k, bool),
    num_points=0,
    num_zero=0,
    num_nonpositive=0,
    reason=reason,
  )


def _array(name: str, x: ArrayLike) -> np.ndarray:
  if isinstance(x, jax.core.Tracer):
    raise TypeError(
      f'{name} is traced, and this decomposition is not for jitted functions. Return the'
      ' activations and errors from yours (`capture` may be jitted), and decompose outside.'
    )
  x = np.asarray(x)
  if not jax.numpy.issubdtype(x.dtype, jax.numpy.floating):
    raise TypeError(f'{name} must be real floating point numbers, got {x.dtype}.')
  return x


def _matrix(name: str, x: ArrayLike) -> tuple[np.ndarray, float]:
  """In double precision, and the rounding unit it came with."""
  x = _array(name, x)
  if x.ndim != 2 or 0 in x.shape:
    raise ValueError(
      f'{name} must be a matrix with at least one entry, got shape {x.shape}. Stacked layers:'
      ' one matrix after the other.'
    )
  return x.astype(np.float64), float(jax.numpy.finfo(x.dtype).eps)


def _curvature(name: str, h: ArrayLike, k: int) -> np.ndarray:
  h = _array(name, h).astype(np.float64)
  if h.shape != (k,):
    raise ValueError(f'{name} must have shape ({k},), one h for each direction; got {h.shape}.')
  return h


def _check_shapes(g: np.ndarray, a: np.ndarray, d: np.ndarray) -> None:
  if len(a) == len(d) and g.shape == (a.shape[1], d.shape[1]):
    return
  hint = ''
  if g.shape == (d.shape[1], a.shape[1]):
    hint = ' Transpose the gradient: its rows are the inputs of the layer.'
  raise ValueError(
    'gradient (inputs, outputs), activations (rows, inputs) and errors (rows, outputs) do not'
    f' match: {g.shape}, {a.shape}, {d.shape}.{hint}'
  )
