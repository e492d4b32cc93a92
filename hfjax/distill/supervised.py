"""What is minimised where data tell what is right: a teacher's trajectories, or clips (spec section
8.9). As in `distill.objectives`, all random numbers come from the key.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from hfjax.diffusion.schedule import TRAIN_TIMESTEPS, FlowSchedule
from hfjax.distill import losses
from hfjax.distill.inputs import Figures, Texts
from hfjax.distill.rollout import StreamStudent, follow
from hfjax.models import causal, wan
from hfjax.models.presets import WanConfig
from hfjax.streaming.config import StreamConfig

FORCINGS = ("none", "teacher", "stream")


@dataclasses.dataclass(frozen=True)
class Regression:
  """Causal regression on a teacher's trajectories, so that few steps suffice (spec section 8.9).

  stream: of the student, whose model, chunk, denoising steps and dtype are used; attention is dense
    and causal over all frames, except with the forcing "stream".
  first_clean: the first frame is given, clean and a chunk of its own (image conditioning).
  forcing: "teacher" shows each chunk the clean ends of those before it; with "none", as published,
    it sees their states, at the step that each of them has drawn. "stream" lets the student stream
    along the clean ends, with its window, sparse attention and memory, one chunk after the other;
    no gradient flows through the past.
  unroll: blocks that a step of the loop over them holds.

  Raises ValueError on values out of range.
  """

  stream: StreamConfig
  first_clean: bool = False
  forcing: str = "none"
  unroll: int = 1

  def __post_init__(self):
    _check_forcing(self.forcing)
    if self.first_clean and self.forcing != "none":
      raise ValueError(
        f"With the forcing {self.forcing} the first frame is no chunk of its own; leave "
        "first_clean off, or the forcing at none."
      )

  def loss(
    self, params: Any, trajectory: Float[Array, "b s f y x c"], texts: Texts, key: PRNGKeyArray
  ) -> tuple[Float[Array, ""], Figures]:
    """`mean (x0(x_s, t_s) - x_end)^2`, s drawn for each chunk, over frames that are not clean.

    trajectory: a state for each denoising step, and at the end the clean latents.
    Figures: the loss of each denoising step.

    Raises ValueError on trajectories of another number of states.
    """
    c, steps = self.stream, len(self.stream.steps)
    b, states, frames = trajectory.shape[:3]
    if states != steps + 1:
      raise ValueError(
        f"The trajectories hold {states} states, and {steps} denoising steps need {steps + 1}, the "
        "clean latents at the end; make them anew for these steps."
      )
    drawn = self._draw_steps(key, b, frames)
    index = self._of_frames(drawn, frames)
    rows = jnp.arange(b)[:, None]
    x = trajectory[rows, index, jnp.arange(frames)].astype(jnp.float32)
    clean = trajectory[:, -1].astype(jnp.float32)
    if self.forcing == "stream":
      predicted = follow(StreamStudent(c, texts.context), params, x, drawn, clean)
    else:
      predicted = self._of_clip(params, x, index, clean, texts)
    where = lambda chosen: chosen.reshape(b, frames, 1, 1, 1)
    counts = where(index < steps)
    each = [losses.regression_loss(predicted, clean, where(index == i)) for i in range(steps)]
    there = [jnp.any(index == i) for i in range(steps)]
    figures = {
      f"loss_step{i}": jnp.where(here, x, jnp.nan)
      for i, (x, here) in enumerate(zip(each, there, strict=True))
    }
    return losses.regression_loss(predicted, clean, counts), figures

  def _of_clip(self, params, x, index, clean, texts: Texts) -> Float[Array, "b f y x c"]:
    """What is predicted of all chunks at once."""
    c, (b, frames) = self.stream, index.shape
    options: dict[str, Any] = {
      "plan": causal.block_causal(frames, c.geometry.chunk, first_alone=self.first_clean)
    }
    if self.forcing == "teacher":
      options = {"plan": causal.teacher_forcing(frames, c.geometry.chunk), "clean": clean}
    t = jnp.asarray((*c.timesteps, 0.0), jnp.float32)[index]
    flow = wan.predict_flow(
      c.model, params, x, t, texts.context, dtype=c.compute_dtype, remat=c.remat,
      unroll=self.unroll, **options,
    )  # fmt: skip
    return x - jnp.asarray(c.sigmas, jnp.float32)[index].reshape(b, frames, 1, 1, 1) * flow

  def _draw_steps(self, key, batch: int, frames: int) -> Int[Array, "b k"]:
    """A denoising step for each chunk; behind the last for a clean one."""
    steps, spans = len(self.stream.steps), self._spans(frames)
    drawn = jax.random.randint(key, (batch, len(spans)), 0, steps)
    return drawn.at[:, 0].set(steps) if self.first_clean else drawn

  def _of_frames(self, drawn: Int[Array, "b k"], frames: int) -> Int[Array, "b f"]:
    """The same for each frame."""
    lengths = jnp.array([stop - start for start, stop in self._spans(frames)])
    return jnp.repeat(drawn, lengths, axis=1, total_repeat_length=frames)

  def _spans(self, frames: int):
    return causal.chunk_spans(frames, self.stream.geometry.chunk, self.first_clean)


@dataclasses.dataclass(frozen=True)
class FlowMatching:
  """Flow matching of undistilled models on latents (spec section 8.9).

  model: the network; without forcing it sees whole clips.
  shift: of the schedule that timesteps are drawn from.
  weighted: losses have the schedule's training weights.
  drop_text: share of samples that are trained under the negative prompt, for guidance.
  forcing: "teacher" trains a causal model in chunks, each of which sees the clean ones before it
    and has a timestep of its own.
  chunk: frames of a chunk, with forcing. context_noise: clean ones are noised up to this timestep.
  dtype, remat, unroll: compute dtype, whether blocks are recomputed in the backward pass, and how
    many of them a step of the loop over them holds.

  Raises ValueError on values out of range.
  """

  model: WanConfig
  shift: float = 5.0
  weighted: bool = True
  drop_text: float = 0.1
  forcing: str = "none"
  chunk: int = 3
  context_noise: float = 0.0
  dtype: str = "float32"
  remat: bool = True
  unroll: int = 1

  def __post_init__(self):
    _check_forcing(self.forcing, FORCINGS[:2])
    if not 0 <= self.drop_text <= 1:
      raise ValueError(f"The share of dropped texts is {self.drop_text}; give 0 to 1.")
    if not 0 <= self.context_noise <= TRAIN_TIMESTEPS:
      raise ValueError(
        f"The context's noise reaches to timestep {self.context_noise}; give 0 (none) to "
        f"{TRAIN_TIMESTEPS}."
      )
    if self.model.in_dim != self.model.out_dim or self.model.image_dim:
      raise ValueError("Flow matching trains text-to-video models, and this one takes images.")

  def loss(
    self, params: Any, latents: Float[Array, "b f y x c"], texts: Texts, key: PRNGKeyArray
  ) -> tuple[Float[Array, ""], Figures]:
    """`mean w(t) (flow(x_t, t) - (noise - x0))^2`."""
    b, frames = latents.shape[:2]
    keys = jax.random.split(key, 4)
    table = FlowSchedule(self.shift)
    latents = latents.astype(jnp.float32)
    noise = jax.random.normal(keys[0], latents.shape)
    dropped = self.dropped(key, b)
    context = jnp.where(dropped[:, None, None], texts.negative, texts.context)
    options: dict[str, Any] = {}
    if self.forcing == "none":
      raw = jax.random.randint(keys[2], (b,), 0, TRAIN_TIMESTEPS)
      t = jnp.asarray(table.timesteps)[raw]
    else:
      spans = causal.chunk_spans(frames, self.chunk)
      raw = jax.random.randint(keys[2], (b, len(spans)), 0, TRAIN_TIMESTEPS)
      t = jnp.repeat(jnp.asarray(table.timesteps)[raw], self.chunk, axis=1)
      options = {"plan": causal.teacher_forcing(frames, self.chunk), "clean": latents}
      if self.context_noise:
        clean_t = self.context_noise * jax.random.uniform(keys[3], (b, frames // self.chunk))
        clean_t = jnp.repeat(clean_t, self.chunk, axis=1)
        share = (clean_t / TRAIN_TIMESTEPS).reshape(b, frames, 1, 1, 1)
        options |= {"clean": (1 - share) * latents + share * noise, "clean_t": clean_t}
    x = table.add_noise(latents, noise, t)
    flow = wan.predict_flow(
      self.model, params, x, t, context, dtype=jnp.dtype(self.dtype), remat=self.remat,
      unroll=self.unroll, **options,
    )  # fmt: skip
    weight = table.training_weight(t) if self.weighted else None
    loss = losses.denoising_loss(flow, latents, noise, weight)
    return loss, {"unweighted_loss": losses.denoising_loss(flow, latents, noise)}

  def dropped(self, key: PRNGKeyArray, batch: int) -> Bool[Array, "b"]:
    """Which samples `loss` trains under the negative prompt, with the same key."""
    return jax.random.bernoulli(jax.random.split(key, 4)[1], float(self.drop_text), (batch,))


def _check_forcing(forcing: str, known: tuple[str, ...] = FORCINGS):
  if forcing not in known:
    raise ValueError(f"The forcing is {forcing!r}; choose one of {', '.join(known)}.")
