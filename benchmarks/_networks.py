"""The networks that alpha_map.py measures, beside the residual one of examples/train_vision.py.

All are called with `(x, train=...)` and return logits. What their parts are called is what
`spectral_optax.layer_types` knows them by.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

POOL = 'pool'


def pool(x: jax.Array) -> jax.Array:
  """Maximum over windows of 2x2."""
  b, h, w, c = x.shape
  x = x[:, : h // 2 * 2, : w // 2 * 2]
  return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))


class VGG(nnx.Module):
  """3x3 convolutions without normalisation, a dense layer, a head."""

  def __init__(
    self,
    size: int,
    channels: int,
    classes: int,
    *,
    plan: Sequence[int | str],
    hidden: int,
    rngs: nnx.Rngs,
  ):
    self.plan = tuple(plan)
    he = nnx.initializers.he_normal()
    convs = []
    for step in plan:
      if isinstance(step, int):
        convs.append(nnx.Conv(channels, step, (3, 3), kernel_init=he, rngs=rngs))
        channels = step
      else:
        size //= 2
    self.convs = nnx.List(convs)
    self.hidden = nnx.Linear(size * size * channels, hidden, kernel_init=he, rngs=rngs)
    self.head = nnx.Linear(hidden, classes, rngs=rngs)

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    convs = iter(self.convs)
    for step in self.plan:
      x = pool(x) if step == POOL else nnx.relu(next(convs)(x))
    return self.head(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


class MLP(nnx.Module):
  """Dense layers of one width, and a head."""

  def __init__(self, inputs: int, classes: int, *, width: int, depth: int, rngs: nnx.Rngs):
    he = nnx.initializers.he_normal()
    sizes = [inputs] + [width] * depth
    self.layers = nnx.List(
      [nnx.Linear(i, o, kernel_init=he, rngs=rngs) for i, o in itertools.pairwise(sizes)]
    )
    self.head = nnx.Linear(width, classes, rngs=rngs)

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = x.reshape(x.shape[0], -1)
    for layer in self.layers:
      x = nnx.relu(layer(x))
    return self.head(x)


class Block(nnx.Module):
  """A transformer's: attention, then two dense layers; each behind a norm, around both a skip."""

  def __init__(
    self,
    width: int,
    heads: int,
    *,
    causal: bool,
    layer_norm: bool,
    skip: bool,
    rngs: nnx.Rngs,
  ):
    norm = functools.partial(nnx.LayerNorm, width, rngs=rngs)
    self.causal, self.skip = causal, skip
    self.norm1 = norm() if layer_norm else None
    self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
    self.norm2 = norm() if layer_norm else None
    self.up = nnx.Linear(width, 4 * width, rngs=rngs)
    self.down = nnx.Linear(4 * width, width, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    mask = nnx.make_causal_mask(jnp.zeros(x.shape[:2])) if self.causal else None
    y = self.attention(x if self.norm1 is None else self.norm1(x), mask=mask)
    x = x + y if self.skip else y
    y = self.down(nnx.gelu(self.up(x if self.norm2 is None else self.norm2(x))))
    return x + y if self.skip else y


class Transformer(nnx.Module):
  """Blocks and a norm."""

  def __init__(
    self,
    *,
    width: int,
    depth: int,
    heads: int,
    causal: bool,
    layer_norm: bool = True,
    skip: bool = True,
    rngs: nnx.Rngs,
  ):
    self.blocks = nnx.List(
      [
        Block(width, heads, causal=causal, layer_norm=layer_norm, skip=skip, rngs=rngs)
        for _ in range(depth)
      ]
    )
    self.norm = nnx.LayerNorm(width, rngs=rngs) if layer_norm else None

  def __call__(self, x: jax.Array) -> jax.Array:
    for block in self.blocks:
      x = block(x)
    return x if self.norm is None else self.norm(x)


class ViT(nnx.Module):
  """A vision transformer: patches, blocks, the mean over patches, a head."""

  def __init__(
    self,
    size: int,
    channels: int,
    classes: int,
    *,
    patch: int,
    width: int,
    depth: int,
    heads: int,
    rngs: nnx.Rngs,
  ):
    self.patches = nnx.Conv(channels, width, (patch, patch), strides=patch, rngs=rngs)
    positions = 0.02 * jax.random.normal(rngs.params(), ((size // patch) ** 2, width))
    self.pos_embedding = nnx.Param(positions)
    self.body = Transformer(width=width, depth=depth, heads=heads, causal=False, rngs=rngs)
    self.head = nnx.Linear(width, classes, rngs=rngs)

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = self.patches(x)
    x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.pos_embedding[...][None]
    return self.head(self.body(x).mean(1))


class GPT(nnx.Module):
  """A causal transformer on bytes."""

  def __init__(
    self,
    context: int,
    outputs: int,
    *,
    width: int,
    depth: int,
    heads: int,
    layer_norm: bool = True,
    skip: bool = True,
    rngs: nnx.Rngs,
  ):
    self.embed = nnx.Embed(256, width, rngs=rngs)
    self.pos_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (context, width)))
    self.body = Transformer(
      width=width,
      depth=depth,
      heads=heads,
      causal=True,
      layer_norm=layer_norm,
      skip=skip,
      rngs=rngs,
    )
    self.head = nnx.Linear(width, outputs, use_bias=False, rngs=rngs)

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    return self.head(self.body(self.embed(x) + self.pos_embedding[...][None]))
