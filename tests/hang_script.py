"""Run by `test_hang` in a process of its own: python -m tests.hang_script SOLVER CASE.

Prints `done` when it comes to its end, which a program that waits on its own thread
pool does not.
"""

import importlib.metadata
import os
import sys

if hasattr(os, 'sched_setaffinity'):  # Two threads in the pool, also on a large machine.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
# More devices than cores would make the pool larger.
devices = 8 if sys.argv[2:] == ['devices'] else 1
flags = f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0'
# Compiles in half the time, and not always rightly: on jaxlib 0.10.2 Muon comes out wrong.
# Here it only matters who waits for whom. Only where a hang has been seen with it, and only
# where it is known: later versions would end.
version = tuple(map(int, importlib.metadata.version('jaxlib').split('.')[:2]))
if version < (0, 11) and sys.argv[1:] not in (['auto', 'steps'], ['gram', 'steps']):
  flags += ' --xla_cpu_use_fusion_emitters=false'
os.environ['XLA_FLAGS'] = flags

import jax
import jax.numpy as jnp
import numpy as np
import optax

import spectral_optax

# Smaller than this, a batched call does its work at once and waits for nobody: with
# batched calls in place of our loops, every solver hangs here on jaxlib 0.10.2.
SMALL_SIDES = {'svd': (64, 72, 80, 88, 96, 104), 'cholesky': (128, 136, 144, 152, 160, 168)}
SMALL_SIDES |= {'gram': SMALL_SIDES['svd']}
# "rational", which is what "auto" takes, calls LAPACK on a quarter of a side.
SMALL_SIDES |= {'auto': (528, 544, 560, 576, 592, 608)}


def params(solver):
  """Six shapes of matrix, three of each: a stack of two, and one the other way round."""
  tree = {}
  for i, n in enumerate(SMALL_SIDES[solver]):
    m = n + 8 * i
    tree[f'Stack_{i}'] = {'kernel': jnp.ones((2, m, n)), 'bias': jnp.zeros((2, n))}
    tree[f'Dense_{i}'] = {'kernel': jnp.ones((n, m)), 'bias': jnp.zeros(m)}
  return tree


def optimizer(solver):
  alpha = {
    'cholesky': 2.0,
    'auto': 1.5,
  }.get(solver, jnp.asarray(1.5))
  return spectral_optax.spectral_newton(1e-3, alpha, solver=solver)


def noise(key, tree):
  """One draw, cut to pieces: a draw for each leaf takes longer to compile than a step."""
  leaves, structure = jax.tree.flatten(tree)
  ends = np.cumsum([x.size for x in leaves])
  draw = jax.random.normal(key, (int(ends[-1]),))
  pieces = jnp.split(draw, ends[:-1].tolist())
  return structure.unflatten(
    [piece.reshape(x.shape) for piece, x in zip(pieces, leaves, strict=True)]
  )


def training(tx, start, gradient, steps):
  """One program of many steps."""

  def step(carry, key):
    p, state = carry
    updates, state = tx.update(gradient(key, p), state, p)
    return (optax.apply_updates(p, updates), state), None

  def run(key):
    p = noise(key, start)
    (p, _), _ = jax.lax.scan(step, (p, tx.init(p)), jax.random.split(key, steps))
    return p

  return run


def main(solver, case):
  tx, p, key = optimizer(solver), params(solver), jax.random.key(0)
  if case == 'steps':
    step = jax.jit(lambda key, state: tx.update(noise(key, p), state, p))
    state, end = tx.init(p), p
    for k in jax.random.split(key, 20 if solver in ('gram', 'cholesky') else 8):
      end, state = step(k, state)
  elif case == 'seeds':  # `vmap` around the optimizer batches what was a loop.
    end = jax.jit(jax.vmap(training(tx, p, noise, 5)))(jax.random.split(key, 2))
  elif case == 'devices':  # Every device of the process runs the program.
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec('data')
    keys = jax.device_put(jax.random.split(key, 8), jax.sharding.NamedSharding(mesh, spec))
    train = jax.vmap(training(tx, p, noise, 2))
    end = jax.jit(jax.shard_map(train, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(
      keys
    )
  else:
    raise ValueError(case)
  if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(end)):
    raise AssertionError('not finite')
  print('done')


if __name__ == '__main__':
  main(*sys.argv[1:])
