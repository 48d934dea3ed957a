"""Errors that a user can cause. Each message is one line: the value, the rule it breaks, the remedy."""

# What torch and NumPy say of memory that is not there, or could not be anywhere, without a class for it.
_OUT_OF_MEMORY = (
    *("can't allocate memory", "out of memory", "Storage size calculation overflowed"),
    *("Maximum allowed dimension exceeded", "array is too big"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, of host or device memory."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


class MoeppError(Exception):
    """Base of every error that a user can cause; printed as one line, without a traceback.

    ``exit_code`` is what train.py exits with. All ranks end with the same error, and the first one prints it;
    ``said_here`` is set where this rank prints it as well, because its own log must not be empty, and ``cannot_meet``
    where it is the place of meeting that is wrong, so that no rank waits for another before it leaves.
    """

    exit_code = 2
    said_here = False
    cannot_meet = False


class ConfigError(MoeppError, ValueError):
    """A configuration value, or a combination of values, that cannot work."""


class UnknownPartError(ConfigError):
    """A configuration names a part that nothing has registered."""


class PluginError(ConfigError):
    """A stored configuration names a part whose module was not given."""


class LaunchError(ConfigError):
    """The launcher's variables, or the processes it started, cannot make up a run; each rank that sees it says it."""

    said_here = True


class VersionError(ConfigError):
    """A Python or a package that is too old for this project, or missing; each rank says it."""

    said_here = True


class DataError(MoeppError):
    """Missing, corrupt, empty or unsuitable training data, tokenizer or corpus."""


class RunError(MoeppError):
    """A run directory that cannot be used: occupied, not writable, or not a run."""


class CheckpointError(MoeppError):
    """A checkpoint that is missing, damaged, or does not fit the run."""


class PeerError(MoeppError):
    """Another rank failed; this rank stops with it."""

    exit_code = 5


class TrainingError(MoeppError):
    """Training cannot go on: the loss or the gradient stays broken."""

    exit_code = 4


class EvaluationStopped(MoeppError):
    """A signal came while a model was evaluated; the trainer saves and ends the run as :class:`Preempted`."""


class Preempted(MoeppError):
    """The run was told to stop by a signal and saved its state; schedulers requeue it on this exit code."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class WriteError(MoeppError, OSError):
    """A file or folder that cannot be written; made by moepp.io.files, with the remedy for what the system said.

    Also an OSError with errno, strerror and filename, for those who tell apart what happened.

    Attributes:
        remedy: what to do, without a final stop.
    """

    def __init__(self, number: int, path: str, reason: str, remedy: str) -> None:
        OSError.__init__(self, number, reason, path)
        self.remedy = remedy

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}; {self.remedy}"
