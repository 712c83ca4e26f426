"""Products counted in bfloat16 passes: as by hand. And what is read out of a TPU's program."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import optax
import pytest

import spectral_optax

N = 8
DOT = 2 * N**3


@pytest.fixture
def passes(load_benchmark):
  return load_benchmark('_passes')


@pytest.fixture
def tpu_compile(load_benchmark):
  return load_benchmark('tpu_compile')


def square(dtype='float32'):
  return jax.ShapeDtypeStruct((N, N), dtype)


def highest(a, b):
  return jnp.matmul(a, b, precision='highest')


@pytest.mark.parametrize(
  ('dtypes', 'precision', 'expected'),
  [
    (('float32', 'float32'), None, 1),
    (('float32', 'float32'), 'default', 1),
    (('float32', 'float32'), 'high', 3),
    (('float32', 'float32'), 'highest', 6),
    (('float32', 'float32'), ('default', 'highest'), 6),
    (('float32', 'float32'), 'BF16_BF16_F32', 1),
    (('float32', 'float32'), 'BF16_BF16_F32_X3', 3),
    (('float32', 'float32'), 'BF16_BF16_F32_X6', 6),
    (('float32', 'float32'), 'BF16_BF16_F32_X9', 9),
    (('float32', 'float32'), 'F32_F32_F32', 6),
    (('bfloat16', 'bfloat16'), None, 1),
    (('bfloat16', 'bfloat16'), 'highest', 1),
    (('bfloat16', 'float32'), None, 1),
    (('bfloat16', 'float32'), 'highest', 3),
  ],
)
def test_passes_of_one_product(passes, dtypes, precision, expected):
  def product(a, b):
    kind = jnp.float32  # Which decides nothing.
    return jax.lax.dot(a, b, precision=precision, preferred_element_type=kind)

  found = passes.count(product, *map(square, dtypes))
  assert found.flops == DOT
  assert found.pass_flops == expected * DOT
  (one,) = found.products
  assert (one.batch, one.m, one.n, one.k, one.times) == (1, N, N, N, 1)
  assert one.where.endswith('product')


def test_the_context_decides_where_nothing_is_said(passes):
  with jax.default_matmul_precision('highest'):
    assert passes.count(lambda a: a @ a, square()).pass_flops == 6 * DOT
  assert passes.count(lambda a: a @ a, square()).pass_flops == DOT


def test_shapes(passes):
  a, b = jnp.ones((5, 2, 3)), jnp.ones((5, 3, 4))
  (one,) = passes.count(jnp.matmul, a, b).products
  assert (one.batch, one.m, one.n, one.k) == (5, 2, 4, 3)
  assert one.flops == 2 * 5 * 2 * 3 * 4
  assert passes.count(jnp.dot, jnp.ones(7), jnp.ones(7)).flops == 2 * 7
  assert passes.count(jnp.matmul, jnp.ones((0, 3)), jnp.ones((3, 4))).flops == 0

  image, kernel = jnp.ones((2, 10, 10, 6)), jnp.ones((3, 3, 6, 4))
  convolve = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=(1, 1),
    padding='VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    precision='high',
  )
  found = passes.count(convolve, image, kernel)
  assert found.flops == 2 * (2 * 8 * 8 * 4) * (3 * 3 * 6)
  assert found.pass_flops == 3 * found.flops
  # Each of the channels sees two of them only.
  grouped = functools.partial(convolve, feature_group_count=3)
  found = passes.count(grouped, image, jnp.ones((3, 3, 2, 6)))
  assert found.flops == 2 * (2 * 8 * 8 * 6) * (3 * 3 * 2)


def test_complex_is_not_guessed(passes):
  with pytest.raises(NotImplementedError, match='complex'):
    passes.count(jnp.matmul, square('complex64'), square('complex64'))


@pytest.mark.parametrize('unroll', [False, True])
def test_static_loop(passes, unroll):
  def loop(a):
    return jax.lax.fori_loop(0, 5, lambda _, x: highest(x, a), a, unroll=unroll)

  found = passes.count(loop, square())
  assert found.flops == 5 * DOT
  assert found.pass_flops == 5 * 6 * DOT
  assert found.open_loops == 0


def test_loops_in_loops(passes):
  def loop(a):
    inner = lambda x, _: (jax.jit(highest)(x, a), None)
    return jax.lax.fori_loop(2, 5, lambda _, x: jax.lax.scan(inner, x, length=4)[0] @ a, a)

  found = passes.count(jax.jit(loop), square())
  assert found.pass_flops == 3 * (4 * 6 + 1) * DOT


def test_while_with_known_bounds(passes):
  def upto(n, step=1):
    body = lambda c: (c[0] + step, c[1] @ c[1])
    return lambda a: jax.lax.while_loop(lambda c: c[0] < n, body, (0, a))[1]

  assert passes.count(upto(7), square()).flops == 7 * DOT
  assert passes.count(upto(7, 2), square()).flops == 4 * DOT
  assert passes.count(upto(0), square()).flops == 0
  # As an array, the bound is carried along.
  bound = lambda a: jax.lax.fori_loop(0, jnp.int32(5), lambda _, x: x @ a, a)
  found = passes.count(jax.jit(bound), square())
  assert (found.flops, found.open_loops) == (5 * DOT, 0)


def test_while_with_bounds_in_the_data(passes):
  traced = lambda a, n: jax.lax.fori_loop(0, n, lambda _, x: x @ a, a)
  found = passes.count(traced, square(), jax.ShapeDtypeStruct((), jnp.int32))
  assert (found.flops, found.open_loops) == (DOT, 1)

  def converge(a):
    return jax.lax.while_loop(lambda x: jnp.max(x @ x) > 1, lambda x: x / 2, a)

  # The condition is looked at once more than there are rounds.
  found = passes.count(converge, square())
  assert (found.flops, found.open_loops) == (2 * DOT, 1)


def test_what_is_rarely_done_is_not_counted(passes):
  def halve(a):
    return jax.lax.while_loop(lambda x: jnp.max(x) > 1, lambda x: x @ x, a)

  def rarely(a):
    with jax.named_scope(passes.RARELY):
      return halve(a)

  assert passes.count(halve, square()).open_loops == 1
  found = passes.count(jax.jit(rarely), square())
  assert (found.flops, found.open_loops) == (0, 0)

  # An update is what it always does: G with itself, and with f.
  apply = functools.partial(
    spectral_optax.apply_transfer, alpha=1.5, solver='polynomial', tolerance=0.01
  )
  usual, worst = (
    passes.count(apply, jax.ShapeDtypeStruct((90, 8), jnp.float32), branch=branch)
    for branch in (min, max)
  )
  assert usual.flops == worst.flops
  assert not worst.open_loops
  with_g = [x for x in usual.products if 90 in (x.m, x.n, x.k)]
  assert sum(x.times for x in with_g) == 2


def test_branches_of_the_platform(passes):
  def choose(a, **branches):
    return jax.lax.platform_dependent(a, **branches)

  thrice = lambda x: x @ x @ x @ x
  for branches, expected in (
    ({'cpu': thrice, 'tpu': lambda x: highest(x, x), 'default': lambda x: x}, 6),
    ({'cpu': lambda x: highest(x, x), 'default': thrice}, 3),
    ({'tpu': thrice, 'default': lambda x: jnp.linalg.eigh(highest(x, x))[1]}, 3),
  ):
    found = passes.count(jax.jit(functools.partial(choose, **branches)), square())
    assert found.pass_flops == expected * DOT
    assert not found.opaque
  assert passes.count(functools.partial(choose, **branches), square(), platform='cpu').opaque


def test_branches_of_the_data(passes):
  def choose(a):
    return jax.lax.cond(a[0, 0] > 0, lambda x: x @ x @ x, lambda x: highest(x, x), a)

  assert passes.count(choose, square()).pass_flops == 6 * DOT
  assert passes.count(choose, square(), branch=min).pass_flops == 2 * DOT


def test_programs_in_programs(passes):
  @jax.custom_jvp
  def custom(x):
    return x @ x

  custom.defjvps(lambda t, _, x: x @ t @ x @ x)

  @jax.custom_vjp
  def backward(x):
    return x @ x

  backward.defvjp(lambda x: (x @ x @ x, x), lambda x, g: (g @ x,))

  def solve(a):
    # What is solved is a description; what solves it runs.
    return jax.lax.custom_linear_solve(
      lambda x: a @ x @ a, a, lambda _, b: highest(a, b), symmetric=True
    )

  for function, expected in (
    (custom, 1),
    (backward, 1),
    (jax.checkpoint(lambda x: x @ x), 1),
    (jax.custom_batching.sequential_vmap(lambda x: x @ x), 1),
    (jax.jit(lambda x: jax.jit(custom)(jax.jit(backward)(x))), 2),
    (solve, 6),
  ):
    found = passes.count(function, square())
    assert found.pass_flops == expected * DOT


def test_decompositions_are_named_not_counted(passes):
  def decompose(a):
    a = jax.lax.fori_loop(0, 3, lambda _, x: jnp.linalg.eigh(x, symmetrize_input=False)[1], a)
    return jax.lax.linalg.cholesky(a, symmetrize_input=False)

  found = passes.count(decompose, square())
  assert dict(found.opaque) == {'eigh': 3, 'cholesky': 1}
  assert found.flops == 0


def test_where(passes):
  def first(a):
    return jnp.matmul(a, a)

  def second(a):
    return jnp.matmul(a, a, precision=None)

  # jnp's functions are traced once and would remember `first` for both.
  found = passes.count(lambda a: (first(a), second(a), second(a)), square())
  assert [p.where.split('/')[-1] for p in found.products] == ['first', 'second', 'second']
  assert sorted(found.parts().values()) == [DOT, 2 * DOT]
  assert sum(found.parts().values()) == found.pass_flops


def test_newton_schulz_of_muon(passes):
  params = {'w': square()}
  optimizer = optax.contrib.muon(1e-3)
  state = jax.eval_shape(optimizer.init, params)
  found = passes.count(optimizer.update, params, state, params)
  # A = X Xᵀ, A², and one more with X: five times, at default precision.
  assert found.flops == found.pass_flops == 5 * 3 * 2 * N**3
  assert (found.open_loops, found.opaque) == (0, {})


HLO = """HloModule jit_step, is_scheduled=true

%fused (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %convolution.1 = f32[8,8]{1,0} convolution(%p, %p), dim_labels=bf_io->bf
}

%body (t: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %t = (s32[]{:T(128)}, f32[8,8]{1,0}) parameter(0)
  %fusion.1 = f32[8,8]{1,0} fusion(%t), calls=%fused, backend_config={"estimated_cycles":"100"}
  ROOT %tuple = (s32[]{:T(128)}, f32[8,8]{1,0}) tuple(%t, %fusion.1)
}

%condition (t.1: (s32[], f32[8,8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(5)
  %t.1 = (s32[]{:T(128)}, f32[8,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  ROOT %lt.0 = pred[]{:T(512)} compare(%i, %constant.3), direction=LT
}

%until (t.2: (s32[], f32[8,8])) -> pred[] {
  %t.2 = (s32[]{:T(128)}, f32[8,8]{1,0}) parameter(0)
  ROOT %found = pred[]{:T(512)} custom-call(%t.2), custom_call_target="Found"
}

%cheap (q: f32[8,8]) -> f32[8,8] {
  ROOT %copy = f32[8,8]{1,0} copy(%q), backend_config={"estimated_cycles":"1"}
}

%dear (r: f32[8,8]) -> f32[8,8] {
  ROOT %copy.1 = f32[8,8]{1,0} copy(%r), backend_config={"estimated_cycles":"1000"}
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0), metadata={op_name="qr_of_nothing"}
  %while = (s32[], f32[8,8]{1,0}) while(%x), condition=%condition, body=%body
  %while.1 = (s32[], f32[8,8]{1,0}) while(%while), condition=%until, body=%body
  %c = f32[8,8]{1,0} conditional(%x, %x, %x), branch_computations={%cheap, %dear}
  %d = f32[8,8]{1,0} conditional(%x), true_computation=%cheap, false_computation=%dear
  %eigh.1 = f32[8,8]{1,0} custom-call(%c), custom_call_target="EighTpu", \
metadata={op_name="jit(step)/eigh"}
  ROOT %mul = f32[8,8]{1,0} multiply(%d, %eigh.1), metadata={op_name="jit(step)/jit(qr)/mul"}
}
"""


def test_a_compiled_program_is_read(tpu_compile):
  program = tpu_compile.read_program(HLO)
  assert program.loops == 2
  assert program.open_loops == 1
  assert program.custom_calls == {'Found': 1, 'EighTpu': 1}
  assert program.decompositions == {'eigh': 1, 'qr': 1}
  assert program.cycles == 5 * 100 + 100 + 1 + 1
  assert program.instructions == 20


def test_without_libtpu_it_says_so(tpu_compile, monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(SystemExit):
    tpu_compile.main(['--quiet'])
  (line,) = capsys.readouterr().err.splitlines()
  assert "pip install 'jax[tpu]'" in line


def test_slow_solvers_are_asked_for(tpu_compile):
  usual = tpu_compile.chosen_contestants([])
  assert {'muon', 'muon_aol', 'defaults', 'constant', 'rational alpha=1.2'} <= usual.keys()
  assert not any(name.startswith(tpu_compile.SLOW_TO_COMPILE) for name in usual)
  assert tpu_compile.chosen_contestants(['gram alpha=2']).keys() == {'muon', 'gram alpha=2'}
  assert tpu_compile.chosen_sets([]).keys() == {'resnet18', 'gpt2_12'}
  assert len(tpu_compile.parameters_of(tpu_compile.SETS['gpt2_12']())) == 12


def test_counting_compiles_nothing(tpu_compile, capsys, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)  # No libtpu either.
  counts = tpu_compile.main(['--count', '--sets', 'tiny', '--contestants', 'rational alpha=2'])
  muon = sum(5 * (4 * m * n * n + 2 * n**3) for m, n in ((27, 8), (16, 8), (24, 8)))
  assert counts['tiny']['muon'] == muon
  # GᵀG in one pass, and G f in two: f has sixteen bits.
  assert counts['tiny']['rational alpha=2'] > sum(3 * 2 * m * 64 for m in (27, 16, 24))
  assert 'rational alpha=2' in capsys.readouterr().out


def test_auto_is_what_a_tpu_would_take(tpu_compile, monkeypatch):
  solvers, exponents = tpu_compile.solvers, tpu_compile.spectral_optax.exponents
  for n in (8, 64, 512, 768, 2048):
    noise = exponents.noise_turn(n).damping(1.5)
    for alpha, damping in ((2.0, 0.1), (1.5, 0.008), (1.5, noise), (1.2, 0.02), (0.85, 0.08)):
      chosen = solvers.choose_solver('auto', alpha, damping, n, backend='tpu')
      assert chosen == tpu_compile.AUTO
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  counts = tpu_compile.main(
    ['--count', '--sets', 'tiny', '--contestants', 'auto alpha=2', 'polynomial alpha=2', 'rational']
  )['tiny']
  assert counts['auto alpha=2'] == counts['polynomial alpha=2'] != counts['rational alpha=2']


def test_noise_is_worked_on_in_bfloat16_too(tpu_compile, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  chosen = ['constant', 'defaults']
  counts = tpu_compile.main(['--count', '--sets', 'tiny', '--contestants', *chosen])
  # One more Gram matrix, and a few more steps to a turning point at a quarter of the constant one.
  assert 1.1 < counts['tiny']['defaults'] / counts['tiny']['constant'] < 1.6
