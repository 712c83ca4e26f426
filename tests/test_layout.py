"""What is a matrix, of which axes, and in what kind of layer: from names and shapes."""

import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from optax.contrib import MuonDimensionNumbers

from spectral_optax import layout
from tests.flax_versions import as_pure

DEPTH = 5


def spec(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def specs(tree):
  """A tree with shapes for leaves."""
  return jax.tree.map(lambda s: spec(*s), tree, is_leaf=lambda x: isinstance(x, tuple))


def read(params):
  """{path: (rows, columns, type)} of the matrices; types that others have."""
  types = layout.layer_types_by_path(params)
  views = layout.matrix_views(params)
  matrices = {p: (v.reduction_axes, v.output_axes, types.pop(p)) for p, v in views.items()}
  return matrices, {p: t for p, t in types.items() if t is not None}


def stacked(expected, by=1):
  """What is expected of the same layer with more axes in front."""
  return {
    path: (tuple(a + by for a in rows), tuple(a + by for a in columns), kind)
    for path, (rows, columns, kind) in expected.items()
  }


def stack(tree, size=DEPTH):
  return jax.tree.map(lambda s: spec(size, *s.shape), tree)


def nnx_params(create, size=None):
  """The parameters' shapes of an nnx layer, or of a stack of them."""

  def build():
    rngs = nnx.Rngs(0)
    if size is None:
      return create(rngs)
    return nnx.split_rngs(splits=size)(nnx.vmap(create))(rngs)

  return nnx.state(nnx.eval_shape(build), nnx.Param)


def linen_params(module, *inputs):
  inputs = [spec(*i) if isinstance(i, tuple) else i for i in inputs]
  return jax.eval_shape(module.init, jax.random.key(0), *inputs)['params']


DENSE = ((0,), (1,), 'dense')
CONV_1D = ((0, 1), (2,), 'conv')
CONV_2D = ((0, 1, 2), (3,), 'conv')
CONV_3D = ((0, 1, 2, 3), (4,), 'conv')
ATTENTION_IN = ((0,), (1, 2), 'attention')
ATTENTION_OUT = ((0, 1), (2,), 'attention')
MULTI_HEAD = {
  'query/kernel': ATTENTION_IN,
  'key/kernel': ATTENTION_IN,
  'value/kernel': ATTENTION_IN,
  'out/kernel': ATTENTION_OUT,
}
LSTM = {f'{side}{gate}/kernel': DENSE for side in 'ih' for gate in 'ifgo'}


# ---------------------------------------------------------------------------------
# Standard layers
# ---------------------------------------------------------------------------------

# Name: layer with or without a bias, what its weights are. The conv windows and the
# sizes differ from each other, except where one equal to another is the point.
NNX_LAYERS = {
  'Linear': (lambda b, r: nnx.Linear(4, 6, use_bias=b, rngs=r), {'kernel': DENSE}),
  'Linear square': (lambda b, r: nnx.Linear(6, 6, use_bias=b, rngs=r), {'kernel': DENSE}),
  'Conv 1-D': (lambda b, r: nnx.Conv(4, 6, 3, use_bias=b, rngs=r), {'kernel': CONV_1D}),
  'Conv 2-D': (lambda b, r: nnx.Conv(4, 6, (3, 2), use_bias=b, rngs=r), {'kernel': CONV_2D}),
  'Conv 3-D': (lambda b, r: nnx.Conv(4, 6, (3, 2, 7), use_bias=b, rngs=r), {'kernel': CONV_3D}),
  'Conv 1×1': (lambda b, r: nnx.Conv(4, 6, (1, 1), use_bias=b, rngs=r), {'kernel': CONV_2D}),
  'Conv all equal': (lambda b, r: nnx.Conv(3, 3, (3, 3), use_bias=b, rngs=r), {'kernel': CONV_2D}),
  'Conv long window': (lambda b, r: nnx.Conv(1, 6, 400, use_bias=b, rngs=r), {'kernel': CONV_1D}),
  'Conv depthwise': (
    lambda b, r: nnx.Conv(6, 6, (3, 3), feature_group_count=6, use_bias=b, rngs=r),
    {'kernel': CONV_2D},
  ),
  'Conv depthwise 1-D': (
    lambda b, r: nnx.Conv(6, 6, 3, feature_group_count=6, use_bias=b, rngs=r),
    {'kernel': CONV_1D},
  ),
  'Conv grouped': (
    lambda b, r: nnx.Conv(8, 6, (3, 3), feature_group_count=2, use_bias=b, rngs=r),
    {'kernel': CONV_2D},
  ),
  'ConvTranspose 1-D': (
    lambda b, r: nnx.ConvTranspose(4, 6, 3, use_bias=b, rngs=r),
    {'kernel': CONV_1D},
  ),
  'ConvTranspose': (
    lambda b, r: nnx.ConvTranspose(4, 6, (3, 2), use_bias=b, rngs=r),
    {'kernel': CONV_2D},
  ),
  'LinearGeneral one to two': (
    lambda b, r: nnx.LinearGeneral(4, (6, 7), use_bias=True, rngs=r),
    {'kernel': ((0,), (1, 2), 'dense')},
  ),
  'LinearGeneral two to two': (
    lambda b, r: nnx.LinearGeneral((4, 5), (6, 7), axis=(-2, -1), use_bias=True, rngs=r),
    {'kernel': ((0, 1), (2, 3), 'dense')},
  ),
  'LinearGeneral batch': (
    lambda b, r: nnx.LinearGeneral(4, (6, 7), batch_axis={0: 3}, use_bias=True, rngs=r),
    {'kernel': ((1,), (2, 3), 'dense')},
  ),
  'Einsum': (
    lambda b, r: nnx.Einsum('ab,bcd->acd', (4, 6, 7), (6, 7), rngs=r),
    {'kernel': ((0,), (1, 2), 'dense')},
  ),
  'MultiHeadAttention': (
    lambda b, r: nnx.MultiHeadAttention(4, 12, 8, use_bias=b, rngs=r),
    MULTI_HEAD,
  ),
  'MultiHeadAttention normalized': (
    lambda b, r: nnx.MultiHeadAttention(4, 12, 8, use_bias=b, normalize_qk=True, rngs=r),
    MULTI_HEAD,
  ),
  # D = H = Dh.
  'MultiHeadAttention all equal': (
    lambda b, r: nnx.MultiHeadAttention(4, 4, 16, use_bias=b, rngs=r),
    MULTI_HEAD,
  ),
  'LSTMCell': (
    lambda b, r: nnx.LSTMCell(4, 6, rngs=r),
    {p.replace('if/', 'if_/'): v for p, v in LSTM.items()},
  ),
  'OptimizedLSTMCell': (
    lambda b, r: nnx.OptimizedLSTMCell(4, 6, rngs=r),
    {'dense_i/kernel': DENSE, 'dense_h/kernel': DENSE},
  ),
  'GRUCell': (
    lambda b, r: nnx.GRUCell(4, 6, rngs=r),
    {'dense_i/kernel': DENSE, 'dense_h/kernel': DENSE},
  ),
  'SimpleCell': (
    lambda b, r: nnx.SimpleCell(4, 6, rngs=r),
    {'dense_i/kernel': DENSE, 'dense_h/kernel': DENSE},
  ),
  'LoRALinear': (
    lambda b, r: nnx.LoRALinear(4, 6, lora_rank=2, use_bias=b, rngs=r),
    {'kernel': DENSE, 'lora/lora_a': DENSE, 'lora/lora_b': DENSE},
  ),
  'LayerNorm': (lambda b, r: nnx.LayerNorm(4, use_bias=b, rngs=r), {}),
  'RMSNorm': (lambda b, r: nnx.RMSNorm(4, rngs=r), {}),
  'BatchNorm': (lambda b, r: nnx.BatchNorm(4, use_bias=b, rngs=r), {}),
  'GroupNorm': (lambda b, r: nnx.GroupNorm(4, num_groups=2, use_bias=b, rngs=r), {}),
  'PReLU': (lambda b, r: nnx.PReLU(), {}),
}


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('name', NNX_LAYERS)
def test_nnx_layer(name, bias):
  create, expected = NNX_LAYERS[name]
  assert read(nnx_params(lambda rngs: create(bias, rngs))) == (expected, {})


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('name', NNX_LAYERS)
def test_nnx_layers_stacked_with_a_norm(name, bias):
  # What a block for `scan` has: without a bias, the norm shows that it is a stack.
  create, expected = NNX_LAYERS[name]

  class Block(nnx.Module):
    def __init__(self, rngs):
      self.norm = nnx.RMSNorm(4, rngs=rngs)
      self.layer = create(bias, rngs)

  expected = {f'layer/{path}': v for path, v in stacked(expected).items()}
  for size in (DEPTH, 4):  # 4 is the input's size, or the number of heads, too.
    if size == 4 and 'LinearGeneral' in name:
      size = 3
    assert read(nnx_params(Block, size)) == (expected, {})


# Without a bias nor anything around them, these still show that they are stacked.
@pytest.mark.parametrize('name', ['MultiHeadAttention', 'MultiHeadAttention all equal'])
def test_nnx_attention_stacked_alone(name):
  create, expected = NNX_LAYERS[name]
  assert read(nnx_params(lambda r: create(False, r), DEPTH)) == (stacked(expected), {})


def test_nnx_layers_stacked_twice():
  block = nnx_params(
    lambda r: nnx.List([nnx.Linear(4, 6, use_bias=False, rngs=r), nnx.LayerNorm(6, rngs=r)])
  )
  assert read(stack(stack(nnx.to_pure_dict(block), 3), 2)) == (
    {'0/kernel': ((2,), (3,), 'dense')},
    {},
  )


def test_nnx_embed_is_a_table():
  params = nnx_params(lambda rngs: nnx.Embed(9, 4, rngs=rngs))
  assert read(params) == ({}, {'embedding': 'embedding'})
  assert read(nnx_params(lambda rngs: nnx.Embed(9, 4, rngs=rngs), DEPTH)) == (
    {},
    {'embedding': 'embedding'},
  )


X = (2, 5, 4)
IMAGE = (2, 8, 8, 4)
LINEN_LAYERS = {
  'Dense': (lambda b: nn.Dense(6, use_bias=b), X, {'kernel': DENSE}),
  'Conv 1-D': (lambda b: nn.Conv(6, (3,), use_bias=b), X, {'kernel': CONV_1D}),
  'Conv 2-D': (lambda b: nn.Conv(6, (3, 2), use_bias=b), IMAGE, {'kernel': CONV_2D}),
  'Conv 3-D': (lambda b: nn.Conv(6, (3, 2, 7), use_bias=b), (2, 8, 8, 8, 4), {'kernel': CONV_3D}),
  'Conv depthwise': (
    lambda b: nn.Conv(4, (3, 3), feature_group_count=4, use_bias=b),
    IMAGE,
    {'kernel': CONV_2D},
  ),
  'Conv depthwise 1-D': (
    lambda b: nn.Conv(4, (3,), feature_group_count=4, use_bias=b),
    X,
    {'kernel': CONV_1D},
  ),
  'Conv grouped': (
    lambda b: nn.Conv(6, (3, 3), feature_group_count=2, use_bias=b),
    IMAGE,
    {'kernel': CONV_2D},
  ),
  'ConvTranspose': (lambda b: nn.ConvTranspose(6, (3, 2), use_bias=b), IMAGE, {'kernel': CONV_2D}),
  # The bias shows which of the last two axes is the output.
  'ConvTranspose transposed': (
    lambda b: nn.ConvTranspose(6, (3, 2), transpose_kernel=True),
    IMAGE,
    {'kernel': ((0, 1, 3), (2,), 'conv')},
  ),
  'ConvLocal': (lambda b: nn.ConvLocal(6, (3,)), X, {'kernel': ((1,), (2,), 'dense')}),
  'DenseGeneral': (
    lambda b: nn.DenseGeneral((6, 7), axis=(-2, -1)),
    X,
    {'kernel': ((0, 1), (2, 3), 'dense')},
  ),
  'DenseGeneral batch': (
    lambda b: nn.DenseGeneral((6, 7), batch_dims=(0,)),
    X,
    {'kernel': ((1,), (2, 3), 'dense')},
  ),
  'Einsum': (
    lambda b: nn.Einsum((4, 6, 7), 'abc,cde->abde'),
    X,
    {'kernel': ((0,), (1, 2), 'dense')},
  ),
  'MultiHeadDotProductAttention': (
    lambda b: nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, use_bias=b),
    X,
    MULTI_HEAD,
  ),
  'LSTMCell': (
    lambda b: nn.RNN(nn.LSTMCell(6)),
    X,
    {f'cell/{path}': v for path, v in LSTM.items()},
  ),
  'OptimizedLSTMCell': (
    lambda b: nn.RNN(nn.OptimizedLSTMCell(6)),
    X,
    {f'cell/{path}': v for path, v in LSTM.items()},
  ),
  'GRUCell': (
    lambda b: nn.RNN(nn.GRUCell(6)),
    X,
    {f'cell/{side}{gate}/kernel': DENSE for side in 'ih' for gate in 'rzn'},
  ),
  'ConvLSTMCell': (
    lambda b: nn.RNN(nn.ConvLSTMCell(6, (3, 3), use_bias=b)),
    (2, 3, 8, 8, 4),
    {'cell/ih/kernel': CONV_2D, 'cell/hh/kernel': CONV_2D},
  ),
  'LayerNorm': (lambda b: nn.LayerNorm(use_bias=b), X, {}),
  'RMSNorm': (lambda b: nn.RMSNorm(), X, {}),
}


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('name', LINEN_LAYERS)
def test_linen_layer(name, bias):
  create, inputs, expected = LINEN_LAYERS[name]
  assert read(linen_params(create(bias), inputs)) == (expected, {})


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('name', LINEN_LAYERS)
def test_linen_layers_stacked_by_vmap_with_a_norm(name, bias):
  create, inputs, expected = LINEN_LAYERS[name]

  class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
      return create(bias).copy(name='layer')(nn.LayerNorm()(x))

  # A name that says nothing, so that it is the norm that shows the stack.
  blocks = nn.vmap(Block, {'params': 0}, {'params': True}, None, axis_size=DEPTH)(name='block')
  expected = {f'block/layer/{path}': v for path, v in stacked(expected).items()}
  params = {'block': linen_params(blocks, inputs)}
  assert read(params) == (expected, {})


@pytest.mark.parametrize('bias', [True, False])
def test_linen_scan_without_a_norm(bias):
  # linen's own name for it is enough.
  class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return nn.Dense(4, use_bias=bias)(x), None

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.scan(Step, {'params': 0}, split_rngs={'params': True}, length=DEPTH)()(x, None)

  params = linen_params(Model(), X)
  assert read(params) == ({'ScanStep_0/Dense_0/kernel': ((1,), (2,), 'dense')}, {})


def test_linen_embed_is_a_table():
  params = linen_params(nn.Embed(9, 4), spec(2, 3, dtype=jnp.int32))
  assert read(params) == ({}, {'embedding': 'embedding'})


# ---------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------


class LlamaBlock(nnx.Module):
  def __init__(self, rngs, norm=nnx.RMSNorm, width=8, wide=24):
    linear = lambda i, o: nnx.Linear(i, o, use_bias=False, rngs=rngs)
    self.input_layernorm = norm(width, rngs=rngs)
    self.q_proj, self.o_proj = linear(width, width), linear(width, width)
    self.k_proj, self.v_proj = linear(width, 4), linear(width, 4)
    self.post_attention_layernorm = norm(width, rngs=rngs)
    self.gate_proj, self.up_proj = linear(width, wide), linear(width, wide)
    self.down_proj = linear(wide, width)


LLAMA_BLOCK = {
  **{f'{name}_proj/kernel': ((0,), (1,), 'attention') for name in 'qkvo'},
  'gate_proj/kernel': ((0,), (1,), 'mlp_up'),
  'up_proj/kernel': ((0,), (1,), 'mlp_up'),
  'down_proj/kernel': ((0,), (1,), 'mlp_down'),
}


class Llama(nnx.Module):
  def __init__(self, norm, size, rngs):
    block = lambda rngs: LlamaBlock(rngs, norm)
    self.embed_tokens = nnx.Embed(32, 8, rngs=rngs)
    if size is None:
      self.layers = nnx.List([block(rngs), block(rngs)])
    else:
      self.layers = nnx.split_rngs(splits=size)(nnx.vmap(block))(rngs)
    self.norm = norm(8, rngs=rngs)
    self.lm_head = nnx.Linear(8, 32, use_bias=False, rngs=rngs)


@pytest.mark.parametrize('norm', [nnx.RMSNorm, nnx.LayerNorm])
@pytest.mark.parametrize('size', [None, DEPTH, 8])  # 8 is the width, too.
def test_nnx_llama(norm, size):
  if size is None:
    expected = {f'layers/{i}/{path}': v for i in range(2) for path, v in LLAMA_BLOCK.items()}
  else:
    expected = {f'layers/{path}': v for path, v in stacked(LLAMA_BLOCK).items()}
  expected['lm_head/kernel'] = ((0,), (1,), 'head')
  params = nnx_params(lambda rngs: Llama(norm, size, rngs))
  assert read(params) == (expected, {'embed_tokens/embedding': 'embedding'})


class GPTAttention(nnx.Module):
  def __init__(self, bias, rngs):
    self.c_attn = nnx.Linear(8, 24, use_bias=bias, rngs=rngs)
    self.c_proj = nnx.Linear(8, 8, use_bias=bias, rngs=rngs)


class GPTMLP(nnx.Module):
  def __init__(self, bias, rngs):
    self.c_fc = nnx.Linear(8, 32, use_bias=bias, rngs=rngs)
    self.c_proj = nnx.Linear(32, 8, use_bias=bias, rngs=rngs)


class GPTBlock(nnx.Module):
  def __init__(self, bias, rngs):
    self.ln_1, self.ln_2 = nnx.LayerNorm(8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
    self.attn, self.mlp = GPTAttention(bias, rngs), GPTMLP(bias, rngs)


class GPT(nnx.Module):
  def __init__(self, bias, rngs):
    self.wte, self.wpe = nnx.Embed(50, 8, rngs=rngs), nnx.Embed(16, 8, rngs=rngs)
    self.h = nnx.List([GPTBlock(bias, rngs)])
    self.ln_f = nnx.LayerNorm(8, rngs=rngs)
    self.lm_head = nnx.Linear(8, 50, use_bias=False, rngs=rngs)


@pytest.mark.parametrize('bias', [True, False])
def test_nnx_gpt(bias):
  assert read(nnx_params(lambda rngs: GPT(bias, rngs))) == (
    {
      'h/0/attn/c_attn/kernel': ((0,), (1,), 'attention'),
      'h/0/attn/c_proj/kernel': ((0,), (1,), 'attention'),
      'h/0/mlp/c_fc/kernel': ((0,), (1,), 'mlp_up'),
      'h/0/mlp/c_proj/kernel': ((0,), (1,), 'mlp_down'),
      'lm_head/kernel': ((0,), (1,), 'head'),
    },
    {'wte/embedding': 'embedding', 'wpe/embedding': 'embedding'},
  )


class ResNetBlock(nnx.Module):
  def __init__(self, rngs):
    self.conv1 = nnx.Conv(8, 8, (3, 3), use_bias=False, rngs=rngs)
    self.bn1 = nnx.BatchNorm(8, rngs=rngs)
    self.conv2 = nnx.Conv(8, 8, (3, 3), use_bias=False, rngs=rngs)
    self.bn2 = nnx.BatchNorm(8, rngs=rngs)


class ResNet(nnx.Module):
  def __init__(self, size, rngs):
    self.stem = nnx.Conv(3, 8, (7, 7), use_bias=False, rngs=rngs)
    self.stem_bn = nnx.BatchNorm(8, rngs=rngs)
    if size is None:
      self.layers = nnx.List([ResNetBlock(rngs), ResNetBlock(rngs)])
    else:
      self.layers = nnx.split_rngs(splits=size)(nnx.vmap(ResNetBlock))(rngs)
    self.shortcut = nnx.Sequential(nnx.Conv(8, 8, (1, 1), rngs=rngs), nnx.BatchNorm(8, rngs=rngs))
    self.fc = nnx.Linear(8, 10, rngs=rngs)


@pytest.mark.parametrize('size', [None, DEPTH, 3, 8])  # The window's and the width's, too.
def test_nnx_resnet(size):
  block = {'conv1/kernel': CONV_2D, 'conv2/kernel': CONV_2D}
  if size is None:
    expected = {f'layers/{i}/{path}': v for i in range(2) for path, v in block.items()}
  else:
    expected = {f'layers/{path}': v for path, v in stacked(block).items()}
  expected |= {
    'stem/kernel': CONV_2D,
    'shortcut/layers/0/kernel': CONV_2D,
    'fc/kernel': ((0,), (1,), 'head'),
  }
  model = nnx.eval_shape(lambda: ResNet(size, nnx.Rngs(0)))
  # With the statistics and without.
  assert read(nnx.state(model, nnx.Param)) == (expected, {})
  assert read(nnx.state(model)) == (expected, {})


class ViTMlp(nn.Module):
  @nn.compact
  def __call__(self, x):
    wide = nn.gelu(nn.Dense(4 * x.shape[-1])(x))
    return nn.Dense(x.shape[-1])(wide)


class ViTBlock(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
    return x + ViTMlp(name='MlpBlock_0')(nn.LayerNorm()(x)), None


class ViT(nn.Module):
  patches: str
  scan: bool

  @nn.compact
  def __call__(self, x):
    if self.patches == 'dense':
      x = nn.Dense(8, name='patch_embed')(x.reshape(2, 4, 48))
    else:  # As the original implementation names it.
      x = nn.Conv(8, (4, 4), (4, 4), name='embedding')(x).reshape(2, 4, 8)
    cls = self.param('cls', nn.initializers.zeros, (1, 1, 8))
    x = jnp.concatenate([jnp.tile(cls, (2, 1, 1)), x], axis=1)
    x = x + self.param('pos_embedding', nn.initializers.zeros, (1, 5, 8))
    if self.scan:
      blocks = nn.scan(ViTBlock, {'params': 0}, split_rngs={'params': True}, length=DEPTH)
      x, _ = blocks(name='encoder')(x, None)
    else:
      for i in range(2):
        x, _ = ViTBlock(name=f'encoderblock_{i}')(x)
    return nn.Dense(10, name='head')(nn.LayerNorm(name='encoder_norm')(x[:, 0]))


@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('patches', ['dense', 'conv'])
def test_linen_vit(patches, scan):
  block = {
    **{f'MultiHeadDotProductAttention_0/{path}': v for path, v in MULTI_HEAD.items()},
    'MlpBlock_0/Dense_0/kernel': ((0,), (1,), 'mlp_up'),
    'MlpBlock_0/Dense_1/kernel': ((0,), (1,), 'mlp_down'),
  }
  if scan:
    expected = {f'encoder/{path}': v for path, v in stacked(block).items()}
  else:
    expected = {f'encoderblock_{i}/{path}': v for i in range(2) for path, v in block.items()}
  expected['head/kernel'] = ((0,), (1,), 'head')
  if patches == 'dense':
    expected['patch_embed/kernel'] = DENSE
  else:
    expected['embedding/kernel'] = CONV_2D
  assert read(linen_params(ViT(patches, scan), (2, 8, 8, 3))) == (
    expected,
    {'cls': 'embedding', 'pos_embedding': 'embedding'},
  )


class EquinoxBlock(eqx.Module):
  norm1: eqx.nn.LayerNorm
  attention: eqx.nn.MultiheadAttention
  norm2: eqx.nn.RMSNorm
  mlp: eqx.nn.MLP

  def __init__(self, key):
    self.norm1 = eqx.nn.LayerNorm(8)
    self.attention = eqx.nn.MultiheadAttention(2, 8, use_output_bias=True, key=key)
    self.norm2 = eqx.nn.RMSNorm(8, use_bias=False)
    self.mlp = eqx.nn.MLP(8, 8, 16, 1, use_bias=False, use_final_bias=False, key=key)


class EquinoxModel(eqx.Module):
  embedding: eqx.nn.Embedding
  stem: eqx.nn.Conv2d
  depthwise: eqx.nn.Conv1d
  blocks: EquinoxBlock | list[EquinoxBlock]
  cell: eqx.nn.GRUCell
  lstm: eqx.nn.LSTMCell
  plain: eqx.nn.MLP
  scale_of_another_name: eqx.nn.LayerNorm
  head: eqx.nn.Linear

  def __init__(self, key, scan):
    self.embedding = eqx.nn.Embedding(30, 8, key=key)
    self.stem = eqx.nn.Conv2d(3, 8, 3, key=key)
    self.depthwise = eqx.nn.Conv1d(8, 8, 3, groups=8, key=key)
    keys = jax.random.split(key, DEPTH)
    self.blocks = eqx.filter_vmap(EquinoxBlock)(keys) if scan else [EquinoxBlock(k) for k in keys]
    self.cell = eqx.nn.GRUCell(8, 6, key=key)
    self.lstm = eqx.nn.LSTMCell(8, 6, key=key)
    self.plain = eqx.nn.MLP(8, 4, 16, 1, key=key)
    self.scale_of_another_name = eqx.nn.LayerNorm(8)
    self.head = eqx.nn.Linear(8, 10, key=key)

  def __call__(self, x):
    raise AssertionError('a tree, although it is callable')


def equinox_params(scan=False):
  model = eqx.filter_eval_shape(EquinoxModel, jax.random.key(0), scan)
  return eqx.filter(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))


@pytest.mark.parametrize('scan', [True, False])
def test_equinox_model(scan):
  dense = ((1,), (0,), 'dense')
  block = {
    **{
      f'attention/{name}_proj/weight': ((1,), (0,), 'attention')
      for name in ('query', 'key', 'value', 'output')
    },
    'mlp/layers/0/weight': ((1,), (0,), 'mlp_up'),
    'mlp/layers/1/weight': ((1,), (0,), 'mlp_down'),
  }
  if scan:
    expected = {f'blocks/{path}': v for path, v in stacked(block).items()}
  else:
    expected = {f'blocks/{i}/{path}': v for i in range(DEPTH) for path, v in block.items()}
  expected |= {
    'stem/weight': ((1, 2, 3), (0,), 'conv'),
    'depthwise/weight': ((1, 2), (0,), 'conv'),
    **{f'{cell}/weight_{side}h': dense for cell in ('cell', 'lstm') for side in 'ih'},
    'plain/layers/0/weight': dense,
    'plain/layers/1/weight': dense,
    'head/weight': ((1,), (0,), 'head'),
  }
  assert read(equinox_params(scan)) == (expected, {'embedding/weight': 'embedding'})


@pytest.mark.parametrize(
  ('create', 'expected'),
  [
    (lambda k: eqx.nn.Linear(4, 6, key=k), {'weight': ((2,), (1,), 'dense')}),
    (lambda k: eqx.nn.Conv2d(4, 6, 3, key=k), {'weight': ((2, 3, 4), (1,), 'conv')}),
    (lambda k: eqx.nn.LayerNorm(4), {}),  # A weight, (5, 4), with a bias of its size.
  ],
)
def test_equinox_layers_stacked_alone(create, expected):
  keys = jax.random.split(jax.random.key(0), DEPTH)
  params = eqx.filter_eval_shape(eqx.filter_vmap(create), keys)
  assert read(params) == (expected, {})


def test_equinox_attention_by_attributes():
  # `value` is also what Flax calls a Variable's inside.
  class Attention(eqx.Module):
    query: jax.Array
    key: jax.Array
    value: jax.Array

  params = {'attention': Attention(spec(8, 4), spec(8, 4), spec(8, 4))}
  attention = ((0,), (1,), 'attention')
  assert read(params) == ({f'attention/{n}': attention for n in ('query', 'key', 'value')}, {})


# ---------------------------------------------------------------------------------
# Names and shapes
# ---------------------------------------------------------------------------------

# Trees of shapes, the matrices in them, and the types of what else has one.
TREES = {
  'haiku': (
    {
      'net/~/linear': {'w': (4, 6), 'b': (6,)},
      'net/~/conv2_d': {'w': (3, 3, 4, 6), 'b': (6,)},
      'net/~/conv1_d': {'w': (3, 4, 6)},
      'net/~/conv2_d_transpose': {'w': (3, 3, 6, 4), 'b': (6,)},  # Haiku: (H, W, O, I).
      'net/~/layer_norm': {'scale': (6,), 'offset': (6,)},
      'net/~/embed': {'embeddings': (9, 4)},
      'net/~/gru': {'w_i': (4, 18), 'w_h': (6, 18), 'b': (18,)},
    },
    {
      'net/~/linear/w': DENSE,
      'net/~/conv2_d/w': CONV_2D,
      'net/~/conv1_d/w': CONV_1D,
      'net/~/conv2_d_transpose/w': ((0, 1, 3), (2,), 'conv'),
      'net/~/gru/w_i': DENSE,
      'net/~/gru/w_h': DENSE,
    },
    {'net/~/embed/embeddings': 'embedding'},
  ),
  'haiku attention': (
    {
      f'transformer/multi_head_attention/{n}': {'w': (8, 8), 'b': (8,)}
      for n in ('query', 'key', 'value', 'linear')
    },
    {
      f'transformer/multi_head_attention/{n}/w': ((0,), (1,), 'attention')
      for n in ('query', 'key', 'value', 'linear')
    },
    {},
  ),
  'arrays in a list': ([(4, 6), (6,), (3, 4, 6), ()], {'0': DENSE}, {}),
  'one array': ((4, 6), {'': DENSE}, {}),
  'plain MLP': (
    {'mlp': {'fc1': {'kernel': (4, 16)}, 'fc2': {'kernel': (16, 4)}}},
    {'mlp/fc1/kernel': DENSE, 'mlp/fc2/kernel': DENSE},
    {},
  ),
  'MLP of numbered arrays': (
    {'w1': (4, 16), 'b1': (16,), 'w2': (16, 3), 'b2': (3,)},
    {'w1': DENSE, 'w2': DENSE},
    {},
  ),
  'stacked arrays': (
    {
      'embed': {'w': (50, 8)},
      'layers': {
        'attn_norm': (5, 8),
        **dict.fromkeys(('wq', 'wk', 'wv', 'wo'), (5, 8, 8)),
        'mlp_norm': (5, 8),
        'w1': (5, 8, 24),
        'w2': (5, 24, 8),
        'w3': (5, 8, 24),
      },
      'lm_head': (8, 50),
    },
    {
      **{f'layers/w{name}': ((1,), (2,), 'attention') for name in 'qkvo'},
      'layers/w1': ((1,), (2,), 'mlp_up'),
      'layers/w2': ((1,), (2,), 'mlp_down'),
      'layers/w3': ((1,), (2,), 'mlp_up'),
      'lm_head': ((0,), (1,), 'head'),
    },
    {'embed/w': 'embedding'},
  ),
  # Twelve heads for the queries, two for keys and values, no bias on the way out.
  'grouped queries, stacked': (
    {
      'attn': {
        'q_proj': {'kernel': (5, 8, 12, 4), 'bias': (5, 12, 4)},
        'k_proj': {'kernel': (5, 8, 2, 4), 'bias': (5, 2, 4)},
        'v_proj': {'kernel': (5, 8, 2, 4), 'bias': (5, 2, 4)},
        'o_proj': {'kernel': (5, 12, 4, 8)},
      },
      'input_norm': {'scale': (5, 8)},
    },
    {
      **{f'attn/{n}_proj/kernel': ((1,), (2, 3), 'attention') for n in 'qkv'},
      'attn/o_proj/kernel': ((1, 2), (3,), 'attention'),
    },
    {},
  ),
  'fused query, key and value by head': (
    {'attn': {'qkv': {'kernel': (8, 3, 2, 4)}, 'proj': {'kernel': (2, 4, 8)}}},
    {
      'attn/qkv/kernel': ((0,), (1, 2, 3), 'attention'),
      'attn/proj/kernel': ((0, 1), (2,), 'attention'),
    },
    {},
  ),
  'mixture of experts in a scanned block': (
    {
      'layers': {
        'attn': {n: {'kernel': (5, 8, 8)} for n in ('q_proj', 'k_proj', 'v_proj', 'o_proj')},
        'norm': {'scale': (5, 8)},
        'moe': {
          'router': {'kernel': (5, 8, 4)},
          'experts': {'up_proj': {'kernel': (5, 4, 8, 16)}, 'down_proj': {'kernel': (5, 4, 16, 8)}},
        },
      },
    },
    {
      **{f'layers/attn/{n}_proj/kernel': ((1,), (2,), 'attention') for n in 'qkvo'},
      'layers/moe/router/kernel': ((1,), (2,), 'dense'),
      'layers/moe/experts/up_proj/kernel': ((2,), (3,), 'mlp_up'),
      'layers/moe/experts/down_proj/kernel': ((2,), (3,), 'mlp_down'),
    },
    {},
  ),
  'T5': (
    {
      'attention': {n: {'kernel': (8, 8)} for n in ('query', 'key', 'value', 'out')},
      'mlp': {'wi_0': {'kernel': (8, 16)}, 'wi_1': {'kernel': (8, 16)}, 'wo': {'kernel': (16, 8)}},
      'pre_attention_layer_norm': {'scale': (8,)},
      'relpos_bias': {'rel_embedding': (2, 32)},
    },
    {
      **{f'attention/{n}/kernel': ((0,), (1,), 'attention') for n in ('query', 'key', 'value')},
      'attention/out/kernel': ((0,), (1,), 'attention'),
      'mlp/wi_0/kernel': ((0,), (1,), 'mlp_up'),
      'mlp/wi_1/kernel': ((0,), (1,), 'mlp_up'),
      'mlp/wo/kernel': ((0,), (1,), 'mlp_down'),
    },
    {'relpos_bias/rel_embedding': 'embedding'},
  ),
  # By the way back beside it, which the table and the classifier are not.
  'unnamed sides of an MLP': (
    {
      'Embed_0': {'embedding': (50, 8)},
      'SelfAttention_0': {n: {'kernel': (8, 2, 4)} for n in ('query', 'key', 'value')},
      'Dense_0': {'kernel': (8, 16)},
      'Dense_1': {'kernel': (16, 8)},
      'Dense_2': {'kernel': (8, 50)},
    },
    {
      **{f'SelfAttention_0/{n}/kernel': ATTENTION_IN for n in ('query', 'key', 'value')},
      'Dense_0/kernel': ((0,), (1,), 'mlp_up'),
      'Dense_1/kernel': ((0,), (1,), 'mlp_down'),
      'Dense_2/kernel': DENSE,
    },
    {'Embed_0/embedding': 'embedding'},
  ),
  'tables': (
    {
      'embedding': (9, 4),
      'wte': (9, 4),
      'tok_emb': {'weight': (9, 4)},
      'position': {'pos_embed': (5, 9, 4)},
      'token_embed': {'w': (9, 4)},
      'cls_token': (1, 4),
    },
    {},
    {
      'embedding': 'embedding',
      'wte': 'embedding',
      'tok_emb/weight': 'embedding',
      'position/pos_embed': 'embedding',
      'token_embed/w': 'embedding',
      'cls_token': 'embedding',
    },
  ),
  'not tables': (
    {
      'patch_embed': {'kernel': (48, 8)},
      'PatchEmbed_0': {'weight': (8, 48)},
      'embedding': {'weight': (8, 3, 4, 4)},
      'time_embed': {'w': (4, 8), 'b': (8,)},
      'position_embed': {'kernel': (2, 8), 'bias': (8,)},
      'unembed': {'weight': (50, 8)},
      'token_mixing': {'Dense_0': {'kernel': (4, 6)}},
    },
    {
      'patch_embed/kernel': DENSE,
      'PatchEmbed_0/weight': ((1,), (0,), 'dense'),
      'embedding/weight': ((1, 2, 3), (0,), 'conv'),
      'time_embed/w': DENSE,
      'position_embed/kernel': DENSE,
      'unembed/weight': ((1,), (0,), 'head'),
      'token_mixing/Dense_0/kernel': DENSE,
    },
    {},
  ),
  'heads': (
    {
      name: {'kernel': (8, 10)}
      for name in ('head', 'lm_head', 'mlp_head', 'classifier', 'logits', 'fc', 'output_layer')
    },
    {
      f'{name}/kernel': ((0,), (1,), 'head')
      for name in ('head', 'lm_head', 'mlp_head', 'classifier', 'logits', 'fc', 'output_layer')
    },
    {},
  ),
  'MLP of fc and proj': (
    {
      '0': {
        'attn': {'qkv': {'kernel': (8, 24)}, 'proj': {'kernel': (8, 8)}},
        'mlp': {'fc': {'kernel': (8, 16)}, 'proj': {'kernel': (16, 8)}},
      }
    },
    {
      '0/attn/qkv/kernel': ((0,), (1,), 'attention'),
      '0/attn/proj/kernel': ((0,), (1,), 'attention'),
      '0/mlp/fc/kernel': ((0,), (1,), 'mlp_up'),
      '0/mlp/proj/kernel': ((0,), (1,), 'mlp_down'),
    },
    {},
  ),
  'head beside an MLP of its size': (
    {
      'attn': {n: {'kernel': (8, 2, 4)} for n in ('query', 'key', 'value')},
      'wide': {'kernel': (8, 16)},
      'narrow': {'kernel': (16, 8)},
      'head': {'kernel': (8, 16)},
    },
    {
      **{f'attn/{n}/kernel': ATTENTION_IN for n in ('query', 'key', 'value')},
      'wide/kernel': ((0,), (1,), 'mlp_up'),
      'narrow/kernel': ((0,), (1,), 'mlp_down'),
      'head/kernel': ((0,), (1,), 'head'),
    },
    {},
  ),
  # Beside its bias, (6, 6, 7) may be six layers; the norm says that it is not.
  'DenseGeneral to as many': (
    {'general': {'kernel': (6, 6, 7), 'bias': (6, 7)}, 'norm': {'scale': (6,)}},
    {'general/kernel': ((0,), (1, 2), 'dense')},
    {},
  ),
  # Beside its bias, (5, 1, 8) may be a depthwise convolution; the norm says it is not.
  'Equinox Linear of one unit, stacked': (
    {'last': {'weight': (5, 1, 8), 'bias': (5, 1)}, 'norm': {'weight': (5, 8)}},
    {'last/weight': ((2,), (1,), 'dense')},
    {},
  ),
  'convolutions in a Sequential': (
    {'layers': {'0': {'kernel': (3, 4, 6)}, '1': {'kernel': (3, 6, 8)}}},
    {'layers/0/kernel': CONV_1D, 'layers/1/kernel': CONV_1D},
    {},
  ),
  # The name of a module above is no evidence for what is in it.
  'dense in a ConvNet': (
    {'ConvBlock_0': {'Conv_0': {'kernel': (3, 3, 4, 4)}, 'Dense_0': {'kernel': (4, 6)}}},
    {'ConvBlock_0/Conv_0/kernel': CONV_2D, 'ConvBlock_0/Dense_0/kernel': DENSE},
    {},
  ),
  'conv in a DenseNet': (
    {'DenseBlock_0': {'Conv_0': {'kernel': (3, 4, 6)}}},
    {'DenseBlock_0/Conv_0/kernel': CONV_1D},
    {},
  ),
  'convolutions called layers': (
    {'layers': {'conv1': {'kernel': (3, 3, 3, 8)}, 'conv2': {'kernel': (3, 3, 8, 8)}}},
    {'layers/conv1/kernel': CONV_2D, 'layers/conv2/kernel': CONV_2D},
    {},
  ),
  'conditional norm': (
    {'norm': {'kernel': (4, 8), 'bias': (8,)}, 'plain_norm': {'weight': (5, 8)}},
    {'norm/kernel': DENSE},
    {},
  ),
  'scalars beside a stack': (
    {'layers': {'Dense_0': {'kernel': (5, 4, 6), 'bias': (5, 6)}}, 'scale': (), 'logit_scale': ()},
    {'layers/Dense_0/kernel': ((1,), (2,), 'dense')},
    {},
  ),
  'LoRA by hand': (
    {'kernel': (8, 8), 'A': (8, 2), 'B': (2, 8)},
    {'kernel': DENSE, 'A': DENSE, 'B': DENSE},
    {},
  ),
  'DenseNet of one unit': (
    {'Dense_0': {'kernel': (4, 1), 'bias': (1,)}},
    {'Dense_0/kernel': DENSE},
    {},
  ),
}


@pytest.mark.parametrize('name', TREES)
def test_names_and_shapes(name):
  shapes, expected, others = TREES[name]
  assert read(specs(shapes)) == (expected, others)


@pytest.mark.parametrize(
  'wrap',
  [
    pytest.param(lambda tree: tree, id='dict'),
    pytest.param(FrozenDict, id='FrozenDict'),
    pytest.param(nnx.State, id='State'),
    pytest.param(lambda tree: [tree, (tree,)], id='list'),
    pytest.param(lambda tree: jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), tree), id='numpy'),
    pytest.param(lambda tree: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tree), id='jax'),
  ],
)
def test_results_have_the_structure_of_the_input(wrap):
  params = wrap(specs({'Dense_0': {'kernel': (4, 6), 'bias': (6,)}, 'step': ()}))
  numbers = layout.weight_dimension_numbers(params)
  types = layout.layer_types(params)
  for result, kernel in ((numbers, MuonDimensionNumbers((0,), (1,))), (types, 'dense')):
    flat, structure = jax.tree.flatten(
      result, is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers)
    )
    assert structure == jax.tree.structure(params)
    copies = len(flat) // 3
    assert flat == [None, kernel, None] * copies


def test_leaves_that_are_no_float_arrays_are_no_matrices():
  params = {
    'kernel': spec(4, 6),
    'tokens': spec(4, 6, dtype=jnp.int32),
    'mask': np.ones((4, 6), bool),
    'count': 3,
    'rate': 0.5,
    'activation': jax.nn.relu,
    'rng': jax.random.key(0),
  }
  assert read(params) == ({'kernel': DENSE}, {})
  # Nor evidence: a counter among stacked layers has no axis for them.
  block = {'Dense_0': {'kernel': spec(5, 4, 6)}, 'norm': {'scale': spec(5, 4)}}
  block['count'] = spec(dtype=jnp.int32)
  assert read(block) == ({'Dense_0/kernel': ((1,), (2,), 'dense')}, {})


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float64])
def test_any_float_is_a_matrix(dtype):
  assert list(layout.matrix_views({'w': jax.ShapeDtypeStruct((4, 6), dtype)})) == ['w']


def test_empty_arrays_are_no_matrices():
  assert layout.matrix_views(specs({'kernel': (0, 6)})) == {}
  assert layout.matrix_views(specs({'w': (0, 6)}), MuonDimensionNumbers()) == {}


def test_nothing_at_all():
  assert layout.matrix_views({}) == {}
  assert layout.matrix_views({}, MuonDimensionNumbers()) == {}
  assert layout.weight_dimension_numbers({}) == {}


def test_masked_parameters_are_absent():
  params = specs({'a': {'kernel': (4, 6), 'bias': (6,)}, 'b': {'kernel': (6, 3)}})
  params['a']['kernel'] = optax.MaskedNode()
  assert read(params) == ({'b/kernel': DENSE}, {})
  assert layout.weight_dimension_numbers(params) == {
    'a': {'kernel': optax.MaskedNode(), 'bias': None},
    'b': {'kernel': MuonDimensionNumbers((0,), (1,))},
  }


def test_nnx_state_has_the_same_paths_with_and_without_variables():
  state = nnx_params(lambda rngs: GPT(True, rngs))
  pure = as_pure(state)
  assert jax.tree.structure(state) != jax.tree.structure(pure)
  assert list(layout.leaves_by_path(state)) == list(layout.leaves_by_path(pure))
  assert 'h/0/attn/c_attn/kernel' in layout.leaves_by_path(state)
  assert read(state) == read(pure) == read(nnx.to_pure_dict(state))


# What cannot be told from names and shapes: read as documented, with these to know.
@pytest.mark.parametrize(
  ('shapes', 'path', 'expected'),
  [
    ({'DenseGeneral_0': {'kernel': (4, 5, 6, 7)}}, 'DenseGeneral_0/kernel', ((0, 1, 2), (3,))),
    ({'kernel': (5, 4, 6)}, 'kernel', ((0, 1), (2,))),  # Five layers, or a window of five?
    ({'ConvTranspose_0': {'kernel': (3, 3, 6, 4)}}, 'ConvTranspose_0/kernel', ((0, 1, 2), (3,))),
  ],
)
def test_what_cannot_be_inferred(shapes, path, expected):
  view = layout.matrix_views(specs(shapes))[path]
  assert (view.reduction_axes, view.output_axes) == expected


# ---------------------------------------------------------------------------------
# The user's own
# ---------------------------------------------------------------------------------

N = MuonDimensionNumbers
PARAMS = {
  'block': {'kernel': (2, 3, 4), 'bias': (4,)},
  'other': [(5, 6), (7, 8)],
}


@pytest.mark.parametrize(
  ('numbers', 'expected'),
  [
    pytest.param(
      {'block': {'kernel': N((0, 1), 2), 'bias': None}, 'other': [None, N()]},
      {'block/kernel': ((), (0, 1), (2,)), 'other/1': ((), (0,), (1,))},
      id='tree',
    ),
    pytest.param(
      {'block': N(-2, -1), 'other': None}, {'block/kernel': ((0,), (1,), (2,))}, id='prefix'
    ),
    pytest.param(
      N(-1, -2),
      {
        'block/kernel': ((0,), (2,), (1,)),
        'other/0': ((), (1,), (0,)),
        'other/1': ((), (1,), (0,)),
      },
      id='one for all',
    ),
    pytest.param({'block/kernel': N((2, 0), 1)}, {'block/kernel': ((), (2, 0), (1,))}, id='flat'),
    pytest.param(
      {'other': N(1, 0), 'other/1': None}, {'other/0': ((), (1,), (0,))}, id='longest path'
    ),
    pytest.param(
      lambda params: jax.tree.map(lambda p: N(0, -1) if p.ndim == 2 else None, params),
      {'other/0': ((), (0,), (1,)), 'other/1': ((), (0,), (1,))},
      id='callable',
    ),
    pytest.param(
      lambda params: {'block': N([1], np.int64(2))},
      {'block/kernel': ((0,), (1,), (2,))},
      id='callable, prefix',
    ),
    pytest.param({'block': None, 'other': None}, {}, id='none'),
  ],
)
def test_overrides(numbers, expected):
  views = layout.matrix_views(specs(PARAMS), numbers)
  found = {p: (v.batch_axes, v.reduction_axes, v.output_axes) for p, v in views.items()}
  assert found == expected


@pytest.mark.parametrize(
  'params',
  [
    pytest.param(lambda: nnx_params(lambda rngs: GPT(True, rngs)), id='nnx'),
    pytest.param(lambda: linen_params(ViT('conv', True), (2, 8, 8, 3)), id='linen'),
    pytest.param(equinox_params, id='equinox'),  # A tree that is callable, with Nones in it.
  ],
)
def test_an_inferred_tree_is_an_override(params):
  params = params()
  numbers = layout.weight_dimension_numbers(params)
  assert layout.matrix_views(params, numbers) == layout.matrix_views(params)
  # Also when the parameters are as they are in an update, or are hidden in part.
  assert layout.matrix_views(as_pure(params), numbers) == layout.matrix_views(params)
  hidden = jax.tree.map(lambda p: p if len(p.shape) == 2 else optax.MaskedNode(), params)
  views = {p: v for p, v in layout.matrix_views(params).items() if len(v.shape) == 2}
  assert layout.matrix_views(hidden, numbers) == views


def test_match_prefix_gives_absent_parameters_nothing():
  params = {'a': spec(2, 3), 'b': optax.MaskedNode(), 'c': None, 'd': {}}
  assert layout.match_prefix({'': 1}, params, 'alpha') == {'a': 1}
  # Entries for what a mask hides are no mistake.
  assert layout.match_prefix({'a': 1, 'b/x': 2, 'c': 3}, params, 'alpha') == {'a': 1}
  # Nor is one that others overrule.
  assert layout.match_prefix({'': 0, 'a': 1}, {'a': spec(2, 3)}, 'alpha') == {'a': 1}
  assert layout.match_prefix({'a': 1}, {'a': 0.0, 'b': 0.0}, 'alpha') == {'a': 1}


@pytest.mark.parametrize('entry', ['block/kernal', 'block/kernel/deeper', 'blocks'])
def test_an_entry_for_no_parameter_is_an_error(entry):
  with pytest.raises(ValueError, match=f"alpha does not match .* {entry!r}.*'block/kernel'"):
    layout.match_prefix({entry: 1.0}, specs(PARAMS), 'alpha')


def test_the_error_lists_some_parameters():
  params = specs({f'w{i}': (2, 2) for i in range(10)})
  with pytest.raises(ValueError, match=r"'w0', .*'w7' and 2 more"):
    layout.match_prefix({'x': 1.0}, params, 'alpha')


@pytest.mark.parametrize(
  ('numbers', 'message'),
  [
    (N(0, 3), "'block/kernel': output_axis 3 is not an axis of its shape (2, 3, 4)"),
    (N(-4, 1), "'block/kernel': reduction_axis -4 is not an axis of its shape (2, 3, 4)"),
    (N(None, 1), "'block/kernel': reduction_axis None is not an axis of its shape (2, 3, 4)"),
    (N(0, (1, 0)), "'block/kernel' with shape (2, 3, 4): reduction_axis (0,)"),
    (N(2, -1), "'block/kernel' with shape (2, 3, 4): reduction_axis (2,) and output_axis (2,)"),
    (N((), 1), "'block/kernel' with shape (2, 3, 4): reduction_axis () and output_axis (1,)"),
    (3, "'block/kernel' must be an optax.contrib.MuonDimensionNumbers or None, got 3"),
  ],
)
def test_bad_dimension_numbers_are_errors(numbers, message):
  with pytest.raises(ValueError, match=re.escape(message)) as error:
    layout.matrix_views(specs(PARAMS), {'block': {'kernel': numbers}})
  assert 'None' in str(error.value)  # The way out.


def test_numbers_of_a_vector_are_an_error():
  with pytest.raises(ValueError, match=re.escape("'block/bias': output_axis 1 is not an axis")):
    layout.matrix_views(specs(PARAMS), {'block': {'bias': N()}})


@pytest.mark.parametrize('numbers', [None, N()])
def test_complex_matrices_are_an_error(numbers):
  params = {'w': spec(4, 6, dtype=jnp.complex64)}
  with pytest.raises(TypeError, match=r"'w' with shape \(4, 6\) has dtype complex64.*mask it"):
    layout.matrix_views(params, numbers)


def test_two_leaves_of_one_path_are_an_error():
  with pytest.raises(ValueError, match="the path 'a/b'"):
    layout.leaves_by_path({'a/b': 1, 'a': {'b': 2}})


# ---------------------------------------------------------------------------------
# Matrix views
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('shape', 'numbers', 'batch_axes', 'einsum', 'matrices'),
  [
    ((2, 3), N(0, 1), (), 'ab->ab', (1, 2, 3)),
    ((2, 3), N(1, 0), (), 'ab->ba', (1, 3, 2)),
    ((2, 3, 4), N(-2, -1), (0,), 'abc->abc', (2, 3, 4)),
    ((2, 3, 4), N(0, -2), (2,), 'abc->cab', (4, 2, 3)),
    ((2, 3, 4), N((0, 1), 2), (), 'abc->abc', (1, 6, 4)),
    ((2, 3, 4), N((1, 0), 2), (), 'abc->bac', (1, 6, 4)),
    ((2, 3, 4), N(2, (-2, 0)), (), 'abc->cba', (1, 4, 6)),
    ((2, 3, 4, 5, 6), N((3, 1), -1), (0, 2), 'abcde->acdbe', (8, 15, 6)),
    ((2, 3, 4, 5), N(2, (3, 0)), (1,), 'abcd->bcda', (3, 4, 10)),
  ],
)
def test_matrices_there_and_back(shape, numbers, batch_axes, einsum, matrices):
  x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
  view = layout.matrix_view('x', shape, numbers)
  assert view.batch_axes == batch_axes
  assert view.batch_shape == tuple(shape[a] for a in batch_axes)
  assert (view.rows, view.columns) == matrices[1:]
  forth = view.to_matrices(x)
  np.testing.assert_array_equal(forth, np.einsum(einsum, x).reshape(matrices))
  np.testing.assert_array_equal(view.from_matrices(forth), x)


@pytest.mark.parametrize(
  ('module', 'inputs', 'contract'),
  [
    (nn.Dense(6, use_bias=False), (2, 4), lambda x, m: x @ m),
    (nn.DenseGeneral((3, 5)), (2, 4), lambda x, m: (x @ m).reshape(2, 3, 5)),
    (
      nn.DenseGeneral(6, axis=(-2, -1)),
      (2, 3, 4),
      lambda x, m: x.reshape(2, 12) @ m,
    ),
    # One window: the convolution is the product with the matrix.
    (
      nn.Conv(6, (3, 2), padding='VALID'),
      (1, 3, 2, 4),
      lambda x, m: (x.reshape(1, 24) @ m).reshape(1, 1, 1, 6),
    ),
  ],
)
def test_a_layer_is_the_product_with_its_matrix(module, inputs, contract):
  x = jax.random.normal(jax.random.key(1), inputs)
  params = module.init(jax.random.key(0), x)['params']
  matrix = layout.matrix_views(params)['kernel'].to_matrices(params['kernel'])[0]
  np.testing.assert_allclose(module.apply({'params': params}, x), contract(x, matrix), rtol=1e-5)
