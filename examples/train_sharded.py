"""Trains one network on one device, on many, or in several processes: the same script.

    python examples/train_sharded.py                                  # What there is
    python examples/train_sharded.py --virtual-devices 8 --mesh 4 2   # fsdp = 4, tp = 2
    python examples/train_sharded.py --coordinator localhost:9876 --processes 2 --process 0 &
    python examples/train_sharded.py --coordinator localhost:9876 --processes 2 --process 1
    python examples/train_sharded.py --checkpoints runs/sharded       # And again, to go on

Parameters are divided over the mesh (`fsdp` their rows, `tp` their columns), the batch over
`fsdp`; so is what Spectral Newton does with them. A checkpoint is written every `--save-every`
steps; whoever is started with its folder goes on from the last whole one, on whatever mesh. If a
process dies, the others say so and end with an error within `--patience` seconds (twice that, if it
dies before the first step).
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import spectral_optax

# Flax 0.12.6, the newest that runs with JAX 0.9, has it under its older name.
as_pure = getattr(nnx, 'as_pure', None) or nnx.pure

INPUTS, WIDTH, CLASSES, LAYERS = 32, 64, 16, 3

# ---------------------------------------------------------------------------------
# Network and data
# ---------------------------------------------------------------------------------


class NnxNetwork(nnx.Module):
  def __init__(self, *, rngs: nnx.Rngs):
    sides = [INPUTS, *[WIDTH] * LAYERS]
    self.layers = nnx.List([nnx.Linear(m, n, rngs=rngs) for m, n in itertools.pairwise(sides)])
    self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    for layer in self.layers:
      x = nnx.relu(layer(x))
    return self.head(x)


class LinenNetwork(linen.Module):
  @linen.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for _ in range(LAYERS):
      x = linen.relu(linen.Dense(WIDTH)(x))
    return linen.Dense(CLASSES, name='head')(x)


def make_network(
  api: str,
) -> tuple[Callable[[jax.Array], Any], Callable[[Any, jax.Array], jax.Array]]:
  """From a key to parameters, and from parameters and inputs to logits."""
  if api == 'linen':
    network = LinenNetwork()
    return (
      lambda key: network.init(key, jnp.zeros((1, INPUTS))),
      lambda params, x: jnp.asarray(network.apply(params, x)),
    )
  build = lambda key: nnx.split(NnxNetwork(rngs=nnx.Rngs(key)))
  graph, _ = nnx.split(nnx.eval_shape(lambda: NnxNetwork(rngs=nnx.Rngs(0))))
  return (
    lambda key: as_pure(build(key)[1]),
    lambda params, x: nnx.merge(graph, params)(x),
  )


def batch_of(step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
  """The same on every process: inputs, and the classes that a fixed network gives them."""
  x = np.random.default_rng((1, step)).standard_normal((size, INPUTS)).astype(np.float32)
  teacher = np.random.default_rng(0).standard_normal((INPUTS, CLASSES)).astype(np.float32)
  return x, np.argmax(np.tanh(x) @ teacher, axis=1).astype(np.int32)


# ---------------------------------------------------------------------------------
# Mesh
# ---------------------------------------------------------------------------------


def make_mesh(sizes: list[int] | None) -> jax.sharding.Mesh:
  fsdp, tp = sizes or (jax.device_count(), 1)
  if fsdp * tp != jax.device_count():
    raise SystemExit(
      f'--mesh {fsdp} {tp} is for {fsdp * tp} devices; there are {jax.device_count()}.'
    )
  return jax.make_mesh((fsdp, tp), ('fsdp', 'tp'), axis_types=(AxisType.Auto,) * 2)


def spec_of(x: Any, mesh: jax.sharding.Mesh) -> P:
  """Rows over fsdp, columns over tp, where they can be divided."""
  if x.ndim != 2:
    return P()
  fits = lambda n, axis: axis if n % mesh.shape[axis] == 0 else None
  return P(fits(x.shape[0], 'fsdp'), fits(x.shape[1], 'tp'))


# ---------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------


def flat(tree: Any) -> dict[str, Any]:
  """Leaves by path: what is written does not depend on how a library nests its states."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path, simple=True, separator='/'): x for path, x in leaves}


class Checkpoints:
  """The last whole ones of a folder, by step."""

  def __init__(self, folder: pathlib.Path, every: int):
    self.folder = folder.absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=3, save_interval_steps=every)
    self.manager = ocp.CheckpointManager(self.folder, options=options)

  def save(self, step: int, state: Any) -> None:
    """If it is one of those that are saved; goes on in the background."""
    self.manager.save(step, args=ocp.args.StandardSave(flat(state)))

  def restore(self, like: Any) -> tuple[int, Any]:
    """The last whole one, and its step; what it is given, and 0, if there is none.

    Args:
      like: Arrays, or their shapes and shardings: the mesh may be another one than that
        of the process that wrote.

    Raises:
      ValueError: what is there has other leaves, shapes or dtypes; names them.
    """
    step = self.manager.latest_step()
    if step is None:
      return 0, like
    wanted = flat(like)
    folder = self.folder / str(step) / 'default'
    there: dict[str, Any] = ocp.StandardCheckpointer().metadata(folder).item_metadata  # pyright: ignore
    there = {path: there[path] for path in there}
    of = lambda x: f'{np.dtype(x.dtype).name}{list(x.shape)}'
    missing = [f'{path} is missing from it' for path in wanted if path not in there]
    stray = [f'{path} is in it and not wanted' for path in there if path not in wanted]
    wrong = [x for both in itertools.zip_longest(missing, stray) for x in both if x is not None]
    wrong += [
      f'{path} is {of(there[path])} in it, and {of(x)} is wanted'
      for path, x in wanted.items()
      if path in there and of(there[path]) != of(x)
    ]
    if wrong:
      more = f'; and {len(wrong) - 8} more' if len(wrong) > 8 else ''
      raise ValueError(
        f'The checkpoint of step {step} in {self.folder} does not fit:'
        f' {"; ".join(wrong[:8])}{more}.'
        ' Use the network and optimizer that it was written with, or another folder.'
      )
    shapes = {
      path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
      for path, x in wanted.items()
    }
    found = self.manager.restore(step, args=ocp.args.StandardRestore(shapes))
    return step, jax.tree.unflatten(jax.tree.structure(like), [found[path] for path in wanted])

  def close(self) -> None:
    """Waits for what is being written."""
    self.manager.wait_until_finished()
    self.manager.close()


# ---------------------------------------------------------------------------------
# Other processes
# ---------------------------------------------------------------------------------


class Watch:
  """Ends this process if nothing has been heard of for too long.

  A collective whose partner is gone may wait for ever, and Python cannot interrupt it.
  """

  def __init__(self, patience: float, message: str):
    self.patience, self.message, self.last = patience, message, math.inf
    threading.Thread(target=self._run, daemon=True).start()

  def alive(self) -> None:
    """A step has come to its end."""
    self.last = time.monotonic()

  def _run(self) -> None:
    while time.monotonic() - self.last < self.patience:
      time.sleep(0.2)
    fail(f'No step has ended for {self.patience:g} s. {self.message}')


def fail(message: str) -> None:
  """Ends the process, whatever its other threads wait for."""
  print(f'train_sharded: {message}', file=sys.stderr, flush=True)
  os._exit(1)


# ---------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> dict[str, Any]:
  mesh = make_mesh(args.mesh)
  init, apply = make_network(args.api)
  shapes = jax.eval_shape(init, jax.random.key(args.seed))
  specs = jax.tree.map(lambda x: spec_of(x, mesh), shapes)
  schedule = optax.cosine_decay_schedule(args.learning_rate, args.schedule_steps or args.steps)
  tx = (
    spectral_optax.spectral_newton(schedule, damping=args.damping, mesh=mesh, shardings=specs)
    if args.optimizer == 'spectral_newton'
    else optax.adamw(schedule)
  )
  everywhere = NamedSharding(mesh, P())

  def start(key):
    params = init(key)
    return params, tx.init(params)

  # The state lies as its parameter, by shape; what is known of spectra everywhere.
  there = {x.shape: NamedSharding(mesh, spec_of(x, mesh)) for x in jax.tree.leaves(shapes)}
  state_shapes = jax.eval_shape(start, jax.random.key(args.seed))
  places = jax.tree.map(lambda x: there.get(x.shape, everywhere), state_shapes)
  state = jax.jit(start, out_shardings=places)(jax.random.key(args.seed))

  first, checkpoints = 0, None
  if args.checkpoints:
    checkpoints = Checkpoints(args.checkpoints, args.save_every)
    first, state = checkpoints.restore(state)
  # From the end of the first step on: compiling may take longer than the patience is.
  watch = Watch(args.patience, f'Has another process died? {resume_hint(args)}')

  def step(state, x, y):
    params, opt_state = state

    def loss_of(params):
      return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  step = jax.jit(step, out_shardings=(places, everywhere), donate_argnums=0)
  rows = NamedSharding(mesh, P('fsdp'))
  losses = []
  for i in range(first, args.steps):
    x, y = (
      jax.make_array_from_callback(a.shape, rows, lambda index, a=a: a[index])
      for a in batch_of(i, args.batch_size)
    )
    state, loss = step(state, x, y)
    losses.append(float(loss))
    watch.alive()
    if checkpoints is not None:
      checkpoints.save(i + 1, state)
    if args.pause:
      time.sleep(args.pause)
    if jax.process_index() == 0 and (i + 1) % args.print_every == 0:
      print(f'step {i + 1}: loss {losses[-1]:.6f}', flush=True)
  if checkpoints is not None:
    checkpoints.close()
  whole = jax.jit(lambda x: x, out_shardings=everywhere)(state[0])
  watch.alive()
  numbers = np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(whole)])
  return {
    'first step': first,
    'losses': losses,
    'parameters': numbers.tolist(),
    'mesh': dict(mesh.shape),
    'processes': jax.process_count(),
  }


def resume_hint(args: argparse.Namespace) -> str:
  if args.checkpoints:
    return (
      f'Start all of them again: they go on from the last whole checkpoint in {args.checkpoints}.'
    )
  return 'Start all of them again; --checkpoints FOLDER would let them go on.'


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description='One device, many, or many processes.')
  add = parser.add_argument
  add('--mesh', type=int, nargs=2, metavar=('FSDP', 'TP'), help='default: all devices, 1')
  add('--virtual-devices', type=int, help='of the CPU, in this process')
  add('--coordinator', help='address:port of process 0')
  add('--processes', type=int, default=1)
  add('--process', type=int, default=0, help='which of them this is, from 0')
  add('--patience', type=float, default=60.0, help='seconds without a step until giving up')
  add('--api', choices=('nnx', 'linen'), default='nnx')
  add('--optimizer', choices=('spectral_newton', 'adamw'), default='spectral_newton')
  add('--damping', choices=('noise', 'constant'), default='noise', help='of spectral_newton')
  add('--learning-rate', type=float, default=0.01)
  add('--steps', type=int, default=100)
  add('--schedule-steps', type=int, help='of the schedule, if other than --steps')
  add('--batch-size', type=int, default=64)
  add('--seed', type=int, default=0)
  add('--checkpoints', type=pathlib.Path, metavar='FOLDER')
  add('--save-every', type=int, default=10)
  add('--print-every', type=int, default=10)
  add('--pause', type=float, default=0.0, help='seconds after every step')
  add('--output', type=pathlib.Path, help='JSON with the losses and the parameters')
  return parser


def main(argv: list[str] | None = None) -> None:
  args = make_parser().parse_args(argv)
  if args.virtual_devices:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', args.virtual_devices)
  if args.processes > 1:
    if not args.coordinator:
      raise SystemExit('--processes needs --coordinator, the address of process 0.')
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(
      args.coordinator,
      args.processes,
      args.process,
      # JAX itself ends a process whose others have gone silent, with less to say: later.
      heartbeat_timeout_seconds=2 * max(10, int(args.patience)),
      initialization_timeout=max(10, int(args.patience)),
    )
  try:
    result = train(args)
  except jax.errors.JaxRuntimeError as error:
    if args.processes == 1:
      raise
    # Not an exit that waits for the others.
    reason = str(error).splitlines()[0]
    fail(f'process {args.process} cannot go on without the others: {reason} {resume_hint(args)}')
    return
  if args.output and jax.process_index() == 0:
    args.output.write_text(json.dumps(result), encoding='utf-8')


if __name__ == '__main__':
  main()
