"""Convolutions that stay fast inside `lax.cond`, `lax.map` and `lax.scan` on a CPU.

XLA has a fast convolution on a CPU for one order of axes, batch first and channels last, and
brings others into that order at the top of a program alone. Inside control flow the
convolutions of a gradient, whose axes come in another order, are computed by a plain loop,
ten times slower (measured on JAX 0.10 and 0.12). Transposed by hand they are not. Nor has it
a fast one for an image with a side shorter than the window's, 3 x 3 on 2 x 2, twenty times
slower: padded by hand it has.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from spectral_optax.curvature.capturing import bind

# Those that only group what is inside are taken apart.
_GROUPS = {'jit': 'jaxpr', 'pjit': 'jaxpr', 'closed_call': 'call_jaxpr'}


def channels_last(function: Callable[..., Any]) -> Callable[..., Any]:
  """The same function, on a CPU with every convolution in the order of axes that is fast."""

  def call(*args):
    leaves, treedef = jax.tree.flatten(args)
    program, shape = jax.make_jaxpr(
      lambda *leaves: function(*jax.tree.unflatten(treedef, leaves)), return_shape=True
    )(*leaves)
    split = len(program.consts)

    def rewritten(*values):
      return _evaluate(program.jaxpr, values[:split], values[split:])

    def as_it_is(*values):
      return core.jaxpr_as_fun(core.ClosedJaxpr(program.jaxpr, values[:split]))(*values[split:])

    outs = jax.lax.platform_dependent(*program.consts, *leaves, cpu=rewritten, default=as_it_is)
    return jax.tree.unflatten(jax.tree.structure(shape), outs)

  return call


def _evaluate(program: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
  values = dict(zip([*program.constvars, *program.invars], [*consts, *args], strict=True))
  read = lambda v: v.val if isinstance(v, core.Literal) else values[v]
  for eqn in program.eqns:
    operands = [read(v) for v in eqn.invars]
    name = eqn.primitive.name
    if name == 'conv_general_dilated':
      outs = [_convolve(eqn, *operands)]
    elif name in _GROUPS:
      inner = eqn.params[_GROUPS[name]]
      outs = _evaluate(inner.jaxpr, inner.consts, operands)
    else:
      params = {key: _rewrite(value) for key, value in eqn.params.items()}
      outs = bind(eqn.replace(params=params), operands)
    values.update(zip(eqn.outvars, outs, strict=True))
  return [read(v) for v in program.outvars]


def _rewrite(value: Any) -> Any:
  """Programs among a primitive's parameters (of loops, of branches) in the same way."""
  if isinstance(value, core.ClosedJaxpr):
    call = lambda *args: _evaluate(value.jaxpr, value.consts, args)
    return jax.make_jaxpr(call)(*value.in_avals)
  if isinstance(value, tuple) and any(isinstance(v, core.ClosedJaxpr) for v in value):
    return tuple(map(_rewrite, value))
  return value


def _convolve(eqn: core.JaxprEqn, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
  numbers = eqn.params['dimension_numbers']

  # Each is (batch or outputs, channels or inputs, *space).
  def to_last(order):
    batch, channels, *space = order
    return (batch, *space, channels)

  outputs, channels, *space = numbers.rhs_spec
  n = len(space)
  last = (0, n + 1, *range(1, n + 1))
  order = type(numbers)(lhs_spec=last, rhs_spec=(n + 1, n, *range(n)), out_spec=last)
  inputs = jax.lax.transpose(inputs, to_last(numbers.lhs_spec))
  kernel = jax.lax.transpose(kernel, (*space, channels, outputs))
  params = {**eqn.params, 'dimension_numbers': order}
  if any(image < window for image, window in zip(inputs.shape[1:-1], kernel.shape, strict=False)):
    inputs = _padded(inputs, params)
    params |= {'padding': ((0, 0),) * n, 'lhs_dilation': (1,) * n}
  eqn = eqn.replace(params=params)
  (out,) = bind(eqn, [inputs, kernel])
  return jax.lax.transpose(out, [int(i) for i in np.argsort(to_last(numbers.out_spec))])


def _padded(inputs: jax.Array, params: dict[str, Any]) -> jax.Array:
  """A convolution's images, (batch, *space, channels), with its padding around and in them."""
  around = [
    (low, high, step - 1)
    for (low, high), step in zip(params['padding'], params['lhs_dilation'], strict=True)
  ]
  zero = np.zeros((), inputs.dtype)
  padded = jax.lax.pad(inputs, zero, [(0, 0, 0), *around, (0, 0, 0)])
  # Without this the compiler puts the padding back where it was.
  return jax.lax.optimization_barrier(padded)
