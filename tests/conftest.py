"""Settings that every test runs under."""

import importlib
import os
import pathlib

# A step over a few shapes is compiled over and over: keep the results between runs, of single
# operations too, which are most of them.
_CACHE = pathlib.Path(__file__).parents[1] / '.cache' / 'jax'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '0')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('MPLBACKEND', 'agg')
# LAPACK's threads and XLA's get into each other's way, badly so on a busy machine.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
# Explicit sharding needs more than one device; the suite runs on a laptop, and compiles
# more than it computes: a quarter of the time is what LLVM's optimisations would cost.
os.environ.setdefault(
  'XLA_FLAGS', '--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0'
)

import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture
def load_benchmark(monkeypatch):
  """From a name in benchmarks/ to the module."""
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / 'benchmarks')
  # What they set at their top is gone after the test.
  for name in ('TPU_SKIP_MDS_QUERY', 'TPU_ACCELERATOR_TYPE', 'TPU_WORKER_HOSTNAMES'):
    monkeypatch.setenv(name, 'x')
  for name in ('TPU_WORKER_ID', 'ALLOW_MULTIPLE_LIBTPU_LOAD'):
    monkeypatch.setenv(name, '0')
  monkeypatch.setenv('OPENBLAS_NUM_THREADS', '1')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  return importlib.import_module


@pytest.fixture
def x64():
  """Double precision for one test."""
  with jax.enable_x64(True):
    yield
