"""A program in any language as an implementation: one process for all cases, JSON lines on its stdin and stdout.

    -> {"cmd": "start", "protocol": 1}
    <- {"protocol": 1, "name": "mylib", "version": "1.2", "dtypes": ["float32"]}
    -> {"cmd": "run", "seq": 7, "case": "/x/lora-linear-plain.json", "dtype": "float32", "out": "/y/7.safetensors"}
    <- {"seq": 7, "status": "ok"}                                       after it has written its outputs to `out`
       {"seq": 7, "status": "not implemented", "reason": "no DoRA"}
       {"seq": 7, "status": "error", "message": "..."}
    -> {"cmd": "stop"}

Whatever it does, the run goes on: where it dies, hangs or prints anything else, that case is an error and a new process
is asked for the next. After ten such cases in a row it is not asked again.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

from ..errors import RefpeftError
from . import tensors
from .vectors import DTYPES, Arrays, Case

PROTOCOL = 1
_LONGEST_LINE = 1 << 20  # characters of an answer
_MOST_UNREAD = 10  # lines; one that nobody asked for is wrong already
_MOST_LOST = 10
_START = 60.0  # seconds


class ProgramError(RuntimeError):
    """The program gave no answer to a case."""


class Program:
    """The program behind a command line, started at once. A context manager, which ends it.

    `timeout` is how many seconds it has for an answer; for the first, in which it may load much, at least a minute.
    Raises RefpeftError where it cannot be started, or does not say who it is.
    """

    def __init__(self, command: str, timeout: float = 60.0):
        try:
            self.command, self.timeout = shlex.split(command), timeout
        except ValueError as error:
            raise RefpeftError(f"{command}: not a command line: {error}") from None
        self._folder = tempfile.TemporaryDirectory(prefix="refpeft-conform-")
        self._process: _Process | None = None
        self._seq = self._lost = 0
        try:
            who = self._started()
        except ProgramError as error:
            self._folder.cleanup()
            raise RefpeftError(f"{command}: {error}") from None
        self.name, self.version, self.dtypes = who["name"], who["version"], tuple(who["dtypes"])

    def run(self, case: Case, given: Arrays, dtype: str) -> Arrays:
        """The outputs that it wrote. Raises NotImplementedError as it says, and ProgramError without an answer."""
        if self._lost == _MOST_LOST:
            raise ProgramError(f"it is not asked: it gave no answer to {_MOST_LOST} cases in a row")
        if self._process is None:
            self._started()
        self._seq += 1
        out = Path(self._folder.name) / f"{self._seq}.safetensors"
        request = {"cmd": "run", "seq": self._seq, "case": str(case.path), "dtype": dtype, "out": str(out)}
        answer = self._ask(request, self.timeout)
        try:
            if answer.get("seq") != self._seq:
                self._lose()  # whatever it says from now on may belong to another case
                raise ProgramError(f"it answered to {answer.get('seq')!r} when it was asked {self._seq}")
            self._lost = 0
            status = answer.get("status")
            if status == "not implemented":
                raise NotImplementedError(str(answer.get("reason") or "no reason given"))
            if status == "error":
                raise ProgramError(f"it says: {answer.get('message') or 'no message'}")
            if status != "ok":
                raise ProgramError(f'its status is {status!r}, expected "ok", "not implemented" or "error"')
            return tensors.read(out)
        finally:
            out.unlink(missing_ok=True)

    def close(self) -> None:
        """Ends the program, by force if it does not end by itself."""
        if self._process:
            self._process.say({"cmd": "stop"})
            self._end(wait=2.0)
        self._folder.cleanup()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _started(self) -> dict[str, Any]:
        """What a new process says of itself."""
        self._process = _Process(self.command)
        who = self._ask({"cmd": "start", "protocol": PROTOCOL}, max(self.timeout, _START))
        problem = _problem_of_introduction(who)
        if problem:
            self._lose()
            raise ProgramError(problem)
        return who

    def _ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to a request. Where there is none the process is over, and ProgramError says why."""
        try:
            return self._process.ask(request, timeout)
        except ProgramError:
            self._lose()
            raise

    def _lose(self) -> None:
        """Gives a process up that does not answer as it should."""
        self._lost += 1
        self._end()

    def _end(self, wait: float = 0.0) -> None:
        process, self._process = self._process, None
        if process:
            process.end(wait)


def _problem_of_introduction(who: dict[str, Any]) -> str | None:
    dtypes = who.get("dtypes")
    if who.get("protocol") != PROTOCOL:
        return f'it speaks protocol {who.get("protocol")!r}, expected {PROTOCOL} in the answer to "start"'
    if not all(isinstance(who.get(member), str) and who[member] for member in ("name", "version")):
        return 'its answer to "start" has no name or no version, expected both as strings'
    if not isinstance(dtypes, list) or not dtypes or not all(dtype in DTYPES for dtype in dtypes):
        return f'its answer to "start" has dtypes {dtypes!r}, expected a list of {", ".join(DTYPES)}'
    return None


class _Process:
    """One process of the program: a group of its own, so that what it starts ends with it."""

    def __init__(self, command: list[str]):
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        try:
            if not command:
                raise FileNotFoundError(2, "no program is named")
            self.process = subprocess.Popen(
                command, **pipes, text=True, encoding="utf-8", errors="replace", start_new_session=True
            )
        except OSError as error:
            self.errors.close()
            raise ProgramError(f"it cannot be started: {error.strerror}") from None
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        """Puts its lines into the queue, and None behind the last.

        Nobody else closes the pipe: that would wait for a line, perhaps of a child that left the group and lives on.
        """
        with self.process.stdout as pipe:
            while (line := pipe.readline(_LONGEST_LINE)) and self.lines.qsize() < _MOST_UNREAD:
                self.lines.put(line)
        self.lines.put(None)

    def say(self, request: dict[str, Any]) -> None:
        with contextlib.suppress(OSError, ValueError):  # it is gone: the missing answer tells
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        self.say(request)
        line = self._line(timeout)
        if line is None:
            raise ProgramError(self._how_it_died())
        try:
            answer = json.loads(line.removeprefix("\ufeff"))  # some languages begin their output with this mark
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise ProgramError(f"it answered {line.strip()[:80]!r}, expected one JSON object on one line")
        return answer

    def _line(self, timeout: float) -> str | None:
        """Its next line; None where it is over, also if what it started holds the pipe open."""
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            over = self.process.poll() is not None
            try:
                return self.lines.get(timeout=min(left, 0.5))
            except queue.Empty:
                if over:
                    return None
        raise ProgramError(f"it gave no answer in {timeout:g} s")

    def _how_it_died(self) -> str:
        try:
            code = self.process.wait(2.0)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self.errors.seek(max(0, self.errors.seek(0, os.SEEK_END) - 10_000))
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"it {how}" + (f": {said[-1].strip()[:300]}" if said else "")

    def end(self, wait: float) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(wait)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.reader.join(0.5)  # the output ends when what it started is over, too
        self.errors.close()
