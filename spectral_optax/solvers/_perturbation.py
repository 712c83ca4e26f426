"""First-order perturbation of f(A), A symmetric, also where eigenvalues repeat.

With A = V Λ Vᵀ (Daleckii and Krein),

    d f(A) = V [ f[λ_i, λ_j] ∘ Vᵀ dA V ] Vᵀ,
    f[λ_i, λ_j] = (f(λ_i) - f(λ_j)) / (λ_i - λ_j), or f'(λ_i) where they meet.

Eigenvectors move by dA over the gaps of the spectrum, f(A) does not: this is how the
map is differentiated, and how the rounding of an eigendecomposition is taken back.
Products only, so it is safe to batch (see `_lapack`).
"""

import jax
import jax.numpy as jnp

from spectral_optax.transfer import transfer_ratio


def product(*factors: jax.Array) -> jax.Array:
  """Matrix product in full precision, also where the default is bfloat16."""
  result = factors[0]
  for factor in factors[1:]:
    result = jnp.matmul(result, factor, precision='highest')
  return result


def transpose(x: jax.Array) -> jax.Array:
  """Of each matrix of a batch."""
  return x.swapaxes(-1, -2)


def _floored(x: jax.Array) -> jax.Array:
  # f' is infinite at 0 for α < 2, but always comes with a factor λ there.
  x = jnp.maximum(x, jnp.finfo(x.dtype).eps ** 2 * jnp.max(x, axis=-1, keepdims=True))
  return jnp.where(x > 0, x, 1)


def _ratio(x: jax.Array, alpha: jax.Array, damping: jax.Array) -> jax.Array:
  """f(λ) = 1 / (λ^(α/2) + d)."""
  return transfer_ratio(jnp.sqrt(x), alpha, damping)


def divided_differences(x: jax.Array, alpha: jax.Array, damping: jax.Array) -> jax.Array:
  """f[λ_i, λ_j] of f(λ) = 1 / (λ^(α/2) + d).

  Args:
    x: λ ≥ 0, (batch, n).
    alpha: (batch, 1).
    damping: (batch, 1).

  Returns:
    (batch, n, n).
  """
  x = _floored(x)
  values, slopes = jax.jvp(lambda x: _ratio(x, alpha, damping), (x,), (jnp.ones_like(x),))
  gap = x[:, :, None] - x[:, None, :]
  near = jnp.abs(gap) <= 1e-3 * (x[:, :, None] + x[:, None, :])
  return jnp.where(
    near,
    (slopes[:, :, None] + slopes[:, None, :]) / 2,  # Exact to second order in the gap.
    (values[:, :, None] - values[:, None, :]) / jnp.where(near, 1, gap),
  )


def function_tangent(
  matrix: jax.Array,
  v: jax.Array,
  alpha: jax.Array,
  damping: jax.Array,
  tangents: tuple[jax.Array, jax.Array, jax.Array],
) -> jax.Array:
  """Tangent of ``G f(GᵀG)``, f(λ) = 1 / (λ^(α/2) + d), with respect to G, α and d.

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
  alpha, damping = alpha[:, None], damping[:, None]
  gv, d_gv = product(matrix, v), product(d_matrix, v)
  x = jnp.sum(jnp.square(gv), axis=-2)
  values, d_values = jax.jvp(
    lambda alpha, damping: _ratio(_floored(x), alpha, damping),
    (alpha, damping),
    (d_alpha[:, None], d_damping[:, None]),
  )
  cross = product(transpose(gv), d_gv)
  d_f = divided_differences(x, alpha, damping) * (cross + transpose(cross))
  return product(
    d_gv * values[:, None, :] + gv * d_values[:, None, :] + product(gv, d_f), transpose(v)
  )
