"""What measuring curvature costs: a ResNet-18, layer by layer, beside Hessian-vector products.

    python benchmarks/curvature_cost.py                       # width 64, batch 1024
    python benchmarks/curvature_cost.py --width 16 --batch 64 --size 16 --budget 64
    python benchmarks/curvature_cost.py --size 8 --once --budget 8192    # 22 minutes, two cores

On images of noise, after initialisation; what is computed does not depend on the numbers.

  alone: a Hessian-vector product, forward over reverse, restricted to the layer, compiled,
    one direction a call; times the number of directions.
  batched: `directional_curvature` of that layer, all directions at once (as many as the
    budget holds), compiled.
  gain: alone over batched.
  measure: the whole of `curvature.measure`, gradients, decompositions and fits included,
    compiled, against alone / gain.

With `--once` everything runs once, and what compiling took is taken off; with `--layers` only as
many layers, evenly spaced, are timed by themselves, for the gain and for what all would take alone.

Planned memory is what the compiler says the largest program needs beside its arguments; peak
memory is what the process (or the accelerator) held more at its highest, while measuring,
than before.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'examples'))
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import _measure
import jax
import jax.numpy as jnp
import numpy as np
import optax
import reporting
import rich.console
from tqdm import tqdm

from spectral_optax import curvature, layout
from spectral_optax.curvature import _convolutions, directional

CLASSES = 10

# ---------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------


def make_parameters(width: int, stages: int, blocks: int, seed: int = 0) -> dict[str, Any]:
  """He's ResNet for small images: a stem, `stages` of `blocks` blocks, a head."""
  rng = np.random.default_rng(seed)

  def conv(window: int, inputs: int, outputs: int) -> dict[str, Any]:
    kernel = rng.normal(size=(window, window, inputs, outputs)) / (window * math.sqrt(inputs / 2))
    return {'kernel': kernel.astype(np.float32)}

  def norm(width: int) -> dict[str, Any]:
    return {'scale': np.ones(width, np.float32), 'bias': np.zeros(width, np.float32)}

  params: dict[str, Any] = {'stem': conv(3, 3, width), 'stem_norm': norm(width)}
  inputs = width
  for i in range(stages * blocks):
    outputs = width * 2 ** (i // blocks)
    block = {
      'conv1': conv(3, inputs, outputs),
      'norm1': norm(outputs),
      'conv2': conv(3, outputs, outputs),
      'norm2': norm(outputs),
    }
    if inputs != outputs:
      block |= {'conv_shortcut': conv(1, inputs, outputs), 'norm3': norm(outputs)}
    params[f'block_{i}'], inputs = block, outputs
  head = rng.normal(size=(inputs, CLASSES)) / math.sqrt(inputs)
  params['head'] = {'kernel': head.astype(np.float32), 'bias': np.zeros(CLASSES, np.float32)}
  return jax.tree.map(jnp.asarray, params)


def apply_conv(p: dict[str, Any], x: jax.Array, stride: int = 1) -> jax.Array:
  numbers = ('NHWC', 'HWIO', 'NHWC')
  return jax.lax.conv_general_dilated(
    x, p['kernel'], (stride, stride), 'SAME', dimension_numbers=numbers
  )


def apply_norm(p: dict[str, Any], x: jax.Array) -> jax.Array:
  x -= x.mean((0, 1, 2), keepdims=True)
  x *= jax.lax.rsqrt(jnp.square(x).mean((0, 1, 2), keepdims=True) + 1e-5)
  scale, bias = (p[name].reshape(1, 1, 1, -1) for name in ('scale', 'bias'))
  return x * scale + bias


def loss_fn(params: dict[str, Any], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
  x, labels = batch
  x = jax.nn.relu(apply_norm(params['stem_norm'], apply_conv(params['stem'], x)))
  i = 0
  while (p := params.get(f'block_{i}')) is not None:
    stride = 2 if i and 'conv_shortcut' in p else 1
    y = jax.nn.relu(apply_norm(p['norm1'], apply_conv(p['conv1'], x, stride)))
    y = apply_norm(p['norm2'], apply_conv(p['conv2'], y))
    if 'conv_shortcut' in p:
      x = apply_norm(p['norm3'], apply_conv(p['conv_shortcut'], x, stride))
    x, i = jax.nn.relu(x + y), i + 1
  logits = x.mean((1, 2)) @ params['head']['kernel'] + params['head']['bias'][None]
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# ---------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------


def seconds(call: Callable[[], Any], rounds: int) -> float:
  """Median, of what is compiled."""
  times = []
  for _ in range(rounds):
    start = time.perf_counter()
    call()
    times.append(time.perf_counter() - start)
  return float(np.median(times))


def single_product(params: Any, path: str, batch: Any) -> Callable[[Any, Any], jax.Array]:
  """One direction's curvature by a Hessian-vector product restricted to a layer."""
  leaves, treedef = jax.tree.flatten(params)
  position = list(layout.leaves_by_path(params)).index(path)
  view = layout.matrix_views(params)[path]

  @jax.jit
  def product(leaves, batch, u, v):
    def loss(leaf):
      replaced = [*leaves[:position], leaf, *leaves[position + 1 :]]
      return loss_fn(jax.tree.unflatten(treedef, replaced), batch)

    direction = view.from_matrices((u[:, None] * v[None, :])[None])
    product = lambda leaf: jax.jvp(jax.grad(loss), (leaf,), (direction,))[1]
    # As quick as `measure` has it: XLA is slow at small images on a CPU.
    return jnp.vdot(direction, _convolutions.channels_last(product)(leaves[position]))

  def call(u, v):
    with jax.default_matmul_precision('highest'):
      return jax.block_until_ready(product(leaves, batch, u, v))

  return call


def peak_memory() -> int | None:
  """Bytes at the highest since `reset_peak_memory`; None where nobody knows."""
  statistics = jax.devices()[0].memory_stats()
  if statistics:
    return statistics.get('peak_bytes_in_use')
  try:
    status = pathlib.Path('/proc/self/status').read_text()
    return 1024 * int(status.split('VmHWM:')[1].split()[0])
  except (OSError, IndexError):
    return None


def reset_peak_memory() -> None:
  with contextlib.suppress(OSError):
    pathlib.Path('/proc/self/clear_refs').write_text('5')


class Plan(NamedTuple):
  """Of a program: the temporary memory that the compiler planned, and its time."""

  bytes: int
  seconds: float


@contextlib.contextmanager
def planned() -> Iterator[list[Plan]]:
  """Of each program that runs inside."""
  plans: list[Plan] = []
  compiled = directional._compiled

  def spy(*arguments):
    # It calls itself by its name where a program would need too much: that is its time too.
    directional._compiled = compiled
    start = time.perf_counter()
    program: Any = compiled(*arguments)
    took = time.perf_counter() - start
    directional._compiled = spy
    plans.append(Plan(getattr(program.memory_analysis(), 'temp_size_in_bytes', 0), took))
    return program

  directional._compiled = spy
  try:
    yield plans
  finally:
    directional._compiled = compiled


# ---------------------------------------------------------------------------------
# The benchmark
# ---------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, Any]:
  params = make_parameters(args.width, args.stages, args.blocks)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(args.batch, args.size, args.size, 3)).astype(np.float32)
  batch = jax.block_until_ready((jnp.asarray(x), jnp.asarray(rng.integers(0, CLASSES, args.batch))))
  views = layout.matrix_views(params)
  budget = int(args.budget * 2**20)
  directions = {}
  for path, view in views.items():
    k = min(args.top_k, view.rows, view.columns)
    u, v = (rng.normal(size=(1, k, n)).astype(np.float32) for n in (view.rows, view.columns))
    u, v = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (u, v))
    directions[path] = jnp.asarray(u), jnp.asarray(v)

  measure = functools.partial(
    curvature.measure, loss_fn, params, top_k=args.top_k, batches=[batch], memory_budget=budget
  )
  once = lambda plans, took: took - sum(plan.seconds for plan in plans)
  reset_peak_memory()
  before = peak_memory()
  with planned() as plans:
    first = seconds(measure, 1)
  whole = once(plans, first)
  print(f'measure: {first:.1f} s, {whole:.1f} s not compiling', file=sys.stderr, flush=True)
  if not args.once:
    reset_peak_memory()
    before = peak_memory()
    whole = seconds(measure, args.rounds)
  after = peak_memory()

  layers = {}
  chosen = np.linspace(0, len(views) - 1, min(args.layers or len(views), len(views)))
  for path in tqdm([[*views][i] for i in chosen.astype(int)], desc='layers', disable=args.quiet):
    u, v = directions[path]
    one = {path: directions[path]}
    batched = functools.partial(
      curvature.directional_curvature,
      *(loss_fn, params, one),
      batches=[batch],
      memory_budget=budget,
    )
    alone = functools.partial(single_product(params, path, batch), u[0, 0], v[0, 0])
    with planned() as own:
      start = time.perf_counter()
      h = batched()[0][path][0]
      took = once(own, time.perf_counter() - start)
    single = float(alone())
    layers[path] = {
      'shape': [views[path].rows, views[path].columns],
      'directions': len(h),
      'alone_seconds': len(h) * seconds(alone, args.rounds),
      'batched_seconds': took if args.once else seconds(batched, args.rounds),
      'difference': (single - h[0]) / np.abs(h).max(),
    }
    if args.reverse:
      in_reverse = functools.partial(batched, method='reverse')
      in_reverse()
      layers[path]['batched_reverse_seconds'] = seconds(in_reverse, args.rounds)
  alone, batched = (
    sum(layer[f'{name}_seconds'] for layer in layers.values()) for name in ('alone', 'batched')
  )
  gain = alone / batched
  # Of layers that were not timed, as of those that were, by direction.
  each = alone / sum(layer['directions'] for layer in layers.values())
  alone = each * sum(len(u[0]) for u, _ in directions.values())
  return {
    'settings': {
      name: getattr(args, name)
      for name in (
        *('width', 'stages', 'blocks', 'batch', 'size', 'top_k', 'budget', 'rounds'),
        *('once', 'layers'),
      )
    },
    'measure_seconds': whole,
    'first_measure_seconds': first,
    'alone_seconds': alone,
    'batched_seconds': alone / gain,
    'gain': gain,
    'measure_over_alone_by_gain': whole / (alone / gain),
    'budget_bytes': budget,
    'planned_bytes': max(plan.bytes for plan in plans),
    'peak_bytes': None if before is None or after is None else after - before,
    'layers': layers,
    'environment': reporting.environment(),
  }


def show(report: dict[str, Any], console: rich.console.Console) -> None:
  columns = ['layer', 'shape', 'directions', 'alone s', 'batched s', 'gain', 'in reverse s']
  rows = [
    [
      path.removesuffix('/kernel'),
      '{} x {}'.format(*layer['shape']),
      str(layer['directions']),
      f'{layer["alone_seconds"]:.3g}',
      f'{layer["batched_seconds"]:.3g}',
      f'{layer["alone_seconds"] / layer["batched_seconds"]:.2f}',
      f'{layer["batched_reverse_seconds"]:.3g}' if 'batched_reverse_seconds' in layer else '',
    ]
    for path, layer in report['layers'].items()
  ]
  mega = lambda x: 'unknown' if x is None else f'{x / 2**20:.0f} MiB'
  caption = (
    f'All of measure: {report["measure_seconds"]:.3g} s'
    f' ({report["first_measure_seconds"]:.3g} s with compilation),'
    f' {report["measure_over_alone_by_gain"]:.2f} times {report["alone_seconds"]:.3g} s alone'
    f' / {report["gain"]:.2f}. Memory: budget {mega(report["budget_bytes"])}, planned'
    f' {mega(report["planned_bytes"])}, at its peak {mega(report["peak_bytes"])}.'
  )
  settings = report['settings']
  title = 'ResNet of width {width}, {batch} images of {size} x {size}'.format(**settings)
  console.print(_measure.rich_table(title, columns, rows, caption))


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs the command line; returns this device's part of the JSON."""
  parser = argparse.ArgumentParser(description='What measuring the curvature of a ResNet costs.')
  add = parser.add_argument
  add('--width', type=int, default=64, help='channels of the first stage, %(default)s')
  add('--stages', type=int, default=4, help='each twice as wide as the last, %(default)s')
  add('--blocks', type=int, default=2, help='in each stage, %(default)s')
  add('--batch', type=int, default=1024, help='images, %(default)s')
  add('--size', type=int, default=32, help='of the images, %(default)s')
  add('--top-k', type=int, default=20, help='directions of each layer, %(default)s')
  add('--budget', type=float, default=16384, help='MiB for intermediate results, %(default)s')
  add('--rounds', type=int, default=3, help='timings of each, %(default)s')
  add('--once', action='store_true', help='each runs once, what compiling takes is taken off')
  add('--layers', type=int, default=0, help='how many are timed by themselves, default all')
  add('--reverse', action='store_true', help='also batched with method="reverse"')
  add('--output', type=pathlib.Path)
  add('--quiet', action='store_true', help='no progress bar')
  args = parser.parse_args(argv)
  results = pathlib.Path(__file__).parent / 'results'
  output = args.output or results / 'curvature_cost.json'
  report = run(args)
  show(report, rich.console.Console(width=None if sys.stdout.isatty() else 120))
  environment = report['environment']
  key = f'{environment["backend"]}/{environment["device_kind"]}/width-{args.width}'
  key += f'/batch-{args.batch}/size-{args.size}'
  content = json.loads(output.read_text('utf-8')) if output.is_file() else {}
  reporting.write_json(output, {**content, key: report})
  return report


if __name__ == '__main__':
  main()
