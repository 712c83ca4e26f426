"""α measured before training, for convergence.py: of fresh networks, and after some first steps.

`spectral_optax.curvature.measure` on a batch of training data, `alpha_tree` of what it finds: the
measured exponent of each layer whose fit is good, the default's of the others. On a seed that is
not reported.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _problems import Build, Problem

from spectral_optax import curvature

SAMPLES = 512  # Images, or a quarter as many texts, that are measured on.
EARLY = 50  # Steps before the second measurement, or as many as are advanced at once, twice.


def network(problem: Problem) -> dict[str, Any]:
  """What a measurement belongs to, as JSON gives it back: of lists, without tuples."""
  task = problem.task
  found = {'network': task.network, 'data': task.data, 'options': dict(task.options)}
  return json.loads(json.dumps(found))


def measure(problem: Problem, build: Build, lane: Any, progress: bool = False) -> dict[str, Any]:
  """Measures before the first step, and after the first ones of a training.

  Args:
    problem: The task.
    build: The optimizer of those steps.
    lane: Its numbers, and the seed.
    progress: Whether to show bars.

  Returns:
    ``network``, what it belongs to; ``before`` and ``early``, each ``alpha`` by path, as
    `spectral_newton` takes it, ``gamma``, ``fitted`` and ``r_squared`` by path, as measured,
    ``good``, how many of the fits are, and ``steps``, how many came before.
  """
  seed = int(lane['seed'])
  samples = problem.samples(seed)
  # The last ones: not what the first steps have seen.
  count = SAMPLES // 4 if problem.task.data == 'bytes' else SAMPLES
  x, y = problem.batch(problem.arrays, jnp.asarray(samples.reshape(-1)[-count:]))

  # One function of both, so that what it is compiled to serves both.
  def loss(params, batch):
    return problem.loss(params, *batch)[0]

  def of(carry, steps):
    batches = [(carry[1], x, y)]
    report = curvature.measure(
      loss, carry[0], batches=batches, bootstrap=0, group_by='shape', progress=progress
    )
    rows = {row.path: row for row in report.layers}
    number = lambda value: float(value) if np.isfinite(value) else None
    gammas = {path: number(row.gamma.exponent) for path, row in rows.items()}
    usual = float(np.mean([g for g in gammas.values() if g is not None]))
    alphas = report.alpha_tree()
    return {
      'steps': steps,
      'alpha': {path: float(alphas[path]) for path in problem.matrices},
      'gamma': {path: usual if gammas[path] is None else gammas[path] for path in rows},
      'fitted': {path: number(row.alpha.exponent) for path, row in rows.items()},
      'r_squared': {path: number(row.alpha.r_squared) for path, row in rows.items()},
      'good': sum(not row.objection() for row in rows.values()),
    }

  carry = jax.jit(lambda lane: problem.start(build, lane))(lane)
  found = {'network': network(problem), 'before': of(carry, 0)}
  advance = jax.jit(lambda *arguments: problem.advance(build, *arguments))
  steps = 0
  while steps < EARLY:
    which = samples[steps : steps + problem.task.every]
    carry, _ = advance(carry, lane, which, problem.arrays)
    steps += problem.task.every
  return found | {'early': of(carry, steps)}
