"""What a step of convergence.py's trainings takes: milliseconds, and FLOPs."""

import functools
from collections.abc import Mapping
from typing import Any

import _contestants
import _measure
import _passes
import jax
import numpy as np
from _problems import Problem

SECONDS = 6.0  # Of one contestant, at most, over all rounds.


def steps_at_once(problem: Problem, program: str) -> int:
  """In one call: one, or so many that what is done now and then is done once in them.

  One where it will do, and not in a loop: there XLA's convolutions took 17 times as long, on a
  CPU.
  """
  return _contestants.PROGRAMS[program].period(problem)


class Training(_measure.Racer):
  """Some steps in one call."""

  def compile(self, grads: Any, params: Any) -> None:
    """Unless it compiles itself."""
    if self.compiled is None:
      self.compiled = jax.jit(self.step).lower(grads, self.state, params).compile()


def training(problem: Problem, name: str, program: str, lane: Any) -> Training:
  """Of a network of its own, with numbers that are known, as a user has them."""
  of = _contestants.PROGRAMS[program]
  numbers, steps = _contestants.traced(problem, lane), steps_at_once(problem, program)
  if of.trainer is not None:
    start, advance = of.trainer(problem)
    lanes = jax.tree.map(lambda x: np.asarray(x)[None], numbers)

    def as_it_is(which, carry, arrays):
      carry, loss = advance(carry, lanes, which[None, :steps], arrays)
      return loss, carry

    racer = Training(name, as_it_is, start(lanes))
    racer.compiled = as_it_is
    return racer
  assert of.build is not None
  build = functools.partial(of.build, problem)

  def several(which, carry, arrays):
    if steps == 1:
      carry, loss = problem.step(build(numbers), carry, which[0], arrays)
    else:
      carry, loss = problem.advance(lambda _: build(numbers), carry, None, which[:steps], arrays)
    return loss, carry

  begin = jax.jit(lambda seed: problem.start(lambda _: build(numbers), {'seed': seed}))
  return Training(name, several, begin(numbers['seed']))


def flops(problem: Problem, program: str, racer: Training) -> dict[str, Any]:
  """Of a step, products and convolutions; what is done now and then at its share.

  Not XLA's count, which takes one round of a loop for all of them. Decompositions are not in
  it, and one round is of a loop that ends when the data say so: "at_least" is then true.
  """
  of = _contestants.PROGRAMS[program]
  if of.trainer is not None:
    return {'flops': None, 'at_least': True}
  which = jax.ShapeDtypeStruct((1, problem.task.batch_size), np.int32)
  counts = [
    _passes.count(
      racer.step, which, racer.state, problem.arrays, platform=jax.default_backend(), branch=branch
    )
    for branch in (min, max)
  ]
  low, high = (float(count.flops) for count in counts)
  some = bool(counts[1].open_loops or counts[1].opaque)
  return {'flops': low + (high - low) / of.period(problem), 'at_least': some}


def time_steps(
  problem: Problem, chosen: Mapping[str, tuple[str, Any]], rounds: int, *, quiet: bool
) -> dict[str, dict[str, Any]]:
  """By name, the median milliseconds of a step, taken in turns, and its FLOPs.

  Args:
    problem: The task.
    chosen: By name, program and lane.
    rounds: Of taking turns.
    quiet: Whether without progress bars.
  """
  title = problem.task.name
  racers = [training(problem, name, *of) for name, of in chosen.items()]
  steps = {name: steps_at_once(problem, program) for name, (program, _) in chosen.items()}
  which = jax.numpy.asarray(problem.samples(0)[: max(steps.values(), default=1)])
  _measure.compile_all(racers, which, problem.arrays, times=1, title=title, quiet=quiet)
  _measure.race(
    racers, which, problem.arrays, rounds=rounds, seconds=SECONDS, title=title, quiet=quiet
  )
  return {
    racer.name: {
      'milliseconds': float(np.nanmedian(racer.seconds)) * 1e3 / steps[racer.name],
      **flops(problem, chosen[racer.name][0], racer),
      'jax': jax.__version__,
      'backend': jax.default_backend(),
    }
    for racer in racers
  }
