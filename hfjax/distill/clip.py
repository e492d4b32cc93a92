"""The last frames of a rollout as a clip of its own (spec section 8.3)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hfjax.models import vae


def first_of_clip(
  config: vae.VaeConfig,
  params: vae.Params,
  latents: Float[Array, "b f y x z"],
  chunks: Int[Array, ""] | int,
  chunk: int,
  last: int,
  dtype=jnp.bfloat16,
  decoded: int = 0,
) -> Float[Array, "b 1 y x z"]:
  """What the first latent of the last chunks is as the first of a clip; float32, no gradient flows.

  Teachers and critics see clips, whose first latent stands for one frame and not for four. So all
  up to it is decoded, and the last frame that comes of it is encoded alone. Where the last chunks
  are all there is, it is the latent as it lies.

  latents: of a rollout, the valid ones in front. chunks: how many are valid, traced, of `chunk`
    latents each. last: chunks of the clip. dtype: that the autoencoder computes in.
  decoded: chunks before them that are decoded at most, the latest ones, as if the video began
    there, which saves time; 0 for all.
  """
  before = jnp.asarray(chunks, jnp.int32) - last

  begin = jnp.maximum(before - decoded, 0) if decoded else jnp.int32(0)

  def again(latents):
    take = lambda start, count: jax.lax.dynamic_slice_in_dim(latents, start, count, axis=1)
    frame, cache = vae.decode_first(config, params, take(begin * chunk, 1), dtype)

    def decode(i, carry):
      pixels, cache = vae.decode_chunk(config, params, carry[1], take(1 + i * chunk, chunk))
      return pixels[:, -1:], cache

    frame, _ = jax.lax.fori_loop(begin, before, decode, (frame, cache))
    return vae.encode(config, params, jnp.clip(frame, -1, 1), dtype).astype(jnp.float32)

  as_it_is = lambda latents: latents[:, :1].astype(jnp.float32)
  return jax.lax.cond(before > 0, again, as_it_is, jax.lax.stop_gradient(latents))


def as_clip(
  latents: Float[Array, "b f y x z"], first: Float[Array, "b 1 y x z"]
) -> Float[Array, "b f y x z"]:
  """Latents of the last chunks with another first one; the others keep their gradients."""
  return jnp.concatenate([first.astype(latents.dtype), latents[:, 1:]], axis=1)


def mask_of_clip(chunks: Int[Array, ""] | int, chunk: int, last: int) -> Array:
  """What of a clip's latents counts in losses `[1 f 1 1 1]`: where chunks came before, not the
  first one, of which one latent was encoded anew.
  """
  frame = jnp.arange(last * chunk).reshape(1, -1, 1, 1, 1)
  return (frame >= chunk) | (jnp.asarray(chunks) == last)
