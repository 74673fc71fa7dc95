"""Runs Python in a child process that has everything imported already: a fork of this one."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback

import torch


def run_python(program, *arguments, folder=None, environment=(), timeout=120):
    """Runs the source text ``program`` in a process of its own, whose end leaves the tests alone, however it ends.

    It is forked, because importing torch takes seconds; where there is a GPU, whose driver does not outlive a fork, a
    new interpreter starts.

    Args:
        program: what ``python -c`` would be given.
        arguments: its ``sys.argv[1:]``.
        folder: where it runs.
        environment: environment variables to set.
        timeout: seconds until it is killed.

    Returns:
        A ``subprocess.CompletedProcess``, stdout and stderr together in its ``stdout``.
    """
    with tempfile.TemporaryFile() as output:
        if torch.cuda.is_available():
            command = [sys.executable, "-c", program, *arguments]
            variables = {**os.environ, **dict(environment)}
            options = {"cwd": folder, "env": variables, "timeout": timeout, "stdout": output, "stderr": output}
            status = subprocess.run(command, **options).returncode
        else:
            sys.stdout.flush()
            sys.stderr.flush()
            process = os.fork()
            if process == 0:
                _carry_out(program, arguments, folder, environment, output.fileno())
            status = _wait(process, timeout)
        output.seek(0)
        return subprocess.CompletedProcess(program, status, output.read().decode(errors="replace"))


def _carry_out(program, arguments, folder, environment, output):
    """In the child; does not return."""
    status = 1
    try:
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
        os.environ.update(environment)
        os.chdir(folder or os.getcwd())
        sys.argv = ["-c", *arguments]
        torch.set_num_threads(1)  # the threads of the pool are not forked
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(process, timeout):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise subprocess.TimeoutExpired("a child process", timeout)
