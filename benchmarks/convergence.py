"""Spectral Newton beside tuned rivals: several seeds, equal tuning, on real data.

    python benchmarks/convergence.py                           # All contestants, all tasks: hours
    python benchmarks/convergence.py --tasks gpt-bytes --contestants muon spectral_newton
    python benchmarks/convergence.py --map --tasks gpt-bytes   # Loss over α and σ*
    python benchmarks/convergence.py --schedules               # α that moves
    python benchmarks/convergence.py --measure                 # α, for who needs it before training
    python benchmarks/convergence.py --time                    # Milliseconds and FLOPs of a step
    python benchmarks/convergence.py --report                  # Tables and plots of what there is,
                                                               # and the README's part of them
    python benchmarks/convergence.py --pack-data data.npz      # To take to another machine:
    python benchmarks/convergence.py --data-file data.npz --lanes 256

Development tasks are what defaults are chosen on, confirmation tasks what they are confirmed on
(`_problems.TASKS`). Every contestant is tuned with as many trials (learning rates, and values of
one more knob where it has one), over the full schedule, on seeds that are not reported, by the
loss on validation data; test data are seen by the reported trainings alone, at their end.

All trainings of one task and one optimizer are lanes of one compiled program, `--lanes` of them at
once: one or two on a CPU, hundreds on a GPU. Every finished training is a line of a file under
--work and is not run again, so that an interrupted command goes on where it was. Ends with tables
(Markdown), plots and JSON in benchmarks/results/, of all that is under --work.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

# LAPACK's threads and XLA's would fight for the same cores. Read when JAX is imported.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'examples'))

import _contestants
import _convergence_report
import _measured
import _problems
import _timing
import jax
import jax.numpy as jnp
import numpy as np
from reporting import environment, write_json
from tqdm import tqdm

RESULTS = pathlib.Path(__file__).parent / 'results' / 'convergence.json'
README = pathlib.Path(__file__).parents[1] / 'README.md'
MEASURED = RESULTS.with_name('convergence_measured.json')
Lane = _contestants.Lane
Record = dict[str, Any]

# ---------------------------------------------------------------------------------
# What has been trained
# ---------------------------------------------------------------------------------


class Store:
  """Finished trainings, a line each in a file for each task and program."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._found: dict[str, Record] = {}
    for path in sorted(folder.glob('*/*.jsonl')):
      for line in path.read_text('utf-8').splitlines():
        try:
          record = json.loads(line)
        except json.JSONDecodeError:
          continue  # The line that an interruption cut short.
        self._found[record['key']] = record

  @staticmethod
  def key(problem: _problems.Problem, program: str, lane: Lane) -> str:
    """What a training is known by: all that its outcome depends on."""
    return _digest([problem.fingerprint(), program, lane])

  def get(self, problem: _problems.Problem, program: str, lane: Lane) -> Record | None:
    """A training, if it is finished."""
    return self._found.get(self.key(problem, program, lane))

  def all_of(self, problem: _problems.Problem, program: str) -> list[Record]:
    """Every finished training of a task and a program."""
    this = _digest(problem.fingerprint())
    records = self._found.values()
    return [r for r in records if r['problem'] == this and r['program'] == program]

  def add(
    self, problem: _problems.Problem, program: str, lanes: Sequence[Lane], records: Sequence[Record]
  ) -> None:
    """Keeps trainings, in memory and in the file."""
    path = self._folder / problem.task.name / f'{program}.jsonl'
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    of = {'problem': _digest(problem.fingerprint()), 'program': program}
    for lane, record in zip(lanes, records, strict=True):
      key = self.key(problem, program, lane)
      # As it will be read again.
      self._found[key] = _finite({'key': key, **of, 'lane': lane, **record})
      lines.append(json.dumps(self._found[key]) + '\n')
    with path.open('a', encoding='utf-8') as file:
      if file.tell() and not path.read_bytes().endswith(b'\n'):
        file.write('\n')
      file.write(''.join(lines))


def _digest(x: Any) -> str:
  return hashlib.sha1(json.dumps(x, sort_keys=True).encode()).hexdigest()


def _finite(x: Any) -> Any:
  """Numbers to six digits, None for what JSON has none for."""
  if isinstance(x, dict):
    return {k: _finite(v) for k, v in x.items()}
  if isinstance(x, list | tuple):
    return [_finite(v) for v in x]
  if isinstance(x, float):
    return float(f'{x:.7g}') if math.isfinite(x) else None
  return x


# ---------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------


class OutOfTimeError(Exception):
  """The time that --budget gives is over."""


def of_lanes(
  problem: _problems.Problem, build: _problems.Build, lane: Any
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """`Problem.start` and `Problem.advance` of many lanes; `lane` is one, or its shapes.

  Whole numbers in the state of an optimizer are counts of steps, the same for all lanes, and have
  no axis of lanes: of a count for each, a `jax.lax.cond` on it would become both of its branches,
  and what is done every few steps would be done always.
  """
  start = functools.partial(problem.start, build)
  advance = functools.partial(problem.advance, build)
  *_, state = jax.eval_shape(start, lane)
  counts = lambda x: x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer)
  axes = 0, 0, jax.tree.map(lambda x: None if counts(x) else 0, state)
  return (
    jax.vmap(start, out_axes=axes),
    jax.vmap(advance, in_axes=(axes, 0, 0, None), out_axes=(axes, 0)),
  )


class Runner:
  """The compiled programs of a task and an optimizer, for so many lanes at once."""

  def __init__(self, problem: _problems.Problem, program: str, width: int):
    self.problem, self.program, self.width = problem, program, width
    self.ready = threading.Event()
    self.trace_seconds = 0.0
    self._compiled: list[concurrent.futures.Future] = []
    self._error: BaseException | None = None

  def prepare(self, pool: concurrent.futures.Executor, evaluations: dict[Any, Any]) -> None:
    """Traces here, compiles in the pool; evaluation is one for all programs of a width."""
    begin = time.perf_counter()
    try:
      problem = self.problem
      program = _contestants.PROGRAMS[self.program]
      lane = _contestants.traced(problem, {'seed': 0, 'rate': 0.0})
      lanes = {
        k: jax.ShapeDtypeStruct((self.width, *np.shape(v)), v.dtype) for k, v in lane.items()
      }
      if program.trainer is not None:
        start, advance = program.trainer(problem)
        self._compiled = [pool.submit(lambda: advance), pool.submit(lambda: start)]
        carry = jax.eval_shape(jax.vmap(problem.init), lanes['seed'])
      else:
        assert program.build is not None
        build = functools.partial(program.build, problem)
        start, advance = of_lanes(problem, build, lane)
        carry = jax.eval_shape(start, lanes)
        task = problem.task
        which = jax.ShapeDtypeStruct((self.width, task.every, task.batch_size), jnp.int32)
        lowered = [
          jax.jit(advance, donate_argnums=0).lower(carry, lanes, which, problem.arrays),
          jax.jit(start).lower(lanes),
        ]
        self._compiled = [pool.submit(x.compile) for x in lowered]
      evaluate = jax.vmap(problem.evaluate, in_axes=(0, 0, None, None))
      key = id(problem), self.width
      if key not in evaluations:
        piece = problem.evaluation('validation')[0]
        evaluations[key] = pool.submit(jax.jit(evaluate).lower(*carry[:2], *piece).compile)
      self._compiled.append(evaluations[key])
    except BaseException as error:
      self._error = error
    finally:
      self.trace_seconds = time.perf_counter() - begin
      self.ready.set()

  def programs(self) -> list[Any]:
    """`advance`, `start` and `evaluate`, once they are compiled."""
    self.ready.wait()
    if self._error is not None:
      raise self._error
    return [future.result() for future in self._compiled]

  def run(self, lanes: Sequence[Lane], *, test: bool, title: str, quiet: bool) -> list[Record]:
    """Trains lanes, no more than there is width for."""
    advance, start, evaluate = self.programs()
    problem, task = self.problem, self.problem.task
    padded = [*lanes, *[lanes[-1]] * (self.width - len(lanes))]
    each = [_contestants.traced(problem, lane) for lane in padded]
    arrays = {k: jnp.asarray(np.stack([of[k] for of in each])) for k in each[0]}
    samples = np.stack([problem.samples(int(lane['seed'])) for lane in padded])
    curve = problem.evaluation('validation')[0]
    carry = start(arrays)
    train, points = [], []
    begin = time.perf_counter()
    with tqdm(total=task.steps, desc=title, disable=quiet, mininterval=0.5) as bar:
      for step in range(0, task.steps, task.every):
        carry, losses = advance(carry, arrays, samples[:, step : step + task.every], problem.arrays)
        points.append(evaluate(*carry[:2], *curve))
        train.append(np.asarray(losses, np.float64))
        bar.set_postfix_str(f'loss {np.nanmedian(train[-1][: len(lanes)]):.3f}', refresh=False)
        bar.update(task.every)
    finals = {}
    for part in ('validation', *(('test',) if test else ())):
      whole = [evaluate(*carry[:2], *piece) for piece in problem.evaluation(part)]
      finals[part] = np.mean(np.asarray(jax.device_get(whole), np.float64), axis=0)
    seconds = time.perf_counter() - begin
    curves = np.asarray(jax.device_get(points), np.float64)  # (points, 2, lanes)
    return [
      {
        'train': [float(x[i]) for x in train],
        'validation': curves[:, 0, i].tolist(),
        'accuracy': curves[:, 1, i].tolist(),
        **{
          f'{part}_{name}': float(values[k, i])
          for part, values in finals.items()
          for k, name in enumerate(('loss', 'accuracy'))
        },
        'seconds': seconds / len(lanes),
        'backend': jax.default_backend(),
      }
      for i in range(len(lanes))
    ]


def perform(
  runner: Runner, lanes: Iterable[Lane], store: Store, args: argparse.Namespace, what: str
) -> None:
  """Trains those lanes that have not been, a width at a time."""
  problem, program = runner.problem, runner.program
  missing = missing_lanes(problem, program, lanes, store)
  batches = [missing[i : i + runner.width] for i in range(0, len(missing), runner.width)]
  for number, batch in enumerate(batches):
    if time.perf_counter() > args.deadline:
      raise OutOfTimeError
    part = f' {number + 1}/{len(batches)}' if len(batches) > 1 else ''
    title = f'{problem.task.name}, {program}, {what}{part}, {len(batch)} lanes'
    waiting = time.perf_counter()
    advance, *_ = runner.programs()
    test = any(lane['seed'] < min(_contestants.TUNING_SEEDS) for lane in batch)
    begin = time.perf_counter()
    records = runner.run(batch, test=test, title=title, quiet=args.quiet)
    store.add(problem, program, batch, records)
    if args.log:
      memory = ''
      if hasattr(advance, 'memory_analysis'):
        memory = f'; {advance.memory_analysis().temp_size_in_bytes / 1e9:.2f} GB'
      print(
        f'{title}: {time.perf_counter() - begin:.1f} s, after waiting {begin - waiting:.1f} s for'
        f' the compiler, traced in {runner.trace_seconds:.1f} s{memory}',
        file=sys.stderr,
        flush=True,
      )


def missing_lanes(
  problem: _problems.Problem, program: str, lanes: Iterable[Lane], store: Store
) -> list[Lane]:
  """Those that the store has not, each once."""
  unique = {Store.key(problem, program, lane): lane for lane in lanes}
  return [lane for lane in unique.values() if store.get(problem, program, lane) is None]


# ---------------------------------------------------------------------------------
# What is to be trained
# ---------------------------------------------------------------------------------


def tuning_lanes(problem: _problems.Problem, contestant: _contestants.Contestant) -> list[Lane]:
  """All trials of a contestant."""
  return [
    contestant.lane(problem, seed, rate, knob)
    for rate, knob in contestant.grid()
    for seed in _contestants.TUNING_SEEDS
  ]


def tuned(
  problem: _problems.Problem, contestant: _contestants.Contestant, store: Store
) -> dict[str, Any] | None:
  """The trial with the smallest mean validation loss, and all losses; None if some are missing."""
  losses = []
  for rate, knob in contestant.grid():
    of_seeds = [
      store.get(problem, contestant.program_on(problem), contestant.lane(problem, seed, rate, knob))
      for seed in _contestants.TUNING_SEEDS
    ]
    if any(record is None for record in of_seeds):
      return None
    found = [_number(record['validation_loss']) for record in of_seeds if record is not None]
    losses.append(float(np.mean(found)))
  grid = contestant.grid()
  best = int(np.argmin(losses))
  tried = sorted({rate for rate, _ in grid})
  return {
    'rate': grid[best][0],
    'knob': grid[best][1],
    'loss': losses[best],
    'at_the_edge': grid[best][0] in (tried[0], tried[-1]),
    'trials': [[rate, knob, loss] for (rate, knob), loss in zip(grid, losses, strict=True)],
  }


def _number(x: float | None) -> float:
  return math.inf if x is None or not math.isfinite(x) else x


def report_lanes(
  problem: _problems.Problem,
  contestant: _contestants.Contestant,
  store: Store,
  seeds: Sequence[int],
) -> list[Lane]:
  """At what tuning has found, on other seeds."""
  found = tuned(problem, contestant, store)
  if found is None:
    return []
  return [contestant.lane(problem, seed, found['rate'], found['knob']) for seed in seeds]


def map_lanes(args: argparse.Namespace) -> list[Lane]:
  """Every cell of the map, at every rate, on every seed."""
  cells = itertools.product(args.alphas, args.turns, args.rates, args.map_seeds)
  return [_contestants.map_lane(*cell, momentum=args.momentum) for cell in cells]


def path_lanes(args: argparse.Namespace) -> list[Lane]:
  """Every exponent that moves, at every rate, on every seed."""
  return [
    _contestants.path_lane(*path, rate, seed)
    for path in _contestants.PATHS
    for rate, seed in itertools.product(args.rates, args.map_seeds)
  ]


def momentum_lanes(problem: _problems.Problem, args: argparse.Namespace) -> dict[str, list[Lane]]:
  """By program, at other momenta: Muon, the cells, and what --noise and --defaults ask for."""
  usual = _contestants.PER_LANE['momentum']
  ours = program_of_defaults(problem)
  lanes: dict[str, list[Lane]] = {'spectral_newton': [], 'muon': [], NOISE: [], ours: []}
  for momentum in args.momenta:
    own = {} if momentum == usual else {'momentum': momentum}
    for rate, seed in itertools.product(args.rates, args.map_seeds):
      usual_lane = {'seed': seed, 'rate': rate} | own
      lanes['muon'].append(usual_lane)
      lanes['spectral_newton'] += [
        _contestants.map_lane(*cell, rate, seed, momentum=own.get('momentum'))
        for cell in itertools.product(args.alphas, args.turns)
      ]
      if args.noise:
        lanes[NOISE] += [usual_lane | {'alpha': alpha} for alpha in args.alphas]
      if args.defaults:
        lanes[ours].append(usual_lane)
  return {program: of for program, of in lanes.items() if of}


def program_of_defaults(problem: _problems.Problem) -> str:
  """Key of the program that trains with the defaults, on this task."""
  return _contestants.contestants({})['spectral_newton'].program_on(problem)


NOISE = 'noise_of_alpha'  # The program whose σ* the noise sets.
REFERENCES = ('muon', 'adamw')  # Beside a map: same rates, same seeds.
FIRST = ('spectral_newton', *REFERENCES)  # Of all tasks, before other programs.
MAP_SEEDS_FROM = 200


def reference_lanes(args: argparse.Namespace) -> list[Lane]:
  """Of each reference."""
  return [
    {'seed': seed, 'rate': rate} for rate, seed in itertools.product(args.rates, args.map_seeds)
  ]


def wanted(
  problem: _problems.Problem, args: argparse.Namespace
) -> dict[str, list[tuple[str, list[Lane]]]]:
  """By program, what is to be trained first, with a word for each part."""
  parts: dict[str, list[tuple[str, list[Lane]]]] = {}
  add = lambda program, what, lanes: parts.setdefault(program, []).append((what, lanes))
  if args.map:
    add('spectral_newton', 'map', map_lanes(args))
  if args.schedules:
    add('spectral_newton', 'schedules', path_lanes(args))
  for program, moved in momentum_lanes(problem, args).items() if args.momenta else ():
    add(program, 'momenta', moved)
  if args.map or args.schedules:
    for program in REFERENCES:
      add(program, 'reference', reference_lanes(args))
  if args.compare:
    lanes: dict[str, list[Lane]] = {}
    for contestant in args.chosen:
      if not contestant.can_run(problem):
        continue
      program = contestant.program_on(problem)
      lanes.setdefault(program, []).extend(tuning_lanes(problem, contestant))
    for program, of in lanes.items():
      add(program, 'tuning', of)
  return parts


def trained_by(
  problem: _problems.Problem, program: str, chosen: Iterable[_contestants.Contestant]
) -> list[_contestants.Contestant]:
  """Those whose trainings a program does, on this task."""
  return [c for c in chosen if c.program_on(problem) == program and c.can_run(problem)]


def train_all(
  problems: Iterable[_problems.Problem], store: Store, args: argparse.Namespace
) -> list[str]:
  """Compiles in the background, trains what is compiled, and writes it down.

  What fails (memory, a package that does not run here) does not stop the others; returns it.
  """
  failed = []
  runners: list[tuple[Runner, list[tuple[str, list[Lane]]]]] = []
  for problem in problems:
    for program, parts in wanted(problem, args).items():
      lanes = [lane for _, of in parts for lane in of]
      count = len(missing_lanes(problem, program, lanes, store))
      for contestant in trained_by(problem, program, args.chosen) if args.compare else ():
        report = report_lanes(problem, contestant, store, args.seeds)
        count = count or len(missing_lanes(problem, program, report, store))
      if count:
        most = max(1, args.lanes // problem.task.weight)
        if _contestants.PROGRAMS[program].trainer is not None:
          most = 1
        width = math.ceil(count / math.ceil(count / most))
        runners.append((Runner(problem, program, width), parts))
  # Where time runs out, what matters most is there.
  runners.sort(key=lambda of: of[0].program not in FIRST)
  evaluations: dict[Any, Any] = {}
  with concurrent.futures.ThreadPoolExecutor(args.compile_threads) as pool:
    # Its own thread: the first is trained while the others are traced.
    tracing = threading.Thread(
      target=lambda: [runner.prepare(pool, evaluations) for runner, _ in runners], daemon=True
    )
    tracing.start()
    try:
      for runner, parts in runners:
        try:
          train_one(runner, parts, store, args)
        except Exception as error:
          if isinstance(error, OutOfTimeError):
            raise
          failed.append(f'{runner.problem.task.name}, {runner.program}: {error!r}'[:2000])
          print(f'Failed: {failed[-1]}', file=sys.stderr, flush=True)
    except OutOfTimeError:
      print(f'After {args.budget:g} s: the rest is left for another time.', file=sys.stderr)
      pool.shutdown(wait=False, cancel_futures=True)
  return failed


def train_one(
  runner: Runner,
  parts: Iterable[tuple[str, list[Lane]]],
  store: Store,
  args: argparse.Namespace,
) -> None:
  """What is wanted of a task and a program, and the reported trainings that follow from it."""
  # As one, so that few batches are padded.
  whole = [lane for _, lanes in parts for lane in lanes]
  perform(runner, whole, store, args, ', '.join(what for what, _ in parts))
  if args.compare:
    lanes = [
      lane
      for contestant in trained_by(runner.problem, runner.program, args.chosen)
      for lane in report_lanes(runner.problem, contestant, store, args.seeds)
    ]
    perform(runner, lanes, store, args, 'report')


# ---------------------------------------------------------------------------------
# What has come out
# ---------------------------------------------------------------------------------


def outcome(problem: _problems.Problem, store: Store, args: argparse.Namespace) -> dict[str, Any]:
  """All that the store has on a task, as the JSON keeps it."""
  task = problem.task
  what = {**task.fingerprint(), 'stage': task.stage, 'data_sha1': problem.data_sha1}
  found: dict[str, Any] = {'task': what, 'contestants': {}}
  cost = read_cost(args.work, task)
  for contestant in args.everyone:
    best = tuned(problem, contestant, store) if contestant.can_run(problem) else None
    if best is None:
      continue
    runs = []
    for seed in range(min(_contestants.TUNING_SEEDS)):
      lane = contestant.lane(problem, seed, best['rate'], best['knob'])
      record = store.get(problem, contestant.program_on(problem), lane)
      if record is not None:
        hidden = ('key', 'problem', 'program', 'lane')
        runs.append({'seed': seed, **{k: v for k, v in record.items() if k not in hidden}})
    found['contestants'][contestant.name] = {
      'what': contestant.what,
      'program': contestant.program_on(problem),
      'knob': contestant.knob[0],
      'tuned': best,
      'runs': runs,
      'cost': cost_of(problem, contestant, args.everyone, cost),
    }

  # What was run beside the contestants has seeds of its own.
  apart = lambda program: [
    r for r in store.all_of(problem, program) if r['lane']['seed'] >= MAP_SEEDS_FROM
  ]
  cells: dict[str, dict[float, dict[int, float]]] = {}
  for record in apart('spectral_newton'):
    lane = record['lane']
    cell = {
      'alpha': lane['alpha'],
      'alpha_end': lane.get('alpha_end', lane['alpha']),
      'turn': lane['turn'],
      'momentum': lane.get('momentum', _contestants.PER_LANE['momentum']),
    }
    losses = cells.setdefault(json.dumps(cell), {}).setdefault(lane['rate'], {})
    losses[lane['seed']] = _number(record['validation_loss'])
  found['cells'] = [{**json.loads(cell), **best_rate(losses)} for cell, losses in cells.items()]
  found['references'] = {}
  for program in REFERENCES:
    by_rate: dict[float, dict[int, float]] = {}
    for record in apart(program):
      lane = record['lane']
      if 'momentum' not in lane:
        by_rate.setdefault(lane['rate'], {})[lane['seed']] = _number(record['validation_loss'])
    if by_rate:
      found['references'][program] = best_rate(by_rate)
  defaults = apart(program_of_defaults(problem))
  found['momenta'] = momenta(apart('muon'), found['cells'], apart(NOISE), defaults)
  return found


def merged(before: dict[str, Any], found: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
  """`outcome` of a store, and what an earlier one had of the same task and this one has not.

  So that a contestant can be added on a machine that has none of the others' trainings.

  Args:
    before: What the JSON holds of a task.
    found: `outcome`.
    names: All contestants'; others of `before` are dropped.
  """
  if before.get('task') != found['task']:
    return found
  contestants: dict[str, Any] = {}
  for name in names:
    old, new = (of['contestants'].get(name) for of in (before, found))
    if not old or not new:
      if of := old or new:
        contestants[name] = of
      continue
    contestants[name] = dict(new)
    if all(old['tuned'][of] == new['tuned'][of] for of in ('rate', 'knob')):
      runs = {run['seed']: run for run in (*old['runs'], *new['runs'])}
      contestants[name]['runs'] = [runs[seed] for seed in sorted(runs)]
    contestants[name]['cost'] = new['cost'] or old['cost']
  cell = lambda of: tuple(of[name] for name in ('alpha', 'alpha_end', 'turn', 'momentum'))
  cells = {cell(of): of for of in (*before['cells'], *found['cells'])}
  momenta = {
    momentum: before['momenta'].get(momentum, {}) | found['momenta'].get(momentum, {})
    for momentum in sorted({*before['momenta'], *found['momenta']})
  }
  return {
    'task': found['task'],
    'contestants': contestants,
    'cells': list(cells.values()),
    'references': before['references'] | found['references'],
    'momenta': momenta,
  }


def priced(
  problem: _problems.Problem,
  found: dict[str, Any],
  everyone: Iterable[_contestants.Contestant],
) -> None:
  """Those without a price have that of one with the same step, where it has one."""
  cost = {name: of['cost'] for name, of in found.items() if of['cost']}
  for contestant in everyone:
    if contestant.name in found and contestant.name not in cost:
      found[contestant.name]['cost'] = cost_of(problem, contestant, everyone, cost)


def read_cost(work: pathlib.Path, task: _problems.Task) -> dict[str, Any]:
  """By contestant, what `time_all` has found of a task."""
  path = work / task.name / 'cost.json'
  return json.loads(path.read_text('utf-8')) if path.is_file() else {}


def cost_of(
  problem: _problems.Problem,
  contestant: _contestants.Contestant,
  everyone: Iterable[_contestants.Contestant],
  cost: dict[str, Any],
) -> dict[str, Any] | None:
  """That of a contestant, or of one with the same step: program, and α that moves or does not."""
  step = lambda of: _contestants.PROGRAMS[of.program].timed_as or of.program
  moves = lambda of: 'alpha_end' in of.lane(problem, 0, *of.grid()[0])
  for other in (contestant, *everyone):
    known = other.name in cost and other.can_run(problem)
    if known and step(other) == step(contestant) and moves(other) == moves(contestant):
      found = {**cost[other.name], 'of': other.name}
      if BASE in cost and 'beyond_base' in found:
        found['milliseconds'] = cost[BASE]['milliseconds'] + found['beyond_base']
      return found
  return None


def momenta(
  muon: Iterable[Record],
  cells: Iterable[dict[str, Any]],
  noise: Iterable[Record] = (),
  defaults: Iterable[Record] = (),
) -> dict[str, dict[str, Any]]:
  """By momentum, Muon, the defaults, σ* from the noise, and the cells that were run elsewhere too.

  All at the best learning rate.
  """
  usual = _contestants.PER_LANE['momentum']
  named = [('Muon', record) for record in muon]
  named += [('the defaults', record) for record in defaults]
  named += [(f'α = {r["lane"]["alpha"]:g}, σ* from the noise', r) for r in noise]
  by_name: dict[tuple[float, str], dict[float, dict[int, float]]] = {}
  for name, record in sorted(named, key=lambda of: of[0] != 'Muon'):
    lane = record['lane']
    at_rate = by_name.setdefault((lane.get('momentum', usual), name), {})
    at_rate.setdefault(lane['rate'], {})[lane['seed']] = _number(record['validation_loss'])
  found: dict[str, dict[str, Any]] = {}
  for (momentum, name), losses in by_name.items():
    found.setdefault(f'{momentum:g}', {})[name] = best_rate(losses)
  constant = [cell for cell in cells if cell['alpha'] == cell['alpha_end']]
  elsewhere = {(c['alpha'], c['turn']) for c in constant if c['momentum'] != usual}
  for cell in constant:
    if (cell['alpha'], cell['turn']) in elsewhere:
      name = f'α = {cell["alpha"]:g}, σ* = {cell["turn"]:g}'
      found.setdefault(f'{cell["momentum"]:g}', {})[name] = cell
  return dict(sorted(found.items())) if set(found) - {f'{usual:g}'} else {}


def best_rate(losses: dict[float, dict[int, float]]) -> dict[str, Any]:
  """By the mean over seeds, of the learning rates that have as many seeds as any."""
  most = max(map(len, losses.values()))
  means = {r: float(np.mean([*x.values()])) for r, x in losses.items() if len(x) == most}
  rate = min(means, key=means.__getitem__)
  whole = dict(sorted(losses[rate].items()))
  at_the_edge = len(means) > 1 and rate in (min(means), max(means))
  return {'rate': rate, 'at_the_edge': at_the_edge, 'losses': whole, 'by_rate': means}


# ---------------------------------------------------------------------------------
# Before training, and the price of a step
# ---------------------------------------------------------------------------------

# Whose step is the base of all others', timed in one process with it: what an optimizer adds is
# comparable between versions of JAX, whose forward and backward passes take up to twice as long.
BASE = 'adamw'
MEASURING_RATE = 0.005  # In the middle of what the tasks are tuned to.


def measure_all(problems: Iterable[_problems.Problem], args: argparse.Namespace) -> None:
  """Measures α of each task into --measured, where those of other tasks stay."""
  found = json.loads(args.measured.read_text('utf-8')) if args.measured.is_file() else {}
  for problem in problems:
    lane = {'seed': _contestants.TUNING_SEEDS[0], 'rate': MEASURING_RATE}
    lane |= _contestants.earlier_numbers(problem, 0, 0.0)
    of = _measured.measure(
      problem,
      functools.partial(_contestants.spectral_newton, problem),
      _contestants.traced(problem, lane),
      progress=not args.quiet,
    )
    found[problem.task.name] = _finite(of)
    write_json(args.measured, found)
    for form in ('before', 'early'):
      print(f'{problem.task.name}, {of[form]["steps"]} steps: {of[form]["good"]} good fits.')


def time_all(problems: Iterable[_problems.Problem], store: Store, args: argparse.Namespace) -> None:
  """Milliseconds and FLOPs of a step into --work, where those of others stay."""
  for problem in problems:
    chosen = {}
    for contestant in args.chosen:
      found = tuned(problem, contestant, store) if contestant.can_run(problem) else None
      # Of what has not been tuned yet, any: only what stays constant is in the program.
      rate, knob = contestant.grid()[0] if found is None else (found['rate'], found['knob'])
      if contestant.can_run(problem):
        chosen[contestant.name] = contestant.program, contestant.lane(problem, 0, rate, knob)
    found = _timing.time_steps(problem, chosen, args.rounds, quiet=args.quiet)
    for of in found.values() if BASE in found else ():
      of['beyond_base'] = of['milliseconds'] - found[BASE]['milliseconds']
    before = read_cost(args.work, problem.task)
    if BASE in before and 'spectral_newton' not in found:
      found.pop(BASE, None)  # Another version of JAX, to which others' steps are brought.
    path = args.work / problem.task.name / 'cost.json'
    write_json(path, _finite(before | found))


# ---------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description='Spectral Newton beside tuned rivals.')
  add = parser.add_argument
  add('--tasks', nargs='+', default=list(_problems.TASKS), help='names; default all')
  add('--contestants', nargs='+', help='names; default all')
  add('--list', action='store_true', help='print the names of tasks and contestants')
  add('--map', action='store_true', help='the loss over α and σ*, in place of the contestants')
  add('--schedules', action='store_true', help='exponents that move, likewise')
  add('--compare', action='store_true', help='the contestants, beside --map or --schedules')
  add('--report', action='store_true', help='train nothing')
  add('--measure', action='store_true', help='measure α before training, into --measured, and stop')
  add('--time', action='store_true', help='time steps and count FLOPs, of all or --contestants')
  add('--rounds', type=int, default=15, help='of timing')
  add('--seeds', type=int, nargs='+', default=[0, 1, 2, 3, 4], help='of the report')
  add('--measured', type=pathlib.Path, default=MEASURED, help='JSON that --measure writes')
  for name, values in (('alphas', 'ALPHAS'), ('turns', 'TURNS'), ('rates', 'RATES')):
    default = list(getattr(_contestants, f'MAP_{values}'))
    few = '+' if name == 'rates' else '*'
    add(f'--{name}', type=float, nargs=few, default=default, help='of the map')
  add('--map-seeds', type=int, nargs='+', default=list(_contestants.MAP_SEEDS))
  add('--momentum', type=float, help='of the map')
  add('--momenta', type=float, nargs='+', help='to run cells of the map and Muon at')
  add('--noise', action='store_true', help='exponents of the map with σ* from the noise, likewise')
  add('--defaults', action='store_true', help='the defaults, likewise')
  add('--batch-size', type=int, help="in place of the tasks' own")
  add('--steps', type=int, help="in place of the tasks' own")
  add('--width', type=int, help="in place of the networks' own")
  add('--images', type=int, help=f'to train on, in place of {_problems.KEPT}')
  add('--lanes', type=int, default=1, help='trainings at once, of a small network; fewer of others')
  add('--half', action='store_true', help='forward and backward in bfloat16')
  add('--budget', type=float, default=math.inf, help='seconds after which nothing is begun')
  add('--compile-threads', type=int, default=os.cpu_count())
  add('--data-dir', help="folder of Fashion-MNIST, where Debian's package is not installed")
  add('--data-file', type=pathlib.Path, help='what --pack-data has written, in place of that')
  add('--pack-data', type=pathlib.Path, help='write images and text to this file, and stop')
  add('--work', type=pathlib.Path, default=pathlib.Path('runs/convergence'))
  add('--output', type=pathlib.Path, help='JSON; tables and plots go beside it')
  add('--no-tables', dest='tables', action='store_false', help='JSON alone')
  add('--quiet', action='store_true', help='no progress bars')
  add('--log', action='store_true', help='a line for each batch of trainings')
  args = parser.parse_args(argv)
  args.start = time.perf_counter()
  args.deadline = args.start + args.budget
  args.compare = args.compare or not (args.map or args.schedules or args.momenta)
  if min(args.map_seeds) < MAP_SEEDS_FROM or max(args.seeds) >= min(_contestants.TUNING_SEEDS):
    parser.error('Seeds from 100 are for tuning, from 200 for maps, and below for the report.')
  measured = json.loads(args.measured.read_text('utf-8')) if args.measured.is_file() else {}
  everyone = _contestants.contestants(measured)
  for chosen, known, kind in (
    (args.tasks, _problems.TASKS, 'tasks'),
    (args.contestants or (), everyone, 'contestants'),
  ):
    if unknown := set(chosen) - set(known):
      parser.error(f'{min(unknown)!r} is none of the {kind}: {", ".join(known)}')
  args.everyone = list(everyone.values())
  # What has been trained elsewhere is shown too; what is not installed is not trained.
  can_run = lambda name: _contestants.PROGRAMS[everyone[name].program].available
  for name in args.contestants or ():
    if not can_run(name):
      parser.error(f'{name!r} needs a package, or a version of one, that is not installed.')
  args.chosen = [everyone[name] for name in args.contestants or everyone if can_run(name)]
  args.output = args.output or RESULTS
  args.chosen_tasks = []
  for name in args.tasks:
    task = _problems.TASKS[name]
    changes: dict[str, Any] = {}
    if args.batch_size is not None:
      changes['batch_size'] = args.batch_size
    if args.steps is not None:
      if args.steps % 16:
        parser.error('--steps must be a multiple of 16: there are so many evaluations.')
      changes |= {'steps': args.steps, 'every': args.steps // 16}
    if args.width is not None:
      if 'width' not in task.options:
        parser.error(f'{name} has no width of its own; choose other --tasks.')
      # A matrix has as many more numbers.
      times = math.ceil((args.width / task.options['width']) ** 2)
      changes |= {'options': {**task.options, 'width': args.width}, 'weight': task.weight * times}
    if args.images is not None and task.data == 'bytes':
      parser.error(f'{name} is not trained on images; choose other --tasks.')
    args.chosen_tasks.append(task := dataclasses.replace(task, **changes))
    if args.images is not None and args.images < task.batch_size:
      parser.error(f'{name} takes {task.batch_size} images a step; --images must be as many.')
  return args


def load_problems(args: argparse.Namespace) -> list[_problems.Problem]:
  """The chosen tasks with their data."""
  arrays = {}
  for task in args.chosen_tasks:
    if task.data not in arrays:
      arrays[task.data] = _problems.load(task.data, args.data_dir, args.data_file, args.images)
  # In a loop on a CPU, too, convolutions are many times slower than products.
  by_product = args.lanes > 1 or not args.time
  return [
    _problems.Problem(task, arrays[task.data], together=by_product, half=args.half)
    for task in args.chosen_tasks
  ]


def title(problem: _problems.Problem, args: argparse.Namespace) -> str:
  """What the JSON calls a task, with the options that are not its own."""
  options = {name: getattr(args, name) for name in ('batch_size', 'steps', 'width', 'images')}
  own = [f', {name} {value:g}' for name, value in options.items() if value is not None]
  return problem.task.name + ''.join(own)


def on_the_same_data(
  problems: Iterable[_problems.Problem], before: dict[str, Any], args: argparse.Namespace
) -> list[_problems.Problem]:
  """Without those that the JSON has on other data, where nothing is to be trained.

  Raises:
    SystemExit: something is, and its results would stand among those.
  """
  same = []
  for problem in problems:
    name = title(problem, args)
    known = before.get(name, {}).get('task', {}).get('data_sha1', problem.data_sha1)
    if known == problem.data_sha1:
      same.append(problem)
    elif not args.report:
      raise SystemExit(
        f'{args.output} has {name} on other data (sha1 {known}, here {problem.data_sha1}).'
        ' The bytes are those of the standard library of the Python that runs this: take the same'
        ' Python, a --data-file that was packed with it, other --tasks, or another --output.'
      )
  return same


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs the command line; returns what the JSON holds of the chosen tasks."""
  args = parse(argv)
  if args.list:
    print('\n'.join([*args.tasks, '', *(f'{c.name}: {c.what}' for c in args.everyone)]))
    return {}
  if args.pack_data is not None:
    print(f'{args.pack_data}: {_problems.pack(args.pack_data, args.data_dir) / 1e6:.1f} MB')
    return {}
  problems = load_problems(args)
  if args.measure:
    measure_all(problems, args)
    return {}
  before = {}
  if args.output.is_file():
    before = json.loads(args.output.read_text('utf-8')).get('tasks', {})
  problems = on_the_same_data(problems, before, args)
  store = Store(args.work)
  if args.time:
    time_all(problems, store, args)
  failed = [] if args.report or args.time else train_all(problems, store, args)
  content = {'tasks': {}, 'failed': failed, 'environment': environment()}
  content['notes'] = list(_contestants.NOTES)
  names = [contestant.name for contestant in args.everyone]
  for problem in problems:
    name, found = title(problem, args), outcome(problem, store, args)
    if name in before:  # What is there already stays.
      # As it is read, without tuples.
      found = merged(before[name], json.loads(json.dumps(found)), names)
      priced(problem, found['contestants'], args.everyone)
    content['tasks'][name] = found
  content['tasks'] = before | content['tasks']
  write_json(args.output, content)
  if args.tables:
    written = _convergence_report.write(content, args.output)
    if args.output == RESULTS:
      written.append(_convergence_report.into_readme(content, README))
    print(args.output.with_suffix('.md').read_text('utf-8'))
    print(f'{", ".join(map(str, written))}, after {time.perf_counter() - args.start:.0f} s')
  return content


if __name__ == '__main__':
  sys.exit(1 if main().get('failed') else 0)
