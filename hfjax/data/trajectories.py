"""Trajectories of a teacher, from noise to clean latents, for the first lessons of a student."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hfjax import convert, pipeline
from hfjax.data import contexts, shards
from hfjax.data.rejects import DataError
from hfjax.data.sources import Prompts, Source
from hfjax.diffusion import guidance as guiding
from hfjax.diffusion.schedule import FlowSchedule
from hfjax.distill import teacher
from hfjax.models import causal, wan
from hfjax.models.geometry import Geometry
from hfjax.models.presets import WanConfig
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.state import begin_chunk, init_state
from hfjax.streaming.step import commit, denoise

# States `[b s f y x c]` of trajectories from noise `[b f y x c]` under contexts `[b t w]`.
Trace = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How trajectories are made.

  shape: frames, rows, columns and channels of the latents.
  steps: nominal denoising steps of the student, at whose times states are kept: 1000 is noise.
  teacher_steps: Euler steps of the teacher. shift: of its schedule, and the student's.
  guidance: of the teacher; 1 for none. guidance_interval: times from and up to which there is
    guidance. seed: of the noise.
  chunk: frames of a chunk, where the teacher is causal and leads one after the other to its end,
    which the next ones see; 0 for a bidirectional teacher.

  Raises DataError if the teacher does not pass through the student's times, or the frames do not
  fill whole chunks.
  """

  shape: tuple[int, int, int, int]
  steps: tuple[float, ...] = (1000, 750, 500, 250)
  teacher_steps: int = 48
  shift: float = 5.0
  guidance: float = 5.0
  seed: int = 0
  chunk: int = 0
  guidance_interval: guiding.Interval = guiding.ALWAYS

  def __post_init__(self):
    if len(self.shape) != 4 or min(self.shape) < 1:
      raise DataError(f"Latents of shape {self.shape} are asked for; give four sizes from 1 on.")
    if self.chunk < 0:
      raise DataError(
        f"A chunk of {self.chunk} frames is asked for; give 1 or more, or 0 for a bidirectional "
        "teacher."
      )
    try:
      teacher.kept_states(self.schedule, self.steps)
      guiding.count_texts(self.guidance)
      interval = guiding.as_interval(self.guidance_interval)
      object.__setattr__(self, "guidance_interval", interval)
      if self.chunk:
        causal.chunk_spans(self.shape[0], self.chunk)
    except ValueError as e:
      raise DataError(str(e)) from e

  @property
  def schedule(self) -> FlowSchedule:
    """The teacher's."""
    return FlowSchedule(self.shift, self.teacher_steps)

  @property
  def keep(self) -> tuple[int, ...]:
    """Kept states: the steps before which they lie, and the number of steps for the clean one."""
    return teacher.kept_states(self.schedule, self.steps)

  @property
  def times(self) -> tuple[float, ...]:
    """Times of the kept states, 0 for the clean one."""
    return (*FlowSchedule(self.shift).warp(self.steps), 0.0)

  def stream(self, config: WanConfig, dtype: Any) -> StreamConfig:
    """Of a causal teacher, whose window is as long as the clip."""
    frames, rows, columns, _ = self.shape
    geometry = Geometry(
      rows, columns, chunk=self.chunk, window=frames, sink=0, rope_cap=frames, patch=config.patch,
      variant="reference_dense",
    )  # fmt: skip
    return StreamConfig(
      config, geometry, shift=self.shift, guidance=self.guidance,
      guidance_interval=self.guidance_interval, dtype=jnp.dtype(dtype).name,
    )  # fmt: skip

  def noise(self, index: int) -> Float[np.ndarray, "f y x c"]:
    """Where a trajectory begins; float32, each number one that float16 has, as it is stored so."""
    noise = np.random.default_rng([self.seed, index]).standard_normal(self.shape, np.float32)
    return noise.astype(np.float16).astype(np.float32)


def tracer(
  config: WanConfig,
  params: wan.Params,
  recipe: Recipe,
  negative: Float[Array, "1 t w"] | None,
  dtype: Any = jnp.bfloat16,
) -> Trace:
  """Trajectories of a transformer; in chunks, it streams with dense attention to all that was.

  negative: context that guidance leads away from; not used at guidance 1. dtype: of computing.
  """
  guided = recipe.guidance != 1
  if guided and negative is None:
    raise DataError("Guidance needs the context of a negative prompt; give one, or guidance 1.")

  def trace(noise: Array, context: Array) -> Array:
    text = guiding.join_texts(
      config, jnp.asarray(context), negative if guided else None, recipe.guidance
    )
    dtype_ = jnp.dtype(dtype)
    if recipe.chunk:
      stream = recipe.stream(config, dtype_)
      return _trace_stream(stream, recipe.schedule, recipe.keep, params, noise, text)
    return _trace(
      config, recipe.schedule, recipe.keep, dtype_, recipe.guidance_interval, params, noise, text,
      recipe.guidance,
    )  # fmt: skip

  return trace


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _trace(config, schedule, keep, dtype, interval, params, noise, text, guidance):
  texts = text.shape[0] // noise.shape[0]

  def flows(x, t, i):
    both = wan.predict_flow(
      config, params, guiding.repeat_rows(x, texts), jnp.tile(t, texts), text, dtype=dtype
    )
    guided = guiding.merge_rows(both, texts, guiding.scale_at(guidance, interval, t))
    return guided, guided

  return teacher.trace(flows, noise, schedule, 1.0, keep)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _trace_stream(config: StreamConfig, schedule, keep, params, noise, text):
  c = config.geometry.chunk
  chunks = jnp.moveaxis(noise.reshape(len(noise), -1, c, *noise.shape[2:]), 1, 0)

  def one(state, start):
    chunk = begin_chunk(config, state)

    def flows(x, t, i):
      guided = denoise(config, params, chunk, x, t)
      return guided, guided

    states = teacher.trace(flows, start, schedule, 1.0, keep)
    return commit(config, params, chunk, states[:, -1]), states

  keys = wan.text_keys(config.model, params, text, config.compute_dtype)
  _, states = jax.lax.scan(one, init_state(config, keys), chunks)
  return einops.rearrange(states, "k b s c y x z -> b s (k c) y x z")


def load_teacher(weights: str | Path, dtype: Any = jnp.bfloat16) -> tuple[WanConfig, wan.Params]:
  """Architecture and parameters of a transformer; see `pipeline.load`, whose errors are raised."""
  if str(weights).startswith("random:"):
    made = pipeline.load(weights, "tiny", dtype)
    return made.config, made.params
  loaded = convert.load(weights, "dit", dtype=dtype)
  return loaded.config, loaded.params


def write(
  folder: str | Path,
  prompts: Source | Sequence[str],
  encode: contexts.Encode | None,
  trace: Trace,
  recipe: Recipe,
  *,
  batch: int = 1,
  with_context: bool = False,
  model: str = "",
  negative: str = "",
  count: int | None = None,
  per_shard: int = 0,
  command: str = "",
  **options: Any,
) -> shards.Written:
  """Writes a trajectory `[s f y x c]`, float16, for each prompt, from noise of its own.

  prompts: strings, or a source of them. encode: makes contexts of prompts; None if the source has
    them. trace: makes trajectories; see `tracer`.
  batch: trajectories that are made at once; another one goes on with the same folder.
  with_context: keeps contexts too. model, negative: what weights were used, and what prompt was led
    away from; a folder is gone on with by no other. count: of the prompts, the first ones.
  options: see `shards.write`, whose errors are raised.
  """
  source = _source(prompts)
  count = len(source) if count is None else min(count, len(source))
  if encode is None and count and not contexts.has_contexts(source):
    raise DataError("The prompts have no contexts; give a text encoder, or embed them before.")
  shape = (len(recipe.keep), *recipe.shape)
  arrays: dict[str, tuple[shards.Shape, str]] = {"trajectory": (shape, "float16")}
  if with_context and count:
    arrays["context"] = contexts.context_array(encode or source)
  made = dataclasses.asdict(recipe)
  # As folders say that are older than what they leave out.
  usual = {"chunk": 0, "guidance_interval": guiding.ALWAYS}
  made = {k: v for k, v in made.items() if k != "shape" and (k, v) not in usual.items()}
  about = {**made, "times": recipe.times, "prompts": contexts.identity(source), "model": model}
  plan = shards.Plan(
    "trajectories", count, arrays, about | {"negative": negative}, per_shard, command
  )

  def make(start: int, stop: int, reject) -> Iterable[shards.Example]:
    for numbers in shards.batches(start, stop, batch):
      numbers, chosen = contexts.readable(source, numbers, reject)
      if not chosen:
        continue
      words = [example["prompt"] for example in chosen]
      if encode is not None:
        rows = contexts.encoded(encode, contexts.filled(words, batch))
      else:
        rows = _even(contexts.filled([example["context"] for example in chosen], batch))
      noise = np.stack(contexts.filled([recipe.noise(i) for i in numbers], batch))
      states = np.asarray(trace(jnp.asarray(noise), jnp.asarray(rows)))
      for word, row, state in zip(words, rows, states):  # without what fills up the batch
        context = {"context": contexts.trimmed(row)} if with_context else {}
        yield {"prompt": word, "trajectory": state, **context}

  return shards.write(folder, plan, make, **options)


def _source(prompts: Source | Sequence[str]) -> Source:
  if isinstance(prompts, str):
    raise DataError("One string was given as prompts; give a list of them.")
  is_strings = isinstance(prompts, Sequence) and all(isinstance(p, str) for p in prompts)
  return Prompts(prompts) if is_strings else prompts  # type: ignore[arg-type, return-value]


def _even(rows: list[np.ndarray]) -> np.ndarray:
  """Contexts as one array, shorter ones filled up with zeros."""
  most = max(map(len, rows))
  return np.stack([np.pad(row, ((0, most - len(row)), (0, 0))) for row in rows])
