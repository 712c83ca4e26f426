"""The derivative of G ↦ G f(GᵀG), also where singular values repeat.

Differentiating through `eigh` or `svd` divides by the gaps of the spectrum, which
the map itself does not: with GᵀG = V Λ Vᵀ, λ = σ² (Daleckii and Krein),

    d f(GᵀG) = V [ f[λ_i, λ_j] ∘ Vᵀ d(GᵀG) V ] Vᵀ,
    f[λ_i, λ_j] = (f(λ_i) - f(λ_j)) / (λ_i - λ_j), or f'(λ_i) where they meet.

Products only, so it is safe to batch (see `_lapack`).
"""

import jax
import jax.numpy as jnp

from spectral_optax.transfer import transfer_ratio


def _matmul(*factors: jax.Array) -> jax.Array:
  product = factors[0]
  for factor in factors[1:]:
    product = jnp.matmul(product, factor, precision='highest')
  return product


def function_tangent(
    matrix: jax.Array,
    v: jax.Array,
    alpha: jax.Array,
    damping: jax.Array,
    tangents: tuple[jax.Array, jax.Array, jax.Array],
) -> jax.Array:
  """Tangent of ``G f(GᵀG)``, f(σ²) = 1 / (σ^α + d), with respect to G, α and d.

  Args:
    matrix: G, (batch, m, n).
    v: Right singular vectors of G as columns, (batch, n, n).
    alpha: (batch,).
    damping: (batch,).
    tangents: Of `matrix`, `alpha` and `damping`, of their shapes.

  Returns:
    (batch, m, n).
  """
  d_matrix, d_alpha, d_damping = tangents
  transpose = lambda x: x.swapaxes(-1, -2)
  gv = _matmul(matrix, v)
  x = jnp.sum(jnp.square(gv), axis=-2)
  # f' is infinite at 0 for α < 2, but always comes with a factor σ² there.
  x = jnp.maximum(x, jnp.finfo(x.dtype).eps ** 2 * jnp.max(x, axis=-1, keepdims=True))
  x = jnp.where(x > 0, x, 1)
  f = lambda x, alpha, damping: transfer_ratio(jnp.sqrt(x), alpha, damping)
  a, d = alpha[:, None], damping[:, None]
  zeros = jnp.zeros_like
  values, slopes = jax.jvp(f, (x, a, d), (jnp.ones_like(x), zeros(a), zeros(d)))
  by_hyperparams = jax.jvp(f, (x, a, d), (zeros(x), d_alpha[:, None], d_damping[:, None]))[1]

  gap = x[:, :, None] - x[:, None, :]
  near = jnp.abs(gap) <= 1e-3 * (x[:, :, None] + x[:, None, :])
  divided = jnp.where(
      near,
      (slopes[:, :, None] + slopes[:, None, :]) / 2,  # Exact to second order in the gap.
      (values[:, :, None] - values[:, None, :]) / jnp.where(near, 1, gap),
  )
  d_gv = _matmul(d_matrix, v)
  cross = _matmul(transpose(gv), d_gv)
  d_f = divided * (cross + transpose(cross))
  return _matmul(d_gv * values[:, None, :] + gv * by_hyperparams[:, None, :] + _matmul(gv, d_f), transpose(v))
