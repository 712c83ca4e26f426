import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectral_optax
from tests import reference


@pytest.mark.parametrize('alpha', [0, 0.5, 1, 1.3, 2, 4])
@pytest.mark.parametrize('damping', [1e-3, 0.1, 1.0])
def test_is_the_formula(alpha, damping):
  sigma = np.array([[0.0, 1e-6, 1e-3], [0.1, 1.0, 30.0]], np.float32)
  exact = reference.transfer(sigma.astype(np.float64), alpha, damping)
  # A power, a sum, a quotient and a product: a few roundings, one of them scaled by
  # the exponent's logarithm.
  np.testing.assert_allclose(
    spectral_optax.transfer(sigma, alpha, damping), exact, rtol=32 * reference.EPS
  )


def test_broadcasts_over_alpha_and_damping():
  sigma = jnp.linspace(0.1, 2, 5)
  alpha, damping = jnp.array([[0.5], [2.0]]), jnp.full((2, 1), 0.3)
  with jax.numpy_rank_promotion('allow'):
    both = spectral_optax.transfer(sigma, alpha, damping)
  assert both.shape == (2, 5)
  for row, a in zip(both, (0.5, 2.0), strict=True):
    np.testing.assert_allclose(row, spectral_optax.transfer(sigma, a, 0.3), rtol=1e-6)


@pytest.mark.parametrize('alpha', [0, 0.5, 1, 2])
def test_zero_stays_zero_without_damping(alpha):
  values = spectral_optax.transfer(jnp.array([0.0, 1.0]), alpha, 0.0)
  np.testing.assert_array_equal(values, [0.0, 1.0])


def test_turns_over_where_documented():
  # T' = 0 at σ^α (α - 1) = d, and T(σ*) is half of σ* / d at σ* = d^(1/α).
  alpha, damping = 2.0, 0.09
  sigma = jnp.linspace(0.01, 2, 20_000)
  peak = sigma[jnp.argmax(spectral_optax.transfer(sigma, alpha, damping))]
  np.testing.assert_allclose(peak, 0.3, atol=2e-4)
  np.testing.assert_allclose(
    spectral_optax.transfer(0.3, alpha, damping), 0.5 * 0.3 / damping, rtol=1e-6
  )


@pytest.mark.parametrize(
  ('sigma_dtype', 'dtype'),
  [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.bfloat16), (jnp.int32, jnp.float32)],
)
def test_keeps_the_dtype_of_sigma(sigma_dtype, dtype):
  assert spectral_optax.transfer(jnp.ones(3, sigma_dtype), 1.5, 0.1).dtype == dtype


def test_derivative_at_zero_is_one_over_damping():
  slope = jax.grad(spectral_optax.transfer)(0.0, 2.0, 0.1)
  np.testing.assert_allclose(slope, 10.0, rtol=1e-6)


def test_the_function_wins_over_its_module():
  assert callable(spectral_optax.transfer)
