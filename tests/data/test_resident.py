"""Arrays that stay on the device: the same batches as without."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.data import resident, shards
from hfjax.data.loading import batches, open_source
from hfjax.data.made import MadeClips, made_latents
from hfjax.data.rejects import DataError, Rejects
from hfjax.data.resident import Resident
from hfjax.data.sources import Beginnings
from hfjax.training import config, plan, stages, weights
from hfjax.training.feed import Feed
from tests.training.runs import FLOW, small_programs

SHAPE = (2, 4, 6, 4)


@pytest.fixture(scope="module", autouse=True)
def programs():
  with small_programs():
    yield


def write(folder, prompts="abcdef", dtype="float16", context=False):
  """Latents of noise, of which none is like another."""
  r = np.random.default_rng(0)
  told = {"latents": (SHAPE, dtype)} | ({"context": ((None, 12), "float32")} if context else {})

  def make(start, stop, reject):
    for i in range(start, stop):
      rows = {"context": np.full((i + 1, 12), i)} if context else {}
      yield {"prompt": prompts[i], "latents": r.integers(-99, 99, SHAPE) / 64, **rows}

  shards.write(folder, shards.Plan("videos", len(prompts), told, {}), make)
  return folder


def planned(*more):
  argv = [*FLOW, "--workdir=unused", *(f"--config.{x}" for x in more)]
  return plan.make_plan(config.parse(argv).config)


def feeds(tmp_path, *more):
  """Of the same data, kept on the device and not."""
  for kept in (True, False):
    p = planned(*more, f"data.resident={kept}")
    yield Feed(p, weights.Encoder(p), tmp_path, print)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("context", [False, True])
def test_batches_are_those_that_are_read(tmp_path, accumulate, context):
  folder = write(tmp_path / "data", context=context)
  ours, theirs = feeds(tmp_path, f"data.path={folder}", "batch=4", f"accumulate={accumulate}")
  want = stages.batch_shapes(ours.plan)
  for _ in range(4):
    x, y = ours(), theirs()
    assert jax.tree.structure(x) == jax.tree.structure(y) == jax.tree.structure(want)
    for a, b, like in zip(*map(jax.tree.leaves, (x, y, want)), strict=True):
      np.testing.assert_array_equal(a, b)
      assert (a.shape, a.dtype, a.sharding) == (like.shape, like.dtype, like.sharding)
      assert b.sharding == like.sharding
  assert ours.has_contexts == theirs.has_contexts == context
  # It goes on where it was left, whichever of them was there before.
  state = theirs.state()
  theirs()
  ours.restore(state)
  np.testing.assert_array_equal(ours()["latents"], next(again(theirs, state))["latents"])


def again(feed, state):
  feed.restore(state)
  yield feed()


class Watched:
  """NumPy that remembers the sizes of what it is given by name. The guard sees nothing here."""

  def __init__(self):
    self.sizes = set()

  def asarray(self, x, *args, **options):
    self.sizes.add(np.size(x))
    return np.asarray(x, *args, **options)

  def __getattr__(self, name):
    return getattr(np, name)


def test_arrays_do_not_pass_the_host(tmp_path, monkeypatch):
  for feed, passes in zip(feeds(tmp_path, "batch=4"), (False, True), strict=True):
    watched = Watched()
    with monkeypatch.context() as patch, jax.transfer_guard_device_to_host("disallow"):
      for module in (stages, stages.parallel, resident):
        patch.setattr(module, "np", watched)
      feed()
    assert (4 * math.prod(SHAPE) in watched.sizes) == passes


@pytest.mark.parametrize(
  ("dtype", "want"), [("float16", "float16"), ("float32", "float32"), ("bfloat16", "float32")]
)
def test_halves_are_kept_as_such(tmp_path, dtype, want):
  source = open_source("videos", write(tmp_path / "data", dtype=dtype))
  kept = Resident(source, "latents")
  assert kept._arrays.dtype == want and kept._arrays.shape == (6, *SHAPE)
  found = kept.fetch(np.array([5, 0, 5]))["latents"]
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, np.stack([source[i]["latents"] for i in (5, 0, 5)]))
  assert len(kept) == 6 and {**kept[4]} == {"prompt": "e", "index": 4}
  with pytest.raises(IndexError):
    kept[6]


def test_bytes_stay_bytes():
  clips = MadeClips(3, 4, 5, 3, count=4, seed=1)
  found = Resident(clips, "video").fetch(np.array([2, 1]))["video"]
  assert found.dtype == jnp.uint8
  np.testing.assert_array_equal(found, np.stack([clips[i]["video"] for i in (2, 1)]))


def test_bad_examples_are_left_out_and_counted(tmp_path):
  folder = write(tmp_path / "data", prompts=("a", " ", "c", "", "e"))
  with pytest.warns(UserWarning) as told:
    kept = Resident(open_source("videos", folder, on_bad="skip"), "latents")
  assert len(told) == 2
  assert all(str(x.message).endswith("empty prompt. It is left out.") for x in told)
  assert kept.rejects.count == 2 and [kept[i]["prompt"] for i in range(3)] == ["a", "c", "e"]
  source = open_source("videos", folder, on_bad="skip")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    data = batches(kept, 3, 0)
    for _ in range(3):
      batch = next(data)
      found = kept.fetch(batch["index"])["latents"]
      for prompt, x in zip(batch["prompt"], found, strict=True):
        np.testing.assert_array_equal(x, source["abcde".index(prompt)]["latents"])
  assert kept.rejects.count == 2
  with pytest.raises(DataError, match="empty prompt. Mend that, or set on_bad to skip"):
    Resident(open_source("videos", folder), "latents")


def test_nothing_that_can_be_used_is_the_end(tmp_path):
  source = open_source("videos", write(tmp_path / "data", prompts=("", " ")), on_bad="skip")
  with (
    pytest.warns(UserWarning, match="empty prompt"),
    pytest.raises(DataError, match="All examples are bad. 2 examples are left out"),
  ):
    Resident(source, "latents")


def test_arrays_of_several_shapes_are_refused():
  both = [made_latents(n, 2, 2, 4)[0] for n in (1, 2)]
  with pytest.raises(DataError, match="Arrays of latents differ in shape; make the data anew"):
    Resident(both, "latents")


class Clips:
  """Clips of rising lengths."""

  rejects = Rejects()

  def __len__(self):
    return 3

  def __getitem__(self, index):
    return {"prompt": f"clip {index}", "video": np.arange(index + 2)}


def test_beginnings_are_of_one_length_and_short_clips_are_refused():
  source = Beginnings(Clips(), "video", 3)
  assert len(source) == 3 and source.rejects is Clips.rejects
  np.testing.assert_array_equal(source[2]["video"], [0, 1, 2])
  assert source[1] | {"video": None} == {"prompt": "clip 1", "video": None}
  with pytest.raises(DataError, match="The video of 'clip 0' has 2 frames, and 3 are needed"):
    source[0]
