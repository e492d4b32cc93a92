"""The UMT5 text encoder (spec section 10).

Text rows are `[b t]` ids and `[b t m]` states. Scores are not scaled, and every layer has its own
bias by relative position, so no position is added to the tokens.

Projections are in the compute dtype; norms, scores, softmax and the sum over layers in float32. The
published code keeps that sum in bfloat16, with half as much error again; weights are nearly all of
the memory, so nothing is saved by it.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hfjax.models import checks

Params = Any


def check_buckets(buckets: int, max_distance: int):
  """Raises ValueError unless the distances can be told apart by the buckets."""
  if buckets < 4 or buckets % 2:
    raise ValueError(f"The text encoder has {buckets} buckets; give an even number from 4 on.")
  if max_distance <= buckets // 4:
    raise ValueError(
      f"The largest distance is {max_distance}, and {buckets} buckets already hold distances below "
      f"{buckets // 4} one by one; give a larger max_distance or fewer buckets."
    )


@dataclasses.dataclass(frozen=True)
class Umt5Config:
  """Architecture of the encoder; nothing here depends on the text's length.

  vocab: rows of the token embedding. dim: model width. dim_attn: width of all heads together, a
  multiple of `heads`. dim_ffn: hidden width of the feed-forward.
  buckets: rows of a layer's position bias; half of them for keys behind the query, half for keys
  ahead. max_distance: distance from which all share the last bucket of their half.

  Raises ValueError on sizes that do not fit together.
  """

  vocab: int
  dim: int
  dim_attn: int
  dim_ffn: int
  heads: int
  layers: int
  buckets: int = 32
  max_distance: int = 128
  eps: float = 1e-6

  def __post_init__(self):
    sizes = ("vocab", "dim", "dim_attn", "dim_ffn", "heads", "layers")
    checks.make_integers(self, *sizes, "buckets", "max_distance")
    checks.check_number("eps", self.eps, 0, 1)
    for name in sizes:
      if getattr(self, name) < 1:
        raise ValueError(
          f"The text encoder's {name} is {getattr(self, name)}; it must be at least 1."
        )
    if self.dim_attn % self.heads:
      raise ValueError(
        f"The attention width of {self.dim_attn} does not divide into {self.heads} heads; make "
        "dim_attn a multiple of the heads."
      )
    check_buckets(self.buckets, self.max_distance)

  @property
  def head_dim(self) -> int:
    """Width of a head."""
    return self.dim_attn // self.heads


jax.tree_util.register_static(Umt5Config)

PRESETS = {
  "umt5-xxl": Umt5Config(
    vocab=256_384, dim=4096, dim_attn=4096, dim_ffn=10_240, heads=64, layers=24
  ),
  "shapes": Umt5Config(vocab=320, dim=128, dim_attn=128, dim_ffn=256, heads=4, layers=2),
}


def preset(name: str) -> Umt5Config:
  """The named architecture; ValueError on an unknown name."""
  if name not in PRESETS:
    raise ValueError(f"Unknown text encoder {name!r}; choose one of {', '.join(PRESETS)}.")
  return PRESETS[name]


def relative_buckets(
  distance: np.ndarray, buckets: int = 32, max_distance: int = 128
) -> Int[np.ndarray, "..."]:
  """Bucket of each distance, key minus query, int32 (spec section 10); on the host.

  Small distances have a bucket each, larger ones share them by their logarithm. Raises ValueError
  on numbers of buckets and distances that do not fit together.
  """
  check_buckets(buckets, max_distance)
  half = buckets // 2
  exact = half // 2
  distance = np.asarray(distance)
  size = np.abs(distance)
  # Published weights were trained with float32 logarithms, which decide powers of two. Rounding
  # float64 ones gives the same on every machine; NumPy's own float32 log depends on the processor.
  log = np.log(np.maximum(size, exact) / exact).astype(np.float32)
  share = log / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
  far = np.minimum(exact + share.astype(np.int32), half - 1)
  bucket = np.where(size < exact, size, far) + np.where(distance > 0, half, 0)
  return bucket.astype(np.int32)


def normal(std: float | np.ndarray):
  """Normal initialiser with the given deviation, or one for each column."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)

  return init


def linear(features, std, dtype, name: str, axis=-1) -> nn.DenseGeneral:
  """Linear layer without bias."""
  return nn.DenseGeneral(
    features, axis=axis, use_bias=False, dtype=dtype, kernel_init=normal(std), name=name
  )


def rms_norm(eps: float, name: str) -> nn.RMSNorm:
  """RMS norm in float32."""
  return nn.RMSNorm(eps, dtype=jnp.float32, name=name)


@jax.custom_vjp
def _rows(table: Float[Array, "n h"], index: Int[Array, "q k"]) -> Float[Array, "q k h"]:
  """Rows of a table, with a gradient that is summed in the same order on every device.

  Of `table[index]` it would be added up atomically, on each of several devices that hold the same
  table, and their copies of it would drift apart.
  """
  return table[index]


def _rows_forward(table, index):
  return table[index], (len(table), index)


def _rows_backward(kept, gradient):
  rows, index = kept
  chosen = (index[..., None] == jnp.arange(rows)).astype(gradient.dtype)
  return jnp.einsum("qkn,qkh->nh", chosen, gradient, precision="highest"), None


_rows.defvjp(_rows_forward, _rows_backward)


class Attention(nn.Module):
  """Self-attention with a bias by relative position; scores and softmax in float32."""

  config: Umt5Config
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, "b t m"], buckets: Int[Array, "t t"], valid: Bool[Array, "b t"]
  ) -> Float[Array, "b t m"]:
    c = self.config
    # The queries' deviation stands for the scaling that scores lack.
    stds = np.repeat([(c.dim * c.head_dim) ** -0.5, c.dim**-0.5, c.dim**-0.5], c.dim_attn)
    qkv = linear((3, c.heads, c.head_dim), stds, self.dtype, "qkv")(x)
    q, k, v = (qkv[:, :, i] for i in range(3))
    position = self.param("position", normal(c.dim**-0.5), (c.buckets, c.heads))
    bias = _rows(position.astype(jnp.float32), buckets).transpose(2, 0, 1)
    # Unscaled scores are tens large, where bfloat16 has steps of a quarter: accumulate in float32.
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) + bias
    # Not minus infinity: a text without any token must not give NaN.
    scores = jnp.where(valid[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = nn.softmax(scores, axis=-1).astype(self.dtype)
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    return linear(c.dim, c.dim_attn**-0.5, self.dtype, "out", axis=(-2, -1))(y)


class FeedForward(nn.Module):
  """Feed-forward gated by a tanh-approximated GELU."""

  config: Umt5Config
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b t m"]) -> Float[Array, "b t m"]:
    c = self.config
    y = linear((2, c.dim_ffn), c.dim**-0.5, self.dtype, "in")(x)
    y = nn.gelu(y[:, :, 0], approximate=True) * y[:, :, 1]
    return linear(c.dim, c.dim_ffn**-0.5, self.dtype, "out")(y)


class Block(nn.Module):
  """Encoder layer, pre-normalised, around a float32 sum; a step of the scan over layers."""

  config: Umt5Config
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, "b t m"], buckets: Int[Array, "t t"], valid: Bool[Array, "b t"]
  ) -> tuple[Float[Array, "b t m"], None]:
    c = self.config
    y = rms_norm(c.eps, "norm1")(x).astype(self.dtype)
    x = x + Attention(c, self.dtype, name="attn")(y, buckets, valid)
    y = rms_norm(c.eps, "norm2")(x).astype(self.dtype)
    return x + FeedForward(c, self.dtype, name="ffn")(y), None


class Umt5(nn.Module):
  """The encoder; see `encode` for its use."""

  config: Umt5Config
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, ids: Int[Array, "b t"], valid: Bool[Array, "b t"]) -> Float[Array, "b t m"]:
    c = self.config
    table = self.param("token_embedding", normal(1.0), (c.vocab, c.dim))
    # Rows are cast after they are taken: the table is a fifth of all weights. Ids beyond it give
    # NaN, not another token's row.
    x = jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan).astype(jnp.float32)
    row = np.arange(ids.shape[1])
    buckets = jnp.asarray(relative_buckets(row[None] - row[:, None], c.buckets, c.max_distance))
    stack = nn.scan(
      Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, nn.broadcast),
      length=c.layers,
    )
    x, _ = stack(c, self.dtype, name="blocks")(x, buckets, valid)
    return rms_norm(c.eps, "norm")(x).astype(self.dtype)


def init_params(config: Umt5Config, key: Array) -> Params:
  """Freshly initialised parameters, float32; deviations by fan-in, as T5's."""
  ids = jnp.zeros((1, 1), jnp.int32)
  return Umt5(config).init(key, ids, jnp.ones((1, 1), bool))["params"]


def encode(
  config: Umt5Config,
  params: Params,
  ids: Int[Array, "b t"],
  length: Int[Array, "b"],
  dtype=jnp.float32,
  keep_padding: bool = False,
) -> Float[Array, "b t m"]:
  """Text context of token ids, in `dtype`; rows from `length` on are zero.

  ids: any length t; ids outside the vocabulary give NaN. length: valid tokens of each text.
  keep_padding: leave what the network computes in rows of padding, which no valid row sees.

  Raises ValueError on shapes and dtypes other than these.
  """
  if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(
      f"Token ids have shape {tuple(ids.shape)} and dtype {ids.dtype}; the text encoder takes "
      "integers [batch, tokens], as a tokenizer makes them."
    )
  if length.shape != ids.shape[:1] or not jnp.issubdtype(length.dtype, jnp.integer):
    raise ValueError(
      f"The lengths have shape {tuple(length.shape)} and dtype {length.dtype}; give one integer "
      f"for each of the {ids.shape[0]} texts."
    )
  valid = jnp.arange(ids.shape[1]) < length[:, None]
  # Negative ids would count from the table's end.
  ids = jnp.where(ids < 0, config.vocab, ids)
  hidden: Any = Umt5(config, dtype).apply({"params": params}, ids, valid)
  return hidden if keep_padding else jnp.where(valid[..., None], hidden, 0)
