"""The scalar map T: what becomes of one singular value.

Spectral Newton replaces the momentum ``G = U Σ Vᵀ`` by ``U diag(T(σ)) Vᵀ`` with

    T(σ; α) = σ / (σ^α + d)

where α is the layer's curvature exponent (the loss curvature along the k-th
singular direction of the gradient grows like ``σ_k^α``) and d a damping.
Source: A. Calvo, "Spectral Asymptotics of Neural Network Loss Landscapes",
arXiv:2606.02596, the section on Spectral Newton.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def transfer(sigma: ArrayLike, alpha: ArrayLike, damping: ArrayLike) -> jax.Array:
  """``T(σ; α) = σ / (σ^α + d)``, element by element.

  T rises like ``σ / d`` from zero and turns over at ``σ* = d^(1/α)``. α = 0 is
  gradient descent, α = 1 with d → 0 is orthogonalisation (Muon), α = 2 a damped
  Newton step, and every α > 1 holds back large singular values.

  Args:
    sigma: Singular values (σ ≥ 0), any shape, in the units in which `damping` is
      meant. Integers are promoted to the default float type.
    alpha: Curvature exponent α ≥ 0 (not a learning rate), broadcast against
      `sigma`.
    damping: d ≥ 0 in units of ``σ^α``, broadcast against `sigma`.

  Returns:
    T(σ), of the broadcast shape. T(0) = 0 for every α and d, also d = 0.
  """
  sigma, alpha, damping = jnp.broadcast_arrays(*(jnp.asarray(x) for x in (sigma, alpha, damping)))
  dtype = jnp.promote_types(jnp.result_type(sigma, alpha, damping), jnp.bfloat16)
  sigma, alpha, damping = (x.astype(dtype) for x in (sigma, alpha, damping))
  return sigma * transfer_ratio(sigma, alpha, damping)


def transfer_ratio(sigma: jax.Array, alpha: ArrayLike, damping: ArrayLike) -> jax.Array:
  """``T(σ) / σ = 1 / (σ^α + d)``: the factor a matrix method multiplies G with.

  Zero where the denominator is zero (σ = d = 0), so that a direction that is not
  there stays out instead of becoming 0 · ∞.
  """
  denominator = sigma**alpha + damping
  vanishes = denominator == 0
  return jnp.where(vanishes, 0, 1 / jnp.where(vanishes, 1, denominator))
