"""One update against AdamW in float64, and what must not change when a number is not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hfjax import parallel
from hfjax.training.optimizers import OptimizerConfig
from hfjax.training.update import Average, init_part, make_update
from tests.helpers import compilations

START = {
  "matrix": np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32),
  "bias": np.linspace(-1, 1, 4).astype(np.float32),
}
CONFIG = OptimizerConfig(0.05, b1=0.9, b2=0.9, eps=1e-3, decay=0.1, clip=0.5)
AVERAGE = Average(0.75, start=1)
FIXED = {"scale": jnp.float32(2)}
KEY = jax.random.key(0)


@jax.custom_vjp
def through(x, factor):
  """`x`; gradients are multiplied by `factor`."""
  del factor
  return x


through.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, None))


def loss(params, fixed, batch, key):
  matrix = through(params["matrix"], batch["factor"].mean())
  error = fixed["scale"] * (batch["x"] @ matrix + params["bias"]) - batch["y"]
  value = (error**2).mean() + jax.lax.stop_gradient(batch["offset"].mean())
  figures = {"size": jnp.abs(error).mean(), "some": batch["some"].mean(), "draw": noise(key)}
  return value, figures


def noise(key):
  return jax.random.uniform(key)


def batch(seed=0, count=1, rows=4, **fields):
  """Microbatches `[k b ...]`."""
  draw = np.random.default_rng(seed)
  plain = {"factor": 1.0, "offset": 0.0, "some": 1.0, **fields}
  return {
    "x": draw.normal(size=(count, rows, 6)).astype(np.float32),
    "y": draw.normal(size=(count, rows, 4)).astype(np.float32),
    **{k: np.broadcast_to(np.float32(x), (count, rows)).copy() for k, x in plain.items()},
  }


@functools.cache
def built(config=CONFIG, average=AVERAGE, devices=1):
  """A mesh, what makes a part on it, and its update; everything is sharded that can be."""
  mesh = parallel.make_mesh(devices, jax.devices()[:devices])
  optimizer = config.make(100)
  make = lambda params: init_part(params, optimizer, average)
  like = jax.eval_shape(make, START)
  update = make_update(loss, optimizer, average, mesh, like, smallest=1)
  return lambda: parallel.create(make, mesh, START, smallest=1), update


def by_hand(config, average, batches):
  """Parameters, their average, losses and norms after each batch; float64."""
  params = {k: np.float64(x) for k, x in START.items()}
  moments = [{k: np.zeros_like(x) for k, x in params.items()} for _ in range(2)]
  ema, out = dict(params), []
  for step, b in enumerate(batches, 1):
    losses, grads = [], {k: np.zeros_like(x) for k, x in params.items()}
    for x, y in zip(np.float64(b["x"]), np.float64(b["y"]), strict=True):
      error = 2 * (x @ params["matrix"] + params["bias"]) - y
      losses.append((error**2).mean())
      slope = 2 * error * 2 / error.size / len(b["x"])
      grads["matrix"] += x.T @ slope
      grads["bias"] += slope.sum(axis=0)
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    for k, g in grads.items():
      g = g * min(1, config.clip / norm)
      moments[0][k] = config.b1 * moments[0][k] + (1 - config.b1) * g
      moments[1][k] = config.b2 * moments[1][k] + (1 - config.b2) * g**2
      m, v = moments[0][k] / (1 - config.b1**step), moments[1][k] / (1 - config.b2**step)
      change = m / (np.sqrt(v) + config.eps) + config.decay * params[k]
      params[k] = params[k] - config.rate * change
      decay = average.decay if step > average.start else 0.0
      ema[k] = decay * ema[k] + (1 - decay) * params[k]
    size = lambda tree: np.sqrt(sum((x**2).sum() for x in tree.values()))
    out.append((dict(params), dict(ema), {
      "loss": np.mean(losses), "gradient_norm": norm, "parameter_norm": size(params),
      "ema_distance": size({k: params[k] - ema[k] for k in params}), "finite": 1,
    }))  # fmt: skip
  return out


def near(got, want):
  assert set(got) == set(want)
  for k in want:
    np.testing.assert_allclose(got[k], want[k], rtol=3e-5, atol=3e-6, err_msg=k)


@pytest.mark.parametrize(
  ("config", "devices", "count"),
  [(CONFIG, 1, 1), (CONFIG, 2, 3), (OptimizerConfig(0.05, b1=0.0, eps=1e-3, clip=50.0), 1, 1)],
  ids=["clipped", "sharded-microbatches", "no-momentum"],
)
def test_updates_are_those_of_adam(config, devices, count):
  make, update = built(config, devices=devices)
  part, batches = make(), [batch(seed, count) for seed in range(4)]
  wanted = by_hand(config, AVERAGE, batches)
  clipped = [figures["gradient_norm"] > config.clip for _, _, figures in wanted]
  assert all(clipped) if config.clip < 1 else not any(clipped)
  for step, (b, (params, ema, want)) in enumerate(zip(batches, wanted, strict=True), 1):
    part, figures = update(part, FIXED, b, jax.random.fold_in(KEY, step))
    near(part.params, params)
    near(part.ema, ema)
    near({k: figures[k] for k in want}, want)
    assert (part.updates, part.skipped, part.in_row) == (step, 0, 0)
  assert part.params["matrix"].sharding.is_fully_replicated == (devices == 1)


def test_no_average_is_kept_unless_it_was_asked_for():
  make, update = built(average=None)
  assert make().ema is None
  part, figures = update(make(), FIXED, batch(), KEY)
  assert part.ema is None and "ema_distance" not in figures
  near(part.params, by_hand(CONFIG, AVERAGE, [batch()])[0][0])


@pytest.mark.parametrize(
  "bad",
  [{"offset": np.nan}, {"offset": np.inf}, {"factor": np.nan}, {"factor": -np.inf}],
  ids=["loss-nan", "loss-inf", "gradient-nan", "gradient-inf"],
)
def test_what_is_not_finite_changes_nothing(bad):
  make, update = built()
  part, _ = update(make(), FIXED, batch(1), KEY)
  before = jax.tree.map(np.array, part)
  for times in (1, 2):
    part, figures = update(part, FIXED, batch(2, **bad), KEY)
    assert not figures["finite"]
    assert (part.skipped, part.in_row) == (times, times)
    rest = part._replace(skipped=before.skipped, in_row=before.in_row)
    jax.tree.map(np.testing.assert_array_equal, rest, before)
    assert np.isfinite(figures["loss"]) == ("factor" in bad)
    assert np.isfinite(figures["parameter_norm"])
  # A good one ends the row and is as if the others had not been.
  part, figures = update(part, FIXED, batch(3), KEY)
  assert figures["finite"] and (part.skipped, part.in_row, part.updates) == (2, 0, 2)
  near(part.params, by_hand(CONFIG, AVERAGE, [batch(1), batch(3)])[1][0])


def test_what_finite_gradients_make_must_be_finite_too():
  mesh = parallel.make_mesh(1, jax.devices()[:1])
  spoils = optax.chain(optax.scale(jnp.inf))
  part = init_part({"matrix": jnp.ones((6, 4)), "bias": jnp.ones(4)}, spoils, None)
  update = make_update(loss, spoils, None, mesh, jax.eval_shape(lambda: part))
  part, figures = update(part, FIXED, batch(1), KEY)
  assert np.isfinite(figures["gradient_norm"]) and not figures["finite"]
  assert part.skipped == 1 and np.all(part.params["matrix"] == 1)


@pytest.mark.parametrize("bad", ["offset", "factor"])
def test_one_bad_microbatch_spoils_the_update(bad):
  make, update = built(devices=2)
  b = batch(count=3)
  b[bad][1] = np.nan
  start = make()
  before = jax.tree.map(np.array, start)
  part, figures = update(start, FIXED, b, KEY)
  assert not figures["finite"] and (part.updates, part.skipped) == (0, 1)
  jax.tree.map(np.testing.assert_array_equal, part.params, before.params)


def test_figures_are_of_the_microbatches_that_have_them():
  make, update = built(devices=2)
  b = batch(count=3)
  b["some"][:] = [[2.0], [np.nan], [4.0]]
  _, figures = update(make(), FIXED, b, KEY)
  assert figures["some"] == 3 and figures["finite"]
  draws = {float(update(make(), FIXED, b, jax.random.key(i))[1]["draw"]) for i in range(60)}
  assert len(draws) == 60
  # Means of three draws of each microbatch's own have a third of the variance, 1 / 12.
  np.testing.assert_allclose(np.std(list(draws)), (1 / 36) ** 0.5, rtol=0.25)


def test_memory_is_donated_and_nothing_is_compiled_again():
  make, update = built()
  part, _ = update(make(), FIXED, batch(), KEY)
  update(make(), FIXED, batch(), KEY)
  batches, keys = [batch(i) for i in range(3)], list(jax.random.split(KEY, 3))
  with compilations() as compiled:
    for b, key in zip(batches, keys, strict=True):
      old, (part, _) = part, update(part, FIXED, b, key)
      assert all(x.is_deleted() for x in jax.tree.leaves(old))
  assert not compiled
  assert not FIXED["scale"].is_deleted()


def test_a_new_part_has_buffers_of_its_own():
  params = jax.tree.map(jnp.asarray, START)
  part = init_part(params, CONFIG.make(10), AVERAGE)
  places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(part)]
  assert len(set(places)) == len(places)
  near(part.ema, START)
  assert (part.updates, part.skipped, part.in_row) == (0, 0, 0)


@pytest.mark.parametrize(("decay", "start"), [(1.0, 0), (-0.1, 0), (0.5, -1), (float("nan"), 0)])
def test_averages_that_cannot_be_are_refused(decay, start):
  with pytest.raises(ValueError, match=f"decay of {decay} from update {start} on; give a decay in"):
    Average(decay, start)
