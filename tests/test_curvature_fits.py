"""Exponents, their uncertainty, rank profiles and participation ratios."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_optax import curvature

K = np.arange(1, 21)

# Singular values of the gradient of a 10-way classifier and the curvature along its singular
# directions, and what was published of them: A. Calvo, arXiv:2606.02596, reproducibility
# package (MIT licence), results_alpha_triangle.json, ResNet-18 "fc" and VGG-11 "classifier.3",
# and results_model_fit_comparison.json. Each row of the gradient adds up to zero, so that the
# tenth singular value is rounding; it was counted.
PUBLISHED = {
  'resnet18 fc': {
    'sigma': [
      *(0.11687444150447845, 0.02386674843728542, 0.01110047660768032, 0.010068415664136410),
      *(0.008375929668545723, 0.006753720343112946, 0.0033991886302828789, 0.0026342060882598162),
      *(0.0010113806929439306, 1.5709117613891067e-08),
    ],
    'h': [
      *(0.81173658, 0.0393092127, 0.0482565126, 0.0839626455, 0.0519560139, 0.00599056452),
      *(0.0270648706, 0.0228188037, 0.00577383017, -4.28525109e-09),
    ],
    'exponents': {'alpha': 0.9173, 'gamma': 3.7190, 's': 1.9578},
    'r_squared': {'alpha': 0.7126, 'gamma': 0.3919, 's': 0.9068},
  },
  'vgg11 classifier.3': {
    'sigma': [
      *(0.0907926261, 0.0599270985, 0.0545227081, 0.0354040563, 0.0234295856, 0.0170292575),
      *(0.0115347439, 0.00970955379, 0.00484734355, 1.37565008e-08),
    ],
    'h': [
      *(0.371123167, 0.113981203, 0.182834743, 0.125001083, 0.0434586017, 0.0181456464),
      *(0.0234934209, 0.0161562922, 0.00901386511, -4.41938541e-09),
    ],
    'exponents': {'alpha': 1.2748, 'gamma': 3.4244, 's': 1.6983},
    'r_squared': {'alpha': 0.9303, 'gamma': 0.2939, 's': 0.9156},
  },
}


def three_fits(sigma, h, **options):
  return {
    'alpha': curvature.fit_alpha(sigma, h, **options),
    'gamma': curvature.fit_gamma(sigma, **options),
    's': curvature.fit_decay(h, **options),
  }


@pytest.fixture
def noisy():
  """A spectrum and a curvature around power laws, in no special order of h."""
  rng = np.random.default_rng(0)
  sigma = np.sort(K**-0.8 * np.exp(0.1 * rng.normal(size=20)))[::-1]
  return sigma, 3 * sigma**1.7 * np.exp(0.3 * rng.normal(size=20))


# ---------------------------------------------------------------------------------
# Conventions
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_exponents(name):
  published = PUBLISHED[name]
  fits = three_fits(published['sigma'], published['h'])
  for key, fit in fits.items():
    assert fit.exponent == pytest.approx(published['exponents'][key], abs=1e-3)
    assert fit.r_squared == pytest.approx(published['r_squared'][key], abs=1e-3)
  assert fits['alpha'].num_points == 9
  assert fits['gamma'].num_points == 10
  assert curvature.rank_profile(published['sigma']).best == 'exponential'


@pytest.mark.parametrize('name', PUBLISHED)
def test_transfer_law_of_a_head_fails_by_a_singular_value_of_rounding(name):
  sigma, h = PUBLISHED[name]['sigma'], PUBLISHED[name]['h']
  error = lambda f: (
    abs(f['s'].exponent - f['alpha'].exponent * f['gamma'].exponent) / (f['s'].exponent)
  )
  assert error(three_fits(sigma, h)) > 0.7
  assert error(three_fits(sigma[:-1], h[:-1])) < 0.15


@pytest.mark.parametrize(('alpha', 'gamma'), [(2.0, 0.8), (0.85, 1.3), (1.5, 0.3), (4.0, 1.0)])
def test_exact_power_laws(alpha, gamma):
  sigma = 0.3 * K**-gamma
  h = 7 * sigma**alpha
  fits = three_fits(sigma, np.random.default_rng(0).permutation(h))
  fits['alpha'] = curvature.fit_alpha(sigma, h)
  expected = {
    'alpha': (alpha, np.log(7)),
    'gamma': (gamma, np.log(0.3)),
    's': (alpha * gamma, np.log(7 * 0.3**alpha)),
  }
  for name, fit in fits.items():
    assert (fit.exponent, fit.log_constant) == pytest.approx(expected[name], rel=1e-10)
    assert fit.r_squared == pytest.approx(1, abs=1e-12)
    assert fit.standard_error < 1e-6
    assert fit.num_points == 20
    assert fit.reason == ''
    assert np.isnan(fit.interval).all()


def test_least_squares_and_its_standard_error(noisy):
  sigma, h = noisy
  fit = curvature.fit_alpha(sigma, h)
  (slope, intercept), covariance = np.polyfit(np.log(sigma), np.log(h), 1, cov='unscaled')
  residual = np.log(h) - intercept - slope * np.log(sigma)
  assert fit.exponent == pytest.approx(slope, rel=1e-9)
  assert fit.log_constant == pytest.approx(intercept, rel=1e-9)
  assert fit.r_squared == pytest.approx(1 - residual.var() / np.log(h).var(), rel=1e-9)
  variance = covariance[0, 0] * np.sum(residual**2) / (20 - 2)
  assert fit.standard_error == pytest.approx(np.sqrt(variance), rel=1e-9)


def test_what_is_not_positive_stays_out(noisy):
  sigma, h = noisy
  holes = h.copy()
  holes[[2, 7, 11]] = [-5.0, 0.0, -1e-9]
  there = holes > 0
  zeros = np.concatenate([sigma, np.zeros(4)])
  for fit, expected in (
    (curvature.fit_alpha(sigma, holes), curvature.fit_alpha(sigma[there], h[there])),
    (curvature.fit_decay(holes), curvature.fit_decay(h[there])),
    (curvature.fit_gamma(zeros), curvature.fit_gamma(sigma)),
  ):
    assert fit[:5] == pytest.approx(expected[:5], rel=1e-12)
  assert curvature.rank_profile(zeros) == curvature.rank_profile(sigma)


def test_accepts_jax_arrays_in_half_precision():
  sigma = jnp.asarray(2.0 ** -np.arange(6), jnp.bfloat16)
  assert curvature.fit_alpha(sigma, sigma**2).exponent == pytest.approx(2, rel=1e-12)


# ---------------------------------------------------------------------------------
# No fit
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('sigma', 'h', 'reason', 'points'),
  [
    ([3.0, 2, 1, 0.5], [1.0, -1, 2, -3], '2 positive points of 4', 2),
    ([3.0, 2, 1], [-1.0, -1, -2], '0 positive points of 3', 0),
    ([0.0, 0, 0], [1.0, 2, 3], '0 positive points of 3', 0),
    ([], [], '0 positive points of 0', 0),
    ([2.0, 2, 2, 2], [1.0, 2, 3, 4], 'same', 4),
    ([3.0, 2, 1, np.nan], [1.0, 2, 3, 4], 'not finite', 3),
    ([3.0, 2, 1, 0.5], [1.0, 2, np.inf, 4], 'not finite', 3),
    ([np.inf, 2, 1, 0.5], [1.0, 2, 3, 4], 'not finite', 3),
  ],
)
def test_no_fit_is_nan_and_a_reason(sigma, h, reason, points):
  fit = curvature.fit_alpha(sigma, h, bootstrap=10)
  assert reason in fit.reason
  assert np.isnan([*fit[:3], fit.standard_error, *fit.interval]).all()
  assert fit.num_points == points


def test_no_gamma_and_no_decay():
  assert 'fewer than 3' in curvature.fit_gamma([1.0, 0.5, 0]).reason
  assert 'fewer than 3' in curvature.fit_decay([1.0, -2, 0.5]).reason
  assert np.isnan(curvature.fit_decay([1.0, np.nan, 2, 3]).exponent)
  assert 'fewer than 5' in curvature.fit_gamma([4.0, 3, 2, 1], min_points=5).reason
  few = curvature.rank_profile([3.0, 2, 1, 0])
  assert (few.best, few.bic, few.num_points) == ('', {}, 3)
  assert 'fewer than 4' in few.reason
  assert curvature.rank_profile([np.inf, 3, 2, 1]).reason == 'not finite'


@pytest.mark.parametrize(
  ('call', 'error', 'message'),
  [
    (lambda: curvature.fit_alpha([1.0, 2], [1.0]), ValueError, 'one h for each'),
    (lambda: curvature.fit_alpha([1.0, -2, 1], [1.0, 1, 1]), ValueError, 'negative, got -2'),
    (lambda: curvature.fit_gamma([1.0, 2, 3]), ValueError, 'decreasing order'),
    (lambda: curvature.rank_profile([1.0, 2, 3]), ValueError, 'decreasing order'),
    (lambda: curvature.fit_decay(np.ones((2, 3))), ValueError, 'one axis'),
    (lambda: curvature.fit_decay(np.ones(3) * 1j), TypeError, 'must be real'),
    (lambda: curvature.fit_decay(np.ones(3), min_points=1), ValueError, 'at least 2'),
    (lambda: curvature.fit_gamma([3.0, 2, 1], bootstrap=5, level=1.0), ValueError, 'level'),
    (lambda: curvature.participation_ratio([1.0, -1]), ValueError, 'negative'),
    (lambda: jax.jit(curvature.fit_decay)(jnp.ones(3)), TypeError, 'masked_power_law'),
  ],
)
def test_bad_arguments(call, error, message):
  with pytest.raises(error, match=message):
    call()


# ---------------------------------------------------------------------------------
# Bootstrap
# ---------------------------------------------------------------------------------


def test_bootstrap_is_seeded_and_levels_are_nested(noisy):
  fit = lambda **options: curvature.fit_alpha(*noisy, bootstrap=400, **options)
  first, low = fit(seed=1), fit(seed=1, level=0.5)
  assert first == fit(seed=1)
  assert first.interval != fit(seed=2).interval
  assert first._replace(interval=()) == curvature.fit_alpha(*noisy)._replace(interval=())
  assert first.interval[0] < low.interval[0] < first.exponent < low.interval[1] < first.interval[1]
  # Near what the residuals say, for independent points: 2 * 1.96 standard errors.
  width = first.interval[1] - first.interval[0]
  assert 0.6 < width / (3.92 * first.standard_error) < 1.4
  for f in (curvature.fit_gamma, curvature.fit_decay):
    spectrum = f(noisy[0], bootstrap=100)
    assert spectrum.interval[0] < spectrum.exponent < spectrum.interval[1]


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
  rng = np.random.default_rng(3)
  sigma, hits = K**-1.0, 0
  for trial in range(200):
    h = sigma**2 * np.exp(0.5 * rng.normal(size=20))
    low, high = curvature.fit_alpha(sigma, h, bootstrap=200, level=0.9, seed=trial).interval
    hits += low < 2 < high
  # 0.9 ± four standard deviations of a binomial, and a small sample's bias downwards.
  assert 0.78 < hits / 200 < 0.985


def test_bootstrap_survives_draws_of_one_point():
  # Of three points, one draw in nine has no slope.
  fit = curvature.fit_alpha([3.0, 2, 1], [9.0, 4, 1], bootstrap=200)
  assert fit.interval == pytest.approx((2, 2), rel=1e-6)


# ---------------------------------------------------------------------------------
# Inside jit
# ---------------------------------------------------------------------------------


def test_masked_line_is_the_same_jitted_batched_and_with_rubbish_outside(noisy):
  x, y = (np.log(a) for a in noisy)
  masks = np.stack([np.ones(20, bool), K % 2 == 0, K <= 2, K <= 1, K <= 0])
  fits = [np.polyfit(x[m], y[m], 1) for m in masks[:3]]
  rubbish = np.where(masks, y, [[np.nan], [np.inf], [np.nan], [-np.inf], [np.nan]])
  reference = curvature.masked_line(np.tile(x, (5, 1)), rubbish, masks)
  assert isinstance(reference.slope, np.ndarray)
  np.testing.assert_allclose(reference.slope, [*(f[0] for f in fits), np.nan, np.nan], rtol=1e-9)
  np.testing.assert_allclose(reference.intercept[:3], [f[1] for f in fits], rtol=1e-9)
  np.testing.assert_array_equal(reference.num_points, [20, 10, 2, 1, 0])
  assert np.isnan(reference.standard_error[2:]).all()

  x32, y32 = jnp.asarray(np.tile(x, (5, 1)), jnp.float32), jnp.asarray(rubbish, jnp.float32)
  jitted = jax.jit(curvature.masked_line)(x32, y32, masks)
  mapped = jax.vmap(curvature.masked_line)(x32, y32, jnp.asarray(masks))
  for name in curvature.Line._fields:
    wanted = getattr(reference, name)
    # Residuals of a line through two points are rounding.
    np.testing.assert_allclose(getattr(jitted, name), wanted, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(getattr(mapped, name), getattr(jitted, name), rtol=1e-6, atol=1e-6)


def test_masked_power_law_in_a_jitted_function(noisy):
  sigma, h = noisy
  h = np.where(K == 4, -h, h)
  line = jax.jit(curvature.masked_power_law)(jnp.asarray(sigma), jnp.asarray(h))
  fit = curvature.fit_alpha(sigma, h)
  expected = (fit.exponent, fit.log_constant, fit.r_squared, 19, fit.standard_error)
  np.testing.assert_allclose(line, expected, rtol=1e-5)

  # Where the mask hides them, numbers that are not there do no harm; where not, no fit.
  broken = jnp.asarray(h).at[6].set(jnp.nan)
  seen = jax.jit(curvature.masked_power_law)(jnp.asarray(sigma), broken)
  assert np.isnan([x for name, x in seen._asdict().items() if name != 'num_points']).all()
  assert seen.num_points == 18
  hidden = curvature.masked_power_law(sigma, broken, jnp.arange(20) != 6)
  there = (K != 7) & (h > 0)
  assert hidden.slope == pytest.approx(curvature.fit_alpha(sigma[there], h[there]).exponent, 1e-4)


# ---------------------------------------------------------------------------------
# Spectra
# ---------------------------------------------------------------------------------

SPECTRA = {
  'power_law': 2 * K**-0.9,
  'exponential': 2 * np.exp(-0.2 * K),
  'lognormal': 2 * np.exp(-0.3 * np.log(K) - 0.4 * np.log(K) ** 2),
}
COEFFICIENTS = {
  'power_law': (np.log(2), -0.9),
  'exponential': (np.log(2), -0.2),
  'lognormal': (np.log(2), -0.3, -0.4),
}


@pytest.mark.parametrize('noise', [0, 0.02])
@pytest.mark.parametrize('name', SPECTRA)
def test_rank_profile_finds_the_model(name, noise):
  rng = np.random.default_rng(1)
  sigma = np.sort(SPECTRA[name] * np.exp(noise * rng.normal(size=20)))[::-1]
  found = curvature.rank_profile(sigma)
  # The log-normal holds the power law: only the penalty decides.
  assert found.best == name
  assert found.coefficients[name] == pytest.approx(COEFFICIENTS[name], abs=1e-10 + 4 * noise)
  assert found.r_squared[name] == pytest.approx(1, abs=1e-10 + noise)
  assert found.num_points == 20


def test_bic():
  sigma = SPECTRA['power_law'] * np.exp(0.1 * np.cos(K))
  y = np.log(sigma := np.sort(sigma)[::-1])
  found = curvature.rank_profile(sigma)
  for name, x, degree in (
    ('power_law', np.log(K), 1),
    ('exponential', K, 1),
    ('lognormal', np.log(K), 2),
  ):
    rss = np.sum((y - np.polyval(np.polyfit(x, y, degree), x)) ** 2)
    expected = 20 * np.log(rss / 20) + (degree + 1) * np.log(20)
    assert found.bic[name] == pytest.approx(expected, rel=1e-9)
    assert found.r_squared[name] == pytest.approx(1 - rss / np.sum((y - y.mean()) ** 2), rel=1e-9)


def test_participation_ratio():
  assert curvature.participation_ratio(np.full(7, 3.0)) == pytest.approx(7)
  assert curvature.participation_ratio([0.0, 5, 0]) == pytest.approx(1)
  assert curvature.participation_ratio([2.0, 1]) == pytest.approx(9 / 5)
  assert curvature.participation_ratio([2e-250, 1e-250]) == pytest.approx(9 / 5)
  for nothing in ([], [0.0, 0], [1.0, np.nan], [1.0, np.inf]):
    assert np.isnan(curvature.participation_ratio(nothing))


def test_participation_bound():
  bound = curvature.participation_bound
  # ζ(2)² / ζ(4) = (π² / 6)² / (π⁴ / 90).
  assert bound(2.0, 1.0) == pytest.approx(2.5, rel=1e-5)
  assert bound(40.0, 1.0) == pytest.approx(1, rel=1e-5)
  np.testing.assert_array_equal(bound(jnp.array([1.0, 0.5, -1]), 1.0), np.inf)
  assert np.isnan(bound(np.nan, 1.0))
  np.testing.assert_allclose(
    jax.jit(bound)(jnp.array([2.0, 4]), jnp.array([1.0, 0.5])), 2.5, rtol=1e-5
  )
  # A power law of few values stays below it, one of many comes near.
  for exponent in (1.5, 2.0, 3.0):
    few, many = (np.arange(1, n + 1) ** -exponent for n in (20, 1_000_000))
    limit = float(bound(exponent, 1.0))
    assert curvature.participation_ratio(few) < limit
    assert curvature.participation_ratio(many) == pytest.approx(limit, rel=3e-3)
