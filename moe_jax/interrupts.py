"""Ctrl-C and SIGTERM end a command at any moment: one line, what was saved, exit code 128 + signal.

Python's default, KeyboardInterrupt, prints a traceback from wherever the command is, and does not
come while XLA compiles. It also shuts the interpreter down while threads of XLA, Orbax and Grain
run, which sometimes causes a segmentation fault. A command leaves no unfinished file that the next
start does not replace, so it ends at once, by `os._exit`. While training has a step to save, that
is deferred (`deferring`).

This applies only to commands: `import moe_jax` in a program leaves its signals alone.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
COMMANDS = ("-m", "moe-jax")  # sys.argv[0] while `python -m moe_jax.NAME` starts, and of the script
SHOW_CURSOR = "\x1b[?25h"  # which a progress bar hides
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)

# A stop may reach a process twice: a scheduler signals all processes, and a sweep forwards it.
SAME_SECONDS = 0.5

# The process ID of the sweep or study that started this process.
PARENT = "MOE_JAX_PARENT"
PARENT_SECONDS = 0.5  # between two looks at whether it lives

_caught = False
_lock = threading.RLock()  # a handler may interrupt a handler
_ending_since: float | None = None
_unsaved: Callable[[], bool] | None = None
_deferred_since: float | None = None
_left_to_handlers = False
_before_end: Callable[[], str] | None = None


def catch_in_command() -> None:
    """Installs the handlers, if this process is a command; before anything slow is imported."""
    global _caught
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    if name not in COMMANDS or threading.current_thread() is not threading.main_thread():
        return
    _caught = True
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: end_by(number))
    # The handlers wait for the main thread to return from XLA; this thread does not.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="interrupts", daemon=True).start()
    threading.excepthook = _end_by_error_of_thread
    sys.excepthook = _print_unless_late


def end_with_parent() -> None:
    """Has this process stopped by SIGTERM once the sweep or study that started it is dead.

    A parent that gets a signal stops its jobs itself. This is for a parent that was killed
    (SIGKILL, no memory): started again, it would find its runs still training.
    """
    parent = os.environ.pop(PARENT, "")  # removed: processes that this one starts have another
    if parent:
        threading.Thread(target=_watch_parent, args=(int(parent),), daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _watch(reader: int) -> None:
    while numbers := os.read(reader, 1):
        _take(numbers[0], time.monotonic())


def _take(number: int, now: float) -> None:
    """Ends the process by a signal that just came, unless the handler is to do that."""
    global _deferred_since
    # During training, SIGHUP has a Python handler, and comes here too.
    if number not in (*SIGNALS, signal.SIGHUP) or _left_to_handlers:
        return
    unsaved = _unsaved  # another thread may reset it meanwhile
    if unsaved is None or not unsaved():
        end_by(number)
    elif _deferred_since is None:
        _deferred_since = now
    elif now - _deferred_since > SAME_SECONDS:
        end_by(number)


def are_watched() -> bool:
    """Whether a thread handles signals as they come, even while the main thread is in XLA."""
    return _caught


def end_by(number: int) -> None:
    """Ends the process, with a line on standard error that names the signal.

    A second signal ends the wait for a running save. The handler and `_watch` both call this for
    each signal: calls within `SAME_SECONDS` count as one signal.
    """
    global _ending_since
    now = time.monotonic()
    with _lock:
        first, since = _ending_since is None, _ending_since or now
        _ending_since = since
    if not first:
        if now - since > SAME_SECONDS:
            os._exit(128 + number)
        return
    with contextlib.suppress(Exception):
        message = said_before_end()
        message = f"stopped by {signal.Signals(number).name}" + (f"; {message}" if message else "")
        show = SHOW_CURSOR if sys.stderr.isatty() else ""
        os.write(2, f"{show}\n{message}\n".encode())
    os._exit(128 + number)


def _print_unless_late(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    """Prints an exception, except that of a write that ends after its save has failed.

    TensorStore then calls back, from its own thread, into an event loop that Orbax has closed. The
    failed save is reported in one line.
    """
    late = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    if not late:
        sys.__excepthook__(kind, error, trace)


def _end_by_error_of_thread(failed: threading.ExceptHookArgs) -> None:
    """Ends the process if a third-party thread cannot write to the disk.

    TensorBoard's event writer is such a thread: after it dies, adding an event blocks. Other
    errors, such as a tracker's broken connection, end only their thread.
    """
    error = failed.exc_value
    if not isinstance(error, OSError) or error.errno not in DISK_ERRORS:
        threading.__excepthook__(failed)
        return
    message = [f"error: {error}"]
    with contextlib.suppress(Exception):
        message += [text for text in [said_before_end()] if text]
    os.write(2, ("\n" + "; ".join(message) + "\n").encode())
    _end(1)


@contextlib.contextmanager
def deferring(unsaved: Callable[[], bool]) -> Iterator[None]:
    """Leaves the first signal in this block to its handler, if `unsaved()` is true when it comes.

    Signals within `SAME_SECONDS` count as the same one. A later one ends the process.
    """
    global _unsaved, _deferred_since
    _unsaved, _deferred_since = unsaved, None
    try:
        yield
    finally:
        _unsaved = None


@contextlib.contextmanager
def left_to_handlers() -> Iterator[None]:
    """Leaves every signal in this block to its handler, as a process that ends others needs."""
    global _left_to_handlers
    _left_to_handlers = True
    try:
        yield
    finally:
        _left_to_handlers = False


def say_before_end(text: Callable[[], str]) -> None:
    """Sets the function whose text is printed before an exit by signal or error; it may wait."""
    global _before_end
    _before_end = text


def said_before_end() -> str:
    """The text of the function that `say_before_end` set; "" if none is set."""
    return "" if _before_end is None else _before_end()


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Ends a failed command without waiting for third-party threads, which may never end."""
    try:
        yield
    except SystemExit as end:
        if not _caught or end.code in (None, 0):
            raise
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        _end(end.code if isinstance(end.code, int) else 1)
    except Exception:
        if not _caught:
            raise
        traceback.print_exc()
        _end(1)


def _end(code: int) -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(Exception):
        sys.stderr.flush()
    os._exit(code)
