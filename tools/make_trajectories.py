"""Makes trajectories of a teacher: `python tools/make_trajectories.py --weights DIR --prompts FILE
--out DIR`.

For each prompt a transformer leads noise to clean latents; its states at the times of the student's
steps are written, for the student to be begun with. A bidirectional one does so at once, a causal
one chunk by chunk (--chunk 3). What is cut short goes on with the same command. On several GPUs or
machines, call it once for each, with --process 0/4 to 3/4.

--import_lmdb DIR, instead of --weights and --prompts, takes what Self-Forcing's trainers wrote.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hfjax.data import command
from hfjax.data.rejects import DataError

NAME = "make_trajectories"


def make(args: argparse.Namespace, options: dict):
  from hfjax.data import contexts, trajectories
  from hfjax.data.loading import open_source
  from hfjax.streaming.stream import NEGATIVE

  if args.weights is None or args.prompts is None:
    raise DataError("There are no --weights or no --prompts; give both, or --import_lmdb.")
  columns, rows = command.size(args.size)
  if columns % 16 or rows % 16:
    raise DataError(f"The size is {args.size}; give multiples of 16.")
  source = open_source("prompts", args.prompts, on_bad=args.on_bad)
  sizes = (args.frames, rows // 8, columns // 8)
  recipe = lambda channels: trajectories.Recipe(
    (*sizes, channels), command.numbers(args.steps), args.teacher_steps, args.shift, args.guidance,
    args.seed, args.chunk, tuple(args.guidance_interval),
  )  # fmt: skip
  recipe(1)  # checked before the weights are loaded
  encode = contexts.text_encoder(args.weights, args.dtype)
  config, params = trajectories.load_teacher(args.weights, args.dtype)
  negative = NEGATIVE if args.negative_prompt is None else args.negative_prompt
  led = recipe(config.out_dim)
  trace = trajectories.tracer(
    config, params, led, None if args.guidance == 1 else encode([negative]), args.dtype
  )
  has_context = contexts.has_contexts(source)
  return trajectories.write(
    args.out, source, None if has_context else encode, trace, led, batch=args.batch,
    with_context=args.with_context, model=f"{contexts.fingerprint(params)} {args.dtype}",
    negative=negative, count=args.count, **options,
  )  # fmt: skip


def take_over(args: argparse.Namespace, options: dict):
  from hfjax.data import lmdb_pairs

  steps = command.numbers(args.steps)
  return lmdb_pairs.write(args.out, args.import_lmdb, steps=steps, shift=args.shift, **options)


def main(argv: list[str] | None = None) -> int:
  """Command line; the exit status."""
  argv = sys.argv[1:] if argv is None else argv
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flag = parser.add_argument
  flag("--weights", metavar="DIR", help="folder, repository of the Hub, or random:NAME")
  flag("--prompts", metavar="FILE", help=".txt, .jsonl or .csv, or a folder of embed_prompts.py")
  flag("--import_lmdb", metavar="DIR", help="folder of LMDB to take over")
  flag("--count", type=int, help="only so many prompts")
  flag("--frames", type=int, default=21, help="latent frames")
  flag(
    "--chunk", type=int, default=0, help="frames of a chunk of a causal teacher; 0 if it is none"
  )
  flag("--size", default="832x480", help="columns and rows of pixels, multiples of 16")
  flag("--steps", default="1000,750,500,250", help="the student's denoising steps")
  flag("--teacher_steps", type=int, default=48, help="Euler steps of the teacher")
  flag("--shift", type=float, default=5.0, help="time shift of teacher and student")
  flag("--guidance", type=float, default=5.0, help="of the teacher; 1 for none")
  flag("--guidance_interval", type=float, nargs=2, default=(0.0, 1000.0), metavar=("FROM", "TO"),
       help="times between which there is guidance; all by default")  # fmt: skip
  flag("--negative_prompt", help="what guidance keeps away from; has a default")
  flag("--seed", type=int, default=0, help="of the noise")
  flag("--batch", type=int, default=1, help="trajectories that are made at once")
  flag("--with_context", action="store_true", help="keeps text contexts too")
  flag("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
  command.add_flags(parser)
  args = parser.parse_args(argv)

  def act():
    options = command.options(args, NAME, argv, "trajectories")
    return (make if args.import_lmdb is None else take_over)(args, options)

  return command.run(NAME, act)


if __name__ == "__main__":
  sys.exit(main())
