# SPDX-License-Identifier: Apache-2.0
"""Starts the program on some ranks, ends it if it hangs, and tells its output from the launcher's."""

import dataclasses
import json
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import threading
import time
import uuid

PROGRAM = ""
LAUNCHER = []

# A run of a tiny deck takes less than a second. Instrumented code is slower, and its shadow memory
# exceeds every limit of address space.
SANITIZED = "UBSAN_OPTIONS" in os.environ
SECONDS = 120 if SANITIZED else 30
ADDRESS_SPACE = None if SANITIZED else 4 << 30

# What Open MPI 5 and 4 say of a program that ends with a status other than 0, between two rules;
# and complaints of Open MPI 5's launcher when ranks end while it ends them, whatever they run.
BANNER = re.compile(
    r"^-{20,}\n(?:\w+ detected that one or more processes exited with non-zero status"
    r"|Primary job +terminated normally, but \d+ process(?:es)? returned)(?:.*\n)*?-{20,}\n"
    r"|^\[warn\] Epoll .*\n|^\[.+:\d+\] PMIX ERROR: .* in file .*/pmix_server\.c .*\n",
    re.M,
)


@dataclasses.dataclass(frozen=True)
class Result:
    status: int  # None: it hung and was ended
    stdout: str
    stderr: str  # without the launcher's banner
    seconds: float

    def __str__(self):
        return f"status {self.status} after {self.seconds:.1f} s\n{self.stdout}\n{self.stderr}"


def slice_of(words):
    """((I, N), the other words) of `--slice I/N word ...`; (0, 1) where there is none."""
    if words[:1] != ["--slice"]:
        return (0, 1), words
    index, count = map(int, words[1].split("/"))
    if not 0 <= index < count:
        raise SystemExit(f"--slice: expected I/N with I from 0 to N - 1, found {words[1]}")
    return (index, count), words[2:]


def run(*words, ranks=1, seconds=None, folder=None, environment=None, output=None):
    """Runs `mics word ...`; one rank without a launcher. Standard output goes to the file `output`."""
    launch = LAUNCHER + ["-n", str(ranks)] if ranks > 1 else []
    command = launch + [PROGRAM, *map(os.fspath, words)]
    if output:
        command = ["sh", "-c", 'exec "$@" >"$0"', os.fspath(output), *command]
    return _execute(command, seconds, folder, environment)


def run_on_two(first, second, memory_of_second=None):
    """Runs `mics` with the words `first` on rank 0 and `second` on rank 1, which may have a limit in
    KiB. By way of sh, as Open MPI 5.0's `mpirun ... : ...` can crash."""
    first = [PROGRAM, *map(os.fspath, first)]
    second = [PROGRAM, *map(os.fspath, second)]
    if memory_of_second:
        second = ["sh", "-c", f'ulimit -v {memory_of_second}; exec "$@"', "sh", *second]
    # The words of rank 1 come first; rank 0 skips them.
    script = (
        'n=$1; shift; case "${OMPI_COMM_WORLD_RANK:-$PMI_RANK}" in 0) shift $n; exec "$@";; esac; '
        "exec " + " ".join(f'"${{{i + 1}}}"' for i in range(len(second)))
    )
    command = ["sh", "-c", script, "sh", str(len(second)), *second, *first]
    return _execute(LAUNCHER + ["-n", "2"] + command, None, None, None)


def run_beside_a_stranger(words, stranger, environment=None):
    """Runs `mics` with these words on rank 0 and a command of the shell, which knows no MPI, on rank 1."""
    script = (
        'case "${OMPI_COMM_WORLD_RANK:-$PMI_RANK}" in 0) exec "$@";; esac; exec ' + stranger
    )
    command = ["sh", "-c", script, "sh", PROGRAM, *map(os.fspath, words)]
    return _execute(LAUNCHER + ["-n", "2"] + command, None, None, environment)


def run_in_terminal(*words, ranks=1):
    """The same with a pseudo-terminal as standard output: (status, what it showed)."""
    leader, follower = os.openpty()
    launch = LAUNCHER + ["-n", str(ranks)] if ranks > 1 else []
    process = subprocess.Popen(
        launch + [PROGRAM, *map(os.fspath, words)],
        stdin=subprocess.DEVNULL,
        stdout=follower,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(follower)
    killer = threading.Timer(SECONDS, lambda: os.killpg(process.pid, signal.SIGKILL))
    killer.start()
    shown = b""
    try:
        while chunk := os.read(leader, 1 << 16):
            shown += chunk
    except OSError:  # how Linux tells that the last writer has closed it
        pass
    status = process.wait()
    killer.cancel()
    os.close(leader)
    return status, shown.decode(errors="replace")


def _execute(command, seconds, folder, environment):
    # Open MPI 5's launcher can hang after the last rank of a failed job has ended, even if the ranks
    # are `sh -c "exit 1"`; that run is repeated.
    for _ in range(5):
        result = _execute_once(command, seconds or SECONDS, folder, environment)
        if result:
            return result
    raise RuntimeError(f"the launcher hangs or does not start: {command}")


def _execute_once(command, seconds, folder, environment):
    """None if the launcher hung, or did not start, and not the program."""
    mark = str(uuid.uuid4())
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd=folder,
        env=dict(os.environ, **(environment or {}), MICS_TEST_RUN=mark),
        preexec_fn=_limit_memory,
    )
    looks_without_rank = 0
    while True:
        try:
            stdout, stderr = process.communicate(timeout=1)
            status = process.returncode
            break
        except subprocess.TimeoutExpired:
            looks_without_rank = 0 if _is_alive(mark) else looks_without_rank + 1
            if looks_without_rank < 5 and time.monotonic() - start < seconds:
                continue
            _kill(mark)
            stdout, stderr = process.communicate()
            status = None
            if looks_without_rank:
                return None
            break
    if b"prte_init" in stderr:  # it did not start: the folder of an older launcher has its number
        return None
    return Result(
        status,
        stdout.decode(errors="backslashreplace"),
        BANNER.sub("", stderr.decode(errors="backslashreplace")),
        time.monotonic() - start,
    )


def _processes(mark):
    """Those of one run: Open MPI's launcher gives its ranks process groups of their own."""
    for folder in pathlib.Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                yield int(folder.name), os.path.realpath(folder / "exe")
        except OSError:
            pass  # it has ended, or is another user's


def _is_alive(mark):
    return any(program == os.path.realpath(PROGRAM) for _, program in _processes(mark))


def _kill(mark):
    for pid, _ in list(_processes(mark)):
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass


def _limit_memory():
    """A defect must not take the machine's memory."""
    if ADDRESS_SPACE:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))


def write_text(path, words=3000):
    """A text that a small model learns something of: words in random order."""
    choice = random.Random(1)
    vocabulary = "sharded state gathers a unit of the model before use ranks reduce nodes".split()
    text = "".join(choice.choice(vocabulary) + choice.choice("  \n") for _ in range(words))
    path.write_text(text)


def good_deck(**training):
    """A deck that trains in a moment."""
    return {
        "model": {"layers": 1, "heads": 2, "width": 16, "positions": 8},
        "data": {"files": ["text.txt"], "validation_windows": 16},
        "training": {"steps": 3, "print_every": 1, **training},
        "engine": {
            "train_batch_size": 12,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.003}},
            "zero_optimization": {"stage": 3},
        },
    }


def edited(changes=None, **training):
    """The text of a good deck with other values: {"model.width": 15}; a value ... removes the key."""
    deck = good_deck(**training)
    for path, value in (changes or {}).items():
        *outer, key = path.split(".")
        node = deck
        for name in outer:
            node = node.setdefault(name, {})
        if value is ...:
            del node[key]
        else:
            node[key] = value
    return json.dumps(deck, indent=1)
