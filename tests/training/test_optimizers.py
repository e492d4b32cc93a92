"""Learning rates by hand, and Adam in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.training.optimizers import SCHEDULES, OptimizerConfig


@pytest.mark.parametrize(
  ("name", "warmup", "rates"),
  [
    ("constant", 0, {0: 2, 1: 2, 50: 2, 1000: 2}),
    ("constant", 10, {0: 0, 1: 0.2, 5: 1, 10: 2, 11: 2, 1000: 2}),
    ("linear", 0, {0: 2, 25: 1.5, 50: 1, 100: 0, 150: 0}),
    ("linear", 20, {0: 0, 5: 0.5, 20: 2, 60: 1, 100: 0, 150: 0}),
    ("cosine", 0, {0: 2, 25: 1 + math.cos(math.pi / 4), 50: 1, 100: 0, 150: 0}),
    ("cosine", 20, {0: 0, 10: 1, 20: 2, 40: 1 + math.cos(math.pi / 4), 60: 1, 100: 0, 150: 0}),
  ],
)
def test_rates_of_the_schedules(name, warmup, rates):
  schedule = OptimizerConfig(2.0, schedule=name, warmup=warmup).learning_rate(100)
  for step, rate in rates.items():
    np.testing.assert_allclose(schedule(jnp.int32(step)), rate, atol=1e-6, err_msg=str(step))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("warmup", "updates"), [(0, 0), (0, 1), (5, 5), (5, 2), (1, 0)])
def test_short_runs_have_rates_too(name, warmup, updates):
  schedule = OptimizerConfig(3.0, schedule=name, warmup=warmup).learning_rate(updates)
  rates = [float(schedule(step)) for step in range(8)]
  assert all(0 <= rate <= 3 for rate in rates)
  np.testing.assert_allclose(rates[:warmup], 3 * np.arange(warmup) / max(warmup, 1), atol=1e-6)
  np.testing.assert_allclose(rates[warmup], 3)


def by_hand(config, params, gradients, rate):
  """Adam with decoupled decay and clipping by the norm of all; float64."""
  params = {k: np.float64(x) for k, x in params.items()}
  first = {k: np.zeros_like(x) for k, x in params.items()}
  second = {k: np.zeros_like(x) for k, x in params.items()}
  for step, grads in enumerate(gradients):
    norm = math.sqrt(sum((np.float64(g) ** 2).sum() for g in grads.values()))
    scale = min(1.0, config.clip / norm) if config.clip else 1.0
    for k in params:
      g = scale * np.float64(grads[k])
      first[k] = config.b1 * first[k] + (1 - config.b1) * g
      second[k] = config.b2 * second[k] + (1 - config.b2) * g**2
      m = first[k] / (1 - config.b1 ** (step + 1))
      v = second[k] / (1 - config.b2 ** (step + 1))
      change = m / (np.sqrt(v) + config.eps) + config.decay * params[k]
      params[k] = params[k] - rate(step) * change
  return params


@pytest.mark.parametrize("b1", [0.0, 0.9])
@pytest.mark.parametrize("clip", [0.0, 1.0, 1e3])
def test_updates_are_adams(b1, clip):
  config = OptimizerConfig(0.1, "linear", 2, b1=b1, b2=0.95, eps=1e-3, decay=0.05, clip=clip)
  draw = np.random.default_rng(0)
  shapes = {"matrix": (3, 4), "bias": (4,)}  # decay holds for both
  some = lambda scale: {
    k: (scale * draw.normal(size=shape)).astype(np.float32) for k, shape in shapes.items()
  }
  params, gradients = some(1), [some(scale) for scale in (5, 0.01, 30, 1)]
  rate = lambda step: 0.05 * step if step < 2 else 0.1 * (10 - step) / 8
  optimizer = config.make(10)
  state, now = optimizer.init(params), {k: jnp.asarray(x) for k, x in params.items()}
  for grads in gradients:
    changes, state = optimizer.update(grads, state, now)
    now = {k: now[k] + changes[k] for k in now}
  for k, want in by_hand(config, params, gradients, rate).items():
    np.testing.assert_allclose(now[k], want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"schedule": "step"}, "no schedule 'step' of learning rates; choose one of constant, cosine"),
    ({"b1": 1.0}, "b1 is 1.0; it must lie in"),
    ({"b2": -0.1}, "b2 is -0.1"),
    ({"b2": float("nan")}, "b2 is nan"),
    ({"rate": -1.0}, "rate is -1.0; give at least 0"),
    ({"rate": float("inf")}, "rate is inf"),
    ({"rate": float("nan")}, "rate is nan"),
    ({"warmup": -1}, "warmup is -1"),
    ({"eps": -1e-8}, "eps is -1e-08"),
    ({"decay": -0.01}, "decay is -0.01"),
    ({"clip": -1.0}, "clip is -1.0"),
  ],
)
def test_values_out_of_range_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    OptimizerConfig(**{"rate": 1e-4, **fields})
