"""Whole clips by undistilled bidirectional models, given out piece by piece as a stream's are."""

import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

from hfjax.diffusion import guidance as guiding
from hfjax.diffusion.clip import sample_clip
from hfjax.diffusion.solvers import MultistepSolver
from hfjax.pipeline import Pipeline
from hfjax.streaming.latent_stream import sample_keys
from hfjax.streaming.pixels import FrameDecoder
from hfjax.streaming.stream import NEGATIVE, latent_size

_PIECE = 3  # latent frames decoded at once


class WholeClip:
  """Iterates over the frames `[b t y x 3]` of one clip, all of whose latents are made first.

  frames: how many have been given out. chunk: their last latents. denoising_s: seconds that the
  latents took, compilation included.
  """

  def __init__(
    self,
    model: Pipeline,
    prompts: Sequence[str],
    *,
    size: tuple[int, int],
    frames: int,
    solver: MultistepSolver,
    guidance: float,
    guidance_interval: guiding.Interval = guiding.ALWAYS,
    negative_prompt: str = NEGATIVE,
    seed: int = 0,
    dtype: str = "bfloat16",
    progress: Callable[[int], None] | None = None,
  ):
    """A clip of `frames` or a few more for each prompt. progress: called after each step.
    guidance_interval: times from and up to which there is guidance.

    Raises ValueError on sizes that cannot work.
    """
    width, height = latent_size(model, size)
    factor = model.autoencoder.config.time_factor
    shape = (1 + -(-(frames - 1) // factor), height, width, model.config.in_dim)
    keys = sample_keys(seed, len(prompts))
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys)
    negative = model.encode([negative_prompt]) if guidance != 1 else None
    self.prompts = list(prompts)
    self._sample = lambda: sample_clip(
      model.config, model.params, model.encode(self.prompts), noise, solver, guidance, negative,
      jnp.dtype(dtype), guidance_interval, progress,
    )  # fmt: skip
    self._latents: Array | None = None
    self.denoising_s = 0.0
    self._next, self.frames = 0, 0
    self._decoder = FrameDecoder(model.autoencoder)
    self.chunk: Array | None = None

  def __iter__(self) -> Iterator[UInt8[Array, "b t y x 3"]]:
    return self

  def denoise(self):
    """Makes the latents, if they are not there yet."""
    if self._latents is None:
      start = time.perf_counter()
      self._latents = jax.block_until_ready(self._sample())
      self.denoising_s = time.perf_counter() - start

  def __next__(self) -> UInt8[Array, "b t y x 3"]:
    self.denoise()
    assert self._latents is not None
    self.chunk = self._latents[:, self._next : self._next + _PIECE]
    if not self.chunk.shape[1]:
      raise StopIteration
    self._next += self.chunk.shape[1]
    frames = self._decoder(self.chunk)
    self.frames += frames.shape[1]
    return frames
