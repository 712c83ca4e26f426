"""What goes into each layer and what comes back to it: activations and errors.

A layer multiplies its kernel W, seen as a matrix of n rows (inputs) and m columns (outputs),
with one row of inputs after the other,

    z_i = Wᵀ a_i,      δ_i = ∂(Σ_b ℓ_b) / ∂z_i,      ∂L/∂W = (1/B) Σ_i a_i δ_iᵀ,

where ℓ_b is the loss of the b-th of B samples and L = (1/B) Σ_b ℓ_b. A dense layer on (B, n) has
B rows; one on a sequence, and a convolution, whose a_i are the patches it sees (im2col), have a
row for each position of each sample; a layer that is used twice has the rows of both.

The loss is read as the program that JAX makes of it (a jaxpr), and a kernel is known by where it
ends up: as one side of a `dot_general` or of a convolution, whatever moved its axes on the way.
So no framework needs to be asked, nor a model changed: strides, padding, dilation, axes and dtypes
are those the program has, and layers inside `jit`, `remat`, `vmap` and `scan` are found too. To
every such product we add a zero, and differentiate by it.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from spectral_optax import layout


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['activations', 'errors'],
  meta_fields=['num_samples'],
)
@dataclasses.dataclass(frozen=True, eq=False)
class LayerCapture:
  """Inputs of one kernel and what is propagated back to its outputs, row by row.

  Attributes:
    activations: a_i, (N, n), in the dtype the layer computes with; N is the number of
      samples times the positions in each. Columns are in the order of the rows of the
      kernel's `layout.MatrixView`. Layers stacked in one parameter: (layers, N, n).
    errors: δ_i, (N, m), of the *sum* of the losses of the samples: not divided by
      their number. Columns are in the order of the view's columns.
    num_samples: B, what the loss is a mean over.
  """

  activations: jax.Array
  errors: jax.Array
  num_samples: int

  def gradient(self) -> jax.Array:
    """``(1/B) Σ_i a_i δ_iᵀ``, (n, m): the gradient of the mean loss, as its matrix view."""
    return jnp.einsum('...ia,...id->...ad', self.activations, self.errors) / self.num_samples


def capture_layers(
  loss_fn: Callable[[Any], jax.Array],
  params: Any,
  *,
  num_samples: int | None = None,
  weight_dimension_numbers: layout.WeightDimNumOrFn | None = None,
  paths: Iterable[str] | None = None,
  unsupported: str = 'raise',
) -> dict[str, LayerCapture]:
  """Activations and errors of every layer of any JAX loss, by the path of its kernel.

  Can be jitted, and then is much faster when called again. Memory: every activation of
  the layers asked for, of a convolution kernel_height x kernel_width times its input.
  Rematerialisation (`jax.checkpoint`) around a captured layer is not kept.

  Args:
    loss_fn: Takes the parameters; returns the losses of the samples, (B,), or their
      mean, a scalar. Leave regularisation of the parameters out of it. Where samples
      meet (batch normalisation in training mode), the error of a row is the derivative
      of the losses of all samples by it, and still ``(1/B) Σ_i a_i δ_iᵀ`` is the gradient.
    params: Parameter tree.
    num_samples: B, where `loss_fn` returns a scalar.
    weight_dimension_numbers: As for `spectral_optax.spectral_newton`: which parameters
      are matrices, and how.
    paths: Of the parameters to capture; None for all matrices.
    unsupported: What to do with a matrix that is not used, or not as one side of a
      product: ``"raise"``, or ``"skip"`` to leave it out. Grouped convolutions are
      such (their groups have a matrix each), masked kernels, products of two parameters,
      kernels under `lax.cond` or `lax.while_loop`.

  Returns:
    A `LayerCapture` for each path, in the order of the parameters.

  Raises:
    ValueError: an unsupported use, with the path and the reason; a path that is none of
      a matrix; a loss that is neither a scalar nor a vector; `num_samples` missing.
  """
  if unsupported not in ('raise', 'skip'):
    raise ValueError(f"unsupported must be 'raise' or 'skip', got {unsupported!r}.")
  views = layout.matrix_views(params, weight_dimension_numbers)
  if paths is not None:
    chosen = set(paths)
    if unknown := chosen - set(views):
      raise ValueError(
        f'paths has {min(unknown)!r}, where no matrix is. The matrices are {sorted(views)}.'
      )
    views = {path: view for path, view in views.items() if path in chosen}
  leaves, treedef = jax.tree.flatten(params)
  closed = jax.make_jaxpr(lambda *leaves: loss_fn(treedef.unflatten(leaves)))(*leaves)
  samples = _num_samples(closed.out_avals, num_samples)

  weights = [
    _Weight(path, np.arange(np.size(leaf)).reshape(np.shape(leaf))) if path in views else None
    for path, leaf in zip(layout.leaves_by_path(params), leaves, strict=True)
  ]
  problems: dict[str, str] = {}
  plan = _plan(closed.jaxpr, weights, problems)
  placed: dict[str, list[tuple[int, _Placement]]] = {path: [] for path in views}
  for number, site in enumerate(plan.sites):
    try:
      placed[site.weight.path].append((number, _place(site, views[site.weight.path])))
    except _UnsupportedError as error:
      problems.setdefault(site.weight.path, str(error))
  for path, view in views.items():
    rows_of = dict.fromkeys(range(math.prod(view.batch_shape)), 0)
    for number, placement in placed[path]:
      for matrix in placement.matrices:
        rows_of[matrix] += plan.sites[number].rows
    if not all(rows_of.values()):
      problems.setdefault(path, 'the loss does not use it, or not all of it, in a product')
    elif len(set(rows_of.values())) > 1:
      problems.setdefault(path, 'its layers are not all as often used as each other')
  if problems and unsupported == 'raise':
    raise ValueError(
      'These layers have no activations and errors, or not these alone: '
      + '; '.join(f'{p!r} with shape {views[p].shape}: {why}' for p, why in problems.items())
      + ". Leave them out with paths=..., or all such with unsupported='skip'."
    )

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def errors_and_activations(zeros, consts, leaves):
    (loss,), activations = _run(plan, closed.jaxpr, consts, leaves, iter(zeros))
    return jnp.sum(loss) * (samples if loss.ndim == 0 else 1), activations

  zeros = [site.zeros for site in plan.sites]
  errors, activations = errors_and_activations(zeros, closed.consts, leaves)
  rows = [
    tuple(map(_merge_loops(site), (a, site.error_rows(d))))
    for site, a, d in zip(plan.sites, activations, errors, strict=True)
  ]
  return {
    path: LayerCapture(*_assemble(view, placed[path], rows), samples)
    for path, view in views.items()
    if path not in problems
  }


def _num_samples(avals: Sequence[Any], given: int | None) -> int:
  shapes = [aval.shape for aval in avals]
  if len(shapes) != 1 or len(shapes[0]) > 1:
    raise ValueError(
      'loss_fn must return the losses of the samples, one axis, or their mean, a scalar; it'
      f' returns {len(shapes)} array(s) of shape {", ".join(map(str, shapes))}.'
    )
  (shape,) = shapes
  if not jnp.issubdtype(avals[0].dtype, jnp.floating):
    raise ValueError(f'loss_fn must return real numbers, not {avals[0].dtype}.')
  if not shape and given is None:
    raise ValueError(
      'loss_fn returns a scalar, so say over how many samples it is the mean: num_samples=...'
    )
  if shape and given not in (None, shape[0]):
    raise ValueError(f'num_samples is {given}, and loss_fn returns {shape[0]} losses.')
  samples = shape[0] if given is None else given
  if samples < 1:
    raise ValueError(f'num_samples must be positive, got {samples}.')
  return samples


# ---------------------------------------------------------------------------------
# Where kernels end up
# ---------------------------------------------------------------------------------


class _UnsupportedError(Exception):
  """Why a use of a kernel has no rows of activations and errors."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Weight:
  """A value in the program that holds entries of one parameter and nothing else.

  Attributes:
    path: Of the parameter.
    index: Where each entry of the value is in the flat parameter, of the value's shape;
      in a loop over stacked layers: in the first turn.
    loops: The loops around, outermost first: how many turns, and how much further in the
      flat parameter each turn's part is; 0 where all turns have the same.
  """

  path: str
  index: np.ndarray
  loops: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class _Site:
  """A product with a kernel.

  Attributes:
    weight: The kernel, its index brought to (batch, inputs, outputs).
    operand: Which operand of the product the activations are.
    activation_rows: That operand -> (batch, rows, inputs).
    error_rows: (turns of the loops..., the product's shape) -> (turns..., batch, rows, outputs).
    product: Shape and dtype of the product.
  """

  weight: _Weight
  operand: int
  activation_rows: Callable[[jax.Array], jax.Array]
  error_rows: Callable[[jax.Array], jax.Array]
  product: Any

  @property
  def rows(self) -> int:
    """Of activations and errors that this gives each of its kernels."""
    batch, _, outputs = self.weight.index.shape
    turns = math.prod(length for length, stride in self.weight.loops if not stride)
    return turns * math.prod(self.product.shape) // (batch * outputs)

  @property
  def zeros(self) -> jax.Array:
    """To add to the products in all turns of the loops around."""
    turns = tuple(length for length, _ in self.weight.loops)
    return jnp.zeros(turns + self.product.shape, self.product.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
  """Which equations of a jaxpr have products with kernels: themselves, or inside them."""

  steps: dict[int, '_Site | _Plan']
  outputs: list[_Weight | None]

  @functools.cached_property
  def sites(self) -> list[_Site]:
    """In the order in which they are run."""
    inside = ([s] if isinstance(s, _Site) else s.sites for s in self.steps.values())
    return list(itertools.chain.from_iterable(inside))


# What moves entries about, or changes their dtype: the index of what comes out.
_MOVES: Mapping[str, Callable[[np.ndarray, Any], np.ndarray]] = {
  'transpose': lambda index, eqn: index.transpose(eqn.params['permutation']),
  'rev': lambda index, eqn: np.flip(index, eqn.params['dimensions']),
  'slice': lambda index, eqn: index[
    tuple(
      map(
        slice,
        eqn.params['start_indices'],
        eqn.params['limit_indices'],
        eqn.params['strides'] or (1,) * index.ndim,
      )
    )
  ],
  **dict.fromkeys(
    (
      'reshape', 'squeeze', 'expand_dims', 'broadcast_in_dim', 'convert_element_type', 'copy',
      'copy_p', 'reduce_precision', 'sharding_constraint', 'reshard', 'layout_constraint',
      'mesh_cast', 'pvary',
    ),
    lambda index, eqn: index.reshape(_aval(eqn.outvars[0]).shape),
  ),
}  # fmt: skip

# Programs inside the program, run once with the arguments of the equation.
_CALLS = {'jit', 'pjit', 'closed_call', 'core_call', 'remat', 'remat2', 'checkpoint'}


def _plan(jaxpr: core.Jaxpr, weights: Sequence[_Weight | None], problems: dict[str, str]) -> _Plan:
  """Follows kernels through a program.

  Args:
    jaxpr: The program.
    weights: For each of its arguments, the kernel it is, if any.
    problems: Receives, by path, why a kernel has no activations or not these alone.
  """
  known = {v: w for v, w in zip(jaxpr.invars, weights, strict=True) if w is not None}
  steps: dict[int, _Site | _Plan] = {}
  for number, eqn in enumerate(jaxpr.eqns):
    operands = [None if isinstance(v, core.Literal) else known.get(v) for v in eqn.invars]
    kernels = [w for w in operands if w is not None]
    if not kernels:
      continue
    name = eqn.primitive.name
    outputs: Sequence[_Weight | None] = ()
    try:
      if name in _MOVES:
        outputs = [_moved(kernels[0], eqn)]
      elif name in ('dot_general', 'conv_general_dilated'):
        if len(kernels) > 1:
          raise _UnsupportedError('it is multiplied with a parameter, not with activations')
        find = _dot_site if name == 'dot_general' else _conv_site
        steps[number] = find(eqn, operands)
      elif name in _CALLS or name == 'scan':
        inside = _loop_weights(eqn, operands) if name == 'scan' else operands
        plan = _plan(_inner(eqn)[0], inside, problems)
        if plan.sites:
          steps[number] = plan
        # What a loop hands on has been stacked.
        outputs = plan.outputs if name != 'scan' else ()
      else:
        raise _UnsupportedError(f'it is used in {name!r}, which is no product')
    except _UnsupportedError as error:
      for weight in kernels:
        problems.setdefault(weight.path, str(error))
    known |= {v: w for v, w in zip(eqn.outvars, outputs, strict=False) if w is not None}
  outs = [None if isinstance(v, core.Literal) else known.get(v) for v in jaxpr.outvars]
  return _Plan(steps, outs)


def _aval(variable: Any) -> Any:
  """Shape and dtype; everything that reaches a kernel is an array."""
  return variable.aval


def _inner(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Sequence[Any]]:
  inner = eqn.params['jaxpr'] if 'jaxpr' in eqn.params else eqn.params['call_jaxpr']
  return (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, ())


def _moved(weight: _Weight, eqn: core.JaxprEqn) -> _Weight:
  out, index = _aval(eqn.outvars[0]), weight.index
  if eqn.primitive.name != 'slice' and math.prod(out.shape) != index.size:
    raise _UnsupportedError('it is broadcast')
  if not jnp.issubdtype(out.dtype, jnp.floating):
    raise _UnsupportedError(f'it becomes {out.dtype}')
  return dataclasses.replace(weight, index=_MOVES[eqn.primitive.name](index, eqn))


def _loop_counts(eqn: core.JaxprEqn) -> tuple[int, int]:
  """How many constants and how many carried values a scan has."""
  if 'num_consts' in eqn.params:
    return eqn.params['num_consts'], eqn.params['num_carry']
  consts, carried, _ = eqn.params['ft_in'].unpack()  # JAX 0.12.
  return len(consts), len(carried)


def _loop_weights(eqn: core.JaxprEqn, operands: Sequence[_Weight | None]) -> list[_Weight | None]:
  """What the body of a scan gets of each operand."""
  num_consts, num_carried = _loop_counts(eqn)
  length = eqn.params['length']
  inside: list[_Weight | None] = []
  for i, weight in enumerate(operands):
    if weight is None:
      inside.append(None)
    elif i < num_consts:  # The same in every turn.
      loops = (*weight.loops, (length, 0))
      inside.append(dataclasses.replace(weight, loops=loops))
    elif i < num_consts + num_carried:
      raise _UnsupportedError('a loop changes it as it goes round')
    else:
      index = weight.index.reshape(length, -1)
      stride = int(index[1, 0] - index[0, 0]) if length > 1 else index.size
      if (index != index[0] + np.arange(length)[:, None] * stride).any():
        raise _UnsupportedError('a loop goes over its layers in another order than theirs')
      loops = (*weight.loops, (length, stride))
      inside.append(dataclasses.replace(weight, index=weight.index[0], loops=loops))
  return inside


def _grouped(x: Any, *groups: Sequence[int]) -> Any:
  """One axis for each group of axes; what no group names, the loops, stays in front."""
  loops = x.ndim - sum(map(len, groups))
  axes = [[loops + a for a in group] for group in groups]
  order = [*range(loops), *itertools.chain.from_iterable(axes)]
  sizes = [math.prod(x.shape[a] for a in group) for group in axes]
  return x.transpose(order).reshape(*x.shape[:loops], *sizes)


def _dot_site(eqn: core.JaxprEqn, operands: Sequence[_Weight | None]) -> _Site:
  contract, batch = eqn.params['dimension_numbers']
  kernel_is_right = operands[0] is None
  kernel, other = (1, 0) if kernel_is_right else (0, 1)
  weight = operands[kernel]
  assert weight is not None

  def free(operand: int) -> tuple[int, ...]:
    taken = (*batch[operand], *contract[operand])
    return tuple(a for a in range(len(_aval(eqn.invars[operand]).shape)) if a not in taken)

  # Of the product: batch axes, then those of the left operand, then those of the right one.
  start, middle = len(batch[0]), len(batch[0]) + len(free(0))
  left = tuple(range(start, middle))
  right = tuple(range(middle, middle + len(free(1))))
  rows, columns = (left, right) if kernel_is_right else (right, left)
  return _Site(
    dataclasses.replace(
      weight, index=_grouped(weight.index, batch[kernel], contract[kernel], free(kernel))
    ),
    other,
    lambda x: _grouped(x, batch[other], free(other), contract[other]),
    lambda x: _grouped(x, tuple(range(start)), rows, columns),
    _aval(eqn.outvars[0]),
  )


def _conv_site(eqn: core.JaxprEqn, operands: Sequence[_Weight | None]) -> _Site:
  p = eqn.params
  weight = operands[1]
  if weight is None:
    raise _UnsupportedError('it is what a convolution goes over')
  if p['feature_group_count'] > 1 or p['batch_group_count'] > 1:
    raise _UnsupportedError(
      'its convolution has groups, each of which is a matrix of its own, so that there is no'
      ' product of two factors for the whole'
    )
  lhs, rhs, out = p['dimension_numbers']
  spatial = rhs[2:]
  window = tuple(weight.index.shape[a] for a in spatial)
  # (1, window · inputs, outputs)
  index = _grouped(weight.index, (), (*spatial, rhs[1]), (rhs[0],))
  steps, dilation, strides = p['lhs_dilation'], p['rhs_dilation'], p['window_strides']
  out_sizes = tuple(_aval(eqn.outvars[0]).shape[a] for a in out[2:])

  def patches(x):
    x = x.transpose(lhs[0], *lhs[2:], lhs[1])
    padding = [(lo, hi, step - 1) for (lo, hi), step in zip(p['padding'], steps, strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *padding, (0, 0, 0)])
    seen = []
    for place in np.ndindex(*window):
      start = [i * d for i, d in zip(place, dilation, strict=True)]
      stop = [i + (n - 1) * s + 1 for i, n, s in zip(start, out_sizes, strides, strict=True)]
      seen.append(lax.slice(x, [0, *start, 0], [x.shape[0], *stop, x.shape[-1]], [1, *strides, 1]))
    return jnp.stack(seen, axis=-2).reshape(1, -1, len(seen) * x.shape[-1])

  return _Site(
    dataclasses.replace(weight, index=index),
    0,
    patches,
    lambda x: _grouped(x, (), (out[0], *out[2:]), (out[1],)),
    _aval(eqn.outvars[0]),
  )


# ---------------------------------------------------------------------------------
# Running the program with zeros added
# ---------------------------------------------------------------------------------


def _run(
  plan: _Plan,
  jaxpr: core.Jaxpr,
  consts: Sequence[Any],
  arguments: Sequence[Any],
  zeros: Iterator[jax.Array],
) -> tuple[list[Any], list[jax.Array]]:
  """Evaluates a program, adding one of `zeros` to each product with a kernel.

  Returns:
    What the program returns, and the activations of each site, in order.
  """
  values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
  read = lambda v: v.val if isinstance(v, core.Literal) else values[v]
  activations: list[jax.Array] = []
  for number, eqn in enumerate(jaxpr.eqns):
    operands = [read(v) for v in eqn.invars]
    step = plan.steps.get(number)
    if isinstance(step, _Plan) and eqn.primitive.name == 'scan':
      outs, found = _run_loop(step, eqn, operands, zeros)
      activations += found
    elif isinstance(step, _Plan):
      outs, found = _run(step, *_inner(eqn), operands, zeros)
      activations += found
    else:
      outs = bind(eqn, operands)
      if step is not None:
        outs = [outs[0] + next(zeros)]
        activations.append(step.activation_rows(operands[step.operand]))
    values |= zip(eqn.outvars, outs, strict=True)
  return [read(v) for v in jaxpr.outvars], activations


def bind(eqn: core.JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
  """The outputs of one equation of a program."""
  params, functions = eqn.primitive.get_bind_params(eqn.params), ()
  if isinstance(params, tuple):  # JAX 0.9.
    functions, params = params
  outs = eqn.primitive.bind(*functions, *operands, **params)
  return outs if eqn.primitive.multiple_results else [outs]


def _run_loop(
  plan: _Plan, eqn: core.JaxprEqn, operands: Sequence[Any], zeros: Iterator[jax.Array]
) -> tuple[list[Any], list[jax.Array]]:
  jaxpr, consts = _inner(eqn)
  num_consts, num_carried = _loop_counts(eqn)
  constants = operands[:num_consts]
  carried = operands[num_consts : num_consts + num_carried]
  stacked = operands[num_consts + num_carried :]

  def body(carried, turn):
    parts, zeros = turn
    outs, activations = _run(plan, jaxpr, consts, [*constants, *carried, *parts], iter(zeros))
    return outs[:num_carried], (outs[num_carried:], activations)

  own = list(itertools.islice(zeros, len(plan.sites)))
  carried, (outs, activations) = lax.scan(
    body,
    carried,
    (stacked, own),
    length=eqn.params['length'],
    reverse=eqn.params['reverse'],
    unroll=eqn.params['unroll'],
  )
  return [*carried, *outs], activations


# ---------------------------------------------------------------------------------
# From products to matrices
# ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Placement:
  """How the kernels of one site are the matrices of a view.

  Attributes:
    matrices: For each kernel of the site, which matrix of the view it is.
    inputs: For each kernel, which of its inputs is each row of the matrix.
    outputs: For each kernel, which of its outputs is each column of the matrix.
  """

  matrices: list[int]
  inputs: list[np.ndarray]
  outputs: list[np.ndarray]


def _place(site: _Site, view: layout.MatrixView) -> _Placement:
  kernels = site.weight.index
  for length, stride in reversed([loop for loop in site.weight.loops if loop[1]]):
    turns = np.arange(length)[:, None, None, None] * stride
    kernels = (turns + kernels).reshape(-1, *kernels.shape[1:])

  entries = np.arange(math.prod(view.shape)).reshape(view.shape)
  matrices = entries.transpose(view.batch_axes + view.matrix_axes)
  matrices = matrices.reshape(-1, view.rows, view.columns)
  where = np.empty(entries.size, np.int64)
  where[matrices.reshape(-1)] = np.arange(entries.size)
  placement = _Placement([], [], [])
  for kernel in kernels:
    number, row, column = np.unravel_index(where[kernel], matrices.shape)
    rows, columns = row[:, 0], column[0, :]
    if (
      kernel.shape != matrices.shape[1:]
      or (number != number[0, 0]).any()
      or (row != rows[:, None]).any()
      or (column != columns).any()
    ):
      raise _UnsupportedError(
        f'its rows are the axes {view.reduction_axes} and its columns the axes'
        f' {view.output_axes}, and the network multiplies over {_contracted(view, kernel)};'
        ' if those are whole axes, say so in weight_dimension_numbers'
      )
    placement.matrices.append(int(number[0, 0]))
    placement.inputs.append(np.argsort(rows))
    placement.outputs.append(np.argsort(columns))
  return placement


def _contracted(view: layout.MatrixView, kernel: np.ndarray) -> str:
  over = np.unravel_index(kernel[:, 0], view.shape)
  return f'the axes {tuple(a for a, i in enumerate(over) if np.ptp(i) > 0)}'


def _merge_loops(site: _Site) -> Callable[[jax.Array], jax.Array]:
  """(turns..., batch, rows, k) -> (matrices, all their rows, k)."""
  strides = [stride for _, stride in site.weight.loops]
  own = [i for i, stride in enumerate(strides) if stride]
  shared = [i for i, stride in enumerate(strides) if not stride]
  n = len(strides)

  def merge(x):
    x = x.transpose(*own, n, *shared, n + 1, n + 2)
    matrices = math.prod(x.shape[: len(own) + 1])
    return x.reshape(matrices, -1, x.shape[-1])

  return merge


def _assemble(
  view: layout.MatrixView,
  placed: Sequence[tuple[int, _Placement]],
  rows: Sequence[tuple[jax.Array, ...]],
) -> tuple[jax.Array, jax.Array]:
  """All rows of each matrix, in the order of its view."""

  def ordered(x: jax.Array, order: np.ndarray) -> jax.Array:
    return x if (order == np.arange(len(order))).all() else x[:, order]

  parts: list[list[tuple[jax.Array, jax.Array]]] = [[] for _ in range(math.prod(view.batch_shape))]
  for number, placement in placed:
    activations, errors = rows[number]
    for i, matrix in enumerate(placement.matrices):
      parts[matrix].append(
        (
          ordered(activations[i], placement.inputs[i]),
          ordered(errors[i], placement.outputs[i]),
        )
      )
  joined = [tuple(map(jnp.concatenate, zip(*part, strict=True))) for part in parts]
  activations, errors = map(jnp.stack, zip(*joined, strict=True))
  shape = view.batch_shape
  return (
    activations.reshape(*shape, *activations.shape[1:]),
    errors.reshape(*shape, *errors.shape[1:]),
  )
