"""Where α and d come from, layer by layer.

A user may say α as a number, a traced value, a schedule, a tree of those, a rule on
the parameters or the name of a table; `resolve` turns all of them into one value
for each matrix.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectral_optax import layout, solvers
from spectral_optax.measured import MeasuredAlpha

ScalarOrSchedule = float | jax.Array | Callable[[Any], Any]

# Mean curvature exponents by layer type as published: A. Calvo, "Spectral
# Asymptotics of Neural Network Loss Landscapes", arXiv:2606.02596. Measured by the
# author on trained networks, with the gradient's leading (as a rule 20) directions.
PUBLISHED_ALPHA: Mapping[str, float] = {
  # ResNet-18 and VGG-11 on CIFAR-10 1.97 to 2.17, ResNet-50 on Tiny-ImageNet 1.94
  # and on ImageNet-1K 2.10: the middle.
  'conv': 2.05,
  # Dense layers of an MLP.
  'dense': 2.18,
  # GPT-2, six layers: query, key and value 1.43, projection 1.17; by parameters,
  # 3 : 1.
  'attention': 1.37,
  'mlp_up': 0.84,  # GPT-2
  'mlp_down': 1.15,  # GPT-2
  # Classifiers with 10 classes 1.23 to 1.65: the middle. It moves with the number
  # of classes: 0.90 with 200, 2.83 with 1000, and 4.53 for GPT-2's vocabulary.
  'head': 1.44,
}
PUBLISHED_DAMPING = 0.1

# Ours, from the comparison of benchmarks/convergence.py: (α, d) of convolutions, and
# of every other matrix, at constant damping. They put the turn of T, σ* = d^(1/α), at
# 0.32 and 0.04 of the root mean square singular value.
DEFAULT_CONV = (2.0, 0.1)
DEFAULT_OTHER = (1.5, 0.008)


# The default with `damping="noise"`, in every layer: the best at every momentum, batch size and
# width that the same comparison's transformer was trained at.
NOISE_ALPHA = 1.5


def default_exponents(layer_type: str | None) -> tuple[float, float]:
  """The (α, d) of a matrix of this layer type at `damping="constant"`."""
  return DEFAULT_CONV if layer_type == 'conv' else DEFAULT_OTHER


def _published_alpha(layer_type: str | None) -> float:
  # An embedding that a user has declared a matrix was not published: a dense layer
  # is what it is.
  return PUBLISHED_ALPHA.get(layer_type or 'dense', PUBLISHED_ALPHA['dense'])


def _call_on_parameters(rule: Callable[[Any], Any], params: Any, name: str) -> Any:
  """A rule's tree for these parameters; a schedule comes back as it went in.

  Both are functions of one argument. A schedule computes with its count and fails
  on a tree of shapes, or does not look at it and is a constant.
  """
  shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
  try:
    return rule(shapes)
  except Exception as not_a_rule:
    try:
      value = jax.eval_shape(rule, jax.ShapeDtypeStruct((), jnp.int32))
      if jax.tree.structure(value) != jax.tree.structure(0) or value.shape != ():
        raise TypeError(f'it returned {value}, not a scalar')
    except Exception as not_a_schedule:
      raise ValueError(
        f'{name} is a function, but neither a rule that takes the parameters'
        f' (that failed with {not_a_rule!r}) nor a schedule that takes a step count'
        f' (that failed with {not_a_schedule!r}).'
      ) from not_a_schedule
    return rule


def default_damping(alpha: Any, damping: Any) -> Any:
  """That of whoever knows the noise: "noise", where nothing is said of T."""
  nothing_said = damping is None and isinstance(alpha, str) and alpha == 'default'
  return 'noise' if nothing_said else damping


def _is_constant(value: Any) -> bool:
  return isinstance(value, str) and value == 'constant'


def _is_noise(value: Any) -> bool:
  return isinstance(value, str) and value == 'noise'


def _entries(value: Any, params: Any, name: str) -> dict[str, Any]:
  """The user's value by parameter path: one number is a prefix of everything."""
  may_be_noise = name == 'damping'
  if isinstance(value, str) and not (may_be_noise and _is_noise(value)):
    named = ' "noise", "constant",' if may_be_noise else ''
    raise ValueError(
      f'{name} must be{named} a number, a schedule, a tree or a callable, got {value!r}.'
    )
  if layout.is_function(value):
    value = _call_on_parameters(value, params, name)
  entries = layout.leaves_by_path(value, is_leaf=lambda x: x is None)
  entries = {path: v for path, v in entries.items() if v is not None}
  return layout.match_prefix(entries, params, name)


def _check(value: Any, view: layout.MatrixView, name: str) -> Any:
  where = f'{name} of {view.path!r} with shape {view.shape}'
  if callable(value) or isinstance(value, Turn):
    return value
  if name == 'damping' and _is_noise(value):
    return noise_turn(min(view.rows, view.columns))
  if isinstance(value, str | bytes) or not isinstance(
    value, int | float | np.ndarray | np.generic | jax.Array
  ):
    words = ', "noise" or "constant"' if name == 'damping' else ''
    raise ValueError(f'{where} must be a number or a schedule{words}, got {value!r}.')
  shape = np.shape(value)
  try:
    fits = np.broadcast_shapes(shape, view.batch_shape) == view.batch_shape
  except ValueError:
    fits = False
  if not fits:
    raise ValueError(
      f'{where} has shape {shape}; it must be a scalar'
      + (
        f' or one number for each of its {view.batch_shape} matrices.' if view.batch_shape else '.'
      )
    )
  return value


@dataclasses.dataclass(frozen=True)
class Turn:
  """A damping given by where T turns over, whatever α turns out to be: d = σ*^α.

  Attributes:
    log_sigma: Of σ*.
    of_noise: Whether the noise in the update adds to it, direction by direction.
  """

  log_sigma: float
  of_noise: bool = False

  @classmethod
  def of(cls, alpha: float, damping: float) -> 'Turn':
    """Where T with this α and d turns over."""
    return cls(math.log(damping) / alpha)

  def damping(self, alpha: Any) -> Any:
    """D at this α, a number or an array."""
    xp: Any = jnp if isinstance(alpha, jax.Array) else np
    return xp.exp(self.log_sigma * xp.asarray(alpha))


def noise_turn(small: int) -> Turn:
  """Where `damping="noise"` has the turn of T where there is no noise; of a smaller side."""
  # 0.01, as measured (0.02 and 0.04 are worse); of large matrices, what a Gram matrix in
  # float32 has to tell from nothing if all of the matrix is in one direction: 16 = log(small/σ*²).
  return Turn(math.log(max(0.01, 1.01 * math.exp(-8) * small**0.5)), of_noise=True)


def of_noise(damping: Any) -> bool:
  """Whether a damping that `resolve` has found is "noise"."""
  return isinstance(damping, Turn) and damping.of_noise


def known(alpha: Any, damping: Any) -> bool:
  """Whether the (α, d) that `resolve` has found are known while tracing, at every step."""
  return solvers.known(alpha) and (solvers.known(damping) or isinstance(damping, Turn))


def at(alpha: Any, damping: Any, count: Any) -> tuple[Any, Any]:
  """The (α, d) that `resolve` has found, at a step."""
  alpha = alpha(count) if callable(alpha) else alpha
  if isinstance(damping, Turn):
    return alpha, damping.damping(alpha)
  return alpha, damping(count) if callable(damping) else damping


def resolve(
  alpha: Any,
  damping: Any,
  params: Any,
  views: Mapping[str, layout.MatrixView],
) -> dict[str, tuple[Any, Any]]:
  """(α, d) of each matrix, for `at`: plain numbers, arrays or schedules; d also as `Turn`.

  Args:
    alpha: See `spectral_optax.spectral_newton`. A string other than "default" and
      "layer_type" is an error. Of a `MeasuredAlpha` its fallback is resolved.
    damping: None or "constant" for the one that goes with α, "noise", or as `alpha`, where both
      words may be leaves.
    params: The parameter tree, as it was when `views` were made.
    views: The matrices, by path.

  Raises:
    ValueError: an unknown string, a tree that does not match, a matrix without a
      value, a value that is no scalar. Names the parameter.
  """
  measured = isinstance(alpha, MeasuredAlpha)
  alpha = alpha.fallback if isinstance(alpha, MeasuredAlpha) else alpha
  named = alpha if isinstance(alpha, str) else None
  dampings: dict[str, Any]
  if damping is None or _is_constant(damping):
    dampings = dict.fromkeys(views, 'constant')
  else:
    dampings = _entries(damping, params, 'damping')
  constant = [path for path in views if _is_constant(dampings.get(path))]
  # Only these look at layer types, which takes a walk over all names.
  types = layout.layer_types_by_path(params) if named is not None or constant else {}

  if named == 'default':
    alphas = {
      p: NOISE_ALPHA if _is_noise(dampings.get(p)) else default_exponents(types[p])[0]
      for p in views
    }
  elif named == 'layer_type':
    alphas = {p: _published_alpha(types[p]) for p in views}
  elif named is not None:
    raise ValueError(
      'alpha must be "default", "layer_type", a number, a schedule, a tree or a'
      f' callable, got {alpha!r}.'
    )
  else:
    alphas = _entries(alpha, params, 'alpha')

  for path in constant:
    if measured:
      dampings[path] = default_turn(types[path])
    elif named == 'layer_type':
      dampings[path] = PUBLISHED_DAMPING
    elif named == 'default':
      dampings[path] = default_exponents(types[path])[1]
    elif path in alphas:
      dampings[path] = _same_turn(alphas[path], views[path], types[path])

  resolved = {}
  for path, view in views.items():
    for name, values in (('alpha', alphas), ('damping', dampings)):
      if path not in values:
        raise ValueError(
          f'{name} has no value for the matrix {path!r} with shape {view.shape}. Give'
          ' one, or set its weight_dimension_numbers to None to leave it to AdamW.'
        )
    resolved[path] = (_check(alphas[path], view, 'alpha'), _check(dampings[path], view, 'damping'))
  return resolved


def default_turn(layer_type: str | None) -> Turn:
  """Where the default has the turn of T."""
  return Turn.of(*default_exponents(layer_type))


def _same_turn(alpha: Any, view: layout.MatrixView, layer_type: str | None) -> Any:
  """The damping that leaves the turn of T where the default has it."""
  alpha, turn = _check(alpha, view, 'alpha'), default_turn(layer_type)
  if callable(alpha):
    return turn
  return turn.damping(alpha if isinstance(alpha, jax.Array) else np.asarray(alpha, dtype=float))
