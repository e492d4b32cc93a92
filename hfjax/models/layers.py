"""Building blocks of the Wan network (spec section 2): projections, attention, one block.

Activations are in the compute dtype; norms, modulation and rotary embedding work in float32.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hfjax.models.attention import Attend, dense
from hfjax.models.presets import WanConfig


class TextKV(NamedTuple):
  """Cross-attention keys and values, per layer or stacked over layers; image rows for I2V."""

  k: Float[Array, "b t h d"]
  v: Float[Array, "b t h d"]
  image_k: Float[Array, "b i h d"] | None = None
  image_v: Float[Array, "b i h d"] | None = None


class LayerInputs(NamedTuple):
  """What one layer gets beside its parameters; the leading axis of layers is scanned over."""

  past: Any = None
  text: TextKV | None = None


class SharedInputs(NamedTuple):
  """What all layers get alike."""

  modulation: Float[Array, "b g six m"]  # g: one for all frames, or one per frame
  attend: Any
  text: Any = None  # embedded text [b t m], where its keys are not given
  image: Any = None  # embedded image [b i m], likewise


class LayerKV(NamedTuple):
  """Keys and values of the current tokens, normalised and not rotated."""

  k: Float[Array, "b s h d"]
  v: Float[Array, "b s h d"]


def xavier(fan_in: int, fan_out: int):
  """Xavier-uniform initialiser of a matrix with the given fans, however its axes are folded."""
  limit = math.sqrt(6 / (fan_in + fan_out))

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -limit, limit)

  return init


def linear(
  features: int | Sequence[int],
  fans: tuple[int, int],
  dtype,
  name: str,
  axis: int | Sequence[int] = -1,
  init=None,
) -> nn.DenseGeneral:
  """Linear layer with bias, Xavier-initialised for the fans of one of its matrices."""
  return nn.DenseGeneral(
    features, axis=axis, dtype=dtype, kernel_init=init or xavier(*fans), name=name
  )


def modulate(
  x: Float[Array, "b s m"], shift: Float[Array, "b g m"], scale: Float[Array, "b g m"], dtype
) -> Float[Array, "b s m"]:
  """`x (1 + scale) + shift`, each of the g groups of tokens by its own pair."""
  grouped = x.reshape(x.shape[0], scale.shape[1], -1, x.shape[-1])
  return (grouped * (1 + scale[:, :, None]) + shift[:, :, None]).reshape(x.shape).astype(dtype)


def add_gated(
  x: Float[Array, "b s m"], y: Float[Array, "b s m"], gate: Float[Array, "b g m"]
) -> Float[Array, "b s m"]:
  """`x + gate y` in float32, in the dtype of `x`."""
  grouped = y.astype(jnp.float32).reshape(y.shape[0], gate.shape[1], -1, y.shape[-1])
  return (x.astype(jnp.float32) + (grouped * gate[:, :, None]).reshape(x.shape)).astype(x.dtype)


def layer_norm(eps: float, affine: bool = False, name: str | None = None) -> nn.LayerNorm:
  """LayerNorm in float32."""
  return nn.LayerNorm(
    eps, dtype=jnp.float32, use_bias=affine, use_scale=affine, use_fast_variance=False, name=name
  )


def head_norm(eps: float, name: str) -> nn.RMSNorm:
  """RMS norm over all heads together, in float32; `[... h d]`."""
  return nn.RMSNorm(
    eps,
    dtype=jnp.float32,
    reduction_axes=(-2, -1),
    feature_axes=(-2, -1),
    use_fast_variance=False,
    name=name,
  )


class SelfAttention(nn.Module):
  """Self-attention; what it looks at is decided by the strategy `attend`."""

  config: WanConfig
  attend: Attend
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, "b s m"], past, shared
  ) -> tuple[Float[Array, "b s m"], LayerKV]:
    c = self.config
    heads = (c.heads, c.head_dim)
    qkv = linear((3, *heads), (c.dim, c.dim), self.dtype, "qkv")(x)
    q, k, v = (qkv[:, :, i] for i in range(3))
    q = head_norm(c.eps, "norm_q")(q).astype(self.dtype)
    k = head_norm(c.eps, "norm_k")(k).astype(self.dtype)
    y, recalled = self.attend(q, k, v, past, shared)
    if c.linear:
      # Zero-initialised, so that a model without the branch starts out unchanged.
      project = linear(
        c.head_dim, (c.head_dim, c.head_dim), self.dtype, "linear_proj", init=nn.initializers.zeros
      )
      if recalled is not None:
        extra = project(recalled.y.astype(self.dtype))
        y = y + jnp.where(recalled.present[:, None, None, None], extra, 0).astype(y.dtype)
      elif self.is_initializing():
        project(y)
    out = linear(c.dim, (c.dim, c.dim), self.dtype, "out", axis=(-2, -1))(y)
    return out, LayerKV(k, v)


class CrossAttention(nn.Module):
  """Attention to the text, and beside it to the image where there is one."""

  config: WanConfig
  dtype: Any

  def setup(self):
    c = self.config
    heads = (c.heads, c.head_dim)
    make = functools.partial(linear, fans=(c.dim, c.dim), dtype=self.dtype)
    self.q = make(heads, name="q")
    self.kv = make((2, *heads), name="kv")
    self.norm_q = head_norm(c.eps, "norm_q")
    self.norm_k = head_norm(c.eps, "norm_k")
    if c.image_dim:
      self.image_kv = make((2, *heads), name="image_kv")
      self.norm_image_k = head_norm(c.eps, "norm_image_k")
    self.out = make(c.dim, name="out", axis=(-2, -1))

  def keys_values(
    self, text: Float[Array, "b t m"], image: Float[Array, "b i m"] | None = None
  ) -> TextKV:
    """Keys and values of the embedded text (and image), which depend on nothing else."""
    kv = self.kv(text)
    k = self.norm_k(kv[:, :, 0]).astype(self.dtype)
    if not self.config.image_dim:
      return TextKV(k, kv[:, :, 1])
    image_kv = self.image_kv(image)
    image_k = self.norm_image_k(image_kv[:, :, 0]).astype(self.dtype)
    return TextKV(k, kv[:, :, 1], image_k, image_kv[:, :, 1])

  def __call__(self, x: Float[Array, "b s m"], kv: TextKV) -> Float[Array, "b s m"]:
    q = self.norm_q(self.q(x)).astype(self.dtype)
    y = dense(q, kv.k, kv.v)
    if kv.image_k is not None and kv.image_v is not None:
      y = y + dense(q, kv.image_k, kv.image_v)
    return self.out(y)


class Block(nn.Module):
  """Transformer block: self-attention, cross-attention and feed-forward, modulated by time."""

  config: WanConfig
  attend: Attend
  dtype: Any
  collect: bool

  @nn.compact
  def __call__(
    self, x: Float[Array, "b s m"], layer: LayerInputs, shared: SharedInputs
  ) -> tuple[Float[Array, "b s m"], LayerKV | None]:
    c = self.config
    table = self.param("modulation", nn.initializers.normal(c.dim**-0.5), (6, c.dim))
    parts = table.astype(jnp.float32) + shared.modulation
    shift1, scale1, gate1, shift2, scale2, gate2 = (parts[:, :, i] for i in range(6))

    y = modulate(layer_norm(c.eps)(x), shift1, scale1, self.dtype)
    y, kv = SelfAttention(c, self.attend, self.dtype, name="self_attn")(
      y, layer.past, shared.attend
    )
    x = add_gated(x, y, gate1)

    cross = CrossAttention(c, self.dtype, name="cross_attn")
    text = layer.text
    if text is None:
      text = cross.keys_values(shared.text, shared.image)
    x = x + cross(layer_norm(c.eps, affine=True, name="norm_cross")(x).astype(self.dtype), text)

    y = modulate(layer_norm(c.eps)(x), shift2, scale2, self.dtype)
    y = linear(c.ffn_dim, (c.dim, c.ffn_dim), self.dtype, "ffn_in")(y)
    y = nn.gelu(y, approximate=True)
    y = linear(c.dim, (c.ffn_dim, c.dim), self.dtype, "ffn_out")(y)
    return add_gated(x, y, gate2), kv if self.collect else None
