"""What a pod of TPUs would run, without one: a whole training step, compiled ahead of time.

    pip install 'jax[tpu]'                                  # Its compiler; on any machine
    python benchmarks/pod_compile.py                        # v5e:4x4
    python benchmarks/pod_compile.py --topologies v5e:8x8 v5e:16x16
    python benchmarks/pod_compile.py --mesh 8 2
    python benchmarks/pod_compile.py --contestants muon     # Of a name that has this in it

A GPT-2 medium in Flax (24 scanned blocks, width 1024, rows of 1024 tokens, bfloat16 products,
float32 parameters), its parameters over (fsdp, tp), its batch over fsdp; AdamW, Muon and
Spectral Newton under the same shardings. Of each step: seconds to compile, memory, FLOPs of
products and bytes that are sent by one device, by kind. Those of the optimizer are of its update
compiled alone, under the same shardings. FLOPs and bytes are read from the optimised program,
loops as often as they run, conditions by their usual (cheapest) branch.
"""

import argparse
import collections
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
# Nothing runs on a TPU, even if there is one; libtpu is not to look for others.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-16')
os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
os.environ.setdefault('TPU_WORKER_ID', '0')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')

import _collectives
import _measure
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import spectral_optax

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'examples'))
import reporting

REFERENCE = 'muon'
# (fsdp, tp) by topology.
MESHES = {'v5e:4x4': (4, 4), 'v5e:4x8': (8, 4), 'v5e:8x8': (16, 4), 'v5e:8x16': (32, 4)}
MESHES |= {'v5e:16x16': (32, 8)}
BATCH_TOKENS = 2**20  # Of one step at scale: what the optimizer's share is of.


@dataclasses.dataclass(frozen=True)
class Size:
  """Of the network."""

  layers: int = 24
  width: int = 1024
  heads: int = 16
  vocabulary: int = 50304
  length: int = 1024


SIZES = {
  'gpt2-medium': Size(),
  'tiny': Size(layers=2, width=128, heads=4, vocabulary=512, length=64),
}

# ---------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------


class Block(nn.Module):
  size: Size

  @nn.compact
  def __call__(self, x, _):
    size, half = self.size, functools.partial(nn.Dense, dtype=jnp.bfloat16)
    norm = functools.partial(nn.LayerNorm, dtype=jnp.bfloat16)
    qkv = half(3 * size.width, name='qkv')(norm(name='norm_1')(x))
    q, k, v = jnp.split(qkv.reshape(*x.shape[:2], size.heads, -1), 3, axis=-1)
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + half(size.width, name='out')(y.reshape(x.shape))
    y = half(4 * size.width, name='up')(norm(name='norm_2')(x))
    return x + half(size.width, name='down')(nn.gelu(y)), None


class Gpt(nn.Module):
  size: Size

  @nn.compact
  def __call__(self, tokens):
    size = self.size
    embed = nn.Embed(size.vocabulary, size.width, dtype=jnp.bfloat16, name='embedding')
    place = self.param('place', nn.initializers.normal(0.02), (size.length, size.width))
    x = embed(tokens) + place.astype(jnp.bfloat16)[None]
    blocks = nn.scan(
      nn.remat(Block),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=size.layers,
    )
    x, _ = blocks(size, name='layers')(x, None)
    return embed.attend(nn.LayerNorm(dtype=jnp.bfloat16, name='norm')(x))


def loss_of(network: nn.Module, params: Any, tokens: jax.Array) -> jax.Array:
  logits = jnp.asarray(network.apply(params, tokens[:, :-1]), jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def spec_of(path: str, shape: tuple[int, ...]) -> P:
  """FSDP over the width, tensor parallel over heads, hidden units and words."""
  if path.endswith('embedding'):
    return P('tp', 'fsdp')
  if len(shape) < 3:
    return P()
  return P(None, 'tp', 'fsdp') if '/out/' in path or '/down/' in path else P(None, 'fsdp', 'tp')


def path_of(key: Any) -> str:
  return jax.tree_util.keystr(key, simple=True, separator='/')


# ---------------------------------------------------------------------------------
# Contestants
# ---------------------------------------------------------------------------------


def contestants(specs: Any, mesh: Any) -> dict[str, optax.GradientTransformation]:
  # The embedding and everything that is no matrix go to AdamW, in all of them.
  numbers = jax.tree_util.tree_map_with_path(
    lambda key, s: (
      optax.contrib.MuonDimensionNumbers(1, 2)
      if path_of(key).startswith('params/layers') and path_of(key).endswith('kernel')
      else None
    ),
    specs,
    is_leaf=lambda x: isinstance(x, P),
  )
  newton = functools.partial(
    spectral_optax.spectral_newton,
    1e-3,
    solver='polynomial',
    weight_dimension_numbers=numbers,
    mesh=mesh,
    shardings=specs,
  )
  return {
    'adamw': optax.adamw(1e-3),
    'muon': optax.contrib.muon(1e-3, muon_weight_dimension_numbers=numbers),
    'spectral_newton': newton(),
    'constant damping': newton(damping='constant'),
    'constant damping, left to XLA': newton(damping='constant', work_axes=()),
  }


# ---------------------------------------------------------------------------------
# What the compiler made
# ---------------------------------------------------------------------------------

DEFINED = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = ([a-z]\w*)\[([\d,]*)\]')
CONVOLUTION = re.compile(r' (?:convolution|dot)\(')
OPERANDS = re.compile(r'%([\w.-]+)')
LABELS = re.compile(r'dim_labels=(\w+?)_(\w+?)->(\w+)')
CONTRACTING = re.compile(r'lhs_contracting_dims=\{([\d,]*)\}')


def dims(text: str) -> list[int]:
  return [int(n) for n in text.split(',') if n]


def flops_of_products(hlo: str) -> int:
  """2 · multiplications of one device; conditions by their cheapest branch, loops as they run."""
  parts, entry = _collectives.computations(hlo)

  def product(line: str, shapes: dict[str, list[int]]) -> int:
    found = DEFINED.match(line)
    result = math.prod(dims(found[3])) if found else 0
    at = CONVOLUTION.search(line)
    assert at is not None
    inside = line[at.end() :]
    lhs, rhs = (shapes.get(name, []) for name in OPERANDS.findall(inside)[:2])
    if contracting := CONTRACTING.search(line):
      return 2 * result * math.prod(lhs[i] for i in dims(contracting[1]))
    labels = LABELS.search(line)
    assert labels is not None
    # Every number of the result is a sum over the kernel but for its output features. A batch
    # of products is a convolution with a window over the batch that hits one at a time.
    kernel = [n for label, n in zip(labels[2], rhs, strict=True) if label == 'i']
    spatial = [(label, n) for label, n in zip(labels[2], rhs, strict=True) if label not in 'io']
    window = math.prod(n for _, n in spatial)
    batched = re.search(r'window=\{[^}]*(?:lhs_dilate|rhs_reversal|stride)', line)
    if batched and spatial:
      window = 1
    return 2 * result * math.prod(kernel) * window

  @functools.cache
  def of(name: str) -> int:
    lines, total = parts.get(name, []), 0
    shapes = {m[1]: dims(m[3]) for m in map(DEFINED.match, lines) if m}
    for line in lines:
      if loop := _collectives.LOOP.search(line):
        total += _collectives.trips(line, parts.get(loop[1], [])) * of(loop[2])
      elif branches := _collectives.BRANCHES.search(line):
        names = branches[1].split(', ') if branches[1] else branches.groups()[1:]
        total += min(of(n.lstrip('%')) for n in names)
      elif CONVOLUTION.search(line):
        total += product(line, shapes)
      else:
        total += sum(map(of, _collectives.CALLS.findall(line)))
    return total

  return of(entry)


@dataclasses.dataclass
class Figures:
  """Of one program, one device."""

  compile_seconds: float
  flops: int
  cost_analysis_flops: float  # The compiler's own: a loop once.
  bytes_sent: dict[str, int]
  argument_bytes: int | None
  temp_bytes: int | None
  code_bytes: int | None

  @property
  def total_bytes(self) -> int:
    return sum(self.bytes_sent.values())


def compiled_figures(function: Any, *arguments: Any, devices: int, out: Any, dump: Any) -> Figures:
  start = time.perf_counter()
  compiled = jax.jit(function, out_shardings=out).lower(*arguments).compile()
  seconds = time.perf_counter() - start
  hlo, memory = compiled.as_text() or '', compiled.memory_analysis()
  if dump is not None:
    dump.write_text(hlo)
  cost = compiled.cost_analysis() or {}
  return Figures(
    seconds,
    flops_of_products(hlo),
    float(cost.get('flops', math.nan)),
    dict(collections.Counter(_collectives.bytes_sent(hlo, devices, branch=min)).most_common()),
    getattr(memory, 'argument_size_in_bytes', None),
    getattr(memory, 'temp_size_in_bytes', None),
    getattr(memory, 'generated_code_size_in_bytes', None),
  )


def mesh_of(topology: str, args: argparse.Namespace) -> tuple[int, int]:
  return tuple(args.mesh) if args.mesh else MESHES[topology]


def measure(topology: str, args: argparse.Namespace, record: Any) -> Iterator[str]:
  """Fills the record; gives the name of what is new in it."""
  size = SIZES[args.size]
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  shape = mesh_of(topology, args)
  mesh = jax.sharding.Mesh(
    np.array(devices).reshape(shape), ('fsdp', 'tp'), axis_types=(AxisType.Auto,) * 2
  )
  network = Gpt(size)
  batch = shape[0] * args.rows
  tokens = jax.ShapeDtypeStruct((batch, size.length + 1), jnp.int32)
  shapes = jax.eval_shape(
    network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size.length), jnp.int32)
  )
  specs = jax.tree_util.tree_map_with_path(lambda key, x: spec_of(path_of(key), x.shape), shapes)
  there = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
  params = jax.tree.map(there, shapes, specs)
  tokens = there(tokens, P('fsdp'))
  by_shape = {
    x.shape: s
    for x, s in zip(
      jax.tree.leaves(shapes),
      jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)),
      strict=True,
    )
  }
  shardings = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  places = shardings(params)
  dump = lambda *what: args.dump and args.dump / f'{"-".join(what)}.txt'.replace(' ', '_')
  count = sum(x.size for x in jax.tree.leaves(shapes))
  record['parameters'], record['mesh'] = count, dict(zip(mesh.axis_names, shape, strict=True))
  record['tokens'] = batch * size.length
  for name, tx in contestants(specs, mesh).items():
    if args.contestants and not any(text in name for text in args.contestants):
      continue
    state = jax.eval_shape(tx.init, shapes)
    state = jax.tree.map(lambda x: there(x, by_shape.get(x.shape, P())), state)

    def update(grads, state, params, tx=tx):
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    def step(params, state, tokens, update=update):
      loss, grads = jax.value_and_grad(lambda p: loss_of(network, p, tokens))(params)
      grads = jax.lax.with_sharding_constraint(grads, places)
      return loss, *update(grads, state, params)

    out = shardings((params, state))
    own = compiled_figures(
      update, params, state, params, devices=mesh.size, out=out, dump=dump(topology, name, 'update')
    )
    row: dict[str, Any] = {'optimizer': dataclasses.asdict(own)}
    if not args.optimizer_only and 'left' not in name:
      whole = compiled_figures(
        step,
        params,
        state,
        tokens,
        devices=mesh.size,
        out=(NamedSharding(mesh, P()), *out),
        dump=dump(topology, name, 'step'),
      )
      row['step'] = dataclasses.asdict(whole)
      # The rest of the step is for as many tokens as were compiled.
      rest = (whole.flops - own.flops) * BATCH_TOKENS / record['tokens']
      row['share of FLOPs at 1 M tokens'] = own.flops / (rest + own.flops)
    record.setdefault('contestants', {})[name] = row
    yield name
  muon = record['contestants'].get(REFERENCE)
  for row in record['contestants'].values() if muon else ():
    for key, of in (
      ('FLOPs x muon', lambda o: o['flops']),
      ('bytes x muon', lambda o: sum(o['bytes_sent'].values())),
    ):
      row[key] = of(row['optimizer']) / of(muon['optimizer'])
  yield 'ratios'


def show(topology: str, record: Any, console: rich.console.Console, markdown: bool) -> None:
  columns = ['contestant', 'compile s', 'update s', 'GFLOP', 'x muon', 'MB sent', 'x muon']
  columns += ['share of FLOPs', 'temp MB', 'by kind, MB']
  rows = []
  for name, row in record['contestants'].items():
    own, step = row['optimizer'], row.get('step')
    ratio = lambda key: f'{row[key]:.2f}' if key in row else ''  # noqa: B023
    sent = own['bytes_sent']
    rows.append(
      [
        name,
        f'{step["compile_seconds"]:.0f}' if step else '',
        f'{own["compile_seconds"]:.0f}',
        f'{own["flops"] / 1e9:.1f}',
        ratio('FLOPs x muon'),
        f'{sum(sent.values()) / 1e6:.1f}',
        ratio('bytes x muon'),
        f'{row["share of FLOPs at 1 M tokens"]:.2%}' if step else '',
        f'{((step or own)["temp_bytes"] or 0) / 1e6:.0f}',
        ', '.join(f'{kind} {n / 1e6:.1f}' for kind, n in sent.items()),
      ]
    )
  title = f'{topology}, {record["mesh"]}: the optimizer of one device, one step'
  console.print(_measure.rich_table(title, columns, rows))
  if markdown:
    console.print(_measure.markdown_table(columns, rows), soft_wrap=True, highlight=False)


def main(argv: list[str] | None = None) -> Any:
  parser = argparse.ArgumentParser(description='What a pod of TPUs would run, without one.')
  add = parser.add_argument
  add('--topologies', nargs='+', default=['v5e:4x4'], choices=list(MESHES))
  add('--mesh', type=int, nargs=2, metavar=('FSDP', 'TP'), help='default: by topology')
  add('--contestants', nargs='+', default=[], metavar='TEXT', help='substrings of their names')
  add('--size', default='gpt2-medium', choices=list(SIZES))
  add('--rows', type=int, default=1, help='of tokens a device of fsdp has')
  add('--optimizer-only', action='store_true', help='not the whole step')
  add(
    '--output',
    type=pathlib.Path,
    default=pathlib.Path(__file__).parent / 'results' / 'pod_compile.json',
  )
  add('--dump', type=pathlib.Path, help='folder to write the optimised programs to')
  add('--markdown', action='store_true')
  args = parser.parse_args(argv)
  if importlib.util.find_spec('libtpu') is None:
    parser.exit(1, f"{parser.prog}: libtpu is not installed: pip install 'jax[tpu]'\n")
  if args.dump:
    args.dump.mkdir(parents=True, exist_ok=True)
  console = rich.console.Console(width=None if sys.stdout.isatty() else 200)
  content = json.loads(args.output.read_text('utf-8')) if args.output.is_file() else {}
  with _measure.no_compilation_cache():
    for topology in args.topologies:
      fsdp, tp = mesh_of(topology, args)
      key = f'{args.size}/{topology}/{fsdp}x{tp}/jax-{jax.__version__}'
      record = content.setdefault(key, {})  # Of earlier runs, other contestants.
      record |= {
        'environment': {**reporting.environment(), 'libtpu': importlib.metadata.version('libtpu')},
        'size': dataclasses.asdict(SIZES[args.size]),
      }
      for _ in measure(topology, args, record):
        reporting.write_json(args.output, content)  # So far.
      show(topology, record, console, args.markdown)
  console.print(f'Written: {args.output}', soft_wrap=True)
  return content


if __name__ == '__main__':
  main()
