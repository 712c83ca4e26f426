"""A parameter seen as a batch of matrices, and what kind of layer it belongs to.

The type is `optax.contrib.MuonDimensionNumbers`: the axes of a parameter that are
reduced over (rows), those that are produced (columns); every other axis is a batch
axis. What Flax, Equinox and Haiku call and shape their parameters is known here
and nowhere else, so that a user need not write it down.

How a shape is read, strongest evidence first:
  1. the name of the leaf: `kernel` and the like are weights, `bias`, `scale` and
     anything in a normalisation layer are not, `embedding` is a table;
  2. the bias beside it: a kernel has as many axes more than its bias as it has
     reduction axes, and both share the axes in front (layers stacked for `scan`);
  3. for kernels without a bias, the nearest other bias or scale: one with more
     axes than one layer's says that the layers are stacked;
  4. the names around it (`query`, `out`, `Conv_0`, ...).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

WeightDimNumOrFn = MuonDimensionNumbers | Any | Callable[[Any], Any]


# ---------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------


def path_string(path: tuple[Any, ...]) -> str:
  """``'layers/0/kernel'``, the same for a dict, a dataclass and an `nnx.State`."""
  # Flax wraps a parameter in a Variable, before an update but not during one.
  if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == 'value':
    path = path[:-1]
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _is_masked(x: Any) -> bool:
  return isinstance(x, optax.MaskedNode)


def _is_dimension_numbers(x: Any) -> bool:
  return x is None or isinstance(x, MuonDimensionNumbers)


def leaves_by_path(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
  """The leaves of a tree, in its order, by `path_string`."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  return {path_string(path): leaf for path, leaf in flat}


def _prefixes(path: str) -> Iterator[str]:
  """The path itself, then everything above it, the root ('') last."""
  while path:
    yield path
    path = path.rpartition('/')[0]
  yield ''


def match_prefix(entries: Mapping[str, Any], params: Any, name: str) -> dict[str, Any]:
  """For each parameter, the entry with the longest path that leads to it.

  This is how a full tree, a prefix tree, a single value (path '') and a flat dict
  by path are all read.

  Args:
    entries: Values by path, as `leaves_by_path` gives them.
    params: The parameter tree; `optax.MaskedNode`s stand for what is not there.
    name: Of the argument, for the error.

  Returns:
    Values by path, for those parameters that have one.

  Raises:
    ValueError: an entry leads nowhere, so the trees do not match.
  """
  known = leaves_by_path(params, is_leaf=_is_masked)
  masked = {path for path, leaf in known.items() if _is_masked(leaf)}
  matched, used = {}, set()
  for path in known:
    for prefix in _prefixes(path):
      if prefix in entries:
        used.add(prefix)
        if path not in masked:
          matched[path] = entries[prefix]
        break
  stray = [
      path
      for path in entries
      if path not in used
      # A more general entry may be wholly overridden, and a mask may hide a subtree.
      and not any(path in _prefixes(p) for p in known)
      and masked.isdisjoint(_prefixes(path))
  ]
  if stray:
    raise ValueError(
        f'{name} does not match the parameters: it has an entry at {stray[0]!r}, where'
        f' there is no parameter. The parameters are {_listing(known)}.'
    )
  return matched


def _listing(paths: Any, most: int = 8) -> str:
  paths = list(paths)
  more = f' and {len(paths) - most} more' if len(paths) > most else ''
  return ', '.join(map(repr, paths[:most])) + more


# ---------------------------------------------------------------------------------
# Matrix views
# ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MatrixView:
  """How one parameter is read as a batch of matrices.

  Attributes:
    path: Of the parameter.
    shape: Of the parameter.
    batch_axes: Axes that number the matrices, in order.
    reduction_axes: Axes that together are the rows, in the user's order.
    output_axes: Axes that together are the columns, in the user's order.
  """

  path: str
  shape: tuple[int, ...]
  batch_axes: tuple[int, ...]
  reduction_axes: tuple[int, ...]
  output_axes: tuple[int, ...]

  def _sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(self.shape[a] for a in axes)

  @property
  def batch_shape(self) -> tuple[int, ...]:
    return self._sizes(self.batch_axes)

  @property
  def rows(self) -> int:
    return math.prod(self._sizes(self.reduction_axes))

  @property
  def columns(self) -> int:
    return math.prod(self._sizes(self.output_axes))

  @property
  def matrix_axes(self) -> tuple[int, ...]:
    return self.reduction_axes + self.output_axes

  def to_matrices(self, x: jax.Array) -> jax.Array:
    """The parameter's shape -> (batch, rows, columns)."""
    x = jnp.transpose(x, self.batch_axes + self.matrix_axes)
    return x.reshape(-1, self.rows, self.columns)

  def from_matrices(self, matrices: jax.Array) -> jax.Array:
    """(batch, rows, columns) -> the parameter's shape."""
    order = self.batch_axes + self.matrix_axes
    x = matrices.reshape(self._sizes(order))
    return jnp.transpose(x, sorted(range(len(order)), key=order.__getitem__))


def matrix_view(path: str, shape: tuple[int, ...], numbers: MuonDimensionNumbers) -> MatrixView:
  """Checks dimension numbers against a shape.

  Raises:
    ValueError: an axis that the parameter does not have, or one named twice.
  """

  def axes(value: Any, which: str) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    for axis in value:
      if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f'weight_dimension_numbers of {path!r}: {which} {axis} is not an axis of its'
            f' shape {shape}. Give axes of this parameter, or None to leave it to AdamW.'
        )
    return tuple(axis % len(shape) for axis in value)

  reduction = axes(numbers.reduction_axis, 'reduction_axis')
  output = axes(numbers.output_axis, 'output_axis')
  named = reduction + output
  if len(set(named)) != len(named) or not reduction or not output:
    raise ValueError(
        f'weight_dimension_numbers of {path!r} with shape {shape}: reduction_axis'
        f' {reduction} and output_axis {output} must not be empty and must name no axis'
        ' twice.'
    )
  batch = tuple(a for a in range(len(shape)) if a not in named)
  return MatrixView(path, shape, batch, reduction, output)


def matrix_views(
    params: Any, weight_dimension_numbers: WeightDimNumOrFn | None = None
) -> dict[str, MatrixView]:
  """The matrices among the parameters, by path; the others are left out.

  Args:
    params: Parameter tree, of arrays or `jax.ShapeDtypeStruct`s.
    weight_dimension_numbers: None to infer (see `weight_dimension_numbers`), or a
      tree, a prefix tree or a callable that gives one. One entry for many
      parameters (a prefix) leaves those with fewer than two axes out, as
      `optax.contrib.muon` does.

  Raises:
    ValueError: entries that do not match the tree or a shape.
    TypeError: a complex matrix.
  """
  numbers = weight_dimension_numbers
  leaves = leaves_by_path(params)
  if numbers is None:
    entries = _infer(leaves).numbers
  else:
    if callable(numbers):
      numbers = numbers(params)
    entries = match_prefix(
        leaves_by_path(numbers, is_leaf=_is_dimension_numbers), params,
        'weight_dimension_numbers')
  exact = leaves_by_path(numbers, is_leaf=_is_dimension_numbers) if numbers is not None else {}
  views = {}
  for path, entry in entries.items():
    leaf = leaves[path]
    if entry is None or (path not in exact and len(leaf.shape) < 2) or 0 in leaf.shape:
      continue
    if not isinstance(entry, MuonDimensionNumbers):
      raise ValueError(
          f'weight_dimension_numbers of {path!r} must be an optax.contrib.MuonDimensionNumbers'
          f' or None, got {entry!r}.'
      )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise TypeError(
          f'{path!r} has dtype {leaf.dtype}, and a spectral transfer needs a real float'
          ' one. Set its weight_dimension_numbers to None, or mask it.'
      )
    views[path] = matrix_view(path, tuple(leaf.shape), entry)
  return views


# ---------------------------------------------------------------------------------
# Inference from names and shapes
# ---------------------------------------------------------------------------------

_WEIGHT = re.compile(r'(kernel|weight|w)(_\w+)?$|lora_[ab]$', re.I)
_BIAS = re.compile(r'(bias|b|offset|beta)(_\w+)?$', re.I)
_SCALE = re.compile(r'(scale|gamma|mean|var|norm)$', re.I)
_NORM = re.compile(r'norm|^(ln|bn|gn|rms)(_?\d+|_.*)?$', re.I)
_EMBEDDING = re.compile(r'embed|^(wte|wpe|pos|cls)($|_)', re.I)
_PATCHES = re.compile(r'patch', re.I)
_CONV = re.compile(r'conv', re.I)
_DENSE = re.compile(r'dense|linear|einsum', re.I)
_QKV = re.compile(r'^(q|k|v|query|key|value|qkv|kv)(_?proj(ection)?|_kernel|_dense)?$|^(c_attn|in_proj|to_(q|k|v|qkv|kv))$', re.I)
_ATTENTION_OUT = re.compile(r'^(out|o|output|proj|c_proj|attn_out|to_out)(_?proj(ection)?|_kernel)?$', re.I)
_ATTENTION = re.compile(r'attn|attention|^(mha|mhsa|msa)', re.I)
_UP = re.compile(r'^(up|gate|gate_up)(_?proj)?$|^(fc|lin|linear|dense)_?(in|up)$|^(fc1|lin1|wi(_\d)?|c_fc|mlp_up|ff1|w1|w3)$', re.I)
_DOWN = re.compile(r'^down(_?proj)?$|^(fc|lin|linear|dense)_?(out|down)$|^(fc2|lin2|wo|mlp_down|ff2|w2|c_proj)$', re.I)
_MLP = re.compile(r'mlp|ffn?$|ffw|feed_?forward', re.I)
_HEAD = re.compile(r'head$|^(fc|logits?|classifier|lm_head|unembed\w*|output(_layer|_proj)?|readout)$', re.I)

# A small first axis beside a larger second one: a 1-D convolution's window.
_LARGEST_WINDOW = 15


@dataclasses.dataclass(frozen=True)
class _Inferred:
  numbers: dict[str, MuonDimensionNumbers | None]
  types: dict[str, str | None]


def _parent(path: str) -> str:
  return path.rpartition('/')[0]


def _names(path: str) -> list[str]:
  return path.split('/')


def _is_vector_name(name: str) -> bool:
  return bool(_BIAS.fullmatch(name) or _SCALE.fullmatch(name))


def _own_bias(path: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
  for name in ('bias', 'b'):
    shape = shapes.get('/'.join([*_names(path)[:-1], name]))
    if shape is not None:
      return shape
  return None


def _stack_depth_around(path: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
  """Leading axes that the nearest other bias or scale says are stacked layers."""
  own = _parent(path)
  for top in list(_prefixes(own)):
    inside = {
        p: s for p, s in shapes.items()
        if top == '' or p == top or p.startswith(top + '/')
    }
    vectors = [
        s for p, s in inside.items()
        if _is_vector_name(_names(p)[-1]) and _parent(p) != own
    ]
    if vectors:
      depth = min(len(s) for s in vectors) - 1
      lead = shapes[path][:depth]
      return depth if all(s[:depth] == lead for s in inside.values()) else 0
  return None


def _is_attention(path: str, paths: set[str]) -> tuple[bool, bool]:
  """Whether a weight projects into attention (q, k, v), or out of it."""
  names = _names(path)
  layer = names[-1] if len(names) == 1 or not _WEIGHT.fullmatch(names[-1]) else names[-2]
  above = names[: -1 if layer == names[-1] else -2]
  room = '/'.join(above)
  siblings = {
      _names(p)[len(above)] for p in paths
      if (room == '' or p.startswith(room + '/')) and len(_names(p)) > len(above)
  }
  near = any(_ATTENTION.search(n) for n in above[-2:])
  has_qkv = sum(bool(_QKV.fullmatch(s)) for s in siblings) >= 2
  into = bool(_QKV.fullmatch(layer)) and (near or has_qkv or layer not in ('q', 'k', 'v', 'key', 'value'))
  out = bool(_ATTENTION_OUT.fullmatch(layer)) and (near or has_qkv)
  return into, out


def _mlp_side(path: str, rows: int, columns: int, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
  """"mlp_up" or "mlp_down" for the feed-forward part of a transformer block."""
  names = _names(path)
  layer = names[-2] if len(names) > 1 and _WEIGHT.fullmatch(names[-1]) else names[-1]
  above = names[: -2 if layer != names[-1] else -1]
  in_mlp = any(_MLP.search(n) for n in above)
  # Up and down lead to and from a wider space, and sit beside an attention layer.
  block = above[:-1] if above and in_mlp else above
  room = '/'.join(block)
  beside_attention = any(
      any(_ATTENTION.search(n) or _QKV.fullmatch(n) for n in _names(p)[len(block):-1])
      for p in shapes
      if room == '' or p.startswith(room + '/')
  )
  if _UP.fullmatch(layer) and (in_mlp or beside_attention):
    return 'mlp_up'
  if _DOWN.fullmatch(layer) and (in_mlp or beside_attention):
    return 'mlp_down'
  if rows == columns or not beside_attention:
    return None
  partner = any(
      p != path and len(s) >= 2 and s[-2:] == (columns, rows)
      for p, s in shapes.items()
      if p.startswith('/'.join(above) + '/' if above else '')
  )
  if in_mlp or partner:
    return 'mlp_up' if columns > rows else 'mlp_down'
  return None


def _classify(path: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[MuonDimensionNumbers | None, str | None]:
  shape, names = shapes[path], _names(path)
  leaf, around = names[-1], names[:-1]
  layer = around[-1] if around else ''
  if _is_vector_name(leaf) or any(_NORM.search(n) for n in around[-1:]):
    return None, None
  is_weight = bool(_WEIGHT.fullmatch(leaf))
  out_first = bool(re.match(r'weight', leaf, re.I))  # Equinox and PyTorch; Flax: kernel.
  is_table = bool(_EMBEDDING.search(leaf)) or (
      leaf != 'kernel' and bool(_EMBEDDING.search(layer)) and not _PATCHES.search(layer)
      and len(shape) <= 3
  )
  if is_table:
    return None, 'embedding' if len(shape) >= 2 else None
  if len(shape) < 2 or (len(shape) > 2 and not is_weight):
    return None, None

  is_conv = any(_CONV.search(n) for n in around)
  into, out = _is_attention(path, set(shapes))
  depth, reductions = _split(path, shapes, out_first, is_conv, into, out)
  axes = tuple(range(len(shape)))
  batch, matrix = axes[:depth], axes[depth:]
  if len(matrix) < 2:
    return None, None
  if out_first:
    rows, columns = matrix[1:], matrix[:1]
  else:
    rows, columns = matrix[:reductions], matrix[reductions:]
  del batch
  numbers = MuonDimensionNumbers(reduction_axis=rows, output_axis=columns)

  size = lambda which: math.prod(shape[a] for a in which)
  window = len(matrix) == 3 and shape[matrix[0]] <= min(_LARGEST_WINDOW, shape[matrix[1]])
  if into or out:
    kind = 'attention'
  elif is_conv or len(matrix) >= 4 and len(columns) == 1:
    kind = 'conv'
  elif len(matrix) == 3 and len(columns) == 1 and (out_first or window) and not any(_DENSE.search(n) for n in around):
    kind = 'conv'
  elif (side := _mlp_side(path, size(rows), size(columns), shapes)) is not None:
    kind = side
  elif _HEAD.search(layer or leaf):
    kind = 'head'
  else:
    kind = 'dense'
  return numbers, kind


def _split(
    path: str, shapes: Mapping[str, tuple[int, ...]], out_first: bool, is_conv: bool,
    into: bool, out: bool,
) -> tuple[int, int]:
  """(stacked leading axes, reduction axes) of a weight."""
  shape, bias = shapes[path], _own_bias(path, shapes)
  around = _stack_depth_around(path, shapes)
  if out_first:
    if bias:
      # (O,), or (O, 1, 1) beside a convolution, after the stacked axes.
      depth = next(i for i in range(len(bias)) if all(n == 1 for n in bias[i + 1:]))
      if depth <= len(shape) - 2 and shape[: depth + 1] == bias[: depth + 1]:
        return depth, len(shape) - depth - 1
    depth = min(around or 0, len(shape) - 2)
    return depth, len(shape) - depth - 1
  if bias is not None and 0 < len(bias) < len(shape):
    reductions = len(shape) - len(bias)
    fits = [
        d for d in range(len(bias))
        if bias == shape[:d] + shape[d + reductions:]
    ]
    if fits:
      if len(fits) > 1 and (is_conv or out):  # These have one output axis.
        return fits[-1], reductions
      if len(fits) > 1 and around in fits and not into:
        return around, reductions
      return fits[0], reductions
  depth = min(around or 0, len(shape) - 2)
  axes = len(shape) - depth
  return depth, 1 if axes == 2 or (into and axes == 3) else axes - 1


def _infer(leaves: Mapping[str, Any]) -> _Inferred:
  shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items() if hasattr(leaf, 'shape')}
  found = {
      path: _classify(path, shapes)
      if path in shapes and jnp.issubdtype(leaf.dtype, jnp.inexact) else (None, None)
      for path, leaf in leaves.items()
  }
  return _Inferred({p: f[0] for p, f in found.items()}, {p: f[1] for p, f in found.items()})


def layer_types_by_path(params: Any) -> dict[str, str | None]:
  return _infer(leaves_by_path(params)).types


def weight_dimension_numbers(params: Any) -> Any:
  """Which axes of each parameter are rows and columns, from names and shapes.

  Known without configuration: the layers of Flax `nnx` and `linen` (Dense, Conv,
  ConvTranspose, DenseGeneral, attention, recurrent cells, Einsum) and of Equinox,
  stacked for `scan` or not. A convolution (H, W, I, O) is the matrix (H·W·I) × O,
  attention's query, key and value (D, H, K) are D × (H·K), its output (H, K, D) is
  (H·K) × D.

  What a shape cannot show: the groups of a grouped or depthwise convolution (it is
  read as the one matrix (H·W·I/groups) × O), whether a transposed convolution
  stores its kernel transposed (read as if it did not), and where a DenseGeneral
  without bias and without a telling name splits its axes (before the last). Pass
  your own tree for those.

  Args:
    params: Parameter tree: dicts, `FrozenDict`, `nnx.State`, lists, dataclasses; of
      arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    A tree of that structure: `optax.contrib.MuonDimensionNumbers` for a matrix,
    None for anything else (biases, scales, embeddings), which goes to AdamW.
  """
  numbers = _infer(leaves_by_path(params)).numbers
  return jax.tree.unflatten(jax.tree.structure(params), list(numbers.values()))


def layer_types(params: Any) -> Any:
  """The kind of layer that each parameter belongs to, from names and shapes.

  Args:
    params: As for `weight_dimension_numbers`.

  Returns:
    A tree of that structure: ``"conv"``, ``"dense"``, ``"attention"`` (query, key,
    value and output), ``"mlp_up"`` and ``"mlp_down"`` (the two sides of a
    transformer's feed-forward part), ``"head"``, ``"embedding"``, or None for what
    is not a weight.
  """
  return jax.tree.unflatten(
      jax.tree.structure(params), list(layer_types_by_path(params).values())
  )
