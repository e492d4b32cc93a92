"""Learning rates by hand, and Adam in float64."""

import math

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.models import umt5, wan
from hfjax.models.presets import WanConfig
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


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adam():
  # With these momenta and a first step, the direction is that of the gradient alone.
  config = OptimizerConfig(0.1, b1=0.0, b2=0.9, decay=0.0, clip=0.0, kind="muon", adam_share=0.3)
  network = WanConfig(
    dim=12, ffn_dim=20, heads=2, layers=2, in_dim=2, out_dim=2, text_dim=6, text_len=3,
    freq_dim=4, image_dim=5, linear=True,
  )  # fmt: skip
  text = umt5.Umt5Config(vocab=7, dim=6, dim_attn=8, dim_ffn=10, heads=2, layers=2)
  params = {
    "student": wan.init_params(network, jax.random.key(0)),
    "text": umt5.init_params(text, jax.random.key(1)),
  }
  draw = np.random.default_rng(0)
  grads = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), params)
  optimizer = config.make(10)
  changes, _ = optimizer.update(grads, optimizer.init(params), params)
  flat = lambda tree: {
    "/".join(k.key for k in path): np.float64(x)
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
  }
  changes, grads = flat(changes), flat(grads)
  # Layers apart, and queries, keys and values: rows that take, columns that give.
  matrices = {
    "self_attn/qkv": "l i n h d -> (l n) i (h d)",
    "cross_attn/kv": "l i n h d -> (l n) i (h d)",
    "cross_attn/image_kv": "l i n h d -> (l n) i (h d)",
    "cross_attn/q": "l i h d -> l i (h d)",
    "self_attn/out": "l h d o -> l (h d) o",
    "cross_attn/out": "l h d o -> l (h d) o",
    "self_attn/linear_proj": "l i o -> l i o",
    "ffn_in": "l i o -> l i o",
    "ffn_out": "l i o -> l i o",
  }
  wanted = {f"student/blocks/{name}/kernel": axes for name, axes in matrices.items()} | {
    "text/blocks/attn/qkv/kernel": "l i n h d -> (l n) i (h d)",
    "text/blocks/attn/out/kernel": "l h d o -> l (h d) o",
    "text/blocks/ffn/in/kernel": "l i n o -> (l n) i o",
    "text/blocks/ffn/out/kernel": "l i o -> l i o",
  }
  assert wanted.keys() <= changes.keys()
  assert not [
    name for name in changes.keys() - wanted.keys() if "blocks" in name and "kernel" in name
  ]
  for name, axes in wanted.items():
    change, grad = (einops.rearrange(x[name], axes) for x in (changes, grads))
    for a, g in zip(change, grad, strict=True):
      u, spectrum, v = np.linalg.svd(g, full_matrices=False)
      spectrum /= np.linalg.norm(spectrum)
      for _ in range(5):  # of Newton and Schulz, which bring singular values near 1
        spectrum = 3.4445 * spectrum - 4.775 * spectrum**3 + 2.0315 * spectrum**5
      want = -0.1 * 0.2 * np.sqrt(max(a.shape)) * (u * spectrum) @ v
      np.testing.assert_allclose(a, want, rtol=1e-3, atol=1e-3 * np.abs(want).max(), err_msg=name)
  for name in changes.keys() - wanted.keys():  # Adam's first step
    np.testing.assert_allclose(changes[name], -0.03 * np.sign(grads[name]), rtol=1e-4, err_msg=name)


def test_with_muon_weights_decay_by_the_rates_that_move_them():
  config = OptimizerConfig(0.1, decay=0.5, kind="muon", adam_share=0.3)
  params = {"blocks": {"ffn_in": {"kernel": jnp.full((2, 3, 4), 2.0), "bias": jnp.ones((2, 4))}}}
  optimizer = config.make(10)
  still = jax.tree.map(jnp.zeros_like, params)
  changes, _ = optimizer.update(still, optimizer.init(params), params)
  layer = changes["blocks"]["ffn_in"]
  np.testing.assert_allclose(layer["kernel"], -0.1 * 0.5 * 2.0, rtol=1e-6)
  np.testing.assert_allclose(layer["bias"], -0.1 * 0.3 * 0.5, rtol=1e-6)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"kind": "sgd"}, "There is no optimizer 'sgd'; choose one of adam, muon"),
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
    ({"adam_share": -1.0}, "adam_share is -1.0"),
  ],
)
def test_values_out_of_range_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    OptimizerConfig(**{"rate": 1e-4, **fields})
