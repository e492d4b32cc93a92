"""The Wan video autoencoder, for whole clips and streaming (spec section 9).

The first latent frame stands for one pixel frame, every later one for four: T = 4k + 1 pixel frames
are k + 1 latent frames. Everything is causal in time. What later frames need of earlier ones is a
cache, a pytree of static shapes: two frames before every causal convolution, and before the
temporal resampling, which the first frame bypasses. So a stream has two programs: `*_first`, which
makes a cache, and `*_chunk`, for all that follows, in pieces of any size.

Pixels are `[b t y x c]` in [-1, 1], latents `[b f y x c]`, normalised by the latent statistics.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hfjax.models import checks, clips
from hfjax.models.clips import PIXEL_CHANNELS, with_past

Params = Any
Cache = Any


class Block(NamedTuple):
  """One entry of the encoder's or the decoder's list of blocks.

  kind: "residual", "down2d", "down3d", "up2d" or "up3d"; 3-D resampling is in time as well.
  """

  kind: str
  in_dim: int
  out_dim: int


@dataclasses.dataclass(frozen=True)
class VaeConfig:
  """Architecture of the autoencoder.

  dim: width of the stage with the most pixels; stages are `dim * dim_mult` wide.
  z_dim: latent channels. num_res_blocks: residual blocks of an encoder stage; decoder: one more.
  temporal_downsample: whether the resampling after each stage but the last is in time as well.
  mean, std: statistics of the latents, per channel.

  Raises ValueError on sizes that do not fit together.
  """

  dim: int
  z_dim: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  dim_mult: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  temporal_downsample: tuple[bool, ...] = (False, True, True)

  def __post_init__(self):
    checks.make_integers(self, "dim", "z_dim", "num_res_blocks")
    for name in ("mean", "std"):
      checks.check_row(name, getattr(self, name), (int, float))
    checks.check_row("dim_mult", self.dim_mult, int)
    checks.check_row("temporal_downsample", self.temporal_downsample, bool)
    if min(self.dim_mult, default=0) < 1:
      raise ValueError(f"The autoencoder's dim_mult is {self.dim_mult}; give numbers from 1 on.")
    for name in ("dim", "z_dim", "num_res_blocks"):
      if (value := getattr(self, name)) < 1:
        raise ValueError(f"The autoencoder's {name} is {value}; make it at least 1.")
    if len(self.mean) != self.z_dim or len(self.std) != self.z_dim:
      raise ValueError(
        f"There are {len(self.mean)} latent means and {len(self.std)} deviations for "
        f"{self.z_dim} latent channels; give one of each per channel."
      )
    if min(self.std) <= 0:
      raise ValueError(f"A latent deviation is {min(self.std)}; deviations must be positive.")
    if len(self.temporal_downsample) != len(self.dim_mult) - 1:
      raise ValueError(
        f"There are {len(self.dim_mult)} stages and {len(self.temporal_downsample)} entries of "
        f"temporal_downsample; give {len(self.dim_mult) - 1}, one between every two stages."
      )
    odd = [m for m in self.dim_mult[1:] if self.dim * m % 2]
    if odd:
      raise ValueError(
        f"A stage is {self.dim * odd[0]} wide; upsampling halves widths, so make dim even."
      )

  @property
  def space_factor(self) -> int:
    """Pixel rows per latent row."""
    return 2 ** len(self.temporal_downsample)

  @property
  def time_factor(self) -> int:
    """Pixel frames per latent frame, but for the first."""
    return 2 ** sum(self.temporal_downsample)

  @property
  def encoder_blocks(self) -> tuple[Block, ...]:
    """What the encoder does before its middle, in order."""
    blocks, width = [], self.dim
    for i, mult in enumerate(self.dim_mult):
      for _ in range(self.num_res_blocks):
        blocks.append(Block("residual", width, self.dim * mult))
        width = self.dim * mult
      if i < len(self.temporal_downsample):
        kind = "down3d" if self.temporal_downsample[i] else "down2d"
        blocks.append(Block(kind, width, width))
    return tuple(blocks)

  @property
  def decoder_blocks(self) -> tuple[Block, ...]:
    """What the decoder does after its middle, in order."""
    blocks, width = [], self.dim * self.dim_mult[-1]
    for i, mult in enumerate(reversed(self.dim_mult)):
      for _ in range(self.num_res_blocks + 1):
        blocks.append(Block("residual", width, self.dim * mult))
        width = self.dim * mult
      if i < len(self.temporal_downsample):
        kind = "up3d" if self.temporal_downsample[-1 - i] else "up2d"
        blocks.append(Block(kind, width, width // 2))
        width //= 2
    return tuple(blocks)


jax.tree_util.register_static(VaeConfig)

# The autoencoder of Wan 2.1; statistics of spec section 1.
WAN21 = VaeConfig(
  dim=96,
  z_dim=16,
  mean=(
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
  ),
  std=(
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
  ),
)


class Norm(nn.Module):
  """RMS norm over channels, in float32."""

  @nn.compact
  def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
    x = x.astype(jnp.float32)
    power = jnp.square(x).sum(axis=-1, keepdims=True)
    # The bound is on the norm, at 1e-12; on its square it keeps gradients at zero finite.
    return x * jax.lax.rsqrt(jnp.maximum(power, 1e-24)) * (x.shape[-1] ** 0.5 * scale)


class TimeConv(nn.Module):
  """Convolution of every three consecutive frames; two frames fewer come out.

  size: rows and columns of the kernel. stride: frames from one output to the next.
  """

  features: int
  dtype: Any
  size: int = 3
  stride: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, "b t y x c"]) -> Float[Array, "b u y x d"]:
    shape = (3, self.size, self.size, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
    bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
    # Three frames as channels of one image: faster than a 3-D convolution by 1.1 to 1.4 on an H200.
    frames = x.shape[1] - 2
    x = jnp.concatenate([x[:, i : i + frames : self.stride] for i in range(3)], axis=-1)
    y = jax.lax.conv_general_dilated(
      einops.rearrange(x, "b t y x c -> (b t) y x c"),
      einops.rearrange(kernel, "t y x i o -> y x (t i) o"),
      window_strides=(1, 1),
      padding=2 * [(self.size // 2, self.size // 2)],
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return einops.rearrange(y + bias, "(b t) y x c -> b t y x c", b=x.shape[0])


def causal_conv(
  features: int, dtype, name: str, x: Float[Array, "b t y x c"], past: Array | None
) -> tuple[Float[Array, "b t y x d"], Float[Array, "b 2 y x c"]]:
  """3 x 3 x 3 convolution of frames and the two before them; also the last two of its input."""
  x = with_past(x, past, 2)
  return TimeConv(features, dtype, name=name)(x), x[:, -2:]


class Residual(nn.Module):
  """Two normalised convolutions beside a shortcut."""

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b t y x c"], past: Cache) -> tuple[Array, Cache]:
    past, left = past or {}, {}
    y = x
    for n in ("1", "2"):
      name = f"conv{n}"
      y = nn.silu(Norm(name=f"norm{n}")(y)).astype(self.dtype)
      y, left[name] = causal_conv(self.features, self.dtype, name, y, past.get(name))
    if x.shape[-1] != self.features:
      x = nn.Dense(self.features, dtype=self.dtype, name="shortcut")(x)
    return x + y, left


class Attention(nn.Module):
  """Attention of one head within each frame, with a residual; softmax in float32."""

  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b t y x c"]) -> Float[Array, "b t y x c"]:
    b, t, rows, _, c = x.shape
    y = nn.Dense(3 * c, dtype=self.dtype, name="qkv")(Norm(name="norm")(x).astype(self.dtype))
    # Heads of this width have no fused kernel.
    q, k, v = jnp.split(einops.rearrange(y, "b t y x c -> (b t) (y x) 1 c"), 3, axis=-1)
    y = jax.nn.dot_product_attention(q, k, v, implementation="xla")
    y = einops.rearrange(y, "(b t) (y x) 1 c -> b t y x c", b=b, t=t, y=rows)
    return x + nn.Dense(c, dtype=self.dtype, name="out")(y)


class Resample(nn.Module):
  """Half or double the rows and columns, and in 3-D also the frames, but for a first call."""

  block: Block
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b t y x c"], past: Cache) -> tuple[Array, Cache]:
    kind, width = self.block.kind, self.block.out_dim
    conv = functools.partial(nn.Conv, width, (3, 3), dtype=self.dtype, name="conv")
    time_conv = functools.partial(TimeConv, dtype=self.dtype, size=1, name="time_conv")
    in_time = past is not None or self.is_initializing()
    left = {}
    if kind == "up3d":
      seen = with_past(x, past and past["time_conv"], 2)
      if in_time:
        y = time_conv(2 * x.shape[-1])(seen)
        left["time_conv"] = seen[:, -2:]
        x = einops.rearrange(y, "b t y x (two c) -> b (t two) y x c", two=2)
      else:
        left["time_conv"] = jnp.zeros_like(seen[:, -2:])  # the first frame stays unseen
    if kind in ("up2d", "up3d"):
      return conv(padding=1)(einops.repeat(x, "b t y x c -> b t (y p) (x q) c", p=2, q=2)), left

    x = conv(strides=2, padding=((0, 1), (0, 1)))(x)
    if kind == "down3d":
      left["time_conv"] = x[:, -1:]
      if in_time:
        x = time_conv(width, stride=2)(with_past(x, past and past["time_conv"], 1))
    return x, left


class Stack(nn.Module):
  """Blocks one after another, named by their place."""

  blocks: tuple[Block, ...]
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b t y x c"], past: Cache) -> tuple[Array, Cache]:
    past, left = past or {}, {}
    for i, block in enumerate(self.blocks):
      name = f"block_{i}"
      layer: nn.Module = (
        Residual(block.out_dim, self.dtype, name=name)
        if block.kind == "residual"
        else Resample(block, self.dtype, name=name)
      )
      x, left[name] = layer(x, past.get(name))
    return x, left


class Middle(nn.Module):
  """Residual block, attention, residual block."""

  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b t y x c"], past: Cache) -> tuple[Array, Cache]:
    past, left = past or {}, {}
    for i in (0, 1):
      if i:
        x = Attention(self.dtype, name="attention")(x)
      name = f"residual_{i}"
      x, left[name] = Residual(x.shape[-1], self.dtype, name=name)(x, past.get(name))
    return x, left


class Head(nn.Module):
  """Norm and projection."""

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b t y x c"], past: Cache) -> tuple[Array, Cache]:
    x = nn.silu(Norm(name="norm")(x)).astype(self.dtype)
    return causal_conv(self.features, self.dtype, "conv", x, past)


class Encoder(nn.Module):
  """Pixels to the means of latents, not normalised; a call without a past is a first call."""

  config: VaeConfig
  dtype: Any = jnp.float32
  moments: bool = False  # whether logarithms of their variances follow the means

  @nn.compact
  def __call__(
    self, x: Float[Array, "b t y x c"], past: Cache = None
  ) -> tuple[Float[Array, "b f y x m"], Cache]:
    c, past, left = self.config, past or {}, {}
    x, left["conv_in"] = causal_conv(
      c.dim, self.dtype, "conv_in", x.astype(self.dtype), past.get("conv_in")
    )
    x, left["down"] = Stack(c.encoder_blocks, self.dtype, name="down")(x, past.get("down"))
    x, left["middle"] = Middle(self.dtype, name="middle")(x, past.get("middle"))
    x, left["head"] = Head(2 * c.z_dim, self.dtype, name="head")(x, past.get("head"))
    x = nn.Dense(2 * c.z_dim, dtype=self.dtype, name="quant")(x)
    # The logarithms are of use in training only.
    return x if self.moments else x[..., : c.z_dim], left


class Decoder(nn.Module):
  """Latents, not normalised, to pixels; a call without a past is a first call."""

  config: VaeConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, z: Float[Array, "b f y x z"], past: Cache = None
  ) -> tuple[Float[Array, "b t y x c"], Cache]:
    c, past, left = self.config, past or {}, {}
    x = nn.Dense(c.z_dim, dtype=self.dtype, name="post_quant")(z.astype(self.dtype))
    width = c.dim * c.dim_mult[-1]
    x, left["conv_in"] = causal_conv(width, self.dtype, "conv_in", x, past.get("conv_in"))
    x, left["middle"] = Middle(self.dtype, name="middle")(x, past.get("middle"))
    x, left["up"] = Stack(c.decoder_blocks, self.dtype, name="up")(x, past.get("up"))
    x, left["head"] = Head(PIXEL_CHANNELS, self.dtype, name="head")(x, past.get("head"))
    return x, left


def init_params(config: VaeConfig, key: Array) -> Params:
  """Freshly initialised parameters of both halves, float32."""
  keys = jax.random.split(key)
  video = jnp.zeros((1, config.time_factor, *2 * (config.space_factor,), PIXEL_CHANNELS))
  latents = jnp.zeros((1, 1, 1, 1, config.z_dim))
  return {
    "encoder": Encoder(config).init(keys[0], video)["params"],
    "decoder": Decoder(config).init(keys[1], latents)["params"],
  }


def normalize(config: VaeConfig, mu: Float[Array, "b f y x z"]) -> Float[Array, "b f y x z"]:
  """Latents with the statistics taken out, float32 (spec section 1)."""
  return (mu.astype(jnp.float32) - jnp.asarray(config.mean)) / jnp.asarray(config.std)


def denormalize(config: VaeConfig, z: Float[Array, "b f y x z"]) -> Float[Array, "b f y x z"]:
  """The inverse of `normalize`, float32."""
  return z.astype(jnp.float32) * jnp.asarray(config.std) + jnp.asarray(config.mean)


def init_decoder_cache(
  config: VaeConfig, batch: int, height: int, width: int, dtype=jnp.float32
) -> Cache:
  """Zeros in the shapes of a decoder's cache; height, width: latent rows and columns.

  A stream starts with `decode_first`, which returns its cache; this one holds its place where a
  loop wants a value before.
  """
  return _blank("decoder", config, (batch, 1, height, width, config.z_dim), jnp.dtype(dtype))


def init_encoder_cache(
  config: VaeConfig, batch: int, height: int, width: int, dtype=jnp.float32
) -> Cache:
  """Zeros in the shapes of an encoder's cache; height, width: latent rows and columns."""
  size = (height * config.space_factor, width * config.space_factor)
  return _blank("encoder", config, (batch, 1, *size, PIXEL_CHANNELS), jnp.dtype(dtype))


def decode_first(
  config: VaeConfig, params: Params, latent: Float[Array, "b 1 y x z"], dtype=jnp.float32
) -> tuple[Float[Array, "b 1 y x c"], Cache]:
  """The first frame of a stream, float32 and not clamped, and the cache for what follows.

  dtype: compute dtype, also of the cache. Raises ValueError on latents that are not one frame.
  """
  clips.check_latents(latent, config.z_dim)
  clips.check_first(latent)
  x, cache = Decoder(config, dtype).apply(
    {"params": params["decoder"]}, denormalize(config, latent)
  )
  return x.astype(jnp.float32), cache


def decode_chunk(
  config: VaeConfig, params: Params, cache: Cache, latents: Float[Array, "b f y x z"]
) -> tuple[Float[Array, "b t y x c"], Cache]:
  """The next 4f frames of a stream, float32 and not clamped, and its cache; in the cache's dtype.

  Raises ValueError on latents that do not fit the model or the cache.
  """
  clips.check_latents(latents, config.z_dim)
  clips.check_cache(cache, "conv_in", latents)
  x, cache = Decoder(config, cache["conv_in"].dtype).apply(
    {"params": params["decoder"]}, denormalize(config, latents), cache
  )
  return x.astype(jnp.float32), cache


def decode(
  config: VaeConfig,
  params: Params,
  latents: Float[Array, "b f y x z"],
  dtype=jnp.float32,
  clamp: bool = False,
) -> Float[Array, "b t y x c"]:
  """The 4f - 3 pixel frames of a whole clip, float32; one latent frame at a time, to save memory.

  clamp: cut pixels to [-1, 1]. Raises ValueError on latents that do not fit the model.
  """
  clips.check_latents(latents, config.z_dim)
  first, cache = decode_first(config, params, latents[:, :1], dtype)
  step = functools.partial(decode_chunk, config, params)
  x = clips.scan_pieces(step, first, cache, latents[:, 1:], 1)
  return jnp.clip(x, -1, 1) if clamp else x


def encode_first(
  config: VaeConfig, params: Params, frame: Float[Array, "b 1 y x c"], dtype=jnp.float32
) -> tuple[Float[Array, "b 1 y x z"], Cache]:
  """The first latent of a stream, normalised, float32, and the cache for what follows.

  dtype: compute dtype, also of the cache. Raises ValueError on pixels that are not one frame.
  """
  clips.check_pixels(frame, config.space_factor)
  clips.check_first(frame)
  mu, cache = Encoder(config, dtype).apply({"params": params["encoder"]}, frame)
  return normalize(config, mu), cache


def encode_chunk(
  config: VaeConfig, params: Params, cache: Cache, video: Float[Array, "b t y x c"]
) -> tuple[Float[Array, "b f y x z"], Cache]:
  """The latents of the next 4f frames, normalised, float32, and the cache; in the cache's dtype.

  Raises ValueError on pixels that do not fit the model or the cache.
  """
  clips.check_pixels(video, config.space_factor)
  clips.check_piece(video, config.time_factor)
  clips.check_cache(cache, "conv_in", video)
  mu, cache = Encoder(config, cache["conv_in"].dtype).apply(
    {"params": params["encoder"]}, video, cache
  )
  return normalize(config, mu), cache


def encode(
  config: VaeConfig, params: Params, video: Float[Array, "b t y x c"], dtype=jnp.float32
) -> Float[Array, "b f y x z"]:
  """The k + 1 latents of a whole clip of 4k + 1 frames, normalised, float32; four at a time.

  Raises ValueError on a clip of another length, or one that does not fit the model.
  """
  clips.check_pixels(video, config.space_factor)
  n = config.time_factor
  if video.shape[1] % n != 1 % n:
    below = (video.shape[1] - 1) // n * n + 1
    raise ValueError(
      f"The clip has {video.shape[1]} frames; the autoencoder takes 1 and then multiples of {n}. "
      f"Cut it to {below}, or repeat its last frame up to {below + n}."
    )
  first, cache = encode_first(config, params, video[:, :1], dtype)
  return clips.scan_pieces(
    functools.partial(encode_chunk, config, params), first, cache, video[:, 1:], n
  )


@functools.lru_cache(maxsize=16)
def _cache_shapes(half: str, config: VaeConfig, shape: tuple[int, ...], dtype) -> Cache:
  module = Encoder(config, dtype) if half == "encoder" else Decoder(config, dtype)
  params = jax.eval_shape(lambda: init_params(config, jax.random.key(0))[half])
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(lambda p, x: module.apply({"params": p}, x)[1], params, x)


def _blank(half: str, config: VaeConfig, shape: tuple[int, ...], dtype) -> Cache:
  return jax.tree.map(
    lambda s: jnp.zeros(s.shape, s.dtype), _cache_shapes(half, config, shape, dtype)
  )
