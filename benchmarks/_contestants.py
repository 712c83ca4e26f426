"""Who takes part in convergence.py, and what is tried for each.

A program is an optimizer whose numbers are traced: one compilation for all of its learning rates,
momenta, exponents and seeds. A contestant is a program with some numbers fixed, a grid of learning
rates, and at most one more knob; all have as many trials. A lane is one training: a program's
numbers, as plain Python that a file can keep.
"""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import _measured
import jax
import numpy as np
import optax
from _problems import Params, Problem
from jax.core import Tracer

import spectral_optax
from spectral_optax import exponents, layout, update_size

# Optax's default for AdamW. On the matrices alone, for all.
WEIGHT_DECAY = 1e-4
UPDATE_RMS = 0.2  # Of every matrix's update, in learning rates, of all that are spectral.
TUNING_SEEDS = (100, 101)

Lane = dict[str, Any]  # Numbers, and by path for those that each matrix has its own of.
PER_MATRIX = {'alpha': 1.5, 'alpha_end': None, 'turn': 0.06, 'scale': 1.0}
PER_LANE = {'rate': None, 'momentum': 0.95, 'b2': 0.999, 'lambda': 0.01}


def traced(problem: Problem, lane: Lane) -> dict[str, np.ndarray]:
  """A lane as arrays, in the order of `problem.matrices` where each has its own."""
  for name in lane:
    if name not in (*PER_MATRIX, *PER_LANE, 'seed'):
      raise ValueError(f'{name!r} is no number of a lane.')
  arrays: dict[str, Any] = {'seed': np.uint32(lane['seed'])}
  for name, default in PER_LANE.items():
    arrays[name] = np.float32(lane.get(name, default))
  for name, default in PER_MATRIX.items():
    value = lane.get(name, default)
    if value is None:
      value = lane.get('alpha', PER_MATRIX['alpha'])
    if isinstance(value, Mapping):
      if set(value) != set(problem.matrices):
        raise ValueError(f'{name} is given for {sorted(value)}, not for {problem.matrices}.')
      value = [value[path] for path in problem.matrices]
    arrays[name] = np.broadcast_to(np.asarray(value, np.float32), len(problem.matrices))
  return arrays


# ---------------------------------------------------------------------------------
# Programs
# ---------------------------------------------------------------------------------


def schedule(problem: Problem, lane: Any) -> optax.Schedule:
  """Linear warm-up over a twentieth, cosine decay; the peak is the lane's."""
  steps = problem.task.steps
  warmup = max(1, steps // 20)
  shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, max(steps, warmup + 1))
  return lambda count: lane['rate'] * shape(count + 1)


def _is_matrix(problem: Problem) -> Callable[[Params], dict[str, bool]]:
  return lambda params: {path: path in problem.matrices for path in params}


def scale_matrices(problem: Problem, scales: jax.Array) -> optax.GradientTransformation:
  """Each matrix's update times a number of its own."""
  factor = {path: scales[i] for i, path in enumerate(problem.matrices)}

  def scale(updates, params=None):
    del params
    return {path: u * factor[path] if path in factor else u for path, u in updates.items()}

  return optax.stateless(scale)


def sgd(problem: Problem, lane: Any) -> optax.GradientTransformation:
  return optax.chain(
    optax.add_decayed_weights(WEIGHT_DECAY, _is_matrix(problem)),
    optax.trace(lane['momentum']),
    optax.scale_by_learning_rate(schedule(problem, lane)),
  )


def adamw(problem: Problem, lane: Any) -> optax.GradientTransformation:
  return optax.adamw(
    schedule(problem, lane), b2=lane['b2'], weight_decay=WEIGHT_DECAY, mask=_is_matrix(problem)
  )


def muon(problem: Problem, lane: Any) -> optax.GradientTransformation:
  return optax.chain(
    optax.contrib.muon(
      schedule(problem, lane),
      beta=lane['momentum'],
      weight_decay=WEIGHT_DECAY,
      muon_weight_dimension_numbers=spectral_optax.weight_dimension_numbers,
      consistent_rms=UPDATE_RMS,
    ),
    scale_matrices(problem, lane['scale']),
  )


# Of T, relative: what a traced α in [0.5, 3] and σ* in [0.01, 1] come to is below it almost
# everywhere, and 0.1 in the corner of small ones.
TOLERANCE = 0.03


def spectral_newton(problem: Problem, lane: Any) -> optax.GradientTransformation:
  """Ours. α goes linearly from `alpha` to `alpha_end`, and T turns over at `turn` all along."""

  def alpha(i: int) -> optax.Schedule:
    start, end = lane['alpha'][i], lane['alpha_end'][i]
    return lambda count: start + (end - start) * count / problem.task.steps

  def damping(i: int) -> optax.Schedule:
    return lambda count: lane['turn'][i] ** alpha(i)(count)

  def number(i: int) -> bool:
    """Whether α is known and stays: then T is fitted once, before the training."""
    known = not isinstance(lane['alpha'], Tracer)
    return known and lane['alpha'][i] == lane['alpha_end'][i]

  by_path = lambda of: {
    path: float(of(i)(0)) if number(i) else of(i) for i, path in enumerate(problem.matrices)
  }
  return optax.chain(
    spectral_optax.spectral_newton(
      schedule(problem, lane),
      alpha=by_path(alpha),
      damping=by_path(damping),
      momentum=lane['momentum'],
      solver='polynomial',
      tolerance=TOLERANCE,
      update_rms=UPDATE_RMS,
      rms_of='matrix',
      weight_decay=WEIGHT_DECAY,
    ),
    scale_matrices(problem, lane['scale']),
  )


def measured_online(problem: Problem, lane: Any) -> optax.GradientTransformation:
  """Ours, with the exponent measured as it trains, and the σ* of constant damping."""
  rule = spectral_optax.measured_alpha(every=problem.task.every, top_k=8)
  turns = {
    path: exponents.Turn.of(*exponents.default_exponents(kind))
    for path, kind in problem.types.items()
  }
  return spectral_optax.spectral_newton(
    schedule(problem, lane),
    alpha=rule,
    damping=turns,
    momentum=lane['momentum'],
    solver='polynomial',
    tolerance=TOLERANCE,
    update_rms=UPDATE_RMS,
    rms_of='matrix',
    weight_decay=WEIGHT_DECAY,
  )


def noise(
  problem: Problem, lane: Any, *, any_alpha: bool = False, rms_of: Any = 'matrix'
) -> optax.GradientTransformation:
  """Ours with a damping that sets itself; `any_alpha`: at the lane's exponents, traced."""
  by_path = {path: lane['alpha'][i] for i, path in enumerate(problem.matrices)}
  return spectral_optax.spectral_newton(
    schedule(problem, lane),
    alpha=by_path if any_alpha else 'default',
    damping='noise',
    momentum=lane['momentum'],
    solver='polynomial',
    tolerance=TOLERANCE,
    update_rms=UPDATE_RMS,
    rms_of=rms_of,
    weight_decay=WEIGHT_DECAY,
  )


def apart(
  problem: Problem, of_matrices: optax.GradientTransformation, others: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Matrices, with two axes each, to one optimizer, the rest to another.

  What a package makes of names and of more axes does not matter then.
  """
  views = layout.matrix_views(problem.shapes)

  def cut(tree):
    matrices = {p: views[p].to_matrices(x)[0] for p, x in tree.items() if p in views}
    return matrices, {p: x for p, x in tree.items() if p not in views}

  def init(params):
    matrices, rest = cut(params)
    return of_matrices.init(matrices), others.init(rest)

  def update(updates, state, params=None, **extra):
    del extra
    first, second = cut(updates), cut(params)
    matrices: Any
    rest: Any
    matrices, state_0 = of_matrices.update(first[0], state[0], second[0])
    rest, state_1 = others.update(first[1], state[1], second[1])
    whole = {p: views[p].from_matrices(x[None]) for p, x in matrices.items()} | rest
    return {p: whole[p] for p in updates}, (state_0, state_1)

  return optax.GradientTransformation(init, update)


def of_rollfast(
  problem: Problem, lane: Any, *, name: str, momentum: str, sized: bool, **options: Any
) -> optax.GradientTransformation:
  """An optimizer of the package rollfast on the matrices, AdamW on the rest.

  `momentum`: the name there of the lane's; nothing for a constant one. `sized`: its updates come
  to the size that all spectral updates have here.
  """
  if momentum:
    options[momentum] = lane['momentum']
  make = getattr(importlib.import_module('rollfast'), name)
  size = spectral_optax.scale_to_rms(
    UPDATE_RMS, weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(0, 1)
  )
  rate = schedule(problem, lane)
  matrices = optax.chain(
    make(learning_rate=1.0, weight_decay=0.0, **options),
    optax.scale(-1.0),  # The package's own rate has made it a descent.
    size if sized else optax.identity(),
    optax.add_decayed_weights(WEIGHT_DECAY),
    optax.scale_by_learning_rate(rate),
  )
  return apart(problem, matrices, optax.adamw(rate, weight_decay=0.0))


def shampoo(problem: Problem, lane: Any) -> optax.GradientTransformation:
  """Shampoo of the package optax-shampoo on the matrices, AdamW on the rest.

  Its updates have the size of RMSProp's (grafting). The package is of 2022; `_OldJax` lends it
  what JAX has dropped since.
  """
  package = importlib.import_module('optax_shampoo.distributed_shampoo')
  package.jax, package.lax = _OldJax(), _OldLax()  # type: ignore
  rate = schedule(problem, lane)
  matrices = optax.chain(
    package.distributed_shampoo(
      1.0,
      block_size=128,
      beta2=lane['b2'],
      graft_type=package.GraftingType.RMSPROP,
      moving_average_for_momentum=True,
      preconditioning_compute_steps=problem.task.every,
      generate_training_metrics=False,
    ),
    optax.scale(-1.0),  # The package's own rate has made it a descent.
    optax.add_decayed_weights(WEIGHT_DECAY),
    optax.scale_by_learning_rate(rate),
  )
  return apart(problem, matrices, optax.adamw(rate, weight_decay=0.0))


class _OldJax:
  """`jax`, with the names of 2022."""

  tree_map = staticmethod(jax.tree.map)
  tree_flatten = staticmethod(jax.tree.flatten)
  tree_unflatten = staticmethod(jax.tree.unflatten)

  def __getattr__(self, name: str) -> Any:
    return getattr(jax, name)


class _OldLax:
  """`jax.lax`, whose loops made a number of a bool where their body does."""

  def __getattr__(self, name: str) -> Any:
    return getattr(jax.lax, name)

  @staticmethod
  def while_loop(condition: Any, body: Any, start: Any) -> Any:
    after = jax.eval_shape(body, start)
    same = lambda x, like: jax.lax.convert_element_type(x, like.dtype)
    return jax.lax.while_loop(condition, body, jax.tree.map(same, start, after))


def soap(problem: Problem, lane: Any) -> optax.GradientTransformation:
  """SOAP of the package marin-levanter on the matrices, AdamW on the rest."""
  package: Any = importlib.import_module('levanter.optim.soap')
  haliax: Any = importlib.import_module('haliax')
  # Of one device, and without a mesh.
  package.safe_sharding_constraint = lambda x, _: x
  basis = package.scale_by_soap(
    b1=0.95,
    b2=lane['b2'],
    shampoo_beta=0.95,
    precondition_frequency=PERIOD,
    partition_grads_into_blocks=False,
  )

  def init(params):
    with haliax.axis_mapping({}):
      return basis.init(params)

  def update(updates, state, params=None):
    with haliax.axis_mapping({}):
      return basis.update(updates, state, params)

  rate = schedule(problem, lane)
  matrices = optax.chain(
    optax.GradientTransformation(init, update),
    optax.add_decayed_weights(WEIGHT_DECAY),
    optax.scale_by_learning_rate(rate),
  )
  return apart(problem, matrices, optax.adamw(rate, weight_decay=0.0))


Trainer = tuple[Callable[..., Any], Callable[..., Any]]  # `start` and `advance`, of one lane.


def kfac(problem: Problem) -> Trainer:
  """K-FAC of the package kfac-jax, which jits its own steps.

  Its release 0.0.8 is one of before JAX 0.9, where a function that it calls gives back something
  else; JAX 0.12 it cannot be imported under.
  """
  kfac_jax: Any = importlib.import_module('kfac_jax')
  matcher: Any = importlib.import_module('kfac_jax._src.tag_graph_matcher')

  def evaluate(equation, values):
    """Of a jaxpr; since JAX 0.9 its parameters are in one piece."""
    parameters = equation.primitive.get_bind_params(equation.params)
    found = equation.primitive.bind(*values, **parameters)
    return found if equation.primitive.multiple_results else [found]

  matcher.eval_jaxpr_eqn = evaluate

  def loss(params, batch):
    x, y = batch
    logits, _ = problem.apply(params, no_state, x, train=True)
    logits, y = logits.reshape(-1, logits.shape[-1]), y.reshape(-1)
    kfac_jax.register_softmax_cross_entropy_loss(logits, y)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  no_state = problem.init(jax.numpy.uint32(0))[1]
  optimizer = kfac_jax.Optimizer(
    jax.value_and_grad(loss),
    l2_reg=WEIGHT_DECAY,
    num_burnin_steps=0,
    inverse_update_period=PERIOD,
  )
  batch = jax.jit(problem.batch)
  first = lambda tree: jax.tree.map(lambda x: x[0], tree)

  def start(lanes):
    lane = first(lanes)
    params, rest = problem.init(lane['seed'])
    some = batch(problem.arrays, problem.samples(int(lane['seed']))[0])
    state = optimizer.init(params, jax.random.PRNGKey(lane['seed']), some)
    return *jax.tree.map(lambda x: x[None], (params, rest)), state

  def advance(carry, lanes, which, arrays):
    lane, params, rest, state = first(lanes), first(carry[0]), carry[1], carry[2]
    rate, losses = schedule(problem, lane), []
    begin = int(state.step_counter)
    for count, some in enumerate(which[0], begin):
      params, state, found = optimizer.step(
        params,
        state,
        jax.random.fold_in(jax.random.PRNGKey(lane['seed']), count),
        batch=batch(arrays, some),
        learning_rate=rate(count),
        momentum=lane['momentum'],
        damping=lane['lambda'],
        global_step_int=count,
      )
      losses.append(found['loss'])
    return (jax.tree.map(lambda x: x[None], params), rest, state), np.asarray([np.mean(losses)])

  return start, advance


def has_convolutions(problem: Problem) -> bool:
  """Whether any matrix is one."""
  return 'conv' in problem.types.values()


def has_no_state(problem: Problem) -> bool:
  """Whether the network is its parameters alone, without running averages."""
  return not jax.tree.leaves(jax.eval_shape(problem.init, np.uint32(0))[1])


def kfac_runs_on(problem: Problem) -> bool:
  """On networks without running averages and without attention, where its first step fails."""
  return has_no_state(problem) and 'attention' not in problem.types.values()


def has_wide(problem: Problem) -> bool:
  """Whether the default `rms_of` has any matrix that is treated output by output."""
  views = layout.matrix_views(problem.shapes)
  return 'output' in update_size.resolve('wide', problem.shapes, views).values()


def wide_dense(problem: Problem) -> dict[str, str]:
  """`rms_of` of plain dense layers with more outputs than inputs too, which the default is not."""
  views = layout.matrix_views(problem.shapes)
  too = {p for p, v in views.items() if problem.types[p] == 'dense' and v.columns > v.rows}
  return {path: 'output' if path in too else 'wide' for path in views} if too else {}


PERIOD = 5  # Steps between two bases of SOAP, and two inversions of K-FAC.


@dataclasses.dataclass(frozen=True)
class Program:
  """An optimizer whose numbers are traced.

  Attributes:
    build: From the task and what is traced of a lane; None where there is a trainer.
    available: Whether what it needs is installed.
    trainer: In place of `build`, for what is no transformation of gradients: `start` and
      `advance` in Python, of one lane.
    possible: On which tasks.
    period: Of what is done now and then, in steps, on a task.
    timed_as: A program whose steps are known to take as long, and as many FLOPs.
    same_as: A program that is the very same on a task, whose trainings serve for both; '' if none.
  """

  build: Callable[[Problem, Any], optax.GradientTransformation] | None
  available: bool = True
  trainer: Callable[[Problem], Trainer] | None = None
  possible: Callable[[Problem], bool] = lambda problem: True
  period: Callable[[Problem], int] = lambda problem: 1
  timed_as: str = ''
  same_as: Callable[[Problem], str] = lambda problem: ''


def _installed(name: str) -> bool:
  return importlib.util.find_spec(name) is not None


def _runs(name: str) -> bool:
  """Whether a package is there and can be imported, which depends on the version of JAX."""
  if not _installed(name):
    return False
  try:
    importlib.import_module(name)
  except Exception:
    return False
  return True


def _rollfast(name: str, momentum: str = '', sized: bool = True, **options: Any) -> Program:
  build = functools.partial(of_rollfast, name=name, momentum=momentum, sized=sized, **options)
  return Program(build, _installed('rollfast'))


PROGRAMS = {
  'sgd': Program(sgd),
  'adamw': Program(adamw),
  'muon': Program(muon),
  'spectral_newton': Program(spectral_newton),
  'measured_online': Program(measured_online, period=lambda problem: problem.task.every),
  'noise': Program(noise),
  'noise_wide': Program(
    functools.partial(noise, rms_of='wide'),
    timed_as='noise',
    same_as=lambda problem: '' if has_wide(problem) else 'noise',
  ),
  'noise_wide_dense': Program(
    lambda problem, lane: noise(problem, lane, rms_of=wide_dense(problem)), timed_as='noise'
  ),
  # One hundredth longer at the most, timed side by side.
  'noise_by_output': Program(functools.partial(noise, rms_of='output'), timed_as='noise'),
  'noise_by_type': Program(functools.partial(noise, rms_of='layer_type'), timed_as='noise'),
  'noise_of_alpha': Program(functools.partial(noise, any_alpha=True)),
  'contramuon': _rollfast('contramuon', 'beta1'),
  'normuon': _rollfast('normuon', 'beta1'),
  'contranormuon': _rollfast('contranormuon', 'beta1'),
  # Its momentum cannot be traced.
  'aurora': _rollfast('aurora'),
  'aurora_0.9': _rollfast('aurora', b1=0.9),
  'prism': _rollfast('prism', 'b1'),
  'psgd_kron': _rollfast('kron', sized=False),
  'shampoo': Program(
    shampoo,
    _installed('optax_shampoo'),
    period=lambda problem: problem.task.every,
  ),
  'soap': Program(soap, _installed('levanter'), period=lambda problem: PERIOD),
  'kfac': Program(
    None, _runs('kfac_jax'), trainer=kfac, possible=kfac_runs_on, period=lambda problem: PERIOD
  ),
}

# ---------------------------------------------------------------------------------
# Contestants
# ---------------------------------------------------------------------------------

TRIALS = 14  # Of each contestant, on each tuning seed.


def rates(first: float, count: int = TRIALS // 2) -> tuple[float, ...]:
  """A grid over seven octaves: a factor of 2 apart, or of √2 where there is no other knob."""
  factor = 2 ** (TRIALS / 2 / count)
  return tuple(float(f'{first * factor**i:.6g}') for i in range(count))


FIRST_RATE = 0.00125
MOMENTA = (0.95, 0.9)


@dataclasses.dataclass(frozen=True)
class Contestant:
  """What is compared.

  Attributes:
    name: Of it.
    program: Key of `PROGRAMS`.
    what: In a few words, for the table.
    first_rate: Of its grid.
    knob: Name and values of what is tuned beside the learning rate; empty: a finer grid.
    numbers: Of its lanes, from the task, the seed and the knob.
    possible: On which tasks; not where its program is not.
  """

  name: str
  program: str
  what: str
  first_rate: float = FIRST_RATE
  knob: tuple[str, tuple[float, ...]] = ('', ())
  numbers: Callable[[Problem, int, float], Lane] = lambda problem, seed, knob: {}
  possible: Callable[[Problem], bool] = lambda problem: True

  def can_run(self, problem: Problem) -> bool:
    """On this task."""
    return self.possible(problem) and PROGRAMS[self.program].possible(problem)

  def program_on(self, problem: Problem) -> str:
    """Key of the program whose trainings are its own, on this task."""
    return PROGRAMS[self.program].same_as(problem) or self.program

  def grid(self) -> list[tuple[float, float | None]]:
    """Learning rate and knob of each trial."""
    if not self.knob[1]:
      return [(rate, None) for rate in rates(self.first_rate, TRIALS)]
    return [(rate, knob) for knob in self.knob[1] for rate in rates(self.first_rate)]

  def lane(self, problem: Problem, seed: int, rate: float, knob: float | None) -> Lane:
    """One training of it."""
    lane: Lane = {'seed': seed, 'rate': rate}
    if knob is not None and self.knob[0] in PER_LANE:
      lane[self.knob[0]] = knob
    return lane | self.numbers(problem, seed, knob)  # type: ignore


def compact(values: Mapping[str, float]) -> float | dict[str, float]:
  """By path, or one number where all are the same."""
  rounded = {path: float(f'{value:.6g}') for path, value in values.items()}
  return next(iter(rounded.values())) if len(set(rounded.values())) == 1 else rounded


def published(problem: Problem) -> dict[str, float]:
  """The published mean exponent of each matrix's layer type."""
  return {p: exponents._published_alpha(t) for p, t in problem.types.items()}


def reversed_order(values: Mapping[str, float]) -> dict[str, float]:
  """The largest for the smallest: mirrored in the middle of the range."""
  mirror = min(values.values()) + max(values.values())
  return {path: mirror - value for path, value in values.items()}


def shuffled(values: Mapping[str, float], seed: int) -> dict[str, float]:
  """The same values, of other matrices."""
  order = np.random.default_rng(seed).permutation(len(values))
  given = list(values.values())
  return {path: given[i] for path, i in zip(values, order, strict=True)}


DEFAULT_MOMENTUM = inspect.signature(spectral_optax.spectral_newton).parameters['momentum'].default


def default_momentum(problem: Problem, seed: int, knob: float) -> Lane:
  """The library's own, and nothing else."""
  return {'momentum': DEFAULT_MOMENTUM}


def _alpha_and_turn(pairs: Mapping[str, tuple[float, float]]) -> Lane:
  """From each matrix's (α, d)."""
  return {
    'alpha': compact({p: a for p, (a, _) in pairs.items()}),
    'turn': compact({p: d ** (1 / a) for p, (a, d) in pairs.items()}),
  }


def constant_numbers(problem: Problem, seed: int, knob: float) -> Lane:
  """What a user gets who says `damping="constant"`, but for `rms_of`."""
  pairs = {p: exponents.default_exponents(t) for p, t in problem.types.items()}
  return _alpha_and_turn(pairs) | {'momentum': DEFAULT_MOMENTUM}


# (α, d) of convolutions and of every other matrix, as the defaults were before this comparison
# moved them; the momentum was Muon's 0.95. What was measured around them keeps its meaning.
EARLIER_CONV, EARLIER_OTHER = (2.0, 0.1), (1.5, 0.015)


def earlier_numbers(problem: Problem, seed: int, knob: float) -> Lane:
  """The defaults before this comparison."""
  return _alpha_and_turn(
    {p: EARLIER_CONV if t == 'conv' else EARLIER_OTHER for p, t in problem.types.items()}
  )


def published_numbers(problem: Problem, seed: int, knob: float) -> Lane:
  alphas = published(problem)
  turns = {p: exponents.PUBLISHED_DAMPING ** (1 / a) for p, a in alphas.items()}
  return {'alpha': compact(alphas), 'turn': compact(turns)}


def one_alpha(start: float, end: float | None = None) -> Callable[[Problem, int, float], Lane]:
  """The same α in every layer; the knob is σ*."""
  ends = {} if end is None else {'alpha_end': end}
  return lambda problem, seed, knob: {'alpha': start, 'turn': knob, **ends}


def by_type(order: str) -> Callable[[Problem, int, float], Lane]:
  """Published exponents, as they are, shuffled or reversed; the knob is σ*."""

  def numbers(problem: Problem, seed: int, knob: float) -> Lane:
    return {'alpha': compact(arranged(published(problem), order, seed)), 'turn': knob}

  return numbers


def arranged(values: Mapping[str, float], order: str, seed: int) -> Mapping[str, float]:
  """Values by path "as they are", "shuffled" (by the seed) or "reversed"."""
  if order == 'shuffled':
    return shuffled(values, seed)
  return reversed_order(values) if order == 'reversed' else values


def sqrt_alpha(problem: Problem, seed: int, knob: float) -> Lane:
  return {'scale': compact({p: math.sqrt(a) for p, a in published(problem).items()})}


TURNS = ('turn', (0.06, 0.03))
BY_MOMENTUM = ('momentum', MOMENTA)


Measured = Mapping[str, Mapping[str, Any]]  # By task, what `_measured.measure` gives.


def contestants(measured: Measured | None = None) -> dict[str, Contestant]:
  """All of them.

  Args:
    measured: What was measured before training. A contestant that needs it is possible on the
      tasks that are in it.
  """
  entries = [
    Contestant('sgd', 'sgd', 'SGD, momentum', 8 * FIRST_RATE, BY_MOMENTUM),
    Contestant('adamw', 'adamw', 'AdamW', FIRST_RATE, ('b2', (0.999, 0.95))),
    Contestant('muon', 'muon', 'Muon (Optax)', knob=BY_MOMENTUM),
    Contestant('muon_sqrt_alpha', 'muon', 'Muon, rate × √α', knob=BY_MOMENTUM, numbers=sqrt_alpha),
    Contestant(
      'dynmuon',
      'spectral_newton',
      "DynMuon's path: α 0.75 → 1.25",
      knob=BY_MOMENTUM,
      numbers=lambda *_: {'alpha': 0.75, 'alpha_end': 1.25, 'turn': 0.003},
    ),
    Contestant('contramuon', 'contramuon', 'Contra-Muon (rollfast)', knob=BY_MOMENTUM),
    Contestant('normuon', 'normuon', 'NorMuon (rollfast)', knob=BY_MOMENTUM),
    Contestant('contranormuon', 'contranormuon', 'Contra-NorMuon (rollfast)', knob=BY_MOMENTUM),
    Contestant('aurora', 'aurora', 'Aurora (rollfast), momentum 0.95'),
    Contestant('aurora_0.9', 'aurora_0.9', 'Aurora (rollfast), momentum 0.9'),
    Contestant('prism', 'prism', 'PRISM (rollfast)', knob=BY_MOMENTUM),
    Contestant('psgd_kron', 'psgd_kron', 'PSGD Kron (rollfast)', FIRST_RATE / 2),
    Contestant(
      'spectral_newton',
      'noise_wide',
      'Spectral Newton, defaults: α = 1.5, σ* from the noise, rms_of="wide"',
      numbers=default_momentum,
    ),
    Contestant(
      'by_matrix',
      'noise',
      'Spectral Newton, defaults and rms_of="matrix"',
      numbers=default_momentum,
      possible=has_wide,  # Elsewhere, 'spectral_newton'.
    ),
    Contestant(
      'by_wide_dense',
      'noise_wide_dense',
      'Spectral Newton, defaults, and outputs of wide dense layers of one size',
      numbers=default_momentum,
      possible=lambda problem: bool(wide_dense(problem)),
    ),
    Contestant(
      'by_output',
      'noise_by_output',
      'Spectral Newton, defaults and rms_of="output"',
      numbers=default_momentum,
    ),
    Contestant(
      'by_layer',
      'noise_by_type',
      'Spectral Newton, defaults and rms_of="layer_type"',
      numbers=default_momentum,
      possible=has_convolutions,  # Elsewhere, 'by_output'.
    ),
    Contestant(
      'constant',
      'spectral_newton',
      'Spectral Newton, constant damping, rms_of="matrix"',
      numbers=constant_numbers,
    ),
    Contestant(
      'earlier',
      'spectral_newton',
      'Spectral Newton, σ* = 0.06, momentum 0.95',
      numbers=earlier_numbers,
    ),
    Contestant(
      'momentum',
      'spectral_newton',
      'Spectral Newton, σ* = 0.06, tuned momentum',
      knob=BY_MOMENTUM,
      numbers=earlier_numbers,
    ),
    Contestant(
      'lower_turn',
      'spectral_newton',
      'Spectral Newton, α = 1.5, σ* = 0.03, tuned momentum',
      knob=BY_MOMENTUM,
      numbers=lambda *_: {'alpha': 1.5, 'turn': 0.03},
    ),
    Contestant(
      'one_turn',
      'spectral_newton',
      'Spectral Newton, α = 1.5, σ* = 0.04 in every layer',
      numbers=lambda *_: {'alpha': 1.5, 'turn': 0.04, 'momentum': DEFAULT_MOMENTUM},
      possible=has_convolutions,  # Elsewhere, 'constant'.
    ),
    Contestant(
      'published',
      'spectral_newton',
      'Spectral Newton as published: α by layer type, d = 0.1',
      knob=BY_MOMENTUM,
      numbers=published_numbers,
    ),
    Contestant(
      'alpha_2',
      'spectral_newton',
      'Spectral Newton, α = 2',
      knob=('turn', (0.316, 0.1)),
      numbers=one_alpha(2.0),
    ),
    Contestant(
      'alpha_1.5', 'spectral_newton', 'Spectral Newton, α = 1.5', knob=TURNS, numbers=one_alpha(1.5)
    ),
    Contestant(
      'falling',
      'spectral_newton',
      'Spectral Newton, α 2 → 1',
      knob=TURNS,
      numbers=one_alpha(2.0, 1.0),
    ),
    *(
      Contestant(
        f'by_type{suffix}',
        'spectral_newton',
        f'Spectral Newton, published α{", " * bool(suffix)}{order if suffix else ""}',
        knob=TURNS,
        numbers=by_type(order),
      )
      for suffix, order in (('', ''), ('_shuffled', 'shuffled'), ('_reversed', 'reversed'))
    ),
    *_of_measured({} if measured is None else measured),
    Contestant(
      'measured_online',
      'measured_online',
      'Spectral Newton, α measured online',
      numbers=default_momentum,
    ),
    Contestant('shampoo', 'shampoo', 'Shampoo (optax-shampoo)', FIRST_RATE, ('b2', (0.999, 0.95))),
    Contestant('soap', 'soap', 'SOAP (levanter)', FIRST_RATE, ('b2', (0.999, 0.95))),
    Contestant('kfac', 'kfac', 'K-FAC (kfac-jax)', FIRST_RATE, ('lambda', (1.0, 0.1))),
  ]
  return {c.name: c for c in entries}


def _of_measured(measured: Measured) -> Iterable[Contestant]:
  def possible(problem: Problem) -> bool:
    found = measured.get(problem.task.name)
    return found is not None and found['network'] == _measured.network(problem)

  def numbers(form: str, order: str, part: float = 1.0) -> Callable[[Problem, int, float], Lane]:
    def made(problem: Problem, seed: int, knob: float) -> Lane:
      # Beside 'constant': σ* and the momentum stay, as where a user gives α alone.
      alphas = measured[problem.task.name][form]['alpha']
      alphas = {path: part * alphas[path] for path in problem.matrices}
      usual = constant_numbers(problem, seed, knob)
      return usual | {'alpha': compact(arranged(alphas, order, seed))}

    return made

  def scalar(problem: Problem, seed: int, knob: float) -> Lane:
    """The learning rate of a layer times s^knob, s = αγ, over the mean of that."""
    early = measured[problem.task.name]['early']
    s = {p: max(early['alpha'][p] * early['gamma'][p], 0.1) ** knob for p in problem.matrices}
    mean = sum(s.values()) / len(s)
    return {'scale': compact({p: value / mean for p, value in s.items()})}

  when = {'before': 'before training', 'early': f'after {_measured.EARLY} steps'}
  for form, order in (('before', ''), ('early', ''), ('early', 'shuffled'), ('early', 'reversed')):
    yield Contestant(
      f'measured_{form}{"_" * bool(order)}{order}',
      'spectral_newton',
      f'Spectral Newton, α measured {when[form]}{", " * bool(order)}{order}',
      numbers=numbers(form, order),
      possible=possible,
    )
  # If curvature goes like σ^α, then α/2 takes the square root of it, as Muon does where α is 2, and
  # α is Newton's step; 1.5, which is best where α is 2, is half-way between.
  yield Contestant(
    'measured_early_part',
    'spectral_newton',
    'Spectral Newton, 3/4 of the α measured after 50 steps',
    numbers=numbers('early', '', 0.75),
    possible=possible,
  )
  yield Contestant(
    'scalar',
    'muon',
    'Muon, rate × s^±1, s = αγ',
    knob=('power', (1.0, -1.0)),
    numbers=scalar,
    possible=possible,
  )


# What took part how, and what could not; under every table.
NOTES = (
  'The bytes are the standard library of Python 3.12.1 (the JSON has the sha1 of all data). That of'
  ' another Python is another text, with other losses: one training ends at 1.81 on that of 3.11.7,'
  ' at 1.62 on this.',
  'rollfast 1.3.0 needs Python 3.12 or later. Its Aurora takes no traced momentum: two rows, each'
  ' with twice as many learning rates.',
  'Shampoo: optax-shampoo 0.0.6, of 2022, on JAX 0.12, and of images on an NVIDIA H200 with JAX'
  ' 0.11.2 (on the ResNet, and to measure α of it, with XLA_FLAGS='
  '--xla_gpu_enable_triton_gemm=false: without it XLA aborted). It calls `jax.tree_map` and starts'
  ' a loop with a bool that becomes a float, neither of which JAX has any more; both are lent to'
  ' it. Its updates take their size from RMSProp; inverse roots every 25 or 30 steps.',
  'K-FAC: kfac-jax 0.0.8 on JAX 0.10.2. On JAX 0.12 its import fails (`jax.core.Effects` is gone).'
  ' On 0.9 and 0.10 its steps do ("too many values to unpack": `get_bind_params` gives one value'
  ' now), unless that one function is replaced, as here. Inverses every 5 steps, constant damping.'
  ' Not for networks with running averages; on both networks with attention its first step fails'
  ' ("Incompatible shapes for broadcasting: shapes=[(16, 64, 64), (16, 64, 4, 1)]").',
  'SOAP: no package of its own for JAX is on PyPI. That in marin-levanter 0.2.227 needs a mesh, or'
  ' its sharding constraints replaced, as here; on the JAX 0.11.2 that it brings. Eigenbases every'
  ' 5 steps.',
  'α measured before training: on one seed that is not reported, of a fresh network, and after 50'
  ' steps (or 60); the default where a fit is poor. Of the fresh transformer no fit is good, so'
  ' that this contestant is "constant damping" there. Online: every 25 or 30 steps, 8 directions,'
  ' on the whole batch. σ* is that of constant damping in all of these, which have no second knob,'
  ' and so twice as many learning rates.',
)

# ---------------------------------------------------------------------------------
# Maps and schedules
# ---------------------------------------------------------------------------------

MAP_ALPHAS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
MAP_TURNS = (0.01, 0.03, 0.06, 0.1, 0.3, 1.0)
MAP_RATES = (0.00354, 0.00707, 0.0141, 0.0283, 0.0566)
MAP_SEEDS = (200, 201, 202)
# α at the start and the end, σ*.
PATHS: Sequence[tuple[float, float, float]] = (
  *(
    (start, end, turn)
    for start, end in (
      (1.5, 1.5),
      (2.0, 1.0),
      (1.0, 2.0),
      (1.75, 1.25),
      (1.25, 1.75),
      (2.0, 1.5),
      (1.5, 2.0),
      (0.75, 1.25),
    )
    for turn in (0.03, 0.06, 0.1)
  ),
  (0.75, 1.25, 0.003),
)


def map_lane(
  alpha: float, turn: float, rate: float, seed: int, momentum: float | None = None
) -> Lane:
  """A training of a map's cell."""
  lane = {'seed': seed, 'rate': rate, 'alpha': alpha, 'turn': turn}
  return lane if momentum is None else {**lane, 'momentum': momentum}


def path_lane(start: float, end: float, turn: float, rate: float, seed: int) -> Lane:
  """A training with an exponent that moves."""
  lane = map_lane(start, turn, rate, seed)
  return lane if start == end else {**lane, 'alpha_end': end}
