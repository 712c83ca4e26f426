"""Activations and errors of the layers of a Flax network, `nnx` or `linen`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectral_optax import layout
from spectral_optax.curvature.capturing import LayerCapture, capture_layers


def capture(
  model: Any,
  loss_fn: Callable[..., jax.Array],
  *batch: Any,
  variables: Mapping[str, Any] | None = None,
  rngs: Any = None,
  num_samples: int | None = None,
  weight_dimension_numbers: layout.WeightDimNumOrFn | None = None,
  paths: Iterable[str] | None = None,
  unsupported: str = 'raise',
) -> dict[str, LayerCapture]:
  """Captures what goes into each layer, a_i, and what comes back to it, δ_i.

      def loss_fn(model, images, labels):  # The losses of the samples, or their mean.
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels)

      capture(model, loss_fn, images, labels)                       # nnx
      capture(model, loss_fn, images, labels, variables=variables)  # linen

  Every layer that multiplies its input with a kernel: Dense, Linear, DenseGeneral,
  LinearGeneral, Einsum, Conv (patches, any stride, padding and dilation) and ConvTranspose,
  the four projections of attention, recurrent cells, and layers of your own that do; inside
  `remat`, `jit`, `vmap` and `scan`, and used more than once (the rows of all uses, one after
  the other). Not those with a grouped convolution or a masked kernel: see `unsupported`.
  How: `spectral_optax.curvature.capturing`.

  The model is not changed: `loss_fn` gets a copy, whose batch statistics and random state go
  with it. Whether normalisation and dropout train is what `loss_fn` and the model say. In
  evaluation mode the samples do not meet; in training mode batch normalisation lets them,
  and δ_i is the derivative of the losses of *all* samples by z_i. Either way
  ``(1/B) Σ_i a_i δ_iᵀ`` is the gradient that `jax.grad` gives.

  The errors that the paper's C_δ is made of are those of the labels in the data. For those
  of the Gauss–Newton matrix of a cross entropy, hand over labels drawn from the softmax.

  Args:
    model: An `nnx.Module`, or a `linen.Module` that is not bound.
    loss_fn: `(model, *batch)` -> losses of the samples, (B,), or their mean, a scalar. A
      linen model arrives bound to its variables, so that it is called as an nnx one is.
    *batch: Arrays, or trees of arrays.
    variables: Of a linen model, with "params" among them.
    rngs: Random keys of a linen model, as for `apply`.
    num_samples: What a scalar loss is the mean over; None for the size of the first
      axis of the first array of `batch`.
    weight_dimension_numbers: See `capture_layers`, as for the others.
    paths: Likewise.
    unsupported: Likewise.

  Returns:
    A `LayerCapture` for each kernel, by its path among the parameters (`nnx.Param`s, or
    the collection "params"), the path that a `CurvatureReport` has:
    ``'layers/0/kernel'``. Activations (N, n) and errors (N, m), N = B x positions.

  Raises:
    ImportError: Flax is not installed.
    TypeError: a model that is no Flax module.
    ValueError: a linen model without `variables`, or what `capture_layers` raises.
  """
  try:
    from flax import linen, nnx
  except ImportError as error:
    raise ImportError(
      "curvature.flax needs Flax: pip install 'spectral-optax[examples]', or 'flax'. For other"
      ' frameworks there is curvature.capture_layers.'
    ) from error

  if isinstance(model, nnx.Module):
    if variables is not None or rngs is not None:
      raise ValueError('variables and rngs are for linen models; an nnx model has its own.')
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_of(params):
      # Copies: the network writes to its batch statistics and random state.
      copies = jax.tree.map(lambda x: x, (params, rest))
      return loss_fn(nnx.merge(graph, *copies), *batch)

  elif isinstance(model, linen.Module):
    if variables is None or 'params' not in variables:
      raise ValueError('A linen model needs variables={"params": ..., ...}, as its init gives.')
    others = {name: value for name, value in variables.items() if name != 'params'}
    params = variables['params']

    def loss_of(params):
      bound = model.bind({'params': params, **others}, rngs=rngs, mutable=list(others))
      return loss_fn(bound, *batch)

  else:
    raise TypeError(
      f'model must be a flax.nnx.Module or a flax.linen.Module, got {type(model).__name__}. For'
      ' other frameworks there is curvature.capture_layers.'
    )

  if num_samples is None:
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    samples = next((shape[:1] for shape in shapes if shape), None)
    mean = loss_of

    def loss_of(params):
      loss = mean(params)
      return jnp.broadcast_to(loss, samples) if jnp.ndim(loss) == 0 and samples else loss

  return capture_layers(
    loss_of,
    params,
    num_samples=num_samples,
    weight_dimension_numbers=weight_dimension_numbers,
    paths=paths,
    unsupported=unsupported,
  )
