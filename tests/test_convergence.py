"""The comparison: that it runs, goes on where it was, tunes fairly and counts right."""

import functools
import importlib
import json
import math
import os
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'


@pytest.fixture
def convergence(monkeypatch):
  for folder in (BENCHMARKS.parent / 'examples', BENCHMARKS):
    monkeypatch.syspath_prepend(folder)
  monkeypatch.setenv('OPENBLAS_NUM_THREADS', os.environ.get('OPENBLAS_NUM_THREADS', '1'))
  module = importlib.import_module('convergence')
  # The trainings are Flax's and other people's, which promote ranks.
  with jax.numpy_rank_promotion('allow'):
    yield module


@pytest.fixture
def small(convergence, monkeypatch):
  """A task of a moment."""
  task = convergence._problems.TASKS['mlp-digits']
  monkeypatch.setitem(
    convergence._problems.TASKS,
    'mlp-digits',
    convergence.dataclasses.replace(task, options={'width': 12, 'depth': 1}, steps=32, every=16),
  )
  return convergence


def test_a_run_leaves_all_and_goes_on_where_it_was(small, tmp_path, capsys, monkeypatch):
  work, output = tmp_path / 'work', tmp_path / 'results' / 'convergence.json'
  command = '--tasks mlp-digits --contestants muon spectral_newton --lanes 28 --quiet --seeds 0 1'
  command = [*command.split(), '--work', str(work), '--output', str(output)]
  batches = []
  original = small.Runner.run

  def watched(self, lanes, **how):
    batches.append((self.program, len(lanes), how['test']))
    return original(self, lanes, **how)

  monkeypatch.setattr(small.Runner, 'run', watched)
  small.main(command)
  # Fourteen trials on two seeds each, and two seeds that are reported: these see test data.
  assert batches == [
    ('muon', 28, False), ('muon', 2, True), ('noise', 28, False), ('noise', 2, True),
  ]  # fmt: skip
  content = json.loads(output.read_text())
  found = content['tasks']['mlp-digits']['contestants']
  assert list(found) == ['muon', 'spectral_newton']
  for of in found.values():
    assert len(of['tuned']['trials']) == small._contestants.TRIALS
    assert of['tuned']['loss'] == min(loss for _, _, loss in of['tuned']['trials'] if loss)
    assert [run['seed'] for run in of['runs']] == [0, 1]
    for run in of['runs']:
      assert len(run['validation']) == len(run['train']) == 2
      assert run['validation'][1] < run['validation'][0] < 2.5
      assert 0.3 < run['test_accuracy'] <= 1
      assert run['test_loss'] != run['validation_loss']
  first, second = (run['test_loss'] for run in found['muon']['runs'])
  assert first != second
  assert 'Muon (Optax)' in capsys.readouterr().out
  assert {p.name for p in output.parent.iterdir()} == {
    'convergence.json', 'convergence.md', 'convergence_curves.png',
    'convergence_differences.png', 'convergence_overview.png',
  }  # fmt: skip

  # What has been trained is not trained again; a line that was cut short is.
  batches.clear()
  small.main(command)
  assert batches == []
  assert json.loads(output.read_text()) == content
  path = work / 'mlp-digits' / 'muon.jsonl'
  path.write_text(path.read_text()[:-40])
  small.main(command)
  assert batches == [('muon', 1, True)]
  again = json.loads(output.read_text())['tasks']['mlp-digits']['contestants']
  # Alone, and not one of many: the same training.
  assert again['muon']['runs'][1]['test_loss'] == pytest.approx(second, rel=1e-3)

  # Where none of it has been trained, what is added goes to what is there.
  command[command.index('--work') + 1] = str(tmp_path / 'elsewhere')
  small.main([*command, '--contestants', 'muon', '--seeds', '2'])
  added = json.loads(output.read_text())['tasks']['mlp-digits']['contestants']
  assert added['spectral_newton'] == again['spectral_newton']
  assert added['muon']['runs'][:2] == again['muon']['runs']
  assert [run['seed'] for run in added['muon']['runs']] == [0, 1, 2]

  # Not what was trained on other data, which is another training too.
  original = small._problems.load
  changed = lambda *of: {k: v[::-1] for k, v in original(*of).items()}
  monkeypatch.setattr(small._problems, 'load', changed)
  written = output.read_text()
  with pytest.raises(SystemExit, match='mlp-digits on other data'):
    small.main(command)
  small.main([*command, '--report'])
  assert json.loads(output.read_text())['tasks'] == json.loads(written)['tasks']
  problems = [
    small._problems.Problem(small._problems.TASKS['mlp-digits'], load('digits'), together=True)
    for load in (original, changed)
  ]
  store, lane = small.Store(work), {'seed': 0, 'rate': 0.01}
  store.add(problems[0], 'muon', [lane], [{'test_loss': 1.0}])
  assert store.get(problems[0], 'muon', lane)['test_loss'] == 1
  assert store.get(problems[1], 'muon', lane) is None


def test_what_is_merged(convergence):
  """By contestant, seed, cell and momentum; nothing of another task, and no other rate's runs."""
  run = lambda seed, loss: {'seed': seed, 'test_loss': loss}
  of = lambda rate, *runs, cost=None: {
    'tuned': {'rate': rate, 'knob': None}, 'runs': list(runs), 'cost': cost
  }  # fmt: skip
  cell = lambda alpha, loss: {
    'alpha': alpha, 'alpha_end': alpha, 'turn': 0.1, 'momentum': 0.9, 'losses': {'200': loss}
  }  # fmt: skip
  before = {
    'task': {'name': 'a', 'steps': 4},
    'contestants': {
      'gone': of(0.1, run(0, 9.0)),
      'new': of(0.1, run(0, 1.0), run(1, 1.0), cost={'milliseconds': 3.0}),
      'tuned_anew': of(0.1, run(0, 1.0)),
      'kept': of(0.2, run(0, 4.0)),
    },
    'cells': [cell(1, 0.5), cell(2, 0.6)],
    'references': {'muon': {'rate': 0.1}},
    'momenta': {'0.9': {'Muon': {'rate': 0.1}}, '0.8': {'Muon': {'rate': 0.1}}},
  }
  found = {
    'task': {'name': 'a', 'steps': 4},
    'contestants': {
      'new': of(0.1, run(1, 2.0), run(2, 2.0)), 'tuned_anew': of(0.3, run(1, 2.0))
    },
    'cells': [cell(2, 0.7)],
    'references': {'adamw': {'rate': 0.2}},
    'momenta': {'0.8': {'ours': {'rate': 0.3}}},
  }  # fmt: skip
  names = ['kept', 'new', 'tuned_anew', 'never_run']
  assert convergence.merged(before, found, names) == {
    'task': found['task'],
    'contestants': {
      'kept': of(0.2, run(0, 4.0)),
      'new': of(0.1, run(0, 1.0), run(1, 2.0), run(2, 2.0), cost={'milliseconds': 3.0}),
      'tuned_anew': of(0.3, run(1, 2.0)),
    },
    'cells': [cell(1, 0.5), cell(2, 0.7)],
    'references': {'muon': {'rate': 0.1}, 'adamw': {'rate': 0.2}},
    'momenta': {
      '0.8': {'Muon': {'rate': 0.1}, 'ours': {'rate': 0.3}}, '0.9': {'Muon': {'rate': 0.1}}
    },
  }  # fmt: skip
  other = found | {'task': {'name': 'a', 'steps': 8}}
  assert convergence.merged(before, other, names) == other


def test_a_map_and_exponents_that_move(small, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(small._contestants, 'PATHS', ((1.5, 1.5, 0.06), (2.0, 1.0, 0.06)))
  output = tmp_path / 'map.json'
  command = '--tasks mlp-digits --map --schedules --alphas 1 1.5 --turns 0.06 0.3 --rates 0.01 0.02'
  command = f'{command} --map-seeds 200 201 --lanes 32 --quiet --work {tmp_path} --output {output}'
  small.main(command.split())
  task = json.loads(output.read_text())['tasks']['mlp-digits']
  cells = {(c['alpha'], c['alpha_end'], c['turn']): c for c in task['cells']}
  assert set(cells) == {(1, 1, 0.06), (1, 1, 0.3), (1.5, 1.5, 0.06), (1.5, 1.5, 0.3), (2, 1, 0.06)}
  for cell in cells.values():
    assert set(cell['losses']) == {'200', '201'}
    assert set(cell['by_rate']) == {'0.01', '0.02'}
    mean = np.mean(list(cell['losses'].values()))
    assert mean == pytest.approx(min(cell['by_rate'].values()), rel=1e-5)
  assert len({cell['by_rate']['0.01'] for cell in cells.values()}) == 5  # All different.
  assert set(task['references']) == {'muon', 'adamw'}
  text = output.with_suffix('.md').read_text()
  assert '| 2 → 1 | 0.06 |' in text
  assert '| α \\ σ* | 0.06 | 0.3 |' in text
  assert (tmp_path / 'map_map.png').is_file()


def test_other_momenta(small, tmp_path, capsys):
  output = tmp_path / 'momenta.json'
  command = '--tasks mlp-digits --momenta 0.9 --alphas 1 1.5 --turns 0.06 --rates 0.01 0.02'
  command = f'{command} --noise --defaults --map-seeds 200 201 --lanes 8 --quiet'
  command = f'{command} --work {tmp_path} --output {output}'
  small.main(command.split())
  found = json.loads(output.read_text())['tasks']['mlp-digits']['momenta']
  assert list(found) == ['0.9']
  noisy = ['α = 1, σ* from the noise', 'α = 1.5, σ* from the noise']
  assert list(found['0.9']) == [
    *('Muon', 'the defaults', *noisy),
    *('α = 1, σ* = 0.06', 'α = 1.5, σ* = 0.06'),
  ]
  of_defaults = found['0.9'].pop('the defaults')
  # Nothing is wide here. At α = 1.5 that is what they are, but that the other's is traced.
  assert of_defaults['by_rate'] == pytest.approx(found['0.9'][noisy[1]]['by_rate'], rel=1e-2)
  assert len({of['by_rate']['0.01'] for of in found['0.9'].values()}) == 5  # All different.
  for of in found['0.9'].values():
    assert set(of['losses']) == {'200', '201'}
    assert set(of['by_rate']) == {'0.01', '0.02'}
  # As a user's momentum of 0.9, and not as 0.95.
  lines = (tmp_path / 'mlp-digits' / 'muon.jsonl').read_text('utf-8').splitlines()
  lanes = [json.loads(line)['lane'] for line in lines]
  assert [lane['momentum'] for lane in lanes] == [0.9] * 4
  shown = f'{np.mean(list(found["0.9"]["Muon"]["losses"].values())):.4f}'
  assert f'| Muon | {shown} ({found["0.9"]["Muon"]["rate"]:g}) |' in capsys.readouterr().out


def test_spectral_newton_of_a_lane_is_the_librarys(small):
  problems, contestants = small._problems, small._contestants
  task = problems.TASKS['mlp-digits']
  problem = problems.Problem(task, problems.load('digits'), together=True)
  lane = contestants.traced(problem, {'seed': 0, 'rate': 0.02, 'alpha': 2.0, 'alpha_end': 1.0})
  assert problem.matrices == ['head/kernel', 'layers/0/kernel']
  np.testing.assert_allclose(lane['alpha_end'], [1, 1])
  params, _ = jax.jit(problem.init)(jnp.uint32(0))
  rng = np.random.default_rng(1)
  grads = {p: jnp.float32(rng.standard_normal(x.shape)) for p, x in params.items()}
  ours = contestants.spectral_newton(problem, lane)
  # Half way, the exponent is half way: the momentum of equal gradients is that gradient.
  state = jax.tree.map(
    lambda x: jnp.full_like(x, 16) if x.dtype == jnp.int32 else x, ours.init(params)
  )
  updates, _ = jax.jit(ours.update)(grads, state, jax.tree.map(jnp.zeros_like, params))
  for path in problem.matrices:
    exact = contestants.spectral_optax.apply_transfer(
      grads[path], alpha=1.5, damping=0.06**1.5, solver='svd'
    )
    size = lambda x: np.sqrt(np.mean(np.square(x)))
    found = updates[path] / size(updates[path])
    np.testing.assert_allclose(found, -exact / size(exact), atol=4 * contestants.TOLERANCE)
    rate = float(contestants.schedule(problem, lane)(16))
    assert size(updates[path]) == pytest.approx(0.2 * rate, rel=1e-3)


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('spectral_newton', {}),
    ('by_matrix', {'rms_of': 'matrix'}),
    ('by_output', {'rms_of': 'output'}),
    ('by_layer', {'rms_of': 'layer_type'}),
    ('constant', {'damping': 'constant', 'rms_of': 'matrix'}),
  ],
)
def test_contestants_of_defaults_are_what_a_user_gets(convergence, name, options):
  """Three steps of different gradients, beside `spectral_newton(rate)`."""
  problems, contestants = convergence._problems, convergence._contestants
  task = problems.TASKS['vgg-fashion']
  arrays = {'train_x': np.zeros((1, 1, 28, 28), np.uint8), 'train_y': np.array([9], np.uint8)}
  everyone = contestants.contestants()
  # A head of ten classes is not wide, and one program serves with "wide" and without.
  plain = problems.Problem(task, arrays, together=False)
  assert everyone['spectral_newton'].program_on(plain) == 'noise'
  assert not everyone['by_matrix'].can_run(plain)
  small = {'plan': (16, problems.POOL, 16, problems.POOL, 16), 'hidden': 8}
  task = convergence.dataclasses.replace(task, options=small)
  problem = problems.Problem(task, arrays, together=False)
  assert everyone['spectral_newton'].program_on(problem) == 'noise_wide'
  lane = contestants.traced(problem, everyone[name].lane(problem, 0, 0.02, None))
  params = {p: jnp.ones(x.shape) for p, x in problem.shapes.items()}
  library = contestants.spectral_optax.spectral_newton(
    contestants.schedule(problem, lane),
    **options,
    weight_decay=contestants.WEIGHT_DECAY,
    solver='polynomial',
    tolerance=contestants.TOLERANCE,
  )
  ours = contestants.PROGRAMS[everyone[name].program].build(problem, lane)
  states = ours.init(params), library.init(params)
  rng = np.random.default_rng(0)
  for _ in range(3):
    grads = {p: jnp.float32(rng.standard_normal(x.shape)) for p, x in params.items()}
    (found, first), (exact, second) = (
      jax.jit(tx.update)(grads, state, params)
      for tx, state in zip((ours, library), states, strict=True)
    )
    states = first, second
  for path in params:
    np.testing.assert_allclose(found[path], exact[path], rtol=1e-4, atol=1e-7)


def test_contestants_are_tuned_alike(convergence):
  contestants, problems = convergence._contestants, convergence._problems
  problem = problems.Problem(problems.TASKS['mlp-digits'], problems.load('digits'), together=False)
  values = dict(zip(problem.matrices, (0.8, 1.0, 1.3, 1.7, 2.2), strict=True))
  found = {'alpha': values, 'gamma': dict.fromkeys(values, 1.0)}
  network = convergence._measured.network(problem)
  measured = {'mlp-digits': {'network': network, 'before': found, 'early': found}}
  everyone = contestants.contestants(measured)
  first, *others = sorted(set(problem.matrices) - {'head/kernel'})
  assert contestants.wide_dense(problem) == {
    first: 'output', **dict.fromkeys([*others, 'head/kernel'], 'wide')
  }  # fmt: skip
  for contestant in everyone.values():
    # Only convolutions, or a transformer's blocks, tell these from the defaults; here are none.
    same = ('one_turn', 'by_layer', 'by_matrix')
    assert contestant.can_run(problem) == (contestant.name not in same)
    grid = contestant.grid()
    assert len(set(grid)) == contestants.TRIALS
    seen = sorted({rate for rate, _ in grid})
    assert seen[-1] / seen[0] == pytest.approx(2 ** (7 * (1 - 1 / len(seen))), rel=1e-4)
    lanes = convergence.tuning_lanes(problem, contestant)
    assert {lane['seed'] for lane in lanes}.isdisjoint(range(100))
    for lane in lanes:
      contestants.traced(problem, lane)
  at = lambda name: everyone[name].lane(problem, 3, 0.01, 0.0)
  assert at('measured_before')['alpha'] == at('measured_early')['alpha'] == values
  # Of the contestant that they stand beside, σ* and the momentum.
  usual = at('constant')
  assert at('measured_early') == usual | {'alpha': values}
  assert at('measured_online')['momentum'] == at('spectral_newton')['momentum'] == 0.9
  assert usual['momentum'] == 0.9
  assert 'momentum' not in at('earlier')
  reversed_order = at('measured_early_reversed')['alpha']
  assert reversed_order == pytest.approx({p: 3.0 - a for p, a in values.items()})
  part = at('measured_early_part')['alpha']
  assert part == pytest.approx({p: 0.75 * a for p, a in values.items()}, rel=1e-5)
  shuffled = at('measured_early_shuffled')['alpha']
  assert sorted(shuffled.values()) == sorted(values.values())
  assert shuffled != values
  # s^1 and s^-1, each with a mean of one.
  scale = everyone['scalar'].lane(problem, 3, 0.01, -1.0)['scale']
  assert np.mean(list(scale.values())) == pytest.approx(1, rel=1e-4)
  assert scale[problem.matrices[0]] / scale[problem.matrices[4]] == pytest.approx(
    2.2 / 0.8, rel=1e-4
  )
  with pytest.raises(ValueError, match="'rat' is no number"):
    contestants.traced(problem, {'seed': 0, 'rat': 1.0})
  # What was measured of another network is nothing to this one; K-FAC has no running averages, and
  # fails on attention.
  measured['mlp-digits']['network'] = {**network, 'options': {'width': 128, 'depth': 5}}
  another = contestants.contestants(measured)
  assert not another['measured_before'].can_run(problem)
  assert not another['scalar'].can_run(problem)
  assert another['alpha_2'].can_run(problem)
  images = {k: np.zeros((2, 28, 28, 1), np.uint8) for k in ('train_x', 'train_y')}
  resnet = problems.Problem(problems.TASKS['resnet-fashion'], images, together=False)
  gpt = problems.Problem(
    problems.TASKS['gpt-bytes'], {'train': np.arange(200, dtype=np.uint8)}, together=False
  )
  for task in (resnet, gpt):
    assert not another['kfac'].can_run(task)
    assert another['shampoo'].can_run(task)
  assert another['kfac'].can_run(problem)


def test_what_was_measured_is_known_again_from_a_file(convergence):
  """Of every network; VGG's plan is a tuple, and JSON has none."""
  problems = convergence._problems
  arrays = {'train_x': np.zeros((1, 1, 28, 28), np.uint8), 'train_y': np.array([9], np.uint8)}
  arrays |= {'train': np.arange(200, dtype=np.uint8)}
  for name, task in problems.TASKS.items():
    problem = problems.Problem(task, arrays, together=False)
    found = {'alpha': dict.fromkeys(problem.matrices, 1.7), 'gamma': {}}
    network = convergence._measured.network(problem)
    kept = json.loads(json.dumps({name: {'network': network, 'before': found, 'early': found}}))
    assert convergence._contestants.contestants(kept)['measured_early'].can_run(problem), name


def test_measured_before_training_and_online(small, tmp_path, monkeypatch):
  monkeypatch.setattr(small._measured, 'EARLY', 16)
  measured = tmp_path / 'measured.json'
  command = f'--tasks mlp-digits --quiet --measured {measured} --work {tmp_path} --no-tables'
  command = f'{command} --output {tmp_path / "c.json"} --lanes 14'
  small.main([*command.split(), '--measure'])
  found = json.loads(measured.read_text())['mlp-digits']
  assert found['network']['options'] == {'width': 12, 'depth': 1}
  assert (found['before']['steps'], found['early']['steps']) == (0, 16)
  for form in ('before', 'early'):
    assert set(found[form]['alpha']) == {'head/kernel', 'layers/0/kernel'}
  assert found['before']['fitted'] != found['early']['fitted']
  # A fit that is good is taken, within the limits; the default stands in for the others.
  for path, alpha in found['early']['alpha'].items():
    fitted, r_squared = found['early']['fitted'][path], found['early']['r_squared'][path]
    assert alpha in (1.5, pytest.approx(np.clip(fitted, 0.5, 2.5), rel=1e-5))
    assert alpha == 1.5 or r_squared > 0.7
  monkeypatch.setattr(small._contestants, 'TRIALS', 2)
  called, of_lanes = [], small.of_lanes
  monkeypatch.setattr(small, 'of_lanes', lambda *args: called.append(1) or of_lanes(*args))
  content = small.main([*command.split(), '--contestants', 'measured_online', '--seeds', '0'])
  assert called == [1]
  (run,) = content['tasks']['mlp-digits']['contestants']['measured_online']['runs']
  assert run['validation'][1] < run['validation'][0]  # At the smallest rates.


def test_what_is_done_now_and_then_is_not_done_always(small):
  """Nor of several lanes: a count of steps is one for all of them."""
  problem = small._problems.Problem(
    small._problems.TASKS['mlp-digits'], small._problems.load('digits'), together=True
  )
  contestants = small._contestants
  build = functools.partial(contestants.measured_online, problem)
  each = [
    contestants.traced(problem, {'seed': i, 'rate': rate}) for i, rate in enumerate((1e-2, 0.1))
  ]
  samples = [jnp.asarray(problem.samples(i)[:16]) for i in range(2)]
  together = lambda xs: jax.tree.map(lambda *xs: jnp.stack(xs), *xs)
  start, advance = small.of_lanes(problem, build, each[0])
  lanes = together(each)
  carry = jax.eval_shape(start, lanes)
  arguments = lanes, together(samples), problem.arrays
  of_one = functools.partial(problem.advance, build)
  told_apart = jax.eval_shape(jax.vmap(functools.partial(problem.start, build)), lanes)
  conditions = lambda of, carry: str(jax.make_jaxpr(of)(carry, *arguments)).count('cond[')
  always = conditions(jax.vmap(of_one, in_axes=(0, 0, 0, None)), told_apart)
  assert conditions(advance, carry) == always + 1


def test_lanes_are_trained_as_one_alone_is(small):
  problem = small._problems.Problem(
    small._problems.TASKS['mlp-digits'], small._problems.load('digits'), together=True
  )
  build = functools.partial(small._contestants.adamw, problem)
  lanes = [
    small._contestants.traced(problem, {'seed': i, 'rate': rate})
    for i, rate in enumerate((1e-2, 0.1))
  ]
  samples = [jnp.asarray(problem.samples(i)[:16]) for i in range(2)]
  together = lambda xs: jax.tree.map(lambda *xs: jnp.stack(xs), *xs)
  start, advance = map(jax.jit, small.of_lanes(problem, build, lanes[0]))
  all_lanes = together(lanes)
  (found, *_), losses = advance(start(all_lanes), all_lanes, together(samples), problem.arrays)
  of_one = jax.jit(lambda lane, which: problem.advance(
    build, problem.start(build, lane), lane, which, problem.arrays
  ))  # fmt: skip
  for i, lane in enumerate(lanes):
    (alone, *_), loss = of_one(lane, samples[i])
    np.testing.assert_allclose(losses[i], loss, rtol=1e-4)
    for path, x in alone.items():
      np.testing.assert_allclose(found[path][i], x, rtol=1e-3, atol=1e-4)


def test_what_jits_its_own_steps(small, tmp_path, monkeypatch):
  """As K-FAC does: in Python, one lane, and trained and told apart as all others are."""
  contestants = small._contestants
  widths = []

  def trainer(problem):
    build = lambda lane: contestants.sgd(problem, lane)
    first = lambda tree: jax.tree.map(lambda x: x[0], tree)
    whole = lambda tree: jax.tree.map(lambda x: x[None], tree)

    def start(lanes):
      widths.append(len(lanes['seed']))
      return whole(jax.jit(lambda lane: problem.start(build, lane))(first(lanes)))

    jitted = jax.jit(lambda *of: problem.advance(build, *of))

    def advance(carry, lanes, which, arrays):
      return whole(jitted(first(carry), first(lanes), which[0], arrays))

    return start, advance

  own = contestants.Program(None, trainer=trainer)
  monkeypatch.setitem(contestants.PROGRAMS, 'kfac', own)
  monkeypatch.setattr(contestants, 'TRIALS', 2)
  command = '--tasks mlp-digits --contestants kfac sgd --lanes 2 --quiet --seeds 0 --no-tables'
  original = contestants.contestants

  def alike(measured=None):
    both = original(measured)
    kfac = small.dataclasses.replace(both['sgd'], name='kfac', program='kfac')
    return both | {'kfac': kfac}

  monkeypatch.setattr(contestants, 'contestants', alike)
  command = f'{command} --work {tmp_path} --output {tmp_path / "c.json"}'
  found = small.main(command.split())['tasks']['mlp-digits']['contestants']
  assert set(widths) == {1}
  (theirs,), (ours,) = found['sgd']['runs'], found['kfac']['runs']
  assert ours['validation'] == pytest.approx(theirs['validation'], rel=1e-3)
  assert ours['test_loss'] == pytest.approx(theirs['test_loss'], rel=1e-3)


def test_another_width(convergence, capsys):
  usual = convergence.parse(['--tasks', 'gpt-bytes', '--report']).chosen_tasks[0]
  wider = convergence.parse(['--tasks', 'gpt-bytes', '--width', '160', '--report']).chosen_tasks[0]
  assert wider.options == {**usual.options, 'width': 160}
  assert wider.weight == 7 * usual.weight  # 2.5² times the numbers in a matrix.
  with pytest.raises(SystemExit):
    convergence.parse(['--tasks', 'vgg-fashion', '--width', '160', '--report'])
  assert 'vgg-fashion has no width' in capsys.readouterr().err


def test_rollfast_is_given_the_lanes_momentum(convergence, monkeypatch):
  contestants, problems = convergence._contestants, convergence._problems
  problem = problems.Problem(problems.TASKS['mlp-digits'], problems.load('digits'), together=False)
  given = []

  def make(**how):
    given.append(how)
    return contestants.optax.sgd(how['learning_rate'])

  package = types.SimpleNamespace(normuon=make, prism=make, aurora=make, kron=make)
  monkeypatch.setitem(sys.modules, 'rollfast', package)
  lane = {'rate': 0.1, 'momentum': 0.9}
  for name in ('normuon', 'prism', 'aurora', 'aurora_0.9', 'psgd_kron'):
    contestants.PROGRAMS[name].build(problem, lane)
  momenta = [{k: v for k, v in how.items() if k in ('b1', 'beta1')} for how in given]
  assert momenta == [{'beta1': 0.9}, {'b1': 0.9}, {}, {'b1': 0.9}, {}]


def test_shampoo_of_2022_finds_its_jax(convergence):
  jax_then, lax_then = convergence._contestants._OldJax(), convergence._contestants._OldLax()
  assert jax_then.tree_map(lambda x: x + 1, {'a': 1}) == {'a': 2}
  assert jax_then.numpy is jnp
  # A bool that the body makes a number, which JAX no longer lets pass.
  start = (0, True)
  body = lambda x: (x[0] + 1, jnp.float32(0.5) * x[1])
  found = lax_then.while_loop(lambda x: x[0] < 3, body, start)
  assert (int(found[0]), float(found[1])) == (3, 0.125)


def test_the_price_of_a_step(small, tmp_path, monkeypatch):
  task = small._problems.TASKS['mlp-digits']
  problem = small._problems.Problem(task, small._problems.load('digits'), together=False)
  command = f'--tasks mlp-digits --contestants sgd muon --quiet --rounds 3 --work {tmp_path} --time'
  small.main([*command.split(), '--output', str(tmp_path / 'c.json'), '--no-tables'])
  cost = json.loads((tmp_path / 'mlp-digits' / 'cost.json').read_text())
  # 64 -> 12 -> 10, 64 at once: forward, of the weights, and of what is between the layers.
  layers, between = 2 * 64 * (64 * 12 + 12 * 10), 2 * 64 * 12 * 10
  assert cost['sgd']['flops'] == 2 * layers + between
  # Five rounds of three products: the Gram matrix, its square, the rest.
  orthogonal = sum(5 * 2 * (2 * r * r * c + r**3) for r, c in ((12, 64), (10, 12)))
  assert cost['muon']['flops'] == cost['sgd']['flops'] + orthogonal
  for of in cost.values():
    assert 0 < of['milliseconds'] < 1e3
    assert not of['at_least']
  # One that was not timed has the price of another's step, if that is the same.
  everyone = small._contestants.contestants()
  known = {**cost, 'falling': {'flops': 1.0}}
  of = lambda name: small.cost_of(problem, everyone[name], everyone.values(), known)
  assert of('muon_sqrt_alpha') == {**cost['muon'], 'of': 'muon'}
  assert of('dynmuon') == {'flops': 1.0, 'of': 'falling'}
  assert of('alpha_2') is None
  assert of('adamw') is None
  assert of('by_output') is of('spectral_newton') is None
  known['spectral_newton'] = {'flops': 2.0}
  assert of('by_output') == {'flops': 2.0, 'of': 'spectral_newton'}
  contestants = {name: {'cost': known.get(name)} for name in ('spectral_newton', 'by_output')}
  small.priced(problem, contestants, everyone.values())
  assert contestants['by_output']['cost'] == of('by_output')
  assert contestants['spectral_newton']['cost'] == known['spectral_newton']
  # In another process, with another JAX: what a step takes beyond AdamW's there, and AdamW's here.
  here, there = {'milliseconds': 5.0, 'flops': 1.0}, {'milliseconds': 9.0, 'beyond_base': 2.0}
  known = {'adamw': here, 'sgd': there, 'muon': {'milliseconds': 4.0}}
  assert of('sgd')['milliseconds'] == 7
  assert of('muon')['milliseconds'] == 4
  (tmp_path / 'mlp-digits' / 'cost.json').write_text(json.dumps({'adamw': here}))
  command = command.replace('sgd muon', 'sgd adamw')
  small.main([*command.split(), '--output', str(tmp_path / 'c.json'), '--no-tables'])
  cost = json.loads((tmp_path / 'mlp-digits' / 'cost.json').read_text())
  assert cost['adamw'] == here
  assert 'beyond_base' in cost['sgd']
  # What is done in every fourth step counts a quarter.
  matrix = jnp.ones([8, 8])

  def step(which, carry, arrays):
    del which, arrays
    return 0, jax.lax.cond(carry > 0, lambda: carry + (matrix @ matrix)[0, 0], lambda: carry)

  now_and_then = small._contestants.Program(lambda *_: None, period=lambda problem: 4)
  monkeypatch.setitem(small._contestants.PROGRAMS, 'sgd', now_and_then)
  racer = small._timing.Training('sgd', step, jnp.float32(1))
  assert small._timing.flops(problem, 'sgd', racer)['flops'] == 2 * 8**3 / 4


def test_what_the_readme_says(convergence, tmp_path):
  report = convergence._convergence_report
  run = lambda seed, loss, accuracy=0.5: {
    'seed': seed, 'test_loss': loss, 'test_accuracy': accuracy, 'validation_loss': loss,
    'validation': [2.0, loss], 'train': [2.0, loss / 2], 'backend': 'gpu',
  }  # fmt: skip
  tuned = {'rate': 0.1, 'knob': None, 'at_the_edge': False}
  entry = lambda program, cost, *runs: {
    'what': program, 'program': program, 'knob': '', 'tuned': tuned, 'runs': list(runs),
    'cost': cost,
  }  # fmt: skip
  cost = lambda ms: {
    'milliseconds': ms, 'flops': 1e9, 'at_least': False, 'jax': '1', 'backend': 'cpu',
  }  # fmt: skip
  of = {'every': 10, 'steps': 20, 'network': 'mlp', 'data': 'digits', 'batch_size': 4,
        'stage': 'confirmation'}  # fmt: skip
  contestants = {
    'muon': entry('muon', cost(2.0), run(0, 1.0), run(1, 1.2)),
    'spectral_newton': entry('spectral_newton', cost(4.0), run(0, 0.2), run(1, 0.2)),
    'falling': entry('spectral_newton', cost(4.0), run(0, 0.3, 0.75), run(1, 0.3, 0.7)),
    'adamw': entry('adamw', None, run(0, 3.0), run(1, 3.0)),
    'prism': entry('prism', None, run(0, 4.0), run(1, 4.0)),
    'aurora': entry('aurora', None, run(0, 2.0), run(1, 2.0)),
  }
  task = {'task': of, 'contestants': contestants, 'cells': [], 'references': {}}
  content = {'tasks': {'mlp-digits': task, 'mlp-digits, images 9': task}, 'notes': ['A note.']}
  rows = report.summary(task)
  # To 1.1 from 2.0 to 0.2 in the second ten steps.
  assert rows['spectral_newton']['steps'] == pytest.approx(15)
  assert rows['spectral_newton']['seconds'] == pytest.approx(0.06)
  assert rows['spectral_newton']['flops'] == pytest.approx(15e9)
  path = tmp_path / 'README.md'
  path.write_text('before')
  with pytest.raises(ValueError, match='each once'):
    report.into_readme(content, path)
  path.write_text(f'before\n{report.BEGIN}\nold\n{report.END}\nafter\n')
  report.into_readme(content, path)
  once = path.read_text()
  report.into_readme(content, path)
  assert path.read_text() == once
  assert once.startswith('before\n')
  assert once.endswith('\nafter\n')
  assert '\nold\n' not in once
  assert '**.200 ± .000**; 50.0 %' in once
  assert '| 2.000 ± .000; 50.0 % (aurora) | .300 ± .000; **72.5** % (spectral_newton) |' in once
  assert '15; 4.00 ms; 0.0600 s; 15.0' in once
  assert once.count('| MLP on the digits (images 9), 20 |') == once.count(
    '| MLP on the digits, 20 |'
  )
  assert 'never' in once
  text = report.markdown(content)
  assert '- A note.' in text
  # More accurate by .25 and .2.
  row, again = (line for line in text.splitlines() if '72.50' in line)
  assert row == again
  losses = ['0.3000 ± 0.0000', '-2.7000 ± 0.0000', '-0.8000 ± 1.2706', '+0.1000 ± 0.0000']
  assert row.split(' | ')[1:6] == ['2', *losses]
  percent = [cell.split(' ±')[0] for cell in row.split(' | ')[6:11]]
  assert percent == ['72.50', '+22.50', '+22.50', '+22.50', '0.1500']
  assert '| 15 | 4.00 | 0.0600 | 15.0 |' in text
  # Of training losses only that of the last ten steps differs.
  assert '| defaults | after 10 steps | after 20 steps |' in text
  assert '| validation loss - Muon | +0.0000 ± 0.0000 | -0.9000 ± 1.2706 |' in text
  assert '| training loss - AdamW | +0.0000 ± 0.0000 | -1.4000 ± 0.0000 |' in text
  quarters = {
    'task': {'every': 10, 'steps': 40},
    'contestants': {
      name: {
        'runs': [
          {'seed': s, 'train': [of] * 4, 'validation': [5, of, of * s, None]} for s in (1, 2)
        ]
      }
      for name, of in (('spectral_newton', 2.0), ('adamw', 3.0))
    },
  }
  lines = report.along_table(quarters).splitlines()
  assert (
    lines[0] == '| defaults | ' + ' | '.join(f'after {i} steps' for i in (10, 20, 30, 40)) + ' |'
  )
  assert lines[2].split(' | ')[1:] == [
    '+0.0000 ± 0.0000',
    '-1.0000 ± 0.0000',
    '-1.5000 ± 6.3531',
    ' |',
  ]
  assert lines[3].split(' | ')[1:4] == ['-1.0000 ± 0.0000'] * 3
  assert report.along_table({**quarters, 'contestants': {}}) == ''
  # The project's own has the marks.
  readme = (BENCHMARKS.parent / 'README.md').read_text('utf-8')
  assert readme.count(report.BEGIN) == readme.count(report.END) == 1
  results = json.loads((BENCHMARKS / 'results' / 'convergence.json').read_text('utf-8'))
  assert f'{report.BEGIN}\n\n{report.readme_part(results)}\n\n{report.END}' in readme


def test_every_map_is_drawn(convergence):
  cells = [
    {'alpha': a, 'turn': t, 'losses': {'200': a + t}} for a in (1.0, 1.5) for t in (0.1, 0.3)
  ]
  maps = {f'map {i}': (cells, {}) for i in range(4)}
  figure = convergence._convergence_report.map_figure(maps)
  drawn = [axes for axes in figure.axes if axes.images]
  assert [axes.get_title().split(':')[0] for axes in drawn] == list(maps)
  for axes in drawn:
    np.testing.assert_allclose(axes.images[0].get_array(), [[1.1, 1.3], [1.6, 1.8]])
  # In two rows of three; what is left over is empty.
  assert sum(not axes.axison for axes in figure.axes) == 2


def test_the_overview_shows_each_contestant_in_every_task_it_is_in(convergence):
  report = convergence._convergence_report
  run = lambda seed, loss: {
    'seed': seed, 'test_loss': loss, 'test_accuracy': 0.5, 'train_loss': loss,
    'validation': [loss + 1, loss], 'train': [loss, loss], 'validation_loss': loss,
  }  # fmt: skip
  of = lambda *losses: {
    'what': 'x', 'program': 'x', 'knob': None, 'cost': None,
    'tuned': {'rate': 0.1, 'knob': None, 'at_the_edge': False},
    'runs': [run(seed, loss) for seed, loss in enumerate(losses)],
  }  # fmt: skip
  task = lambda network, data, **contestants: {
    'task': {'network': network, 'data': data, 'every': 5, 'steps': 10},
    'contestants': contestants, 'cells': [], 'references': {},
  }  # fmt: skip
  muon = of(1.0, 1.2)
  tasks = {
    'a': task('mlp', 'digits', muon=muon, spectral_newton=of(0.7, 0.9), soap=of(1.5, 1.7)),
    'b': task('vit', 'fashion', muon=muon, spectral_newton=of(1.1, 1.3)),
  }
  figure = report.overview_figure(tasks)
  above, below = figure.axes[:2], figure.axes[2:]
  # In all columns one line a contestant: ours, Muon, SOAP.
  assert [label.get_text() for label in above[0].get_yticklabels()] == [
    'Spectral Newton', 'Muon', 'SOAP'
  ]  # fmt: skip
  for axes, points in zip(above, ([(-0.3, 0), (0, 1), (0.5, 2)], [(0.1, 0), (0, 1)]), strict=True):
    drawn = [tuple(bars.lines[0].get_xydata()[0]) for bars in axes.containers]
    np.testing.assert_allclose(drawn, points, atol=1e-12)
  for axes, loss in zip(below, (0.8, 1.2), strict=True):
    courses = {line.get_label(): line for line in axes.get_lines()}
    assert courses.keys() == {'Muon', 'Spectral Newton'}
    np.testing.assert_allclose(courses['Spectral Newton'].get_ydata(), [loss + 1, loss])
    np.testing.assert_array_equal(courses['Muon'].get_xdata(), [5, 10])


@pytest.mark.parametrize(
  ('kernel', 'stride', 'padding'), [(3, 1, 'SAME'), (3, 2, 'SAME'), (1, 2, 'SAME'), (4, 4, 'VALID')]
)
def test_a_convolution_is_a_product(convergence, kernel, stride, padding):
  rng = np.random.default_rng(0)
  x = jnp.float32(rng.standard_normal((2, 9, 8, 3)))
  w = jnp.float32(rng.standard_normal((2, kernel, kernel, 3, 5)))

  def gradients(convolution):
    def loss(w, x):
      y = convolution(x, w, (stride, stride), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
      return jnp.sum(jnp.sin(y)), y

    of_one = jax.grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(jax.vmap(of_one, in_axes=(0, None)))(w, x)

  ours = gradients(convergence._problems.convolution_by_product)
  theirs = gradients(jax.lax.conv_general_dilated)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)
  with pytest.raises(ValueError, match='Only plain convolutions'):
    convergence._problems.convolution_by_product(x, w[0], (1, 1), 'SAME', rhs_dilation=(2, 2))


def test_statistics(convergence):
  report = convergence._convergence_report
  mean, half = report.interval([1.0, 2.0, 3.0])
  assert mean == 2
  assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)  # t of two degrees, 97.5 %.
  # What all seeds share is not in a paired interval.
  mean, half, count = report.paired({0: 1.1, 1: 5.2, 2: 9.3}, {0: 1.0, 1: 5.0, 2: 9.0, 3: 2.0})
  assert (mean, count) == (pytest.approx(0.2), 3)
  assert half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
  assert math.isnan(report.interval([1.0])[1])
  curve = [3.0, 2.0, 1.0]
  assert report.steps_to(curve, 10, 1.5) == 25
  assert report.steps_to(curve, 10, 2.0) == 20
  assert report.steps_to(curve, 10, 3.5) == 10
  assert report.steps_to(curve, 10, 0.9) is None
  assert report.steps_to([None, None], 10, 0.9) is None


def test_best_rate_and_divergence(convergence):
  losses = {0.1: {200: 1.0, 201: 3.0}, 0.2: {200: 1.5, 201: 1.5}, 0.4: {200: math.inf, 201: 1.0},
            0.8: {200: 0.1}}  # fmt: skip
  best = convergence.best_rate(losses)
  assert best['rate'] == 0.2
  assert best['losses'] == {200: 1.5, 201: 1.5}
  assert not best['at_the_edge']
  assert set(best['by_rate']) == {0.1, 0.2, 0.4}  # One seed of two is not compared.
  run = lambda seed, loss: {
    'seed': seed, 'test_loss': loss, 'test_accuracy': 0.5, 'validation_loss': loss,
    'validation': [2.0, loss], 'train': [2.0, loss],
  }  # fmt: skip
  tuned = {'rate': 0.1, 'knob': None, 'at_the_edge': False}
  entry = lambda *runs: {'what': 'it', 'knob': '', 'tuned': tuned, 'runs': list(runs)}
  task = {
    'task': {'every': 10, 'steps': 20},
    'contestants': {
      'muon': entry(run(0, 1.0), run(1, 1.2)),
      'other': entry(run(0, 0.9), run(1, None)),
    },
  }
  rows = convergence._convergence_report.summary(task)
  assert list(rows) == ['muon', 'other']
  assert math.isinf(rows['other']['test_loss'][0])
  assert rows['other']['reached'] == 1
  # To 1.1 from 2.0 to 0.9 in the second ten steps; the diverged one counts in full.
  assert rows['other']['steps'] == pytest.approx((10 + 10 * 0.9 / 1.1 + 20) / 2)
  assert 'diverged' in convergence._convergence_report.contestants_table(task)


def test_more_images_or_fewer(convergence, tmp_path, capsys):
  problems = convergence._problems
  most, few = problems.load('digits'), problems.load('digits', images=100)
  assert len(most['train_x']) > 1000
  for part in ('x', 'y'):
    np.testing.assert_array_equal(few[f'train_{part}'], most[f'train_{part}'][:100])
    np.testing.assert_array_equal(few[f'validation_{part}'], most[f'validation_{part}'])
  np.savez(tmp_path / 'data.npz', **{f'fashion_{k}': v for k, v in most.items()})
  packed = problems.load('fashion', packed=tmp_path / 'data.npz', images=100)
  assert packed.keys() == few.keys()
  np.testing.assert_array_equal(packed['train_x'], few['train_x'])
  for source in ({'name': 'digits'}, {'name': 'fashion', 'packed': tmp_path / 'data.npz'}):
    with pytest.raises(ValueError, match=r'images to train on, not 60000\.'):
      problems.load(**source, images=60_000)
  args = convergence.parse(['--tasks', 'mlp-digits', '--images', '100', '--report'])
  (problem,) = convergence.load_problems(args)
  assert problem.samples(0).max() < 100
  assert convergence.title(problem, args) == 'mlp-digits, images 100'
  for name, count, message in (
    ('gpt-bytes', '100', 'gpt-bytes is not trained on images'),
    ('mlp-digits', '50', 'takes 64 images a step'),
  ):
    with pytest.raises(SystemExit):
      convergence.parse(['--tasks', name, '--images', count, '--report'])
    assert message in capsys.readouterr().err


def test_packed_data_is_the_same(convergence, tmp_path, monkeypatch):
  problems = convergence._problems
  images = {k: np.full((3, 2), i, np.uint8) for i, k in enumerate(('train_x', 'test_x'))}
  load = lambda name, folder=None: images if name == 'fashion' else {'train': np.arange(9)}
  with monkeypatch.context() as patch:
    patch.setattr(problems, 'load', load)
    assert problems.pack(tmp_path / 'data.npz') > 0
  found = problems.load('fashion', packed=tmp_path / 'data.npz')
  assert found.keys() == images.keys()
  np.testing.assert_array_equal(found['test_x'], images['test_x'])
  text = problems.load('bytes')
  assert sum(map(len, text.values())) == 2_000_000
  assert len(text['train']) > 10 * len(text['test'])
  np.testing.assert_array_equal(
    problems.load('bytes', packed=tmp_path / 'data.npz')['train'], np.arange(9)
  )


def test_command_line(convergence, capsys):
  assert convergence.main(['--list']) == {}
  assert 'spectral_newton: Spectral Newton, defaults' in capsys.readouterr().out
  for arguments, message in (
    (['--tasks', 'none'], "'none' is none of the tasks"),
    (['--contestants', 'none'], "'none' is none of the contestants"),
    (['--steps', '30'], 'multiple of 16'),
    (['--seeds', '100'], 'Seeds from 100 are for tuning'),
  ):
    with pytest.raises(SystemExit):
      convergence.main(arguments)
    assert message in capsys.readouterr().err


def test_what_fails_does_not_stop_the_others(small, tmp_path, monkeypatch, capsys):
  broken = small._contestants.Program(lambda problem, lane: 1 / 0)
  monkeypatch.setitem(small._contestants.PROGRAMS, 'adamw', broken)
  command = '--tasks mlp-digits --contestants adamw sgd --lanes 28 --quiet --seeds 0 --no-tables'
  command = f'{command} --work {tmp_path} --output {tmp_path / "c.json"}'
  content = small.main(command.split())
  assert len(content['failed']) == 1
  assert 'mlp-digits, adamw: ZeroDivisionError' in content['failed'][0]
  assert list(content['tasks']['mlp-digits']['contestants']) == ['sgd']
  assert 'Failed: mlp-digits, adamw' in capsys.readouterr().err
  # Nothing is begun when there is no time.
  monkeypatch.setattr(small.Runner, 'run', lambda *_, **__: pytest.fail('has begun'))
  small.main([*command.split(), '--budget', '0', '--seeds', '1', '--work', str(tmp_path / 'new')])
