"""The log file in a run folder; a run does without it where it cannot be written, for the data are what counts."""

from __future__ import annotations

import contextlib
import logging
import sys


class LogFile(logging.FileHandler):
    """As logging's own; what cannot be written is said once, in a sentence, and the next message is tried again.

    Every message is on the terminal, too, or of little interest: nothing that is lost here is lost.
    """

    _said = False

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            super().emit(record)
        except OSError:  # it could not be opened again
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`: called while an error of a message is being handled."""
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        stream, self.stream = self.stream, None  # opened again by the next message
        if stream is not None:
            with contextlib.suppress(OSError):  # the same one: what did not get written is still in its buffer
                stream.close()
        if not self._said:
            self._said = True
            print(f"{self.baseFilename}: {error.strerror or error}; messages are missing there", file=sys.stderr)
