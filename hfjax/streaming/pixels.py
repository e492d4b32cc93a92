"""Between latents and the bytes of frames, while a stream goes on."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from hfjax.models import taehv, vae
from hfjax.models.clips import to_uint8
from hfjax.streaming.trees import named, renamed

_NETWORKS = {"vae": vae, "taehv": taehv}


class Autoencoder(NamedTuple):
  """An autoencoder with its weights.

  kind: "vae" or "taehv", the small one. dtype: that it computes in.
  """

  kind: str
  config: Any
  params: dict[str, Any]
  dtype: Any = jnp.bfloat16

  def encode(self, frames: UInt8[Array, "b t y x 3"]) -> Float[Array, "b f y x z"]:
    """Latents of a whole clip of 4f - 3 frames, float32; shorter ones repeat their last frame."""
    missing = (1 - frames.shape[1]) % self.config.time_factor
    frames = jnp.pad(frames, ((0, 0), (0, missing), *3 * ((0, 0),)), mode="edge")
    if self.kind == "taehv":  # has no first frame apart, so that it stands for all of its latent
      first = jnp.repeat(frames[:, :1], self.config.time_factor - 1, axis=1)
      frames = jnp.concatenate([first, frames], axis=1)
    return _encode(self.kind, self.config, self.dtype, self.params, frames)


class FrameDecoder:
  """Decodes a stream's latents piece by piece; state is what later pieces need of earlier ones.

  The first latent frame gives one frame, every other four.
  """

  def __init__(self, autoencoder: Autoencoder):
    self.autoencoder = autoencoder
    self.cache: dict[str, Any] | None = None

  def __call__(self, latents: Float[Array, "b f y x z"]) -> UInt8[Array, "b t y x 3"]:
    """Frames of the next latents, as bytes on the device."""
    a, frames = self.autoencoder, []
    if self.cache is None:
      first, self.cache = _decode_first(a.kind, a.config, a.dtype, a.params, latents[:, :1])
      frames, latents = [first], latents[:, 1:]
    if latents.shape[1]:
      more, self.cache = _decode(a.kind, a.config, a.params, self.cache, latents)
      frames.append(more)
    return frames[0] if len(frames) == 1 else jnp.concatenate(frames, axis=1)

  def to_arrays(self) -> dict[str, np.ndarray]:
    """What later pieces need of earlier ones, by name, on the host; nothing before the first."""
    return {name: np.array(x) for name, x in named(self.cache or {}).items()}

  def restore(self, arrays: Mapping[str, np.ndarray], batch: int, height: int, width: int):
    """Takes what `to_arrays` returned; height, width: of the latents.

    Raises ValueError, which lists what does not fit, on arrays of another autoencoder or size.
    """
    a = self.autoencoder
    if arrays:
      latent = jax.ShapeDtypeStruct((batch, 1, height, width, a.config.z_dim), jnp.float32)
      decode = functools.partial(_decode_first, a.kind, a.config, a.dtype)
      _, like = jax.eval_shape(decode, a.params, latent)
      self.cache = renamed(like, arrays)


def from_bytes(x: UInt8[Array, "*b"]) -> Float[Array, "*b"]:
  """Pixels in [-1, 1], float32."""
  return x.astype(jnp.float32) / 127.5 - 1


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _decode_first(kind, config, dtype, params, latent):
  x, cache = _NETWORKS[kind].decode_first(config, params, latent, dtype)
  return to_uint8(x), cache


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _decode(kind, config, params, cache, latents):
  x, cache = _NETWORKS[kind].decode_chunk(config, params, cache, latents)
  return to_uint8(x), cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode(kind, config, dtype, params, frames):
  return _NETWORKS[kind].encode(config, params, from_bytes(frames), dtype)
