"""Cases of distillation: losses with their gradients, and the teacher's trajectory."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from goldens.file import LOSS, Golden, Row, ours, theirs
from hfjax.diffusion.schedule import FlowSchedule
from hfjax.distill import losses, teacher
from hfjax.distill.rollout import roll_out
from hfjax.streaming.step import ChunkNoise


def dmd(g: Golden) -> Iterator[Row]:
  shift = g.setting("shift")
  # The published scores have a table of their own (quirk 11).
  tables = FlowSchedule(shift), FlowSchedule(g.setting("score_wrapper_shift"))
  yield from _check(g, "timestep_map", score_times(g, np.arange(1000)))
  yield from matching(g, *tables)
  yield from critic(g, *tables)
  yield from trajectory(g, *tables)
  yield from generator(g, *tables)
  yield from pipeline(g, tables[0])


def score_times(g: Golden, raw: np.ndarray) -> jax.Array:
  return losses.score_times(raw, g.setting("shift"), g.setting("min_step"), g.setting("max_step"))


def matching(g: Golden, table: FlowSchedule, scores: FlowSchedule) -> Iterator[Row]:
  image, noise = ours(g["in/dm/image"]), ours(g["in/dm/noise"])
  t = score_times(g, g["in/dm/t_int"])
  noisy = table.add_noise(image, noise, t)
  clean = {
    f"{who}_{text}": scores.x0_from_flow(ours(g[f"in/dm/flow_{who}_{text}"]), noisy, t)
    for who in ("fake", "real")
    for text in ("cond", "uncond")
  }
  yield from _check(g, "dm/timestep", t)
  yield from _check_latents(g, "dm/noisy_latent", noisy)
  for name, x in clean.items():
    yield from _check_latents(g, f"dm/x0_{name}", x)
  real = losses.extrapolate(clean["real_cond"], clean["real_uncond"], g.setting("guidance"))
  yield from _check_latents(g, "dm/kl_grad_unnormalised", clean["fake_cond"] - real)
  guided = losses.extrapolate(
    clean["fake_cond"], clean["fake_uncond"], g.setting("fake_guidance_alt")
  )
  mask = ours(g["in/dm/gradient_mask"])
  cases = {
    "nomask": (clean["fake_cond"], None),
    "mask": (clean["fake_cond"], mask),
    "nomask_fakecfg": (guided, None),
  }
  for name, (fake, counts) in cases.items():
    direction = losses.score_difference(image, fake, real)
    loss, gradient = jax.value_and_grad(losses.matching_loss)(image, direction, counts)
    yield from _check_latents(g, f"dm/{name}/kl_grad", direction)
    yield from _check(g, f"dm/{name}/loss", loss[None])
    yield from _check_latents(g, f"dm/{name}/grad_image", gradient)
    yield from _check(g, f"dm/{name}/gradient_norm", jnp.abs(direction).mean()[None])


def critic(g: Golden, table: FlowSchedule, scores: FlowSchedule) -> Iterator[Row]:
  image, noise = ours(g["in/critic/generated"]), ours(g["in/critic/noise"])
  t = score_times(g, g["in/critic/t_int"])
  noisy = table.add_noise(image, noise, t)

  def loss(flow):
    clean = scores.x0_from_flow(flow, noisy, t)
    again = table.flow_from_x0(clean, noisy, t)
    return losses.denoising_loss(again, image, noise), (clean, again)

  flow = ours(g["in/critic/flow_fake"])
  (value, (clean, again)), gradient = jax.value_and_grad(loss, has_aux=True)(flow)
  yield from _check(g, "critic/timestep", t)
  yield from _check(g, "critic/loss", value[None])
  for name, x in (("noisy", noisy), ("x0_fake", clean), ("flow_reconverted", again),
                  ("grad_flow_fake", gradient)):  # fmt: skip
    yield from _check_latents(g, f"critic/{name}", x)


def trajectory(g: Golden, table: FlowSchedule, scores: FlowSchedule) -> Iterator[Row]:
  noise, guidance = ours(g["in/teacher/noise"]), g.setting("teacher_cfg")
  schedule = FlowSchedule(table.shift, g.setting("rollout_steps"))
  flows = _flows(g)
  yield from _check(g, "teacher/timesteps", schedule.timesteps)
  yield from _check(g, "teacher/sigmas", schedule.sigmas)
  final = teacher.solve(flows, noise, schedule, guidance)
  yield from _check_latents(g, "teacher/final", final)
  few = teacher.solve(flows, noise, schedule, guidance, g.setting("partial_steps"), scores)
  yield from _check_latents(g, "teacher/final_partial", few)
  states = []

  def seen(x, t, i):
    jax.debug.callback(lambda x: states.append(np.asarray(x)), x, ordered=True)
    return flows(x, t, i)

  jax.block_until_ready(teacher.solve(seen, noise, schedule, guidance))
  jax.effects_barrier()
  yield from _check_latents(g, "teacher/states_before_each_step", np.concatenate(states))


def generator(g: Golden, table: FlowSchedule, scores: FlowSchedule) -> Iterator[Row]:
  """Matching and reflow together."""
  image, first = ours(g["in/gen/pred_image"]), ours(g["in/gen/step0_pred"])
  frames = image.shape[1]
  mask, t = ours(g["in/gen/gradient_mask"]), score_times(g, g["in/gen/t_int"])
  noisy = table.add_noise(image, ours(g["in/gen/noise"]), t)
  fake, real, without = (
    scores.x0_from_flow(ours(g[f"in/gen/flow_{name}"]), noisy, t)
    for name in ("fake_cond", "real_cond", "real_uncond")
  )
  direction = losses.score_difference(
    image, fake, losses.extrapolate(real, without, g.setting("guidance"))
  )
  target = teacher.solve(
    _flows(g),
    ours(g["in/gen/init_noise"])[:, -frames:],
    FlowSchedule(table.shift, g.setting("reflow_step_full")),
    g.setting("reflow_guidance"),
  )

  def total(image, first, mask):
    matched = losses.matching_loss(image, direction, mask)
    if first is None:
      return matched, (matched, jnp.float32(0))
    reflow = losses.regression_loss(first[:, -frames:], target, mask)
    return matched + g.setting("reflow_weight") * reflow, (matched, reflow)

  cases: dict[str, tuple[Any, Any]] = {
    "step0": (first, None),
    "step0_mask": (first, mask),
    "nostep0": (None, mask),
    "all_step0_mask": (first, mask),
  }
  for name, (prediction, counts) in cases.items():
    run = jax.value_and_grad(total, (0, 1), has_aux=True)
    (value, parts), gradients = run(image, prediction, counts)
    for key, x in zip(("total", "dmd", "reflow"), (value, *parts), strict=True):
      yield from _check(g, f"gen/{name}/{key}", x[None])
    for key, x in zip(("grad_pred_image", "grad_step0_pred"), gradients, strict=True):
      if x is not None:
        yield from _check_latents(g, f"gen/{name}/{key}", x)


class StandIn:
  """The file's stand-in for a network; its state is the number of frames. Keeps a log of calls.

  noise: of all chunks, to tell what enters a call.
  """

  def __init__(self, table: FlowSchedule, steps: tuple[float, ...], noise: jax.Array):
    self.noise, self.timesteps = noise, steps
    index = [int(np.argmin(np.abs(table.timesteps - np.float32(t)))) for t in steps]
    self.sigmas = (*(float(table.sigmas[i]) for i in index), 0.0)
    self.log: list[list[float]] = []

  def _note(self, *row: Any):
    jax.debug.callback(lambda *x: self.log.append([float(y) for y in x]), *row, ordered=True)

  def init(self, params):
    return jnp.int32(0)

  def begin(self, start):
    self._note(start, self.timesteps[0], 1, 0, 0, 0)
    return start

  def flow(self, params, start, x, t, final):
    original = jax.lax.dynamic_slice_in_dim(self.noise, start, x.shape[1], axis=1)
    self._note(start, t[0], 0, 0, int(final), jnp.any(x != original))
    return params * (jnp.tanh(0.7 * x) + 0.001 * t[0] + 0.01 * start)

  def commit(self, params, start, x0):
    self._note(start, 0, 0, 1, 0, 2)
    return start + x0.shape[1]


def pipeline(g: Golden, table: FlowSchedule) -> Iterator[Row]:
  """Rollouts of the stand-in, as published: nothing is noised again after the first step."""
  steps = table.warp(g.setting("denoising_steps"))
  yield from _check(g, "pipe/warped_steps", np.array(steps))
  noise, pool = ours(g["in/pipe/noise"]), ours(g["in/pipe/randn_pool"])
  chunks, frames = g.setting("chunks"), pool.shape[1]
  last = min(chunks, 21 // frames)

  def run(exit_step: int, last: int, first: bool, again: int, renoise_first: bool):
    """again: draws of the pool that a chunk noises with; one more is for its context."""
    student = StandIn(table, steps, noise)
    skipped = len(steps) - 1 - again

    def drawn(number):
      start = jax.lax.dynamic_slice_in_dim(noise, number * frames, frames, axis=1)
      mine = pool[number * (again + 1) + jnp.arange(again)][:, None]
      # Where there is no draw nothing is read.
      rest = jnp.full((skipped, *start.shape), jnp.nan)
      order = [rest[:0], mine, rest] if renoise_first else [rest[:1], mine, rest[1:]]
      return ChunkNoise(start, jnp.concatenate(order)[: len(steps) - 1])

    got = roll_out(student, jnp.float32(1), drawn, exit_step, chunks, most=chunks, last=last,
                   first=first, renoise_first=renoise_first)  # fmt: skip
    jax.block_until_ready(got)
    jax.effects_barrier()
    return got, np.array(student.log), np.array([chunks * (again + 1)])

  def rows(name: str, latents, log, draws) -> Iterator[Row]:
    yield from _check_latents(g, f"pipe/{name}/output", latents)
    yield from g.equal(f"out/pipe/{name}/randn_used", draws)
    yield from g.equal(f"out/pipe/{name}/call_log", np.float32(log))

  nominal = [1000 - int(table.index(jnp.float32(t))) for t in steps] + [0]
  for exit_step in range(len(steps)):
    for every in (False, True):
      name = f"exit{exit_step}_all{int(every)}"
      got, log, draws = run(exit_step, last, every, max(exit_step - 1, 0), False)
      yield from rows(name, got.all, log, draws)
      yield from g.equal(f"out/pipe/{name}/from_to", np.array(nominal[exit_step : exit_step + 2]))
      first = got.first if every else got.latents if exit_step == 0 else None
      if first is None:  # there is none, which the file calls -1
        yield from g.equal(f"out/pipe/{name}/output_step0", -np.ones(1))
        continue
      before = jnp.zeros_like(noise[:, : noise.shape[1] - first.shape[1]])
      whole = jnp.concatenate([before, first], axis=1)
      yield from _check_latents(g, f"pipe/{name}/output_step0", whole)
  # To validate is to stream: all steps, each noised again. Absorbing is its first call.
  got, log, draws = run(len(steps) - 1, 1, False, len(steps) - 1, True)
  log = np.array([row for i, row in enumerate(log) if not (i and log[i - 1][2])])
  log[:, 4] = 0
  yield from rows("eval", got.all, log, draws)


def _flows(g: Golden) -> teacher.Flows:
  """The teacher's recorded flows, under the prompt and without, step by step."""
  recorded = ours(g["in/teacher/flows"])
  return lambda x, t, i: (recorded[i, 0][None], recorded[i, 1][None])


def _check(g: Golden, key: str, got: Any) -> Iterator[Row]:
  yield from g.close_to_magnitude(f"out/{key}", got, LOSS)


def _check_latents(g: Golden, key: str, got: Any) -> Iterator[Row]:
  yield from _check(g, key, theirs(got))
