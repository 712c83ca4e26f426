"""The example in processes of its own: as many as there are, killed, and started again."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / 'examples' / 'train_sharded.py'
LIMIT = 120  # Seconds, far more than any of it takes.


def start(*flags):
  path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
  # How many devices there are is the script's affair.
  quick = '--xla_backend_optimization_level=0'
  environment = os.environ | {'PYTHONPATH': path, 'XLA_FLAGS': quick}
  return subprocess.Popen(
    [sys.executable, str(SCRIPT), *map(str, flags)],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def end(process):
  _, error = process.communicate(timeout=LIMIT)
  assert process.returncode == 0, error[-3000:]


def devices(count, *mesh):
  return ('--virtual-devices', count, '--mesh', *mesh)


def read(path):
  found = json.loads(path.read_text())
  return found, np.asarray(found['parameters'], np.float32)


def distance(a, b):
  return np.linalg.norm(a - b) / np.linalg.norm(b)


def free_port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


def two_processes(*flags, patience=60):
  port = free_port()
  return [
    start(
      *devices(2, 4, 1),
      *('--coordinator', f'localhost:{port}', '--processes', 2, '--process', i),
      *('--patience', patience),
      *flags,
    )
    for i in range(2)
  ]


def whole_steps(folder):
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def wait_for(condition, process=None):
  until = time.monotonic() + LIMIT
  while not condition():
    assert time.monotonic() < until
    assert process is None or process.poll() is None, process.communicate()[1][-3000:]
    time.sleep(0.0005)


def test_two_processes_do_what_one_does(tmp_path):
  steps = ('--steps', 8, '--damping', 'constant')
  both = two_processes(*steps, '--output', tmp_path / 'two.json')
  one = start(*steps, *devices(1, 1, 1), '--output', tmp_path / 'one.json')
  for process in (*both, one):
    end(process)
  two, got = read(tmp_path / 'two.json')
  alone, want = read(tmp_path / 'one.json')
  assert (two['processes'], alone['processes']) == (2, 1)
  assert two['mesh'] == {'fsdp': 4, 'tp': 1}
  np.testing.assert_allclose(two['losses'], alone['losses'], rtol=1e-5)
  assert distance(got, want) < 1e-5


def test_a_process_that_dies_ends_the_others(tmp_path):
  folder = tmp_path / 'checkpoints'
  flags = ('--steps', 10_000, '--save-every', 5, '--pause', 0.05, '--checkpoints', folder)
  first, second = two_processes(*flags, patience=12)
  try:
    wait_for(lambda: folder.exists() and len(whole_steps(folder)) > 1, first)
    second.kill()
    died = time.monotonic()
    _, error = first.communicate(timeout=LIMIT)
  finally:
    for process in (first, second):
      process.kill()
      process.communicate()
  assert time.monotonic() - died < 60
  assert first.returncode not in (0, -signal.SIGKILL)
  assert 'train_sharded' in error, error[-2000:]
  assert 'last whole checkpoint' in error
  # And that one is whole: one process goes on from it.
  last = whole_steps(folder)[-1]
  more = ('--steps', last + 2, '--schedule-steps', 10_000, '--checkpoints', folder)
  end(start(*more, *devices(4, 4, 1), '--output', tmp_path / 'on.json'))
  assert read(tmp_path / 'on.json')[0]['first step'] == last


@pytest.mark.parametrize('api', ['nnx', 'linen'])
def test_killed_in_the_middle_of_a_save_and_started_again(api, tmp_path):
  folder = tmp_path / 'checkpoints'
  # Rounding that another mesh does otherwise is a part of the updates, and grows with them; at a
  # constant damping, whose turn of T is four times as large, it is smaller. Linen has the noise.
  flags = ('--api', api, '--schedule-steps', 12, '--save-every', 3, '--learning-rate', 0.003)
  flags += ('--damping', 'constant' if api == 'nnx' else 'noise')
  straight = start(*flags, *devices(8, 4, 2), '--steps', 12, '--output', tmp_path / 'straight.json')
  saving = (*flags, '--checkpoints', folder)
  killed = start(*saving, *devices(8, 4, 2), '--steps', 12, '--pause', 0.2)

  def in_a_save():  # Not the first: there is to be one to go on from.
    if not folder.exists():
      return False
    names = [p.name for p in folder.iterdir()]
    return any('tmp' in n and n.startswith(('6', '9')) for n in names)

  wait_for(in_a_save, killed)
  killed.kill()
  killed.communicate()
  end(straight)
  shutil.copytree(folder, tmp_path / 'copy')
  _, want = read(tmp_path / 'straight.json')

  again = start(*saving, *devices(8, 4, 2), '--steps', 12, '--output', tmp_path / 'again.json')
  other = (*flags, '--checkpoints', tmp_path / 'copy')
  end(start(*other, *devices(4, 2, 2), '--steps', 10))
  end(again)
  found, got = read(tmp_path / 'again.json')
  assert 1 <= found['first step'] < 9
  np.testing.assert_array_equal(got, want)
  if api == 'linen':
    return
  end(start(*other, *devices(1, 1, 1), '--steps', 12, '--output', tmp_path / 'other.json'))
  assert distance(read(tmp_path / 'other.json')[1], want) < 1e-6

  misfit = start(*saving, *devices(1, 1, 1), '--steps', 13, '--optimizer', 'adamw')
  _, error = misfit.communicate(timeout=LIMIT)
  assert misfit.returncode != 0
  assert 'does not fit' in error
  assert 'is missing from it' in error
  assert 'is in it and not wanted' in error
