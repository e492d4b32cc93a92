"""A video that does not end, from a prompt: frames come while they are made."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from hfjax.diffusion.solvers import MultistepSolver
from hfjax.models.geometry import Geometry
from hfjax.models.sampling_presets import SAMPLING_PRESETS, SamplingPreset
from hfjax.streaming import snapshot
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.latent_stream import KEPT, LatentStream
from hfjax.streaming.pixels import FrameDecoder
from hfjax.streaming.trees import part

if TYPE_CHECKING:
  from hfjax.pipeline import Pipeline

# What guided videos keep away from, unless something else is asked for.
NEGATIVE = (
  "blurred, pixelated or noisy picture, washed-out colours, too bright, too dark, frozen or "
  "flickering motion, misshapen bodies, surplus limbs and fingers, melting faces, crowded "
  "background, captions, logos, frames"
)
SIZE = (832, 480)  # columns and rows of pixels, unless a model has its own
_CONFIG = (
  "steps", "warp", "shift", "context_timestep", "dtype", "backend", "guidance", "guidance_interval",
)  # fmt: skip


class Stream:
  """Iterates over chunks of frames `[b t y x 3]`, bytes on the device, without end.

  A chunk is given out when its work has been handed to the device, so that whoever looks at its
  frames only after asking for the next one leaves the device no pause.

  latents: the stream of latents beneath. chunk: the last clean latents `[b f y x z]`.
  """

  def __init__(
    self,
    model: "Pipeline",
    prompt: str | Sequence[str],
    *,
    size: tuple[int, int] | None = None,
    seed: int | Sequence[int] = 0,
    negative_prompt: str | None = None,
    kept: int = KEPT,
    dtype: str | None = None,
    backend: str = "auto",
    **settings: Any,
  ):
    """Begins a video for each prompt.

    model: see `hfjax.pipeline.load`. size: columns and rows of pixels; the model's by default, or
      (832, 480). seed: one for all, from which each video takes its own noise, or one for each.
      negative_prompt: what guided videos keep away from; it may be empty; by default what the
      model's preset says, or a usual one. kept: see `LatentStream`.
    dtype: that is computed in, see `default_dtype`.
    settings: of `Geometry` (window, sink, chunk, ratio, rope_cap, block, variant) and of
      `StreamConfig` (steps, warp, shift, solver, guidance, guidance_interval). Where the model's
      preset says nothing of one, their defaults hold.

    Raises ValueError on sizes and settings that cannot work, with the nearest that can.
    """
    self.model, self.prompts = model, _listed(prompt)
    self.config = configure(model, size, dtype=dtype, backend=backend, **settings)
    context, guided = model.encode(self.prompts), self.config.guidance != 1
    if negative_prompt is None:
      usual = SAMPLING_PRESETS[model.preset].negative
      negative_prompt = NEGATIVE if usual is None else usual
    negative = model.encode([negative_prompt]) if guided else None
    self.latents = LatentStream(self.config, model.params, context, seed, kept, negative)
    self.decoder = FrameDecoder(model.autoencoder)
    self.chunk: Array | None = None

  @property
  def frames(self) -> int:
    """Frames of video so far, in each sample."""
    latent = self.latents.history.total
    return latent and self.model.autoencoder.config.time_factor * (latent - 1) + 1

  def warm_up(self):
    """Compiles all that the stream will need, other prompts included, before it begins."""
    self.latents.warm_up()
    g, z = self.config.geometry, self.model.autoencoder.config.z_dim
    decoder = FrameDecoder(self.model.autoencoder)
    blank = jnp.zeros((len(self.prompts), g.chunk, g.height, g.width, z))
    for _ in range(2):
      frames = decoder(blank)
    jax.block_until_ready(frames)

  def extend(self, frames: UInt8[Array, "b t y x 3"]) -> UInt8[Array, "b u y x 3"]:
    """Takes given frames as the next ones (an image, or a clip to go on with).

    Of a clip as many are taken as fill latents: 1, and then multiples of 4; its last frame is
    repeated up to there. Returns the frames as they come back from the autoencoder.

    Raises ValueError unless the stream has not begun and the frames have its size.
    """
    g, factor = self.config.geometry, self.model.autoencoder.config.space_factor
    want = (len(self.prompts), g.height * factor, g.width * factor, 3)
    shape = frames.shape
    if len(shape) != 5 or (shape[0], *shape[2:]) != want or frames.dtype != jnp.uint8:
      raise ValueError(
        f"The frames are {frames.dtype} {tuple(shape)}; this stream takes uint8 "
        f"[{want[0]}, frames, {want[1]}, {want[2]}, 3]."
      )
    if self.latents.history.total:
      raise ValueError(
        f"The stream has {self.frames} frames already; give images and clips before its first."
      )
    self.chunk = self.model.autoencoder.encode(jnp.asarray(frames))
    self.latents.extend(self.chunk)
    # In pieces, as a whole clip would need memory for all of its frames at once.
    starts = range(0, self.chunk.shape[1], g.chunk)
    pieces = [self.decoder(self.chunk[:, i : i + g.chunk]) for i in starts]
    return jnp.concatenate(pieces, axis=1)

  def set_prompt(self, prompt: str | Sequence[str], blend: int = 0, share: float = 0.0):
    """Goes on under another prompt, or one for each video (see `LatentStream.set_context`).

    blend: chunks over which the text moves to the new one. share: of the linear memory that stays.
    """
    prompts = _listed(prompt)
    if len(prompts) == 1:
      prompts *= len(self.prompts)
    if len(prompts) != len(self.prompts):
      raise ValueError(
        f"{len(prompts)} prompts were given for {len(self.prompts)} videos; give one for each, or "
        "one for all."
      )
    self.latents.set_context(self.model.encode(prompts), blend, share)
    self.prompts = prompts

  def state(self) -> dict[str, np.ndarray]:
    """All that the stream is, but for the model: arrays on the host, to be saved as they are."""
    config = {k: v for k, v in vars(self.config).items() if k in _CONFIG}
    config |= {"geometry": vars(self.config.geometry)}
    if self.config.solver is not None:
      config |= {"solver": dataclasses.asdict(self.config.solver)}
    about = json.dumps({"prompts": self.prompts, "config": config}).encode()
    return {
      "about": np.frombuffer(about, np.uint8),
      **{f"latents/{k}": x for k, x in snapshot.to_arrays(self.latents).items()},
      **{f"decoder/{k}": x for k, x in self.decoder.to_arrays().items()},
    }

  @classmethod
  def from_state(cls, model: "Pipeline", state: Mapping[str, np.ndarray]) -> "Stream":
    """The stream whose `state` this is; on the same machine it goes on with the same bits.

    model: the one that it was made with. Raises ValueError on the state of another model, or none.
    """
    try:
      about = json.loads(np.asarray(state["about"]).tobytes())
      prompts, fields = about["prompts"], about["config"]
      fields["geometry"] = Geometry(**_tuples(fields["geometry"]))
      solver = fields.pop("solver", None)
      fields["solver"] = solver and MultistepSolver(**solver)
      config = StreamConfig(model.config, **_tuples(fields))
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as e:
      raise ValueError(f"This is no state of a stream ({e}); give what Stream.state made.") from e
    g = config.geometry
    stream = cls.__new__(cls)
    stream.model, stream.prompts, stream.config, stream.chunk = model, prompts, config, None
    stream.latents = snapshot.from_arrays(config, model.params, part(state, "latents/"))
    stream.decoder = FrameDecoder(model.autoencoder)
    cache = part(state, "decoder/")
    stream.decoder.restore(cache, len(prompts), g.height, g.width)
    return stream

  def __iter__(self) -> Iterator[UInt8[Array, "b t y x 3"]]:
    return self

  def __next__(self) -> UInt8[Array, "b t y x 3"]:
    self.chunk = next(self.latents)
    return self.decoder(self.chunk)

  def each_frame(self) -> Iterator[UInt8[np.ndarray, "b y x 3"]]:
    """Frames one by one, on the host, while the next chunk is being made."""
    ahead = next(self)
    while True:
      frames, ahead = ahead, next(self)
      yield from np.moveaxis(np.asarray(frames), 1, 0)


def configure(
  model: "Pipeline",
  size: tuple[int, int] | None,
  dtype: str | None,
  backend: str,
  **settings: Any,
) -> StreamConfig:
  """Configuration of streams of a model; ValueError on sizes and settings that cannot work."""
  preset = SAMPLING_PRESETS[model.preset]
  width, height = latent_size(model, (preset.size or SIZE) if size is None else size)
  names = {
    "steps", "warp", "shift", "context_timestep", "solver", "guidance", "guidance_interval"
  }  # fmt: skip
  stream = {k: v for k, v in settings.items() if k in names}
  rest = {k: v for k, v in settings.items() if k not in names}
  if rest.get("variant") is None:
    rest["variant"] = model.variant or ("paper" if model.config.linear else "reference_dense")
  own = {"block": preset.block, "ratio": preset.ratio}
  if not preset.bidirectional:
    own |= {"window": preset.window, "sink": preset.sink}
    stream = {"shift": preset.shift} | stream
    if "steps" not in stream:
      stream = _denoising(preset, stream["shift"]) | stream
  rest |= {name: x for name, x in own.items() if x is not None and name not in rest}
  try:
    geometry = Geometry(height, width, patch=model.config.patch, **rest)
  except TypeError as e:
    raise ValueError(
      f"A setting is unknown ({', '.join(rest)}); there are those of Geometry and StreamConfig."
    ) from e
  dtype = dtype or default_dtype()
  return StreamConfig(model.config, geometry, dtype=dtype, backend=backend, **stream)


def _denoising(preset: SamplingPreset, shift: float) -> dict[str, Any]:
  """How weights denoise that stream."""
  if preset.solver is None:
    return {"steps": preset.steps}
  solver = MultistepSolver(preset.solver, preset.solver_steps, shift)
  guided = {"guidance": preset.guidance, "guidance_interval": preset.guidance_interval}
  return {"solver": solver, **guided}


def default_dtype() -> str:
  """What is computed in unless something else is asked for: bfloat16, but float32 on processors.

  XLA has no faster arithmetic in bfloat16 there, and converts back and forth.
  """
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
  """As JSON gives them back, but with tuples for lists."""
  return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def latent_size(model: "Pipeline", size: tuple[int, int]) -> tuple[int, int]:
  """Latent columns and rows of a video of that many pixels."""
  try:
    width, height = (int(n) for n in size)
  except (TypeError, ValueError):
    raise ValueError(f"The size is {size!r}; give columns and rows, as in (832, 480).") from None
  factor = model.autoencoder.config.space_factor
  rows, columns = (factor * n for n in model.config.patch)
  if width < columns or height < rows or width % columns or height % rows:
    near = max(columns, round(width / columns) * columns), max(rows, round(height / rows) * rows)
    raise ValueError(
      f"The video would be {width} x {height} pixels; its sides must be multiples of {columns} and "
      f"{rows}. The nearest is {near[0]} x {near[1]}."
    )
  return width // factor, height // factor


def _listed(prompt: str | Sequence[str]) -> list[str]:
  prompts = [prompt] if isinstance(prompt, str) else list(prompt)
  if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
    raise ValueError(f"The prompt is {prompt!r}; say in words what the video shows.")
  return prompts
