"""What is said of pods: counted as by hand, and the model as what was compiled."""

import argparse
import importlib
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'


@pytest.fixture
def pod_compile(load_benchmark):
  return load_benchmark('pod_compile')


# ---------------------------------------------------------------------------------
# Products of a program
# ---------------------------------------------------------------------------------

ARRAYS = """
  %a = f32[8,32]{1,0} parameter(0)
  %b = f32[32,16]{1,0} parameter(1)
  %c = bf16[3,8,32]{2,1,0} parameter(2)
  %d = bf16[3,32,16]{2,1,0} parameter(3)
  %x = f32[2,9,7,4]{3,2,1,0} parameter(4)
  %k = f32[3,5,4,6]{3,2,1,0} parameter(5)
  %g = f32[3,5,2,6]{3,2,1,0} parameter(6)
"""
DOT = 'f32[8,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}'
OF_A_DOT = 2 * 8 * 16 * 32
COMPUTATIONS = f"""
%one (p: f32[8]) -> f32[8,16] {{{ARRAYS}
  ROOT %r = {DOT}
}}

%two (p: f32[8]) -> f32[8,16] {{{ARRAYS}
  %q = {DOT}
  ROOT %r = {DOT}, metadata={{op_name="dot(a, b)"}}
}}

%none (p: f32[8]) -> f32[8,16] {{{ARRAYS}
  ROOT %r = f32[8,16]{{1,0}} add(%q, %q)
}}

%fewer (p: s32[]) -> pred[] {{
  %seven = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %seven), direction=LT
}}

%twice (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %w = (s32[], f32[8]) while(%t), condition=%until, body=%two, {{"known_trip_count":{{"n":"3"}}}}
}}
"""


@pytest.mark.parametrize(
  ('line', 'products'),
  [
    ('f32[8,16]{1,0} add(%q, %q)', 0),
    (DOT, OF_A_DOT),
    (
      'bf16[3,8,16]{2,1,0} dot(bf16[3,8,32]{2,1,0} %c, bf16[3,32,16]{2,1,0} %d),'
      ' lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}',
      3 * OF_A_DOT,
    ),
    # Two sums at once: |a|².
    ('f32[] dot(%a, %a), lhs_contracting_dims={0,1}, rhs_contracting_dims={0,1}', 2 * 8 * 32),
    (
      'f32[2,9,7,6]{3,2,1,0} convolution(%x, %k), window={size=3x5 pad=1_1x2_2},'
      ' dim_labels=b01f_01io->b01f',
      2 * (2 * 9 * 7 * 6) * (3 * 5 * 4),
    ),
    # Two groups: an output feature sees two of four.
    (
      'f32[2,9,7,6]{3,2,1,0} convolution(%x, %g), window={size=3x5 pad=1_1x2_2},'
      ' dim_labels=b01f_01io->b01f, feature_group_count=2',
      2 * (2 * 9 * 7 * 6) * (3 * 5 * 2),
    ),
    # The products of a TPU: of two matrices, and of a batch of them.
    ('f32[8,16]{1,0} convolution(%a, %b), dim_labels=bf_io->bf', OF_A_DOT),
    (
      'bf16[3,8,16]{2,1,0} convolution(%c, %d), window={size=3 stride=2 pad=0_0 lhs_dilate=3},'
      ' dim_labels=0bf_0io->0bf, backend_config={}',
      3 * OF_A_DOT,
    ),
    ('f32[8,16]{1,0} call(%a, %b), to_apply=%two', 2 * OF_A_DOT),
    ('f32[8,16]{1,0} fusion(%a, %b), kind=kOutput, calls=%one', OF_A_DOT),
    ('(s32[]) while(%t), condition=%u, body=%one, {"known_trip_count":{"n":"5"}}', 5 * OF_A_DOT),
    ('(s32[]) while(%t), condition=%fewer, body=%two', 7 * 2 * OF_A_DOT),
    (
      '(s32[]) while(%t), condition=%u, body=%twice, {"known_trip_count":{"n":"5"}}',
      5 * 3 * 2 * OF_A_DOT,
    ),
    ('f32[8] conditional(%i, %a, %a), branch_computations={%two, %one}', OF_A_DOT),
    ('f32[8] conditional(%i, %a, %a), branch_computations={%two, %none, %one}', 0),
    ('f32[8] conditional(%i, %a, %a), true_computation=%one, false_computation=%two', OF_A_DOT),
  ],
)
def test_products_of_a_program(pod_compile, line, products):
  program = f'HloModule m\n{COMPUTATIONS}\nENTRY %main (p: f32[8]) -> f32[8] {{{ARRAYS}'
  assert pod_compile.flops_of_products(f'{program}  ROOT %out = {line}\n}}\n') == products
  # And what is in one line more is one more.
  assert pod_compile.flops_of_products(f'{program}  %e = {DOT}\n  ROOT %out = {line}\n}}\n') == (
    products + OF_A_DOT
  )


def test_products_of_what_is_compiled_here(pod_compile):
  w = jnp.ones((3, 16, 16))

  def function(x, w, flag):
    x, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, length=6)  # Of (3, 8, 16).
    x = jax.lax.cond(flag, lambda x: x @ w, lambda x: x @ w @ w + x, x)
    return jnp.einsum('kab,kcb->ac', x, x)

  hlo = jax.jit(function).lower(jnp.ones((3, 8, 16)), w, True).compile().as_text()
  in_the_end = 2 * 8 * 8 * (3 * 16)
  assert pod_compile.flops_of_products(hlo) == (6 + 1) * 2 * (3 * 8 * 16) * 16 + in_the_end


# ---------------------------------------------------------------------------------
# The benchmarks, small
# ---------------------------------------------------------------------------------


def test_pod(pod_compile, monkeypatch, tmp_path, capsys):
  find_spec, version = pod_compile.importlib.util.find_spec, importlib.metadata.version
  there = lambda name, *of: object() if name == 'libtpu' else find_spec(name, *of)
  monkeypatch.setattr(pod_compile.importlib.util, 'find_spec', there)
  of_libtpu = lambda name: '0.0' if name == 'libtpu' else version(name)
  monkeypatch.setattr(pod_compile.importlib.metadata, 'version', of_libtpu)
  topology = types.SimpleNamespace(devices=jax.devices()[:4])
  monkeypatch.setattr(pod_compile.topologies, 'get_topology_desc', lambda **_: topology)

  output = tmp_path / 'new' / 'pod.json'
  flags = ['--size', 'tiny', '--mesh', '2', '2', '--markdown', '--output', str(output)]
  chosen = ['muon', 'spectral_newton', 'constant']
  pod_compile.main([*flags, '--optimizer-only', '--contestants', *chosen])
  key = f'tiny/v5e:4x4/2x2/jax-{jax.__version__}'
  (record,) = json.loads(output.read_text()).values()
  of = record['contestants']
  assert of.keys() == {
    *('muon', 'spectral_newton'),
    *('constant damping', 'constant damping, left to XLA'),
  }
  assert record['mesh'] == {'fsdp': 2, 'tp': 2}
  assert record['environment']['libtpu'] == '0.0'
  assert record['tokens'] == 2 * 64
  # Blocks of 12 d² + 13 d, embeddings of words and places, and the last norm.
  assert record['parameters'] == 2 * (12 * 128**2 + 13 * 128) + (512 + 64 + 2) * 128

  own = {name: row['optimizer'] for name, row in of.items()}
  sent = {name: sum(figures['bytes_sent'].values()) for name, figures in own.items()}
  # Two blocks, five iterations, X X', its square and a product with X: divided evenly.
  ratios = (3, 1, 4, 4)
  even = 2 * 5 * sum(2 * r + 1 for r in ratios) / 4
  assert own['muon']['flops'] == even * 2 * 128**3
  ours = 'constant damping'
  assert own[ours]['flops'] < 0.6 * own['muon']['flops']
  # The noise's Gram matrices, and steps to a smaller turn; the noise goes where G goes.
  assert own[ours]['flops'] < own['spectral_newton']['flops'] < 0.75 * own['muon']['flops']
  assert sent[ours] < sent['spectral_newton'] < 1.6 * sent[ours]
  # In so small a case XLA divides it as well by itself, but sends it to and fro.
  left = 'constant damping, left to XLA'
  assert own[left]['flops'] > 0.99 * own[ours]['flops']
  assert sent[left] > 4 * sent[ours]
  # Every matrix there and back, and its Gram matrix, are less than twice the parameters.
  assert 0 < sent[ours] < 2 * 4 * record['parameters']
  for name, row in of.items():
    assert row['FLOPs x muon'] == pytest.approx(own[name]['flops'] / own['muon']['flops'], rel=1e-5)
    assert row['bytes x muon'] == pytest.approx(sent[name] / sent['muon'], rel=1e-5)
    assert 'step' not in row
  assert_shown(record, capsys.readouterr().out)

  # Another one joins them, with its whole step.
  pod_compile.main([*flags, '--contestants', 'adamw'])
  content = json.loads(output.read_text())
  assert content.keys() == {key}
  joined = dict(content[key]['contestants'])
  adamw = joined.pop('adamw')
  assert joined == of
  assert adamw['optimizer']['flops'] == adamw['FLOPs x muon'] == 0
  # Of every product of the network one forwards, one once more for `remat` (in the blocks),
  # two backwards; attention's are those of rows with rows.
  blocks, words = 2 * 12 * 128**2, 512 * 128
  attention = 2 * 2 * 64 * 128
  step = 2 * record['tokens'] * (4 * (blocks + attention) + 3 * words) / 4
  assert adamw['step']['flops'] == pytest.approx(step, rel=0.01)
  assert_shown(content[key], capsys.readouterr().out)


def assert_shown(record, printed):
  """The Markdown table has the record's figures."""
  lines = [line[2:-2].split(' | ') for line in printed.splitlines() if line[:2] == '| ']
  heading, _, *rows = lines
  assert [row[0] for row in rows] == list(record['contestants'])
  for (name, row), cells in zip(record['contestants'].items(), rows, strict=True):
    assert len(cells) == len(heading), name
    own, sent = row['optimizer'], row['optimizer']['bytes_sent']
    whole = row.get('step')
    assert cells[1:] == [
      f'{whole["compile_seconds"]:.0f}' if whole else '',
      f'{own["compile_seconds"]:.0f}',
      f'{own["flops"] / 1e9:.1f}',
      f'{row["FLOPs x muon"]:.2f}',
      f'{sum(sent.values()) / 1e6:.1f}',
      f'{row["bytes x muon"]:.2f}',
      f'{row["share of FLOPs at 1 M tokens"]:.2%}' if whole else '',
      f'{(whole or own)["temp_bytes"] / 1e6:.0f}',
      ', '.join(f'{kind} {n / 1e6:.1f}' for kind, n in sent.items()),
    ], name


def test_share_of_a_step(pod_compile, monkeypatch, tmp_path):
  figures = iter([
    pod_compile.Figures(1.0, 300, 0.0, {'all-reduce': 5}, 1, 2, 3),  # Of the update,
    pod_compile.Figures(1.0, 700, 0.0, {'all-reduce': 9}, 1, 2, 3),  # and of the step.
  ])  # fmt: skip
  monkeypatch.setattr(pod_compile, 'compiled_figures', lambda *_, **__: next(figures))
  topology = types.SimpleNamespace(devices=jax.devices()[:4])
  monkeypatch.setattr(pod_compile.topologies, 'get_topology_desc', lambda **_: topology)
  args = argparse.Namespace(
    size='tiny', mesh=(2, 2), rows=8, contestants=['muon'], optimizer_only=False, dump=None
  )
  record = {}
  assert list(pod_compile.measure('v5e:4x4', args, record)) == ['muon', 'ratios']
  # 2 · 8 rows of 64 are 2^10 tokens: of 2^20, the rest of the step is 2^10 times as much.
  share = 300 / (300 + 400 * 2**10)
  assert record['contestants']['muon']['share of FLOPs at 1 M tokens'] == pytest.approx(share)


def test_pod_without_its_compiler(pod_compile, monkeypatch, capsys):
  monkeypatch.setattr(pod_compile.importlib.util, 'find_spec', lambda _: None)
  with pytest.raises(SystemExit) as stopped:
    pod_compile.main([])
  assert stopped.value.code == 1
  assert "pip install 'jax[tpu]'" in capsys.readouterr().err


def test_one_device_among_others(load_benchmark, monkeypatch, tmp_path, capsys):
  scaling = load_benchmark('scaling')
  asked, update = [], jax.config.update

  def watched(name, value):  # There are four devices already.
    asked.append(value) if name == 'jax_num_cpu_devices' else update(name, value)

  monkeypatch.setattr(scaling.jax.config, 'update', watched)
  output = tmp_path / 'new' / 'scaling.json'
  flags = '--devices 1 4 --width 32 --blocks 2 --rounds 2'
  returned = scaling.main([*flags.split(), '--output', str(output)])
  assert asked == [4]
  content = json.loads(output.read_text())
  assert content.keys() == returned.keys()
  assert content['settings'] == {'width': 32, 'blocks': 2, 'solver': 'polynomial', 'rounds': 2}
  alone, four = content['devices']
  assert (alone['devices'], four['devices']) == (1, 4)
  assert four['flops'] <= 1.3 / 4 * alone['flops']
  assert alone['bytes_sent'] == {}
  assert sum(four['bytes_sent'].values()) > 0
  for of in content['devices']:
    assert of['parameter_bytes'] == 4 * 2 * 12 * 32**2
    assert len(of['seconds']) == 2
    # Momentum in parts; and what is known of each of eight spectra, on every device.
    known = of['state_bytes'] - of['parameter_bytes'] / of['devices']
    assert 0 < known <= 8 * 4 * (32 + 8)
  printed = capsys.readouterr().out
  assert f'| 4 | {four["flops"] / 1e9:.3f} | {four["flops"] / alone["flops"]:.3f} |' in printed


# ---------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------

MIB = 2**20  # And a matrix of 1024 x 1024 has four.


@pytest.mark.parametrize(
  ('mesh', 'deal', 'in_f', 'in_g', 'mib'),
  [
    # 24 layers over 16 devices, two of each kind; 96 Gram matrices over 16, six of f.
    # To and fro, of Σr = 12 each.
    ((4, 4), 16, 6, 2 * 12, 2 * (2 * 12 * 4) * 15 / 16),
    # Over 8, three of each kind, in halves; of twelve Gram matrices six each.
    ((8, 2), 8, 6, 3 * 12 / 2, 2 * (3 * 12 * 4 / 2) * 7 / 8 + 2 * (12 * 4) / 2),
    # One of each kind in 16 parts; four Gram matrices are too few for 16.
    ((512, 16), 512, 4, 12 / 16, 2 * (12 * 4 / 16) * 511 / 512 + 2 * (4 * 4) * 15 / 16),
  ],
)
def test_model_by_hand(load_benchmark, mesh, deal, in_f, in_g, mib):
  model = load_benchmark('scaling_model')
  found = model.predict(*mesh)
  devices, product = mesh[0] * mesh[1], 2 * 1024**3
  assert (found['deal'], found['split']) == (deal, devices // deal)
  assert found['flops'] == pytest.approx(product * (model.F_PRODUCTS * in_f + 3 * in_g))
  assert found['bytes'] == pytest.approx(mib * MIB)
  assert found['muon'] == pytest.approx(product * 24 * 5 * (4 + 2 * 12) / devices)
  assert found['model'] == pytest.approx(6 * 354.9e6 * 2**20 / devices)


def test_model_is_as_was_compiled(load_benchmark):
  model = load_benchmark('scaling_model')
  compiled = json.loads((BENCHMARKS / 'results' / 'pod_compile.json').read_text())
  compared = set()
  for key, record in compiled.items():
    if record['size']['width'] == model.WIDTH and 'constant damping' in record['contestants']:
      own = record['contestants']['constant damping']['optimizer']
      found = model.predict(**record['mesh'])
      assert own['flops'] == pytest.approx(found['flops'], rel=1e-3), key
      # Of what is known of spectra, and of AdamW's share, the model says nothing.
      assert sum(own['bytes_sent'].values()) == pytest.approx(found['bytes'], rel=0.15), key
      compared.add(tuple(record['mesh'].values()))
  assert len(compared) >= 3


def test_page_has_the_table_of_the_model(load_benchmark, capsys):
  load_benchmark('scaling_model').main()
  assert capsys.readouterr().out in (BENCHMARKS / 'SCALING.md').read_text('utf-8')
