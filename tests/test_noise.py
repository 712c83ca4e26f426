"""`damping="noise"`: the knee of every direction at the noise that the momentum has there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spectral_optax
from spectral_optax import exponents, solvers, transform
from tests import reference

SHAPES = {
  'tall': (24, 16),
  'wide': (16, 40),
  'alike': (24, 16),
  'square': (16, 16),
  'conv': (3, 3, 4, 8),
}
STEPS = 3


@functools.cache
def gradients(scale=1.0):
  """Of four directions that stay, and noise."""
  rng = np.random.default_rng(0)
  shapes = {name: (int(np.prod(shape[:-1])), shape[-1]) for name, shape in SHAPES.items()}
  normal = lambda *shape: rng.standard_normal(shape)
  stays = {name: normal(m, 4) @ normal(4, n) for name, (m, n) in shapes.items()}

  def draw(name):
    x = scale * (stays[name] + normal(*shapes[name]) / 2)
    return {'kernel': jnp.asarray(x.reshape(SHAPES[name]), jnp.float32)}

  return [{name: draw(name) for name in SHAPES} for _ in range(STEPS)]


def trained(tx, grads):
  state = tx.init(grads[0])
  for g in grads:
    updates, state = jax.jit(tx.update)(g, state, g)
  return {name: np.asarray(x['kernel']) for name, x in updates.items()}, state


def expected(name, momentum=0.9, nesterov=True, alpha=1.5, share=1.0):
  """G (GᵀG + NᵀN/m)^-α/2, of eigenvectors, in double precision, to the size of the default.

  `share`: of the noise.
  """
  b, mean = momentum, 0.0
  for t, g in enumerate(gradients()):
    g = np.asarray(g[name]['kernel'], np.float64).reshape(-1, SHAPES[name][-1])
    g = g.T if g.shape[0] < g.shape[1] else g
    before = mean / (1 - b ** max(t, 1))
    mean = b * mean + (1 - b) * g
    ahead = b * mean / (1 - b ** (t + 2)) + (1 - b) * g / (1 - b ** (t + 1))
    ahead = ahead if nesterov else mean / (1 - b ** (t + 1))
  left = b**4 * (1 - b) / (1 + b) + (1 - b**2) ** 2 if nesterov else (1 - b) / (1 + b)
  noise = share * np.sqrt(left * (1 + b) / 2) * (g - before)
  gram = ahead.T @ ahead + noise.T @ noise / len(g)
  values, v = np.linalg.eigh(gram / np.mean(np.diag(gram)))
  update = ahead @ (v / (values ** (alpha / 2) + 0.01**alpha)) @ v.T
  update *= 0.2 / np.sqrt(np.mean(update**2))
  rows, columns = np.prod(SHAPES[name][:-1]), SHAPES[name][-1]
  return (update.T if rows < columns else update).reshape(SHAPES[name])


# Rounding moves a σ by ε σ_max, and T at σ* by that part of σ* at most: 1.2e-7 · 4 / 0.01.
ROUNDING = 5e-5


# Of the whole update, relative: no direction is off by more than T may be.
@pytest.mark.parametrize(
  ('how', 'within'),
  [
    ({}, 0.1),
    ({'solver': 'svd'}, ROUNDING),
    ({'solver': 'svd', 'nesterov': False, 'momentum': 0.7}, ROUNDING),
    ({'solver': 'gram'}, ROUNDING),
    ({'solver': 'rational', 'tolerance': 1e-3}, 1e-3),
    ({'solver': 'polynomial', 'tolerance': 1e-3}, 1e-3),
    ({'solver': 'low_rank', 'rank': 16}, 1e-3),
  ],
)
def test_against_its_formula(how, within):
  tx = spectral_optax.scale_by_spectral_newton(damping='noise', **how)
  # A small tolerance in double precision: Gram matrices round more than that at σ* = 0.01.
  with jax.enable_x64('tolerance' in how):
    found, state = trained(tx, jax.tree.map(lambda x: jnp.asarray(x, float), gradients()))
  numbers = {k: how[k] for k in ('momentum', 'nesterov') if k in how}
  for name in SHAPES:
    assert reference.relative_error(found[name], expected(name, **numbers)) < within, name
    assert np.abs(expected(name, **numbers) - expected(name, **numbers, share=0.0)).max() > 1e-3
  # One exponent in every layer, where the user names none.
  assert {float(a) for a in optax.tree.get(state, 'alpha').values()} == {1.5}


def test_the_exponent_may_be_named():
  found, _ = trained(
    spectral_optax.scale_by_spectral_newton(1.2, 'noise', solver='svd'), gradients()
  )
  for name in SHAPES:
    np.testing.assert_allclose(found[name], expected(name, alpha=1.2), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize('build', ['scale_by_spectral_newton', 'spectral_newton'])
def test_it_is_the_default_of_who_says_nothing_of_the_transfer(build):
  first = () if build == 'scale_by_spectral_newton' else (1.0,)
  make = functools.partial(getattr(spectral_optax, build), *first, solver='svd')
  run = lambda **how: trained(make(**how), gradients())
  found, state = run()
  noisy, _ = run(alpha=1.5, damping='noise')
  jax.tree.map(np.testing.assert_array_equal, found, noisy)
  assert {float(a) for a in optax.tree.get(state, 'alpha').values()} == {1.5}

  # At constant damping, as the transfer alone has it, and where an exponent is named.
  found, state = run(damping='constant')
  alphas = {p: float(a) for p, a in optax.tree.get(state, 'alpha').items()}
  assert alphas == {p: 2.0 if 'conv' in p else 1.5 for p in alphas}
  table, _ = run(
    alpha={'': 1.5, 'conv': 2.0}, damping={'': np.float32(0.008), 'conv': np.float32(0.1)}
  )
  named, _ = run(alpha={'': 1.5, 'conv': 2.0})
  alone = spectral_optax.scale_by_spectral_transfer()
  dampings = optax.tree.get(alone.init(gradients()[0]), 'damping')
  assert {p: float(d) for p, d in dampings.items()} == {
    p: pytest.approx(0.1 if 'conv' in p else 0.008) for p in alphas
  }
  _, state = run(alpha='layer_type')
  assert {float(d) for d in optax.tree.get(state, 'damping').values()} == {np.float32(0.1)}
  for name in SHAPES:
    for other in (table, named):
      np.testing.assert_allclose(found[name], other[name], rtol=0, atol=ROUNDING)
    assert not np.allclose(found[name], noisy[name], rtol=0, atol=1e-3)


def test_both_words_may_be_leaves():
  make = functools.partial(spectral_optax.scale_by_spectral_newton, solver='svd')
  (noisy, _), (constant, _) = (trained(make(damping=d), gradients()) for d in ('noise', 'constant'))
  for exempt in ('conv', 'tall'):
    mixed, state = trained(make(damping={'': 'noise', exempt: 'constant'}), gradients())
    for name in SHAPES:
      want = constant if name == exempt else noisy
      np.testing.assert_allclose(mixed[name], want[name], rtol=0, atol=1e-6)
    alpha = optax.tree.get(state, 'alpha')[f'{exempt}/kernel']
    assert float(alpha) == (2.0 if exempt == 'conv' else 1.5)


def test_who_knows_the_noise_may_say_it():
  g, nothing = gradients()[0], jax.tree.map(jnp.zeros_like, gradients()[0])
  noisy = spectral_optax.spectral_newton(1.0, 1.5, 'noise', solver='svd')
  plain = spectral_optax.spectral_newton(1.0, 1.5, 0.01**1.5, solver='svd')
  want, _ = jax.jit(plain.update)(g, plain.init(g), g)
  update = jax.jit(lambda noise: noisy.update(g, noisy.init(g), g, noise=noise)[0])
  found, other = update(nothing), update(jax.tree.map(lambda x: 5 * x, gradients()[1]))
  for name in SHAPES:
    x = found[name]['kernel']
    np.testing.assert_allclose(x, want[name]['kernel'], rtol=0, atol=ROUNDING)
    assert not np.allclose(x, other[name]['kernel'], rtol=0, atol=0.01)


def test_some_parameters_of_a_shape_may_have_it_and_others_not():
  damping = {'tall': 'noise', 'wide': 0.1, 'alike': 0.1, 'square': 0.1, 'conv': 'noise'}
  build = lambda damping: spectral_optax.spectral_newton(1.0, 1.5, damping, solver='svd')
  mixed, _ = trained(build(damping), gradients())
  plain, _ = trained(build(0.1), gradients())
  noisy, _ = trained(build('noise'), gradients())
  for name, value in damping.items():
    want, other = (noisy, plain) if value == 'noise' else (plain, noisy)
    np.testing.assert_allclose(mixed[name], want[name], rtol=0, atol=1e-6)
    assert not np.allclose(mixed[name], other[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize('nesterov', [True, False])
@pytest.mark.parametrize('momentum', [0.0, 0.6, 0.9])
def test_there_is_as_much_noise_as_the_momentum_leaves(momentum, nesterov):
  """In the long run: noise of every step along an axis of its own, and lengths by Pythagoras."""
  steps = 300
  average = spectral_optax.scale_by_momentum(momentum, nesterov=nesterov)
  step = lambda state, g: (average.update(g, state)[1], None)

  @jax.jit
  def noise_and_average(own):
    state, _ = jax.lax.scan(step, average.init(own[0]), own[:-1])
    noise = transform.noise_in_momentum(own[-1], state, momentum, nesterov)
    return noise, average.update(own[-1], state)[0]

  noise, ahead = noise_and_average(np.eye(steps, dtype=np.float32))
  assert np.linalg.norm(noise) == pytest.approx(np.linalg.norm(ahead), rel=1e-5)


@pytest.mark.parametrize('solver', ['polynomial', 'rational', 'svd'])
@pytest.mark.parametrize('scale', [1e-25, 1e25])
def test_the_scale_of_gradients_does_not_matter(scale, solver):
  tx = spectral_optax.scale_by_spectral_newton(damping='noise', solver=solver)
  (want, _), (found, _) = (trained(tx, gradients(s)) for s in (1.0, scale))
  for name in SHAPES:
    np.testing.assert_allclose(found[name], want[name], rtol=0, atol=1e-4)


def test_bad_gradients_stay_where_they_are():
  tx = spectral_optax.scale_by_spectral_newton(damping='noise')
  clean, _ = trained(tx, gradients())
  bad = [*gradients()[:-1], {**gradients()[-1]}]
  bad[-1]['tall'] = {'kernel': gradients()[-1]['tall']['kernel'].at[2, 3].set(jnp.nan)}
  found, (average, after) = trained(tx, bad)
  assert np.isnan(found['tall']).all()
  for name in ('wide', 'alike', 'square', 'conv'):
    np.testing.assert_allclose(found[name], clean[name], rtol=0, atol=1e-6)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(average))
  unknown = {path for path, sigma in after.sigma_max.items() if np.isnan(sigma)}
  assert unknown == {'tall/kernel'}


def test_the_transfer_alone_is_given_its_noise():
  g, noise = gradients()[0], gradients()[1]
  tx = spectral_optax.scale_by_spectral_transfer(1.5, 'noise', solver='svd')
  updates, _ = jax.jit(tx.update)(g, tx.init(g), noise=noise)
  # The rows of the noise under those of the matrix.
  for name, axis in (('tall', 0), ('wide', 1)):
    x, n = (np.asarray(of[name]['kernel']) for of in (g, noise))
    both = np.concatenate([x, n / np.float32(x.shape[axis] ** 0.5)], axis=axis)
    want = spectral_optax.apply_transfer(both, alpha=1.5, damping=0.01**1.5, solver='svd')
    want = np.split(want, 2, axis=axis)[0]
    np.testing.assert_allclose(updates[name]['kernel'], want, rtol=1e-5, atol=1e-5)
  # Noise that leaves float32 beside a matrix that does not.
  huge = jax.tree.map(lambda x: 1e25 * x, noise)
  polynomial = spectral_optax.scale_by_spectral_transfer(1.5, 'noise', solver='polynomial')
  updates, _ = jax.jit(polynomial.update)(g, polynomial.init(g), noise=huge)
  assert all(np.isfinite(x).all() and np.any(x != 0) for x in jax.tree.leaves(updates))
  with pytest.raises(ValueError, match=r"'tall/kernel' with shape \(24, 16\).*noise="):
    spectral_optax.scale_by_spectral_transfer(
      1.5, {'tall': 'noise', 'wide': 0.1, 'alike': 0.1, 'square': 0.1, 'conv': 0.1}
    ).update(g, tx.init(g))


@pytest.mark.parametrize('backend', ['cpu', 'gpu', 'tpu'])
@pytest.mark.parametrize('small', [128, 1024, 4096])
def test_no_size_is_left_to_eigenvectors(small, backend):
  d = exponents.noise_turn(small).damping(1.5)
  assert solvers.choose_solver('auto', 1.5, d, small, backend=backend) in ('polynomial', 'rational')


@pytest.mark.parametrize('damping', ['nois', {'tall': 'nois', '': 'noise'}])
def test_no_other_word_will_do(damping):
  tx = spectral_optax.spectral_newton(1e-2, damping=damping)
  with pytest.raises(ValueError, match="got 'nois'"):
    tx.init(gradients()[0])


def test_hyperparameters_are_injected_and_exponents_measured():
  g = gradients()[0]
  build = optax.inject_hyperparams(spectral_optax.spectral_newton)
  how = {'damping': 'noise', 'momentum': 0.8, 'solver': 'svd'}
  found, state = trained(build(1.0, **how), gradients())
  want, _ = trained(spectral_optax.spectral_newton(1.0, **how), gradients())
  assert 'momentum' in state.hyperparams
  for name in SHAPES:
    np.testing.assert_allclose(found[name], want[name], rtol=0, atol=ROUNDING)
  measured = spectral_optax.measured_alpha(every=2, top_k=3)
  tx = spectral_optax.spectral_newton(1.0, measured, 'noise')
  state = tx.init(g)
  loss = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))
  update = jax.jit(lambda s: tx.update(g, s, g, value_fn=loss))
  for _ in range(2):
    updates, new = update(state)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    state = new
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
