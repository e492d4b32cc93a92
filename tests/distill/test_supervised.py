"""Regression on trajectories and flow matching, with a stand-in network and with a real one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.distill.inputs import Texts
from hfjax.distill.supervised import FlowMatching, Regression
from hfjax.models import wan
from hfjax.models.geometry import Geometry
from hfjax.models.presets import WanConfig
from hfjax.streaming.config import StreamConfig
from hfjax.streaming.state import init_state
from tests.distill import stand_ins
from tests.distill.stand_ins import STREAM, STUDENT, per_frame, predict_flow, sigma
from tests.helpers import MODEL, begin, close, flow, random_params

PARAMS = np.array([0.3, -0.2, 0.4, 0.15])
STEPS = len(STREAM.steps)
LEVELS = (1.0, 0.9375, 5 / 6, 0.0)  # of the steps 1000, 750 and 500 at shift 5 (spec 6.2); clean
REAL = WanConfig(
  dim=8, ffn_dim=8, heads=1, layers=1, in_dim=3, out_dim=3, text_dim=4, text_len=2, freq_dim=4,
  patch=(1, 1),
)  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
  """Calls of the network that stands in: positional arguments behind parameters, and options."""
  seen = []

  def flow(config, params, x, t, context, **options):
    assert config == STUDENT
    seen.append((np.float64(x), np.float64(t), np.asarray(context), options))
    return predict_flow(config, jnp.asarray(params, jnp.float32), x, t, context)

  monkeypatch.setattr(wan, "predict_flow", flow)
  return seen


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def texts(batch):
  rows = draw(batch + 1, 2, 4, seed=4)
  return Texts(jnp.asarray(rows[1:]), jnp.asarray(rows[:1]))


def flow_of(call):
  x, t, context, _ = call
  return predict_flow(STUDENT, PARAMS, x, t, np.float64(context))


def regress(o, trajectory, seed=0):
  return o.loss(PARAMS, jnp.asarray(trajectory), texts(len(trajectory)), jax.random.key(seed))


@pytest.mark.parametrize(("batch", "first_clean"), [(300, False), (1, True)])
def test_regression_is_to_the_end_of_the_trajectory(calls, batch, first_clean):
  frames = 3 if first_clean else 4
  trajectory = draw(batch, STEPS + 1, frames, 1, 1, 3)
  loss, figures = regress(Regression(STREAM, first_clean), trajectory)
  x, t, context, options = calls[0]
  np.testing.assert_array_equal(context, texts(batch).context)
  taken = np.abs(trajectory - x[:, None]).max(axis=(3, 4, 5)).argmin(axis=1)
  rows = np.arange(batch)[:, None]
  np.testing.assert_array_equal(x, trajectory[rows, taken, np.arange(frames)])
  level = np.array(LEVELS)[taken]
  np.testing.assert_allclose(t, 1000 * level, rtol=1e-6)
  chunks = [(0, 1), (1, 3)] if first_clean else [(0, 2), (2, 4)]
  assert options == {
    "plan": tuple((span, ((0, span[1]),)) for span in chunks), "dtype": jnp.float32, "remat": False,
    "unroll": 1,
  }  # fmt: skip
  for start, stop in chunks:
    assert np.all(taken[:, start:stop] == taken[:, start:start + 1])  # fmt: skip
  assert np.all(taken[:, 0] == STEPS) == first_clean
  error = (x - per_frame(level) * flow_of(calls[0]) - trajectory[:, -1]) ** 2
  np.testing.assert_allclose(loss, error[taken < STEPS].mean(), rtol=1e-5)
  assert set(figures) == {f"loss_step{i}" for i in range(STEPS)}
  for i in range(STEPS):
    want = error[taken == i].mean() if np.any(taken == i) else np.nan
    np.testing.assert_allclose(figures[f"loss_step{i}"], want, rtol=1e-5)
  if not first_clean:  # chunks of a sample draw their own
    pairs, counts = np.unique(taken[:, ::2], axis=0, return_counts=True)
    assert len(pairs) == STEPS**2
    np.testing.assert_allclose(counts, batch / STEPS**2, rtol=0.5)
  else:
    assert sum(np.isnan(x) for x in figures.values()) == STEPS - 1  # those that were not drawn


def test_with_teacher_forcing_chunks_see_the_clean_ends_of_those_before(calls):
  trajectory = draw(2, STEPS + 1, 4, 1, 1, 3)
  loss, _ = regress(Regression(STREAM, forcing="teacher"), trajectory)
  x, t, _, options = calls[0]
  np.testing.assert_array_equal(options["clean"], trajectory[:, -1])
  assert options["plan"] == (
    ((0, 2), ((0, 2),)), ((2, 4), ((0, 4),)),
    ((4, 6), ((4, 6),)), ((6, 8), ((0, 2), (6, 8))),
  )  # fmt: skip
  assert "clean_t" not in options  # they are told to be clean
  # What is noisy, and what is minimised, is the same.
  other, _ = regress(Regression(STREAM), trajectory)
  np.testing.assert_array_equal(x, calls[1][0])
  np.testing.assert_array_equal(t, calls[1][1])
  np.testing.assert_allclose(loss, other, rtol=1e-6)


DENSE = Geometry(4, 6, chunk=2, window=6, sink=0, block=8, variant="reference_dense")
HYBRID = Geometry(4, 6, chunk=2, window=5, sink=1, block=8, ratio=0.5, rope_cap=9)


def along(geometry, linear, frames=6):
  """A configuration of a stream, parameters, trajectories and texts."""
  model = dataclasses.replace(MODEL, linear=linear)
  stream = StreamConfig(model, geometry, steps=(1000, 750, 500))
  rows = jnp.asarray(draw(3, model.text_len, model.text_dim, seed=4))
  given = jnp.asarray(draw(2, 4, frames, 4, 6, 4)), Texts(rows[1:], rows[:1])
  return stream, random_params(model), *given


def test_a_dense_stream_along_trajectories_sees_what_teacher_forcing_shows():
  stream, params, trajectory, words = along(DENSE, False)
  one, two = (
    jax.jit(Regression(stream, forcing=forcing).loss)(params, trajectory, words, jax.random.key(3))
    for forcing in ("stream", "teacher")
  )
  np.testing.assert_allclose(one[0], two[0], rtol=1e-5)
  for name in two[1]:
    np.testing.assert_allclose(one[1][name], two[1][name], rtol=1e-5)
  whole = jax.jit(Regression(stream).loss)(params, trajectory, words, jax.random.key(3))
  assert abs(whole[0] / two[0] - 1) > 1e-4


def test_a_hybrid_stream_along_trajectories_is_chunk_after_chunk():
  stream, params, trajectory, words = along(HYBRID, True, frames=10)
  o, key = Regression(stream, forcing="stream"), jax.random.key(1)
  both = jax.jit(jax.value_and_grad(lambda p: o.loss(p, trajectory, words, key)[0]))
  got, gradient = both(params)
  drawn = np.asarray(jax.random.randint(key, (2, 5), 0, 3))
  levels, rows = np.array(LEVELS, np.float32), np.arange(2)

  def by_hand(trained):
    keys = wan.text_keys(stream.model, params, words.context)
    state, errors = init_state(stream, keys), []
    for i in range(5):
      part, chunk = slice(2 * i, 2 * i + 2), begin(stream, state)
      x, level = trajectory[rows, drawn[:, i], part], levels[drawn[:, i]]
      x0 = x - per_frame(level) * flow(stream, trained, chunk, x, 1000 * level, words.context)
      errors.append((x0 - trajectory[:, -1, part]) ** 2)
      state = close(stream, params, chunk, trajectory[:, -1, part])
    assert state.absorbed.min() > 0  # the memory took part
    return jnp.stack(errors).mean()

  want, want_gradient = jax.value_and_grad(by_hand)(params)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  size = max(np.abs(x).max() for x in jax.tree.leaves(want_gradient))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * size),
    gradient, want_gradient,
  )  # fmt: skip
  assert np.any(gradient["blocks"]["self_attn"]["linear_proj"]["kernel"])  # which reads the memory


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"forcing": "student"}, "'student'; choose one of none, teacher, stream"),
    ({"forcing": "teacher", "first_clean": True}, "leave first_clean off, or the forcing at none"),
  ],
)
def test_regression_that_cannot_work_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    Regression(STREAM, **options)


@pytest.mark.parametrize(
  ("frames", "states", "first_clean", "message"),
  [
    (4, STEPS, False, "hold 3 states, and 3 denoising steps need 4"),
    (4, STEPS + 2, False, "hold 5 states"),
    (5, STEPS + 1, False, "5 frames do not divide into chunks of 2"),
    (4, STEPS + 1, True, "after a first frame of its own"),
  ],
)
def test_trajectories_that_do_not_fit_are_refused(frames, states, first_clean, message):
  with pytest.raises(ValueError, match=message):
    regress(Regression(STREAM, first_clean), draw(1, states, frames, 1, 1, 3))


def fit(o, latents, seed=0):
  return o.loss(PARAMS, jnp.asarray(latents), texts(len(latents)), jax.random.key(seed))


def bell(t):
  """Weights of the spec, section 6.1, at times of a shift-5 schedule."""
  u = 1 - np.arange(1000) / 1000
  times = 1000 * 5 * u / (1 + 4 * u)
  weights = np.exp(-2 * ((times - 500) / 1000) ** 2)
  weights = (weights - weights.min()) * 1000 / (weights - weights.min()).sum()
  return weights[np.abs(times - t[..., None]).argmin(axis=-1)]


@pytest.mark.parametrize("forcing", ["none", "teacher"])
@pytest.mark.parametrize("weighted", [True, False])
def test_flow_matching_is_the_distance_to_noise_minus_image(calls, forcing, weighted):
  latents = draw(3, 6, 2, 3, 3)
  o = FlowMatching(STUDENT, forcing=forcing, chunk=2, weighted=weighted, drop_text=0)
  loss, figures = fit(o, latents)
  x, t, context, options = calls[0]
  np.testing.assert_array_equal(context, texts(3).context)
  # The noise follows from what the network was given.
  level = per_frame(sigma(t))
  noise = (x - (1 - level) * latents) / level
  assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
  assert np.abs(np.corrcoef(noise.reshape(18, -1)) - np.eye(18)).max() < 0.85
  error = (flow_of(calls[0]) - (noise - latents)) ** 2
  np.testing.assert_allclose(figures["unweighted_loss"], error.mean(), rtol=1e-4)
  want = (per_frame(bell(t)) * error).mean() if weighted else error.mean()
  np.testing.assert_allclose(loss, want, rtol=1e-4)
  if forcing == "none":
    assert t.shape == (3,) and set(options) == {"dtype", "remat", "unroll"}
  else:
    assert t.shape == (3, 6) and set(options) == {"plan", "clean", "dtype", "remat", "unroll"}
    np.testing.assert_array_equal(t[:, ::2], t[:, 1::2])
    assert len(np.unique(t)) == 9  # each chunk of each sample has its own
    np.testing.assert_array_equal(options["clean"], latents)


def test_times_of_flow_matching_are_those_of_the_schedule(calls):
  fit(FlowMatching(STUDENT, shift=8.0), np.zeros((2000, 1, 1, 1, 3), np.float32))
  u = 1 - np.arange(1000) / 1000
  grid = 1000 * 8 * u / (1 + 7 * u)
  apart = np.abs(calls[0][1][:, None] - grid)
  assert apart.min(axis=1).max() < 1e-3
  index = apart.argmin(axis=1)
  np.testing.assert_allclose(np.histogram(index, 4, (0, 1000))[0], 500, rtol=0.15)


@pytest.mark.parametrize("most", [0.0, 200.0])
def test_clean_chunks_are_noised_up_to_a_timestep(calls, most):
  latents = draw(40, 4, 2, 3, 3)
  o = FlowMatching(STUDENT, forcing="teacher", chunk=2, context_noise=most)
  fit(o, latents)
  x, t, _, options = calls[0]
  if not most:
    np.testing.assert_array_equal(options["clean"], latents)
    assert "clean_t" not in options
    return
  clean_t = np.float64(options["clean_t"])
  assert clean_t.shape == (40, 4) and clean_t.min() >= 0 and 180 < clean_t.max() < 200
  assert clean_t.min() < 20
  np.testing.assert_array_equal(clean_t[:, ::2], clean_t[:, 1::2])
  level = per_frame(sigma(t))
  noise = (x - (1 - level) * latents) / level
  share = per_frame(clean_t / 1000)
  want = (1 - share) * latents + share * noise
  np.testing.assert_allclose(options["clean"], want, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_some_samples_are_trained_under_the_negative_prompt(calls, share):
  fit(FlowMatching(STUDENT, drop_text=share), np.zeros((1000, 1, 1, 1, 3), np.float32))
  given, context = texts(1000), calls[0][2]
  dropped = np.all(context == given.negative, axis=(1, 2))
  np.testing.assert_array_equal(context[~dropped], given.context[~dropped])
  np.testing.assert_allclose(dropped.mean(), share, atol=0.05 if 0 < share < 1 else 0)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"forcing": "student"}, "'student'; choose one of none, teacher"),
    ({"drop_text": 1.1}, "dropped texts is 1.1; give 0 to 1"),
    ({"drop_text": -0.1}, "dropped texts is -0.1"),
    ({"context_noise": 1001}, "reaches to timestep 1001; give 0"),
    ({"context_noise": -1}, "timestep -1"),
    ({"model": dataclasses.replace(STUDENT, in_dim=4)}, "takes images"),
    ({"model": dataclasses.replace(STUDENT, image_dim=8)}, "takes images"),
  ],
)
def test_flow_matching_that_cannot_work_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    FlowMatching(**{"model": STUDENT, **fields})


def test_frames_that_do_not_fill_chunks_are_refused(calls):
  with pytest.raises(ValueError, match="4 frames do not divide into chunks of 3"):
    fit(FlowMatching(STUDENT, forcing="teacher"), draw(1, 4, 1, 1, 3))
  assert not calls


def test_a_noisy_chunk_sees_the_clean_ones_before_it_and_no_others(monkeypatch):
  o = FlowMatching(REAL, forcing="teacher", chunk=2, drop_text=0, weighted=False, remat=False)
  params, latents = stand_ins.drawn_params(REAL), draw(1, 6, 1, 2, 3)
  real, seen = wan.predict_flow, []

  def flow(config, params, x, t, context, *, plan, clean, **options):
    run = jax.jit(lambda x, clean: real(config, params, x, t, context, plan=plan, clean=clean,
                                        **options))  # fmt: skip
    seen.append((run, x, clean))
    return run(x, clean)

  monkeypatch.setattr(wan, "predict_flow", flow)
  loss, _ = o.loss(params, jnp.asarray(latents), texts(1), jax.random.key(0))
  run, x, clean = seen[0]
  flow = run(x, clean)
  assert np.isfinite(loss)

  def changed(x, clean):
    apart = np.abs(np.asarray(run(x, clean) - flow)).reshape(3, -1).max(axis=1)
    assert np.all((apart == 0) | (apart > 1e-4))
    return list(apart > 0)

  for chunk in range(3):
    frames = slice(2 * chunk, 2 * chunk + 2)
    # Of the clean clip, only later chunks see a chunk; of the noisy one, only it itself.
    assert changed(x, clean.at[:, frames].add(1)) == [i > chunk for i in range(3)]
    assert changed(x.at[:, frames].add(1), clean) == [i == chunk for i in range(3)]


@pytest.mark.slow
def test_regression_of_a_real_network_is_differentiable():
  stream = dataclasses.replace(STREAM, model=REAL, remat=True)
  params, trajectory = stand_ins.drawn_params(REAL), draw(1, STEPS + 1, 4, 1, 2, 3)
  loss = jax.jit(lambda p, x: Regression(stream).loss(p, x, texts(1), jax.random.key(1))[0])
  value, gradient = jax.value_and_grad(loss)(params, trajectory)
  # A step along the gradient lowers the loss by as much as its square says.
  square = sum(float((g**2).sum()) for g in jax.tree.leaves(gradient))
  rate = 1e-3 * float(value) / square
  moved = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
  fall = float(value - loss(moved, trajectory))
  np.testing.assert_allclose(fall, rate * square, rtol=0.05)
