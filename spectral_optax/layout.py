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
  3. the other biases and scales around it: when the nearest have more axes than one
     layer's, the layers are stacked; and the names of stacks (`ScanBlock_0`, `layers`);
  4. the name of the layer: attention's `query` and `out` split their axes differently.
"""

import dataclasses
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

WeightDimNumOrFn = MuonDimensionNumbers | Any | Callable[[Any], Any]


# ---------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------


def path_string(path: tuple[Any, ...]) -> str:
  """``'layers/0/kernel'``, the same for a dict, a dataclass and an `nnx.State`."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def is_function(x: Any) -> TypeGuard[Callable[..., Any]]:
  """Whether this is a callable to be called: an Equinox module is one, and a tree."""
  return callable(x) and jax.tree_util.all_leaves([x])


def _is_absent(x: Any) -> bool:
  return x is None or isinstance(x, optax.MaskedNode)


def _is_dimension_numbers(x: Any) -> bool:
  return x is None or isinstance(x, MuonDimensionNumbers)


def _is_variable(x: Any) -> bool:
  flax = sys.modules.get('flax.nnx')  # Whoever has a Variable has imported it.
  return flax is not None and isinstance(x, flax.Variable)


def leaves_by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
  """The leaves of a tree, in its order, by `path_string`.

  Raises:
    ValueError: two leaves have the same path, by a key with a slash in it.
  """

  # Flax wraps a parameter in a Variable, before an update but not during one: what is
  # inside has the Variable's path.
  def stop(x):
    return _is_variable(x) or (is_leaf is not None and is_leaf(x))

  leaves = {}
  for key, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)[0]:
    path = path_string(key)
    for leaf in jax.tree.leaves(node, is_leaf=is_leaf):
      if path in leaves:
        raise ValueError(f'Two leaves of the tree have the path {path!r}. Rename a key.')
      leaves[path] = leaf
  return leaves


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
    params: The parameter tree; `optax.MaskedNode` and None stand for what is not there.
    name: Of the argument, for the error.

  Returns:
    Values by path, for those parameters that have one.

  Raises:
    ValueError: an entry leads nowhere, so the trees do not match.
  """
  known = leaves_by_path(params, is_leaf=_is_absent)
  if not known:  # The placeholder of `optax.tree.map_params`: nothing to match with.
    return {}
  absent = {path for path, leaf in known.items() if _is_absent(leaf)}
  matched, used = {}, set()
  for path in known:
    for prefix in _prefixes(path):
      if prefix in entries:
        used.add(prefix)
        if path not in absent:
          matched[path] = entries[prefix]
        break
  # A more general entry may be wholly overridden, and a mask may hide a subtree.
  led_to = {prefix for path in known for prefix in _prefixes(path)} | {''}
  stray = [
    path
    for path in entries
    if path not in used and path not in led_to and absent.isdisjoint(_prefixes(path))
  ]
  if stray:
    raise ValueError(
      f'{name} does not match the parameters: it has an entry at {stray[0]!r}, where'
      f' there is no parameter. The parameters are {_listing(known)}.'
    )
  return matched


def _listing(paths: Iterable[str], most: int = 8) -> str:
  paths = list(paths)
  more = f' and {len(paths) - most} more' if len(paths) > most else ''
  return ', '.join(map(repr, paths[:most])) + more


def replicated(x: jax.Array) -> jax.Array:
  """Under explicit sharding, the whole of x on every device; else x itself.

  A singular value belongs to a whole matrix, and matrices that are stacked must
  agree on how they are split.
  """
  sharding = jax.typeof(x).sharding
  if all(axis is None for axis in sharding.spec):
    return x
  return jax.sharding.reshard(x, jax.sharding.PartitionSpec())


def sharded_like(x: jax.Array, like: jax.Array) -> jax.Array:
  """Under explicit sharding, x lying as another array does; else x itself."""
  sharding = jax.typeof(like).sharding
  if all(axis is None for axis in sharding.spec):
    return x
  return jax.sharding.reshard(x, sharding.spec)


@jax.tree_util.register_pytree_with_keys_class
class ByPath(Mapping[str, jax.Array]):
  """Arrays by parameter path, in one: a read-only mapping that is a single leaf.

  A step over a hundred matrices takes in and gives out a handful of arrays for what is
  known of them, not hundreds.

  Attributes:
    flat: All of them; leading axes (of a `vmap` over optimizers, say) come first.
    shapes: The paths and shapes, in the order in which they lie in `flat`.
  """

  def __init__(self, flat: Any, shapes: Sequence[tuple[str, tuple[int, ...]]]):
    self.flat = flat
    self.shapes = tuple(shapes)

  def __getitem__(self, path: str) -> jax.Array:
    start = 0
    for name, shape in self.shapes:
      end = start + math.prod(shape)
      if name == path:
        part = self.flat[..., start:end]
        return part.reshape(part.shape[:-1] + shape)
      start = end
    raise KeyError(path)

  def __iter__(self) -> Iterator[str]:
    return (path for path, _ in self.shapes)

  def __len__(self) -> int:
    return len(self.shapes)

  def __eq__(self, other: object) -> bool:
    # Of leaves that are not arrays too: trees of shapes, of flags.
    if not isinstance(other, ByPath):
      return NotImplemented
    return self.shapes == other.shapes and self.flat == other.flat

  __hash__ = None

  def __repr__(self) -> str:
    return f'ByPath({self.flat!r}, {self.shapes!r})'

  def tree_flatten_with_keys(self):
    """For JAX: one leaf."""
    return ((jax.tree_util.GetAttrKey('flat'), self.flat),), self.shapes

  @classmethod
  def tree_unflatten(cls, shapes, leaves):
    """For JAX."""
    return cls(leaves[0], shapes)


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
    """Sizes of the batch axes."""
    return self._sizes(self.batch_axes)

  @property
  def rows(self) -> int:
    """Of each matrix."""
    return math.prod(self._sizes(self.reduction_axes))

  @property
  def columns(self) -> int:
    """Of each matrix."""
    return math.prod(self._sizes(self.output_axes))

  @property
  def matrix_axes(self) -> tuple[int, ...]:
    """Every axis that is not a batch axis: rows, then columns."""
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
    value = tuple(value) if isinstance(value, list | tuple) else (value,)
    for axis in value:
      if not isinstance(axis, int | np.integer) or not -len(shape) <= axis < len(shape):
        raise ValueError(
          f'weight_dimension_numbers of {path!r}: {which} {axis!r} is not an axis of its'
          f' shape {shape}. Give axes of this parameter, or None to leave it to AdamW.'
        )
    return tuple(int(axis) % len(shape) for axis in value)

  reduction = axes(numbers.reduction_axis, 'reduction_axis')
  output = axes(numbers.output_axis, 'output_axis')
  named = reduction + output
  if len(set(named)) != len(named) or not reduction or not output:
    raise ValueError(
      f'weight_dimension_numbers of {path!r} with shape {shape}: reduction_axis'
      f' {reduction} and output_axis {output} must not be empty and must name no axis'
      ' twice. Give each at least one axis, or None to leave the parameter to AdamW.'
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
  leaves = leaves_by_path(params)
  numbers = weight_dimension_numbers
  if numbers is None:
    given = entries = _infer(leaves).numbers
  else:
    if is_function(numbers):
      numbers = numbers(params)
    given = leaves_by_path(numbers, is_leaf=_is_dimension_numbers)
    entries = match_prefix(given, params, 'weight_dimension_numbers')
  views = {}
  for path, entry in entries.items():
    leaf = leaves[path]
    shape = tuple(np.shape(leaf))
    if entry is None or (path not in given and len(shape) < 2) or 0 in shape:
      continue
    if not isinstance(entry, MuonDimensionNumbers):
      raise ValueError(
        f'weight_dimension_numbers of {path!r} must be an optax.contrib.MuonDimensionNumbers'
        f' or None, got {entry!r}.'
      )
    views[path] = matrix_view(path, shape, entry)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise TypeError(
        f'{path!r} with shape {shape} has dtype {leaf.dtype}, and a spectral transfer needs'
        ' a real float one. Set its weight_dimension_numbers to None, or mask it.'
      )
  return views


# ---------------------------------------------------------------------------------
# Inference from names and shapes
# ---------------------------------------------------------------------------------

# Leaves. The plain names of a weight leave it to the layer's name to say what it is.
_PLAIN = re.compile(r'kernel|weights?|w', re.I)
_WEIGHT = re.compile(r'(kernel|weights?|w)(_\w+)?|lora_[ab]', re.I)
_VECTOR = re.compile(r'(\w*_)?(bias|scale|gamma|beta|offset|mean|var)(_\w+)?|b\w?(_\w+)?')

# Layers and what holds them.
_NORM = re.compile(r'norm|^(ln|bn|gn|rms)(_?\d+|_.*)?$', re.I)
_EMBEDDING = re.compile(
  r'(?<!un)(?<!patch)(?<!patch_)embed|(^|_)(embs?|wte|wpe|cls|pos)($|_)|tokens?$', re.I
)
_CONV = re.compile(r'conv', re.I)
_DENSE = re.compile(r'dense|linear|einsum', re.I)
_QKV = re.compile(r'(to_|w_?)?(q|k|v|query|key|value)(_?proj(ection)?|_kernel|_dense)?', re.I)
_FUSED_QKV = re.compile(r'(to_|w_?)?(qkv|kv)(_?proj(ection)?)?|c_attn', re.I)
_ATTENTION_IN = re.compile(rf'{_QKV.pattern}|{_FUSED_QKV.pattern}|in_proj', re.I)
_ATTENTION_OUT = re.compile(
  r'(to_|w_?)?(o|out|output)(_?proj(ection)?|_kernel)?|(c_|attn_)?proj|attn_out|linear', re.I
)
_ATTENTION = re.compile(r'attn|attention|^(mha|mhsa|msa)', re.I)
_MLP = re.compile(r'mlp|^ffn?$|ffw|feed_?forward|^moe|expert', re.I)
_UP = re.compile(
  r'(up|gate|gate_up)(_?proj)?|(fc|lin|linear|dense|w)_?(in|up)|(fc|lin|linear|dense|ff|w)1|w3'
  r'|wi(_\d)?|c_fc|mlp_up',
  re.I,
)
_DOWN = re.compile(
  r'down(_?proj)?|(fc|lin|linear|dense|w)_?(out|down)|(fc|lin|linear|dense|ff|w)2|wo|c_proj'
  r'|mlp_down',
  re.I,
)
_HEAD = re.compile(
  r'head$|^(fc|logits?|classifier|unembed\w*|output(_layer|_proj)?|readout)$', re.I
)
_SCANNED = re.compile(r'(Scan|Vmap)[A-Z]\w*')  # What linen calls them itself.
_STACKED = re.compile(rf'{_SCANNED.pattern}|layers|blocks|experts')


@dataclasses.dataclass(frozen=True)
class _Inferred:
  numbers: dict[str, MuonDimensionNumbers | None]
  types: dict[str, str | None]


def _join(names: Iterable[str]) -> str:
  return '/'.join(names)


def _parent(path: str) -> str:
  return path.rpartition('/')[0]


class _Layer:
  """The names that lead to a parameter: the leaf's, its layer's, and those above."""

  def __init__(self, path: str):
    *above, self.leaf = path.split('/')
    self.parent = above[-1] if above else ''
    plain = _PLAIN.fullmatch(self.leaf)
    self.name = self.parent if plain else self.leaf
    self.above = above[:-1] if plain else above

  @property
  def is_vector(self) -> bool:
    """A bias, a scale: the same number of axes for every layer, of any kind."""
    if _VECTOR.fullmatch(self.leaf):
      return True
    # A conditional normalisation may have a kernel, a plain one has not.
    return self.leaf != 'kernel' and any(map(_NORM.search, (self.leaf, self.parent)))

  def is_table(self, axes: int, bias: tuple[int, ...] | None) -> bool:
    if _EMBEDDING.search(self.leaf):
      return True
    # Equinox and Haiku: a `weight` in `embedding`; with a bias, or more axes than a
    # stack of tables, it is a projection (of patches).
    named = self.leaf != 'kernel' and _EMBEDDING.search(self.parent)
    return bool(named) and bias is None and axes <= 3


class _Tree:
  """The shapes by path, and what is below each path."""

  def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
    self.shapes = shapes
    self.layers = {path: _Layer(path) for path in shapes}
    self._below: dict[str, list[str]] = {}
    self._stacks: dict[str, tuple[int, int | None]] = {}
    for path in shapes:
      for room in _prefixes(_parent(path)):
        self._below.setdefault(room, []).append(path)

  def below(self, room: str) -> list[str]:
    return self._below.get(room, [])

  def children(self, room: str) -> set[str]:
    start = len(room) + 1 if room else 0
    return {path[start:].split('/')[0] for path in self.below(room)}

  def bias(self, path: str) -> tuple[int, ...] | None:
    for name in ('bias', 'b'):
      if (bias := self.shapes.get(f'{_parent(path)}/{name}'.lstrip('/'))) is not None:
        return bias
    return None

  def stack_axes(self, room: str) -> tuple[int, int | None]:
    """How many leading axes all in there share, and the fewest of a vector, if any."""
    if room not in self._stacks:
      inside = self.below(room)
      sizes = zip(*(self.shapes[p] for p in inside), strict=False)
      shared = sum(1 for _ in itertools.takewhile(lambda s: len(set(s)) == 1, sizes))
      # A layer's own bias is read with its weight, in `_axes`.
      own = {f'{room}/bias', f'{room}/b', 'bias', 'b'}
      vectors = [len(self.shapes[p]) for p in inside if self.layers[p].is_vector and p not in own]
      self._stacks[room] = shared, min(vectors, default=None)
    return self._stacks[room]

  def is_table(self, path: str) -> bool:
    return self.layers[path].is_table(len(self.shapes[path]), self.bias(path))


def _stack_depth(path: str, tree: _Tree) -> int | None:
  """How many leading axes number stacked layers, by what is around; None: unknown."""
  names = path.split('/')
  # `layers` may hold convolutions by name, whose windows look like stacks.
  stack = _SCANNED if _CONV.search(tree.layers[path].name) else _STACKED
  named = 0
  for room in _prefixes(_parent(path)):
    shared, fewest = tree.stack_axes(room)
    if fewest is not None:
      return named + max(0, min(shared, fewest - 1))
    depth = room.count('/') + 1 if room else 0
    if depth and stack.fullmatch(names[depth - 1]) and not names[depth].isdecimal() and shared:
      named += 1
  return named or None


def _has_qkv(names: Iterable[str]) -> bool:
  names = list(names)
  return sum(bool(_QKV.fullmatch(n)) for n in names) >= 2 or any(map(_FUSED_QKV.fullmatch, names))


def _attention_side(layer: _Layer, tree: _Tree) -> str | None:
  """Whether a weight projects "in" to attention (query, key, value) or "out" of it."""
  near = any(map(_ATTENTION.search, layer.above[-2:]))
  if not near and not _has_qkv(tree.children(_join(layer.above))):
    return None
  if _ATTENTION_IN.fullmatch(layer.name):
    return 'in'
  return 'out' if _ATTENTION_OUT.fullmatch(layer.name) else None


def _mlp_side(path: str, rows: int, columns: int, tree: _Tree) -> str | None:
  """The side of the MLP in a transformer's block: there is attention beside it."""
  layer = tree.layers[path]
  block = list(layer.above)
  within = [i for i, name in enumerate(block) if _MLP.search(name)]
  if within:
    del block[within[-1] :]
    while block and _MLP.search(block[-1]):
      block.pop()
  beside = tree.children(_join(block))
  if not (any(map(_ATTENTION.search, beside)) or _has_qkv(beside)):
    return None
  if _UP.fullmatch(layer.name):
    return 'mlp_up'
  if _DOWN.fullmatch(layer.name):
    return 'mlp_down'
  if rows == columns or (not within and _HEAD.search(layer.name)):
    return None
  # By its shape, if the way back is beside it.
  back = tree.shapes[path][:-3:-1]
  room = tree.below(_join(layer.above))
  if any(tree.shapes[p][-2:] == back and not tree.is_table(p) for p in room):
    return 'mlp_up' if columns > rows else 'mlp_down'
  return None


def _axes(
  shape: tuple[int, ...],
  bias: tuple[int, ...] | None,
  depth: int | None,
  layer: _Layer,
  attention: str | None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Reduction and output axes of a weight."""
  ndim, axes = len(shape), tuple(range(len(shape)))
  if re.match('weight', layer.leaf, re.I):  # Equinox and PyTorch: output axis first.
    # A convolution's bias is (O, 1, 1).
    fits = [
      d for d in range(ndim - 1) if bias and bias == shape[: d + 1] + (1,) * (len(bias) - d - 1)
    ]
    d = fits[0] if fits and depth not in fits else min(depth or 0, ndim - 2)
    return axes[d + 1 :], axes[d : d + 1]
  if bias:
    reductions = ndim - len(bias)
    fits = [d for d in range(len(bias)) if bias == shape[:d] + shape[d + reductions :]]
    if fits:
      d = depth if depth in fits else fits[-1]
      return axes[d : d + reductions], axes[d + reductions :]
    d = len(bias) - 1
    if ndim - d > 2 and bias == shape[:d] + shape[-2:-1]:  # Transposed: (H, W, O, I).
      return axes[d:-2] + axes[-1:], axes[-2:-1]
  d = min(depth or 0, ndim - 2)
  if attention and not _FUSED_QKV.fullmatch(layer.name):  # At most (D, H, K), (H, K, D).
    d = max(d, ndim - 3)
  split = d + 1 if attention == 'in' else ndim - 1
  return axes[d:split], axes[split:]


def _classify(path: str, tree: _Tree) -> tuple[MuonDimensionNumbers | None, str | None]:
  shape, layer, bias = tree.shapes[path], tree.layers[path], tree.bias(path)
  if len(shape) < 2 or layer.is_vector:
    return None, None
  if tree.is_table(path):
    return None, 'embedding'
  if bias is not None and len(bias) >= len(shape):  # A normalisation of another name.
    return None, None

  attention = _attention_side(layer, tree)
  rows, columns = _axes(shape, bias, _stack_depth(path, tree), layer, attention)
  own = len(rows) + len(columns)
  if own > 2 and not _WEIGHT.fullmatch(layer.leaf):  # A bare array may be anything.
    return None, None
  numbers = MuonDimensionNumbers(reduction_axis=rows, output_axis=columns)
  if attention:
    return numbers, 'attention'
  if own > 2 and len(columns) == 1 and not _DENSE.search(layer.name):
    return numbers, 'conv'
  m, n = (math.prod(shape[a] for a in axes) for axes in (rows, columns))
  otherwise = 'head' if _HEAD.search(layer.name) else 'dense'
  return numbers, _mlp_side(path, m, n, tree) or otherwise


def _infer(leaves: Mapping[str, Any]) -> _Inferred:
  tree = _Tree(
    {
      path: tuple(leaf.shape)
      for path, leaf in leaves.items()
      if hasattr(leaf, 'shape') and jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
  )
  found = {path: _classify(path, tree) if path in tree.shapes else (None, None) for path in leaves}
  return _Inferred({p: f[0] for p, f in found.items()}, {p: f[1] for p, f in found.items()})


def layer_types_by_path(params: Any) -> dict[str, str | None]:
  """`layer_types`, by path."""
  return _infer(leaves_by_path(params)).types


def weight_dimension_numbers(params: Any) -> Any:
  """Which axes of each parameter are rows and columns, from names and shapes.

  Known without configuration: the layers of Flax `nnx` and `linen` (Dense, Conv,
  ConvTranspose, DenseGeneral, attention, recurrent cells, Einsum) and of Equinox,
  stacked for `scan` or not. A convolution (H, W, I, O) is the matrix (H·W·I) × O,
  attention's query, key and value (D, H, K) are D × (H·K), its output (H, K, D) is
  (H·K) × D.

  What names and shapes cannot show, without a bias: where a DenseGeneral splits its
  axes (read: before the last), that a ConvTranspose stores its kernel transposed
  (read: it does not; with a bias it shows, unless it has as many inputs as outputs),
  that layers are stacked when no norm nor bias is near them and
  no name says so (read: not stacked). With or without: the groups of a grouped or
  depthwise convolution (read: one matrix (H·W·I/groups) × O), and that a
  two-dimensional array of an unknown name is no matrix (read: it is one). Pass your
  own tree for those.

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
  return jax.tree.unflatten(jax.tree.structure(params), list(layer_types_by_path(params).values()))
