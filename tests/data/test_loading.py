"""Sources and batches: what comes, for whom, in what order, and after a stop."""

import collections
import itertools
import json

import numpy as np
import pytest

from hfjax.data import shards
from hfjax.data.loading import batches, indices, open_source
from hfjax.data.rejects import DataError, Rejects


class Numbers:
  """Examples that say their number; some are damaged."""

  def __init__(self, count, bad=(), on_bad="skip"):
    self.count, self.bad, self.rejects = count, set(bad), Rejects(on_bad)

  def __len__(self):
    return self.count

  def __getitem__(self, i):
    if i in self.bad:
      raise DataError(f"Example {i} is damaged.")
    return {"prompt": str(i), "latents": np.full((2,), i, np.float32)}


def prompts(stream, count):
  return [next(stream)["prompt"] for _ in range(count)]


def epochs(found, size):
  flat = list(itertools.chain.from_iterable(found))
  return [flat[i : i + size] for i in range(0, len(flat), size)]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_every_epoch_has_everything_once_in_another_order(prefetch):
  stream = batches(Numbers(12), 4, seed=3, prefetch=prefetch)
  orders = epochs(prompts(stream, 9), 12)
  assert all(sorted(map(int, order)) == list(range(12)) for order in orders)
  assert len({tuple(order) for order in orders}) == 3
  assert prompts(batches(Numbers(12), 4, seed=4), 3) != prompts(batches(Numbers(12), 4, seed=3), 3)


def test_arrays_are_stacked_beside_their_prompts():
  batch = next(batches(Numbers(12), 4, seed=0))
  assert batch["latents"].shape == (4, 2) and batch["latents"].dtype == np.float32
  assert [str(int(x[0])) for x in batch["latents"]] == batch["prompt"]


@pytest.mark.parametrize("count", [24, 23])
def test_processes_share_every_epoch(count):
  streams = [batches(Numbers(count), 2, 5, process_index=i, process_count=3) for i in range(3)]
  # Step by step, as the processes take them; of 23 epochs end within steps.
  together = [[s for stream in streams for s in next(stream)["prompt"]] for _ in range(23)]
  counts = collections.Counter(itertools.chain.from_iterable(together))
  assert len(counts) == count and set(counts.values()) <= {138 // count, -(-138 // count)}
  if count == 24:
    for order in epochs(together, 24)[:5]:
      assert sorted(map(int, order)) == list(range(24))


@pytest.mark.parametrize("bad", [(), (1, 5, 6)])
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 2)])
@pytest.mark.filterwarnings("ignore:Example")
def test_a_state_goes_on_with_the_same_batches(bad, before, after):
  make = lambda prefetch: batches(
    Numbers(11, bad), 3, 9, process_index=1, process_count=2, prefetch=prefetch
  )
  want = prompts(make(0), 9)
  for done in (0, 1, 4):
    stream = make(before)
    prompts(stream, done)
    state = json.loads(json.dumps(stream.get_state()))
    prompts(stream, 2)  # what comes later does not change it
    resumed = make(after)
    resumed.set_state(state)
    assert prompts(resumed, 9 - done) == want[done:]
    stream.set_state(state)  # also one that has read ahead
    assert prompts(stream, 2) == want[done : done + 2]


@pytest.mark.parametrize(
  ("other", "sentence"),
  [
    ({"seed": 2}, "seed=1, and now it is 2"),
    ({"source": Numbers(9)}, "examples=8, and now it is 9"),
    ({"batch": 3}, "batch=2"),
    ({"process_count": 2}, "process_count=1"),
  ],
)
def test_a_state_of_other_data_is_refused(other, sentence):
  given = {"source": Numbers(8), "batch": 2, "seed": 1}
  state = batches(**given).get_state()
  with pytest.raises(DataError, match=sentence):
    batches(**{**given, **other}).set_state(state)
  with pytest.raises(DataError, match="no position"):
    batches(**given).set_state({})


@pytest.mark.parametrize(("count", "batch"), [(12, 4), (11, 4), (5, 5), (7, 2)])
def test_numbers_go_through_every_epoch(count, batch):
  found = np.concatenate([next(x) for x in [indices(count, batch, 3)] for _ in range(4 * count)])
  rows = found[: len(found) // count * count].reshape(-1, count)
  np.testing.assert_array_equal(np.sort(rows, axis=1), np.tile(np.arange(count), (len(rows), 1)))
  assert len({*map(tuple, rows.tolist())}) > 1
  assert next(indices(count, batch, 3)).tolist() == found[:batch].tolist()
  assert count < 6 or next(indices(count, batch, 4)).tolist() != found[:batch].tolist()
  # Processes share them, step by step.
  if batch * 2 <= count:
    both = [indices(count, batch, 3, process_index=i, process_count=2) for i in range(2)]
    together = np.concatenate([np.stack([next(x) for x in both], axis=1).ravel() for _ in range(9)])
    np.testing.assert_array_equal(together, found[: len(together)])


def test_numbers_go_on_from_a_state_and_from_none_of_other_data():
  make = lambda: indices(11, 4, 9, process_index=1, process_count=2)
  stream = make()
  want = [next(stream).tolist() for _ in range(9)]
  for done in (0, 1, 5):
    stream = make()
    for _ in range(done):
      next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    next(stream)
    resumed = make()
    resumed.set_state(state)
    assert [next(resumed).tolist() for _ in range(9 - done)] == want[done:]
  state = batches(Numbers(11), 4, 9, process_index=1, process_count=2).get_state()
  with pytest.raises(DataError, match="saved with order=None, and now it is permutations"):
    make().set_state(state)
  with pytest.raises(DataError, match="saved with order=permutations, and now it is None"):
    batches(Numbers(11), 4, 9, process_index=1, process_count=2).set_state(make().get_state())
  with pytest.raises(DataError, match="saved with data=a, and now it is b"):
    indices(8, 2, 0, identity="b").set_state(indices(8, 2, 0, identity="a").get_state())
  with pytest.raises(DataError, match="There are 11 examples, and a batch takes 12"):
    indices(11, 6, 0, process_count=2)


def test_damaged_examples_are_told_and_left_out_or_the_end():
  source = Numbers(8, bad={2, 5})
  with pytest.warns(UserWarning, match=r"Example [25] is damaged. It is left out.") as told:
    found = prompts(batches(source, 2, 0), 6)
  assert len(told) == 2 and source.rejects.count == 2
  assert set(itertools.chain.from_iterable(found)) == set("013467")
  with pytest.raises(DataError, match=r"Example [25] is damaged. Mend that"):
    prompts(batches(Numbers(8, {2, 5}, "fail"), 2, 0), 4)


@pytest.mark.filterwarnings("ignore:Example")
def test_data_that_are_all_bad_end_at_last():
  with pytest.raises(DataError, match="All examples are bad. 4 examples are left out"):
    next(batches(Numbers(4, range(4)), 2, 0))


@pytest.mark.parametrize(
  ("given", "sentence"),
  [
    ({"batch": 9}, "There are 8 examples, and a batch takes 9"),
    ({"batch": 5, "process_count": 2}, "a batch takes 10"),
    ({"batch": 0}, "at least 1"),
    ({"batch": 1, "process_index": 1}, "count processes from 0"),
  ],
)
def test_impossible_batches_are_refused(given, sentence):
  with pytest.raises(DataError, match=sentence):
    batches(Numbers(8), seed=0, **given)


class Contexts(Numbers):
  def __getitem__(self, i):
    return {"prompt": str(i), "context": np.full((i + 1, 2), i + 1, np.float32)}


def test_contexts_are_filled_up_with_zeros():
  batch = next(batches(Contexts(4), 4, 0, text_len=6))
  assert batch["context"].shape == (4, 6, 2)
  for prompt, context in zip(batch["prompt"], batch["context"], strict=True):
    rows = int(prompt) + 1
    assert np.all(context[:rows] == rows) and not np.any(context[rows:])
  with pytest.raises(DataError, match="has 4 rows, and the model takes 3"):
    next(batches(Contexts(4, on_bad="fail"), 4, 0, text_len=3))
  with pytest.raises(DataError, match="differ in shape; give text_len"):
    next(batches(Contexts(4), 4, 0))


def test_files_of_prompts_are_sources(tmp_path):
  path = tmp_path / "p.jsonl"
  path.write_text('"a"\n{}\n"b"\n')
  with pytest.warns(UserWarning, match=r"p.jsonl: 1 example is left out.*\n.*line 2"):
    source = open_source("prompts", path, on_bad="skip")
  assert [source[i] for i in range(2)] == [{"prompt": "a"}, {"prompt": "b"}]
  assert source.rejects.count == 1
  with pytest.raises(DataError, match="line 2, has no prompt"):
    open_source("prompts", path)
  (tmp_path / "empty.txt").write_text("\n \n")
  with pytest.raises(DataError, match="holds no prompt"):
    open_source("prompts", tmp_path / "empty.txt")
  path.write_text('"a"')
  with pytest.raises(DataError, match="has no context; make it with tools/embed_prompts"):
    open_source("prompts", path, expect={"context": (None, 4)})


def stored(folder, kind="videos", name="latents", prompt="a", dtype="float16"):
  plan = shards.Plan(kind, 4, {name: ((2, 3), dtype)}, {})
  example = {"prompt": prompt, name: np.ones((2, 3))}
  shards.write(folder, plan, lambda start, stop, _: [example] * (stop - start))
  return folder


def test_folders_must_be_what_is_asked_for(tmp_path):
  folder = stored(tmp_path / "v")
  assert open_source("videos", folder, expect={"latents": (2, 3)}).about == {}
  for kind, where, expect, sentence in (
    ("videos", folder, {"latents": (2, 4)}, "the shape 2 x 3, and 2 x 4 is needed"),
    ("videos", folder, {"context": (2, 4)}, "has no context; make it with the option"),
    ("prompts", folder, {}, "holds videos, and prompts are asked for"),
    ("videos", tmp_path / "none", {}, "There is no .*none to read videos from"),
    ("videos", tmp_path, {}, "is no dataset of videos that can be read"),
    ("videos", folder / "plan.json", {}, "is a file; videos are in folders"),
    ("films", folder, {}, "no data of the kind 'films'"),
    ("videos", stored(tmp_path / "w", name="other"), {}, "have no latents"),
  ):
    with pytest.raises(DataError, match=sentence):
      open_source(kind, where, expect=expect)


@pytest.mark.filterwarnings("ignore:Example")
def test_damage_within_a_folder_is_found_when_it_is_read(tmp_path):
  empty = open_source("videos", stored(tmp_path / "a", prompt=" "), on_bad="skip")
  with pytest.raises(DataError, match="Example 0 of .* has an empty prompt"):
    empty[0]
  with pytest.raises(DataError, match="All examples are bad"):
    next(batches(empty, 2, 0))
  folder = stored(tmp_path / "b")
  shard = sorted(folder.glob("*array_record*"))[0]
  data = bytearray(shard.read_bytes())
  data[64:400] = bytes(336)
  shard.write_bytes(data)
  source = open_source("videos", folder, on_bad="skip")
  with pytest.raises(DataError, match="Example 0 of .* cannot be read"):
    source[0]
  found = prompts(batches(source, 2, 0), 3)
  assert found == [["a", "a"]] * 3 and source.rejects.count == 1
