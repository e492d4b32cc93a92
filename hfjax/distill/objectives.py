"""What is minimised in distillation: networks tied to losses (spec sections 8.3 to 8.8).

An objective is a frozen description; its losses are pure functions of parameters, a batch and a
key, and return the loss with figures to be logged. All random numbers come from the key: those that
steer (number of chunks, exit step) are one for the batch, noise is each sample's own (quirk 17).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from hfjax.diffusion.guidance import guide
from hfjax.diffusion.schedule import TRAIN_TIMESTEPS, FlowSchedule
from hfjax.distill import clip, losses, teacher
from hfjax.distill.inputs import Figures, Texts
from hfjax.distill.rollout import Rollout, StreamStudent, roll_out
from hfjax.distill.supervised import Regression
from hfjax.models import wan
from hfjax.models.presets import WanConfig
from hfjax.models.vae import VaeConfig
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.step import ChunkNoise, draw_noise

GUIDANCE_FORMS = ("conditional", "unconditional")


class Frozen(NamedTuple):
  """Parameters that are given and do not change: teacher, and autoencoder where there is one."""

  teacher: Any
  vae: Any = None


@dataclasses.dataclass(frozen=True)
class Distillation:
  """Distribution matching with a critic, and reflow (spec sections 8.3 to 8.8).

  stream: of the student. critic, teacher: networks that see whole clips.
  vae: encodes the first latent of clips anew; None leaves it as it is, for latents of no video.
  decoded: chunks that are decoded for that at most; 0 for all, see `clip.first_of_clip`.
  most, last: chunks of a rollout at most, and at its end those that carry gradients.
  first_exit: the denoising step from which on one is drawn that a rollout is taken at, counted from
    0; the last is what published code calls last_step_only. What few steps give is another
    distribution than a stream's, and one critic learns all of them.
  guidance: of the teacher's score, by `guidance_form`: away from the conditional prediction,
    `c + s (c - u)`, as published (quirk 14), or from the unconditional one, `u + s (c - u)`.
  critic_guidance: of the critic's, `c + s (c - u)`; 0 for none.
  guided_below: timestep above which the teacher's score is not guided. There it is a mean of all
    that a prompt may show, from which guidance leads away, and the student with it.
  lowest, highest: timesteps that scores are compared at.
  times_shift: shift of the schedule that they are drawn from; None for the student's.
  regression_weight: in the sum, of regression on given trajectories, along which the student
    streams; 0 for none. Distribution matching forgets what the student shows seldom or not well,
    and this keeps it.
  reflow_weight: of regression to the teacher's trajectory in the sum; 0 for none.
  reflow_steps, reflow_stop, reflow_guidance: of the trajectory: Euler steps, those that are taken
    before the result is extrapolated (all by default), and `u + s (c - u)` of its flow.
  reflow_always: reflow trains the first step of every rollout, and else of those that end there.
  dtype, remat, unroll: of critic and teacher: compute dtype, whether blocks are recomputed
    backwards, and how many of them a step of the loop over them holds.

  Quirks of the published code, for parity: renoise_first False (5), noisy_context (12),
  score_shift, the shift of schedules by which critic and teacher turn flows into latents (11).

  Raises ValueError on combinations that cannot work.
  """

  stream: StreamConfig
  critic: WanConfig
  teacher: WanConfig
  vae: VaeConfig | None
  most: int = 18
  last: int = 7
  first_exit: int = 0
  guidance: float = 3.0
  guidance_form: str = "conditional"
  critic_guidance: float = 0.0
  guided_below: float = TRAIN_TIMESTEPS
  lowest: float = losses.LOWEST
  highest: float = losses.HIGHEST
  times_shift: float | None = None
  regression_weight: float = 0.0
  reflow_weight: float = 0.0
  reflow_steps: int = 25
  reflow_stop: int | None = None
  reflow_guidance: float = 3.5
  reflow_always: bool = False
  dtype: str = "float32"
  remat: bool = True
  unroll: int = 1
  decoded: int = 0
  renoise_first: bool = True
  noisy_context: bool = False
  score_shift: float | None = None

  def __post_init__(self):
    student = self.stream.model
    for name, network in (("critic", self.critic), ("teacher", self.teacher)):
      sizes = (network.in_dim, network.out_dim, network.patch, network.text_dim, network.text_len)
      want = (student.in_dim, student.out_dim, student.patch, student.text_dim, student.text_len)
      if sizes != want:
        raise ValueError(
          f"The {name} takes latents and text of other sizes (channels in and out, patch, text "
          f"width and length: {sizes}) than the student ({want}); take networks of one family."
        )
    if not 1 <= self.last <= self.most:
      raise ValueError(
        f"Gradients of {self.last} of {self.most} chunks were asked for; ask for 1 to {self.most}."
      )
    if self.guidance_form not in GUIDANCE_FORMS:
      raise ValueError(
        f"The form of guidance is {self.guidance_form!r}; choose one of "
        f"{', '.join(GUIDANCE_FORMS)}."
      )
    if not 0 <= self.first_exit < len(self.stream.steps):
      raise ValueError(
        f"Rollouts would be taken at denoising steps from {self.first_exit} on, of "
        f"{len(self.stream.steps)} that are counted from 0; give 0 to {len(self.stream.steps) - 1}."
      )
    if self.decoded < 0:
      raise ValueError(f"{self.decoded} chunks are to be decoded; give 1 or more, or 0 for all.")
    if not 0 <= self.lowest < self.highest <= TRAIN_TIMESTEPS:
      raise ValueError(
        f"Scores would be compared from timestep {self.lowest} to {self.highest}; give two that "
        f"ascend, from 0 to {TRAIN_TIMESTEPS}."
      )
    if not 0 <= self.guided_below <= TRAIN_TIMESTEPS:
      raise ValueError(
        f"The teacher would be guided up to timestep {self.guided_below}; give 0 to "
        f"{TRAIN_TIMESTEPS}."
      )
    if self.times_shift is not None and not 1 <= self.times_shift < float("inf"):
      raise ValueError(
        f"The shift of times of scores is {self.times_shift}; give at least 1, or none for the "
        "student's."
      )
    if self.vae is not None and self.vae.z_dim != student.out_dim:
      raise ValueError(
        f"The student makes latents of {student.out_dim} channels, and the autoencoder has "
        f"{self.vae.z_dim}; bring the two that were trained together."
      )
    if not 0 <= self.regression_weight < float("inf"):
      raise ValueError(
        f"The weight of regression is {self.regression_weight}; give at least 0, which is none."
      )
    if self.reflow_weight < 0 or self.reflow_steps < 1:
      raise ValueError(
        f"Reflow has a weight of {self.reflow_weight} and {self.reflow_steps} steps; give at least "
        "0 and 1."
      )
    stop = self.reflow_steps if self.reflow_stop is None else self.reflow_stop
    if not 1 <= stop <= self.reflow_steps:
      raise ValueError(
        f"Reflow is to stop after {stop} of {self.reflow_steps} steps; give 1 to "
        f"{self.reflow_steps}."
      )

  @property
  def schedule(self) -> FlowSchedule:
    """By which all networks' latents are noised."""
    return self.stream.schedule

  @property
  def scores(self) -> FlowSchedule:
    """By which flows of critic and teacher become latents."""
    return self.schedule if self.score_shift is None else FlowSchedule(self.score_shift)

  @property
  def regression(self) -> Regression:
    """Of a student that streams along trajectories."""
    return Regression(self.stream, forcing="stream")

  def generator_loss(
    self,
    params: Any,
    critic: Any,
    frozen: Frozen,
    texts: Texts,
    key: PRNGKeyArray,
    trajectory: Float[Array, "b s f y x c"] | None = None,
  ) -> tuple[Float[Array, ""], Figures]:
    """Distribution matching of a rollout's last chunks, plus `reflow_weight` times reflow and
    `regression_weight` times regression.

    params: the student's, which alone carry gradients. trajectory: that regression takes, of the
    same prompts. Figures: all losses, the mean size of the score difference, chunks and exit step.

    Raises ValueError if a trajectory is missing.
    """
    steering, noise_key, score_key = jax.random.split(key, 3)
    reflows = self.reflow_weight > 0
    chunks, exit_step = self.steer(steering)
    rolled, start = self.roll(params, texts, noise_key, chunks, exit_step, first=reflows)
    image = self.as_clip(rolled, frozen.vae, chunks)
    mask = clip.mask_of_clip(chunks, self.stream.geometry.chunk, self.last)

    t, noise = self.draw_score_times(score_key, image)
    noisy = self.schedule.add_noise(jax.lax.stop_gradient(image), noise, t)
    fake = self._critic_sees(critic, noisy, t, texts)
    real = self._teacher_sees(frozen.teacher, noisy, t, texts)
    direction = losses.score_difference(image, fake, real)
    matching = losses.matching_loss(image, direction, mask)
    figures = {
      "matching_loss": matching,
      "score_gradient": jnp.abs(direction).mean(),
      "chunks": chunks,
      "exit_step": exit_step,
    }
    total = matching
    if self.regression_weight:
      if trajectory is None:
        raise ValueError("Regression needs trajectories of the prompts, and there are none.")
      apart = jax.random.fold_in(key, 1)
      regression, _ = self.regression.loss(params, trajectory, texts, apart)
      figures["regression_loss"] = regression
      total = total + self.regression_weight * regression
    if not reflows:
      return total, figures
    reflow, counted = self._reflow(rolled, frozen.teacher, texts, start, exit_step, mask)
    # Where reflow did not take part there is nothing to log.
    figures["reflow_loss"] = jnp.where(counted, reflow, jnp.nan)
    return total + self.reflow_weight * jnp.where(counted, reflow, 0), figures

  def critic_loss(
    self, critic: Any, params: Any, frozen: Frozen, texts: Texts, key: PRNGKeyArray
  ) -> tuple[Float[Array, ""], Figures]:
    """Flow matching of the critic on the last chunks of a rollout, all of which count.

    critic: the critic's parameters, which alone carry gradients.
    """
    steering, noise_key, score_key = jax.random.split(key, 3)
    chunks, exit_step = self.steer(steering)
    fixed = jax.lax.stop_gradient(params)
    rolled, _ = self.roll(fixed, texts, noise_key, chunks, exit_step)
    image = jax.lax.stop_gradient(self.as_clip(rolled, frozen.vae, chunks))
    t, noise = self.draw_score_times(score_key, image)
    noisy = self.schedule.add_noise(image, noise, t)
    flow = self._flow(self.critic, critic, noisy, t, texts.context)
    if self.score_shift is not None:
      clean = self.scores.x0_from_flow(flow, noisy, t)
      flow = self.schedule.flow_from_x0(clean, noisy, t)
    loss = losses.denoising_loss(flow, image, noise)
    return loss, {"chunks": chunks, "exit_step": exit_step}

  def steer(self, key: PRNGKeyArray) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Chunks of a rollout, and the step it is taken at."""
    one, two = jax.random.split(key)
    return (
      jax.random.randint(one, (), self.last, self.most + 1),
      jax.random.randint(two, (), self.first_exit, len(self.stream.steps)),
    )

  def roll(
    self,
    params: Any,
    texts: Texts,
    key: PRNGKeyArray,
    chunks: Int[Array, ""],
    exit_step: Int[Array, ""],
    first: bool = False,
  ) -> tuple[Rollout, Float[Array, "b f y x c"]]:
    """A rollout of the student, and the noise that its last chunks start from.

    first: whether reflow needs predictions of the first step.
    """
    config, batch = self.stream, texts.context.shape[0]
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))

    def noise(number: Int[Array, ""]) -> ChunkNoise:
      return draw_noise(config, keys, jnp.broadcast_to(number, (batch,)))

    def noisy(x0, number):
      # Behind the draws of the chunk itself.
      drawn = jax.random.fold_in(jax.random.fold_in(key, number), batch)
      t = jnp.full((batch,), config.context_timestep, jnp.float32)
      return self.schedule.add_noise(x0, jax.random.normal(drawn, x0.shape), t)

    rolled = roll_out(
      StreamStudent(config, texts.context), params, noise, exit_step, chunks,
      most=self.most, last=self.last, first=first and self.reflow_always,
      renoise_first=self.renoise_first, context=noisy if self.noisy_context else None,
    )  # fmt: skip
    starts = [noise(chunks - self.last + i).start for i in range(self.last)] if first else []
    return rolled, jnp.concatenate(starts, axis=1) if starts else rolled.latents

  def as_clip(
    self, rolled: Rollout, vae_params: Any, chunks: Int[Array, ""]
  ) -> Float[Array, "b f y x c"]:
    """The last chunks as a clip of their own, float32."""
    latents = rolled.latents.astype(jnp.float32)
    if self.vae is None:
      return latents
    chunk, dtype = self.stream.geometry.chunk, self.stream.compute_dtype
    first = clip.first_of_clip(
      self.vae, vae_params, rolled.all, chunks, chunk, self.last, dtype, self.decoded
    )
    # Where nothing came before, the first latent counts, and keeps its gradient.
    first = jnp.where(chunks > self.last, first, latents[:, :1])
    return clip.as_clip(latents, first)

  def draw_score_times(
    self, key: PRNGKeyArray, image: Float[Array, "b f y x c"]
  ) -> tuple[Float[Array, "b"], Float[Array, "b f y x c"]]:
    """Timesteps that scores are compared at, one for each sample, and noise of the clip."""
    one, two = jax.random.split(key)
    raw = jax.random.randint(one, image.shape[:1], 0, TRAIN_TIMESTEPS)
    shift = self.stream.shift if self.times_shift is None else self.times_shift
    t = losses.score_times(raw, shift, self.lowest, self.highest)
    return t, jax.random.normal(two, image.shape)

  def _flow(self, config, params, x, t, context):
    return wan.predict_flow(
      config, params, x, t, context, dtype=jnp.dtype(self.dtype), remat=self.remat,
      unroll=self.unroll,
    )  # fmt: skip

  def both_flows(self, config, params, x, t, texts: Texts):
    """Flows under the prompts and under the negative one, by one forward of twice the batch.

    No gradient flows.
    """
    negative = jnp.broadcast_to(texts.negative, texts.context.shape)
    context = jnp.concatenate([texts.context, negative])
    flow = self._flow(config, params, jnp.concatenate([x, x]), jnp.concatenate([t, t]), context)
    return jnp.split(jax.lax.stop_gradient(flow), 2)

  def _critic_sees(self, params, noisy, t, texts: Texts):
    """Clean images that the critic sees in noisy ones; no gradient."""
    params = jax.lax.stop_gradient(params)
    if not self.critic_guidance:
      flow = self._flow(self.critic, params, noisy, t, texts.context)
      return jax.lax.stop_gradient(self.scores.x0_from_flow(flow, noisy, t))
    both = self.both_flows(self.critic, params, noisy, t, texts)
    with_text, without = (self.scores.x0_from_flow(flow, noisy, t) for flow in both)
    return losses.extrapolate(with_text, without, self.critic_guidance)

  def _teacher_sees(self, params, noisy, t, texts: Texts):
    """Clean images that the guided teacher sees in noisy ones; no gradient."""
    both = self.both_flows(self.teacher, params, noisy, t, texts)
    with_text, without = (self.scores.x0_from_flow(flow, noisy, t) for flow in both)
    form = losses.extrapolate if self.guidance_form == "conditional" else guide
    guided = t.reshape(-1, 1, 1, 1, 1) <= self.guided_below
    return jnp.where(guided, form(with_text, without, self.guidance), with_text)

  def _reflow(self, rolled: Rollout, params, texts: Texts, start, exit_step, mask):
    """Distance of the first step's predictions from the teacher's trajectory, and if it counts."""
    predicted = rolled.latents if rolled.first is None else rolled.first
    counts = jnp.bool_(True) if self.reflow_always else exit_step == 0
    steps = FlowSchedule(self.stream.shift, self.reflow_steps)
    flows = lambda x, t, i: self.both_flows(self.teacher, params, x, t, texts)

    def solve():
      return teacher.solve(flows, start, steps, self.reflow_guidance, self.reflow_stop, self.scores)

    def nothing():
      return jnp.zeros(start.shape, jnp.float32)

    # The teacher's many steps are taken only where they count.
    target = solve() if self.reflow_always else jax.lax.cond(counts, solve, nothing)
    return losses.regression_loss(predicted, target, mask), counts
