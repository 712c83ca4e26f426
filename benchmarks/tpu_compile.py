"""What a TPU would run, without one: compiled ahead of time for a TPU v5e.

    pip install 'jax[tpu]'                      # Its compiler; on a machine of any kind
    python benchmarks/tpu_compile.py            # Hours, on two busy cores
    python benchmarks/tpu_compile.py --sets resnet18 --contestants auto --rounds 1
    python benchmarks/tpu_compile.py --contestants gram    # Asked for by name: it takes minutes
    python benchmarks/tpu_compile.py --count               # The products alone, compiling nothing

An update is the whole of it: gradients in, new parameters and state out, one float32
program, compiled by libtpu for one core. Of each: how long that takes, whether there are
eigendecompositions and the like in it, the memory that it plans, the products in it counted
in bfloat16 passes (`_passes`), and the cycles that the compiler itself estimates, which
nobody has measured. All but the seconds are the same on every machine.
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
from collections.abc import Callable, Iterable, Sequence
from typing import Any

os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
# Nothing runs on a TPU, even if there is one.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# libtpu looks for the machine that it is on, and complains; or for others that use it.
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-16')
os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
os.environ.setdefault('TPU_WORKER_ID', '0')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')

import _measure
import _parameters
import _passes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import step_time
from jax.experimental import topologies
from tqdm import tqdm

import spectral_optax
from spectral_optax import solvers

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'examples'))
import reporting

TOPOLOGY = 'v5e:4x4'
ALPHAS = (2.0, 1.2, 0.85)
# What "auto" takes on a TPU, at every side. Here it would look at the machine that it is traced on.
AUTO = 'polynomial'
# Decompositions: only when asked for by name.
SLOW_TO_COMPILE = ('svd', 'gram', 'cholesky', 'low_rank')
REFERENCE = 'muon'
DEFAULT_SETS = ('resnet18', 'gpt2_12')
SETS: dict[str, Callable[[], dict[str, Any]]] = {
  **_parameters.SETS,
  'gpt2_12': lambda: {f'h_{i}': _parameters.gpt2_block(768, 3072) for i in range(12)},
}

# ---------------------------------------------------------------------------------
# Contestants
# ---------------------------------------------------------------------------------


def all_contestants() -> dict[str, Callable[..., optax.GradientTransformation]]:
  """By name, what makes an optimizer of a learning rate."""
  as_timed = {c.name: c.build for c in step_time.all_contestants()}
  made = {name: build for name, build in as_timed.items() if name.startswith(REFERENCE)}
  for name in ('defaults', 'constant'):
    made[name] = functools.partial(as_timed[name], solver=AUTO)
  for solver in ('auto', *solvers.SOLVERS):
    how = {'solver': AUTO if solver == 'auto' else solver}
    for alpha in ALPHAS:
      made[f'{solver} alpha={alpha:g}'] = functools.partial(
        spectral_optax.spectral_newton, alpha=alpha, **how
      )
  return made


def chosen_contestants(
  substrings: Sequence[str],
) -> dict[str, Callable[..., optax.GradientTransformation]]:
  """Those with one of the substrings in their names; Muon stays."""

  def wanted(name: str) -> bool:
    solver = name.split()[0]
    if name == REFERENCE:
      return True
    if solver in SLOW_TO_COMPILE and not any(solver in s for s in substrings):
      return False
    return any(s in name for s in substrings or [''])

  return {name: build for name, build in all_contestants().items() if wanted(name)}


def chosen_sets(substrings: Sequence[str]) -> dict[str, Callable[[], dict[str, Any]]]:
  if not substrings:
    return {name: SETS[name] for name in DEFAULT_SETS}
  chosen = {n: s for n, s in SETS.items() if any(sub in n for sub in substrings)}
  return chosen | {n: s for n, s in _parameters.HIDDEN_SETS.items() if n in substrings}


def parameters_of(shapes: dict[str, Any]) -> Any:
  """A tree of shapes, float32."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(getattr(leaf, 'shape', leaf), jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, _parameters.Kernel | tuple),
  )


# ---------------------------------------------------------------------------------
# What the compiler made
# ---------------------------------------------------------------------------------

COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$', re.MULTILINE)
LOOP = re.compile(r' while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)')
BRANCHES = re.compile(
  r' conditional\(.*(?:branch_computations=\{([^}]*)\}'
  r'|true_computation=%?([\w.-]+), false_computation=%?([\w.-]+))'
)
CALL = re.compile(r' call\(.*to_apply=%?([\w.-]+)')
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
BOUND = re.compile(r' (%?[\w.-]+) = s32\[\]\S* constant\((\d+)\)')
LESS = re.compile(r' compare\([^)]*?(%?[\w.-]+)\), direction=LT')
TARGET = re.compile(r'custom_call_target="([^"]+)"')
# The compiler's own ways of saying something: nothing is called.
NO_CALLS = frozenset(
  {'AllocateBuffer', 'AssumeGatherIndicesInBound', 'GatherScatterIndicesBitpacked', 'Sharding'}
)
# In the names of operations, which the loops that a decomposition is expanded to inherit.
DECOMPOSITION = re.compile(
  r'(?:^|[/_(.])(eigh|qr|svd|lu|cholesky|triangular_solve|householder\w*|geqrf|tridiagonal\w*)\b',
  re.IGNORECASE,
)
OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass
class Program:
  """Of the optimised HLO.

  Attributes:
    instructions: How many.
    loops: How many.
    custom_calls: How many, by target.
    decompositions: How many instructions come from one, by its name.
    cycles: As the compiler estimates them, loops by their rounds.
    open_loops: Of which it is not seen how often they run: once, in `cycles`.
  """

  instructions: int
  loops: int
  custom_calls: dict[str, int]
  decompositions: dict[str, int]
  cycles: int
  open_loops: int


def computations(hlo: str) -> tuple[dict[str, list[str]], str]:
  """Lines of instructions by computation, and which one is the whole program."""
  found, entry = {}, ''
  heads = list(COMPUTATION.finditer(hlo))
  for head in heads:
    end = hlo.find('\n}', head.end())
    found[head[2]] = [line for line in hlo[head.end() : end].splitlines() if ' = ' in line]
    entry = head[2] if head[1] else entry
  return found, entry


def rounds(condition: Iterable[str]) -> int | None:
  """Of a loop that counts from 0 to a constant; None if it does not look like one."""
  lines = list(condition)
  bounds = {m[1].lstrip('%'): int(m[2]) for line in lines for m in BOUND.finditer(f' {line}')}
  less = [m[1].lstrip('%') for line in lines for m in LESS.finditer(line)]
  return bounds.get(less[0]) if len(less) == 1 else None


def read_program(hlo: str) -> Program:
  parts, entry = computations(hlo)
  open_loops = 0

  @functools.cache
  def cycles(name: str) -> int:
    nonlocal open_loops
    total = 0
    for line in parts.get(name, ()):
      own = CYCLES.search(line)
      total += int(own[1]) if own else 0
      if loop := LOOP.search(line):
        times = rounds(parts.get(loop[1], ()))
        open_loops += times is None
        total += (1 if times is None else times) * (cycles(loop[1]) + cycles(loop[2]))
      elif branches := BRANCHES.search(line):
        names = branches[1].split(', ') if branches[1] else branches.groups()[1:]
        total += min(cycles(n.lstrip('%')) for n in names)
      elif call := CALL.search(line):
        total += cycles(call[1])
    return total

  lines = [line for of in parts.values() for line in of]
  targets = collections.Counter(TARGET.findall(hlo))
  named = collections.Counter()
  for name in OP_NAME.findall(hlo):
    named.update({m.lower() for m in DECOMPOSITION.findall(name)})
  return Program(
    instructions=len(lines),
    loops=sum(LOOP.search(line) is not None for line in lines),
    custom_calls=dict(targets.most_common()),
    decompositions=dict(named.most_common()),
    cycles=cycles(entry),
    open_loops=open_loops,
  )


# ---------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Figures:
  """Of one contestant on one set, as they are written down. Conditions: the usual branch."""

  trace_seconds: float
  compile_seconds: float
  cpu_seconds: float  # Of all threads, tracing included: on a busy machine the steadier one.
  compile_to_muon: float
  cpu_to_muon: float
  temp_bytes: int | None
  code_bytes: int | None
  flops: int
  pass_flops: int
  passes_to_muon: float
  worst_pass_flops: int  # With the dearest branch of every condition.
  worst_passes_to_muon: float
  parts: dict[str, int]  # `pass_flops` by function.
  uncounted: dict[str, int]
  cycles_to_muon: float
  program: Program
  all_trace_seconds: list[float]
  all_compile_seconds: list[float]
  all_cpu_seconds: list[float]


def measure(
  name: str, params: Any, device: Any, args: argparse.Namespace
) -> tuple[dict[str, Figures], dict[str, str]]:
  """Figures by contestant, and why some were left out."""
  racers, skipped = {}, {}
  for contestant, build in chosen_contestants(args.contestants).items():
    try:
      transformation = build(step_time.LEARNING_RATE)
      state = jax.eval_shape(transformation.init, params)
    except ValueError as error:
      skipped[contestant] = str(error)
      continue
    racers[contestant] = _measure.Racer(contestant, step_time.update_step(transformation), state)

  cpu: dict[str, list[float]] = {contestant: [] for contestant in racers}
  # Whose shapes live on a TPU is compiled for it.
  sharding = jax.sharding.SingleDeviceSharding(device)
  put = functools.partial(
    jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  )
  there = put(params)
  with _measure.no_compilation_cache():
    jax.jit(lambda x: x @ x).lower(put(jax.ShapeDtypeStruct((256, 256), jnp.float32))).compile()
    for racer in tqdm(
      [*racers.values()] * args.rounds, desc=f'{name}: compiling', disable=args.quiet
    ):
      racer.state = put(racer.state)
      start = time.process_time()
      try:
        racer.compile(there, there)
      except jax.errors.JaxRuntimeError as error:
        skipped[racer.name] = str(error).splitlines()[0]
      cpu[racer.name].append(time.process_time() - start)

  figures: dict[str, Figures] = {}
  muon: Figures | None = None
  for contestant, racer in racers.items():
    if contestant in skipped:
      continue
    usual, worst = (
      _passes.count(racer.step, params, racer.state, params, branch=branch) for branch in (min, max)
    )
    program = read_program(racer.compiled.as_text())
    memory = racer.compiled.memory_analysis()
    made = Figures(
      float(np.median(racer.trace_seconds)),
      float(np.median(racer.compile_seconds)),
      float(np.median(cpu[contestant])),
      1.0,
      1.0,
      getattr(memory, 'temp_size_in_bytes', None),
      getattr(memory, 'generated_code_size_in_bytes', None),
      usual.flops,
      usual.pass_flops,
      1.0,
      worst.pass_flops,
      1.0,
      usual.parts(),
      dict(worst.opaque) | ({'loops': worst.open_loops} if worst.open_loops else {}),
      1.0,
      program,
      racer.trace_seconds,
      racer.compile_seconds,
      cpu[contestant],
    )
    if contestant == REFERENCE:
      muon = made
    if muon is not None:
      over = lambda of, to: of / to if to else math.nan
      median = lambda of, to: float(np.median(np.array(of) / np.array(to)))
      made.compile_to_muon = median(made.all_compile_seconds, muon.all_compile_seconds)
      made.cpu_to_muon = median(made.all_cpu_seconds, muon.all_cpu_seconds)
      made.passes_to_muon = over(made.pass_flops, muon.pass_flops)
      made.worst_passes_to_muon = over(made.worst_pass_flops, muon.worst_pass_flops)
      made.cycles_to_muon = over(program.cycles, muon.program.cycles)
    figures[contestant] = made
    racer.compiled = None  # A large program is large.
  return figures, skipped


def count(params: Any, substrings: Sequence[str]) -> dict[str, int]:
  """FLOPs in bfloat16 passes, by contestant, from the traced program."""
  counted = {}
  for contestant, build in chosen_contestants(substrings).items():
    transformation = build(step_time.LEARNING_RATE)
    state = jax.eval_shape(transformation.init, params)
    step = step_time.update_step(transformation)
    counted[contestant] = _passes.count(step, params, state, params, branch=min).pass_flops
  return counted


# ---------------------------------------------------------------------------------
# Showing
# ---------------------------------------------------------------------------------


def listed(numbers: dict[str, int]) -> str:
  return ', '.join(f'{n} {name}' for name, n in numbers.items()) or '-'


COLUMNS: dict[str, Callable[[Figures], str]] = {
  'compile s': lambda f: f'{f.compile_seconds:.1f}',
  'x muon': lambda f: f'{f.compile_to_muon:.2f}',
  'CPU s': lambda f: f'{f.cpu_seconds:.1f}',
  'CPU x muon': lambda f: f'{f.cpu_to_muon:.2f}',
  'temp MB': lambda f: '' if f.temp_bytes is None else f'{f.temp_bytes / 1e6:.0f}',
  'GFLOP': lambda f: f'{f.flops / 1e9:.1f}',
  'GFLOP in passes': lambda f: f'{f.pass_flops / 1e9:.1f}',
  'passes x muon': lambda f: f'{f.passes_to_muon:.2f}',
  'at worst': lambda f: f'{f.worst_passes_to_muon:.2f}',
  'Mcycles': lambda f: f'{f.program.cycles / 1e6:.2f}',
  'cycles x muon': lambda f: f'{f.cycles_to_muon:.2f}',
  'loops': lambda f: str(f.program.loops),
  'code MB': lambda f: '' if f.code_bytes is None else f'{f.code_bytes / 1e6:.0f}',
  'decompositions': lambda f: listed(f.program.decompositions),
  'custom calls': lambda f: listed(
    {name: n for name, n in f.program.custom_calls.items() if name not in NO_CALLS}
  ),
  'not counted': lambda f: listed(f.uncounted),
}


def show(
  name: str,
  params: Any,
  figures: dict[str, Figures],
  skipped: dict[str, str],
  args: argparse.Namespace,
  console: rich.console.Console,
) -> None:
  columns = ['contestant', *COLUMNS]
  rows = [[name, *(cell(f) for cell in COLUMNS.values())] for name, f in figures.items()]
  size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  title = f'{name} on {TOPOLOGY}: {size / 1e6:.1f} million parameters'
  caption = (
    f'One update, compiled and never run; seconds are medians of {args.rounds}. CPU: of all its'
    ' threads, tracing included. Passes: of bfloat16 products. At worst: with the dearest branch'
    " of every condition. Cycles: the compiler's estimate."
  )
  console.print(_measure.rich_table(title, columns, rows, caption))
  for contestant, reason in skipped.items():
    console.print(f'Left out: {contestant}. {reason}', highlight=False)
  if args.markdown:
    console.print(
      f'{title}\n\n{_measure.markdown_table(columns, rows)}', soft_wrap=True, highlight=False
    )


# ---------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description='What a TPU would run, without one.')
  add = parser.add_argument
  results = pathlib.Path(__file__).parent / 'results'
  add(
    '--sets',
    nargs='+',
    default=[],
    metavar='TEXT',
    help=f'substrings of {", ".join(SETS)}; default {" and ".join(DEFAULT_SETS)}',
  )
  add(
    '--contestants',
    nargs='+',
    default=[],
    metavar='TEXT',
    help=f'substrings; only by their names {", ".join(SLOW_TO_COMPILE)}',
  )
  add('--rounds', type=int, default=3, help='in each, all are compiled once')
  add('--output', type=pathlib.Path, default=results / 'tpu_compile.json')
  add('--count', action='store_true', help='the products alone; compiles and writes nothing')
  add('--markdown', action='store_true', help='the tables once more, in Markdown')
  add('--quiet', action='store_true', help='no progress bars')
  return parser


def show_counts(args: argparse.Namespace) -> dict[str, dict[str, int]]:
  counts = {
    name: count(parameters_of(shapes()), args.contestants)
    for name, shapes in chosen_sets(args.sets).items()
  }
  console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
  for name, counted in counts.items():
    columns = ['contestant', 'GFLOP in passes', 'x muon']
    rows = [[c, f'{n / 1e9:.1f}', f'{n / counted[REFERENCE]:.2f}'] for c, n in counted.items()]
    console.print(_measure.rich_table(f'{name}: products in bfloat16 passes', columns, rows))
    if args.markdown:
      console.print(_measure.markdown_table(columns, rows), soft_wrap=True, highlight=False)
  return counts


def tpu() -> Any:
  """A device that is not there.

  Raises:
    RuntimeError: libtpu is not installed, or cannot describe it.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise RuntimeError("libtpu is not installed: pip install 'jax[tpu]'")
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=TOPOLOGY).devices[0]
  except Exception as error:
    reason = str(error).splitlines()[0]
    raise RuntimeError(f'libtpu does not describe a {TOPOLOGY}: {reason}') from error


def main(argv: list[str] | None = None) -> Any:
  """Runs the command line; returns what is written of this version of JAX."""
  parser = make_parser()
  args = parser.parse_args(argv)
  if not chosen_sets(args.sets):
    parser.error(f'no set has any of {args.sets} in its name; there are {", ".join(SETS)}')
  if args.rounds < 1:
    parser.error('--rounds must be at least 1')
  if args.count:
    return show_counts(args)
  try:
    device = tpu()
  except RuntimeError as error:
    parser.exit(1, f'{parser.prog}: {error}\n')
  # Without a terminal rich would fold the tables to 80 columns.
  console = rich.console.Console(width=None if sys.stdout.isatty() else 220)
  versions = {'libtpu': importlib.metadata.version('libtpu')}
  environment = {**reporting.environment(), **versions, 'topology': TOPOLOGY}
  content = json.loads(args.output.read_text('utf-8')) if args.output.is_file() else {}
  here = content.setdefault(f'{TOPOLOGY}/jax-{jax.__version__}', {})
  for name, shapes in chosen_sets(args.sets).items():
    tree = shapes()
    params = parameters_of(tree)
    kernels = _parameters.kernels_by_path(name, tree)
    figures, skipped = measure(name, params, device, args)
    here[name] = {
      'environment': environment,
      'settings': {'rounds': args.rounds},
      'matrices': {path: kernel.matrices for path, kernel in kernels.items()},
      'contestants': {name: dataclasses.asdict(of) for name, of in figures.items()},
      'skipped': skipped,
    }
    reporting.write_json(args.output, content)  # So far.
    show(name, params, figures, skipped, args, console)
  console.print(f'Written: {args.output}', soft_wrap=True)
  return here


if __name__ == '__main__':
  main()
