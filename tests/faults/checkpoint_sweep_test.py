# SPDX-License-Identifier: Apache-2.0
"""Every system call of saving and loading meets every fault on one of four ranks:
checkpoint_sweep_test.py [--slice I/N] AMOUNT CLIENT [LAUNCHER WORD ...]

AMOUNT is full, a sample with a fixed seed, or soak, every fault at every call of every rank in both
layouts. --slice takes trials I, I + N, I + 2 N, ... of them, I from 0 on: N of these make the whole,
on as many machines or at once. MICS_FAULTS holds other trials, as in
`2 save:eio:0:12 load:kill_before:3:1`: the shard size, then work:fault:rank:call.

Whatever the fault: no committed step is lost or damaged; what loads has the right values; nothing
crashes or hangs; a save that says it succeeded is the newest step, and one that failed is an error
of the same class and text on all ranks. What only moves less or is interrupted does no harm at all.
After a fault that the processes survive, the next save works and clears up. A rank that is killed
or stopped ends the others in time, with an error that names it; what is left loads on one rank.
"""

import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import shutil
import unittest

sys.dont_write_bytecode = True
import faults_test  # noqa: E402
from faults_test import launch  # noqa: E402

AMOUNT = ""
SLICE = (0, 1)  # index, how many there are
RANKS = faults_test.RANKS
LAYOUTS = faults_test.LAYOUTS
TIMEOUT, SLACK, HARD_LIMIT = faults_test.TIMEOUT, faults_test.SLACK, faults_test.HARD_LIMIT

WORKS = ("save", "async", "replace", "clear", "load")
HARMLESS = ("short", "eintr")
FAILURES = ("eio", "enospc", "edquot", "full")
ENDINGS = ("kill_before", "kill_after", "stop")
BATCH = 100  # trials a launch
ENDED_WELL = (0, -9)  # the latter: of the launcher, which can hang when the last rank has ended


class Job(faults_test.Job):
    def __init__(self, shard_size, trials, words=()):
        super().__init__(shard_size, trials, words, mode=["sweep"])


class Sweep(unittest.TestCase):
    longMessage = False

    @classmethod
    def setUpClass(cls):
        """The calls of each rank in each kind of work, without faults."""
        cls.calls = {}
        for shard_size in LAYOUTS:
            trials = [f"{work}:none:0:0" for work in WORKS]
            with Job(shard_size, trials) as job:
                last = len(trials) - 1
                job.wait_until(lambda: all(job.report(last, r) for r in range(RANKS)), HARD_LIMIT)
                status = job.end(HARD_LIMIT)
                for number, work in enumerate(WORKS):
                    for rank in range(RANKS):
                        report = job.report(number, rank)
                        if status not in ENDED_WELL or not report or report[1] != "ok":
                            raise AssertionError(f"{work} without a fault: {status} {report}\n{job.output()}")
                        cls.calls[shard_size, work, rank] = report[2].split()[1:]

    def points(self, shard_size):
        """(work, rank, index) of all calls."""
        return [
            (work, rank, index)
            for work in WORKS
            for rank in range(RANKS)
            for index in range(len(self.calls[shard_size, work, rank]))
        ]

    def drawn(self, faults, each, seed):
        """(shard size, trials): so many points a fault; all if 0."""
        if "MICS_FAULTS" in os.environ:
            shard_size, *trials = os.environ["MICS_FAULTS"].split()
            yield int(shard_size), [t for t in trials if t.split(":")[1] in faults]
            return
        choice = random.Random(seed)
        for shard_size in LAYOUTS:
            trials = []
            for fault in faults:
                points = self.points(shard_size)
                chosen = choice.sample(points, each) if each else points
                trials += [f"{w}:{fault}:{r}:{i}" for w, r, i in chosen]
            index, count = SLICE
            yield shard_size, trials[index::count]

    def called(self, shard_size, trial):
        """What is called there."""
        work, _, rank, index = trial.split(":")
        calls = self.calls[shard_size, work, int(rank)]
        return calls[int(index)] if int(index) < len(calls) else "none"

    def test_every_call_of_the_protocol_is_there(self):
        seen = {name for calls in self.calls.values() for name in calls}
        for name in "open close pwrite pread fsync renameat2 rename mkdir unlink rmdir".split():
            self.assertIn(name, seen)
        for shard_size in LAYOUTS:
            writers = [r for r in range(RANKS) if "pwrite" in self.calls[shard_size, "save", r]]
            self.assertGreaterEqual(len(writers), 2)

    # -- faults that the processes survive

    def check_survived(self, faults, each, seed):
        for shard_size, trials in self.drawn(faults, each, seed):
            for begin in range(0, len(trials), BATCH):
                self.check_batch(shard_size, trials[begin : begin + BATCH])

    def check_batch(self, shard_size, trials):
        with Job(shard_size, trials) as job:
            for number, trial in enumerate(trials):

                def reported():
                    return all(job.report(number, r) for r in range(RANKS))

                job.wait_until(lambda: reported() or job.process.poll() is not None, HARD_LIMIT)
                with self.subTest(f"p={shard_size} {trial} in {self.called(shard_size, trial)}"):
                    reports = [job.report(number, r) for r in range(RANKS)]
                    self.check_reports(trial, reports, job)
                if not reported():
                    return  # the ranks meet no more
            self.assertIn(job.end(HARD_LIMIT), ENDED_WELL, faults_test.shown(job))

    def check_reports(self, trial, reports, job):
        text = "\n".join(f"  {r}: {report}" for r, report in enumerate(reports))
        self.assertNotIn(None, reports, f"{trial}: a rank hangs or crashed\n{text}")
        classes = {report[1] for report in reports}
        self.assertEqual(len(classes), 1, f"ranks differ in {trial}\n{text}")
        fault = trial.split(":")[1]
        allowed = {"ok"} if fault in HARMLESS else {"ok", "IoError"}
        if fault not in HARMLESS and trial.startswith("load:"):
            allowed.add("FormatError")
        self.assertLessEqual(classes, allowed, f"{trial}\n{text}\n{faults_test.shown(job)}")
        if classes != {"ok"}:
            self.assertEqual(len({report[2] for report in reports}), 1, f"{trial}\n{text}")

    def test_calls_that_do_less_or_are_interrupted(self):
        self.check_survived(HARMLESS, {"full": 8, "soak": 0}[AMOUNT], 1)

    def test_calls_that_fail(self):
        self.check_survived(FAILURES, {"full": 6, "soak": 0}[AMOUNT], 2)

    # -- faults that end or stop a process

    def check_ended(self, faults, each, seed):
        kept = pathlib.Path(tempfile.mkdtemp(prefix="mics_left_"))
        try:
            left = {}
            for shard_size, trials in self.drawn(faults, each, seed):
                for trial in trials:
                    name = f"p={shard_size} {trial} in {self.called(shard_size, trial)}"
                    with self.subTest(name):
                        run = kept / str(len(left))
                        left[os.fspath(run)] = name
                        self.check_process_that_ends(shard_size, trial, name, run)
            self.check_left(left)
        finally:
            shutil.rmtree(kept)

    def check_process_that_ends(self, shard_size, trial, name, run):
        _, fault, rank, _ = trial.split(":")
        rank = int(rank)
        others = [r for r in range(RANKS) if r != rank]
        words = [] if fault == "stop" else ["--enable-recovery"]
        with Job(shard_size, [trial], words) as job:
            try:
                job.wait_until(lambda: all(job.report(0, r) for r in others), HARD_LIMIT)
                started = job.report(0, "fault")
                self.assertIsNotNone(started, f"the fault was not met: {name}\n{self.texts(job)}")
                for r in others:
                    report = job.report(0, r)
                    self.assertIsNotNone(report, f"rank {r} hangs: {name}\n{self.texts(job)}")
                    self.assertEqual(report[1], "CommError", f"{name}\n{self.texts(job)}")
                    late = report[0] - started[0]
                    self.assertLess(late, TIMEOUT + SLACK, f"{name}\n{self.texts(job)}")
                    self.assertRegex(report[2], rf"\brank {rank}\b", name)
                texts = {re.sub(r"^rank \d+: ", "", job.report(0, r)[2]) for r in others}
                self.assertEqual(len(texts), 1, f"texts differ: {name}\n{self.texts(job)}")
                self.assertIsNotNone(job.end(HARD_LIMIT), f"processes live on: {name}")
            finally:
                launch._kill(job.mark)
                job.wait_until(lambda: not job.ranks_alive(), 5)
                if (job.folder / "run0").exists():
                    shutil.move(job.folder / "run0", run)

    @staticmethod
    def texts(job):
        return "\n".join(f"  {r}: {job.report(0, r)}" for r in range(RANKS))

    def check_left(self, left):
        """What each job left loads on one rank, with the right values, and is saved to again."""
        runs = list(left)
        for begin in range(0, len(runs), BATCH):
            command = [faults_test.CLIENT, "check", *runs[begin : begin + BATCH]]
            lines = subprocess.run(command, capture_output=True, text=True, timeout=600).stdout
            for line in lines.splitlines():
                run, step, result, *_ = line.split(" ", 3) + ["", ""]
                name = left.pop(run)
                work = name.split()[1].split(":")[0]
                with self.subTest(name):
                    least = 2 if work in ("replace", "load") else 1
                    self.assertEqual(result, "ok", f"{name}: {line}")
                    self.assertIn(int(step), range(least, 3), f"{name}: {line}")
        self.assertEqual(left, {}, "these were not looked at")

    def test_rank_that_is_killed(self):
        self.check_ended(["kill_before", "kill_after"], {"full": 2, "soak": 0}[AMOUNT], 3)

    def test_rank_that_is_stopped(self):
        self.check_ended(["stop"], {"full": 1, "soak": 40}[AMOUNT], 4)


if __name__ == "__main__":
    SLICE, words = launch.slice_of(sys.argv[1:])
    AMOUNT, client, *launch.LAUNCHER = words
    faults_test.CLIENT = launch.PROGRAM = os.path.realpath(client)
    unittest.main(argv=sys.argv[:1], verbosity=2)
