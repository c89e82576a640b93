# SPDX-License-Identifier: Apache-2.0
"""One rank of some misbehaves at one of its calls: faults_test.py AMOUNT CLIENT [LAUNCHER WORD ...]

AMOUNT is quick, full or soak: a few faults drawn with a fixed seed, many, or every kind at every
call of a small run, on every rank, in both layouts. MICS_FAULTS holds other ones, as in
`2 skip:20:2 kill:5:0`: the shard size, then faults. MICS_FAULTS_LANES launches so many at a time.
MICS_FAULTS_RANKS (default 4) is the number of ranks, an even one; MICS_FAULTS_TESTS names tests;
MICS_FAULTS_TIMEOUT (default 1) is the engine's time limit in seconds, MICS_FAULTS_SLACK (default 2)
what may be added to it.

Whatever the fault: the other ranks end in time, with one text that names the rank or what two ranks
did instead of the same; a run in which nobody complains has the right parameters; the job's status
is not 0, and it leaves no process behind. A fault after which the processes live is followed by
another engine in the same job.
"""

import concurrent.futures
import functools
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "program"))
import launch  # noqa: E402

AMOUNT = ""
CLIENT = ""
RANKS = int(os.environ.get("MICS_FAULTS_RANKS", "4"))
LAYOUTS = (RANKS // 2, RANKS)  # shard sizes
SLOWNESS = 5 if launch.SANITIZED else 1
TIMEOUT = float(os.environ.get("MICS_FAULTS_TIMEOUT", "1")) * SLOWNESS  # the engine's, in seconds
# For the agreement on a text, and a busy machine.
SLACK = float(os.environ.get("MICS_FAULTS_SLACK", "2")) * SLOWNESS
LANES = 1  # launches at a time
HARD_LIMIT = 30 * SLOWNESS  # seconds a launch may show no progress

# What a client may do and live on, and how long the others may take to know.
TOLD = {"throw": 0, "unguarded": 0}
NOTICED = {kind: TIMEOUT for kind in ("loop", "skip", "twice", "swap", "resize")}
ENDED = ("kill", "stop", "_exit", "exit", "return")
# Ranks that do differently may do the same in the end: a unit is gathered again while it is still
# there. The client itself compares the parameters.
HARMLESS = {"skip", "twice", "swap", "resize"}

RECOVER = "--enable-recovery"

MICRO_STEP, GATHER, REDUCE, STEP, SUM = range(5)


def fault(kind, index, rank):
    return f"{kind}:{index}:{rank}"


class Job:
    """One launch of the client, and what its ranks reported of each fault."""

    def __init__(self, shard_size, faults, words=(), mode=()):
        self.faults = faults
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="mics_faults_"))
        self.mark = f"mics-faults-{os.getpid()}-{self.folder.name}"
        arguments = [CLIENT, *mode, str(self.folder), str(shard_size), str(TIMEOUT), *faults]
        self.command = launch.LAUNCHER + [*words, "-n", str(RANKS), *arguments]
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
            start_new_session=True,
            env=dict(os.environ, MICS_TEST_RUN=self.mark),
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        launch._kill(self.mark)
        self.process.communicate()
        shutil.rmtree(self.folder)

    def report(self, number, who):
        """(seconds, class, text) that a rank wrote; None if it has not."""
        try:
            words = (self.folder / f"{number}.{who}").read_text().strip().split(" ", 2)
        except FileNotFoundError:
            return None
        return (float(words[0]), *words[1:], "", "")[:3]

    def output(self):
        launch._kill(self.mark)
        return self.process.stdout.read()

    def ranks_alive(self):
        return [pid for pid, program in launch._processes(self.mark) if program == CLIENT]

    def wait_until(self, condition, seconds):
        """False if it did not come true."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def end(self, seconds):
        """The status after the last rank has ended; None if a rank lives on.

        Open MPI 5's launcher can hang after that, whatever it ran: then it is ended, with status -9."""
        started = time.monotonic()
        while self.process.poll() is None:
            if not self.ranks_alive():
                try:
                    self.process.wait(5)
                except subprocess.TimeoutExpired:
                    launch._kill(self.mark)
                    return self.process.wait()
            elif time.monotonic() - started > seconds:
                return None
            else:
                time.sleep(0.05)
        return self.process.returncode if self.wait_until(lambda: not self.ranks_alive(), 3) else None


def shown(job):
    """What was printed, once nothing more is to come."""
    return "" if job.process.poll() is None else job.output()


@functools.cache
def calls():
    """(kind, argument) of all calls of the undisturbed run."""
    lines = subprocess.run([CLIENT, "--calls"], check=True, capture_output=True, text=True).stdout
    return [tuple(map(int, line.split())) for line in lines.splitlines()]


def error_of(check, *arguments):
    """What the check raised, None if it passed."""
    try:
        check(*arguments)
        return None
    except Exception as error:  # shown as that of a subtest
        return error


class Faults(unittest.TestCase):
    longMessage = False

    def drawn(self, kinds, each, seed):
        """(shard size, faults): `each` indices a kind, all of them if 0, ranks by chance."""
        if "MICS_FAULTS" in os.environ:
            shard_size, *faults = os.environ["MICS_FAULTS"].split()
            return [(int(shard_size), [f for f in faults if f.split(":")[0] in kinds])]
        choice = random.Random(seed)
        jobs = []
        indices = range(len(calls()))
        for number, shard_size in enumerate(LAYOUTS):
            faults = []
            for kind in kinds:
                chosen = sorted(choice.sample(indices, each)) if each else indices
                if AMOUNT == "soak":
                    faults += [fault(kind, i, rank) for i in chosen for rank in range(RANKS)]
                else:
                    faults += [fault(kind, i, choice.randrange(RANKS)) for i in chosen]
            jobs.append((shard_size, faults))
        return jobs

    # -- what the ranks said

    def check_reports(self, name, reports, rank, started, limit, silent=False):
        """`silent`: the rank of the fault reports nothing."""
        told = {r: report for r, report in reports.items() if not (silent and r == rank)}
        text = name + "\n" + "\n".join(f"  {r}: {report}" for r, report in reports.items())
        for r, report in told.items():
            self.assertIsNotNone(report, f"rank {r} hangs: {text}")
        if all(report[1] == "ok" for report in told.values()):
            kind, index, _ = name.split()[-1].split(":")
            self.assertIn(kind, HARMLESS, text)
            if kind != "swap":
                self.assertEqual(calls()[int(index)][0], GATHER, text)
            return
        texts = set()
        for r, (seconds, error, line) in told.items():
            if r == rank:
                self.assertNotEqual(error, "ok", text)
            else:
                self.assertEqual(error, "CommError", text)
                self.assertLess(seconds - started, limit, f"rank {r} is late: {text}")
            blamed = re.match(r"rank (\d+): ", line)
            if error == "CommError" or blamed:
                texts.add(line[blamed.end() :] if blamed else line)
        self.assertEqual(len(texts), 1, f"texts differ: {text}")
        # Whom it blames stands in front for everybody else.
        everything = " ".join(line for _, error, line in told.values() if error == "CommError")
        self.assertRegex(everything, rf"\brank {rank}\b", f"rank {rank} is not named: {text}")

    # -- many launches

    def check_all(self, checks):
        """Runs functions that return [(name, error or None)]; most of each one's time is waiting."""
        with concurrent.futures.ThreadPoolExecutor(LANES) as pool:
            for outcome in pool.map(lambda check: check(), checks):
                for name, error in outcome:
                    with self.subTest(name):
                        if error:
                            raise error
                self.assertTrue(outcome)
                print(f"{outcome[0][0]} ... {len(outcome)} done", flush=True)

    def check_living(self, kinds, each, seed):
        """Faults that the processes survive: many in one job, each with a new engine."""
        checks = []
        for shard_size, faults in self.drawn(kinds, each, seed):
            for begin in range(0, len(faults), 40):
                batch = ["none", *faults[begin : begin + 40], "none"]
                checks.append(functools.partial(self.outcomes_of_batch, shard_size, batch))
        self.check_all(checks)

    def outcomes_of_batch(self, shard_size, faults):
        outcomes = []
        with Job(shard_size, faults) as job:

            def reported(number):
                return all(job.report(number, r) for r in range(RANKS))

            for number, what in enumerate(faults):
                job.wait_until(
                    lambda: reported(number) or job.process.poll() is not None, HARD_LIMIT
                )
                name = f"p={shard_size} {what}"
                outcomes.append((name, error_of(self.check_survived, job, number, name)))
                if not reported(number):
                    break  # the ranks meet no more
            outcomes.append((f"p={shard_size} end", error_of(self.check_end, job)))
        return outcomes

    def check_survived(self, job, number, name):
        reports = {r: job.report(number, r) for r in range(RANKS)}
        what = job.faults[number]
        if what == "none":
            for report in reports.values():
                self.assertEqual(report and report[1], "ok", f"{name} {reports}\n{shown(job)}")
            return
        kind, _, rank = what.split(":")
        started = (job.report(number, "fault") or (0,))[0]
        limit = {**TOLD, **NOTICED}[kind] + SLACK
        if kind in NOTICED:
            # From the first rank that waits: mics knows no wrong call before.
            limit += TIMEOUT
        self.check_reports(name, reports, int(rank), started, limit)

    def check_end(self, job):
        status = job.end(HARD_LIMIT)
        self.assertIsNotNone(status, f"ranks live on: {job.faults}")
        self.assertNotEqual(status, 0, f"{job.faults}\n{shown(job)}")

    # -- tests

    def test_exceptions(self):
        self.check_living(TOLD, {"quick": 2, "full": 6, "soak": 0}[AMOUNT], 1)

    def test_wrong_calls(self):
        self.check_living(NOTICED, {"quick": 1, "full": 4, "soak": 0}[AMOUNT], 2)

    def check_ended(self, kinds, words, each, seed, limit):
        checks = []
        for shard_size, faults in self.drawn(kinds, each, seed):
            for what in faults:
                name = f"p={shard_size} {' '.join(words)} {what}"
                check = functools.partial(
                    self.check_process_that_ends, name, shard_size, what, words, limit
                )
                checks.append(lambda name=name, check=check: [(name, error_of(check))])
        self.check_all(checks)

    def check_process_that_ends(self, name, shard_size, what, words, limit):
        rank = int(what.split(":")[2])
        others = [r for r in range(RANKS) if r != rank]
        with Job(shard_size, [what], words) as job:
            job.wait_until(
                lambda: all(job.report(0, r) for r in others) or job.process.poll() is not None,
                HARD_LIMIT,
            )
            reports = {r: job.report(0, r) for r in range(RANKS)}
            started = job.report(0, "fault")
            if started is None:
                job.end(0)
                self.fail(f"the fault was not reached: {name}\n{job.output()}")
            self.check_reports(name, reports, rank, started[0], limit, silent=True)
            status = job.end(HARD_LIMIT)
            self.assertIsNotNone(status, f"processes live on: {name}")
            if RECOVER not in words:
                self.assertNotEqual(status, 0, name)

    def each(self):
        return {"quick": 1, "full": 2, "soak": 0}[AMOUNT]

    # Open MPI's launcher ends all ranks when one dies or exits early; told to recover, it leaves them
    # their own diagnosis. Its own status is 0 then in some versions, 4.1.6 for one.

    def test_killed_rank(self):
        self.check_ended(["kill"], [RECOVER], self.each(), 3, TIMEOUT + SLACK)

    def test_rank_that_exits(self):
        kinds = ["_exit", "exit"]
        self.check_ended(kinds, [RECOVER], self.each(), 4, TIMEOUT + SLACK)

    def test_rank_that_stops(self):
        self.check_ended(["stop"], [], self.each(), 6, TIMEOUT + SLACK)

    def test_rank_that_returns_from_main(self):
        self.check_ended(["return"], [], self.each(), 7, TIMEOUT + SLACK)

    def test_engine_that_one_rank_never_builds(self):
        # Nothing but the watchdog can tell: every rank is inside a call of MPI.
        for shard_size, faults in self.drawn(["absent"], 1, 11):
            for what in faults:
                rank = int(what.split(":")[2])
                with self.subTest(f"p={shard_size} {what}"), Job(shard_size, [what]) as job:
                    others = [r for r in range(RANKS) if r != rank]
                    job.wait_until(lambda: all(job.report(0, r) for r in others), HARD_LIMIT)
                    started = job.report(0, "fault")
                    for r in others:
                        report = job.report(0, r)
                        self.assertIsNotNone(report, f"rank {r} hangs")
                        self.assertEqual(report[1], "stuck", report)
                        self.assertLess(report[0] - started[0], TIMEOUT + SLACK, report)
                        self.assertIn(f"construction of the engine on rank {r}", report[2])
                    status = job.end(HARD_LIMIT)
                    self.assertIsNotNone(status, f"processes live on: {what}")
                    self.assertNotEqual(status, 0, what)

    @unittest.skipIf("MICS_FAULTS" in os.environ, "other faults were asked for")
    def test_job_that_was_suspended_goes_on(self):
        runs = 100
        with Job(2, ["none"] * runs) as job:
            self.assertTrue(job.wait_until(lambda: job.report(5, 0), HARD_LIMIT), shown(job))
            ranks = job.ranks_alive()
            self.assertEqual(len(ranks), RANKS)
            for pid in ranks:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(2.5 * TIMEOUT)
            for pid in ranks:
                os.kill(pid, signal.SIGCONT)
            # On a busy machine many runs take long, which is not what is tested.
            job.wait_until(
                lambda: job.report(runs - 1, 0) or job.process.poll() is not None, 4 * HARD_LIMIT
            )
            status = job.end(HARD_LIMIT)
            reports = [job.report(number, r) for number in range(runs) for r in range(RANKS)]
            self.assertEqual([r for r in reports if not r or r[1] != "ok"], [])
            self.assertEqual(status, 0)

    def test_killed_rank_is_known_at_once_under_ulfm(self):
        reason = no_ulfm()
        if reason:
            self.skipTest(reason)
        kinds = ["kill", "_exit"]
        self.check_ended(kinds, ["--with-ft", "ulfm"], self.each(), 8, 1.0 * SLOWNESS)

    def test_killed_rank_ends_the_job(self):
        # As most jobs run: the launcher ends the others, who need not have said anything.
        for shard_size, faults in self.drawn(["kill"], 1, 10):
            for what in faults[:1]:
                with self.subTest(f"p={shard_size} {what}"), Job(shard_size, [what]) as job:
                    status = job.end(HARD_LIMIT)
                    self.assertIsNotNone(status, f"processes live on: {what}")
                    self.assertNotEqual(status, 0, what)


def no_ulfm():
    """Why the launcher cannot keep a job that lost a rank, and tell it; empty if it can."""
    words = [*launch.LAUNCHER, "--with-ft", "ulfm", "-n", "1", "true"]
    result = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode != 0:
        return "this MPI has no fault tolerance: " + " ".join(words)
    return ""


if __name__ == "__main__":
    AMOUNT, CLIENT, *launch.LAUNCHER = sys.argv[1:]
    CLIENT = launch.PROGRAM = os.path.realpath(CLIENT)
    LANES = int(os.environ.get("MICS_FAULTS_LANES", "4" if AMOUNT == "soak" else "1"))
    SLACK *= 1 + LANES / 4  # 4 ranks each, beside one another
    unittest.main(argv=sys.argv[:1] + os.environ.get("MICS_FAULTS_TESTS", "").split(), verbosity=2)
