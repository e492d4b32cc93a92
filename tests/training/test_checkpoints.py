"""Checkpoints: what comes back, what is damaged, and what fails on the way."""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hfjax import checksums
from hfjax.training.checkpoints import (
  CheckpointFailed,
  CheckpointMismatch,
  Checkpoints,
  checksum,
)
from tests.helpers import files_at_most

pytestmark = [
  # pytest undoes what the module does about these.
  pytest.mark.filterwarnings("ignore:coroutine .* was never awaited"),
  # Tracebacks that users would see although nothing raises.
  pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
]

REPOSITORY = Path(__file__).parents[2]


def params(seed=0):
  """Larger than what Orbax keeps inside its own small files, and than a page."""
  rng = np.random.default_rng(seed)
  return {
    "blocks": {"kernel": jnp.array(rng.normal(size=(4, 60, 50)), jnp.float32)},
    "head": jnp.array(rng.normal(size=(64, 30)), jnp.bfloat16),
    "zeros": jnp.zeros((7,)),
  }


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def like(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def largest(folder):
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """A folder with the checkpoints of steps 10 and 20."""
  folder = tmp_path_factory.mktemp("two")
  with Checkpoints(folder) as checkpoints:
    for step in (10, 20):
      checkpoints.save(step, {"student": params(step), "critic": params(1)}, {"seen": step})
  return folder


@pytest.fixture
def copy(two, tmp_path):
  return Path(shutil.copytree(two, tmp_path / "checkpoints"))


def test_what_is_saved_comes_back(tmp_path, capfd, caplog):
  caplog.set_level(logging.DEBUG)
  tree = params()
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(optax.adamw(1e-3), {"blocks": True, "head": False, "zeros": True}),
  )
  items = {
    "student": tree,
    "optimizer": optimizer.init(tree),
    "nothing": optax.sgd(1.0).init(tree),
    "scalars": {"count": 3, "scale": 0.5, "flag": np.True_},
  }
  note = {"config": {"steps": (1000, 500)}, "rate": 2e-6, "words": "ä", "none": None}
  with Checkpoints(tmp_path / "a" / "b") as checkpoints:
    assert checkpoints.restore({"student": tree}) is None and checkpoints.note() is None
    assert checkpoints.save(3, items, note)
    checkpoints.wait()
    assert not checkpoints.save(3, items, {})  # it is there
    assert checkpoints.steps() == [3]
  arrays = jax.tree.map(jnp.asarray, items)
  with Checkpoints(tmp_path / "a" / "b") as checkpoints:
    found = checkpoints.restore(like(arrays))
    assert checkpoints.note(3) == checkpoints.note() == found.note
    only = checkpoints.restore({"student": like(tree), "unused": None}, ["student"])
  same(found.items, arrays)
  same(only.items, {"student": tree})
  assert found.step == 3 and found.note == {**note, "config": {"steps": [1000, 500]}}
  assert capfd.readouterr() == ("", "")
  assert not [r for r in caplog.records if "orbax" in r.pathname]


def test_as_many_stay_as_were_asked_for(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 5, 7, 20):
      checkpoints.save(step, {"x": {"a": jnp.full(3, step)}}, {})
    checkpoints.wait()
    assert checkpoints.steps() == [7, 20]
    with pytest.raises(CheckpointFailed, match=r"holds step 20, so step 9 is not saved"):
      checkpoints.save(9, {"x": {"a": jnp.zeros(3)}}, {})
  with pytest.raises(ValueError, match="keep is 0"):
    Checkpoints(tmp_path, keep=0)
  (tmp_path / "file").touch()
  with pytest.raises(CheckpointFailed, match=r"No checkpoints can be kept in .*file/under"):
    Checkpoints(tmp_path / "file" / "under")


def test_arrays_may_be_donated_and_changed_right_after(tmp_path):
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jnp.arange(2.0**16)
  with Checkpoints(tmp_path, keep=9) as checkpoints:
    for i in range(5):
      checkpoints.save(i, {"x": {"a": x}}, {})
      for _ in range(10):
        x = step(x)
    checkpoints.wait()
    found = checkpoints.restore({"x": {"a": x}})
  np.testing.assert_array_equal(found.items["x"]["a"], np.arange(2.0**16) + 40)


def test_another_number_of_devices(tmp_path):
  devices = jax.devices()
  assert len(devices) == 2
  one, both = (jax.make_mesh((n,), ("x",), (AxisType.Auto,), devices=devices[:n]) for n in (1, 2))
  rows, columns = PartitionSpec("x"), PartitionSpec(None, "x")
  x = jnp.array(np.random.default_rng(0).normal(size=(6, 8)), jnp.bfloat16)
  with Checkpoints(tmp_path) as checkpoints:
    for step, (mesh, spec) in enumerate([(both, rows), (one, rows), (both, columns)]):
      tree = {"a": jax.device_put(x, NamedSharding(mesh, spec))}
      assert checksum(tree) == checksum({"a": x})
      checkpoints.save(step, {"x": tree}, {})
      for mesh, spec in ((one, rows), (both, columns), (both, PartitionSpec())):
        sharding = NamedSharding(mesh, spec)
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        found = checkpoints.restore({"x": {"a": shape}})
        assert found.step == step and found.items["x"]["a"].sharding == sharding
        same(found.items["x"], {"a": x})


def _cut(path):
  os.truncate(path, path.stat().st_size // 2)


def _flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


def _zero(path):
  path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("file", ["data", "_METADATA", "manifest.ocdbt", "note"])
@pytest.mark.parametrize("harm", [_cut, _flip, _zero, Path.unlink])
def test_the_one_before_a_damaged_one_is_used(copy, harm, file, capfd):
  newest = copy / "20" / "student"
  place = {"data": largest(newest), "note": copy / "20" / "note" / "metadata"}
  harm(place.get(file, newest / file))
  said = []
  wanted = {"student": like(params())}
  with Checkpoints(copy, say=said.append) as checkpoints:
    found = checkpoints.restore(wanted)
    same(found.items["student"], params(10))
    assert found.step == 10 and found.note == {"seen": 10}
    assert len(said) == 1 and "step 20 is damaged (" in said[0] and "from step 10" in said[0]
    assert (copy / "damaged-20").is_dir() and str(copy / "damaged-20") in said[0]
    assert len(said[0]) < 500 and "\n" not in said[0]
    # Training gets there again.
    assert checkpoints.save(20, {"student": params(5)}, {"seen": "again"})
    again = checkpoints.restore(wanted)
  same(again.items["student"], params(5))
  assert again.step == 20 and len(said) == 1
  assert capfd.readouterr() == ("", "")


def test_an_item_that_is_gone_is_damage_to_whoever_wants_it(copy):
  shutil.rmtree(copy / "20" / "critic")
  said = []
  with Checkpoints(copy, say=said.append) as checkpoints:
    assert checkpoints.restore({"student": like(params())}).step == 20
    both = {"student": like(params()), "critic": like(params())}
    assert checkpoints.restore(both, optional=["critic"]).step == 10
  assert "critic is missing" in said[0]


def test_a_note_that_was_changed_is_not_believed(copy):
  path = copy / "20" / "note" / "metadata"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"seen": 21}))
  with Checkpoints(copy, say=lambda words: None) as checkpoints:
    with pytest.raises(CheckpointFailed, match=r"20 cannot be read \(its note is not the one"):
      checkpoints.note(20)
    assert checkpoints.note() == {"seen": 10}
    with pytest.raises(CheckpointFailed, match="30 cannot be read"):
      checkpoints.note(30)


def test_nothing_is_touched_if_all_are_damaged(copy):
  for step in ("10", "20"):
    largest(copy / step / "student").unlink()
  with Checkpoints(copy) as checkpoints:
    with pytest.raises(CheckpointFailed, match=r"All checkpoints .*step 20: .*; step 10: .*begin"):
      checkpoints.restore({"student": like(params())})
    assert checkpoints.steps() == [10, 20]
    assert checkpoints.restore({"critic": like(params())}).step == 20


def test_another_model_is_told_by_what_differs(copy):
  other = like(params()) | {
    "blocks": {"kernel": jax.ShapeDtypeStruct((4, 60, 51), jnp.float32)},
    "head": jax.ShapeDtypeStruct((64, 30), jnp.float32),
    "lora": jax.ShapeDtypeStruct((2,), jnp.float32),
  }
  del other["zeros"]
  with Checkpoints(copy) as checkpoints:
    with pytest.raises(CheckpointMismatch) as e:
      checkpoints.restore({"student": other})
    for part in (
      "step 20",
      "blocks/kernel is float32 (4, 60, 50) instead of float32 (4, 60, 51)",
      "head is bfloat16 (64, 30) instead of float32 (64, 30)",
      "lora is missing instead of float32 (2,)",
      "and 1 more",
    ):
      assert part in str(e.value)
    wanted = {"student": like(params()), "ema": like(params())}
    with pytest.raises(CheckpointMismatch, match=r"holds no 'ema' \(but critic, note, student\)"):
      checkpoints.restore(wanted)
    assert list(checkpoints.restore(wanted, optional=["ema"]).items) == ["student"]
    assert checkpoints.steps() == [10, 20]


@pytest.mark.parametrize("limit", [200, 20_000])
def test_a_full_disk_loses_nothing(copy, limit, capfd):
  """Small files fail too with the lower limit."""
  with Checkpoints(copy) as checkpoints:
    with files_at_most(limit):
      for step in (30, 40, 50):
        with pytest.raises(CheckpointFailed) as e:
          checkpoints.save(step, {"student": params(step)}, {})
          checkpoints.wait()
        assert f"step {step} could not be written" in str(e.value)
        assert "File too large" in str(e.value) and "of step 20" in str(e.value)
        for _ in range(100):  # remnants go, if not at once
          if len(list(copy.iterdir())) == 2:
            break
          time.sleep(0.05)
          checkpoints.wait()
        assert sorted(p.name for p in copy.iterdir()) == ["10", "20"]
      found = checkpoints.restore({"student": like(params())})
      same(found.items["student"], params(20))
      # A save that goes on in the background is told of at the next one.
      with contextlib.suppress(CheckpointFailed):
        checkpoints.save(60, {"student": params(60)}, {})
      with pytest.raises(CheckpointFailed):
        checkpoints.save(70, {"student": params(70)}, {})
        checkpoints.wait()
    assert checkpoints.save(80, {"student": params(80)}, {})
    checkpoints.wait()
    assert checkpoints.steps() == [20, 80]
    assert sorted(p.name for p in copy.iterdir()) == ["20", "80"]
    same(checkpoints.restore({"student": like(params())}).items["student"], params(80))
  assert capfd.readouterr() == ("", "")


def test_close_tells_of_a_save_that_failed(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  with files_at_most(20_000):
    checkpoints.save(1, {"student": params()}, {})
    with pytest.raises(CheckpointFailed, match="there is none yet"):
      checkpoints.close()
  assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_saved_is_said_at_once(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(TypeError):
      checkpoints.save(1, {"x": {"a": jnp.zeros(1)}}, {"f": len})
    with pytest.raises(ValueError, match="cannot be called 'note'"):
      checkpoints.save(1, {"note": {"a": jnp.zeros(1)}}, {})
    assert checkpoints.steps() == []


def test_remnants_of_a_killed_process_go(copy):
  (copy / "30.orbax-checkpoint-tmp").mkdir()
  (copy / "30.orbax-checkpoint-tmp" / "part").write_bytes(b"x")
  (copy / "notes.txt").touch()  # of the user
  with Checkpoints(copy) as checkpoints:
    assert checkpoints.restore({"student": like(params())}).step == 20
  assert sorted(p.name for p in copy.iterdir()) == ["10", "20", "notes.txt"]


_ENDLESS = """
import sys
import jax.numpy as jnp
from hfjax.training.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
x = jnp.arange(2_000_000.0)
for step in range(1, 10_000):
  checkpoints.save(step, {"x": {"a": x + step}}, {"step": step})
  print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("after_ms", [0, 7, 15, 25, 40, 60])
def test_a_process_that_is_killed_leaves_the_one_before(tmp_path, after_ms):
  folder = tmp_path / "checkpoints"
  command = [sys.executable, "-c", _ENDLESS, str(folder)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
    assert process.stdout is not None
    for _ in range(3):  # the third is begun, so that the second is there
      process.stdout.readline()
    time.sleep(after_ms / 1000)
    process.kill()
  said = []
  with Checkpoints(folder, say=said.append) as checkpoints:
    found = checkpoints.restore({"x": {"a": jax.ShapeDtypeStruct((2_000_000,), jnp.float32)}})
    assert found.step >= 2 and found.note == {"step": found.step} and said == []
    expected = np.arange(2_000_000, dtype=np.float32) + found.step
    np.testing.assert_array_equal(found.items["x"]["a"], expected)
    assert checkpoints.save(found.step + 1, found.items, {})


def _oracle(x):
  """The sum in Python's integers, from the bytes of the array."""
  x = np.asarray(x)
  width = min(x.dtype.itemsize, 4)
  words = [int.from_bytes(x.tobytes()[i : i + width], "little") for i in range(0, x.nbytes, width)]
  return sum((w + 0x9E3779B9) * (2 * i + 1) for i, w in enumerate(words)) % 2**32


@pytest.mark.parametrize(
  "dtype", [np.float32, ml_dtypes.bfloat16, np.int8, np.uint32, bool, np.int64, np.float64]
)
def test_sums_are_those_of_the_bytes(dtype):
  x = (np.random.default_rng(0).normal(size=(3, 5, 2)) * 50).astype(dtype)
  for array in (x, x[0], x[:0], x[1, 1, 1]):
    found = checksums._sum(checksums._words(array))
    assert int(found) == _oracle(array)


@given(st.data())
def test_sums_see_what_disks_do(data):
  x = np.random.default_rng(data.draw(st.integers(0, 9))).normal(size=(8, 16)).astype(np.float32)
  before = checksum({"a": {"b": x}})
  y = x.copy()
  flat = y.view(np.uint8).reshape(-1)
  kind = data.draw(st.sampled_from(["bit", "zeros", "swap"]))
  at = data.draw(st.integers(0, 31))
  if kind == "bit":
    flat[data.draw(st.integers(0, flat.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
  elif kind == "zeros":
    flat[at * 4 : at * 4 + 4 * data.draw(st.integers(1, 96))] = 0
  else:
    y[[0, data.draw(st.integers(1, 7))]] = y[[data.draw(st.integers(1, 7)), 0]]
  assert (checksum({"a": {"b": y}}) != before) == (not np.array_equal(x, y))
  assert checksum({"a": {"c": x}}) != before
  assert checksum({"a": {"b": x.reshape(16, 8)}}) != before
  assert checksum({"a": {"b": jnp.array(x)}}) == before


def test_of_copies_that_drifted_apart_one_is_saved_whole(tmp_path):
  mesh = jax.make_mesh((2,), ("x",), (AxisType.Auto,))
  x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
  copies = [jax.device_put(x + i, device) for i, device in enumerate(jax.devices())]
  everywhere = NamedSharding(mesh, PartitionSpec())
  drifted = jax.make_array_from_single_device_arrays(x.shape, everywhere, copies)
  with Checkpoints(tmp_path) as saved:
    saved.save(1, {"m": {"a": drifted}}, {})
    like = {"m": {"a": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)}}
    found = saved.restore(like)
  assert found is not None and found.items["m"]["a"].sharding == everywhere
  for shard in found.items["m"]["a"].addressable_shards:
    np.testing.assert_array_equal(shard.data, x)
