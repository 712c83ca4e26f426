"""Sharded parameters: the same results, the work divided, little sent, and no waiting for ever.

What needs eight devices runs in processes of their own (`sharding_script`).
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

import spectral_optax
from spectral_optax import layout, sharding

ROOT = pathlib.Path(__file__).parents[1]


def on_eight_devices(function, *cases):
  run = subprocess.run(
    [sys.executable, '-m', 'tests.sharding_script', function, *cases],
    cwd=ROOT,
    env=dict(os.environ),
    capture_output=True,
    text=True,
    timeout=240,  # Far more than it takes; a hang takes for ever.
    check=False,
  )
  assert run.returncode == 0, run.stderr[-3000:]
  return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
  'cases',
  [
    ('fsdp,auto', 'fsdp x tp,explicit'),
    ('tp,told', 'stacked,explicit', 'fsdp x tp,auto,auto,noise'),
  ],
)
def test_results_of_one_device_and_shardings_that_stay(cases):
  for case, found in zip(cases, on_eight_devices('train', *cases), strict=True):
    assert found['distance'] < 1e-5, (case, found)
    assert found['parameters keep their sharding'], case
    assert found['momenta keep their sharding'], case


def test_work_is_divided_and_little_is_sent():
  cases = ('polynomial,fsdp', 'polynomial,fsdp x tp', 'gram,tp')
  *even, filled, noisy = on_eight_devices(
    'work', *cases, 'polynomial,fsdp,9', 'polynomial,fsdp,16,noise'
  )
  for case, found in zip(cases, even, strict=True):
    assert found['flops'] <= 1.3, (case, found)
    # One all-to-all each way is 7/4 of them; the rest is what is known of spectra.
    assert 1.7 <= found['bytes'] <= 2, (case, found)
    assert 'all-gather' not in found['kinds'], (case, found)
  # The noise goes where its matrix does, and does not come back.
  assert noisy['flops'] <= 1.3
  assert noisy['bytes'] - even[0]['bytes'] == pytest.approx(7 / 8, rel=0.01)
  # Nine on eight devices: two places each, filled up, and all of them sent.
  assert filled['flops'] == pytest.approx(16 / 9, rel=0.02)
  assert filled['bytes'] == pytest.approx(16 / 9 * 7 / 4, rel=0.05)


def test_of_one_tall_matrix_the_gram_matrix_is_summed():
  (found,) = on_eight_devices('tall')
  assert found['kinds'] == ['all-reduce']
  # 2 · 7/8 n² is an all-reduce; G is 128 n².
  assert 1.75 <= found['sent over n^2'] < 1.8
  assert found['distance'] < 1e-5


@pytest.mark.parametrize(
  'solver', ['svd', 'gram', 'cholesky', 'rational', 'polynomial', 'low_rank']
)
def test_every_solver_comes_to_an_end_on_eight_devices(solver):
  assert on_eight_devices('hang', solver) == [{'done': True}]


# ---------------------------------------------------------------------------------
# On the four devices of this process
# ---------------------------------------------------------------------------------


def make_mesh(kind=AxisType.Auto, sizes=(2, 2), names=('x', 'y')):
  return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


def matrices(*shapes, seed=0):
  rng = np.random.default_rng(seed)
  return {f'w{i}': rng.standard_normal(s).astype(np.float32) for i, s in enumerate(shapes)}


def assert_close(got, want, rtol=1e-5):
  for path, x in want.items():
    off = np.linalg.norm(np.asarray(got[path]) - np.asarray(x))
    assert off <= rtol * np.linalg.norm(x), path


def both(tx, tree, specs, mesh, steps=2):
  """Updates and state of one device, and of the mesh's."""
  state, update = tx.init(jax.tree.map(jnp.asarray, tree)), jax.jit(tx.update)
  for _ in range(steps):
    want, state = update(jax.tree.map(jnp.asarray, tree), state)
  put = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()}
  with jax.set_mesh(mesh):
    state_there, update = tx.init(put), jax.jit(tx.update)
    for _ in range(steps):
      got, state_there = update(put, state_there)
  return (want, state), (got, state_there)


DEALT = ((16, 12), (16, 12), (12, 16), (16, 12), (16, 12))
TALL = ((128, 8), (8, 160))


@pytest.mark.parametrize(
  ('options', 'shapes'),
  [
    ({'solver': 'polynomial'}, DEALT),
    ({'solver': 'polynomial'}, TALL),
    # Every matrix its own α: which device has it shows only when it runs.
    ({'solver': 'polynomial', 'alpha': {f'w{i}': 1 + 0.2 * i for i in range(5)}}, DEALT),
    ({'solver': 'rational', 'alpha': {f'w{i}': 1 + 0.2 * i for i in range(2)}}, TALL),
    ({'solver': 'polynomial', 'alpha': optax.linear_schedule(1.0, 2.0, 9)}, TALL),
    ({'solver': 'polynomial', 'normalize': 'spectral'}, TALL),
    ({'solver': 'rational', 'normalize': None, 'damping': 0.1}, TALL),
    ({'solver': 'svd'}, TALL),
    ({'solver': 'low_rank', 'rank': 4}, DEALT),
    ({'solver': 'cholesky', 'alpha': 2.0, 'update_rms': 0.3}, DEALT),
    ({'solver': 'polynomial', 'update_rms': 0.3}, TALL),
    ({'solver': 'polynomial', 'update_rms': 0.3, 'rms_of': 'output'}, DEALT),
    ({'solver': 'polynomial', 'update_rms': 0.3, 'rms_of': 'output'}, TALL),
  ],
)
def test_every_way_to_divide(options, shapes):
  tree = matrices(*shapes)
  specs = dict(
    zip(tree, [P('x', 'y'), P(None, ('y', 'x')), P('x'), P(), P('y', 'x')], strict=False)
  )
  tx = spectral_optax.scale_by_spectral_transfer(**options)
  (want, state), (got, there) = both(tx, tree, specs, make_mesh(AxisType.Explicit))
  assert_close(got, want, rtol=3e-5)
  for name in ('sigma_max', 'participation_ratio', 'transfer_error', 'alpha', 'damping'):
    for path, x in getattr(state, name).items():
      np.testing.assert_allclose(getattr(there, name)[path], x, rtol=2e-4, atol=1e-6)


def test_matrices_of_which_other_things_have_a_size():
  """Some of each kind, of one shape and in one place."""
  tree = {k: x * np.float32(range(1, 13)) for k, x in matrices(*((16, 12),) * 5).items()}
  rms_of = {'': 'output', 'w1': 'matrix', 'w4': 'matrix'}
  tx = spectral_optax.scale_by_spectral_transfer(solver='polynomial', update_rms=0.3, rms_of=rms_of)
  specs = dict.fromkeys(tree, P('x', 'y'))
  (want, _), (got, _) = both(tx, tree, specs, make_mesh(AxisType.Explicit))
  assert_close(got, want, rtol=3e-5)
  spread = {k: np.std(np.std(x, axis=0)) / np.std(x) for k, x in got.items()}
  assert max(spread[k] for k in ('w0', 'w2', 'w3')) < 0.6 * min(spread[k] for k in ('w1', 'w4'))


# The last one has none: matrices with and without are not of one piece. Nine in the same place
# are two or more on every device.
@pytest.mark.parametrize('solver', ['polynomial', 'svd'])
@pytest.mark.parametrize(
  'shapes', [(*DEALT, (12, 16)), (*TALL, (24, 24), (128, 8)), ((16, 12),) * 10]
)
def test_noise_travels_with_its_matrix(shapes, solver):
  tree, noise = matrices(*shapes), {k: 5 * x for k, x in matrices(*shapes, seed=1).items()}
  places = [P('x', 'y'), P(None, ('y', 'x')), P('x'), P(), P('y', 'x'), P('x', 'y')]
  places = places if len(shapes) < 10 else [P('x', 'y')] * 10
  specs = dict(zip(tree, places, strict=False))
  damping = {'': 'noise', f'w{len(shapes) - 1}': 0.1}
  tx = spectral_optax.scale_by_spectral_transfer(1.5, damping, solver=solver)
  update = lambda g, n, state: jax.jit(tx.update)(g, state, noise=n)
  want, state = update(tree, noise, tx.init(tree))
  without, _ = update(tree, jax.tree.map(jnp.zeros_like, noise), tx.init(tree))
  put = lambda tree: {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()}
  mesh = make_mesh(AxisType.Explicit)
  with jax.set_mesh(mesh):
    got, there = update(put(tree), put(noise), tx.init(put(tree)))
  assert_close(got, want, rtol=3e-5)
  for path, x in state.sigma_max.items():
    np.testing.assert_allclose(there.sigma_max[path], x, rtol=2e-4)
  moved = {k for k in tree if not np.allclose(want[k], without[k], rtol=1e-3, atol=1e-3)}
  assert moved == set(tree) - {f'w{len(shapes) - 1}'}


@pytest.mark.parametrize('scale', [1e-12, 1e12])
@pytest.mark.parametrize('shapes', [DEALT, TALL])
def test_scales_that_leave_float32(scale, shapes):
  tree = {k: np.float32(scale) * x for k, x in matrices(*shapes).items()}
  specs = dict.fromkeys(tree, P('x', 'y'))
  tx = spectral_optax.scale_by_spectral_transfer(solver='polynomial', update_rms=0.2)
  (want, _), (got, _) = both(tx, tree, specs, make_mesh(AxisType.Explicit))
  assert_close(got, want)


def test_bad_numbers_and_zeros_stay_where_they_are():
  tree = matrices(*DEALT)
  tree['w1'][3, 2], tree['w3'][:] = np.nan, 0
  specs = dict.fromkeys(tree, P('x', 'y'))
  tx = spectral_optax.scale_by_spectral_transfer(solver='polynomial')
  (want, state), (got, there) = both(tx, tree, specs, make_mesh(AxisType.Explicit))
  assert np.isnan(got['w1']).all()
  assert (np.asarray(got['w3']) == 0).all()
  assert_close({k: got[k] for k in ('w0', 'w2', 'w4')}, {k: want[k] for k in ('w0', 'w2', 'w4')})
  assert np.isnan(there.sigma_max['w1'])
  np.testing.assert_allclose(there.sigma_max['w0'], state.sigma_max['w0'], rtol=1e-5)


def test_how_matrices_are_dealt():
  def chosen(shapes, sizes=(4, 2), specs=None, of_gram=True, **how):
    tree = {f'w{i}': jnp.zeros(shape) for i, shape in enumerate(shapes)}
    views = layout.matrix_views(tree, MuonDimensionNumbers(-2, -1))
    mesh = jax.sharding.AbstractMesh(sizes, ('x', 'y'))
    division = sharding.divide(
      tree, views, mesh=mesh, shardings=dict.fromkeys(tree, specs or P('x', 'y')), **how
    )
    return sharding.choose_deal(division, views, of_gram=of_gram)

  assert chosen([(64, 64)] * 16) == (('x', 'y'), ())
  assert chosen([(4096, 64)]) == ((), ('x', 'y'))
  assert chosen([(4096, 64)], of_gram=False) == (('x', 'y'), ())
  assert chosen([(64, 64)] * 16, work_axes='x') == (('x',), ('y',))
  # A mesh axis that numbers them is one that deals them.
  assert chosen([(16, 64, 64)], specs=P('x', 'y')) == (('x', 'y'), ())
  # Two for four and sixteen for two: the larger axis deals, the other divides.
  assert chosen([(1024, 256)] * 4, sizes=(4, 16), specs=P('y', 'x')) == (('x',), ('y',))


def test_automatic_axes_tell_nothing_and_may_be_told():
  tree = matrices(*DEALT)
  specs = dict.fromkeys(tree, P('x', 'y'))
  mesh = make_mesh()
  put = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()}
  program = {}
  for name, told in (('told', P('x', 'y')), ('not told', None)):
    tx = spectral_optax.scale_by_spectral_transfer(solver='polynomial', shardings=told, mesh=mesh)
    program[name] = jax.jit(tx.update).lower(put, tx.init(put)).compile()
  assert 'all-gather' not in program['told'].as_text()
  assert 'all-gather' in program['not told'].as_text()
  # Outside of `jit` arrays say it themselves, and it stays.
  tx = spectral_optax.scale_by_spectral_transfer(solver='polynomial')
  updates, _ = tx.update(put, tx.init(put))
  assert all(x.sharding.spec == P('x', 'y') for x in updates.values())
  want, _ = jax.jit(tx.update)(tree, tx.init(tree))
  assert_close(updates, want)


def test_work_axes_of_none_leave_it_to_xla():
  tree = {k: jnp.asarray(x) for k, x in matrices(*DEALT).items()}
  jaxprs = {}
  with jax.set_mesh(make_mesh()):
    for work_axes in ((), None):
      tx = spectral_optax.scale_by_spectral_transfer(solver='polynomial', work_axes=work_axes)
      jaxprs[work_axes] = str(jax.make_jaxpr(tx.update)(tree, tx.init(tree)))
  assert 'shard_map' not in jaxprs[()]
  assert 'shard_map' in jaxprs[None]


@pytest.mark.parametrize('check_vma', [True, False])
def test_inside_shard_map_every_block_is_a_matrix(check_vma):
  (g,) = matrices((16, 12)).values()
  mesh = make_mesh()
  tx = spectral_optax.scale_by_spectral_transfer(solver='polynomial')

  def solve(block):
    return tx.update({'w': block}, tx.init({'w': block}))[0]['w']

  spread = jax.shard_map(
    solve, mesh=mesh, in_specs=P('x', 'y'), out_specs=P('x', 'y'), check_vma=check_vma
  )
  got = jax.jit(spread)(g)
  for rows in (slice(0, 8), slice(8, 16)):
    for columns in (slice(0, 6), slice(6, 12)):
      want = spectral_optax.apply_transfer(
        jnp.asarray(g[rows, columns]), alpha=1.5, damping=0.008, solver='polynomial'
      )
      np.testing.assert_allclose(got[rows, columns], want, rtol=1e-4, atol=1e-5)


# Two matrices are dealt over the other axis; of one the longer side is divided.
@pytest.mark.parametrize('count', [1, 2])
def test_partly_manual_meshes_divide_over_the_rest(count):
  tree = matrices(*[(2, 16, 12)] * count)
  mesh = make_mesh()
  tx = spectral_optax.scale_by_spectral_transfer(solver='polynomial')

  def solve(block):
    block = {k: x[0] for k, x in block.items()}
    updates = tx.update(block, tx.init(block))[0]
    return {k: x[None] for k, x in updates.items()}

  spread = jax.shard_map(
    solve, mesh=mesh, in_specs=P('x'), out_specs=P('x'), axis_names={'x'}, check_vma=False
  )
  with jax.set_mesh(mesh):
    got = jax.jit(spread)(tree)
  for i in range(2):
    block = {k: jnp.asarray(x[i]) for k, x in tree.items()}
    want = jax.jit(tx.update)(block, tx.init(block))[0]
    assert_close({k: x[i] for k, x in got.items()}, want)


def test_init_where_shardings_are_asked_for():
  mesh = make_mesh()
  params = {'w': jnp.ones((16, 12)), 'b': jnp.ones(12)}
  tx = spectral_optax.spectral_newton(0.1)
  shapes = jax.eval_shape(tx.init, params)
  there = NamedSharding(mesh, P('x', 'y'))
  out = jax.tree.map(lambda s: there if s.shape == (16, 12) else NamedSharding(mesh, P()), shapes)
  state = jax.jit(tx.init, out_shardings=out)(params)
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, shapes)
  spread = [x for x in jax.tree.leaves(state) if x.shape == (16, 12)]
  assert spread
  assert all(x.sharding == there for x in spread)
  # On shapes that say where they lie, and on arrays that do.
  told = jax.tree.map(
    lambda p: jax.ShapeDtypeStruct(
      p.shape, p.dtype, sharding=NamedSharding(mesh, P('x') if p.ndim == 2 else P())
    ),
    params,
  )
  assert jax.tree.structure(jax.eval_shape(tx.init, told)) == jax.tree.structure(shapes)


def test_vmap_over_optimizers():
  mesh = make_mesh(sizes=(4,), names=('x',))
  g = np.random.default_rng(0).standard_normal((3, 16, 12)).astype(np.float32)
  tx = spectral_optax.scale_by_spectral_transfer(solver='polynomial')
  update = lambda g: tx.update({'w': g}, tx.init({'w': g}))[0]['w']
  with jax.set_mesh(mesh):
    got = jax.jit(jax.vmap(update))(g)
  update = jax.jit(update)
  for one, x in zip(got, g, strict=True):
    assert_close({'w': one}, {'w': update(x)})


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'mesh': 'x'}, 'mesh must be a jax.sharding.Mesh'),
    ({'work_axes': 3}, 'work_axes must name axes'),
    ({'work_axes': ('x', 'x')}, 'names an axis twice'),
  ],
)
def test_arguments_that_make_no_sense(options, message):
  for make in (
    spectral_optax.scale_by_spectral_transfer,
    spectral_optax.scale_by_spectral_newton,
    lambda **how: spectral_optax.spectral_newton(0.1, **how),
  ):
    with pytest.raises(ValueError, match=message):
      make(**options)


def test_arguments_that_do_not_fit():
  mesh = make_mesh()
  with pytest.raises(ValueError, match="'z', which is no axis of the mesh"):
    spectral_optax.spectral_newton(0.1, mesh=mesh, work_axes='z')
  params = {'w': np.ones((16, 13), np.float32)}
  tx = spectral_optax.spectral_newton(0.1, mesh=mesh, shardings={'w': P('x', 'y')})
  with pytest.raises(ValueError, match=r"'w' does not divide its shape \(16, 13\)"):
    jax.jit(tx.update)(params, tx.init(params), params)
  tx = spectral_optax.spectral_newton(0.1, mesh=mesh, shardings={'v': P('x')})
  with pytest.raises(ValueError, match=r"shardings does not match.*'v'"):
    tx.init(params)
  tx = spectral_optax.spectral_newton(0.1, work_axes='x')
  with pytest.raises(ValueError, match='without a mesh'):
    jax.jit(tx.update)(params, tx.init(params), params)
  spread = jax.shard_map(
    lambda p: tx.update(p, tx.init(p), p)[0], mesh=mesh, in_specs=P('x'), out_specs=P('x')
  )
  with pytest.raises(ValueError, match=r'manual here: inside jax\.shard_map'):
    jax.jit(spread)(params)
