"""What is minimised of an autoencoder: how far clips are from what comes back of them.

Latents that stray from a normal distribution cost something too.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from hfjax.models import vae
from hfjax.models.vae import VaeConfig
from hfjax.streaming.pixels import from_bytes

_LOG_VARIANCES = (-30.0, 20.0)  # beyond them exponentials are of no use


@dataclasses.dataclass(frozen=True)
class Reconstruction:
  """A variational autoencoder's loss, `mean |e| + square mean e^2 + edges mean |de| + kl KL`.

  `e = x - decode(z)`, pixels in [-1, 1], `de` its differences from one column and row to the next,
  which make small things count. `z ~ N(mu, sigma^2)` as the encoder says; KL is its divergence from
  N(0, 1) per number of the latents.

  vae: whose latents are not normalised in training: its means must be 0, its deviations 1.
  frames: of a clip, 1 and a multiple of the autoencoder's factor. kl, square, edges: weights.
  decoder_only: whether the encoder stays as it is, and with it latents that others have learnt.
  dtype: of computing. remat: whether the halves are computed anew in the backward pass.

  Raises ValueError on values that cannot work.
  """

  vae: VaeConfig
  frames: int = 17
  kl: float = 1e-4
  square: float = 1.0
  edges: float = 1.0
  dtype: str = "float32"
  remat: bool = False
  decoder_only: bool = False

  def __post_init__(self):
    n = self.vae.time_factor
    if self.frames <= n or self.frames % n != 1:
      raise ValueError(
        f"The autoencoder is to learn from clips of {self.frames} frames; give 1 and a multiple of "
        f"{n}, at least {n + 1}."
      )
    if min(self.kl, self.square, self.edges) < 0:
      raise ValueError(
        f"The weights of divergence, squares and edges are {self.kl}, {self.square} and "
        f"{self.edges}; give at least 0."
      )
    if any(self.vae.mean) or any(s != 1 for s in self.vae.std):
      raise ValueError(
        "The autoencoder's latents are normalised by statistics, which training would change; "
        "start with means of 0 and deviations of 1."
      )

  def loss(
    self, params: Any, video: UInt8[Array, "b t y x 3"], key: PRNGKeyArray
  ) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss, and its parts; `psnr`, in decibels, is of what comes back of sampled latents."""
    x = from_bytes(video)
    encode, decode = self.encode, self.decode
    if self.remat:
      encode, decode = jax.checkpoint(encode), jax.checkpoint(decode)
    moments = encode(params, x)
    if self.decoder_only:
      moments = jax.lax.stop_gradient(moments)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    log_variance = jnp.clip(log_variance, *_LOG_VARIANCES)
    z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    error = decode(params, z) - x
    distance, square = jnp.abs(error).mean(), jnp.square(error).mean()
    divergence = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).mean()
    edges = jnp.abs(jnp.diff(error, axis=2)).mean() + jnp.abs(jnp.diff(error, axis=3)).mean()
    loss = distance + self.square * square + self.edges * edges + self.kl * divergence
    figures = {
      "edges": edges,
      "distance": distance,
      "psnr": 10 * jnp.log10(4 / jnp.maximum(square, 1e-10)),
      "divergence": divergence,
      "latent_power": jnp.square(mean).mean(),
    }
    return loss, figures

  def encode(self, params: Any, x: Float[Array, "b t y x 3"]) -> Float[Array, "b f y x m"]:
    """Means and logarithms of variances of the latents, float32."""
    encoder = vae.Encoder(self.vae, jnp.dtype(self.dtype), moments=True)
    variables = {"params": params["encoder"]}
    first, past = encoder.apply(variables, x[:, :1])
    rest, _ = encoder.apply(variables, x[:, 1:], past)
    return jnp.concatenate([first, rest], axis=1).astype(jnp.float32)

  def decode(self, params: Any, z: Float[Array, "b f y x z"]) -> Float[Array, "b t y x 3"]:
    """Pixels, float32."""
    decoder = vae.Decoder(self.vae, jnp.dtype(self.dtype))
    variables = {"params": params["decoder"]}
    first, past = decoder.apply(variables, z[:, :1])
    rest, _ = decoder.apply(variables, z[:, 1:], past)
    return jnp.concatenate([first, rest], axis=1).astype(jnp.float32)
