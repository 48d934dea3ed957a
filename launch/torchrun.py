"""torchrun, but with the exit code of the training processes, and one line where torchrun prints a traceback.

torchrun itself ends with 1 whatever its processes end with. Schedulers need to tell apart a run that was stopped by a
signal and has saved (75), a wrong configuration (2) and a crash.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import parse_args, run

EXIT_NO_MEETING = 5  # as train.py ends when other ranks are missing
EXIT_BAD_OPTION = 2


def main() -> int:
    """Run torchrun with the command line's arguments; returns the exit code."""
    with _folder() as folder:
        codes = Path(folder, "codes") if folder is not None else None
        if codes is not None:
            os.environ["MOEPP_EXIT_CODES"] = str(codes)  # train.py leaves its exit code there
        args = parse_args(sys.argv[1:])
        try:
            run(args)
            return 0
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            code = failure.exitcode
            if code < 0:
                return _say(128 - code, f"rank {rank} was ended by {signal.Signals(-code).name}")
            return code
        except SignalException as error:
            # torchrun has passed the signal on and waited for its processes.
            saved = _codes_in(codes)
            if saved:
                return max(saved, key=saved.count)
            saving = "the processes have saved nothing" if codes is not None else "their logs tell what was saved"
            return _say(128 + error.sigval, f"ended by {error.sigval.name}; {saving}")
        except RendezvousError as error:
            place = args.rdzv_endpoint or "this host"
            return _say(
                EXIT_NO_MEETING, f"the hosts did not meet at {place}: {_one_line(error)}; check that all started"
            )
        except (ValueError, RuntimeError) as error:
            return _say(EXIT_BAD_OPTION, _one_line(error))
        except OSError as error:  # torchrun itself keeps temporary files
            remedy = "; set TMPDIR to a folder that you may write to" if folder is None else ""
            return _say(EXIT_BAD_OPTION, f"{_one_line(error)}{remedy}")


@contextlib.contextmanager
def _folder() -> Iterator[str | None]:
    """Yield a temporary folder, or None where there is no place for one: exit codes of signals are lost then."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="moepp-launch-")
    except OSError:
        os.environ.pop("MOEPP_EXIT_CODES", None)
        yield None
        return
    with folder as name:
        yield name


def _codes_in(path: Path | None) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path is not None and path.exists() else []


def _say(code: int, message: str) -> int:
    print(f"[torchrun] error: {message}", file=sys.stderr, flush=True)
    return code


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


if __name__ == "__main__":
    sys.exit(main())
