"""Exact curvature along directions, against dense Hessians in double precision."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spectral_optax import curvature, layout
from spectral_optax.curvature import directional

COUNT = 4


def network(params, x):
  """A convolution, a stack of layers that is scanned, a kernel of three axes, and a head."""
  (conv, stack, proj, dense, head) = (
    params[k] for k in ('conv', 'layers', 'dense_in', 'dense', 'head')
  )
  dimensions = ('NHWC', 'HWIO', 'NHWC')
  x = jax.lax.conv_general_dilated(x, conv['kernel'], (1, 1), 'VALID', dimension_numbers=dimensions)
  x = jnp.tanh(x + conv['bias'][None, None, None]).reshape(len(x), -1)
  x, _ = jax.lax.scan(
    lambda x, w: (x + jnp.tanh(x @ w['kernel'] + w['bias'][None]), None), x, stack
  )
  x = jnp.einsum('bhk,hkd->bd', x.reshape(-1, 2, 4), proj['kernel']) + proj['bias'][None]
  x = jax.nn.silu(x @ dense['kernel'])
  return x @ head['kernel']


def cross_entropy(logits, labels):
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def loss_fn(params, batch):
  return cross_entropy(network(params, batch[0]), batch[1])


def make(seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape) / 3
  params = {
    'conv': {'kernel': normal(2, 2, 2, 2), 'bias': normal(2)},
    'layers': {'kernel': normal(3, 8, 8), 'bias': normal(3, 8)},
    'dense_in': {'kernel': normal(2, 4, 5), 'bias': normal(5)},
    'dense': {'kernel': normal(5, 5)},
    'head': {'kernel': normal(5, 5)},
  }
  batch = rng.normal(size=(12, 3, 3, 2)), rng.integers(0, 5, 12)
  return params, batch


def make_directions(params, seed=1):
  rng = np.random.default_rng(seed)
  directions = {}
  for path, view in layout.matrix_views(params).items():
    matrices = int(np.prod(view.batch_shape))
    u = rng.normal(size=(matrices, COUNT, view.rows))
    v = rng.normal(size=(matrices, COUNT, view.columns))
    directions[path] = tuple(x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (u, v))
  return directions


def dense_curvature(function, params, path, directions):
  """vec(u vᵀ)ᵀ H vec(u vᵀ), with the whole Hessian of one layer, in double precision."""
  view = layout.matrix_views(params)[path]
  name, leaf = path.split('/')

  def of_matrices(matrices):
    replaced = {**params, name: {**params[name], leaf: view.from_matrices(matrices)}}
    return function(replaced)

  matrices = view.to_matrices(jnp.asarray(params[name][leaf]))
  u, v = directions[path]
  of_one = jax.jit(jax.hessian(lambda m, i: of_matrices(matrices.at[i].set(m))))
  hessians = np.stack([of_one(matrix, i) for i, matrix in enumerate(matrices)])
  return np.einsum('lka,lkb,labcd,lkc,lkd->lk', u, v, hessians, u, v, optimize=True)


@functools.cache
def case(dtype):
  """The parameters and directions in this precision, and what is true of exactly these."""
  params, (x, y) = make()
  directions = make_directions(params)
  params, directions, x = jax.tree.map(lambda a: np.asarray(a, dtype), (params, directions, x))
  with jax.enable_x64(True):
    exact = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, directions, x))
    of = lambda params: loss_fn(params, (exact[2], jnp.asarray(y)))
    true = {path: dense_curvature(of, exact[0], path, exact[1]) for path in directions}
  return params, directions, (x, y), true


def assert_close(found, true, rtol):
  """To a part of the largest of each layer: h is a sum of both signs, small by cancellation."""
  assert found.keys() == true.keys()
  for path, h in found.items():
    assert h.dtype == np.float64
    np.testing.assert_allclose(h, true[path], rtol=0, atol=rtol * abs(true[path]).max())


HOW = [
  {'method': 'forward'},
  {'method': 'reverse'},
  {'method': 'forward', 'group_by': 'shape'},
  {'method': 'reverse', 'group_by': 'shape'},
]


@pytest.mark.parametrize('how', HOW, ids=lambda how: ' by '.join(how.values()))
def test_against_a_dense_hessian(how):
  params, directions, batch, true = case('float32')
  assert any((h < 0).any() for h in true.values())  # Negative ones are kept.
  found, nothing = curvature.directional_curvature(
    loss_fn, params, directions, batches=[batch], **how
  )
  assert_close(found, true, 1e-5)
  assert nothing is None
  # The stack has a row for each of its layers.
  assert found['layers/kernel'].shape == (3, COUNT)


@pytest.mark.parametrize('how', HOW, ids=lambda how: ' by '.join(how.values()))
def test_against_a_dense_hessian_in_double_precision(how, x64):
  del x64
  params, directions, batch, true = case('float64')
  found, _ = curvature.directional_curvature(loss_fn, params, directions, batches=[batch], **how)
  assert_close(found, true, 1e-10)


def test_gauss_newton_against_a_dense_one():
  params, directions, (x, y), _ = case('float32')
  f = lambda params, batch: network(params, batch[0])
  c = lambda logits, batch: cross_entropy(logits, batch[1])
  exact, found = curvature.directional_curvature(
    loss_fn, params, directions, batches=[(x, y)], gauss_newton=(f, c)
  )
  with jax.enable_x64(True):
    high = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, directions, x))
    # The network to first order around where it is: its Hessian is Gauss-Newton's.
    base, slope = jax.linearize(lambda p: network(p, high[2]), high[0])

    def linearised(p):
      return cross_entropy(base + slope(jax.tree.map(jnp.subtract, p, high[0])), y)

    true = {path: dense_curvature(linearised, high[0], path, high[1]) for path in directions}
  assert_close(found, true, 1e-5)
  assert all((h > 0).all() for h in found.values())
  # The last layer is linear in its weights, any other is not.
  np.testing.assert_allclose(exact['head/kernel'], found['head/kernel'], rtol=1e-5)
  assert not np.allclose(exact['conv/kernel'], found['conv/kernel'], rtol=0.1)


# ---------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------


def test_mean_over_batches():
  params, directions, (x, y), _ = case('float32')
  directions = {path: directions[path] for path in ('layers/kernel', 'head/kernel')}
  measure = functools.partial(curvature.directional_curvature, loss_fn, params, directions)
  whole = measure(batches=[(x, y)])[0]
  thirds = [(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)]
  ragged = [(x[:8], y[:8]), (x[8:], y[8:])]
  for batches, weights in (
    (thirds, None),
    (lambda: iter(thirds), None),
    (ragged, [8, 4]),
    ([*thirds, thirds[0]], [1.0, 1, 1, 0]),
  ):
    found = measure(batches=batches, weights=weights)[0]
    for path in directions:
      np.testing.assert_allclose(found[path], whole[path], rtol=1e-5, atol=1e-6)
  # Without batches it is a function of the parameters alone.
  closed = curvature.directional_curvature(lambda p: loss_fn(p, (x, y)), params, directions)[0]
  np.testing.assert_allclose(closed['head/kernel'], whole['head/kernel'], rtol=1e-6)


def test_nothing_is_compiled_again_for_the_same_function():
  params, directions, batch, _ = case('float32')
  calls = []

  def counted(params, batch):
    calls.append(1)
    return loss_fn(params, batch)

  some = {'head/kernel': directions['head/kernel']}
  first = curvature.directional_curvature(counted, params, some, batches=[batch])[0]
  traced = len(calls)
  moved = jax.tree.map(lambda p: 2 * p, params)
  second = curvature.directional_curvature(counted, moved, some, batches=[batch, batch])[0]
  assert len(calls) == traced > 0
  assert not np.allclose(first['head/kernel'], second['head/kernel'])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'batches': iter([1.0])}, 'empty after one pass'),
    ({'batches': []}, 'batches is empty'),
    ({'batches': [np.ones(2), np.ones(3)]}, 'differ in shape'),
    ({'batches': [1.0], 'weights': [1.0, 2.0]}, 'must be 1 numbers'),
    ({'batches': [1.0], 'weights': [-1.0]}, 'none negative'),
    ({'batches': [1.0], 'weights': [0.0]}, 'must be 1 numbers'),
    ({'weights': [1.0]}, 'there are no batches'),
    ({'method': 'finite differences'}, 'method must be one of auto, forward, reverse'),
    ({'group_by': 'type'}, 'group_by must be one of'),
  ],
)
def test_bad_options(options, message):
  params = {'w': np.eye(2, dtype=np.float32)}
  directions = {'w': (np.ones((1, 1, 2)), np.ones((1, 1, 2)))}
  loss = lambda params, *batch: jnp.sum(params['w'] ** 2)
  with pytest.raises(ValueError, match=message):
    curvature.directional_curvature(loss, params, directions, **options)


def test_bad_directions_and_losses():
  params = {'a': {'kernel': np.ones((3, 2), np.float32)}, 'b': {'kernel': np.ones((3, 2), 'f')}}
  loss = lambda p: jnp.sum(p['a']['kernel'] * p['b']['kernel'])
  ones = lambda *shape: np.ones(shape, np.float32)
  call = curvature.directional_curvature
  with pytest.raises(ValueError, match=r"'c' is no matrix.*'a/kernel', 'b/kernel'"):
    call(loss, params, {'c': (ones(1, 1, 3), ones(1, 1, 2))})
  with pytest.raises(ValueError, match=r"'a/kernel' have shapes \(1, 1, 2\)"):
    call(loss, params, {'a/kernel': (ones(1, 1, 2), ones(1, 1, 3))})
  with pytest.raises(ValueError, match=r'\(1, directions, 3\)'):
    call(loss, params, {'a/kernel': (ones(1, 3), ones(1, 2))})
  uneven = {p: (ones(1, n, 3), ones(1, n, 2)) for n, p in ((1, 'a/kernel'), (2, 'b/kernel'))}
  with pytest.raises(ValueError, match=r'\[1, 2\] directions'):
    call(loss, params, uneven, group_by='shape')
  assert call(loss, params, uneven)[0]['b/kernel'].shape == (1, 2)

  good = {'a/kernel': (ones(1, 1, 3), ones(1, 1, 2))}
  for bad in (
    lambda p: p['a']['kernel'],
    lambda p: (loss(p), 1),
    lambda p: loss(p) * 1j,
    lambda p: jnp.int32(3),
  ):
    with pytest.raises(TypeError, match='must return one real number'):
      call(bad, params, good)
  with pytest.raises(TypeError, match="'a/kernel' is traced"):
    jax.jit(lambda p: call(loss, p, good))(params)


# ---------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------


def test_chunks_stay_within_the_memory_budget(monkeypatch):
  rng = np.random.default_rng(0)
  params = {'w': rng.normal(size=(8, 8)).astype(np.float32)}
  x = rng.normal(size=(512, 8)).astype(np.float32)
  loss = lambda p: jnp.sum(jnp.tanh(jnp.tanh(x @ p['w']) @ p['w']))
  directions = {'w': tuple(rng.normal(size=(1, 24, 8)).astype(np.float32) for _ in range(2))}
  chunks, plans = [], []
  in_chunks, compiled = directional.in_chunks, directional._compiled

  def spy_chunks(function, chunk, items):
    chunks.append(chunk)
    return in_chunks(function, chunk, items)

  def spy_compiled(*arguments):
    program = compiled(*arguments)
    plans.append(program.memory_analysis().temp_size_in_bytes)
    return program

  monkeypatch.setattr(directional, 'in_chunks', spy_chunks)
  monkeypatch.setattr(directional, '_compiled', spy_compiled)
  measure = functools.partial(curvature.directional_curvature, loss, params, directions)
  whole = measure(memory_budget=None)[0]['w']
  assert chunks == [24]
  (unlimited,) = set(plans)
  for part in (0.6, 0.3):
    chunks.clear()
    plans.clear()
    budget = int(part * unlimited)
    found = measure(memory_budget=budget)[0]['w']
    assert_close({'w': found}, {'w': whole}, 1e-5)
    assert max(plans) <= budget
    assert 1 < chunks[-1] < 24
  with pytest.raises(ValueError, match=r"one direction of 'w' with shape \(8, 8\) needs"):
    measure(memory_budget=1000)


@pytest.mark.parametrize('chunk', [1, 3, 5, 7, 9])
def test_in_chunks(chunk):
  items = (jnp.arange(7.0), jnp.arange(14.0).reshape(7, 2))
  together = lambda a, b: jnp.stack([a, a + b.sum(), b[0]])
  found = directional.in_chunks(together, chunk, items)
  np.testing.assert_array_equal(found, jax.vmap(together, out_axes=-1)(*items))


# ---------------------------------------------------------------------------------
# Any loss, any tree
# ---------------------------------------------------------------------------------


def test_a_custom_vjp_is_differentiated_in_reverse():
  @jax.custom_vjp
  def square(x):
    return jnp.sum(x**2)

  square.defvjp(lambda x: (square(x), x), lambda x, g: (2 * g * x,))
  params = {'w': np.arange(6, dtype=np.float32).reshape(2, 3)}
  directions = {'w': (np.eye(2, dtype=np.float32)[None], np.eye(3, dtype=np.float32)[None, :2])}
  loss = lambda p: square(p['w'])
  found, _ = curvature.directional_curvature(loss, params, directions)
  np.testing.assert_allclose(found['w'], [[2, 2]], rtol=1e-6)
  with pytest.raises(TypeError, match='custom_vjp'):
    curvature.directional_curvature(loss, params, directions, method='forward')


def test_half_precision_is_measured_in_single():
  params, directions, batch, _ = case('float32')
  half = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params)
  single = jax.tree.map(lambda p: p.astype(jnp.float32), half)
  some = {'dense_in/kernel': directions['dense_in/kernel']}
  found = curvature.directional_curvature(loss_fn, half, some, batches=[batch])[0]
  expected = curvature.directional_curvature(loss_fn, single, some, batches=[batch])[0]
  np.testing.assert_array_equal(found['dense_in/kernel'], expected['dense_in/kernel'])


def test_an_equinox_module_with_functions_for_leaves():
  model = eqx.nn.MLP(3, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(0))
  x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
  assert any(callable(leaf) for leaf in jax.tree.leaves(model))
  directions = make_directions(eqx.filter(model, eqx.is_array))
  loss = lambda model: jnp.mean(jax.vmap(model)(jnp.asarray(x)) ** 2)
  found, _ = curvature.directional_curvature(loss, model, directions)
  # The mean of the squares of 10 outputs W x + b: 2/10 of the squares of u vᵀ's outputs.
  u, v = directions['layers/1/weight']  # Equinox: outputs first, so that columns are outputs.
  hidden = np.tanh(x @ np.asarray(model.layers[0].weight).T + np.asarray(model.layers[0].bias))
  outputs = np.einsum('bi,ki,ko->kbo', hidden, u[0], v[0])
  expected = np.sum(outputs**2, axis=(1, 2)) * 2 / 10
  np.testing.assert_allclose(found['layers/1/weight'][0], expected, rtol=1e-5)
  assert list(found) == ['layers/0/weight', 'layers/1/weight']


def test_images_smaller_than_the_window_are_not_left_to_a_slow_convolution(monkeypatch, x64):
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(4, 2, 1, 3)), rng.normal(size=(3, 3, 3, 4))

  def loss(kernel, x):
    dimensions = ('NHWC', 'HWIO', 'NHWC')
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=dimensions)
    return jnp.mean(jnp.square(jnp.tanh(y)))

  programs = []
  compiled = directional._compiled
  monkeypatch.setattr(
    directional, '_compiled', lambda *args: programs.append(compiled(*args)) or programs[-1]
  )
  params = {'conv': {'kernel': jnp.asarray(kernel)}}
  u, v = (jnp.asarray(rng.normal(size=(1, 5, n))) for n in (27, 4))
  found, _ = curvature.directional_curvature(
    lambda p, x: loss(p['conv']['kernel'], x), params, {'conv/kernel': (u, v)}, batches=[x]
  )
  hessian = jax.hessian(loss)(params['conv']['kernel'], x).reshape(108, 108)
  along = jnp.einsum('ki,kj->kij', u[0], v[0]).reshape(5, 108)
  want = jnp.einsum('ki,ij,kj->k', along, hessian, along)
  np.testing.assert_allclose(found['conv/kernel'][0], want, rtol=1e-10)
  lines = [line for line in programs[0].as_text().splitlines() if ' convolution(' in line]
  assert lines  # Padded in the convolution, they would be computed by a plain loop.
  assert not any('pad=' in line for line in lines)
