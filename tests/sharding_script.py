"""Run by `test_sharding` in a process of its own, on eight devices.

    python -m tests.sharding_script FUNCTION ARGUMENT,ARGUMENT ARGUMENT,ARGUMENT ...

Prints what it gives for each set of arguments, as JSON, when it comes to its end.
"""

import functools
import json
import os
import sys

if hasattr(os, 'sched_setaffinity'):  # Two threads in the pool, also on a large machine.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
os.environ['XLA_FLAGS'] = (
  '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import spectral_optax

jax.config.update('jax_numpy_rank_promotion', 'raise')

SHAPES = {
  'up': {'kernel': (32, 64), 'bias': (64,)},
  'down': {'kernel': (64, 32), 'bias': (32,)},
  'Conv_0': {'kernel': (3, 3, 8, 16), 'bias': (16,)},
  'attention': {
    'query': {'kernel': (32, 8, 4), 'bias': (8, 4)},
    'out': {'kernel': (8, 4, 32), 'bias': (32,)},
  },
  'layers': {'kernel': (8, 32, 32), 'bias': (8, 32)},
}


def is_shape(x):
  return isinstance(x, tuple) and not isinstance(x, P)


def is_spec(x):
  return isinstance(x, P)


def last(shape, *axes):
  return P(*[None] * (len(shape) - len(axes)), *axes)


MESHES = {
  'fsdp': ((8,), ('fsdp',)),
  'tp': ((8,), ('tp',)),
  'fsdp x tp': ((4, 2), ('fsdp', 'tp')),
  'stacked': ((4, 2), ('layer', 'tp')),
}


def spec(name, shape):
  """Where a parameter of the case lies; a bias of the stacked case with its layer."""
  stacked = shape[:1] == (8,) and len(shape) in (2, 3) and shape[1:] in ((32, 32), (32,))
  if name == 'fsdp':  # The first axis that can be divided, as a rule by the large one.
    axis = next((i for i, n in enumerate(shape) if n % 8 == 0), None)
    return P() if axis is None else P(*[None] * axis, 'fsdp')
  if name == 'tp':
    return last(shape, 'tp') if shape[-1] % 8 == 0 else P()
  if name == 'stacked' and stacked:
    return P('layer', None, 'tp') if len(shape) == 3 else P('layer')
  axes = ('fsdp', 'tp') if name == 'fsdp x tp' else (None, 'tp')
  fits = len(shape) > 1 and shape[-2] % 4 == 0 and shape[-1] % 2 == 0
  return last(shape, *axes) if fits else P()


def random_tree(seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: rng.standard_normal(shape).astype(np.float32), SHAPES, is_leaf=is_shape
  )


def placed(tree, specs, mesh):
  return jax.tree.map(
    lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs, is_leaf=is_spec
  )


def distance(got, want):
  """Relative, of the parameters that are furthest apart."""
  norm = lambda x: float(np.linalg.norm(np.asarray(x)))
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  return max(norm(np.asarray(a) - np.asarray(b)) / norm(b) for a, b in pairs)


def trained(tx, params, target, state, steps):
  """Towards a target through a map that mixes nothing: every parameter for itself."""

  @jax.jit
  def step(params, state, target):
    grads = jax.tree.map(lambda p, t: jnp.tanh(p - t) + 0.1 * p, params, target)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(steps):
    params, state = step(params, state, target)
  return params, state


@functools.cache
def trained_on_one(solver, steps, damping):
  params, target = (jax.tree.map(jnp.asarray, random_tree(seed)) for seed in (0, 1))
  tx = spectral_optax.spectral_newton(0.01, damping=damping, solver=solver)
  return trained(tx, params, target, tx.init(params), steps)[0]


def train(name, kind, solver='auto', damping='', steps=20):
  """How far eight devices end from one, and whether shardings stayed."""
  params, target = random_tree(0), random_tree(1)
  how = {'damping': damping or None, 'solver': solver}
  build = lambda **more: spectral_optax.spectral_newton(0.01, **how, **more)
  want = trained_on_one(solver, steps, damping or None)
  sizes, axes = MESHES[name]
  axis_type = AxisType.Explicit if kind == 'explicit' else AxisType.Auto
  mesh = jax.make_mesh(sizes, axes, axis_types=(axis_type,) * len(axes))
  specs = jax.tree.map(lambda shape: spec(name, shape), SHAPES, is_leaf=is_shape)
  tx = build(**{'shardings': specs, 'mesh': mesh} if kind == 'told' else {})
  params, target = placed(params, specs, mesh), placed(target, specs, mesh)
  got, state = trained(tx, params, target, tx.init(params), steps)
  alike = lambda x, s: x.sharding.is_equivalent_to(NamedSharding(mesh, s), x.ndim)
  in_momentum = lambda path, _: any(getattr(k, 'tuple_name', None) == 'MomentumState' for k in path)
  mu = optax.tree.get(state, 'mu', filtering=in_momentum)
  by_path = jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)[0]
  matrices = [s for path, s in by_path if path[-1].key == 'kernel']
  kept = all(map(alike, jax.tree.leaves(got), jax.tree.leaves(specs, is_leaf=is_spec)))
  return {
    'distance': distance(got, want),
    'parameters keep their sharding': kept,
    'momenta keep their sharding': all(
      alike(x, s) for x, s in zip(jax.tree.leaves(mu), matrices, strict=True)
    ),
  }


def work(solver, name, count='16', damping=''):
  """FLOPs of one device x 8 over those of one alone; bytes that all send over the parameters'."""
  sys.path.append('benchmarks')
  import _collectives

  count, rows, columns = int(count), 256, 128
  build = spectral_optax.scale_by_spectral_transfer
  tx = build(damping=damping or None, solver=solver, update_rms=0.2)
  # What noise there is does not matter here, only that it is moved.
  noise = lambda g: {'noise': {k: jnp.square(x) for k, x in g.items()}} if damping else {}
  update = jax.jit(lambda g, state: tx.update(g, state, **noise(g)))
  one = {f'w{i}': jax.ShapeDtypeStruct((rows, columns), jnp.float32) for i in range(count)}
  state = jax.eval_shape(tx.init, one)
  alone = update.lower(one, state).compile().cost_analysis()['flops']
  sizes, axes = MESHES[name]
  mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Explicit,) * len(axes))
  there = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s))
  with jax.set_mesh(mesh):
    grads = {k: there(x, spec(name, x.shape)) for k, x in one.items()}
    state = jax.tree.map(lambda x: there(x, P()), state)
    compiled = update.lower(grads, state).compile()
  sent = _collectives.bytes_sent(compiled.as_text(), 8)
  return {
    'flops': 8 * compiled.cost_analysis()['flops'] / alone,
    'bytes': 8 * sum(sent.values()) / (4 * count * rows * columns),
    'kinds': sorted(sent),
  }


def tall():
  """One tall matrix, its rows on eight devices: what is sent, the largest array, the error."""
  sys.path.append('benchmarks')
  import _collectives

  rows, columns = 4096, 32
  g = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
  tx = spectral_optax.scale_by_spectral_transfer(solver='polynomial')
  want, _ = jax.jit(tx.update)({'w': jnp.asarray(g)}, tx.init({'w': jnp.asarray(g)}))
  mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh):
    grads = placed({'w': g}, {'w': P('fsdp')}, mesh)
    compiled = jax.jit(tx.update).lower(grads, tx.init(grads)).compile()
    got, _ = jax.jit(tx.update)(grads, tx.init(grads))
  sent = _collectives.bytes_sent(compiled.as_text(), 8, branch=min)
  return {
    'distance': distance(got, want),
    'sent over n^2': sum(sent.values()) / (4 * columns**2),
    'kinds': sorted(sent),
  }


def hang(solver):
  """Sharded over eight devices, replicated on them and dealt, and replicated and left to XLA."""
  flags = os.environ['XLA_FLAGS']
  from tests import hang_script  # It wants flags of its own.

  os.environ['XLA_FLAGS'] = flags

  # Large enough to wait, and two for the device that has the most.
  known = {'rational': 'auto', 'cholesky': 'cholesky'}.get(solver, 'svd')
  n = hang_script.SMALL_SIDES[known][0]
  alpha = 2.0 if solver == 'cholesky' else 1.5
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Explicit,))
  noise = {'w': np.random.default_rng(0).standard_normal((9, n, n)).astype(np.float32)}
  with jax.set_mesh(mesh):
    for sharded, work_axes in ((True, None), (False, None), (False, ())):
      tx = spectral_optax.scale_by_spectral_transfer(
        alpha,
        solver=solver,
        work_axes=work_axes,
        weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 2),
      )
      specs = jax.tree.map(lambda x: last(x.shape, 'data') if sharded else P(), noise)  # noqa: B023
      grads = placed(noise, specs, mesh)
      update = jax.jit(tx.update)
      state = tx.init(grads)
      for _ in range(2):
        updates, state = update(grads, state)
      jax.block_until_ready(updates)
      for x in jax.tree.leaves(updates):
        assert bool(jnp.isfinite(x).all())
  return {'done': True}


if __name__ == '__main__':
  function, *arguments = sys.argv[1:]
  cases = [case.split(',') for case in arguments] or [[]]
  print(json.dumps([globals()[function](*map(str.strip, case)) for case in cases]))
