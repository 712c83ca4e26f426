"""What one device does and sends when it has others: 1, 2, 4 and 8 virtual devices.

    python benchmarks/scaling.py

One update of Spectral Newton's matrices (eight blocks of a GPT-2 of width 256, FSDP), compiled for
each: FLOPs of products, bytes sent, bytes of state of one device, and what they would be if all of
it were divided. Seconds are of virtual devices that share the cores there are: they say that it
runs, not how fast.
"""

import argparse
import os
import pathlib
import sys
import time
from typing import Any

os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import _collectives
import _measure
import jax
import numpy as np
import rich.console
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from pod_compile import flops_of_products

import spectral_optax

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'examples'))
import reporting


def shapes(width: int, blocks: int) -> dict[str, tuple[int, int]]:
  kinds = {'qkv': (1, 3), 'out': (1, 1), 'up': (1, 4), 'down': (4, 1)}
  return {
    f'h_{i}/{name}/kernel': (rows * width, columns * width)
    for i in range(blocks)
    for name, (rows, columns) in kinds.items()
  }


def measure(count: int, args: argparse.Namespace) -> dict[str, Any]:
  mesh = jax.sharding.Mesh(
    np.array(jax.devices()[:count]), ('fsdp',), axis_types=(AxisType.Explicit,)
  )
  tx = spectral_optax.scale_by_spectral_newton(damping='constant', solver=args.solver)
  with jax.set_mesh(mesh):
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P('fsdp')))
    rng = np.random.default_rng(0)
    grads = {
      path: place(rng.standard_normal(shape).astype(np.float32))
      for path, shape in shapes(args.width, args.blocks).items()
    }
    state = jax.jit(tx.init)(grads)
    compiled = jax.jit(tx.update).lower(grads, state).compile()
    _, after = jax.block_until_ready(compiled(grads, state))
    seconds = []
    for _ in range(args.rounds):
      start = time.perf_counter()
      jax.block_until_ready(compiled(grads, after))
      seconds.append(time.perf_counter() - start)
  of_one = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
  hlo = compiled.as_text() or ''
  return {
    'devices': count,
    'flops': flops_of_products(hlo),
    'bytes_sent': _collectives.bytes_sent(hlo, count, branch=min) if count > 1 else {},
    'parameter_bytes': sum(x.nbytes for x in jax.tree.leaves(grads)),
    'state_bytes': of_one(state),
    'seconds': seconds,
  }


def main(argv: list[str] | None = None) -> Any:
  parser = argparse.ArgumentParser(description='Work and bytes of one device among others.')
  add = parser.add_argument
  add('--devices', type=int, nargs='+', default=[1, 2, 4, 8])
  add('--width', type=int, default=256)
  add('--blocks', type=int, default=8)
  add('--solver', default='polynomial')
  add('--rounds', type=int, default=5)
  results = pathlib.Path(__file__).parent / 'results'
  add('--output', type=pathlib.Path, default=results / 'scaling.json')
  args = parser.parse_args(argv)
  jax.config.update('jax_num_cpu_devices', max(args.devices))
  found = [measure(count, args) for count in args.devices]
  columns = [
    'devices',
    'GFLOP',
    'x of one alone',
    'MB sent',
    'by all, x parameters',
    'state MB',
    's',
  ]
  rows = []
  for of in found:
    sent = sum(of['bytes_sent'].values())
    rows.append(
      [
        str(of['devices']),
        f'{of["flops"] / 1e9:.3f}',
        f'{of["flops"] / found[0]["flops"]:.3f}',
        f'{sent / 1e6:.2f}',
        f'{sent * of["devices"] / of["parameter_bytes"]:.2f}',
        f'{of["state_bytes"] / 1e6:.2f}',
        f'{np.median(of["seconds"]):.3f}',
      ]
    )
  rich.console.Console(width=120).print(_measure.markdown_table(columns, rows), highlight=False)
  settings = {key: getattr(args, key) for key in ('width', 'blocks', 'solver', 'rounds')}
  content = {'environment': reporting.environment(), 'settings': settings, 'devices': found}
  reporting.write_json(args.output, content)
  return content


if __name__ == '__main__':
  main()
