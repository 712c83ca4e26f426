"""How exact T has to be: the example's network trained with T of several tolerances.

    python benchmarks/tolerance.py             # About ten minutes on two CPU cores

One α in every layer, the same seeds for all. "bfloat16" is "polynomial" as an accelerator
computes it: G and the iterates rounded to bfloat16, sums in float32. On a CPU it takes those
branches with the same rounding.
"""

import argparse
import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import _measure
import jax
import numpy as np
import rich.console

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'examples'))
import reporting
import train_vision

# Solver, tolerance, and whether as on an accelerator.
ROWS: tuple[tuple[str, float | None, bool], ...] = (
  ('gram', None, False),
  *(('rational', tolerance, False) for tolerance in (1e-3, 1e-2, 3e-2, 1e-1)),
  ('polynomial', 1e-1, False),
  ('polynomial', 1e-1, True),
)


@contextlib.contextmanager
def as_on_an_accelerator() -> Iterator[None]:
  """Takes the branches of other platforms; only for solvers that call no LAPACK."""

  def other(*args: Any, default: Any, **_: Any) -> Any:
    return default(*args)

  kept = jax.lax.platform_dependent
  jax.lax.platform_dependent = other
  try:
    yield
  finally:
    jax.lax.platform_dependent = kept


def measure(
  solver: str, tolerance: float | None, accelerator: bool, args: argparse.Namespace
) -> dict[str, Any]:
  words = ['--optimizers', 'spectral_newton', '--alpha', '1.5', '--solver', solver]
  words += ['--output', 'runs/tolerance', '--seeds', *map(str, args.seeds)]
  words += [] if tolerance is None else ['--tolerance', f'{tolerance:g}']
  words += args.train
  jax.clear_caches()  # What was traced for another platform is.
  train_vision.scheduled_optimizer.cache_clear()
  with as_on_an_accelerator() if accelerator else contextlib.nullcontext():
    of = train_vision.main(words)['optimizers']['spectral_newton']
  runs = [{k: run[k] for k in ('seed', 'test_loss', 'test_accuracy')} for run in of['runs']]
  row = {'solver': solver, 'tolerance': tolerance, 'bfloat16': accelerator}
  return {**row, **{k: of[k] for k in ('test_loss', 'test_accuracy')}, 'by_seed': runs}


def shown(rows: list[dict[str, Any]]) -> list[list[str]]:
  """With the differences to the first row, seed by seed."""
  cells = []
  for row in rows:
    name = row['solver'] + (f' {row["tolerance"]:g}' if row['tolerance'] else '')
    line = [name + (', bfloat16' if row['bfloat16'] else '')]
    for key, scale, digits in (('test_loss', 1, 4), ('test_accuracy', 100, 2)):
      values, first = (np.array([r[key] for r in of['by_seed']]) * scale for of in (row, rows[0]))
      difference = values - first
      error = difference.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
      line += [
        f'{values.mean():.{digits}f}',
        f'{difference.mean():+.{digits}f} ± {error:.{digits}f}',
      ]
    cells.append(line)
  return cells


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
  """Runs the command line; returns the rows that are written."""
  parser = argparse.ArgumentParser(description='How exact T has to be.')
  results = pathlib.Path(__file__).parent / 'results'
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2, 3, 4])
  parser.add_argument('--output', type=pathlib.Path, default=results / 'tolerance.json')
  parser.add_argument('train', nargs='*', help='more for examples/train_vision.py, after --')
  args = parser.parse_args(argv)
  rows = []
  for row in ROWS:
    rows.append(measure(*row, args))
    content = {'rows': rows, 'seeds': args.seeds, 'environment': reporting.environment()}
    reporting.write_json(args.output, content)  # So far.
  columns = ['T', 'test loss', '- exact', 'test accuracy %', '- exact']
  rich.console.Console(width=100).print(
    _measure.rich_table(
      'How exact T has to be', columns, shown(rows), 'Differences: paired, ± standard error.'
    )
  )
  print(_measure.markdown_table(columns, shown(rows)))
  return json.loads(args.output.read_text('utf-8'))['rows']


if __name__ == '__main__':
  main()
