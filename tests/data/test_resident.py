"""Arrays that stay on the device: the same examples as without."""

import contextlib
import dataclasses
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax import parallel
from hfjax.data import resident, shards
from hfjax.data.loading import open_source
from hfjax.data.made import MadeClips, made_latents
from hfjax.data.rejects import DataError, Rejects
from hfjax.data.resident import Resident
from hfjax.data.sources import Beginnings
from hfjax.training import config, plan, stages, weights
from hfjax.training.feed import Feed
from tests.training.runs import FLOW, one_device, small_programs

SHAPE = (2, 4, 6, 4)
MESH = parallel.make_mesh()


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
def test_every_epoch_has_all_that_is_read(tmp_path, accumulate, context):
  folder = write(tmp_path / "data", context=context)
  more = f"data.path={folder}", "batch=2", f"accumulate={accumulate}"
  if accumulate == 2:
    more = *more, "compute.fsdp=1"
  with one_device() if accumulate == 2 else contextlib.nullcontext():
    ours, theirs = feeds(tmp_path, *more)
    want, epochs = stages.batch_shapes(ours.plan), []
    for feed in (ours, theirs):
      batches = [feed() for _ in range(9)]
      for batch in batches:
        assert jax.tree.structure(batch) == jax.tree.structure(want)
        for a, like in zip(*map(jax.tree.leaves, (batch, want)), strict=True):
          assert (a.shape, a.dtype, a.sharding) == (like.shape, like.dtype, like.sharding)
        np.testing.assert_allclose(batch["texts"].negative, batches[0]["texts"].negative)
      rows = [
        np.concatenate([np.ravel(x), np.ravel(c)])
        for batch in batches
        for part in zip(batch["latents"], batch["texts"].context, strict=True)
        for x, c in zip(*part, strict=True)
      ]
      epochs.append([sorted(map(tuple, rows[n : n + 6])) for n in (0, 6, 12)])
    assert theirs.has_contexts == context and ours.has_contexts  # which were kept
    # Where contexts are computed, they are so beside others.
    np.testing.assert_allclose(epochs[0], epochs[1], rtol=1e-5, atol=1e-6)
    # It goes on where it was left, but not where one of the other kind was.
    state = ours.state()
    want = ours()["latents"]
    np.testing.assert_array_equal(next(again(ours, state))["latents"], want)
    said = []
    ours._say = said.append
    ours.restore(theirs.state())
    assert said and said[0].startswith("The data begin anew: The state of the data was saved with")


def test_contexts_of_what_is_kept_are_computed_once(tmp_path, monkeypatch):
  folder = write(tmp_path / "data")
  p, asked = planned(f"data.path={folder}", "batch=4", "data.resident=True"), []
  room = len("abcdef") * p.student.text_len * p.student.text_dim * 4
  for nbytes in (room - 1, room):  # contexts shall not take more of it than latents
    monkeypatch.setattr(
      Resident, "nbytes", property(lambda self, n=nbytes: n, lambda *_: None), False
    )
    kept = Feed(p, weights.Encoder(p), tmp_path, print).source._arrays.keys()
    assert ("context" in kept) == (nbytes >= room)

  class Asked(weights.Encoder):
    def __call__(self, prompts):
      asked.extend(prompts)
      return super().__call__(prompts)

  kept = Feed(p, Asked(p), tmp_path, print)
  assert sorted({*asked} - {p.config.text.negative}) == list("abcdef")
  asked.clear()
  for _ in range(4):
    kept()
  assert not asked


def test_contexts_that_are_too_long_or_take_too_much_room(tmp_path, monkeypatch):
  folder = write(tmp_path / "data", context=True)  # of 1 to 6 rows
  given = f"data.path={folder}", "batch=2", "data.resident=True"
  p = planned(*given)
  short = dataclasses.replace(p, student=dataclasses.replace(p.student, text_len=5))
  with pytest.warns(UserWarning, match="has 6 rows, and the model takes 5. It is left out."):
    feed = Feed(short, weights.Encoder(p), tmp_path, print)
  assert len(feed.source) == 5 and feed.rejected == 1
  for nbytes, kept in ((2**30, True), (0, False)):
    monkeypatch.setattr(
      Resident, "nbytes", property(lambda self, n=nbytes: n, lambda *_: None), False
    )
    feed = Feed(p, weights.Encoder(p), tmp_path, print)
    assert ("context" in feed.source) == kept and feed.has_contexts
    rows = np.concatenate([feed()["texts"].context[0] for _ in range(3)])
    want = np.zeros((6, p.student.text_len, 12))
    for i in range(6):
      want[i, : i + 1] = i
    np.testing.assert_array_equal(sorted(rows.tolist()), sorted(want.tolist()))


def test_contexts_of_prompts_without_arrays_are_kept(tmp_path):
  networks = [f"{x}.weights=random:small" for x in ("critic", "teacher")]
  p = planned("stage=dmd", *networks, "batch=2", "data.resident=True", "data.made=5")
  feed, want = Feed(p, weights.Encoder(p), tmp_path, print), stages.batch_shapes(p)
  found = [feed() for _ in range(5)]
  for batch in found:
    assert jax.tree.structure(batch) == jax.tree.structure(want)
    for a, like in zip(*map(jax.tree.leaves, (batch, want)), strict=True):
      assert (a.shape, a.dtype, a.sharding) == (like.shape, like.dtype, like.sharding)
  rows = np.concatenate([batch["texts"].context[0] for batch in found])
  encode = weights.Encoder(p)
  all_rows = np.concatenate([encode([x["prompt"]]) for x in feed._opened])
  for epoch in rows[:5], rows[5:]:
    near = np.abs(epoch[:, None] - all_rows).max(axis=(2, 3)).argmin(axis=1)
    assert sorted(near) == list(range(5))
    np.testing.assert_allclose(epoch, all_rows[near], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("resident", [False, True])
def test_beginnings_of_longer_clips_are_taken(tmp_path, resident):
  folder = write(tmp_path / "data", context=True)
  p = planned(f"data.path={folder}", "batch=4", "flow.frames=1", f"data.resident={resident}")
  feed = Feed(p, weights.Encoder(p), tmp_path, print)
  whole = [x["latents"] for x in open_source("videos", folder)]
  want = stages.batch_shapes(p)
  for _ in range(3):
    batch = feed()
    assert jax.tree.map(jnp.shape, batch) == jax.tree.map(lambda x: x.shape, want)
    for x in batch["latents"][0]:
      assert sum(np.array_equal(x, y[:1]) for y in whole) == 1
  assert feed.has_contexts
  p = planned(f"data.path={folder}", "batch=4", "flow.frames=3", f"data.resident={resident}")
  with pytest.raises(DataError, match="have 2 frames, and flow.frames is 3; give longer clips"):
    Feed(p, weights.Encoder(p), tmp_path, print)


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
  kept = Resident(source, "latents", MESH)
  assert kept._arrays["latents"].dtype == want
  assert kept._arrays["latents"].shape == (6, *SHAPE) and kept.nbytes == 6 * math.prod(SHAPE) * (
    2 if want == "float16" else 4
  )
  found = kept.fetch(np.array([[5, 0], [5, 1]]))["latents"]
  assert found.dtype == jnp.float32 and found.shape == (2, 2, *SHAPE)
  read = np.stack([source[i]["latents"] for i in (5, 0, 5, 1)]).reshape(found.shape)
  np.testing.assert_array_equal(found, read)
  assert len(kept) == 6 and kept[4] == {"prompt": "e"}
  with pytest.raises(IndexError):
    kept[6]


def test_bytes_stay_bytes():
  clips = MadeClips(3, 4, 5, 3, count=4, seed=1)
  found = Resident(clips, "video", MESH).fetch(np.array([[2, 1]]))["video"]
  assert found.dtype == jnp.uint8
  np.testing.assert_array_equal(found, np.stack([clips[i]["video"] for i in (2, 1)])[None])


def test_bad_examples_are_left_out_and_counted(tmp_path):
  folder = write(tmp_path / "data", prompts=("a", " ", "c", "", "e"))
  with pytest.warns(UserWarning) as told:
    kept = Resident(open_source("videos", folder, on_bad="skip"), "latents", MESH)
  assert len(told) == 2
  assert all(str(x.message).endswith("empty prompt. It is left out.") for x in told)
  assert kept.rejects.count == 2 and [kept[i]["prompt"] for i in range(3)] == ["a", "c", "e"]
  source = open_source("videos", folder, on_bad="skip")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    for i, x in zip([2, 0, 1, 2], kept.fetch(np.array([[2, 0, 1, 2]]))["latents"][0], strict=True):
      np.testing.assert_array_equal(x, source["abcde".index(kept[i]["prompt"])]["latents"])
  assert kept.rejects.count == 2
  with pytest.raises(DataError, match="empty prompt. Mend that, or set on_bad to skip"):
    Resident(open_source("videos", folder), "latents", MESH)


def test_nothing_that_can_be_used_is_the_end(tmp_path):
  source = open_source("videos", write(tmp_path / "data", prompts=("", " ")), on_bad="skip")
  with (
    pytest.warns(UserWarning, match="empty prompt"),
    pytest.raises(DataError, match="All examples are bad. 2 examples are left out"),
  ):
    Resident(source, "latents", MESH)


def test_arrays_of_several_shapes_are_refused():
  both = [made_latents(n, 2, 2, 4)[0] for n in (1, 2)]
  with pytest.raises(DataError, match="Arrays of latents differ in shape; make the data anew"):
    Resident(both, "latents", MESH)


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
