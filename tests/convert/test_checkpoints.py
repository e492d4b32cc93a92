"""Files and folders of transformers, in and out; PyTorch's files are tested with the oracles."""

import dataclasses
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hfjax.convert import CheckpointError, checkpoint, dit, load, stored
from hfjax.convert.recognise import clean_names
from tests.convert.helpers import (
  DENSE,
  HYBRID,
  ROOT,
  TENSORS,
  convert,
  flat,
  folders,
  put,
  refused,
  same,
  tensors_of,
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:Taken for variant")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("config", [HYBRID, DENSE, dataclasses.replace(DENSE, image_dim=8)])
def test_every_format_leads_to_every_other_bit_for_bit(tmp_path, config, dtype):
  tensors = tensors_of(config, dtype)
  put(tmp_path / "wan", tensors, dit.published_config(config, "original"))
  steps = [("wan", "hfjax"), ("hfjax", "diffusers"), ("diffusers", "again"), ("again", "original"),
           ("original", "diffusers2"), ("diffusers2", "original2")]  # fmt: skip
  for source, target in steps:
    to = {"again": "hfjax"}.get(target, target.rstrip("2"))
    assert convert(tmp_path / source, tmp_path / target, "--to", to) == 0
  for name in ("original", "original2"):
    same(load_file(tmp_path / name / "diffusion_pytorch_model.safetensors"), tensors)
  for name in ("diffusers", "diffusers2"):
    found = load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")
    table = dit.table(config)
    same({k: found[table.diffusers_name(k)] for k in tensors}, tensors)
  same(*(load_file(tmp_path / n / "dit" / "model.safetensors") for n in ("hfjax", "again")))
  same(load_file(tmp_path / "hfjax" / "dit" / "model.safetensors"),
       flat(dit.from_original(config, tensors)))  # fmt: skip


PREFIXES = ["", "model.", "model.diffusion_model.", "diffusion_model.", "module.model.",
            "_orig_mod.", "model._orig_mod."]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_stripped(tmp_path, prefix):
  named = {prefix + k: v for k, v in TENSORS.items()}
  put(tmp_path / "x", named, None, "weights.safetensors")
  part = checkpoint.open_parts(tmp_path / "x" / "weights.safetensors", "dit")[0]
  assert part.tensors.keys() == TENSORS.keys()


def test_infixes_of_wrappers_are_stripped():
  names = {
    "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.ffn.0.weight": 1,
    "model._checkpoint_wrapped_module.blocks.0.ffn.0.bias": 2,
    "model.head._orig_mod.head.bias": 3,
  }
  assert clean_names(names) == {
    "blocks.0.ffn.0.weight": 1, "blocks.0.ffn.0.bias": 2, "head.head.bias": 3,
  }  # fmt: skip
  with pytest.raises(CheckpointError, match=r"holds head.bias twice"):
    clean_names({"head._orig_mod.bias": 1, "head.bias": 2})


def test_heads_without_a_config_are_said(tmp_path, capsys):
  wide = dataclasses.replace(DENSE, dim=256, heads=2)
  put(tmp_path / "wan", tensors_of(wide), cfg=None)
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  assert "number of heads; taken to be 2, of 128 channels" in capsys.readouterr().out
  assert stored.read_config(tmp_path / "ours" / "dit")[1] == wide


def test_a_narrow_model_needs_a_config(tmp_path, capsys):
  put(tmp_path / "wan", tensors_of(DENSE), cfg=None)
  error = refused(capsys, tmp_path / "wan", tmp_path / "ours")
  assert "the number of heads of a transformer 32 wide; put its config.json beside it" in error


@pytest.mark.parametrize("name", ["diffusion_pytorch_model", "wan", "model"])
def test_heads_come_from_the_config_whatever_the_file_is_called(tmp_path, capsys, name):
  four = dataclasses.replace(DENSE, dim=256, heads=4)
  cfg = dit.published_config(four, "original")
  put(tmp_path / "wan", tensors_of(four), cfg, f"{name}.safetensors")
  assert checkpoint.open_parts(tmp_path / "wan")[0].config == four
  put(tmp_path / "wan", tensors_of(four), {**cfg, "num_layers": 30}, f"{name}.safetensors")
  assert "num_layers 30 against 2" in refused(capsys, tmp_path / "wan", tmp_path / "ours")


def test_the_linear_branch_is_seen_in_any_block(tmp_path, capsys):
  tensors = {k: v for k, v in TENSORS.items() if k != "blocks.0.self_attn.linear_proj.weight"}
  put(tmp_path / "wan", tensors)
  error = refused(capsys, tmp_path / "wan", tmp_path / "ours")
  assert "1 missing tensor: blocks.0.self_attn.linear_proj.weight" in error


def test_one_name_without_the_prefix_is_named(tmp_path, capsys):
  named = {f"model.{k}": v for k, v in TENSORS.items()}
  put(tmp_path / "wan", {**named, "extra": np.ones(1, np.float32)})
  assert "1 unexpected tensor: extra" in refused(capsys, tmp_path / "wan", tmp_path / "ours")
  put(tmp_path / "wan", {**named, "head.head.bias": TENSORS["head.head.bias"]})
  assert "head.head.bias twice" in refused(capsys, tmp_path / "wan", tmp_path / "ours")


def test_a_missing_linear_branch_is_added_as_zeros_where_wanted(tmp_path, capsys):
  put(tmp_path / "wan", tensors_of(DENSE))
  assert convert(tmp_path / "wan", tmp_path / "dense") == 0
  assert load(tmp_path / "dense").config == DENSE
  assert load(tmp_path / "dense").variant == "reference_dense"
  assert convert(tmp_path / "wan", tmp_path / "hybrid", "--variant", "paper") == 0
  assert "4 linear_proj tensors were set to zero" in capsys.readouterr().out
  hybrid = load(tmp_path / "hybrid")
  assert hybrid.config == HYBRID and hybrid.variant == "paper"
  assert not np.any(hybrid.params["blocks"]["self_attn"]["linear_proj"]["kernel"])


def test_variants_of_what_was_converted_may_be_changed(tmp_path, capsys):
  put(tmp_path / "wan")
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  assert convert(tmp_path / "ours", tmp_path / "paper", "--variant", "paper") == 0
  assert load(tmp_path / "paper").variant == "paper"
  capsys.readouterr()
  for source in ("wan", "ours"):
    target = tmp_path / f"{source}_dense"
    assert convert(tmp_path / source, target, "--variant", "reference_dense") == 0
    assert "4 linear_proj tensors were left out" in capsys.readouterr().out
    assert load(target).config == DENSE
  assert convert(tmp_path / "ours_dense", tmp_path / "again", "--variant", "paper") == 0
  assert "4 linear_proj tensors were set to zero" in capsys.readouterr().out


def test_averages_are_not_made_up(tmp_path, capsys):
  put(tmp_path / "wan")
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  for source in ("wan", "wan/diffusion_pytorch_model.safetensors", "ours", "ours/dit"):
    assert "leave out --ema" in refused(capsys, tmp_path / source, tmp_path / "x", "--ema")


def test_loading_from_any_format(tmp_path):
  put(tmp_path / "wan")
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  assert convert(tmp_path / "wan", tmp_path / "theirs", "--to", "diffusers") == 0
  want = dit.from_original(HYBRID, TENSORS)
  file = tmp_path / "wan" / "diffusion_pytorch_model.safetensors"
  for path in (
    tmp_path / "wan",
    tmp_path / "ours",
    tmp_path / "ours/dit",
    tmp_path / "theirs",
    file,
  ):
    loaded = load(path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, want)
    assert loaded.config == HYBRID
  half = load(tmp_path / "ours", dtype=ml_dtypes.bfloat16).params
  assert {x.dtype for x in jax.tree.leaves(half)} == {np.dtype(ml_dtypes.bfloat16)}
  with pytest.raises(CheckpointError, match="neither a file or folder here nor"):
    load("nothing here")


def test_loading_says_what_there_is(tmp_path):
  put(tmp_path / "wan")
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  for path in ("wan", "ours", "ours/dit"):
    with pytest.raises(CheckpointError, match="holds no umt5: only dit"):
      load(tmp_path / path, "umt5")
  with pytest.raises(CheckpointError, match="no model 'foo'; load one of dit"):
    load(tmp_path / "wan", "foo")


def test_dtypes_of_parameters(tmp_path):
  put(tmp_path / "wan")
  half = load(tmp_path / "wan", dtype="bf16").params
  assert {x.dtype for x in jax.tree.leaves(half)} == {np.dtype(ml_dtypes.bfloat16)}
  for dtype in ("int8", "much"):
    with pytest.raises(CheckpointError, match=f"cannot be '{dtype}'"):
      load(tmp_path / "wan", dtype=dtype)


def test_parameters_are_never_made_infinite(tmp_path):
  put(tmp_path / "wan", {**TENSORS, "head.head.bias": np.full(16, 1e5, np.float32)})
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  for path in ("wan", "ours"):
    with pytest.raises(CheckpointError, match="head/projection/bias holds 16 numbers that are too"):
      load(tmp_path / path, dtype="float16")
    assert load(tmp_path / path, dtype="bf16").config == HYBRID


def test_double_precision_is_not_lost_silently(tmp_path):
  put(tmp_path / "wan", {**TENSORS, "head.head.bias": np.ones(16)})
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  for path in ("wan", "ours"):
    with pytest.raises(CheckpointError, match="head/projection/bias as float64 only with its jax_"):
      load(tmp_path / path)
    loaded = load(tmp_path / path, dtype="float32")
    assert loaded.params["head"]["projection"]["bias"].dtype == np.float32
  with jax.enable_x64(True):
    assert load(tmp_path / "ours").params["head"]["projection"]["bias"].dtype == np.float64


def test_loading_warns_of_what_was_assumed(tmp_path):
  put(tmp_path / "wan")
  (tmp_path / "wan" / "training_args.bin").write_bytes(b"no weights")
  with pytest.warns(UserWarning, match="Left out training_args.bin") as seen:
    load(tmp_path / "wan")
  assert len(seen) == 2 and "Taken for variant reference_infer" in str(seen[0].message)
  assert {w.filename for w in seen} == {__file__}  # where it was called
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    load(tmp_path / "ours")


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 300, "owner/" + "x" * 300, "/" + "x/" * 3000])
def test_names_that_can_be_no_path_get_a_sentence(tmp_path, monkeypatch, capsys, name):
  monkeypatch.chdir(put(tmp_path / "wan"))  # which an empty name must not stand for
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  with pytest.raises(CheckpointError):
    load(name)
  if name and "\0" not in name:  # of which no Path can be made
    with pytest.raises(CheckpointError, match="is not there"):
      checkpoint.open_parts(Path(name))
  assert "is n" in refused(capsys, name, tmp_path / "x")  # "no path", "not there"
  assert folders(tmp_path) == ["wan"]


def test_the_home_may_be_written_short(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  put(tmp_path / "wan")
  save_file(
    {"diffusion_model.head.head.diff_b": np.ones(16, np.float32)}, tmp_path / "l.safetensors"
  )
  assert convert("~/wan", "~/ours", "--lora", "~/l.safetensors") == 0
  assert load("~/ours").config == load("~/wan").config == HYBRID


def test_mixed_dtypes_load_as_they_convert(tmp_path):
  """Layers of one array in dtypes that hold different numbers."""
  kinds = (np.float16, ml_dtypes.bfloat16)
  put(tmp_path / "wan", {k: v.astype(kinds["blocks.0" in k]) for k, v in TENSORS.items()})
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  one, two = load(tmp_path / "wan").params, load(tmp_path / "ours").params
  jax.tree.map(np.testing.assert_array_equal, one, two)
  assert one["blocks"]["ffn_in"]["kernel"].dtype == two["blocks"]["ffn_in"]["kernel"].dtype == "f4"


def test_hashes_are_held_against_the_files(tmp_path, capsys):
  put(tmp_path / "wan")
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  load(tmp_path / "ours", verify=True)
  with pytest.raises(CheckpointError, match="no hfjax folder with a dit, so there are no hashes"):
    load(tmp_path / "wan", verify=True)
  file = tmp_path / "ours" / "dit" / "model.safetensors"
  data = bytearray(file.read_bytes())
  data[-3] ^= 1
  file.write_bytes(data)
  load(tmp_path / "ours")
  with pytest.raises(CheckpointError, match="not the file that was written here"):
    load(tmp_path / "ours", verify=True)
  error = refused(capsys, tmp_path / "ours", tmp_path / "back", "--to", "original")
  assert "by its SHA-256" in error


def test_loading_from_the_hub_needs_a_network(monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  import huggingface_hub.constants

  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(
    CheckpointError, match="no file or folder owner/model here, .* 'hf download owner/model"
  ):
    load("owner/model")


_SHARDED = """
import os, sys
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from hfjax.convert import load
from hfjax.models import wan
mesh = Mesh(np.array(jax.devices()), ("d",))

def place(path, shape):
  axes = [i for i, n in enumerate(shape) if n % 8 == 0]
  first = (axes or [-1])[0]
  return NamedSharding(mesh, P(*["d" if i == first else None for i in range(len(shape))]))

one, many = load(sys.argv[1]), load(sys.argv[1], sharding=place)
spread = [x for x in jax.tree.leaves(many.params) if len(x.sharding.device_set) == 8]
assert len(spread) == len(jax.tree.leaves(many.params))
assert any(x.addressable_shards[0].data.size * 8 == x.size for x in spread)
jax.tree.map(np.testing.assert_array_equal, one.params, many.params)
x = jax.random.normal(jax.random.key(0), (1, 2, 4, 6, 4))
text = jnp.ones((1, 3, 12))
predict = jax.jit(wan.predict_flow, static_argnums=0)
flow = [predict(m.config, m.params, x, jnp.array([500.0]), text) for m in (one, many)]
np.testing.assert_allclose(*flow, atol=2e-6)
print("ok")
"""


def test_eight_devices_give_the_numbers_of_one(tmp_path):
  put(tmp_path / "wan")
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  run = subprocess.run(
    [sys.executable, "-c", _SHARDED, str(tmp_path / "ours")],
    capture_output=True, text=True, cwd=ROOT, timeout=300,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )  # fmt: skip
  assert run.stdout.strip() == "ok", run.stderr
