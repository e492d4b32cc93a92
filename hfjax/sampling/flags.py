"""Flags of the command, from the command line, a file of settings, or a stream that was saved."""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from absl import flags

from hfjax import pipeline
from hfjax.models.geometry import VARIANTS
from hfjax.models.sampling_presets import SAMPLING_PRESETS

FLAGS = flags.FlagValues()
# What says where, not what, and so does not go over to another run.
PLACES = ("config", "resume", "out", "overwrite", "quiet", "log_json", "debug")
LENGTHS = ("seconds", "frames", "endless")


class UsageError(ValueError):
  """A command that cannot be followed; its text is a sentence."""


def _define():
  define: Any = flags
  text = lambda name, default, help: define.DEFINE_string(name, default, help, flag_values=FLAGS)
  texts = lambda name, help: define.DEFINE_multi_string(name, [], help, flag_values=FLAGS)
  switch = lambda name, help: define.DEFINE_bool(name, False, help, flag_values=FLAGS)
  number = lambda *args, **kw: define.DEFINE_integer(*args, flag_values=FLAGS, **kw)
  real = lambda *args, **kw: define.DEFINE_float(*args, flag_values=FLAGS, **kw)
  choice = lambda name, default, values, help: define.DEFINE_enum(
    name, default, [*values], help, flag_values=FLAGS
  )
  text("weights", None, "folder that tools/convert_checkpoint.py wrote, a name on the Hugging Face "
       "Hub, or random:NAME for noise from a model of that size; by default the small model that "
       "comes with hfjax, which knows moving shapes")  # fmt: skip
  text("config", None, "YAML or JSON file with any of these flags, or the JSON file beside a "
       "video; the command line goes before it")  # fmt: skip
  texts(
    "prompt", "what the video shows; may be repeated; the model's own by default, if it has one"
  )
  text("prompts_file", None, "file of prompts: .txt (one a line), .jsonl or .csv (`prompt`)")
  text("script", None, "YAML file that says which prompt begins when (README)")
  text("negative_prompt", None, "what guided videos keep away from; has a default")
  text("out", None, "video to write, or folder for several; by default outputs/PROMPT-SEED.mp4")
  real("seconds", None, "length of the video; 5 by default", lower_bound=0.01)
  number("frames", None, "its length in frames instead", lower_bound=1)
  switch("endless", "goes on until it is stopped")
  text("size", None, "columns and rows of pixels, multiples of 16; the preset's by default, or "
       "832x480")  # fmt: skip
  text("fps", "16", "frames per second at which the video plays")
  flags.DEFINE_multi_integer("seed", [0], "of the noise; may be repeated: a video for each",
                             lower_bound=0, upper_bound=2**32 - 1, flag_values=FLAGS)  # fmt: skip
  number("samples", 1, "videos for each prompt and seed, made side by side", lower_bound=1)
  choice("preset", None, SAMPLING_PRESETS, "how the weights are meant to be sampled: "
         "window, sink, steps, guidance, size; what they say by default")  # fmt: skip
  flags.DEFINE_list("steps", None, "a number of denoising steps, or the steps themselves, such as "
                    "1000,750,500,250", flag_values=FLAGS)  # fmt: skip
  choice("solver", None, ["few-step", "unipc", "dpm++"], "few-step for distilled models, else a "
         "multistep solver; unipc by default with --guidance or more than 10 steps")  # fmt: skip
  real("guidance", None, "classifier-free guidance, for undistilled models; 1 for none",
       lower_bound=0)  # fmt: skip
  flags.DEFINE_list("guidance_interval", None, "times from and up to which there is guidance, such "
                    "as 500,1000; the preset's by default, or all", flag_values=FLAGS)  # fmt: skip
  choice("attention", "hybrid", ["hybrid", "dense"], "dense keeps every key block of the window")
  choice("variant", None, VARIANTS, "semantics that the weights were trained with; theirs by "
         "default")  # fmt: skip
  real("sparsity", None, "share of the window's key blocks that attention leaves out; the "
       "preset's by default, or 0.8", lower_bound=0, upper_bound=0.999)  # fmt: skip
  number("window", None, "latent frames that attention sees; the preset's by default")
  number("sink", None, "first latent frames, seen for ever; the preset's by default")
  text("image", None, "image that the video begins with")
  text("video", None, "video that it goes on from, whose last frames it begins with")
  choice("vae", "full", pipeline.AUTOENCODERS, "autoencoder; the tiny one is faster")
  choice("dtype", None, ["bfloat16", "float32"], "that networks compute in; bfloat16 by default, "
         "and on processors float32")  # fmt: skip
  text("latents", None, "`save` writes latents beside the video; a file of them is decoded")
  text("resume", None, "goes on from the state of a stream that was stopped (.state.safetensors)")
  switch("save_state", "keeps the stream's state for --resume, even if it ends by itself")
  switch("preview", "writes a contact sheet (PNG) and a GIF beside the video")
  switch("overwrite", "replaces the file that --out names")
  switch("quiet", "shows no progress")
  text("log_json", None, "file to which a JSON line is added for each chunk")
  switch("debug", "shows where an error came from")


_define()
_given: list[str] = []  # all that was read, files first


def parse(argv: Sequence[str]):
  """Reads the command line, and the file that --config names for what it leaves open."""
  reset()
  _given[:] = argv
  _read(argv)
  if FLAGS.config is not None:
    fill(read_config(Path(FLAGS.config).expanduser()), FLAGS.config)


def fill(values: Mapping[str, Any], source: str):
  """Sets flags that are not set yet; a value may be a list. UsageError names `source`."""
  extra = []
  for name, value in values.items():
    if name not in FLAGS:
      near = difflib.get_close_matches(str(name), list(FLAGS), 1)
      raise UsageError(
        f"{source} has {name!r}, which is no flag; {f'{near[0]} is one.' if near else ''} "
        "--help lists all."
      )
    if FLAGS[name].present or (name in LENGTHS and any(FLAGS[x].present for x in LENGTHS)):
      continue
    extra += [f"--{name}={_text(name, x)}" for x in _values(name, value, source)]
  _given[:0] = extra
  reset()
  try:
    _read(_given)
  except flags.Error as e:
    raise UsageError(f"{source}: {e}") from e


def set_flags() -> dict[str, Any]:
  """Those that were given, by the command line or a file."""
  found = FLAGS.flag_values_dict()
  return {name: found[name] for name in sorted(FLAGS) if FLAGS[name].present}


def reset():
  """All flags at their defaults."""
  FLAGS.unparse_flags()
  for name in FLAGS:
    FLAGS[name].unparse()


def read_config(path: Path) -> dict[str, Any]:
  """Settings of a file; of a video's JSON file those that the video was made with."""
  found = read_yaml(path)
  if isinstance(found, dict) and "resumed_from" in found:
    raise UsageError(
      f"{path} is of a video that went on with a stream, which flags alone do not make again; use "
      "that of its first part."
    )
  if isinstance(found, dict) and isinstance(found.get("flags"), dict):
    found = {k: v for k, v in found["flags"].items() if k not in PLACES}
  if not isinstance(found, dict):
    raise UsageError(f"{path} holds no settings; give lines such as `size: 832x480`.")
  return found


def read_yaml(path: Path) -> Any:
  """What a YAML or JSON file holds; UsageError with the line of what is wrong."""
  text = read_text(path)
  try:
    return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
  except json.JSONDecodeError as e:
    raise UsageError(f"{path}, line {e.lineno}, is no JSON: {e.msg}.") from e
  except yaml.YAMLError as e:
    raise UsageError(yaml_sentence(path, e)) from e
  except (ValueError, RecursionError) as e:  # a date that is none, or thousands of brackets
    raise UsageError(f"{path} cannot be read: {e}.") from e


def yaml_sentence(path: Path, error: yaml.YAMLError) -> str:
  """What is wrong with a YAML file, and in which line."""
  mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
  line = f", line {mark.line + 1}," if mark else ""
  return f"{path}{line} is no YAML: {problem or error}."


def read_text(path: Path) -> str:
  """A file's text; UsageError if it cannot be read."""
  try:
    return path.read_text(encoding="utf-8-sig")
  except OSError as e:
    raise UsageError(f"{path} cannot be read ({e.strerror}); give a text file.") from e
  except UnicodeDecodeError as e:
    raise UsageError(f"{path} is no UTF-8 text ({e.reason}); give a text file.") from e


def _read(argv: Sequence[str]):
  rest = FLAGS(["sample", *argv])[1:]
  if rest:
    raise UsageError(f'{rest[0]!r} is no flag; prompts are given as --prompt="...".')


def _values(name: str, value: Any, source: str) -> list[Any]:
  """One or more values of a flag; UsageError on what is none."""
  if value is None:
    return []
  several = isinstance(FLAGS[name], flags.MultiFlag)
  values = value if isinstance(value, list) else [value]
  if any(isinstance(x, (dict, list)) for x in values):
    raise UsageError(f"{source}: the setting {name!r} is nested; give one value or a list.")
  if isinstance(FLAGS[name].parser, flags.ListParser):
    return [",".join(map(str, values))]
  if len(values) > 1 and not several:
    raise UsageError(f"{source}: there are {len(values)} values of {name!r}; give one.")
  if any(isinstance(x, bool) for x in values) and not FLAGS[name].boolean:
    raise UsageError(
      f"{source}: the setting {name!r} is {values[0]}; put it in quotes if that is a word."
    )
  return values


def _text(name: str, value: Any) -> str:
  if isinstance(value, bool):
    return str(value).lower()
  whole = isinstance(value, float) and value.is_integer() and FLAGS[name].flag_type() == "int"
  return str(int(value) if whole else value)
