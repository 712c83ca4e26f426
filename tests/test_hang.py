"""A step never waits for itself on a CPU, whatever is batched in it.

jaxlib 0.10 waits for ever when as many batched LAPACK calls can run at once as its
thread pool has threads; see `spectral_optax.solvers._lapack`.
"""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
  ('solver', 'case'),
  [
    *((solver, 'steps') for solver in ('svd', 'gram', 'cholesky', 'auto')),
    ('cholesky', 'seeds'),
    *((solver, 'devices') for solver in ('gram', 'cholesky')),
  ],
)
def test_comes_to_an_end(solver, case):
  run = subprocess.run(
    [sys.executable, '-m', 'tests.hang_script', solver, case],
    cwd=ROOT,
    env=dict(os.environ),
    capture_output=True,
    text=True,
    timeout=300,  # Far more than it takes; a hang takes for ever.
    check=False,
  )
  assert run.returncode == 0, run.stderr[-3000:]
  assert run.stdout.strip() == 'done'
