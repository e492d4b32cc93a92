"""TAEHV, the tiny autoencoder for latents of Wan 2.1 (spec section 13).

Convolutions within frames, with one frame of memory per block. It takes the place of
`hfjax.models.vae` where speed counts more than detail: latents are the same normalised ones, and
pixels are `[b t y x c]` in [-1, 1] outside (within the network, in [0, 1]). F latents give 4F pixel
frames, of which the first 3 of a stream are dropped. Encoding makes one latent of every 4 frames,
the first among them, so a stream of pixels starts with `init_encoder_cache`.
"""

import dataclasses
import functools
import math
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hfjax.models import clips
from hfjax.models.clips import PIXEL_CHANNELS, with_past

Params = Any
Cache = Any


@dataclasses.dataclass(frozen=True)
class TaehvConfig:
  """Architecture of the tiny autoencoder; the defaults are the published one.

  z_dim: latent channels. encoder_dim: width of the encoder. decoder_dims: widths of the decoder's
  stages, and of what follows. memory_blocks: blocks of a stage.
  pools, grows: frames that a stage of the encoder merges, and a stage of the decoder makes of one.

  Raises ValueError on sizes that do not fit together.
  """

  z_dim: int = 16
  encoder_dim: int = 64
  decoder_dims: tuple[int, ...] = (256, 128, 64, 64)
  memory_blocks: int = 3
  pools: tuple[int, ...] = (2, 2, 1)
  grows: tuple[int, ...] = (1, 2, 2)

  def __post_init__(self):
    sizes = (self.z_dim, self.encoder_dim, *self.decoder_dims, self.memory_blocks)
    if min(*sizes, *self.pools, *self.grows) < 1:
      raise ValueError(f"{self} has a size below 1; make every size at least 1.")
    if len(self.pools) != len(self.grows) or math.prod(self.pools) != math.prod(self.grows):
      raise ValueError(
        f"The encoder merges {self.pools} frames by stage and the decoder makes {self.grows}; give "
        "as many stages to both, and equal products."
      )
    if len(self.decoder_dims) != len(self.grows) + 1:
      raise ValueError(
        f"There are {len(self.decoder_dims)} decoder widths for {len(self.grows)} stages; give "
        f"{len(self.grows) + 1}."
      )

  @property
  def space_factor(self) -> int:
    """Pixel rows per latent row."""
    return 2 ** len(self.grows)

  @property
  def time_factor(self) -> int:
    """Pixel frames per latent frame."""
    return math.prod(self.grows)


jax.tree_util.register_static(TaehvConfig)

TAEHV = TaehvConfig()


class Memory(nn.Module):
  """Residual block that also sees the frame before; also the last frame of its input."""

  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, "b t y x c"], past: Float[Array, "b 1 y x c"] | None
  ) -> tuple[Float[Array, "b t y x c"], Float[Array, "b 1 y x c"]]:
    conv = functools.partial(_conv, self.dtype, x.shape[-1])
    y = jnp.concatenate([x, with_past(x, past, 1)[:, :-1]], axis=-1)
    y = conv("conv_2")(nn.relu(conv("conv_1")(nn.relu(conv("conv_0")(y)))))
    return nn.relu(y + x), x[:, -1:]


def _conv(dtype, features: int, name: str, bias: bool = True, stride: int = 1) -> nn.Conv:
  # Not "SAME", which pads strided convolutions on the other side.
  return nn.Conv(features, (3, 3), strides=stride, padding=1, use_bias=bias, dtype=dtype, name=name)


def _point(dtype, features: int, name: str) -> nn.Dense:
  return nn.Dense(features, use_bias=False, dtype=dtype, name=name)


class Encoder(nn.Module):
  """Pixels in [0, 1] to latents; without a past, zeros are before the first frame."""

  config: TaehvConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b t y x c"], past: Cache = None
  ) -> tuple[Float[Array, "b f y x z"], Cache]:
    c, past, left = self.config, past or {}, {}
    x = nn.relu(_conv(self.dtype, c.encoder_dim, "conv_in")(x.astype(self.dtype)))
    for i, frames in enumerate(c.pools):
      x = einops.rearrange(x, "b (t s) y x c -> b t y x (s c)", s=frames)
      x = _point(self.dtype, c.encoder_dim, f"pool_{i}")(x)
      x = _conv(self.dtype, c.encoder_dim, f"down_{i}", bias=False, stride=2)(x)
      for n in range(c.memory_blocks):
        name = f"memory_{i}_{n}"
        x, left[name] = Memory(self.dtype, name=name)(x, past.get(name))
    return _conv(self.dtype, c.z_dim, "conv_out")(x), left


class Decoder(nn.Module):
  """Latents to pixels in [0, 1], not clamped; without a past, zeros are before the first frame."""

  config: TaehvConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, z: Float[Array, "b f y x z"], past: Cache = None
  ) -> tuple[Float[Array, "b t y x c"], Cache]:
    c, past, left = self.config, past or {}, {}
    z = (3 * jnp.tanh(z.astype(jnp.float32) / 3)).astype(self.dtype)
    x = nn.relu(_conv(self.dtype, c.decoder_dims[0], "conv_in")(z))
    for i, frames in enumerate(c.grows):
      for n in range(c.memory_blocks):
        name = f"memory_{i}_{n}"
        x, left[name] = Memory(self.dtype, name=name)(x, past.get(name))
      # A 1 x 1 convolution does not mix pixels, so it comes before they are repeated.
      x = _point(self.dtype, frames * x.shape[-1], f"grow_{i}")(x)
      x = einops.repeat(x, "b t y x (s c) -> b (t s) (y p) (x q) c", s=frames, p=2, q=2)
      x = _conv(self.dtype, c.decoder_dims[i + 1], f"up_{i}", bias=False)(x)
    return _conv(self.dtype, PIXEL_CHANNELS, "conv_out")(nn.relu(x)), left


def init_params(config: TaehvConfig, key: Array) -> Params:
  """Freshly initialised parameters of both halves, float32."""
  keys = jax.random.split(key)
  video = jnp.zeros((1, config.time_factor, *2 * (config.space_factor,), PIXEL_CHANNELS))
  latents = jnp.zeros((1, 1, 1, 1, config.z_dim))
  return {
    "encoder": Encoder(config).init(keys[0], video)["params"],
    "decoder": Decoder(config).init(keys[1], latents)["params"],
  }


def init_decoder_cache(
  config: TaehvConfig, batch: int, height: int, width: int, dtype=jnp.float32
) -> Cache:
  """The decoder's cache before a stream, zeros; height, width: latent rows and columns."""
  return {
    f"memory_{i}_{n}": jnp.zeros((batch, 1, height << i, width << i, dim), dtype)
    for i, dim in enumerate(config.decoder_dims[:-1])
    for n in range(config.memory_blocks)
  }


def init_encoder_cache(
  config: TaehvConfig, batch: int, height: int, width: int, dtype=jnp.float32
) -> Cache:
  """The encoder's cache before a stream, zeros; height, width: latent rows and columns."""
  stages = len(config.pools)
  return {
    f"memory_{i}_{n}": jnp.zeros(
      (batch, 1, height << stages - 1 - i, width << stages - 1 - i, config.encoder_dim), dtype
    )
    for i in range(stages)
    for n in range(config.memory_blocks)
  }


def decode_first(
  config: TaehvConfig, params: Params, latent: Float[Array, "b 1 y x z"], dtype=jnp.float32
) -> tuple[Float[Array, "b 1 y x c"], Cache]:
  """The first frame of a stream, in [-1, 1], float32, and the cache for what follows.

  dtype: compute dtype, also of the cache. Raises ValueError on latents that are not one frame.
  """
  clips.check_latents(latent, config.z_dim)
  clips.check_first(latent)
  b, _, height, width, _ = latent.shape
  cache = init_decoder_cache(config, b, height, width, dtype)
  x, cache = decode_chunk(config, params, cache, latent)
  return x[:, config.time_factor - 1 :], cache


def decode_chunk(
  config: TaehvConfig, params: Params, cache: Cache, latents: Float[Array, "b f y x z"]
) -> tuple[Float[Array, "b t y x c"], Cache]:
  """The next 4f frames of a stream, in [-1, 1], float32, and its cache; in the cache's dtype.

  Raises ValueError on latents that do not fit the model or the cache.
  """
  clips.check_latents(latents, config.z_dim)
  clips.check_cache(cache, "memory_0_0", latents)
  x, cache = Decoder(config, cache["memory_0_0"].dtype).apply(
    {"params": params["decoder"]}, latents, cache
  )
  return 2 * jnp.clip(x.astype(jnp.float32), 0, 1) - 1, cache


def decode(
  config: TaehvConfig, params: Params, latents: Float[Array, "b f y x z"], dtype=jnp.float32
) -> Float[Array, "b t y x c"]:
  """The 4f - 3 frames of a whole clip, in [-1, 1], float32; one latent frame at a time.

  Raises ValueError on latents that do not fit the model.
  """
  clips.check_latents(latents, config.z_dim)
  first, cache = decode_first(config, params, latents[:, :1], dtype)
  step = functools.partial(decode_chunk, config, params)
  return clips.scan_pieces(step, first, cache, latents[:, 1:], 1)


def encode_chunk(
  config: TaehvConfig, params: Params, cache: Cache, video: Float[Array, "b t y x c"]
) -> tuple[Float[Array, "b f y x z"], Cache]:
  """The latents of the next 4f frames, float32, and the cache; in the cache's dtype.

  Raises ValueError on pixels that do not fit the model or the cache.
  """
  clips.check_pixels(video, config.space_factor)
  clips.check_piece(video, config.time_factor)
  clips.check_cache(cache, "memory_0_0", video, stride=2)
  z, cache = Encoder(config, cache["memory_0_0"].dtype).apply(
    {"params": params["encoder"]}, (video + 1) / 2, cache
  )
  return z.astype(jnp.float32), cache


def encode(
  config: TaehvConfig, params: Params, video: Float[Array, "b t y x c"], dtype=jnp.float32
) -> Float[Array, "b f y x z"]:
  """The ceil(t / 4) latents of a whole clip, float32; its last frame is repeated to fill up.

  Raises ValueError on pixels that do not fit the model.
  """
  clips.check_pixels(video, config.space_factor)
  n = config.time_factor
  video = jnp.pad(video, ((0, 0), (0, -video.shape[1] % n), *3 * ((0, 0),)), mode="edge")
  b, _, rows, columns, _ = video.shape
  height, width = rows // config.space_factor, columns // config.space_factor
  cache = init_encoder_cache(config, b, height, width, dtype)
  step = functools.partial(encode_chunk, config, params)
  first, cache = step(cache, video[:, :n])
  return clips.scan_pieces(step, first, cache, video[:, n:], n)
