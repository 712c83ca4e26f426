"""The map in float64 NumPy, straight from its definition, and what float32 costs."""

import numpy as np

EPS = float(np.finfo(np.float32).eps)


def size(g: np.ndarray, normalize: str | None) -> float:
  sigma = np.linalg.svd(np.asarray(g, np.float64), compute_uv=False)
  return {
    'rms': np.sqrt(np.mean(sigma**2)),
    'spectral': sigma[0],
    'frobenius': np.sqrt(np.sum(sigma**2)),
    None: 1.0,
  }[normalize] or 1.0


def transfer(sigma, alpha, damping):
  with np.errstate(divide='ignore', invalid='ignore'):
    return np.where(sigma > 0, sigma / (sigma**alpha + damping), 0.0)


def update(g, alpha, damping, normalize: str | None = 'rms') -> np.ndarray:
  """U T(Σ / size) Vᵀ of one matrix."""
  g = np.asarray(g, np.float64)
  u, sigma, vt = np.linalg.svd(g / size(g, normalize), full_matrices=False)
  return u * transfer(sigma, alpha, damping) @ vt


def relative_error(value, exact) -> float:
  return float(np.linalg.norm(np.asarray(value, np.float64) - exact) / np.linalg.norm(exact))


def _of_norm(e: np.ndarray, norm: float) -> np.ndarray:
  return e * (norm / np.linalg.norm(e, 2))


def cost_of_rounding(g, alpha, damping, of_gram: bool, draws: int = 3) -> float:
  """Relative change of the exact update when its input is rounded to float32.

  A random matrix of norm ε σ_max is added to G, or one of norm ε σ_max² to GᵀG, for
  a method that starts from there. The largest of a few draws.
  """
  rng = np.random.default_rng(0)
  g = np.asarray(g, np.float64)
  g = g / size(g, 'rms')
  exact = update(g, alpha, damping, None)
  if g.shape[0] < g.shape[1]:
    g, exact = g.T, exact.T
  sigma_max = np.linalg.norm(g, 2)
  costs = []
  for _ in range(draws):
    if of_gram:
      e = rng.standard_normal((g.shape[1],) * 2)
      values, v = np.linalg.eigh(g.T @ g + _of_norm(e + e.T, EPS * sigma_max**2))
      f = 1 / (np.maximum(values, 0) ** (alpha / 2) + damping)
      moved = g @ (v * f) @ v.T
    else:
      moved = update(
        g + _of_norm(rng.standard_normal(g.shape), EPS * sigma_max), alpha, damping, None
      )
    costs.append(relative_error(moved, exact))
  return max(costs)


def matrices() -> dict[str, np.ndarray]:
  """float32 matrices that between them have everything that goes wrong."""
  rng = np.random.default_rng(1)

  def orthogonal(m, n):
    return np.linalg.qr(rng.standard_normal((m, n)))[0]

  def with_spectrum(m, n, sigma):
    k = min(m, n)
    return orthogonal(m, k) * np.asarray(sigma) @ orthogonal(n, k).T

  rank_3 = rng.standard_normal((40, 3)) @ rng.standard_normal((3, 24))
  cases = {
    'tall': rng.standard_normal((64, 20)),
    'wide': rng.standard_normal((20, 64)),
    'square': rng.standard_normal((32, 32)),
    'row': rng.standard_normal((1, 17)),
    'column': rng.standard_normal((17, 1)),
    'one by one': rng.standard_normal((1, 1)),
    'rank deficient': rank_3,
    'rank deficient, wide': rank_3.T,
    'repeated': with_spectrum(30, 18, np.repeat([3.0, 1.0, 0.1], 6)),
    'orthogonal': orthogonal(24, 24),
    'condition 1e6': with_spectrum(40, 24, np.logspace(0, -6, 24)),
    'condition 1e6, wide': with_spectrum(16, 48, np.logspace(0, -6, 16)),
  }
  return {name: g.astype(np.float32) for name, g in cases.items()}
