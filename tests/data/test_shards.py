"""Folders of shards: round trips, several processes, and runs that were cut."""

import fcntl
import itertools
import json

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from hfjax.data import shards
from hfjax.data.loading import open_source
from hfjax.data.rejects import DataError

ARRAYS = {"latents": ((2, 3), "float16"), "context": ((None, 4), "bfloat16")}


def plan(count=11, per_shard=3, **about):
  return shards.Plan(
    "videos", count, ARRAYS, {"seed": 1, **about}, per_shard, "python tools/x.py --a 'b c'"
  )


def example(i):
  rng = np.random.default_rng(i)
  context = rng.standard_normal((i % 3 + 1, 4)).astype(ml_dtypes.bfloat16).astype(np.float32)
  return {
    "prompt": f"número {i}", "latents": rng.standard_normal((2, 3)).astype(np.float32),
    "context": context,
  }  # fmt: skip


def make(start, stop, reject):
  return (example(i) for i in range(start, stop))


def contents(folder):
  return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_what_is_written_is_read_back(tmp_path):
  calls = []
  report = lambda *args: calls.append(args)
  written = shards.write(tmp_path / "a" / "b", plan(), make, progress=report)
  assert written.examples == 11 and written.missing == 0 and not written.rejects.count
  assert calls == [(n, 11) for n in range(12)]
  source = open_source("videos", tmp_path / "a" / "b", expect={"latents": (2, None)})
  assert len(source) == 11 and source.shapes["context"] == (None, 4)
  for i in (10, 0, 5):
    found, want = source[i], example(i)
    assert found["prompt"] == want["prompt"]
    assert found["latents"].dtype == found["context"].dtype == np.float32
    np.testing.assert_array_equal(found["latents"], want["latents"].astype(np.float16))
    np.testing.assert_array_equal(found["context"], want["context"])  # without loss
  with pytest.raises(IndexError):
    source[11]


def test_others_read_it_as_a_dataset_of_tfds(tmp_path):
  shards.write(tmp_path, plan(), make)
  builder = tfds.builder_from_directory(str(tmp_path))
  assert builder.info.splits["train"].num_examples == 11
  assert builder.info.splits["train"].num_shards == 4
  latents = builder.as_data_source("train")[7]["latents"]
  np.testing.assert_array_equal(latents, example(7)["latents"].astype(np.float16))


def test_bytes_do_not_depend_on_the_process(tmp_path):
  names = [*"hgfedcba"]
  one = shards.Plan("videos", 1, dict.fromkeys(names, ((1,), "float32")), {})
  examples = [{"prompt": "x"} | {n: np.ones(1) for n in names}]
  shards.write(tmp_path, one, lambda *_: examples)
  reader = array_record_module.ArrayRecordReader(str(one.path(tmp_path, 0)))
  record = reader.read([0])[0]
  reader.close()
  places = [record.index(b"\n\x01" + n.encode()) for n in sorted(names)]
  assert places == sorted(places)  # else each process has an order of its own


def test_processes_share_the_shards_and_the_last_makes_it_a_dataset(tmp_path):
  shards.write(tmp_path / "one", plan(), make)
  seen = []

  def counted(start, stop, reject):
    seen.extend(range(start, stop))
    return make(start, stop, reject)

  for order, processes in (("a", (0, 1, 2)), ("b", (2, 0, 1))):
    folder, seen[:] = tmp_path / order, []
    for n, i in enumerate(processes):
      written = shards.write(folder, plan(), counted, process=(i, 3))
      assert (written.missing == 0) == (n == 2)
      if n < 2:
        with pytest.raises(DataError, match=r"of 4 shards are there.*finishes.*x.py --a 'b c'"):
          open_source("videos", folder)
    assert sorted(seen) == list(range(11))
    assert contents(folder) == contents(tmp_path / "one")
  assert shards.write(tmp_path / "a", plan(), None).examples == 11  # nothing is made again


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_was_cut_in_a_shard_goes_on_to_the_same_bytes(tmp_path, kind):
  shards.write(tmp_path / "whole", plan(), make)
  folder, made = tmp_path / "cut", []

  def cut(start, stop, reject):
    for i in range(start, stop):
      if i == 7:
        raise kind
      yield example(i)

  with pytest.raises(kind):
    shards.write(folder, plan(), cut)
  shard = "videos-train.array_record-0000{}-of-00004"
  assert sorted(contents(folder)) == ["plan.json", shard.format(0), shard.format(1)]
  # What a killed process leaves does no harm.
  (folder / f".{shard.format(2)}.unfinished").write_bytes(b"half")

  def counted(start, stop, reject):
    made.extend(range(start, stop))
    return make(start, stop, reject)

  shards.write(folder, plan(), counted)
  assert made == list(range(6, 11))
  assert contents(folder) == contents(tmp_path / "whole")


def test_a_folder_of_other_settings_is_left_alone(tmp_path):
  shards.write(tmp_path, plan(), make)
  before = contents(tmp_path)
  for other in (plan(seed=2), plan(count=12), plan(per_shard=4), plan(more=None, extra=3)):
    with pytest.raises(DataError, match="begun with other settings"):
      shards.write(tmp_path, other, make)
  assert contents(tmp_path) == before
  (tmp_path / "plan.json").unlink()
  with pytest.raises(DataError, match="holds another dataset"):
    shards.write(tmp_path, plan(), make)


def test_settings_of_a_run_that_came_to_nothing_may_be_mended(tmp_path):
  def fail(start, stop, reject):
    raise RuntimeError("too little memory")
    yield

  with pytest.raises(RuntimeError):
    shards.write(tmp_path, plan(seed=2), fail)
  assert shards.write(tmp_path, plan(), make).examples == 11
  assert json.loads((tmp_path / "plan.json").read_text())["about"] == {"seed": 1}


def test_two_runs_do_not_write_the_same_shard(tmp_path):
  name = ".videos-train.array_record-00000-of-00004.unfinished"
  with (tmp_path / name).open("wb") as held:
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="Another run is writing shard 0"):
      shards.write(tmp_path, plan(), make)
  assert shards.write(tmp_path, plan(), make).missing == 0


def some_bad(start, stop, reject):
  for i in range(start, stop):
    if i % 2:
      reject(f"{i} is odd.")
    else:
      yield example(i)


def test_bad_examples_are_left_out_and_remembered(tmp_path):
  with pytest.raises(DataError, match="1 is odd.*on_bad to skip"):
    shards.write(tmp_path / "a", plan(), some_bad)
  for attempt in range(2):  # the second only reads what the first has noted
    written = shards.write(tmp_path / "a", plan(), [some_bad, None][attempt], on_bad="skip")
    assert written.examples == 6 and written.rejects.count == 5
    assert written.rejects.first == [f"{i} is odd." for i in range(1, 11, 2)]
  source = open_source("videos", tmp_path / "a")
  assert [source[i]["prompt"] for i in range(6)] == [f"número {i}" for i in range(0, 11, 2)]


def test_a_folder_of_nothing_is_no_dataset(tmp_path):
  def none(start, stop, reject):
    for i in range(start, stop):
      reject(f"{i} is bad.")
    return ()

  with pytest.raises(DataError, match="Nothing is left.*11 examples are left out"):
    shards.write(tmp_path, plan(), none, on_bad="skip")
  with pytest.raises(DataError, match="no videos to be written"):
    plan(count=0)


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"latents": np.full((2, 3), 1e6)}, "not finite in float16"),
    ({"latents": np.full((2, 3), np.nan)}, "not finite in float16"),
    ({"latents": np.zeros((3, 2))}, r"has shape \(3, 2\), and \(2, 3\) is planned"),
    ({"context": np.full((2, 4), 1.001, np.float32)}, "more precise than bfloat16"),
  ],
)
def test_arrays_that_do_not_fit_are_not_written(tmp_path, changes, sentence):
  with pytest.raises(DataError, match=sentence):
    shards.write(tmp_path, plan(), lambda *_: iter([example(0) | changes]))
  assert sorted(contents(tmp_path)) == ["plan.json"]


@pytest.mark.parametrize("process", [(2, 2), (-1, 2), (0, 0)])
def test_processes_count_from_zero(tmp_path, process):
  with pytest.raises(DataError, match="count from 0"):
    shards.write(tmp_path, plan(), make, process=process)


def test_shards_are_of_a_size_that_is_soon_done():
  big = shards.Plan("videos", 1000, {"latents": ((21, 60, 104, 16), "float16")}, {})
  assert big.per_shard == 2**27 // (21 * 60 * 104 * 16 * 2 + 256)
  small = shards.Plan("prompts", 100, {}, {})
  assert small.per_shard == 7  # so that sixteen processes have something to do
  spans = [small.inputs(i) for i in range(small.shards)]
  assert spans[0][0] == 0 and spans[-1][1] == 100
  assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


def test_damaged_folders_are_refused(tmp_path):
  shards.write(tmp_path, plan(), make)
  shard = tmp_path / "videos-train.array_record-00001-of-00004"
  data = shard.read_bytes()
  shard.unlink()
  with pytest.raises(DataError, match="3 of 4 shards are there"):
    open_source("videos", tmp_path)
  shard.write_bytes(data[: len(data) // 2])
  (tmp_path / "dataset_info.json").unlink()
  with pytest.raises(DataError, match="00001-of-00004 is damaged.*remove it"):
    shards.write(tmp_path, plan(), make)
  shard.unlink()
  assert shards.write(tmp_path, plan(), make).examples == 11
  (tmp_path / "plan.json").write_text("{")
  with pytest.raises(DataError, match=r"plan.json cannot be read"):
    open_source("videos", tmp_path)
  (tmp_path / "plan.json").write_text(json.dumps({"version": 9}))
  with pytest.raises(DataError, match="another version than 1"):
    shards.write(tmp_path, plan(), make)
