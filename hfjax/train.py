"""Trains video models: `python -m hfjax.train --config=configs/stage2.py --workdir=DIR`.

A run that was stopped, by Ctrl-C, SIGTERM or otherwise, goes on with the same command, with the
same numbers as if it had not been. --config.init=DIR begins with the weights of another run.
On several hosts, set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each.

Exit status: 0 if all is well, also after SIGTERM; 1 if training had to stop; 2 if the command makes
no sense; 130 after Ctrl-C, and when it was stopped at once.
"""

import os
import signal
import sys
import traceback

_PROCESSES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def main(argv: list[str] | None = None) -> int:
  """Command line; the exit status."""
  argv = sys.argv[1:] if argv is None else argv
  from hfjax.convert import CheckpointError  # takes seconds
  from hfjax.data.rejects import DataError
  from hfjax.training import config, dry_run, loop, plan
  from hfjax.training.checkpoints import CheckpointFailed, CheckpointMismatch
  from hfjax.training.metrics import MetricsError

  try:
    _join()
    options = config.parse(argv, __doc__ or "")
    made = plan.make_plan(options.config)
    if options.dry_run:
      dry_run.dry_run(made, print)
      return 0
    return loop.train(made, options.workdir, options.quiet)
  except (config.ConfigError, CheckpointMismatch, MetricsError) as e:
    return _fail(e, 2, argv)
  except (CheckpointError, DataError, CheckpointFailed, loop.TrainingStopped) as e:
    return _fail(e, 1, argv)
  except ValueError as e:
    return _fail(e, 2, argv)
  except OSError as e:
    where = f" ({e.filename})" if e.filename else ""
    words = f"{e.strerror or e}{where}; mend that, and the same command goes on."
    return _fail(RuntimeError(words), 1, argv)
  except KeyboardInterrupt:
    print("train: stopped at once; what was saved before is whole.", file=sys.stderr, flush=True)
    return 130
  except Exception as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    words = (
      "The device is out of memory; --dry_run tells what is needed. Take a smaller batch or more "
      "parts of it (accumulate), more devices, text.device=cpu, or a smaller teacher."
    )
    return _fail(RuntimeError(words), 1, argv)


def _join():
  """Joins the other processes of a run, where the environment tells of them."""
  from hfjax.training.config import ConfigError

  told = {name: os.environ.get(name) for name in _PROCESSES}
  if not any(told.values()):
    return
  address, count, number = told.values()
  if not (address and (count or "").isdecimal() and (number or "").isdecimal()):
    raise ConfigError(
      f"A run of several processes needs {', '.join(told)}, the last two as numbers; they are "
      f"{', '.join(map(str, told.values()))}."
    )
  import jax

  jax.distributed.initialize(address, int(count or 0), int(number or 0))


def _fail(error: Exception, status: int, argv: list[str]) -> int:
  if "--debug" in argv:
    traceback.print_exception(error)
  print(f"train: {error}", file=sys.stderr, flush=True)
  return status


if __name__ == "__main__":
  # Until there is something to keep, both end the process at once.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  sys.exit(main())
