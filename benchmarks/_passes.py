"""How much a TPU multiplies: FLOPs of a program, counted in bfloat16 passes.

    count(step, grads, state, params).pass_flops

A TPU multiplies bfloat16. A float32 product at precision "highest" is six such products
("high": three, the default: one), so that FLOPs alone say little. Counted are products and
convolutions, as they are written: before XLA finds two that are the same.
"""

import collections
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core
from jax.lax import DotAlgorithmPreset, Precision

from spectral_optax.solvers._products import RARELY

PASSES: dict[Any, int] = {Precision.DEFAULT: 1, Precision.HIGH: 3, Precision.HIGHEST: 6}
# With one operand in bfloat16 there is nothing to split in that one.
MIXED_PASSES = {1: 1, 3: 2, 6: 3}
# By name: not every version of JAX has all of them.
PRESET_PASSES = {
  'BF16_BF16_F32': 1,
  'BF16_BF16_F32_X3': 3,
  'BF16_BF16_F32_X6': 6,
  'BF16_BF16_F32_X9': 9,
  'F32_F32_F32': 6,
}
# Products inside of these are the compiler's, and nothing that a jaxpr shows.
OPAQUE = frozenset(
  {
    *('cholesky', 'cholesky_update', 'symmetric_product', 'triangular_solve', 'lu'),
    *('eig', 'eigh', 'svd', 'schur', 'hessenberg', 'tridiagonal', 'tridiagonal_solve'),
    *('qr', 'geqrf', 'geqp3', 'householder_product'),
    *('ffi_call', 'pallas_call', 'ragged_dot_general'),
  }
)
JAX = pathlib.Path(jax.__file__).parent


@dataclasses.dataclass(frozen=True)
class Product:
  """(m x k) times (k x n), `batch` of them, done `times` times."""

  batch: int
  m: int
  n: int
  k: int
  passes: int
  times: int
  where: str  # Innermost functions of the program that are not JAX's.

  @property
  def flops(self) -> int:
    return 2 * self.batch * self.m * self.n * self.k * self.times

  @property
  def pass_flops(self) -> int:
    return self.passes * self.flops


@dataclasses.dataclass
class Count:
  products: list[Product] = dataclasses.field(default_factory=list)
  # Loops that end when the data say so, of which one round is counted.
  open_loops: int = 0
  # Decompositions and kernels, of which nothing is.
  opaque: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

  @property
  def flops(self) -> int:
    return sum(product.flops for product in self.products)

  @property
  def pass_flops(self) -> int:
    return sum(product.pass_flops for product in self.products)

  def parts(self) -> dict[str, int]:
    """`pass_flops` by `where`, the largest first."""
    parts = collections.Counter()
    for product in self.products:
      parts[product.where] += product.pass_flops
    return dict(parts.most_common())


def count(
  function: Callable[..., Any],
  *arguments: Any,
  platform: str = 'tpu',
  branch: Callable[..., Any] = max,
) -> Count:
  """What `function` multiplies on `platform`.

  Args:
    function: To be traced.
    *arguments: Its arguments, or their shapes.
    platform: Whose branches of `jax.lax.platform_dependent` count.
    branch: Which branch of any other `jax.lax.cond` counts: `max`, the one with the most
      passes, or `min`.
  """
  closed = jax.make_jaxpr(function)(*arguments)
  counter = _Counter(platform, branch)
  found = Count()
  counter.add(closed, [None] * len(_open(closed)[0].invars), 1, '', found)
  return found


def passes(lhs: Any, rhs: Any, precision: Any) -> int:
  """Bfloat16 products in one product of two dtypes."""
  if any(np.issubdtype(dtype, np.complexfloating) for dtype in (lhs, rhs)):
    raise NotImplementedError('Products of complex numbers are not counted.')
  if isinstance(precision, DotAlgorithmPreset) and precision.name != 'DEFAULT':
    if precision.name not in PRESET_PASSES:
      raise NotImplementedError(f'How many passes is {precision}?')
    return PRESET_PASSES[precision.name]
  if isinstance(precision, jax.lax.DotAlgorithm):
    # Operands in float32, with no say in how: full precision.
    is_float32 = precision.lhs_precision_type == np.float32
    return 6 if is_float32 else precision.num_primitive_operations
  pair = precision if isinstance(precision, tuple) else (precision, precision)
  most = max(PASSES.get(p, 1) for p in pair)  # None and a preset of no preference: 1.
  wide = [np.dtype(dtype).itemsize > 2 for dtype in (lhs, rhs)]
  return most if all(wide) else MIXED_PASSES[most] if any(wide) else 1


class _Counter:
  def __init__(self, platform: str, branch: Callable[..., Any]):
    self.platform = platform
    self.branch = branch

  def add(
    self, closed: Any, known: Iterable[int | None], times: int, where: str, into: Count
  ) -> None:
    """Adds a jaxpr that runs `times` times.

    Args:
      closed: The jaxpr.
      known: Its arguments, those that are known integers.
      times: How often it runs.
      where: For all that is in it; empty to ask that.
      into: What to add to.
    """
    jaxpr, consts = _open(closed)
    env = dict(zip(jaxpr.constvars, map(_integer, consts), strict=False))
    env |= dict(zip(jaxpr.invars, known, strict=True))

    def value(atom: Any) -> int | None:
      return _integer(atom.val) if isinstance(atom, core.Literal) else env.get(atom)

    for eqn in jaxpr.eqns:
      name, params = eqn.primitive.name, eqn.params
      here = where or _where(eqn)
      below = here if _is_of_jax(eqn) else where
      given = [value(x) for x in eqn.invars]
      if name == 'platform_index':
        env[eqn.outvars[0]] = _index(params['platforms'], self.platform)
      elif name in ('convert_element_type', 'copy'):
        env[eqn.outvars[0]] = given[0]
      elif name in ('dot_general', 'conv_general_dilated'):
        shape = (_dot if name == 'dot_general' else _convolution)(eqn)
        dtypes = (x.aval.dtype for x in eqn.invars)
        each = passes(*dtypes, precision=params['precision'])
        into.products.append(Product(*shape, each, times, here))
      elif name in OPAQUE:
        into.opaque[name] += times
      elif name == 'cond':
        self._cond(eqn, given, times, below, into)
      elif name == 'scan':
        # Which of them are the same in every round is told otherwise in every JAX.
        unknown = [None] * len(given)
        self.add(params['jaxpr'], unknown, times * params['length'], below, into)
      elif name == 'while':
        # Ours has no round, but where gradients leave the range of their dtype.
        trips = 0 if RARELY in str(eqn.source_info.name_stack) else _trips(params, given)
        into.open_loops += trips is None
        inside = given[params['cond_nconsts'] :]
        inside = [None if i >= params['body_nconsts'] else x for i, x in enumerate(inside)]
        rounds = times * (1 if trips is None else trips)
        self.add(params['body_jaxpr'], inside, rounds, below, into)
        condition = given[: params['cond_nconsts']]
        carry = [None] * (len(given) - params['cond_nconsts'] - params['body_nconsts'])
        self.add(params['cond_jaxpr'], [*condition, *carry], rounds + times, below, into)
      else:
        for inner in _inner(name, params):
          arguments = _open(inner)[0].invars
          same = len(arguments) == len(given)
          inside = given if same else [None] * len(arguments)
          self.add(inner, inside, times, below, into)

  def _cond(self, eqn: Any, given: list[int | None], times: int, where: str, into: Count) -> None:
    branches = eqn.params['branches']
    platforms = eqn.params.get('branches_platforms')
    taken = given[0] if platforms is None else _index(platforms, self.platform)
    if taken is not None:
      branches = [branches[min(max(taken, 0), len(branches) - 1)]]
    counts = []
    for one in branches:
      counts.append(Count())
      self.add(one, given[1:], times, where, counts[-1])
    into.products += self.branch(counts, key=lambda c: c.pass_flops).products
    into.open_loops += max(c.open_loops for c in counts)
    for c in counts[1:]:
      counts[0].opaque |= c.opaque
    into.opaque += counts[0].opaque


def _open(jaxpr: Any) -> tuple[Any, Iterable[Any]]:
  """The jaxpr and its constants, which are one thing from JAX 0.12 on."""
  return getattr(jaxpr, 'jaxpr', jaxpr), getattr(jaxpr, 'consts', ())


def _integer(x: Any) -> int | None:
  whole = np.ndim(x) == 0 and np.issubdtype(getattr(x, 'dtype', type(x)), np.integer)
  return int(x) if whole and not isinstance(x, Tracer) else None


def _index(platforms: Iterable[tuple[str, ...] | None], platform: str) -> int:
  """Which branch `platform_dependent` takes: None is all that are not named."""
  platforms = list(platforms)
  named = [i for i, names in enumerate(platforms) if names is not None and platform in names]
  return named[0] if named else platforms.index(None)


def _inner(name: str, params: dict[str, Any]) -> Iterator[Any]:
  """Programs inside a primitive that is no loop and no branch, each of which runs once."""
  if name == 'custom_linear_solve':  # What it solves, and its transpose, do not run.
    params = {'solve': params['jaxprs'].solve}
  for param in params.values():
    for inner in param if isinstance(param, tuple | list) else (param,):
      if isinstance(inner, core.Jaxpr | core.ClosedJaxpr):
        yield inner


def _dot(eqn: Any) -> tuple[int, int, int, int]:
  lhs, rhs = (x.aval.shape for x in eqn.invars)
  (left, _), (batch, _) = eqn.params['dimension_numbers']
  size = lambda axes: math.prod(lhs[a] for a in axes)
  both = size(batch) * size(left)
  return size(batch), math.prod(lhs) // max(both, 1), math.prod(rhs) // max(both, 1), size(left)


def _convolution(eqn: Any) -> tuple[int, int, int, int]:
  """As the product that it is, zeros of padding and dilation included."""
  kernel = eqn.invars[1].aval.shape
  features = kernel[eqn.params['dimension_numbers'].rhs_spec[0]]
  k = math.prod(kernel) // max(features, 1)
  return 1, math.prod(eqn.outvars[0].aval.shape) // max(features, 1), features, k


def _trips(params: dict[str, Any], given: list[int | None]) -> int | None:
  """Rounds of `while i < bound: i += step` whose numbers are known, or None."""
  condition, body = (_open(params[f'{of}_jaxpr'])[0] for of in ('cond', 'body'))
  first, second = params['cond_nconsts'], params['body_nconsts']
  start = given[first + second :]
  carried = dict(zip(condition.invars[first:], range(len(start)), strict=True))
  if len(condition.eqns) != 1 or condition.eqns[0].primitive.name != 'lt':
    return None
  counter, bound = condition.eqns[0].invars
  if isinstance(counter, core.Literal) or counter not in carried:
    return None
  i = carried[counter]

  def fixed(atom: Any) -> int | None:
    if isinstance(atom, core.Literal):
      return _integer(atom.val)
    if atom not in carried:
      return dict(zip(condition.invars, given[:first], strict=False)).get(atom)
    j = carried[atom]  # Carried along, and never changed.
    return start[j] if body.outvars[j] is body.invars[second + j] else None

  steps = [
    _integer(x.val)
    for eqn in body.eqns
    if eqn.outvars[0] is body.outvars[i] and eqn.primitive.name == 'add'
    for x, other in (eqn.invars, eqn.invars[::-1])
    if isinstance(x, core.Literal) and other is body.invars[second + i]
  ]
  begin, end, step = start[i], fixed(bound), (steps or [None])[0]
  if begin is None or end is None or not step or step < 0:
    return None
  return max(0, -(-(end - begin) // step))


def _is_of_jax(eqn: Any) -> bool:
  """Whether it is a `jnp` function: traced once, it remembers its first caller."""
  return hasattr(jnp, str(eqn.params.get('name')).lstrip('_'))


def _where(eqn: Any) -> str:
  """The innermost functions that are not JAX's, the outer one first."""
  frames = getattr(eqn.source_info.traceback, 'frames', ())
  names = []
  for frame in frames:  # Innermost first.
    path = pathlib.Path(frame.file_name)
    name = frame.function_name.rsplit('.', 1)[-1]
    if JAX not in path.parents and path.suffix == '.py' and not name.startswith('<'):
      names.append(name)
  return '/'.join(names[:3][::-1])
