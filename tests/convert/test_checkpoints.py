"""Files and folders of transformers, in and out; PyTorch's files are tested with the oracles."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hfjax.convert import CheckpointError, checkpoint, dit, load, lora, write
from hfjax.convert.recognise import clean_names
from tests.helpers import MODEL, random_params

ROOT = Path(__file__).resolve().parents[2]
HYBRID = dataclasses.replace(MODEL, text_len=512)
DENSE = dataclasses.replace(HYBRID, linear=False)
CFG = dit.published_config(HYBRID, "original")


def tensors_of(config=HYBRID, dtype=np.float32):
  params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), random_params(config))
  return dit.to_original(config, params)


TENSORS = tensors_of()


def put(folder, tensors=TENSORS, cfg=CFG, name="diffusion_pytorch_model.safetensors"):
  folder.mkdir(parents=True, exist_ok=True)
  save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / name)
  if cfg is not None:
    (folder / "config.json").write_text(json.dumps(cfg))
  return folder


def convert(*args):
  """The tool in this process: exit status."""
  sys.path.insert(0, str(ROOT / "tools"))
  import convert_checkpoint

  return convert_checkpoint.main([*map(str, args), "--quiet"])


def refused(capsys, *args):
  """Sentence of a conversion that must fail."""
  assert convert(*args) == 2
  error = capsys.readouterr().err
  assert error.startswith("convert_checkpoint: ") and len(error.strip().splitlines()) == 1, error
  return error


def same(a, b):
  assert a.keys() == b.keys()
  for k in a:
    assert a[k].dtype == b[k].dtype and a[k].shape == b[k].shape
    assert a[k].tobytes() == b[k].tobytes(), k


def folders(parent):
  """What lies in a folder, hidden entries too."""
  return sorted(p.name for p in parent.iterdir())


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


def flat(tree):
  paths = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {"/".join(k.key for k in p): np.asarray(x) for p, x in paths}


def test_dtypes_that_differ_within_an_array_survive(tmp_path):
  """A stacked array takes the wider dtype, and the way back knows what each tensor was."""
  tensors = dict(TENSORS)
  for name in ("blocks.0.self_attn.k.weight", "blocks.1.ffn.0.weight", "blocks.1.ffn.0.bias"):
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
  put(tmp_path / "wan", tensors)
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  ours = load_file(tmp_path / "ours" / "dit" / "model.safetensors")
  assert ours["blocks/self_attn/qkv/kernel"].dtype == np.float32
  assert convert(tmp_path / "ours", tmp_path / "back", "--to", "original") == 0
  same(load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors"), tensors)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", ml_dtypes.bfloat16), ("float32", np.float32)])
def test_dtype_on_request(tmp_path, name, dtype):
  put(tmp_path / "wan", tensors_of(dtype=np.float32 if name == "bf16" else np.float16))
  assert convert(tmp_path / "wan", tmp_path / "ours", "--dtype", name) == 0
  ours = load_file(tmp_path / "ours" / "dit" / "model.safetensors")
  assert {x.dtype for x in ours.values()} == {np.dtype(dtype)}
  want = flat(dit.from_original(HYBRID, TENSORS))
  for k in want:
    np.testing.assert_allclose(ours[k].astype(np.float32), want[k], rtol=0.01, atol=1e-3)


def test_the_record_beside_the_weights(tmp_path, capsys):
  put(tmp_path / "wan")
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  folder = tmp_path / "ours" / "dit"
  info = json.loads((folder / "config.json").read_text())
  assert info["format"] == "hfjax-1" and info["model"] == "dit"
  assert info["architecture"] == json.loads(json.dumps(dataclasses.asdict(HYBRID)))
  assert info["variant"] == "reference_infer" and info["origin"]["naming"] == "original"
  import hashlib

  digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
  assert info["hashes"] == {"model.safetensors": digest}
  assert "Taken for variant reference_infer" in capsys.readouterr().out
  assert len(checkpoint.folder_hash(folder)) == 64
  assert folders(tmp_path) == ["ours", "wan"]


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
  assert checkpoint.read_config(tmp_path / "ours" / "dit")[1] == wide


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


def test_shards_are_written_and_read(tmp_path, monkeypatch):
  monkeypatch.setattr(
    write.write_shards, "__defaults__", (write.write_shards.__defaults__[0], 9000)
  )
  put(tmp_path / "wan")
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  shards = sorted(tmp_path.glob("ours/dit/model-*-of-*.safetensors"))
  assert len(shards) > 3
  info = json.loads((tmp_path / "ours" / "dit" / "config.json").read_text())
  assert info["hashes"].keys() == {s.name for s in shards}
  assert convert(tmp_path / "ours", tmp_path / "back", "--to", "original") == 0
  pieces = sorted((tmp_path / "back").glob("*.safetensors"))
  assert len(pieces) > 3
  found = {}
  for piece in pieces:
    found |= load_file(piece)
  same(found, TENSORS)
  index = tmp_path / "back" / "diffusion_pytorch_model.safetensors.index.json"
  assert set(json.loads(index.read_text())["weight_map"]) == set(TENSORS)
  pieces[1].unlink()
  with pytest.raises(CheckpointError, match="does not hold all shards"):
    checkpoint.open_parts(tmp_path / "back")


@pytest.mark.parametrize("style", ["original", "diffusers", "kohya"])
def test_low_rank_updates_are_merged(tmp_path, style):
  r = np.random.default_rng(0)
  up, down = (r.normal(size=s).astype(np.float32) for s in ((32, 4), (4, 32)))
  name = {
    "original": "diffusion_model.blocks.1.self_attn.q.{}",
    "diffusers": "transformer.blocks.1.attn1.to_q.{}",
    "kohya": "lora_unet_blocks_1_self_attn_q.{}",
  }[style]
  ends = ("lora_A.weight", "lora_B.weight") if style == "diffusers" else (
    "lora_down.weight", "lora_up.weight")  # fmt: skip
  update = {name.format(ends[0]): down, name.format(ends[1]): up}
  scale = 0.5
  if style != "diffusers":
    update[name.format("alpha")] = np.array(2.0, np.float32)
    scale *= 2 / 4
  save_file(update, tmp_path / "lora.safetensors")
  put(tmp_path / "wan")
  args = ("--lora", f"{tmp_path / 'lora.safetensors'}@0.5", "--to", "original")
  assert convert(tmp_path / "wan", tmp_path / "merged", *args) == 0
  merged = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
  key = "blocks.1.self_attn.q.weight"
  np.testing.assert_allclose(merged[key], TENSORS[key] + scale * (up @ down), atol=1e-6)
  same(
    {k: v for k, v in merged.items() if k != key}, {k: v for k, v in TENSORS.items() if k != key}
  )


@pytest.mark.parametrize(
  ("update", "sentence"),
  [
    ({"blocks.0.other.lora_A.weight": (4, 32)}, "1 tensors that update no weight"),
    ({"blocks.0.ffn.0.lora_A.weight": (4, 32), "blocks.0.ffn.0.lora_B.weight": (32, 4)},
     r"blocks.0.ffn.0.weight of shape \[48, 32\] with \[\[32, 4\], \[4, 32\]\]"),
    ({"blocks.0.ffn.0.lora_A.weight": (4, 32)}, "does not fit"),
    ({}, "update no weight of this transformer: nothing"),
  ],
)  # fmt: skip
def test_updates_that_do_not_fit_are_refused(tmp_path, update, sentence):
  save_file({k: np.zeros(s, np.float32) for k, s in update.items()}, tmp_path / "l.safetensors")
  parts = checkpoint.open_parts(put(tmp_path / "wan"))
  with pytest.raises(CheckpointError, match=sentence):
    lora.merge(parts, tmp_path / "l.safetensors")


def drop(n):
  return lambda t: [t.pop(k) for k in sorted(k for k in t if "blocks.1." in k)[:n]]


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    (lambda t: t.pop("blocks.1.norm3.bias"), "1 missing tensor: blocks.1.norm3.bias"),
    (lambda t: t.update({"blocks.0.new": np.ones(1, np.float32)}), "1 unexpected tensor"),
    (lambda t: t.update({"blocks.0.norm3.bias": np.ones(5, np.float32)}), "misshapen"),
    (drop(25), "25 missing tensors: .* and 5 more"),
    (lambda t: t.pop("blocks.1.self_attn.linear_proj.bias"), "missing tensor: blocks.1"),
    (lambda t: t.pop("head.head.weight"), "head.weight, which tells the arch"),
    (lambda t: t["head.head.bias"].__setitem__(3, np.nan), "head.bias holds 1 numbers"),
    (lambda t: t["blocks.0.ffn.0.weight"].__setitem__(0, np.inf), "holds 32 numbers"),
  ],
)  # fmt: skip
def test_damaged_weights_are_refused_and_nothing_is_written(tmp_path, capsys, change, sentence):
  tensors = {k: v.copy() for k, v in TENSORS.items()}
  change(tensors)
  put(tmp_path / "wan", tensors)
  error = refused(capsys, tmp_path / "wan", tmp_path / "ours")
  assert re.search(sentence, error), error
  assert folders(tmp_path) == ["wan"]


def test_nan_in_half_precision_is_seen(tmp_path, capsys):
  tensors = tensors_of(dtype=ml_dtypes.bfloat16)
  tensors["patch_embedding.bias"][0] = float("nan")
  put(tmp_path / "wan", tensors)
  assert "patch_embedding.bias holds 1" in refused(capsys, tmp_path / "wan", tmp_path / "ours")


@pytest.mark.parametrize(
  ("key", "value", "sentence"),
  [("dim", 64, "dim 64 against 32"), ("num_layers", 30, "num_layers 30 against 2"),
   ("num_heads", 4, "num_heads 4 against 2")],
)  # fmt: skip
def test_a_config_of_another_model_is_refused(tmp_path, capsys, key, value, sentence):
  put(tmp_path / "wan", cfg={**CFG, key: value})
  error = refused(capsys, tmp_path / "wan", tmp_path / "ours")
  assert sentence in error and "disagree" in error


def corrupt(data, how):
  size = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + size])
  name = sorted(k for k in header if k != "__metadata__")[0]
  if how == "truncated":
    return data[:-100]
  if how == "short":
    return data[:5]
  if how == "no json":
    return data[:8] + b"x" * size + data[8 + size :]
  if how == "huge header":
    return (2**62).to_bytes(8, "little") + data[8:]
  if how == "offsets":
    header[name]["data_offsets"][1] += 4
  if how == "shape":
    header[name]["shape"] = [10**6, 10**6]
  if how == "dtype":
    header[name]["dtype"] = "F9"
  if how == "negative":
    header[name]["data_offsets"][0] = -8
  text = json.dumps(header).encode()
  return len(text).to_bytes(8, "little") + text + data[8 + size :]


KINDS_OF_DAMAGE = ["truncated", "short", "no json", "huge header", "offsets", "shape", "dtype",
                   "negative"]  # fmt: skip


@pytest.mark.parametrize("how", KINDS_OF_DAMAGE)
def test_lying_and_truncated_files_are_refused(tmp_path, capsys, how):
  file = put(tmp_path / "wan") / "diffusion_pytorch_model.safetensors"
  file.write_bytes(corrupt(file.read_bytes(), how))
  assert "can be read" in refused(capsys, tmp_path / "wan", tmp_path / "ours")
  assert folders(tmp_path) == ["wan"]


def test_random_damage_never_gives_a_traceback(tmp_path):
  """Either a sentence, or weights of the same shapes (a bit of the data may have flipped)."""
  file = put(tmp_path / "wan") / "diffusion_pytorch_model.safetensors"
  data, r = file.read_bytes(), np.random.default_rng(0)
  for _ in range(150):
    broken = bytearray(data)
    for at in r.integers(0, r.choice([8, 400, len(data)]), r.integers(1, 4)):
      broken[at] = r.integers(256)
    file.write_bytes(bytes(broken[: r.integers(1, len(broken))] if r.random() < 0.2 else broken))
    try:
      parts = checkpoint.open_parts(tmp_path / "wan")
      for tensor in parts[0].tensors.values():
        assert tensor.read().shape == tensor.shape
    except CheckpointError:
      pass


def test_sources_without_weights_are_refused(tmp_path, capsys):
  (tmp_path / "empty").mkdir()
  (tmp_path / "text.txt").write_text("no weights")
  put(tmp_path / "other", {"layer.weight": np.ones((2, 2), np.float32)}, None)
  for source, sentence in (
    ("none", "is not there"), ("empty", "holds no weights"), ("text.txt", "neither safetensors"),
    ("other", "no model that hfjax knows"),
  ):  # fmt: skip
    assert sentence in refused(capsys, tmp_path / source, tmp_path / "ours")
  put(tmp_path / "two")
  put(tmp_path / "two", cfg=None, name="copy.safetensors")
  assert "more than one dit" in refused(capsys, tmp_path / "two", tmp_path / "ours")
  (tmp_path / "wan").mkdir()
  put(tmp_path / "wan")
  (tmp_path / "wan" / "config.json").write_text("{")
  assert "no JSON file" in refused(capsys, tmp_path / "wan", tmp_path / "ours")


def test_existing_folders_are_kept_unless_told_otherwise(tmp_path, capsys):
  put(tmp_path / "wan")
  target = tmp_path / "ours"
  assert convert(tmp_path / "wan", target) == 0
  (target / "notes.txt").write_text("mine")
  before = (target / "dit" / "config.json").read_text()
  assert "is there already" in refused(capsys, tmp_path / "wan", target)
  assert convert(tmp_path / "wan", target, "--overwrite", "--dtype", "bf16") == 0
  assert (target / "dit" / "config.json").read_text() != before
  assert (target / "notes.txt").read_text() == "mine"  # other entries stay
  (tmp_path / "file").write_text("")
  assert "is a file" in refused(capsys, tmp_path / "wan", tmp_path / "file")
  assert folders(tmp_path) == ["file", "ours", "wan"]


def test_an_interrupted_run_leaves_the_target_as_it_was(tmp_path, monkeypatch, capsys):
  put(tmp_path / "wan")
  target = tmp_path / "ours"
  assert convert(tmp_path / "wan", target) == 0
  before = {p: p.read_bytes() for p in target.rglob("*") if p.is_file()}
  calls = []

  def interrupt(tensor, name):
    calls.append(name)
    if len(calls) > 20:
      raise KeyboardInterrupt
    return tensor.read()

  monkeypatch.setattr(checkpoint, "_read", interrupt)
  assert convert(tmp_path / "wan", target, "--overwrite", "--dtype", "bf16") == 130
  assert "as it was" in capsys.readouterr().err
  assert {p: p.read_bytes() for p in target.rglob("*") if p.is_file()} == before
  assert folders(tmp_path) == ["ours", "wan"]


def test_a_process_that_is_asked_to_end_leaves_nothing_behind(tmp_path):
  put(tmp_path / "wan")
  slow = (
    "import sys, time, runpy; from hfjax.convert import write; plain = write.write_shards\n"
    "def wait(*args, **kwargs):\n"
    "  print('writing', flush=True); time.sleep(60); return plain(*args, **kwargs)\n"
    "write.write_shards = wait; tool = sys.argv.pop(1)\n"
    "runpy.run_path(tool, run_name='__main__')"
  )
  run = subprocess.Popen(
    [sys.executable, "-c", slow, ROOT / "tools" / "convert_checkpoint.py", tmp_path / "wan",
     tmp_path / "ours", "--quiet"],
    cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  while "writing" not in (line := run.stdout.readline()):
    assert line, run.stderr.read()
  run.terminate()
  _, error = run.communicate(timeout=60)
  assert run.returncode == 130 and "as it was" in error, error
  assert folders(tmp_path) == ["wan"]


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch, capsys):
  put(tmp_path / "wan")
  usage = type("Usage", (), {"free": 1000})
  monkeypatch.setattr(write.shutil, "disk_usage", lambda path: usage)
  assert "0.00 GB are free; make room" in refused(capsys, tmp_path / "wan", tmp_path / "ours")
  assert folders(tmp_path) == ["wan"]


def test_a_damaged_hfjax_folder_is_refused(tmp_path):
  put(tmp_path / "wan")
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  config = tmp_path / "ours" / "dit" / "config.json"
  info = json.loads(config.read_text())
  for change, sentence in (
    ({"architecture": {**info["architecture"], "layers": 3}}, "does not fit its config.json"),
    ({"architecture": {**info["architecture"], "size": 3}}, "describes no dit"),
    ({"architecture": {**info["architecture"], "heads": 3}}, "describes no dit"),
    ({"model": "gan"}, "is no hfjax model"),
  ):
    config.write_text(json.dumps({**info, **change}))
    with pytest.raises(CheckpointError, match=sentence):
      load(tmp_path / "ours" / "dit")


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


def test_loading_from_the_hub_needs_a_network(monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  import huggingface_hub.constants

  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(CheckpointError, match="hf download owner/model --local-dir DIR"):
    load("owner/model")


_SHARDED = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
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
flow = [wan.predict_flow(m.config, m.params, x, jnp.array([500.0]), text) for m in (one, many)]
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


def test_strengths_of_updates():
  assert lora.parse("a.safetensors") == (Path("a.safetensors"), 1.0)
  assert lora.parse("x@y/a.safetensors@-0.5") == (Path("x@y/a.safetensors"), -0.5)
  with pytest.raises(CheckpointError, match="strength 'much' of a.safetensors is no number"):
    lora.parse("a.safetensors@much")
