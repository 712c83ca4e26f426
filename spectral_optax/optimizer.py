"""`spectral_newton`: the drop-in optimizer. Composition only."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from spectral_optax import exponents, layout, measured, transform, update_size


def spectral_newton(
  learning_rate: optax.ScalarOrSchedule,
  alpha: Any = 'default',
  damping: Any = None,
  *,
  momentum: float | jax.Array = 0.9,
  nesterov: bool = True,
  mu_dtype: Any | None = None,
  normalize: str | None = 'rms',
  solver: str = 'auto',
  tolerance: float | None = None,
  rank: int | None = None,
  update_rms: float | jax.Array | None = 0.2,
  rms_of: Any = 'wide',
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
  weight_dimension_numbers: layout.WeightDimNumOrFn | None = None,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
  adam_b1: float | jax.Array = 0.9,
  adam_b2: float | jax.Array = 0.999,
  adam_eps: float | jax.Array = 1e-8,
  adam_weight_decay: optax.ScalarOrSchedule = 0.0,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
  work_axes: str | Sequence[str] | None = None,
  shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Spectral Newton: each layer's momentum through the map that its curvature wants.

  For every weight matrix the momentum U Σ Vᵀ becomes ``U diag(T(σ)) Vᵀ`` with
  ``T(σ) = σ / (σ^α + d)``, scaled to the size of an AdamW update; everything else
  (biases, norms, embeddings) goes to AdamW. What is a matrix, and of which axes, is
  inferred from names and shapes.

  Example:
    >>> import jax, jax.numpy as jnp, optax, spectral_optax
    >>> params = {'kernel': jnp.ones((4, 3)), 'bias': jnp.zeros(3)}
    >>> optimizer = spectral_optax.spectral_newton(1e-2)
    >>> state = optimizer.init(params)
    >>> grads = jax.grad(lambda p: jnp.sum(p['kernel'] ** 2) + jnp.sum(p['bias']))(params)
    >>> updates, state = optimizer.update(grads, state, params)
    >>> params = optax.apply_updates(params, updates)

  Args:
    learning_rate: A number, traced or not, or a schedule. Start with AdamW's.
    alpha: The curvature exponent α ≥ 0 (not a learning rate). One of

      - ``"default"``: 1.5; for convolutions at another damping than ``"noise"`` 2;
      - ``"layer_type"``: the published means, `spectral_optax.PUBLISHED_ALPHA`;
      - a number, traced or not, or an optax schedule;
      - a tree of those, or a prefix of one, or a flat dict by parameter path; a leaf
        may be an array with one number for each matrix of a stacked parameter;
      - a callable that takes the parameters (their shapes) and gives such a tree;
      - `measured_alpha()`: from the curvature of the loss, along the training. `update`
        then needs ``value_fn=loss_fn``, a function of the parameters.
    damping: The damping d ≥ 0, in units of σ^α, as `alpha`, or one of these, the last two
      also as leaves of a tree:

      - None: ``"noise"`` where `alpha` is ``"default"``, else ``"constant"``;
      - ``"noise"``: it sets itself. U T(Σ) Vᵀ becomes
        G f(GᵀG + NᵀN / m), m the longer side, N a tree with as much noise in it as the
        momentum has (of the gradients minus their average, `noise_in_momentum`;
        ``update(..., noise=N)`` has one of its own), so that T turns over, direction by
        direction, where noise leaves σ in doubt; where there is none, at 0.01 (of a
        smaller side of more than 871, at 0.00034 of its root). What the state says of a
        spectrum has the noise in it;
      - ``"constant"``: the one that goes with α: 0.1 for ``"layer_type"``, as published;
        else 0.1 at α = 2 for convolutions and 0.008 at α = 1.5 for other matrices, and at
        any other α the d with the same turning point d^(1/α).
    momentum: Decay of the running average of the gradients.
    nesterov: Whether the average looks one step ahead.
    mu_dtype: Data type of the averages (also AdamW's first moment); None for the
      parameter's.
    normalize: What σ is divided by before T: ``"rms"``, ``"spectral"``,
      ``"frobenius"`` or None; see `apply_transfer`.
    solver: ``"auto"``, ``"svd"``, ``"gram"``, ``"cholesky"``, ``"rational"``,
      ``"polynomial"`` or ``"low_rank"``; see `apply_transfer`.
    tolerance: Relative error of T that "auto" and the approximate solvers may make,
      0.1 by default; see `apply_transfer`.
    rank: How many leading directions ``"low_rank"`` takes; by default 16, or 64 where 16
      do not meet `tolerance`.
    update_rms: Root mean square of updates in units of the learning rate; see `scale_to_rms`.
      None to leave the size that T gives.
    rms_of: What has that size: the "matrix" as a whole, every "output" of it, or one or the other
      by layer. "wide" (default): every output where there are more outputs than inputs, in heads
      and the blocks of transformers (a language model's head, the up-projections); all else whole.
      "layer_type": every output of whatever is no convolution. Also a tree of these words, a
      prefix of one, a flat dict by path, or a callable that takes the parameters and gives one.
    weight_decay: Decoupled weight decay of the matrices, times the learning rate.
    weight_decay_mask: A tree of booleans (or a prefix, or a callable giving one) over
      the parameters: which matrices decay. None for all.
    weight_dimension_numbers: None to infer (`weight_dimension_numbers`), or a tree
      (or a prefix, a flat dict by path, or a callable giving one) of
      `optax.contrib.MuonDimensionNumbers` and None; None goes to AdamW.
    adam_learning_rate: For AdamW's share; None for `learning_rate`.
    adam_b1: AdamW's.
    adam_b2: AdamW's.
    adam_eps: AdamW's.
    adam_weight_decay: AdamW's.
    mesh: The devices that share the work; None (default) for the mesh that the gradients
      are on, or that of `jax.set_mesh`. On one device, and where JAX knows of no mesh,
      everything is solved where it is.
    work_axes: Names of the mesh axes that matrices are dealt over, each device its share;
      None (default) for all that are not manual, () to leave everything to XLA. Inside
      `jax.shard_map` every device's block is a matrix of its own.
    shardings: How the parameters lie on the mesh: a tree (a prefix, a flat dict by path, a
      callable giving one) of `NamedSharding` or `PartitionSpec`; None where it is not known.
      Read from the gradients outside of `jit` and where axes are explicit. Under `jit` with
      automatic axes only the compiler knows: there, what is not said here is gathered whole
      before the work is dealt, and so are its updates.

  Returns:
    A `GradientTransformationExtraArgs`. In its state,
    ``optax.tree.get(state, 'sigma_max')`` and the like give what is known of each
    matrix's spectrum (`SpectralTransferState`).

  Raises:
    ValueError: At construction or at `init`, for arguments that make no sense or do
      not fit the parameters; names the parameter's path and shape.
    TypeError: At `init`, for complex matrices.

  Under `optax.inject_hyperparams`, numbers (also `alpha` and `damping`) are injected;
  name a callable that takes the parameters (also `rms_of`), `tolerance` and `rank` in its
  `static_args`.

  Source: A. Calvo, arXiv:2606.02596, "Spectral Newton"; normalisation, update size,
  the default (α, d) and the damping by noise are ours.
  """
  if adam_learning_rate is None:
    adam_learning_rate = learning_rate
  damping = exponents.default_damping(alpha, damping)

  def parts(dimension_numbers, alphas, dampings, sizes, labels, places):
    matrix = optax.chain(
      transform.scale_by_spectral_newton(
        alphas,
        dampings,
        momentum=momentum,
        nesterov=nesterov,
        mu_dtype=mu_dtype,
        normalize=normalize,
        solver=solver,
        tolerance=tolerance,
        rank=rank,
        update_rms=update_rms,
        rms_of=sizes,
        weight_dimension_numbers=dimension_numbers,
        mesh=mesh,
        work_axes=work_axes,
        shardings=places,
      ),
      optax.add_decayed_weights(weight_decay, weight_decay_mask),
      optax.scale_by_learning_rate(learning_rate),
    )
    other = optax.adamw(
      adam_learning_rate,
      b1=adam_b1,
      b2=adam_b2,
      eps=adam_eps,
      weight_decay=adam_weight_decay,
      mu_dtype=mu_dtype,
    )
    # A function, since a tree of labels may be callable itself (an Equinox module).
    return optax.partition({'matrix': matrix, 'adam': other}, lambda _: labels)

  def for_params(params):
    """The optimizer for a tree of these names and shapes.

    What is a matrix, and which layer it is in, shows only in the whole tree, before
    `partition` hides one half of it from the other.
    """
    views = layout.matrix_views(params, weight_dimension_numbers)
    values = exponents.resolve(alpha, damping, params, views)
    paths = layout.leaves_by_path(params)
    labels = jax.tree.unflatten(
      jax.tree.structure(params), ['matrix' if p in views else 'adam' for p in paths]
    )
    numbers = {
      path: MuonDimensionNumbers(views[path].reduction_axes, views[path].output_axes)
      if path in views
      else None
      for path in paths
    }
    alphas = {path: a for path, (a, _) in values.items()}
    if isinstance(alpha, measured.MeasuredAlpha):
      alphas = dataclasses.replace(alpha, fallback=alphas)
    dampings = {path: d for path, (_, d) in values.items()}
    sizes = update_size.resolve(rms_of, params, views)
    places = transform.placements(shardings, params)
    return parts(numbers, alphas, dampings, sizes, labels, places)

  # What can be checked without parameters is, here and now.
  parts(None, alpha, damping, rms_of, 'adam', None)

  def init_fn(params):
    return for_params(params).init(params)

  def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
    if value_fn is not None:
      extra_args['value_fn'] = _of_visible(value_fn, params)
    new, state = for_params(updates).update(updates, state, params, **extra_args)
    # AdamW's come back in float32 where mu_dtype and the parameter's do not agree.
    return jax.tree.map(lambda n, u: n.astype(u.dtype), new, updates), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _of_visible(value_fn: Callable[[Any], jax.Array], params: Any) -> Callable[[Any], jax.Array]:
  """The loss as a function of what `partition` leaves to see of the parameters."""
  hidden = lambda x: isinstance(x, optax.MaskedNode)

  def loss(visible):
    return value_fn(
      jax.tree.map(lambda v, p: p if hidden(v) else v, visible, params, is_leaf=hidden)
    )

  return loss
