"""What the benchmarks share: compiling, taking turns, and writing down what came out."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import rich.table
from jax.experimental.compilation_cache import compilation_cache
from tqdm import tqdm

WARM_UP = 5
FEWEST_ROUNDS = 3


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
  """Compiles for real, whatever earlier runs have left on disk."""
  enabled = jax.config.jax_enable_compilation_cache  # type: ignore
  try:
    jax.config.update('jax_enable_compilation_cache', False)
    compilation_cache.reset_cache()  # JAX looks at the flag once.
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', enabled)
    compilation_cache.reset_cache()


def rich_table(
  title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], caption: str = ''
) -> rich.table.Table:
  table = rich.table.Table(title=title, caption=caption)
  for i, heading in enumerate(columns):
    table.add_column(heading, justify='right' if i else 'left', no_wrap=not i)
  for row in rows:
    table.add_row(*row)
  return table


def markdown_table(columns: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
  lines = [columns, ['---'] + ['---:'] * (len(columns) - 1), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def tree_bytes(tree: Any) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, 'nbytes'))


def ratio(of: 'Racer', to: 'Racer') -> float:
  """Median of the ratios round by round, over the rounds that both ran in."""
  ratios = np.array(of.seconds) / np.array(to.seconds)
  return float(np.nanmedian(ratios))


@dataclasses.dataclass
class Racer:
  """A step `(grads, state, params) -> (anything, state)` and what was measured of it."""

  name: str
  step: Callable[[Any, Any, Any], tuple[Any, Any]]
  state: Any
  every_round: bool = False  # However slow: the others are compared with it.
  compiled: Any = None
  trace_seconds: list[float] = dataclasses.field(default_factory=list)
  compile_seconds: list[float] = dataclasses.field(default_factory=list)
  seconds: list[float] = dataclasses.field(default_factory=list)  # NaN: sat that round out.

  def compile(self, grads: Any, params: Any) -> None:
    """From nothing: what was traced before, also for others, is forgotten.

    What XLA keeps in the process for itself (a GPU's autotuning) is not.
    """
    jax.clear_caches()
    # A function of its own, or JAX would remember having traced it.
    jitted = jax.jit(lambda *arguments: self.step(*arguments))
    start = time.perf_counter()
    lowered = jitted.lower(grads, self.state, params)
    traced = time.perf_counter()
    self.compiled = lowered.compile()
    self.compile_seconds.append(time.perf_counter() - traced)
    self.trace_seconds.append(traced - start)

  def run(self, grads: Any, params: Any) -> float:
    """Seconds of one step. The state moves on."""
    start = time.perf_counter()
    out = jax.block_until_ready(self.compiled(grads, self.state, params))
    seconds = time.perf_counter() - start
    self.state = out[1]
    return seconds

  @property
  def temp_bytes(self) -> int | None:
    """Scratch memory, as the compiler plans it."""
    return getattr(self.compiled.memory_analysis(), 'temp_size_in_bytes', None)

  @property
  def flops(self) -> float | None:
    """XLA's count, which may take the body of a loop once, and knows no LAPACK."""
    analysis = self.compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list | tuple) else analysis
    return (analysis or {}).get('flops')


def compile_all(
  racers: Iterable[Racer], grads: Any, params: Any, *, times: int, title: str, quiet: bool
) -> None:
  """Compiles every step `times` times, in turns."""
  racers = list(racers)
  with no_compilation_cache():
    jax.jit(lambda x: x @ x).lower(np.ones((2, 2))).compile()  # The compiler's own start.
    for racer in tqdm(racers * times, desc=f'{title}: compiling', disable=quiet):
      racer.compile(grads, params)


def race(
  racers: Iterable[Racer],
  grads: Any,
  params: Any,
  *,
  rounds: int,
  seconds: float,
  title: str,
  quiet: bool,
) -> None:
  """Times all steps, one of each a round, in an order that changes from round to round.

  A busy moment hits them all, and none is always the one that follows a certain other.
  A step that would take more than `seconds` in all is in fewer rounds, evenly spread.
  """
  racers = list(racers)
  stride = {}
  for racer in tqdm(racers, desc=f'{title}: warming up', disable=quiet):
    warm_up = [racer.run(grads, params)]
    while len(warm_up) < WARM_UP and sum(warm_up) < seconds:
      warm_up.append(racer.run(grads, params))
    slow = min(math.ceil(min(warm_up) * rounds / seconds), rounds // FEWEST_ROUNDS)
    stride[racer.name] = 1 if racer.every_round else max(1, slow)
  shuffle = np.random.default_rng(0)
  for i in tqdm(range(rounds), desc=f'{title}: timing', disable=quiet):
    for k in shuffle.permutation(len(racers)):
      racer = racers[k]
      joins = i % stride[racer.name] == 0
      racer.seconds.append(racer.run(grads, params) if joins else math.nan)
