"""Trajectories of teachers, made here and taken over, and prompts with contexts."""

import dataclasses
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.convert import CheckpointError
from hfjax.data import contexts, lmdb_pairs, trajectories
from hfjax.data.loading import open_source
from hfjax.data.rejects import DataError
from hfjax.data.sources import Prompts
from hfjax.models import causal, wan
from hfjax.models.presets import PRESETS
from hfjax.pipeline import RandomText
from tests.data.helpers import states, write_lmdb
from tests.helpers import MODEL, random_params

SHAPE = (2, 4, 4, 4)
RECIPE = trajectories.Recipe(SHAPE, teacher_steps=8, guidance=2.0, seed=5)
PROMPTS = ["a red square", "two", "three words here", "a b c d", "rain"]
ENCODE = RandomText(MODEL)


class Half:
  """An encoder that computes in bfloat16."""

  dtype = jnp.dtype(jnp.bfloat16)

  def __call__(self, prompts):
    return ENCODE(prompts)  # as compilers do, with more digits than bfloat16 has


def trace(noise, context):
  """Stands for a teacher: states that depend on the noise and the text."""
  factors = np.linspace(0, 1, 5).reshape(-1, 1, 1, 1, 1)
  mean = np.asarray(context).sum(axis=(1, 2)).reshape(-1, 1, 1, 1, 1, 1)
  return np.asarray(noise)[:, None] * (1 - factors) + factors * mean


def wanted(i, prompts=PROMPTS, encode=ENCODE):
  noise = np.random.default_rng([5, i]).standard_normal(SHAPE, np.float32).astype(np.float16)
  return trace(noise[None].astype(np.float32), encode([prompts[i]]))[0].astype(np.float16)


@pytest.mark.parametrize(("batch", "kept"), [(1, False), (2, True), (3, True)])
def test_each_prompt_gets_a_trajectory_from_noise_of_its_own(tmp_path, batch, kept):
  out = trajectories.write(
    tmp_path, PROMPTS, ENCODE, trace, RECIPE, batch=batch, with_context=kept, per_shard=2, count=4
  )
  assert out.examples == 4
  expect = {"trajectory": (5, *SHAPE)} | ({"context": (None, MODEL.text_dim)} if kept else {})
  source = open_source("trajectories", tmp_path, expect=expect)
  assert source.about["times"][:3] == pytest.approx([1000, 937.5, 2500 / 3])
  for i in range(4):
    example = source[i]
    assert example["prompt"] == PROMPTS[i] and ("context" in example) == kept
    np.testing.assert_allclose(example["trajectory"], wanted(i), rtol=2e-3, atol=1e-6)
    np.testing.assert_array_equal(example["trajectory"][0], RECIPE.noise(i))  # without loss
    if kept:
      assert len(example["context"]) == len(PROMPTS[i].split())


def test_a_run_that_was_cut_goes_on_to_the_same_bytes_whatever_the_prompts_came_from(tmp_path):
  path, shared = tmp_path / "p.txt", {"per_shard": 2, "batch": 2, "model": "m"}
  path.write_text("\n".join(PROMPTS))
  trajectories.write(tmp_path / "whole", PROMPTS, ENCODE, trace, RECIPE, **shared)
  calls = []

  def failing(noise, context):
    calls.append(noise)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return trace(noise, context)

  source = open_source("prompts", path)
  with pytest.raises(KeyboardInterrupt):
    trajectories.write(tmp_path / "cut", source, ENCODE, failing, RECIPE, **shared)
  trajectories.write(tmp_path / "cut", source, ENCODE, failing, RECIPE, **shared)
  assert len(calls) == 4 and {x.shape[0] for x in calls} == {2}  # the last one is filled up
  files = lambda name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
  assert files("cut") == files("whole")
  with pytest.raises(DataError, match="model is 'm' and not 'other'"):
    trajectories.write(
      tmp_path / "cut", PROMPTS, ENCODE, trace, RECIPE, **shared | {"model": "other"}
    )


def test_contexts_that_are_there_need_no_encoder(tmp_path):
  encode = Half()
  half = lambda prompts: ENCODE(prompts).astype(jnp.bfloat16).astype(jnp.float32)
  written = contexts.write(tmp_path / "p", Prompts(PROMPTS), encode, batch=2)
  assert written.examples == 5
  source = open_source("prompts", tmp_path / "p", expect={"context": (None, MODEL.text_dim)})
  assert source.dtypes == {"context": "bfloat16"}
  for i, prompt in enumerate(PROMPTS):
    rows, whole = source[i]["context"], np.asarray(half([prompt]))[0]
    np.testing.assert_array_equal(rows, whole[: len(rows)])  # without loss
    assert len(rows) == len(prompt.split()) and not np.any(whole[len(rows) :])
  trajectories.write(tmp_path / "t", source, None, trace, RECIPE, batch=3, with_context=True)
  found = open_source("trajectories", tmp_path / "t")
  assert found.dtypes["context"] == "bfloat16"
  for i in (0, 4):
    np.testing.assert_array_equal(found[i]["context"], source[i]["context"])
    # Sums over rows of zeros beside others are of another order.
    want = wanted(i, encode=half)
    np.testing.assert_allclose(found[i]["trajectory"], want, rtol=2e-3, atol=1e-5)


def test_damaged_prompts_are_left_out_and_the_others_keep_their_noise(tmp_path):
  class Damaged(Prompts):
    def __getitem__(self, i):
      if i in (1, 2, 3):
        raise DataError(f"Example {i} is damaged.")
      return super().__getitem__(i)

  given = {"batch": 2, "on_bad": "skip"}
  written = trajectories.write(tmp_path / "t", Damaged(PROMPTS), ENCODE, trace, RECIPE,
                               per_shard=5, **given)  # fmt: skip
  assert written.examples == 2 and written.rejects.count == 3
  source = open_source("trajectories", tmp_path / "t")
  np.testing.assert_array_equal(source[1]["trajectory"][0], RECIPE.noise(4))
  assert [source[i]["prompt"] for i in range(2)] == [PROMPTS[0], PROMPTS[4]]


def test_what_makes_no_trajectories_is_refused(tmp_path):
  make = lambda prompts, encode=ENCODE, **kw: trajectories.write(
    tmp_path, prompts, encode, trace, RECIPE, **kw
  )
  for given, sentence in (
    (lambda: make(PROMPTS, None), "have no contexts"),
    (lambda: make(PROMPTS, batch=0), "Batches of 0"),
    (lambda: make([]), "no trajectories to be written"),
    (lambda: make("a red square"), "One string"),
    (lambda: trajectories.Recipe(SHAPE, teacher_steps=10), "a multiple of 4 steps"),
    (lambda: trajectories.Recipe((2, 4, 4)), "four sizes"),
    (lambda: trajectories.Recipe(SHAPE, guidance=-1), "guidance"),
    (lambda: trajectories.Recipe(SHAPE, guidance_interval=(9, 1)), "give the lower first"),
    (lambda: trajectories.Recipe(SHAPE, chunk=3), "2 frames do not divide into chunks of 3"),
    (lambda: trajectories.Recipe(SHAPE, chunk=-3), "give 1 or more, or 0 for a bidirectional"),
    (lambda: trajectories.tracer(MODEL, None, RECIPE, None), "needs the context of a negative"),
  ):
    with pytest.raises(DataError, match=sentence):
      given()
  bad = lambda noise, context: trace(noise, context) * np.nan
  with pytest.raises(DataError, match="not finite in float16; check the weights"):
    trajectories.write(tmp_path, PROMPTS, ENCODE, bad, RECIPE)


@pytest.mark.parametrize(
  ("guidance", "interval"), [(1.0, (0, 1000)), (3.0, (0, 1000)), (3.0, (900, 1000))]
)
def test_the_teacher_is_led_by_its_guidance(guidance, interval, monkeypatch):
  def network(config, params, x, t, context, dtype):
    assert dtype == jnp.bfloat16 and context.shape[1:] == (MODEL.text_len, MODEL.text_dim)
    along = lambda v: v.reshape(-1, 1, 1, 1, 1)
    return params * x + along(t) / 1000 + along(context.sum(axis=(1, 2)))

  monkeypatch.setattr(trajectories.wan, "predict_flow", network)
  recipe = trajectories.Recipe(SHAPE, (1000, 500), 2, 5.0, guidance, guidance_interval=interval)
  negative = None if guidance == 1 else ENCODE(["not this"])
  make = trajectories.tracer(MODEL, jnp.float32(0.3), recipe, negative)
  noise = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
  texts = ENCODE(["a red square", "two"])
  got = make(noise, texts[:, :4])  # shorter ones are filled up with zeros
  sums = [np.float64(text).sum(axis=(1, 2)).reshape(-1, 1, 1, 1, 1) for text in (texts, negative)
          if text is not None]  # fmt: skip
  led = [
    sums[0] if guidance == 1 or not low <= t <= high else sums[1] + guidance * (sums[0] - sums[1])
    for low, high in [interval] for t in (1000, 2500 / 3)
  ]  # fmt: skip
  x, sigmas = np.float64(noise), [1, 5 * 0.5 / 3, 0]
  np.testing.assert_allclose(got[:, 0], x)
  for i in range(2):
    x = x + (sigmas[i + 1] - sigmas[i]) * (0.3 * x + sigmas[i] + led[i])
    np.testing.assert_allclose(got[:, i + 1], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_causal_teacher_leads_each_chunk_after_the_ends_of_those_before(guidance):
  recipe = trajectories.Recipe(
    (6, 4, 6, 4), (1000, 500), 4, 3.0, guidance, chunk=2, guidance_interval=(600, 950)
  )
  params = random_params()
  negative = None if guidance == 1 else ENCODE(["not this"])
  texts = ENCODE(["a red square", "two"])
  noise = np.random.default_rng(0).standard_normal((2, *recipe.shape)).astype(np.float32)
  got = trajectories.tracer(MODEL, params, recipe, negative, "float32")(noise, texts)
  # By whole clips with clean pasts, without a stream's keys and values.
  plan, sigmas = causal.teacher_forcing(6, 2), [1, 9 / 10, 3 / 4, 1 / 2, 0]
  rows = [texts] if guidance == 1 else [texts, np.repeat(negative, 2, axis=0)]
  flow = lambda x, sigma, clean: [
    np.asarray(wan.predict_flow(MODEL, params, x, jnp.full((2,), 1000 * sigma), text, plan=plan,
                                clean=clean)) for text in rows
  ]  # fmt: skip
  clean, want = np.zeros_like(noise), [np.array(noise), None]
  for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
    x = np.array(noise)
    for i in range(4):
      if i == 2:
        want[1] = np.array(x) if want[1] is None else want[1]
        want[1][:, part] = x[:, part]
      conditional, *other = flow(x, sigmas[i], clean)
      guided = other and 600 <= 1000 * sigmas[i] <= 950
      led = other[0] + guidance * (conditional - other[0]) if guided else conditional
      x = x + (sigmas[i + 1] - sigmas[i]) * led
    clean[:, part] = x[:, part]
  for i, states_ in enumerate([*want, clean]):
    np.testing.assert_allclose(got[:, i], states_, rtol=1e-4, atol=1e-4)


def test_folders_of_causal_teachers_are_told_from_others(tmp_path):
  recipe = trajectories.Recipe(SHAPE, teacher_steps=8, guidance=2.0, seed=5, chunk=2)
  trajectories.write(tmp_path / "causal", PROMPTS, ENCODE, trace, recipe)
  assert open_source("trajectories", tmp_path / "causal").about["chunk"] == 2
  trajectories.write(tmp_path / "whole", PROMPTS, ENCODE, trace, RECIPE)
  assert "chunk" not in open_source("trajectories", tmp_path / "whole").about
  assert "guidance_interval" not in open_source("trajectories", tmp_path / "causal").about
  some = dataclasses.replace(recipe, guidance_interval=(500, 1000))
  with pytest.raises(DataError, match="guidance_interval"):
    trajectories.write(tmp_path / "causal", PROMPTS, ENCODE, trace, some)
  with pytest.raises(DataError, match="chunk"):
    trajectories.write(tmp_path / "causal", PROMPTS, ENCODE, trace, RECIPE, per_shard=2)


def test_fingerprints_tell_weights_apart():
  params = {"a": {"b": jnp.arange(24.0).reshape(2, 3, 4)}, "c": jnp.ones(())}
  same = {"c": jnp.ones(()), "a": {"b": jnp.arange(24.0).reshape(2, 3, 4)}}
  names = {contexts.fingerprint(params), contexts.fingerprint(same)}
  assert len(names) == 1
  for other in (
    params | {"c": jnp.zeros(())},
    params | {"a": {"b": params["a"]["b"].at[1, 2, 3].add(1)}},
    params | {"a": {"b": params["a"]["b"].reshape(3, 2, 4)}},
  ):
    assert contexts.fingerprint(other) not in names


def test_only_the_text_encoder_is_loaded(tmp_path, monkeypatch):
  encode = contexts.text_encoder("random:tiny")
  assert encode.model == PRESETS["tiny"]
  with pytest.raises(CheckpointError, match="Unknown model 'none'"):
    contexts.text_encoder("random:none")
  folder = tmp_path / "umt5"
  folder.mkdir()
  (folder / "config.json").write_text("{}")
  monkeypatch.setattr(contexts.stored, "hfjax_models", lambda path: {"umt5": folder})
  made = types.SimpleNamespace(config=None)
  monkeypatch.setattr(contexts.pipeline, "TextEncoder", lambda *args: (made, args))
  _, (path, config, dtype) = contexts.text_encoder(tmp_path)
  assert path == tmp_path and config.text_dim == 4096 and dtype == jnp.bfloat16


def test_lmdb_is_taken_over_in_order_with_channels_last(tmp_path):
  first, second = states(2, seed=1), states(3, seed=2)
  write_lmdb(tmp_path / "in" / "b", second, ["c", "d", "ë"])
  write_lmdb(tmp_path / "in" / "a", first, ["a", "b"])
  given = {"steps": (1000, 500), "per_shard": 2}
  for i in range(2):
    written = lmdb_pairs.write(tmp_path / "out", tmp_path / "in", process=(i, 2), **given)
  assert written.examples == 5
  source = open_source("trajectories", tmp_path / "out", expect={"trajectory": (3, 2, 2, 3, 4)})
  assert [source[i]["prompt"] for i in range(5)] == ["a", "b", "c", "d", "ë"]
  for i, want in enumerate([*first, *second]):
    got = source[i]["trajectory"]
    for s, f, c, y, x in ((0, 0, 0, 0, 0), (2, 1, 3, 1, 2), (1, 0, 2, 1, 1)):
      assert got[s, f, y, x, c] == want[s, f, c, y, x]
  assert source.about["times"] == pytest.approx([1000, 2500 / 3, 0])
  lmdb_pairs.write(tmp_path / "one", tmp_path / "in" / "a", steps=(1000, 500))
  assert len(open_source("trajectories", tmp_path / "one")) == 2


def test_damaged_rows_of_lmdb_are_named(tmp_path):
  bad = {
    "latents_0_data": b"ab", "prompts_1_data": b" ", "prompts_2_data": b"\xff",
    "latents_3_data": np.full((3, 2, 4, 2, 3), np.nan, np.float16).tobytes(),
  }  # fmt: skip
  write_lmdb(tmp_path / "in", states(5), list("abcde"), bad)
  given = {"path": tmp_path / "in", "steps": (1000, 500)}
  written = lmdb_pairs.write(tmp_path / "out", **given, on_bad="skip")
  assert written.examples == 1 and written.rejects.count == 4
  for sentence, words in zip(
    sorted(written.rejects.first),
    ("has 2 bytes of latents, and 288", "has no prompt", "no UTF-8", "not finite"), strict=True,
  ):  # fmt: skip
    assert words in sentence and str(tmp_path / "in") in sentence
  with pytest.raises(DataError, match="Row 0 of"):
    lmdb_pairs.write(tmp_path / "again", **given)


def test_lmdb_that_is_none_or_does_not_fit_is_refused(tmp_path, monkeypatch):
  refuse = lambda path, sentence, steps=(1000, 500): pytest.raises(DataError, match=sentence)
  write = lambda path, steps=(1000, 500): lmdb_pairs.write(tmp_path / "out", path, steps=steps)
  write_lmdb(tmp_path / "a" / "1", states(2), ["a", "b"])
  with refuse(0, "holds 3 states a trajectory, and 4 denoising steps"):
    write(tmp_path / "a", (1000, 750, 500, 250))
  with refuse(0, "holds no LMDB"):
    write(tmp_path)
  write_lmdb(tmp_path / "a" / "2", states(2, (3, 2, 4, 3, 3)), ["a", "b"])
  with refuse(0, "latents of different shapes"):
    write(tmp_path / "a")
  write_lmdb(tmp_path / "b", states(2), ["a", "b"], {"prompts_shape": b"3"})
  with refuse(0, "has 2 latents and 3 prompts"):
    write(tmp_path / "b")
  write_lmdb(tmp_path / "c", states(2), ["a", "b"], {"latents_shape": b"x"})
  with refuse(0, "does not say the shape of its latents"):
    write(tmp_path / "c")
  write_lmdb(tmp_path / "d", states(2, (2, 4, 2, 3)), ["a", "b"])  # clips alone
  with refuse(0, "holds 1 states"):
    write(tmp_path / "d")
  (tmp_path / "e").mkdir()
  (tmp_path / "e" / "data.mdb").write_bytes(b"no")
  with refuse(0, "is no LMDB that can be read"):
    write(tmp_path / "e")
  monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
  with refuse(0, "needs the package lmdb.*pip install lmdb"):
    write(tmp_path / "b")
  assert not (tmp_path / "out").exists()


def test_plans_are_json(tmp_path):
  trajectories.write(tmp_path, PROMPTS, ENCODE, trace, RECIPE, negative="ugly")
  about = json.loads((tmp_path / "plan.json").read_text())["about"]
  assert about["negative"] == "ugly" and about["seed"] == 5 and len(about["prompts"]) == 16
