"""What one update costs: Spectral Newton with every solver, Muon, AdamW and the floor.

    python benchmarks/step_time.py                                # All of it: hours on a CPU
    python benchmarks/step_time.py --sets vit gpt2 --contestants auto "gram alpha=1.2"
    python benchmarks/step_time.py --quick
    python benchmarks/step_time.py --calibrate                    # Is "auto" right, here?
    python benchmarks/step_time.py --calibrate --quick            # Its table of costs alone

An update is the whole of it: gradients in, new parameters and state out, one compiled
program. All contestants of a set are timed in one process, taking turns, and compared by
the median of their ratios to `optax.contrib.muon` in the same round. The floor is what no
method that starts from the Gram matrix can do without: the product GᵀG and one product
of that size with G. Results of other sets, devices and versions of JAX stay in the file.
"""

import argparse
import dataclasses
import functools
import inspect
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

# LAPACK's threads and XLA's would fight for the same cores. Read when JAX is imported.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import _measure
import _parameters
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

import spectral_optax
from spectral_optax import solvers

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'examples'))
import reporting

ALPHAS = (2.0, 1.2, 0.85)
TOLERANCE = 1e-3  # Of these, besides their default.
TOLERANT = ('rational', 'polynomial', 'auto')
RANK = 16
LEARNING_RATE = 1e-3
REFERENCES = ('floor', 'muon')
OPTIONS = inspect.signature(spectral_optax.spectral_newton).parameters

# ---------------------------------------------------------------------------------
# Contestants
# ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Contestant:
  name: str
  build: Callable[..., optax.GradientTransformation]  # Called with the learning rate.
  solver: str | None = None  # And what follows: of Spectral Newton.
  alpha: float | None = None
  tolerance: float | None = None


def spectral_newton(solver: str, alpha: float, tolerance: float | None) -> Contestant:
  options: dict[str, Any] = {'tolerance': tolerance} if tolerance is not None else {}
  if solver == 'low_rank' and 'rank' in OPTIONS:
    options['rank'] = RANK
  build = functools.partial(spectral_optax.spectral_newton, alpha=alpha, solver=solver, **options)
  suffix = '' if tolerance is None else f' tol={tolerance:g}'
  return Contestant(f'{solver} alpha={alpha:g}{suffix}', build, solver, alpha, tolerance)


def spectral_newtons() -> list[Contestant]:
  """Every solver that there is, whether or not it can do every α."""
  made = []
  for alpha, solver in itertools.product(ALPHAS, [*solvers.SOLVERS, 'auto']):
    approximates = solver in TOLERANT and 'tolerance' in OPTIONS
    for tolerance in (None, TOLERANCE) if approximates else (None,):
      made.append(spectral_newton(solver, alpha, tolerance))
  return made


def all_contestants() -> list[Contestant]:
  muon = functools.partial(
    optax.contrib.muon,
    muon_weight_dimension_numbers=spectral_optax.weight_dimension_numbers,
    consistent_rms=0.2,
  )
  return [
    Contestant('adamw', optax.adamw),
    Contestant('muon', muon),
    Contestant('muon_aol', functools.partial(muon, preconditioning='aol', ns_steps=4)),
    Contestant('defaults', spectral_optax.spectral_newton),
    Contestant('constant', functools.partial(spectral_optax.spectral_newton, damping='constant')),
    *spectral_newtons(),
  ]


def update_step(transformation: optax.GradientTransformation) -> Callable[..., Any]:
  def step(grads, state, params):
    updates, state = transformation.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step


def floor_step(parameters: _parameters.ParameterSet) -> Callable[..., Any]:
  """GᵀG on the smaller side, and G times that: same-shaped matrices are one batch.

  With the device's own precision, which is Muon's too.
  """

  def step(grads, state, params):
    del params
    groups: dict[tuple[int, ...], list[jax.Array]] = {}
    for g in parameters.matrices(grads).values():
      g = g if g.shape[1] >= g.shape[2] else g.swapaxes(1, 2)
      groups.setdefault(g.shape[1:], []).append(g)
    products = []
    for group in groups.values():
      g = jnp.concatenate(group)
      products.append(jnp.matmul(g, jnp.einsum('bij,bik->bjk', g, g)))
    return products, state

  return step


def line_up(
  contestants: Iterable[Contestant], parameters: _parameters.ParameterSet
) -> tuple[dict[str, _measure.Racer], dict[str, str]]:
  """Those that can be timed on this set, and why the others cannot."""
  racers, skipped = {}, {}
  for contestant in contestants:
    try:
      transformation = contestant.build(LEARNING_RATE)
      state = transformation.init(parameters.params)
    except ValueError as error:
      skipped[contestant.name] = str(error)
      continue
    racers[contestant.name] = _measure.Racer(
      contestant.name,
      update_step(transformation),
      state,
      every_round=contestant.name in REFERENCES,
    )
  return racers, skipped


# ---------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------


def errors(
  contestant: Contestant,
  parameters: _parameters.ParameterSet,
  exact: dict[str, _parameters.Reference],
) -> dict[str, float]:
  """‖ΔW - U T(Σ) Vᵀ‖ / ‖U T(Σ) Vᵀ‖ of the update as T leaves it, of a warm optimizer."""
  if contestant.alpha is None or not exact:
    return {}
  transformation = contestant.build(1.0, momentum=0.0, update_rms=None)
  state = transformation.init(parameters.params)
  update = jax.jit(transformation.update)
  updates = parameters.grads
  for _ in range(_measure.WARM_UP):
    updates, state = update(parameters.grads, state, parameters.params)
  matrices, dampings = parameters.matrices(updates), optax.tree.get(state, 'damping')
  found = {}
  for path, reference in exact.items():
    damping = float(np.ravel(dampings[path])[0])
    wanted = reference.transferred(contestant.alpha, damping)
    difference = -np.asarray(matrices[path][0], np.float64) - wanted
    found[path] = float(np.linalg.norm(difference) / np.linalg.norm(wanted))
  return found


# ---------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Figures:
  """Of one contestant on one set, as they are written down."""

  solver: str | None
  alpha: float | None
  tolerance: float | None
  ms: float
  ms_quartiles: list[float]
  ratio_to_muon: float
  ratio_to_floor: float
  trace_seconds: float
  compile_seconds: float
  temp_bytes: int | None
  flops: float | None
  state_bytes: int
  state_to_parameter_bytes: float
  error: float | None  # The largest of `errors`.
  errors: dict[str, float]
  all_trace_seconds: list[float]
  all_compile_seconds: list[float]
  all_ms: list[float]  # By round; null: sat it out.


def measure(
  parameters: _parameters.ParameterSet, contestants: Sequence[Contestant], args: argparse.Namespace
) -> tuple[dict[str, Figures], dict[str, str]]:
  """Figures by contestant, `floor` last; and why some were left out."""
  racers, skipped = line_up(contestants, parameters)
  racers['floor'] = _measure.Racer('floor', floor_step(parameters), (), every_round=True)
  run(parameters, racers.values(), args, compilations=1 + args.compile_rounds)
  exact = _parameters.references(parameters) if args.errors else {}
  figures, parameter_bytes = {}, _measure.tree_bytes(parameters.params)
  for contestant in (*contestants, Contestant('floor', optax.identity)):
    if contestant.name in skipped:
      continue
    racer = racers[contestant.name]
    ms = 1e3 * np.array(racer.seconds)
    wrong = errors(contestant, parameters, exact)
    state_bytes = _measure.tree_bytes(racer.state)
    figures[contestant.name] = Figures(
      contestant.solver,
      contestant.alpha,
      contestant.tolerance,
      float(np.nanmedian(ms)),
      np.nanpercentile(ms, [25, 75]).tolist(),
      _measure.ratio(racer, racers['muon']),
      _measure.ratio(racer, racers['floor']),
      float(np.median(racer.trace_seconds)),
      float(np.median(racer.compile_seconds)),
      racer.temp_bytes,
      racer.flops,
      state_bytes,
      state_bytes / parameter_bytes,
      float(np.max(list(wrong.values()))) if wrong else None,  # NaN, if there is one.
      wrong,
      racer.trace_seconds,
      racer.compile_seconds,
      ms.tolist(),
    )
  return figures, skipped


def run(
  parameters: _parameters.ParameterSet,
  racers: Iterable[_measure.Racer],
  args: argparse.Namespace,
  compilations: int,
) -> None:
  racers, data = list(racers), (parameters.grads, parameters.params)
  how = {'title': parameters.name, 'quiet': args.quiet}
  _measure.compile_all(racers, *data, times=compilations, **how)
  _measure.race(racers, *data, rounds=args.rounds, seconds=args.seconds, **how)


# ---------------------------------------------------------------------------------
# Showing
# ---------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[Figures], str]] = {
  'ms': lambda f: f'{f.ms:.4g}',
  'quartiles': lambda f: ' to '.join(f'{q:.4g}' for q in f.ms_quartiles),
  'x muon': lambda f: f'{f.ratio_to_muon:.3g}',
  'x floor': lambda f: f'{f.ratio_to_floor:.3g}',
  'error': lambda f: '' if f.error is None else f'{f.error:.1e}',
  'trace s': lambda f: f'{f.trace_seconds:.2f}',
  'compile s': lambda f: f'{f.compile_seconds:.2f}',
  'temp MB': lambda f: '' if f.temp_bytes is None else f'{f.temp_bytes / 1e6:.1f}',
  'state x params': lambda f: f'{f.state_to_parameter_bytes:.2f}',
  'flops (XLA)': lambda f: '' if f.flops is None else f'{f.flops:.2e}',
}


def show(
  parameters: _parameters.ParameterSet,
  figures: dict[str, Figures],
  skipped: dict[str, str],
  args: argparse.Namespace,
  console: rich.console.Console,
) -> None:
  columns = ['contestant', *COLUMNS]
  rows = [[name, *(cell(f) for cell in COLUMNS.values())] for name, f in figures.items()]
  count = sum(kernel.matrices[0] for kernel in parameters.kernels.values())
  size = sum(leaf.size for leaf in jax.tree.leaves(parameters.params))
  title = f'{parameters.name}: {count} matrices, {size / 1e6:.1f} million parameters'
  caption = (
    f'One update, medians of {args.rounds} rounds (fewer for the slow). Error: relative, of T'
    ' applied to the largest matrices, against a double precision SVD.'
  )
  console.print(_measure.rich_table(title, columns, rows, caption))
  if skipped:
    console.print(f'Left out: {", ".join(skipped)}.', highlight=False)
  if args.markdown:
    console.print(
      f'{title}\n\n{_measure.markdown_table(columns, rows)}', soft_wrap=True, highlight=False
    )


def plot(sets: dict[str, Any], title: str, path: pathlib.Path) -> None:
  """A panel a set: how many times Muon's time each contestant takes."""
  colours = {None: '#777777', 2.0: '#0072B2', 1.2: '#E69F00', 0.85: '#009E73'}
  bars = {
    name: {c: f for c, f in content['contestants'].items() if c not in REFERENCES}
    for name, content in sets.items()
  }
  # Not through pyplot: there is nothing to show, and no backend to choose.
  heights = [len(of) + 3 for of in bars.values()]
  figure = Figure(figsize=(9, 0.22 * sum(heights) + 0.5), dpi=120, layout='constrained')
  panels = figure.subplots(len(bars), 1, squeeze=False, height_ratios=heights)[:, 0]
  figure.suptitle(title)
  for axes, (name, of) in zip(panels, bars.items(), strict=True):
    ratios = [f['ratio_to_muon'] for f in of.values()]
    colour = [colours.get(f['alpha'], '#777777') for f in of.values()]
    axes.barh(list(of), ratios, color=colour, log=True)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color='black', linewidth=1, label='Muon')
    floor = sets[name]['contestants']['floor']['ratio_to_muon']
    axes.axvline(floor, color='black', linewidth=1, linestyle=':', label='floor')
    axes.set_title(f"{name}: time over Muon's", loc='left')
    axes.invert_yaxis()
    axes.tick_params(axis='y', labelsize=8)
    # Above the bars: nothing is hidden.
    axes.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)


# ---------------------------------------------------------------------------------
# Calibration
# ---------------------------------------------------------------------------------

# Matrices in the batch, rows, columns.
GRID = [
  *((batch, n, n) for n in (64, 128, 256) for batch in (1, 16, 100)),
  *((batch, 512, 512) for batch in (1, 16)),
  (12, 384, 1536),
  (1, 1024, 1024),
  (1, 768, 3072),
  (1, 2048, 512),
  (1, 2048, 2048),
]
# The reference, and a truncation that one must ask for.
NEVER_CHOSEN = ('svd', 'low_rank')


# Smaller sides that the costs in `solvers.COSTS` are measured at; poles, and steps, at a time.
COST_SIDES = (64, 128, 256, 384, 768, 2048)
COST_POLES, COST_STEPS = 3, 8


def cost_parts() -> dict[str, Callable[[jax.Array], Any]]:
  """What solvers consist of, from positive definite matrices, (batch, n, n)."""

  def products(product):
    def steps(y):
      batch = len(y)
      rate, weights = jnp.full(batch, 2.8), jnp.ones((batch, COST_STEPS + 2))
      run = lambda layout: functools.partial(
        solvers.polynomial._sum_of_iterates, product=product, layout=layout
      )
      return jax.lax.platform_dependent(
        y,
        rate,
        weights,
        cpu=run(solvers.polynomial.IN_CACHE),
        tpu=run(solvers.polynomial.FEW_FLOPS),
        default=run(solvers.polynomial.FEW_KERNELS),
      )

    return steps

  def poles(y):
    shifts = jnp.broadcast_to(
      jnp.geomspace(0.01, 1, COST_POLES, dtype=y.dtype), (len(y), COST_POLES)
    )
    return solvers.rational._inverses(y, jnp.ones_like(shifts), shifts)

  parts = {
    'product': products(solvers.polynomial.float32_product),
    'poles': poles,
    'eigenvectors': solvers.gram._eigenvectors,
  }
  if jax.default_backend() != 'cpu':
    parts['bfloat16 product'] = products(solvers.polynomial.bfloat16_product)
  return parts


def measure_costs(args: argparse.Namespace, console: rich.console.Console) -> list[dict[str, Any]]:
  """What belongs in `solvers.COSTS`, measured: in products of n x n matrices.

  Off a CPU, of products in bfloat16, which are what the default tolerance takes there. A
  table made of it decides between "rational", "polynomial" and "gram".
  """
  found = []
  for n in COST_SIDES:
    batch = max(1, min(100, 2**22 // n**2))
    g = np.random.default_rng(0).standard_normal((batch, n, 2 * n), np.float32)
    y = jnp.asarray(np.einsum('bij,bkj->bik', g, g) / (12 * n))  # Eigenvalues up to 1/2.
    racers = [
      _measure.Racer(name, lambda y, state, _, part=part: (part(y), state), ())
      for name, part in cost_parts().items()
    ]
    how = {'title': f'{batch} x {n} x {n}', 'quiet': args.quiet}
    _measure.compile_all(racers, y, (), times=1, **how)
    _measure.race(racers, y, (), rounds=args.rounds, seconds=min(args.seconds, 2.0), **how)
    ms = {racer.name: 1e3 * float(np.nanmedian(racer.seconds)) for racer in racers}
    product = ms.get('bfloat16 product', ms['product']) / (COST_STEPS + 1)
    # As in `choose_solver`: the first pole is half of one.
    cost = solvers.Cost(ms['poles'] / (COST_POLES - 0.5) / product, ms['eigenvectors'] / product)
    found.append({'side': n, 'batch': batch, 'ms': ms, **cost._asdict()})
    table = solvers.COSTS.get(jax.default_backend(), {1: solvers.ELSEWHERE})
    now = table[max(side for side in table if side <= n)]
    cells = ' '.join(f'{name} {value:.3g}' for name, value in ms.items())
    console.print(
      f'{batch} x {n} x {n}: Cost({cost.pole:.2g}, {cost.eigenvectors:.3g}), in the table'
      f' Cost({now.pole:g}, {now.eigenvectors:g}); ms: {cells}',
      highlight=False,
    )
  return found


def auto_choice(
  alpha: float, damping: float, shape: tuple[int, int, int], tolerance: float | None
) -> str:
  """What "auto" takes here. All that knows the arguments of `choose_solver` is in here."""
  tolerance = solvers.DEFAULT_TOLERANCE if tolerance is None else tolerance
  return solvers.choose_solver('auto', alpha, damping, min(shape[1:]), tolerance=tolerance)


def grid_set(batch: int, rows: int, columns: int) -> _parameters.ParameterSet:
  name = f'{batch} x {rows} x {columns}'
  if batch == 1:
    return _parameters.make_set(name, {'Dense_0': _parameters.dense((rows,), (columns,))})
  return _parameters.make_set(
    name, {'ScanDense_0': _parameters.dense((rows,), (columns,), (batch,))}
  )


def calibrate(args: argparse.Namespace, console: rich.console.Console) -> list[dict[str, Any]]:
  """Whether "auto" takes the fastest solver, shape by shape.

  Timed with all that an update does besides, the same for all of them. With `--quick`, in
  place of that, what the parts of solvers cost.
  """
  if args.quick:
    return measure_costs(args, console)
  found = []
  contestants = [c for c in spectral_newtons() if c.solver not in (*NEVER_CHOSEN, 'auto')]
  contestants = filtered(contestants, args.contestants)
  tolerances = (None, TOLERANCE) if 'tolerance' in OPTIONS else (None,)
  for shape in args.shapes:
    parameters = grid_set(*shape)
    racers, _ = line_up(contestants, parameters)
    run(parameters, racers.values(), args, compilations=1)
    for alpha, tolerance in itertools.product(ALPHAS, tolerances):
      ms, damping = {}, 0.0
      for c in contestants:  # In this order, so with this tolerance where that matters.
        if c.name in racers and c.alpha == alpha and c.tolerance in (None, tolerance):
          ms[c.solver] = 1e3 * float(np.nanmedian(racers[c.name].seconds))
          (d,) = optax.tree.get(racers[c.name].state, 'damping').values()
          damping = float(np.ravel(d)[0])
      if ms:
        choice = auto_choice(alpha, damping, shape, tolerance)
        fastest = min(ms, key=ms.__getitem__)
        case = {'shape': shape, 'alpha': alpha, 'tolerance': tolerance}
        found.append({**case, 'ms': ms, 'auto': choice, 'fastest': fastest})
  show_calibration(found, args, console)
  return found


def show_calibration(
  found: list[dict[str, Any]], args: argparse.Namespace, console: rich.console.Console
) -> None:
  names = list(dict.fromkeys(solver for case in found for solver in case['ms']))
  columns = ['matrices', 'alpha', 'tolerance', *(f'{n} ms' for n in names), 'auto', 'fastest', '']
  rows = []
  for case in found:
    ms, choice, fastest = case['ms'], case['auto'], case['fastest']
    slower = f'<- {ms[choice] / ms[fastest]:.2f} x' if choice in ms else '<- not timed'
    rows.append(
      [' x '.join(map(str, case['shape'])), f'{case["alpha"]:g}']
      + ['default' if case['tolerance'] is None else f'{case["tolerance"]:g}']
      + [f'{ms[n]:.3g}' if n in ms else '' for n in names]
      + [choice, fastest, '' if choice == fastest else slower]
    )
  console.print(_measure.rich_table('What "auto" chooses, and what is fastest', columns, rows))
  if args.markdown:
    console.print(_measure.markdown_table(columns, rows), soft_wrap=True, highlight=False)


# ---------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------


def filtered(contestants: Iterable[Contestant], substrings: Sequence[str]) -> list[Contestant]:
  """Those with one of the substrings in their names; what they are compared with stays."""
  wanted = lambda name: name in REFERENCES or any(s in name for s in substrings or [''])
  return [c for c in contestants if wanted(c.name)]


def chosen_sets(substrings: Sequence[str]) -> dict[str, Callable[[], dict[str, Any]]]:
  chosen = {
    n: s for n, s in _parameters.SETS.items() if any(sub in n for sub in substrings or [''])
  }
  return chosen | {n: s for n, s in _parameters.HIDDEN_SETS.items() if n in substrings}


def shape(text: str) -> tuple[int, int, int]:
  batch, rows, columns = map(int, text.split('x'))
  return batch, rows, columns


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description='What one update costs, optimizer by optimizer.')
  add = parser.add_argument
  add(
    '--sets',
    nargs='+',
    default=[],
    metavar='TEXT',
    help=f'substrings of {", ".join(_parameters.SETS)}',
  )
  add('--contestants', nargs='+', default=[], metavar='TEXT', help='substrings; see the table')
  add('--rounds', type=int, help='in each, all take a turn; default 30')
  add('--compile-rounds', type=int, help='repeats of each compilation; default 1')
  add('--seconds', type=float, help='what takes longer in all is in fewer rounds; default 30')
  add(
    '--dtype',
    default='float32',
    choices=('float32', 'bfloat16'),
    help='of parameters and gradients',
  )
  add('--quick', action='store_true', help='few rounds of hundred_64, written to runs/')
  add('--output', type=pathlib.Path, help='default benchmarks/results/step_time.json')
  add('--plot', action=argparse.BooleanOptionalAction, default=True, help='a PNG beside the JSON')
  add('--errors', action=argparse.BooleanOptionalAction, default=True, help='one more compilation')
  add('--markdown', action='store_true', help='the tables once more, in Markdown')
  add(
    '--calibrate',
    action='store_true',
    help='compare the choices of "auto" with timings; with --quick, measure its table of costs',
  )
  add('--shapes', nargs='+', type=shape, default=GRID, metavar='BxMxN', help='for --calibrate')
  add('--quiet', action='store_true', help='no progress bars')
  return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
  parser = make_parser()
  args = parser.parse_args(argv)
  results = pathlib.Path(__file__).parent / 'results'
  defaults: dict[str, Any] = (
    # Not over what was measured with patience.
    {'rounds': 5, 'compile_rounds': 0, 'seconds': 2.0, 'output': pathlib.Path('runs')}
    if args.quick
    else {'rounds': 30, 'compile_rounds': 1, 'seconds': 30.0, 'output': results}
  )
  defaults['output'] /= 'step_time.json'
  for name, value in defaults.items():
    if getattr(args, name) is None:
      setattr(args, name, value)
  if args.quick and not args.sets:
    args.sets = ['hundred_64']
  if not chosen_sets(args.sets):
    parser.error(
      f'no set has any of {args.sets} in its name; there are {", ".join(_parameters.SETS)}'
    )
  return args


def main(argv: list[str] | None = None) -> Any:
  """Runs the command line; returns this device's part of the JSON, or the calibration."""
  args = parse(argv)
  # Without a terminal rich would fold the tables to 80 columns.
  console = rich.console.Console(width=None if sys.stdout.isatty() else 150)
  if args.calibrate:
    return calibrate(args, console)
  contestants = filtered(all_contestants(), args.contestants)
  environment = reporting.environment()
  key = f'{environment["backend"]}/{environment["device_kind"]}/jax-{environment["jax"]}'
  if args.dtype != 'float32':
    key += f'/{args.dtype}'
  content = json.loads(args.output.read_text('utf-8')) if args.output.is_file() else {}
  here = content.setdefault(key, {})
  for name, shapes in chosen_sets(args.sets).items():
    parameters = _parameters.make_set(name, shapes(), args.dtype)
    figures, skipped = measure(parameters, contestants, args)
    here[name] = {
      'environment': environment,
      'settings': {
        **{option: getattr(args, option) for option in ('rounds', 'compile_rounds', 'seconds')},
        **{'warm_up': _measure.WARM_UP, 'learning_rate': LEARNING_RATE, 'rank': RANK},
      },
      'matrices': {path: kernel.matrices for path, kernel in parameters.kernels.items()},
      'parameter_bytes': _measure.tree_bytes(parameters.params),
      'contestants': {name: dataclasses.asdict(of) for name, of in figures.items()},
      'skipped': skipped,
    }
    reporting.write_json(args.output, content)  # So far.
    show(parameters, figures, skipped, args, console)
  written = [args.output]
  if args.plot:
    # Of this backend: another's picture stays.
    of = '_'.join([environment['backend'], *([] if args.dtype == 'float32' else [args.dtype])])
    written.append(args.output.with_name(f'{args.output.stem}_{of}.png'))
    plot(here, key, written[1])
  console.print(f'Written: {", ".join(map(str, written))}', soft_wrap=True)
  return here


if __name__ == '__main__':
  main()
