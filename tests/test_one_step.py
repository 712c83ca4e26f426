"""The benchmark of what one step would do, at every exponent and turning point."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture
def one_step(load_benchmark):
  return load_benchmark('one_step')


@pytest.fixture
def problem(one_step, monkeypatch):
  """Digits, a network of a moment."""
  problems = one_step._problems
  small = one_step.dataclasses.replace(
    problems.TASKS['mlp-digits'], options={'width': 12, 'depth': 1}, steps=32, every=16
  )
  monkeypatch.setitem(problems.TASKS, 'mlp-digits', small)
  return problems.Problem(small, problems.load('digits'), together=True)


def test_slope_and_curvature_are_those_of_the_loss(one_step, problem):
  params, rest = problem.init(jnp.uint32(0))
  batch = one_step.held_out(problem, 64)
  rng = np.random.default_rng(0)
  momentum = {p: jnp.float32(rng.standard_normal(params[p].shape)) for p in problem.matrices}
  update = jax.jit(lambda m: one_step.updates_of(problem, m, 1.5, 0.03))(momentum)
  assert update.keys() == set(problem.matrices)
  for path in update:  # What the comparison trains with.
    assert np.sqrt(np.mean(np.square(update[path]))) == pytest.approx(0.2, rel=1e-5)
  slope, curvature = jax.jit(lambda update: one_step.along(problem, params, rest, batch, update))(
    update
  )

  def loss(step):
    moved = {p: x + step * update[p] if p in update else x for p, x in params.items()}
    return problem.loss(moved, rest, *batch)[0]

  first, second = jax.jit(lambda: (jax.grad(loss)(0.0), jax.grad(jax.grad(loss))(0.0)))()
  assert float(slope) == pytest.approx(float(first), rel=1e-4)
  assert float(curvature) == pytest.approx(float(second), rel=1e-4)


def test_gains_are_those_of_the_best_rate(one_step):
  """Against a search over rates; what does not descend, or is not bent upwards, has none."""
  rng = np.random.default_rng(0)
  found = {
    'slopes': rng.uniform(0.5, 1, (3, 2, 2)),
    'curvatures': rng.uniform(1, 9, (3, 2, 2)),
    'share': [0.3, 1.0, 0.5],
  }
  found['slopes'][:, 0, 1] *= -1
  found['curvatures'][:, 1, 1] *= -1
  gain, rate = one_step.gains(found)
  share = np.array(found['share'])[:, None]
  tried = np.linspace(0, 2, 20001)
  for at in ((0, 0), (1, 0)):
    d, q = (found[name][:, *at][:, None] for name in ('slopes', 'curvatures'))
    of_rate = np.sum(tried * share * d - (tried * share) ** 2 * q / 2, axis=0)
    assert gain[at] == pytest.approx(of_rate.max(), rel=1e-6)
    assert rate[at] == pytest.approx(tried[of_rate.argmax()], abs=1e-4)
  assert np.isnan([gain[0, 1], gain[1, 1], rate[0, 1], rate[1, 1]]).all()


def test_compared_with_what_was_trained(one_step):
  found = {
    'alphas': [1.0, 1.5, 2.0],
    'turns': [0.03],
    'share': [1.0],
    'slopes': [[[0.1], [0.2], [0.3]]],
    'curvatures': [[[1.0], [1.0], [1.0]]],
  }
  cell = lambda alpha, loss, rate: {
    'alpha': alpha, 'turn': 0.03, 'losses': {'0': loss - 1, '1': loss + 1}, 'rate': rate,
  }  # fmt: skip
  cells = [cell(1.0, 3.0, 0.2), cell(1.5, 1.0, 0.4), cell(2.0, 2.0, 0.6), cell(9.0, 0.0, 1.0)]
  said = one_step.compare(found, cells)
  assert 'Of 3 cells' in said
  assert 'best by one step (2, 0.03), loss 2.0000; by training (1.5, 0.03), loss 1.0000' in said
  assert 'gains and losses 0.50, of rates 1.00' in said
  assert 'wanted are 0.50 of those tuned, times or by 1.00.' in said
  assert one_step.compare(found, cells[:2]) == ''
  # One rate for all has no ranks.
  alike = [{**c, 'rate': 0.4} for c in cells]
  assert 'gains and losses 0.50, of rates nan' in one_step.compare(found, alike)


def test_what_was_trained_is_that_of_the_title(one_step):
  cells = one_step.trained_cells
  assert {c['momentum'] for c in cells('gpt-bytes, momentum 0.95')} == {0.95}
  assert {c['momentum'] for c in cells('gpt-bytes')} == {0.9}
  assert all('turn' in c for c in cells('gpt-bytes, batch_size 4'))
  assert len(cells('gpt-bytes, batch_size 4')) == 9
  assert cells('gpt-bytes, batch_size 5') == []


@pytest.mark.usefixtures('problem')
def test_a_run_leaves_what_it_says_beside_what_is_there(one_step, tmp_path, capsys):
  output = tmp_path / 'new' / 'one_step.json'
  command = '--tasks mlp-digits --points 2 --samples 32 --alphas 1 2 --turns 0.03 --quiet'
  command = [*command.split(), '--output', str(output)]
  one_step.main(command)
  one_step.main([*command, '--batch-size', '8', '--rate', '0.1', '--momentum', '0.8'])
  capsys.readouterr()
  content = one_step.main(['--report', '--output', str(output)])
  assert content == json.loads(output.read_text())
  names = ['mlp-digits', 'mlp-digits, batch_size 8, momentum 0.8']
  assert list(content) == names
  first, second = content.values()
  assert first['rate'] == one_step.tuned_rate('mlp-digits')
  assert (second['rate'], second['momentum']) == (0.1, 0.8)
  for found in content.values():
    assert found['points'] == [8, 24]
    assert np.shape(found['slopes']) == np.shape(found['curvatures']) == (2, 2, 1)
    # The cosine's share of the peak, after one step of warm-up.
    exact = 0.5 + 0.5 * np.cos(np.pi * np.array([8, 24]) / 31)
    np.testing.assert_allclose(found['share'], exact, rtol=1e-5)
  assert first['slopes'] != second['slopes']
  printed = capsys.readouterr().out
  for name in names:
    assert f'**{name}**, trained at a rate of {content[name]["rate"]:.3g}' in printed
  assert '| α \\ σ* | 0.03 |' in printed


@pytest.mark.parametrize(
  ('words', 'message'),
  [(['--tasks', 'cifar'], "'cifar' is none of the tasks"), (['--rate', 'x'], 'invalid float')],
)
def test_a_bad_command_line_says_what_is_wrong(one_step, capsys, words, message):
  with pytest.raises(SystemExit):
    one_step.main(words)
  assert message in capsys.readouterr().err
