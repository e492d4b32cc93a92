"""Meshes, and which array is split where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, PartitionSpec

from hfjax import parallel

TWO = parallel.make_mesh()


def abstract(fsdp, data=1):
  """A mesh of devices that are not there."""
  return AbstractMesh((data, fsdp), parallel.AXES)


@pytest.mark.parametrize(
  ("fsdp", "count", "shape"), [(-1, 2, (1, 2)), (2, 2, (1, 2)), (1, 2, (2, 1)), (-1, 1, (1, 1))]
)
def test_devices_are_shared_out(fsdp, count, shape):
  mesh = parallel.make_mesh(fsdp, jax.devices()[:count])
  assert tuple(mesh.shape.values()) == shape and mesh.axis_names == ("data", "fsdp")
  assert list(mesh.devices.flat) == jax.devices()[:count]


@pytest.mark.parametrize("fsdp", [0, -2, 3, 4])
def test_groups_that_devices_do_not_divide_into_are_refused(fsdp):
  with pytest.raises(ValueError, match=f"2 devices do not divide into groups of {fsdp} that"):
    parallel.make_mesh(fsdp, jax.devices()[:2])


@pytest.mark.parametrize(
  ("fsdp", "shape", "smallest", "axis"),
  [
    (4, (30, 1536, 8960), 2**20, 2),
    (4, (8960, 1536), 2**20, 0),
    (4, (1536, 1536), 2**20, 1),  # the last of equals
    (8, (30, 8, 100), 1, 1),  # 100 does not divide
    (8, (30, 3, 100), 1, None),
    (1, (64, 64), 1, None),
    (4, (), 1, None),
    (4, (0, 4), 1, 1),  # nothing to split in the first
    (4, (1024, 1023), 2**20, None),
    (4, (1024, 1024), 2**20, 1),  # the smallest that is split
    (16, (1024, 16), 1, 0),
  ],
)
def test_the_longest_axis_that_divides_is_split(fsdp, shape, smallest, axis):
  if 0 in shape:
    smallest = 0
  want = PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, "fsdp")
  assert parallel.spec(abstract(fsdp), shape, smallest) == want


@given(st.lists(st.integers(1, 40), max_size=4), st.integers(1, 8), st.integers(1, 3))
def test_no_axis_that_could_be_split_is_longer(shape, fsdp, data):
  got = parallel.spec(abstract(fsdp, data), shape, 1)
  axes = [i for i, name in enumerate(got) if name]
  fits = [length for length in shape if length % fsdp == 0]
  if fsdp == 1 or not fits:
    assert got == PartitionSpec()
  else:
    assert len(axes) == 1 and shape[axes[0]] == max(fits)


def test_trees_and_names_are_placed_alike():
  tree = {"a": jnp.zeros((3, 4)), "b": jax.ShapeDtypeStruct((5,), jnp.bfloat16)}
  split = {"a": PartitionSpec(None, "fsdp"), "b": PartitionSpec()}
  shardings = parallel.shardings(TWO, tree, 1)
  shapes = parallel.abstract(TWO, tree, 1)
  place = parallel.placing(TWO, 1)
  for name, want in split.items():
    assert shardings[name].spec == shapes[name].sharding.spec == want
    assert place(f"blocks/{name}", tree[name].shape) == shardings[name]
    assert (shapes[name].shape, shapes[name].dtype) == (tree[name].shape, tree[name].dtype)
  # By default what is small is whole.
  assert parallel.shardings(TWO, tree)["a"].spec == parallel.replicated(TWO).spec == PartitionSpec()
  assert parallel.placing(TWO)("a", (3, 4)).is_fully_replicated


@pytest.mark.parametrize("fsdp", [1, 2])
def test_a_batch_lies_over_all_devices(fsdp):
  mesh = parallel.make_mesh(fsdp)
  count = mesh.size
  tree = {"x": np.arange(4 * count * 3).reshape(4 * count, 3), "y": np.ones(count, np.float32)}
  got = parallel.put_batch(mesh, tree)
  for name, x in tree.items():
    np.testing.assert_array_equal(got[name], x)
    shards = sorted(got[name].addressable_shards, key=lambda s: s.index[0].start or 0)
    assert len({s.device for s in shards}) == count
    np.testing.assert_array_equal(np.concatenate([s.data for s in shards]), x)
    assert all(len(s.data) == len(x) // count for s in shards)


def test_the_batch_may_be_a_later_axis():
  x = jax.device_put(np.arange(12).reshape(3, 4), parallel.batched(TWO, 1))
  assert [s.data.shape for s in x.addressable_shards] == [(3, 2), (3, 2)]


def test_batches_that_do_not_divide_are_refused():
  for batch in (2, 4, 64):
    parallel.check_batch(TWO, batch)
  for batch in (0, -2, 1, 3):
    with pytest.raises(ValueError, match=f"A batch of {batch} does not divide among 2 devices"):
      parallel.check_batch(TWO, batch)


def test_what_is_made_lies_where_it_shall():
  make = lambda scale: {"w": scale * jnp.arange(24.0).reshape(4, 6), "n": jnp.int32(3)}
  got = parallel.create(make, TWO, 2.0, smallest=1)
  np.testing.assert_array_equal(got["w"], 2 * np.arange(24).reshape(4, 6))
  assert [s.data.shape for s in got["w"].addressable_shards] == [(4, 3), (4, 3)]
  assert got["n"] == 3 and got["n"].sharding.is_fully_replicated
  assert parallel.create(make, TWO, 2.0)["w"].sharding.is_fully_replicated
