"""What surrounds a rehearsed step, and what an exception in it means: the code that trains ends there, and a start
would too; or tensors without data are not enough for it, and nothing is known."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from common.errors import ConfigError, UserError
from common.replaced import items_replaced


class StepStops(ConfigError):
    """The step that trains would end in an exception."""


class CannotRehearse(UserError):
    """A limit of rehearsals, or of this machine; a real step may well run."""


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turns what a rehearsal inside raises into StepStops or CannotRehearse, a sentence each; a UserError stays.
    DeepSpeed, which is to be imported inside, looks for no device: it would warn that there is none, or take memory of
    a run's GPU. What it and torch say of their own code is not shown, or goes to stderr."""
    loggers = [logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", "DeepSpeed")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with (
            items_replaced(os.environ, {"DS_ACCELERATOR": "cpu"}),
            contextlib.redirect_stdout(sys.stderr),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        words = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
        if is_limit(error):
            raise CannotRehearse(f"step: it cannot be rehearsed on tensors without data ({words})") from error
        raise StepStops(
            f"step: the code that trains ends in a rehearsed step, as it would in a run: {words}; change the setting "
            f"that it means (launch/smoke.py runs real steps on this machine)"
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def is_limit(error: Exception) -> bool:
    """Whether it comes of how steps are rehearsed: a value that only a device could know, an operator that has no rule
    for tensors without data, or what this machine lacks."""
    if isinstance(error, (NotImplementedError, MemoryError, OSError)):
        return True
    # RELIES-ON torch-fake
    is_of_fake_tensors = type(error).__module__ == "torch._subclasses.fake_tensor"
    return is_of_fake_tensors or any(word in str(error) for word in ("FakeTensor", "fake tensor", "tensor subclasses"))
