"""Matrices that lie in parts on many devices: who solves which, and how they get there.

Left alone, XLA gathers a sharded matrix and repeats its decomposition on every device. Here
the matrices are dealt over the mesh: one all-to-all takes every device from its part of each
matrix to the whole of some, one takes the updates back, and in between each device solves
its share and nobody waits for anybody. All of it is one `jax.shard_map`:

    parts of all  ->  all of some  ->  solve_batches  ->  all of some  ->  parts of all

Where there are fewer matrices than devices, some mesh axes deal them and the others divide
their longer side: then Gram matrices are summed (`solvers._split`), and G stays in parts.
Mesh axes that already number the matrices (experts, stacked layers) need nobody's help.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from spectral_optax import layout, solvers, update_size

Axes = tuple[str, ...]
# For each axis of a parameter, the mesh axes that divide it, the major one first.
Placement = tuple[Axes, ...]


@dataclasses.dataclass(frozen=True)
class Division:
  """Parameters on a mesh, and who works.

  Attributes:
    mesh: The mesh.
    sizes: Of the mesh axes that anything here happens on.
    work_axes: Those of them that matrices are dealt over.
    placements: Of every matrix parameter, by path.
  """

  mesh: Any
  sizes: dict[str, int]
  work_axes: Axes
  placements: dict[str, Placement]

  def size(self, axes: Axes) -> int:
    """How many devices there are along `axes`."""
    return math.prod(self.sizes[a] for a in axes)


# ---------------------------------------------------------------------------------
# What lies where
# ---------------------------------------------------------------------------------


def _own_mesh(x: Any) -> Any:
  """The mesh that an array is on, traced or not; None if JAX does not say."""
  if not isinstance(x, jax.Array):
    return None
  if not isinstance(x, jax.core.Tracer):
    return getattr(x.sharding, 'mesh', None)
  mesh = jax.typeof(x).sharding.mesh
  return None if mesh.empty else mesh


def _own_spec(x: jax.Array, mesh: Any) -> PartitionSpec | None:
  """How it lies there; None where only the compiler will know."""
  if not isinstance(x, jax.core.Tracer):
    return getattr(x.sharding, 'spec', None)
  explicit = any(kind == AxisType.Explicit for kind in mesh.axis_types)
  return jax.typeof(x).sharding.spec if explicit else None


def _placement(spec: Any, ndim: int) -> Placement:
  entries = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
  return tuple(entries + [()] * (ndim - len(entries)))


def check(mesh: Any, work_axes: Any) -> None:
  """Raises ValueError for arguments that make no sense together, whatever the parameters."""
  if mesh is not None and not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
    raise ValueError(f'mesh must be a jax.sharding.Mesh or None, got {mesh!r}.')
  if work_axes is None:
    return
  names = (work_axes,) if isinstance(work_axes, str) else work_axes
  if not isinstance(names, tuple | list) or not all(isinstance(n, str) for n in names):
    raise ValueError(f'work_axes must name axes of a mesh, got {work_axes!r}.')
  if len(set(names)) != len(names):
    raise ValueError(f'work_axes names an axis twice: {work_axes!r}.')
  if mesh is not None:
    _check_names(mesh, names)


def _check_names(mesh: Any, names: Sequence[str]) -> None:
  stray = [name for name in names if name not in mesh.axis_names]
  if stray:
    raise ValueError(
      f'work_axes names {stray[0]!r}, which is no axis of the mesh: it has {mesh.axis_names}.'
    )


def divide(
  leaves: Mapping[str, Any],
  views: Mapping[str, layout.MatrixView],
  *,
  mesh: Any = None,
  work_axes: Any = None,
  shardings: Any = None,
) -> Division | None:
  """Who is to work on which mesh; None where there is nobody to share with.

  Args:
    leaves: The arrays, traced or not, by path.
    views: Those that are matrices.
    mesh: See `spectral_newton`; None for the one that the arrays, or `jax.set_mesh`, say.
    work_axes: See `spectral_newton`.
    shardings: See `spectral_newton`; by path.

  Raises:
    ValueError: `work_axes` that the mesh does not have, or that are manual; a sharding that
      does not fit its parameter.
  """
  names = (
    None if work_axes is None else tuple([work_axes] if isinstance(work_axes, str) else work_axes)
  )
  if names == ():
    return None
  around = jax.sharding.get_abstract_mesh()
  own = next((m for m in (_own_mesh(leaves[path]) for path in views) if m is not None), None)
  if mesh is None or not around.empty:
    given, mesh = mesh, around if not around.empty else own
    if given is not None and given.axis_names != mesh.axis_names:
      raise ValueError(
        f'mesh has the axes {given.axis_names}, and jax.set_mesh or jax.shard_map around it'
        f' {mesh.axis_names}. Give one of them.'
      )
  if mesh is None or mesh.empty:
    if names is not None and all(isinstance(leaves[p], jax.core.Tracer) for p in views):
      raise ValueError(
        f'work_axes = {work_axes!r} without a mesh: give mesh=..., or use jax.set_mesh.'
      )
    return None
  if names is not None:
    _check_names(mesh, names)
  manual = {
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == AxisType.Manual
  }
  blocked = [name for name in names or () if name in manual]
  if blocked:
    raise ValueError(
      f'work_axes names {blocked[0]!r}, which is manual here: inside jax.shard_map a parameter'
      ' is what one device has of it, and every block is solved as a matrix of its own. Call'
      ' update outside of shard_map to share the work, or leave work_axes out.'
    )
  sizes = {n: s for n, s in dict(mesh.shape).items() if n not in manual and s > 1}
  work = tuple(n for n in sizes if names is None or n in names)
  if not work:
    return None
  placements = {}
  for path, view in views.items():
    spec = shardings.get(path) if shardings is not None else None
    spec = getattr(spec, 'spec', spec)
    if spec is None:
      spec = _own_spec(leaves[path], mesh)
    # What only the compiler knows is gathered: any other guess would become the sharding of
    # whatever the update is added to.
    placed = _placement(() if spec is None else spec, len(view.shape))
    placed = tuple(tuple(n for n in axes if n in sizes) for axes in placed)
    for axis, size in zip(placed, view.shape, strict=True):
      if size % math.prod(sizes[n] for n in axis):
        raise ValueError(f'The sharding {spec} of {path!r} does not divide its shape {view.shape}.')
    placements[path] = placed
  used = {n for placed in placements.values() for axes in placed for n in axes} | set(work)
  return Division(mesh, {n: s for n, s in sizes.items() if n in used}, work, placements)


# ---------------------------------------------------------------------------------
# From parts of all to all of some
# ---------------------------------------------------------------------------------


class _Group(NamedTuple):
  """Parameters that are alike in shape and place, but for how many matrices they are.

  Attributes:
    paths: Of them.
    sides: Axes of rows, axes of columns: how many.
    placed: Mesh axes on each of those.
    batch_axes: Mesh axes that number the matrices.
  """

  paths: list[str]
  sides: tuple[int, int]
  placed: Placement
  batch_axes: Axes


# A label of an axis of what is moved around: ('batch',), ('long',), or (side, number, place),
# place of a mesh axis that has been gathered, or, last, of what was here from the beginning.
_Label = tuple[Any, ...]
_BATCH: _Label = ('batch',)
_LONG: _Label = ('long',)
_HERE = 99


@dataclasses.dataclass
class _Moved:
  """An array under way, and the way back.

  Attributes:
    x: The array.
    labels: Of its axes.
    number: This device's, along some mesh axes.
    back: What undoes each step, in the order of the steps.
  """

  x: jax.Array
  labels: list[_Label]
  number: Callable[[Axes], jax.Array]
  back: list[Callable[[jax.Array], jax.Array]] = dataclasses.field(default_factory=list)

  def order(self, labels: Sequence[_Label]) -> None:
    """Transposes."""
    to = [self.labels.index(label) for label in labels]
    undo = np.argsort(to).tolist()
    self.x, self.labels = self.x.transpose(to), list(labels)
    self.back.append(lambda y: y.transpose(undo))

  def reshape(self, shape: Sequence[int], labels: Sequence[_Label]) -> None:
    """Reshapes."""
    old = self.x.shape
    self.x, self.labels = self.x.reshape(shape), list(labels)
    self.back.append(lambda y: y.reshape(old))

  def fill(self, multiple: int) -> None:
    """Makes the first axis a multiple, with zeros."""
    count = len(self.x)
    if count % multiple:
      pad = [(0, -count % multiple)] + [(0, 0)] * (self.x.ndim - 1)
      self.x = jnp.pad(self.x, pad)
      self.back.append(lambda y: y[:count])

  def deal(self, devices: int, first: int) -> None:
    """The first axis in the order in which `_dealt` gives it out."""
    count = len(self.x)
    order, once = _dealt(count, devices, first)
    if np.array_equal(order, np.arange(count)):
      return
    self.x = jnp.take(self.x, order, axis=0)
    undo = np.argsort(order[once])
    undo = np.arange(len(order))[once][undo]
    self.back.append(lambda y: jnp.take(y, undo, axis=0))

  def slice(self, axes: Axes, devices: int) -> None:
    """Of an axis that everybody has, everybody their own part; the first axis."""
    shape = self.x.shape
    parts = self.x.reshape(devices, -1, *shape[1:])
    self.x = jnp.take(parts, self.number(axes), axis=0)
    self.back.append(lambda y: jax.lax.all_gather(y, axes, tiled=True))

  def exchange(self, axes: Axes, devices: int) -> None:
    """A part of the first axis for the whole of what lies along `axes`: a new first axis."""
    shape = self.x.shape
    swap = lambda y: jax.lax.all_to_all(y, axes, 0, 0, tiled=True)
    self.x = swap(self.x.reshape(devices, shape[0] // devices, *shape[1:]))
    self.back.append(lambda y: swap(y).reshape(shape))

  def gather(self, axes: Axes) -> None:
    """The whole of what lies along `axes`: a new first axis."""
    self.x = jax.lax.all_gather(self.x, axes)
    self.back.append(lambda y: jnp.take(y, self.number(axes), axis=0))

  def undo(self, y: jax.Array) -> jax.Array:
    """From the last shape to the first."""
    for step in reversed(self.back):
      y = step(y)
    return y


def _assemble(
  x: jax.Array,
  group: _Group,
  division: Division,
  number: Callable[[Axes], jax.Array],
  deal: Axes,
  split: Axes,
  tall: bool,
  first: int,
) -> _Moved:
  """From (batch, rows..., columns...) in parts to whole matrices, fewer of them.

  Args:
    x: What this device has.
    group: What it is of.
    division: The mesh.
    number: This device's, along some mesh axes.
    deal: Axes that the matrices are dealt over.
    split: Axes that the longer side is to be divided over; axes in neither are gathered.
    tall: Whether rows are the longer side.
    first: The device that is dealt to first.

  Returns:
    (batch, rows, columns), or with `split` (batch, part of the longer side, smaller side).
  """
  where = {
    name: (side, number, place)
    for i, axes in enumerate(group.placed)
    for place, name in enumerate(axes)
    for side, number in [(0, i) if i < group.sides[0] else (1, i - group.sides[0])]
  }
  own = [(0, i, _HERE) for i in range(group.sides[0])]
  own += [(1, i, _HERE) for i in range(group.sides[1])]
  moved = _Moved(x, [_BATCH, *own], number)
  size = division.size

  def put(axes: Axes) -> None:
    """The new first axis, of devices along `axes`, to where it belongs."""
    new = [where[name] for name in axes]
    old = moved.labels
    moved.reshape([division.sizes[n] for n in axes] + list(moved.x.shape[1:]), [*new, *old])
    first = [label for label in old if len(label) == 1]
    moved.order([*first, *sorted(label for label in new + old if len(label) > 1)])

  dealt = tuple(n for n in deal if n not in group.batch_axes)
  everywhere = tuple(n for n in dealt if n not in where)
  if everywhere:
    moved.deal(size(everywhere), first)
    moved.slice(everywhere, size(everywhere))
  apart = tuple(n for n in dealt if n in where)
  if apart:
    moved.deal(size(apart), 0 if everywhere else first)
    moved.exchange(apart, size(apart))
    put(apart)
  rest = tuple(n for n in where if n not in deal and n not in split)
  if rest:
    moved.gather(rest)
    put(rest)
  long = 0 if tall else 1
  if split:
    # The longer side may be in any order, as long as it is the same for all of the smaller.
    ones = [label for label in moved.labels if len(label) > 1 and label[0] == long]
    others = [label for label in moved.labels if len(label) > 1 and label[0] != long]
    moved.order([*ones, _BATCH, *others])
    shape = moved.x.shape[len(ones) :]
    moved.reshape([-1, *shape], [_LONG, _BATCH, *others])
    here = tuple(n for n in split if n not in where)
    across = tuple(n for n in split if n in where and where[n][0] != long)
    moved.fill(size(here + across))
    if here:
      moved.slice(here, size(here))
    if across:
      moved.exchange(across, size(across))
      put(across)
    moved.order([_BATCH, _LONG, *moved.labels[2:]])
    moved.reshape([*moved.x.shape[:2], -1], [_BATCH, _LONG, (1 - long,)])
  else:
    rows = math.prod(
      n for n, label in zip(moved.x.shape, moved.labels, strict=True) if label[0] == 0
    )
    moved.reshape([moved.x.shape[0], rows, -1], [_BATCH, (0,), (1,)])
  return moved


def _dealt(count: int, devices: int, first: int) -> tuple[np.ndarray, np.ndarray]:
  """Which of `count` matrices go to which device, one round after another.

  Returns:
    Numbers, (devices · each,), device by device, the numbers of what fills up once more; and
    whether each is there for the first time. What is left over for the last round goes to the
    devices from `first` on.
  """
  each = -(-count // devices)
  device, slot = np.divmod(np.arange(each * devices), each)
  number = slot * devices + (device - first) % devices
  return number % count, number < count


def _own_numbers(
  ids: np.ndarray,
  view: layout.MatrixView,
  division: Division,
  number: Callable[[Axes], jax.Array],
) -> jax.Array:
  """Which of a parameter's matrices this device has a part of."""
  own = jnp.asarray(ids)
  for i, axis in enumerate(view.batch_axes):
    axes = division.placements[view.path][axis]
    if axes:
      each = own.shape[i] // division.size(axes)
      own = jax.lax.dynamic_slice_in_dim(own, number(axes) * each, each, axis=i)
  return own.reshape(-1)


def _numbers(
  ids: jax.Array,
  group: _Group,
  division: Division,
  number: Callable[[Axes], jax.Array],
  deal: Axes,
  first: int,
) -> tuple[jax.Array, jax.Array, int]:
  """Which matrices `_assemble` gives this device; which are no repetitions; how many at most."""
  real, most = jnp.ones(ids.shape, bool), len(ids)
  dealt = tuple(n for n in deal if n not in group.batch_axes)
  placed = {n for axes in group.placed for n in axes}
  for axes in (
    tuple(n for n in dealt if n not in placed),
    tuple(n for n in dealt if n in placed),
  ):
    if axes:
      devices, mine = division.size(axes), number(axes)
      order, once = _dealt(len(ids), devices, first)
      ids = jnp.take(jnp.take(ids, order).reshape(devices, -1), mine, axis=0)
      real = jnp.take(real, order) & jnp.asarray(once)
      real = jnp.take(real.reshape(devices, -1), mine, axis=0)
      first, most = 0, len(ids)
  return ids, real, most


# ---------------------------------------------------------------------------------
# Who does what
# ---------------------------------------------------------------------------------

# Floating point operations that a device does while it sends one byte: an accelerator's.
FLOPS_A_BYTE = 2000
# Products of n x n matrices that f costs: of a usual α and tolerance.
USUAL_PRODUCTS = 10


def _groups(
  division: Division, views: Mapping[str, layout.MatrixView], kinds: Mapping[str, Any] | None = None
) -> list[_Group]:
  """Parameters that travel together: of one kind, where `kinds` says so."""
  found: dict[Any, _Group] = {}
  for path, view in views.items():
    placement = division.placements[path]
    placed = tuple(placement[a] for a in view.matrix_axes)
    batch_axes = tuple(n for a in view.batch_axes for n in placement[a])
    sides = len(view.reduction_axes), len(view.output_axes)
    shape = tuple(view.shape[a] for a in view.matrix_axes)
    key = shape, sides, placed, batch_axes, kinds and kinds[path]
    found.setdefault(key, _Group([], sides, placed, batch_axes)).paths.append(path)
  return list(found.values())


def choose_deal(
  division: Division, views: Mapping[str, layout.MatrixView], *, of_gram: bool
) -> tuple[Axes, Axes]:
  """Mesh axes to deal matrices over, and those to divide longer sides over.

  Methods that need the matrix itself, and matrices that a mesh axis numbers already, are
  dealt over all. For the others, the cheapest in time: work, and numbers that are moved.
  """
  groups = _groups(division, views)
  numbering = {n for group in groups for n in group.batch_axes}
  if not of_gram or numbering:
    return tuple(n for n in division.sizes if n in numbering or n in division.work_axes), ()

  counts = {
    id(group): sum(math.prod(views[path].batch_shape) for path in group.paths) for group in groups
  }

  totals: dict[int, int] = {}
  for group in groups:
    small = min(views[group.paths[0]].rows, views[group.paths[0]].columns)
    totals[small] = totals.get(small, 0) + counts[id(group)]

  def cost(deal: Axes) -> float:
    split = division.size(tuple(n for n in division.sizes if n not in deal))
    slots: dict[int, int] = {}
    flops = numbers = 0.0
    for group in groups:
      view = views[group.paths[0]]
      small, long = sorted((view.rows, view.columns))
      each = -(-counts[id(group)] // division.size(deal))
      slots[small] = slots.get(small, 0) + each
      flops += each * 4 * small**2 * long / split
      if deal:
        numbers += 2 * each * small * long / split * (1 - 1 / division.size(deal))
    for small, count in slots.items():
      if split == 1:  # What only fills up is not worked on.
        solved, summed = -(-totals[small] // division.size(deal)), 0
      elif 2 * count >= split:  # As `solvers._split` has it: dealt, filled up; or left everywhere.
        solved = -(-count // split)
        summed = solved * split
      else:
        solved = summed = count
      flops += solved * USUAL_PRODUCTS * 2 * small**3
      numbers += 2 * summed * small**2 * (1 - 1 / split)
    return flops + FLOPS_A_BYTE * 4 * numbers

  # One alone is in parts as it is: no device gets the whole of it.
  alone = max(counts.values()) == 1
  candidates = [
    deal
    for size in range(len(division.work_axes), -1, -1)
    for deal in itertools.combinations(division.work_axes, size)
    if not (alone and deal)
  ]
  deal = min(candidates, key=cost)
  return deal, tuple(n for n in division.sizes if n not in deal)


# ---------------------------------------------------------------------------------
# Solving
# ---------------------------------------------------------------------------------


def _numbered(division: Division, axis: str) -> jax.Array:
  """For every device along a mesh axis its number."""
  numbers = jnp.arange(division.sizes[axis], dtype=jnp.int32)
  kinds = dict(zip(division.mesh.axis_names, division.mesh.axis_types, strict=True))
  if kinds[axis] == AxisType.Explicit:
    return jax.sharding.reshard(numbers, NamedSharding(division.mesh, PartitionSpec(axis)))
  return numbers


def _everywhere(x: jax.Array) -> jax.Array:
  sharding = jax.typeof(x).sharding
  if all(axis is None for axis in sharding.spec):
    return x
  return jax.sharding.reshard(x, PartitionSpec())


def solve_batches(
  division: Division,
  batches: Sequence[solvers.Batch],
  paths: Sequence[Sequence[str]],
  leaves: Mapping[str, jax.Array],
  noise: Mapping[str, jax.Array],
  views: Mapping[str, layout.MatrixView],
  *,
  update_rms: float | jax.Array | None,
  rms_of: Mapping[str, str],
  normalize: str | None,
  solver: str,
  tolerance: float,
  choose_rank: bool,
) -> tuple[dict[str, jax.Array], list[solvers.Spectrum]]:
  """As `solvers.solve_batches`, of parameters in parts, and every device its share.

  Args:
    division: Of `divide`.
    batches: Without their matrices, all of one dtype.
    paths: For each batch the parameters that its matrices are of, in order.
    leaves: The parameters' gradients or momenta, by path.
    noise: `solvers.Batch.noise` of those that have any, by path.
    views: Theirs.
    update_rms: As for `scale_by_spectral_transfer`.
    rms_of: Of each parameter, see `update_size.to_rms`.
    normalize: See `solvers.solve_batches`.
    solver: See `solvers.solve_batches`.
    tolerance: See `solvers.solve_batches`.
    choose_rank: See `solvers.solve_batches`.

  Returns:
    Updates by path, in the shape, dtype and sharding of the parameter; and the spectra of
    each batch, whole on every device.
  """
  of_gram = all(
    solvers.SOLVERS[
      solvers.choose_solver(
        solver, b.alpha, b.damping, b.small, normalize=normalize, tolerance=tolerance
      )
    ].of_gram
    for b in batches
  )
  here = {path: views[path] for of in paths for path in of}
  deal, split = choose_deal(division, here, of_gram=of_gram)
  dtype = batches[0].basis.dtype

  specs, ids = {}, {}
  entry = lambda axes: None if not axes else axes[0] if len(axes) == 1 else axes
  for of in paths:
    start = 0
    for path in of:
      view, placement = views[path], division.placements[path]
      specs[path] = PartitionSpec(*map(entry, placement))
      count = math.prod(view.batch_shape)
      ids[path] = np.arange(start, start + count, dtype=np.int32).reshape(view.batch_shape)
      start += count

  def spread(xs: dict[str, Any], ns: dict[str, Any], given: Any, places: dict[str, jax.Array]):
    """On one device."""
    rms, traced = given

    def number(axes: Axes) -> jax.Array:
      """As `jax.lax.axis_index`, which JAX 0.9 can't lower inside another `shard_map`."""
      which = jnp.zeros((), jnp.int32)
      for name in axes:
        which = which * division.sizes[name] + places[name][0]
      return which

    local, members = [], []
    for of, batch, (alpha, damping, basis) in zip(paths, batches, traced, strict=True):
      alpha = batch.alpha if alpha is None else alpha
      damping = batch.damping if damping is None else damping
      pieces, noises, shares, reals, groups, first = [], [], [], [], [], 0
      at_most: dict[int, int] = {}
      kinds = {path: (path in ns, rms_of[path]) for path in of}
      for group in _groups(division, {path: views[path] for path in of}, kinds):
        counts, numbers = [], []
        for path in group.paths:
          view = views[path]
          counts.append(math.prod(xs[path].shape[a] for a in view.batch_axes))
          numbers.append(_own_numbers(ids[path], view, division, number))
        view = views[group.paths[0]]
        noisy = group.paths[0] in ns
        tall = view.rows > view.columns or (noisy and view.rows == view.columns)

        how = group, division, number, deal, split, tall, first
        moved = _assemble(_together(xs, group, views), *how)
        noise = _assemble(_together(ns, group, views), *how).x.astype(dtype) if noisy else None
        noises.append(noise)
        share, real, most = _numbers(jnp.concatenate(numbers), group, division, number, deal, first)
        # Where this leaves off, the next begins: all together, nobody has more than one more.
        placed = {n for axes in group.placed for n in axes}
        at_once = len({n in placed for n in deal}) == 1  # Else in two steps.
        if group.batch_axes or not at_once:
          at_most[id(group)] = most
        else:
          at_most[0] = at_most.get(0, 0) + sum(counts)
          first = (first + sum(counts)) % division.size(deal)
        pieces.append(moved.x.astype(dtype))
        shares.append(share)
        reals.append(real)
        groups.append((group, moved, counts, tall))
      share, real = jnp.concatenate(shares), jnp.concatenate(reals)
      local.append(
        solvers.Batch(
          pieces,
          alpha,
          damping,
          jnp.take(basis, share, axis=0),
          share,
          split,
          number(split),
          real,
          sum(-(-n // division.size(deal)) if key == 0 else n for key, n in at_most.items()),
          noises,
        )
      )
      members.append((groups, share, real))
    solved = solvers.solve_batches(
      local, normalize=normalize, solver=solver, tolerance=tolerance, choose_rank=choose_rank
    )
    updates, spectra = {}, []
    for (results, spectrum), (groups, share, real), batch in zip(
      solved, members, batches, strict=True
    ):
      for matrices, (group, moved, counts, tall) in zip(results, groups, strict=True):
        view = views[group.paths[0]]
        if rms is not None:
          # In parts of the longer side, that is the first of the two axes.
          across = bool(split) and not tall
          matrices = update_size.to_rms(
            matrices,
            rms,
            rms_of[group.paths[0]],
            rows=(-1,) if across else (-2,),
            columns=(-2,) if across else (-1,),
            shape=(view.rows, view.columns),
            rows_over=() if across else split,
            columns_over=split if across else (),
          )
        y = moved.undo(matrices.astype(xs[group.paths[0]].dtype))
        for path, part in zip(group.paths, jnp.split(y, np.cumsum(counts)[:-1]), strict=True):
          updates[path] = _to_leaf(part, views[path], xs[path].shape).astype(xs[path].dtype)
      spectra.append(
        solvers.Spectrum(*(_everyones(x, share, real, len(batch.alpha), deal) for x in spectrum))
      )
    return updates, spectra

  none_if_known = lambda x: None if solvers.known(x) else _everywhere(x)
  given = (
    None if update_rms is None else jnp.asarray(update_rms, dtype),
    [(none_if_known(b.alpha), none_if_known(b.damping), _everywhere(b.basis)) for b in batches],
  )
  ns = {path: noise[path] for path in specs if path in noise}
  specs_of_noise = {path: specs[path] for path in ns}
  shared = jax.shard_map(
    spread,
    mesh=division.mesh,
    in_specs=(
      specs,
      specs_of_noise,
      PartitionSpec(),
      {name: PartitionSpec(name) for name in division.sizes},
    ),
    out_specs=(specs, PartitionSpec()),
    axis_names=set(division.sizes),
    check_vma=False,
  )
  xs = {path: leaves[path] for path in specs}
  if not any(isinstance(x, jax.core.Tracer) for x in xs.values()):
    shared = jax.jit(shared)  # Operation by operation, on every device, takes many times longer.
  return shared(xs, ns, given, {n: _numbered(division, n) for n in division.sizes})


def _together(
  xs: Mapping[str, jax.Array], group: _Group, views: Mapping[str, layout.MatrixView]
) -> jax.Array:
  """A group's parameters as one: (batch, rows..., columns...)."""
  parts = []
  for path in group.paths:
    x = jnp.transpose(xs[path], views[path].batch_axes + views[path].matrix_axes)
    parts.append(x.reshape(-1, *x.shape[len(views[path].batch_axes) :]))
  return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _to_leaf(x: jax.Array, view: layout.MatrixView, shape: tuple[int, ...]) -> jax.Array:
  """(batch, rows..., columns...) to the parameter's axes."""
  order = view.batch_axes + view.matrix_axes
  x = x.reshape([shape[a] for a in order])
  return jnp.transpose(x, sorted(range(len(order)), key=order.__getitem__))


def _everyones(
  x: jax.Array, share: jax.Array, real: jax.Array, count: int, deal: Axes
) -> jax.Array:
  """From one of each matrix that a device has to one of each that there is."""
  place = jnp.where(real, share, count)
  mine = jnp.zeros((count + 1, *x.shape[1:]), x.dtype).at[place].set(x)[:count]
  return jax.lax.psum(mine, deal) if deal else mine
