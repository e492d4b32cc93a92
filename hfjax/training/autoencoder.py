"""What the stage vae measures and shows: latents' statistics, clips beside what comes back."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from hfjax.models import vae
from hfjax.models.clips import to_uint8
from hfjax.models.vae import VaeConfig
from hfjax.streaming.pixels import from_bytes
from hfjax.training.metrics import Metrics
from hfjax.training.plan import Plan
from hfjax.video import Preview, VideoError, VideoWriter, write_image

MEASURED = 64  # clips that statistics are taken of
_AT_ONCE = 8


def statistics(
  config: VaeConfig, params: Any, clips: Sequence[UInt8[np.ndarray, "t y x 3"]], dtype: Any
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Means and deviations of each latent channel, over clips; none is below 1e-3."""
  found = []
  for i in range(0, len(clips), _AT_ONCE):
    z = _encode(config, jnp.dtype(dtype), params, np.stack(clips[i : i + _AT_ONCE]))
    found.append(np.asarray(z, np.float64).reshape(-1, config.z_dim))
  numbers = np.concatenate(found)
  deviations = np.maximum(numbers.std(axis=0), 1e-3)
  return tuple(map(float, numbers.mean(axis=0))), tuple(map(float, deviations))


def psnr(a: UInt8[np.ndarray, "*b"], b: UInt8[np.ndarray, "*b"]) -> float:
  """Peak signal-to-noise ratio of bytes, in decibels; infinite for equal ones."""
  square = np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))
  return float("inf") if square == 0 else float(10 * np.log10(255**2 / square))


def reconstruct(
  config: VaeConfig, params: Any, clips: UInt8[np.ndarray, "b t y x 3"], dtype: Any
) -> UInt8[np.ndarray, "b t y x 3"]:
  """Clips through the autoencoder."""
  return np.asarray(_reconstruct(config, jnp.dtype(dtype), params, jnp.asarray(clips)))


def validate(
  plan: Plan,
  kinds: dict[str, Any],
  clips: Sequence[UInt8[np.ndarray, "t y x 3"]],
  step: int,
  workdir: Path,
  metrics: Metrics,
  say: Callable[[str], None],
):
  """Writes `videos/step-000200-raw-0.mp4`, a clip beside what comes back of it, and its sheet.

  kinds: parameters by name. Figures are `validation/KIND_psnr`, in decibels.
  """
  assert plan.vae is not None
  if not clips:
    return
  for kind, params in kinds.items():
    back = reconstruct(plan.vae, params, np.stack(clips), plan.stream.compute_dtype)
    ratios = [psnr(x, y) for x, y in zip(clips, back, strict=True)]
    metrics.write(step, {f"validation/{kind}_psnr": float(np.mean(ratios))})
    for number, (clip, again) in enumerate(zip(clips, back, strict=True)):
      both = np.concatenate([clip, again], axis=2)
      preview = Preview(width=both.shape[2])
      preview.add(both)
      sheet = preview.sheet()
      stem = workdir / "videos" / f"step-{step:06d}-{kind}-{number}"
      metrics.image(step, f"validation/{kind}-{number}", sheet)
      try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        writer = VideoWriter(
          f"{stem}.mp4", both.shape[2], both.shape[1], plan.config.validation.fps
        )
        writer.write(both)
        writer.close()
        write_image(f"{stem}.png", sheet)
      except (VideoError, OSError) as e:
        say(f"A validation video is missing: {e}")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(config, dtype, params, clips) -> Float[Array, "b f y x z"]:
  return vae.encode(config, params, from_bytes(clips), dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _reconstruct(config, dtype, params, clips):
  latents = vae.encode(config, params, from_bytes(clips), dtype)
  return to_uint8(vae.decode(config, params, latents, dtype))
