"""What to expect of more chips than can be compiled for: the model of SCALING.md, as code.

    python benchmarks/scaling_model.py

Predicts FLOPs and bytes of one device's update for GPT-2 medium on meshes of any size, beside
what `pod_compile.py` has read from compiled programs. Compiles nothing.
"""

import json
import math
import os
import pathlib
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import _measure
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from spectral_optax import layout, sharding

LAYERS, WIDTH, PARAMETERS = 24, 1024, 354.9e6
KINDS = {'qkv': (1, 3), 'out': (1, 1), 'up': (1, 4), 'down': (4, 1)}
# Of products of n x n matrices: 14, iterates and the square to end with, of each of which 5/8 is
# computed; and with G one for the Gram matrix and two (sixteen bits of f) for the update.
F_PRODUCTS = 8.75
G_PRODUCTS = 3
MESHES = ((4, 4), (8, 2), (8, 4), (16, 4), (32, 4), (32, 8), (128, 8), (512, 16))


def predict(fsdp: int, tp: int) -> dict[str, float]:
  """Of one device: FLOPs, bytes sent, FLOPs of Muon divided evenly, FLOPs of the model."""
  shapes = {k: (LAYERS, r * WIDTH, c * WIDTH) for k, (r, c) in KINDS.items()}
  tree = {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in shapes.items()}
  views = layout.matrix_views(tree, MuonDimensionNumbers(1, 2))
  specs = {
    k: P(None, 'tp', 'fsdp') if k in ('out', 'down') else P(None, 'fsdp', 'tp') for k in tree
  }
  mesh = jax.sharding.AbstractMesh((fsdp, tp), ('fsdp', 'tp'))
  division = sharding.divide(tree, views, mesh=mesh, shardings=specs)
  assert division is not None
  deal, split = sharding.choose_deal(division, views, of_gram=True)
  dealt, parts = division.size(deal), division.size(split)
  slots = -(-LAYERS // dealt)
  ratio = sum(max(r, c) / min(r, c) for r, c in KINDS.values())
  listed = slots * len(KINDS)
  if parts == 1:
    solved = -(-LAYERS * len(KINDS) // dealt)
  else:
    solved = -(-listed // parts) if 2 * listed >= parts else listed
  unit = 2 * WIDTH**3
  square = 4 * WIDTH**2
  exchanged = 2 * slots * ratio * square / parts * (1 - 1 / dealt)
  # Dealt, they are filled up to as many on every device.
  moved = solved * parts if 2 * listed >= parts else listed
  summed = 2 * moved * square * (1 - 1 / parts)
  muon = LAYERS * sum(5 * (2 * max(r, c) / min(r, c) + 1) for r, c in KINDS.values())
  return {
    'deal': dealt,
    'split': parts,
    'flops': unit * (solved * F_PRODUCTS + slots * G_PRODUCTS * ratio / parts),
    'bytes': exchanged + (summed if parts > 1 else 0),
    'muon': unit * muon / (fsdp * tp),
    'model': 6 * PARAMETERS * 2**20 / (fsdp * tp),
  }


def main() -> None:
  results = pathlib.Path(__file__).parent / 'results' / 'pod_compile.json'
  compiled = {}
  if results.is_file():
    for record in json.loads(results.read_text('utf-8')).values():
      if record['size']['width'] == WIDTH and 'constant damping' in record['contestants']:
        of = record['contestants']['constant damping']['optimizer']
        compiled[tuple(record['mesh'].values())] = of['flops'], sum(of['bytes_sent'].values())
  columns = ['chips', 'fsdp x tp', 'deal x split', 'GFLOP', 'compiled', 'MB sent', 'compiled']
  columns += ['x Muon, ideally divided', 'share of 1 M tokens', 'of 4 M']
  rows = []
  for fsdp, tp in MESHES:
    of = predict(fsdp, tp)
    flops, sent = compiled.get((fsdp, tp), (math.nan, math.nan))
    shown = lambda x, by: '' if math.isnan(x) else f'{x / by:.1f}'
    share = lambda tokens: of['flops'] / (of['flops'] + tokens * of['model'])  # noqa: B023
    rows.append(
      [
        str(fsdp * tp),
        f'{fsdp} x {tp}',
        f'{of["deal"]} x {of["split"]}',
        f'{of["flops"] / 1e9:.1f}',
        shown(flops, 1e9),
        f'{of["bytes"] / 1e6:.1f}',
        shown(sent, 1e6),
        f'{of["flops"] / of["muon"]:.2f}',
        f'{share(1):.2%}',
        f'{share(4):.2%}',
      ]
    )
  sys.stdout.write(_measure.markdown_table(columns, rows) + '\n')


if __name__ == '__main__':
  main()
