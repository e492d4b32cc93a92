"""Videos from prompts, with random weights: frames, images that begin them, other prompts."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax import pipeline
from hfjax.diffusion.solvers import MultistepSolver
from hfjax.models import vae
from hfjax.models.clips import to_uint8
from hfjax.streaming import Stream
from hfjax.streaming.stream import NEGATIVE
from tests.helpers import compilations

SIZE = (64, 32)
SETTINGS = {"size": SIZE, "dtype": "float32", "steps": (1000, 500), "ratio": 0.5, "window": 6,
            "sink": 2, "chunk": 2}  # fmt: skip


@functools.cache
def model(autoencoder="full"):
  return pipeline.load("random:tiny", autoencoder, dtype="float32")


def stream(prompt="a red square", autoencoder="full", **settings):
  return Stream(model(autoencoder), prompt, **{**SETTINGS, **settings})


def picture(frames=1, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (1, frames, 32, 64, 3), np.uint8)


@pytest.mark.parametrize("autoencoder", [pytest.param("full", marks=pytest.mark.slow), "tiny"])
def test_chunks_are_the_frames_of_their_latents(autoencoder):
  s, frames, latents = stream(autoencoder=autoencoder), [], []
  for _ in range(4):
    frames.append(np.asarray(next(s)))
    latents.append(s.chunk)
  frames = np.concatenate(frames, axis=1)
  assert frames.shape == (1, 29, 32, 64, 3) and frames.dtype == np.uint8 and s.frames == 29
  a = s.model.autoencoder
  network = pipeline.AUTOENCODERS[autoencoder][1]
  decode = jax.jit(network.decode, static_argnums=0)
  whole = to_uint8(decode(a.config, a.params, jnp.concatenate(latents, axis=1)))
  off = np.abs(frames.astype(int) - np.asarray(whole))
  assert off.max() <= 1 and (off > 0).mean() < 1e-3


def test_frames_one_by_one_are_those_of_the_chunks():
  chunks = stream()
  want = np.concatenate([np.asarray(next(chunks)) for _ in range(3)], axis=1)[0]
  got = np.stack([f[0] for f in itertools.islice(stream().each_frame(), want.shape[0])])
  np.testing.assert_array_equal(got, want)


def test_prompts_and_seeds_make_videos_of_their_own():
  both = np.asarray(next(stream(["a red square", "a blue circle"], seed=[1, 1])))
  assert np.any(both[0] != both[1])  # other words
  alone = np.asarray(next(stream("a red square", seed=[1])))
  assert np.abs(both[0].astype(int) - alone[0]).max() <= 1
  assert np.any(np.asarray(next(stream("a red square", seed=[2])))[0] != alone[0])


@pytest.mark.parametrize("frames", [1, 6])
def test_a_video_begins_with_what_it_is_given(frames):
  given = picture(frames)
  s = stream()
  shown = np.asarray(s.extend(given))
  taken = 1 + -(-(frames - 1) // 4) * 4
  assert shown.shape[1] == taken and s.frames == taken
  a = s.model.autoencoder
  x = np.concatenate([given, given[:, -1:].repeat(taken - frames, axis=1)], axis=1)
  encode = jax.jit(vae.encode, static_argnums=0)
  z = encode(a.config, a.params, jnp.asarray(x / 127.5 - 1, jnp.float32))
  np.testing.assert_allclose(s.latents.state.latents[:, : z.shape[1]], z, atol=1e-4)
  after = np.asarray(next(s))
  assert after.shape[1] == 8
  other = stream()
  other.extend(picture(frames, seed=1))
  assert np.any(np.asarray(next(other)) != after)
  with pytest.raises(ValueError, match="frames already"):
    s.extend(given)


def test_another_prompt_changes_what_follows_and_compiles_nothing():
  s, same = stream(), stream()
  for x in (s, same):
    x.warm_up()
    next(x)
  s.set_prompt("warm up the small programs", blend=2)  # of blends, and of slices of the sink
  next(s), next(s), next(same), next(same)
  with compilations() as compiled:
    s.set_prompt("a blue circle that turns and turns and turns")
    changed = np.asarray(next(s))
  assert [c for c in compiled if not c.startswith(("_where", "broadcast"))] == []
  assert s.prompts == ["a blue circle that turns and turns and turns"]
  assert np.any(np.asarray(next(same)) != changed)


def test_guided_videos_keep_away_from_what_the_preset_names(monkeypatch):
  asked = []
  made = model("tiny")
  spy = lambda prompts: asked.append(list(prompts)) or made.encode(prompts)
  for preset, given, want in (
    ("shapes_causal", None, ""), ("shapes_causal", "fog", "fog"), ("wan", None, NEGATIVE),
  ):  # fmt: skip
    asked.clear()
    Stream(
      made._replace(encode=spy, preset=preset), "a", size=(64, 32), negative_prompt=given,
      guidance=2.0, steps=(1000, 500), window=9, sink=3,
    )  # fmt: skip
    assert asked == [["a"], [want]]


def test_one_prompt_goes_to_all_videos():
  s = stream(["a", "b"])
  s.set_prompt("c")
  assert s.prompts == ["c", "c"]
  with pytest.raises(ValueError, match="3 prompts were given for 2 videos"):
    s.set_prompt(["a", "b", "c"])


@pytest.mark.parametrize(
  ("autoencoder", "settings"),
  [
    ("full", {}),
    ("tiny", {"solver": MultistepSolver("dpm++", 3), "guidance": 3.0}),
  ],
)
def test_a_stream_that_was_saved_goes_on_with_the_same_bits(autoencoder, settings):
  s = stream(["a", "b"], autoencoder, seed=[3, 4], **settings)
  s.extend(np.concatenate([picture(), picture(seed=1)]))
  for number in range(4):
    if number == 3:
      s.set_prompt(["c", "d"], blend=2)
    next(s)
  state = s.state()
  again = Stream.from_state(s.model, state)
  assert again.prompts == ["c", "d"] and again.frames == s.frames == 33
  for _ in range(3):
    np.testing.assert_array_equal(next(s), next(again))
  for x in (s, again):
    x.set_prompt("e")
  np.testing.assert_array_equal(next(s), next(again))


def test_a_stream_may_be_saved_before_it_begins():
  s = stream()
  np.testing.assert_array_equal(next(Stream.from_state(s.model, s.state())), next(s))


def test_what_is_no_state_of_this_model_is_refused():
  s = stream()
  next(s)
  state = s.state()
  with pytest.raises(ValueError, match="no state of a stream"):
    Stream.from_state(s.model, {})
  with pytest.raises(ValueError, match="no state of a stream"):
    Stream.from_state(s.model, {**state, "about": state["about"][:-9]})
  with pytest.raises(ValueError, match="another configuration .*is missing instead of"):
    Stream.from_state(model("tiny"), state)
  cut = {k: v for k, v in state.items() if k != "latents/state/length"}
  with pytest.raises(ValueError, match="state/length is missing"):
    Stream.from_state(s.model, cut)


def test_a_state_of_before_there_were_intervals_of_guidance_is_guided_throughout():
  given = {"solver": MultistepSolver(steps=3), "guidance": 4.0}
  s = stream(**given)
  next(s)
  state = s.state()
  about = json.loads(state["about"].tobytes())
  assert about["config"].pop("guidance_interval") == [0, 1000]
  old = state | {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
  np.testing.assert_array_equal(next(Stream.from_state(s.model, old)), next(s))
  some = stream(**given, guidance_interval=(700, 1000))
  again = Stream.from_state(some.model, some.state())
  assert again.config == some.config and again.config.guidance_interval == (700, 1000)


def test_guided_videos_keep_away_from_the_negative_prompt():
  settings = {"solver": MultistepSolver(steps=3), "guidance": 4.0}
  first = [np.asarray(next(stream(negative_prompt=p, **settings))) for p in ("dull", "noisy")]
  assert np.any(first[0] != first[1])
  assert np.any(first[0] != np.asarray(next(stream(negative_prompt="", **settings))))


@pytest.mark.parametrize(
  ("settings", "sentence"),
  [
    ({"size": (70, 32)}, "70 x 32 pixels; its sides must be multiples of 16 and 16. The nearest is "
     "64 x 32"),
    ({"size": (0, 5)}, "The nearest is 16 x 16"),
    ({"size": 64}, "The size is 64"),
    ({"prompt": " "}, "The prompt is ' '; say in words"),
    ({"prompt": []}, "say in words"),
    ({"windows": 3}, r"A setting is unknown \(ratio, window, sink, chunk, windows"),
    ({"window": 3}, "cannot hold the sink of 2"),
    ({"dtype": "int8"}, "compute dtype is 'int8'"),
    ({"seed": [1, 2]}, "2 seeds were given for 1 samples"),
  ],
)  # fmt: skip
def test_settings_that_cannot_work(settings, sentence):
  with pytest.raises(ValueError, match=sentence):
    stream(**settings)


def test_frames_that_do_not_fit_are_refused():
  s = stream()
  for wrong in (picture()[:, :, :16], picture().astype(np.float32), picture()[0]):
    with pytest.raises(ValueError, match=r"takes uint8 \[1, frames, 32, 64, 3\]"):
      s.extend(wrong)
