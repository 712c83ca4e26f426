"""Exact curvature of a loss along given directions of a layer.

    h_k = vec(u_k v_kᵀ)ᵀ H vec(u_k v_kᵀ) = d²/dε² L(W + ε u_k v_kᵀ) at ε = 0

with H the Hessian by this layer's weights alone. Both ways to it are exact, and differ in
rounding only:

  "forward": the second derivative along the direction, forward mode twice. Nothing is kept
    for a way back, so it needs less memory, and no gradient by a convolution's kernel is
    ever taken, which is slow for many directions at once.
  "reverse": a Hessian-vector product, forward over reverse, and a scalar product with the
    direction. It also differentiates functions with a `jax.custom_vjp`, which forward mode
    cannot.

Only what lies behind the layer depends on the direction; the network itself is computed
once for all directions that are carried along together, as many as the memory budget holds.

The Gauss-Newton curvature of L = c(f(W)) is that of c along the direction that f's
derivative gives: d²/dε² c(f(W) + ε ḟ), ḟ = d/dε f(W + ε u_k v_kᵀ).

Source: A. Calvo, "Spectral Asymptotics of Neural Network Loss Landscapes",
arXiv:2606.02596, the sections on directional curvature (by Hessian-vector products).
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core
from jax.typing import ArrayLike

from spectral_optax import layout
from spectral_optax.curvature._convolutions import channels_last

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
# Two functions whose composition is the loss: outputs of the parameters, loss of the outputs.
Split = tuple[Callable[..., Any], Callable[..., jax.Array]]
Method = Literal['auto', 'forward', 'reverse']
GroupBy = Literal['parameter', 'shape']

METHODS = ('auto', 'forward', 'reverse')
GROUPINGS = ('parameter', 'shape')
DEFAULT_MEMORY_BUDGET = 2 * 2**30


def directional_curvature(
  loss_fn: Callable[..., jax.Array],
  params: Any,
  directions: Mapping[str, tuple[ArrayLike, ArrayLike]],
  *,
  weight_dimension_numbers: Any | None = None,
  batches: Batches | None = None,
  weights: Sequence[float] | None = None,
  gauss_newton: Split | None = None,
  method: Method = 'auto',
  group_by: GroupBy = 'parameter',
  memory_budget: int | None = DEFAULT_MEMORY_BUDGET,
  progress: bool = False,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
  """Curvature along ``u_k v_kᵀ``, for every given matrix and k, on one pass over the data.

  Args:
    loss_fn: ``loss_fn(params)``, or ``loss_fn(params, batch)`` with `batches`; gives a real
      scalar and is deterministic. Give the same function object again (and a batch that
      holds whatever changes) and nothing is compiled again: the last 128 programs are
      kept, with the functions that they were made of.
    params: The parameter tree: dicts, `nnx.State`, an Equinox module, ... Leaves in half
      precision are measured in float32.
    directions: By path, (u, v): u (matrices, directions, rows), v (matrices, directions,
      columns), with one axis of matrices for the layers of a stack (a length of 1 for any
      other). They need not have length one; the curvature grows with their length
      to the fourth power.
    weight_dimension_numbers: Which axes are rows and columns; see
      `spectral_optax.weight_dimension_numbers`.
    batches: None, or the batches over whose losses the mean is taken: a list, another
      iterable that can be gone through again, or a function that gives one.
    weights: How much each batch counts, as many as there are batches; None for all the
      same, which they must then be in shape.
    gauss_newton: None, or (f, c) with ``loss_fn(params) = c(f(params))``, each with the
      batch as second argument if there are batches: for the Gauss-Newton curvature too.
    method: "forward", "reverse" (see the module), or "auto": the first, and the second
      where a `custom_vjp` is in the way.
    group_by: "parameter": one program for each parameter, in which nothing in front of
      the layer is differentiated. "shape": one for all parameters of a shape, all their
      directions together: fewer and larger programs, to compile in a fraction of the
      time, that compute more. Layers stacked in one parameter always go together.
    memory_budget: How many bytes a program may plan for its intermediate results, beside
      parameters and batch; directions are split into chunks accordingly. None for no limit.
    progress: Whether to show a bar (needs tqdm).

  Returns:
    (h, h_gauss_newton), each by path an array (matrices, directions), float64; the second
    None unless asked for.

  Raises:
    ValueError: a path that is no matrix, shapes that do not match, batches that can be gone
      through but once or differ in shape without weights, a memory budget that does not
      hold even one direction.
    TypeError: a loss that is not a real scalar; traced parameters.
  """
  problem = Problem.of(loss_fn, params, weight_dimension_numbers, batches, weights, gauss_newton)
  return problem.curvature(directions, method, group_by, memory_budget, progress)


# ---------------------------------------------------------------------------------
# Parameters and data
# ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Same:
  """Equal to itself alone: makes a key of what may have no hash."""

  value: Any

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Same) and other.value is self.value

  def __hash__(self) -> int:
    return id(self.value)


@dataclasses.dataclass(frozen=True)
class Static:
  """What stays the same from step to step of a training: hashable, a key for programs.

  Attributes:
    loss_fn: With or without a batch.
    gauss_newton: See `directional_curvature`.
    has_batch: Whether the functions take a batch.
    treedef: Of the parameters.
    constants: (position, leaf) of those leaves that are no arrays.
    x64: Whether double precision is enabled.
  """

  loss_fn: Same
  gauss_newton: tuple[Same, Same] | None
  has_batch: bool
  treedef: Any
  constants: tuple[tuple[int, Same], ...]
  x64: bool

  def call(self, function: Callable[..., Any], leaves: Sequence[jax.Array], batch: Any) -> Any:
    """`function` of the parameters whose arrays are `leaves`."""
    leaves = list(leaves)
    for position, constant in self.constants:
      leaves.insert(position, constant.value)
    params = jax.tree.unflatten(self.treedef, leaves)
    return function(params, batch) if self.has_batch else function(params)

  def loss(self, leaves: Sequence[jax.Array], batch: Any) -> jax.Array:
    """The loss, checked."""
    loss = self.call(self.loss_fn.value, leaves, batch)
    if not hasattr(loss, 'shape') or jnp.shape(loss) != () or not _is_real_float(loss):
      raise TypeError(
        'loss_fn must return one real number, got'
        f' {jax.tree.map(lambda x: jax.typeof(x), loss)}. Take the mean over the batch, and'
        ' leave out auxiliary values.'
      )
    return loss


def _is_real_float(x: Any) -> bool:
  return jnp.issubdtype(jnp.result_type(x), jnp.floating)


@dataclasses.dataclass(frozen=True)
class Problem:
  """A loss, its parameters as arrays, and the data.

  Attributes:
    static: See there.
    leaves: The arrays among the parameters' leaves, in their order.
    positions: Of each matrix in `leaves`, by path.
    views: The matrices, by path.
    batches: A function that gives the batches with their weights, which add up to 1.
    num_batches: How many there are.
  """

  static: Static
  leaves: list[jax.Array]
  positions: dict[str, int]
  views: dict[str, layout.MatrixView]
  batches: Callable[[], Iterator[tuple[Any, float]]]
  num_batches: int

  @classmethod
  def of(
    cls,
    loss_fn: Callable[..., jax.Array],
    params: Any,
    weight_dimension_numbers: Any | None,
    batches: Batches | None,
    weights: Sequence[float] | None,
    gauss_newton: Split | None,
  ) -> 'Problem':
    """Checks what a user has given."""
    by_path = layout.leaves_by_path(params)
    views = layout.matrix_views(params, weight_dimension_numbers)
    leaves, constants, positions = [], [], {}
    for i, (path, leaf) in enumerate(by_path.items()):
      if isinstance(leaf, jax.core.Tracer):
        raise TypeError(
          f'{path!r} is traced: curvature is measured outside of jitted functions, by programs'
          ' of its own.'
        )
      if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
        constants.append((i, Same(leaf)))
        continue
      positions[path] = len(leaves)
      leaves.append(at_least_single(jnp.asarray(leaf)))
    static = Static(
      Same(loss_fn),
      None if gauss_newton is None else (Same(gauss_newton[0]), Same(gauss_newton[1])),
      batches is not None,
      jax.tree.structure(params),
      tuple(constants),
      bool(jax.config.jax_enable_x64),  # type: ignore
    )
    positions = {path: positions[path] for path in views}
    return cls(static, leaves, positions, views, *_weighted(batches, weights))

  def passes(self, progress: bool, calls: int, title: str) -> Iterator[tuple[Any, float, Any]]:
    """One pass: the batches, their weights, and something to `update` after each call."""
    with progress_bar(progress, calls * self.num_batches, title) as bar:
      for batch, weight in self.batches():
        yield jax.tree.map(jnp.asarray, batch), weight, bar

  def in_order_of_use(self) -> list[str]:
    """The paths of the matrices as the loss comes across them: by depth, in a network."""
    batch = next(iter(self.batches()))[0]
    program = jax.make_jaxpr(self.static.loss)(self.leaves, batch).jaxpr
    names = {i: path for path, i in self.positions.items()}
    owners = [names.get(i) for i in range(len(program.invars))]
    seen: dict[str, None] = {}
    _uses(program, owners, seen)
    return [*seen, *(path for path in self.positions if path not in seen)]

  def curvature(
    self,
    directions: Mapping[str, tuple[ArrayLike, ArrayLike]],
    method: Method = 'auto',
    group_by: GroupBy = 'parameter',
    memory_budget: int | None = DEFAULT_MEMORY_BUDGET,
    progress: bool = False,
  ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """See `directional_curvature`."""
    for name, value, known in (('method', method, METHODS), ('group_by', group_by, GROUPINGS)):
      if value not in known:
        raise ValueError(f'{name} must be one of {", ".join(known)}, got {value!r}.')
    groups = [_Items.of(paths, self, directions) for paths in self._groups(directions, group_by)]
    sums = [np.zeros((2, len(items.which))) for items in groups]
    for batch, weight, bar in self.passes(progress, len(groups), 'curvature'):
      for total, items in zip(sums, groups, strict=True):
        arrays = (self.leaves, batch, items.arrays)
        program = _compiled(
          _Program(self.static, items.positions, items.view, method),
          len(items.which),
          memory_budget,
          signature(arrays),
        )
        total += weight * np.asarray(program(*arrays), np.float64)
        bar.update()
    exact, approximate = {}, {}
    for total, items in zip(sums, groups, strict=True):
      exact |= items.by_path(total[0])
      approximate |= items.by_path(total[1])
    in_order = lambda found: {path: found[path] for path in directions}
    return in_order(exact), in_order(approximate) if self.static.gauss_newton else None

  def _groups(self, paths: Iterable[str], group_by: GroupBy) -> list[list[str]]:
    """Paths that one program does: with equal views, but for the path."""
    groups: dict[Any, list[str]] = {}
    for path in paths:
      if path not in self.views:
        raise ValueError(
          f'{path!r} is no matrix among the parameters; the matrices are'
          f' {layout._listing(self.views)}.'
        )
      view, leaf = self.views[path], self.leaves[self.positions[path]]
      key = path if group_by == 'parameter' else (dataclasses.replace(view, path=''), leaf.dtype)
      groups.setdefault(key, []).append(path)
    return list(groups.values())


def _uses(
  program: core.Jaxpr, owners: Sequence[str | None], seen: dict[str, None]
) -> list[str | None]:
  """Adds to `seen` whose values meet others, in that order.

  A value that is only cast, reshaped or the like still belongs to its parameter.

  Returns:
    Whom the outputs belong to.
  """
  owner = {v: o for v, o in zip(program.invars, owners, strict=True) if o is not None}
  read = lambda v: None if isinstance(v, core.Literal) else owner.get(v)
  for eqn in program.eqns:
    operands = [read(v) for v in eqn.invars]
    owned = {o for o in operands if o is not None}
    if not owned:
      continue
    programs = (getattr(p, 'jaxpr', p) for p in eqn.params.values())
    inner = [p for p in programs if isinstance(p, core.Jaxpr)]
    if len(inner) == 1 and len(inner[0].invars) == len(operands):
      outs = _uses(inner[0], operands, seen)
    elif len(owned) == 1 and all(
      o is not None or isinstance(v, core.Literal)
      for v, o in zip(eqn.invars, operands, strict=True)
    ):
      outs = [*owned] * len(eqn.outvars)
    else:
      seen.update(dict.fromkeys(o for o in operands if o is not None))
      continue
    owner |= {v: o for v, o in zip(eqn.outvars, outs, strict=True) if o is not None}
  return [read(v) for v in program.outvars]


def at_least_single(x: jax.Array) -> jax.Array:
  """Half precision in float32; anything else as it is."""
  half = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
  return x.astype(jnp.float32) if half else x


def _weighted(
  batches: Batches | None, weights: Sequence[float] | None
) -> tuple[Callable[[], Iterator[tuple[Any, float]]], int]:
  """A function that gives (batch, weight), the weights adding up to one; and how many."""
  if batches is None:
    if weights is not None:
      raise ValueError('weights are of batches, and there are no batches.')
    return lambda: iter([(None, 1.0)]), 1
  if not callable(batches) and iter(batches) is batches:
    raise ValueError(
      'batches is an iterator, which is empty after one pass, and two are made: give a list'
      ' or a function that returns a new iterator.'
    )
  fresh: Any = batches if callable(batches) else lambda: batches
  shapes, count = set(), 0
  for batch in fresh():
    count += 1
    shapes.add(_shape(batch))
  if count == 0:
    raise ValueError('batches is empty.')
  if weights is None and len(shapes) > 1:
    raise ValueError(
      'The batches differ in shape, so they should not all count the same: say how much with'
      ' weights=[...], as a rule their numbers of examples.'
    )
  share = np.ones(count) if weights is None else np.asarray(weights, np.float64)
  if (
    share.shape != (count,) or not np.isfinite(share).all() or (share < 0).any() or not share.any()
  ):
    raise ValueError(f'weights must be {count} numbers, none negative, one a batch, got {weights}.')
  share = share / share.sum()

  def pairs() -> Iterator[tuple[Any, float]]:
    yield from zip(fresh(), share.tolist(), strict=True)

  return pairs, count


def _shape(batch: Any) -> Any:
  leaves, treedef = jax.tree.flatten(batch)
  return treedef, tuple(np.shape(leaf) for leaf in leaves)


@contextlib.contextmanager
def progress_bar(show: bool, total: int, title: str) -> Iterator[Any]:
  """Tqdm's, or nothing with the same `update`."""
  if not show:
    yield _NoBar()
    return
  try:
    from tqdm.auto import tqdm
  except ImportError as error:
    raise ImportError(
      "progress=True needs tqdm: pip install 'spectral-optax[examples]', or leave it False."
    ) from error
  with tqdm(total=total, desc=title) as bar:
    yield bar


class _NoBar:
  def update(self) -> None:
    pass


# ---------------------------------------------------------------------------------
# Directions as one batch
# ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Items:
  """All directions of one group of parameters, one after the other.

  Attributes:
    paths: Of the parameters.
    positions: Of these among the leaves.
    view: Of each of them.
    count: Directions of each matrix.
    which: Which parameter of the group, int32, (items,).
    index: Which matrix of it, int32, (items,).
    u: (items, rows).
    v: (items, columns).
  """

  paths: tuple[str, ...]
  positions: tuple[int, ...]
  view: layout.MatrixView
  count: int
  which: np.ndarray
  index: np.ndarray
  u: jax.Array
  v: jax.Array

  @classmethod
  def of(cls, paths: Sequence[str], problem: Problem, directions: Mapping[str, Any]) -> '_Items':
    view = problem.views[paths[0]]
    dtype = problem.leaves[problem.positions[paths[0]]].dtype
    matrices = math.prod(view.batch_shape)
    us, vs, counts = [], [], set()
    for path in paths:
      u, v = (jnp.asarray(x, dtype) for x in directions[path])
      wanted = ((matrices, u.shape[1:2], view.rows), (matrices, u.shape[1:2], view.columns))
      given = tuple((x.shape[0], x.shape[1:2], x.shape[-1]) for x in (u, v) if x.ndim == 3)
      if given != wanted:
        raise ValueError(
          f'Directions of {path!r} have shapes {u.shape} and {v.shape}; they must be'
          f' ({matrices}, directions, {view.rows}) and ({matrices}, directions, {view.columns}).'
        )
      us.append(u.reshape(-1, view.rows))
      vs.append(v.reshape(-1, view.columns))
      counts.add(u.shape[1])
    if len(counts) > 1:
      raise ValueError(
        f'Parameters of one shape have {sorted(counts)} directions; with group_by="shape" give'
        ' each as many.'
      )
    (count,) = counts
    numbers = np.arange(len(paths) * matrices * count, dtype=np.int32)
    return cls(
      tuple(paths),
      tuple(problem.positions[path] for path in paths),
      view,
      count,
      numbers // (matrices * count),
      numbers // count % matrices,
      jnp.concatenate(us),
      jnp.concatenate(vs),
    )

  @property
  def arrays(self) -> tuple[ArrayLike, ...]:
    return self.which, self.index, self.u, self.v

  def by_path(self, values: np.ndarray) -> dict[str, np.ndarray]:
    values = values.reshape(len(self.paths), -1, self.count)
    return dict(zip(self.paths, values, strict=True))


# ---------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Program:
  """The curvature along all directions of one group, on one batch; hashable.

  Attributes:
    static: The loss, and the structure of its parameters.
    positions: Of the group's parameters among the leaves.
    view: Of each; its path is that of the first.
    method: See `directional_curvature`.
  """

  static: Static
  positions: tuple[int, ...]
  view: layout.MatrixView
  method: Method

  def __call__(self, chunk: int, leaves: Sequence[jax.Array], batch: Any, items: Any) -> jax.Array:
    """(2, items): exact and Gauss-Newton curvature, the latter 0 unless asked for."""
    inside = [leaves[i] for i in self.positions]

    def of_group(function: Callable[..., Any]) -> Callable[..., Any]:
      def call(inside):
        replaced = list(leaves)
        for i, leaf in zip(self.positions, inside, strict=True):
          replaced[i] = leaf
        return function(replaced, batch)

      return call

    loss = of_group(self.static.loss)
    if self.method == 'reverse':  # Once for all chunks.
      hessian = jax.linearize(jax.grad(loss), inside)[1]
      along = lambda tangent: optax.tree.vdot(tangent, hessian(tangent))
    else:
      along = lambda tangent: second_derivative(loss, inside, tangent)

    def one(which, index, u, v):
      tangent = self.tangent(which, index, u, v)
      exact = along(tangent)
      if self.static.gauss_newton is None:
        return jnp.stack([exact, jnp.zeros_like(exact)])
      f, c = self.static.gauss_newton
      network = of_group(functools.partial(self.static.call, f.value))
      outputs, change = jax.jvp(network, (inside,), (tangent,))
      of_outputs = lambda z: c.value(z, batch) if self.static.has_batch else c.value(z)
      return jnp.stack([exact, second_derivative(of_outputs, outputs, change)])

    # XLA has no fast convolution on a CPU for all of those that this makes.
    return channels_last(lambda items: in_chunks(one, chunk, items))(items)

  def tangent(self, which, index, u, v) -> list[jax.Array]:
    """U vᵀ in one matrix of one parameter of the group, zero in all others."""
    matrix = (u[:, None] * v[None, :])[None]
    matrices = math.prod(self.view.batch_shape)
    if matrices > 1:
      matrix = matrix * (jnp.arange(matrices) == index)[:, None, None]
    direction = self.view.from_matrices(matrix)
    if len(self.positions) == 1:
      return [direction]
    return [direction * (which == i) for i in range(len(self.positions))]


def second_derivative(
  function: Callable[[Any], jax.Array], point: Any, direction: Any
) -> jax.Array:
  """``d²/dε² f(x + ε d)`` at ε = 0, forward mode twice."""
  slope = lambda x: jax.jvp(function, (x,), (direction,))[1]
  return jax.jvp(slope, (point,), (direction,))[1]


def in_chunks(function: Callable[..., jax.Array], chunk: int, items: Any) -> jax.Array:
  """`function` over the leading axis of all `items`, `chunk` of them at a time.

  Returns:
    What it returns, with the items' axis last.
  """
  total = len(items[0])
  mapped = jax.vmap(function, out_axes=-1)
  if chunk >= total:
    return mapped(*items)
  chunks = math.ceil(total / chunk)
  chunk = math.ceil(total / chunks)  # As little padding as goes.

  def split(x):
    padding = jnp.zeros((chunks * chunk - total, *x.shape[1:]), x.dtype)
    return jnp.concatenate([x, padding]).reshape(chunks, chunk, *x.shape[1:])

  out = jax.lax.map(lambda part: mapped(*part), jax.tree.map(split, items))
  out = jnp.moveaxis(out, 0, -2)
  return out.reshape(*out.shape[:-2], chunks * chunk)[..., :total]


# ---------------------------------------------------------------------------------
# Compiling, within a budget
# ---------------------------------------------------------------------------------


def signature(tree: Any) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
  """What a program is compiled for: hashable."""
  leaves, treedef = jax.tree.flatten(tree)
  arrays = map(jnp.asarray, leaves)
  return treedef, tuple(
    jax.ShapeDtypeStruct(
      x.shape,
      x.dtype,
      # An array that is nowhere in particular goes where the others are.
      sharding=x.sharding if x.committed else None,
      weak_type=x.weak_type,
    )
    for x in arrays
  )


@functools.lru_cache(maxsize=128)
def _compiled(
  program: _Program, total: int, budget: int | None, arguments: tuple[Any, tuple[Any, ...]]
) -> Callable[..., jax.Array]:
  """The program with as many directions at a time as the budget allows."""
  shapes = jax.tree.unflatten(*arguments)

  def build(chunk: int) -> tuple[Any, int]:
    function = jax.jit(functools.partial(program, chunk))
    # The default rounds to fewer bits on accelerators.
    with jax.default_matmul_precision('highest'):
      compiled = function.lower(*shapes).compile()
    return compiled, getattr(compiled.memory_analysis(), 'temp_size_in_bytes', 0)

  if program.method == 'auto':
    try:
      forward = dataclasses.replace(program, method='forward')
      return _compiled(forward, total, budget, arguments)
    except TypeError as error:
      if 'custom_vjp' not in str(error):
        raise
    return _compiled(dataclasses.replace(program, method='reverse'), total, budget, arguments)

  chunk = total
  while True:
    compiled, planned = build(chunk)
    if budget is None or planned <= budget:
      return compiled
    if chunk == 1:
      raise ValueError(
        f'memory_budget is {budget} bytes, and one direction of {program.view.path!r} with shape'
        f' {program.view.shape} needs {planned}. Give smaller batches, or a larger budget.'
      )
    # The plan grows with the directions, but for what the network itself needs.
    chunk = max(1, int(0.9 * chunk * budget / planned))
