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


class Training(_measure.Racer):
  """As many steps as are advanced at once: what is done now and then is done once in them."""

  def compile(self, grads: Any, params: Any) -> None:
    """Unless it compiles itself."""
    if self.compiled is None:
      self.compiled = jax.jit(self.step).lower(grads, self.state, params).compile()


def training(problem: Problem, name: str, program: str, lane: Any) -> Training:
  """Of a network of its own, with numbers that are known, as a user has them."""
  of = _contestants.PROGRAMS[program]
  numbers = _contestants.traced(problem, lane)
  if of.trainer is not None:
    start, advance = of.trainer(problem)
    lanes = jax.tree.map(lambda x: np.asarray(x)[None], numbers)

    def several(which, carry, arrays):
      carry, loss = advance(carry, lanes, which[None], arrays)
      return loss, carry

    racer = Training(name, several, start(lanes))
    racer.compiled = several
    return racer
  build = functools.partial(of.build, problem)

  def several(which, carry, arrays):
    carry, loss = problem.advance(lambda _: build(numbers), carry, None, which, arrays)
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
  every = problem.task.every
  which = jax.numpy.asarray(problem.samples(0)[:every])
  _measure.compile_all(racers, which, problem.arrays, times=1, title=title, quiet=quiet)
  _measure.race(
    racers, which, problem.arrays, rounds=rounds, seconds=SECONDS, title=title, quiet=quiet
  )
  return {
    racer.name: {
      'milliseconds': float(np.nanmedian(racer.seconds)) * 1e3 / every,
      **flops(problem, chosen[racer.name][0], racer),
      'jax': jax.__version__,
      'backend': jax.default_backend(),
    }
    for racer in racers
  }
