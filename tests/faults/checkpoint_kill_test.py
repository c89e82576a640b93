# SPDX-License-Identifier: Apache-2.0
"""kill -9 of one or all ranks at any time, and a restart, again and again:
checkpoint_kill_test.py [--slice I/N] KILLS CLIENT MICS [LAUNCHER WORD ...]

`mics train` in one layout ends with the digest of a run that nobody disturbed. The client, whose
sums are exact, is restarted on another number of ranks with another shard size each time: every
load has the digest of the committed step, the values that were computed beforehand, and the end is
the undisturbed run's. A step that was said to be committed is never lost.

--slice makes every Nth of the kills, with a seed of its own: N of these, I from 0 to N - 1, make at
least KILLS, on as many machines or at once.
"""

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

KILLS = 0
CLIENT = ""
MICS = ""
SEED = 20
HARD_LIMIT = 300  # seconds of a launch
FOLDER = None


def setUpModule():
    global FOLDER
    FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="mics_kill_"))
    launch.write_text(FOLDER / "text.txt")
    deck = launch.edited({"engine.optimizer.params.lr": 0.01}, steps=25, validate_every=0)
    (FOLDER / "deck.json").write_text(deck)


def tearDownModule():
    shutil.rmtree(FOLDER)


class Launch:
    """One launch, which may be killed."""

    def __init__(self, ranks, command):
        self.program = command[0]
        self.mark = f"mics-kill-{os.getpid()}-{time.monotonic_ns()}"
        self.output = FOLDER / "output"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*launch.LAUNCHER, "-n", str(ranks), *map(os.fspath, command)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=dict(os.environ, MICS_TEST_RUN=self.mark, MICS_START_LIMIT="60"),
            )
        self.started = time.monotonic()

    def ranks_alive(self):
        return [pid for pid, program in launch._processes(self.mark) if program == self.program]

    def kill(self, choice, everyone):
        """Kills ranks that are alive; how many they were."""
        alive = self.ranks_alive()
        victims = alive if everyone else alive[:1] and [choice.choice(alive)]
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        return len(victims)

    def end(self):
        """(status or None after a hang, what it printed)."""
        status = None
        idle = 0
        while time.monotonic() - self.started < HARD_LIMIT and idle < 50:
            status = self.process.poll()
            if status is not None:
                break
            # The launcher itself can hang once its last rank has ended.
            idle = 0 if self.ranks_alive() else idle + 1
            time.sleep(0.05)
        hung = status is None and idle < 50
        launch._kill(self.mark)
        self.process.wait()
        return (None if hung else -9 if status is None else status), self.output.read_text()


class Kills(unittest.TestCase):
    longMessage = False

    def survive(self, choice, kills, restart, look, finished):
        """Launches and kills until there were `kills` kills and the run in hand is finished."""
        done = 0
        duration = 1.0
        while True:
            job = Launch(*restart())
            disturb = done < kills
            if disturb:
                # Any time from the start of the launcher on, mostly while the ranks work.
                time.sleep(choice.uniform(0.1, 1.0) * duration)
                everyone = choice.random() < 0.3
                done += 1 if job.kill(choice, everyone) else 0
            status, text = job.end()
            self.assertIsNotNone(status, f"it hangs after kill {done}\n{text}")
            look(status, text, disturb)
            if finished(text):
                duration = max(duration, time.monotonic() - job.started)
                if done >= kills:
                    return done
            elif not disturb:
                self.fail(f"the undisturbed run does not end well: {status}\n{text}")

    def digest(self, directory):
        words = [MICS, "checkpoint", "inspect", os.fspath(directory)]
        text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        return re.search(r"digest +(?:crc32c +)?([0-9a-f]{8})", text)[1]

    def test_mics_train_in_one_layout(self):
        choice = random.Random(SEED)
        for ranks in (2, 4):
            words = [MICS, "train", FOLDER / "deck.json", "checkpoint.every=1", "--resume"]
            words += ["engine.mics.shard_size=2", "engine.mics.preset=mics"]
            whole = FOLDER / f"whole{ranks}"
            status, text = Launch(ranks, [*words, f"checkpoint.directory={whole}"]).end()
            self.assertEqual(status, 0, text)
            expected = self.digest(whole)
            lap = [0]

            def directory():
                return FOLDER / f"killed{ranks}-{lap[0]}"

            def restart():
                return ranks, [*words, f"checkpoint.directory={directory()}"]

            def look(status, text, disturbed):
                self.assertNotIn("passed over", text)
                self.assertTrue(status == 0 or disturbed, text)

            def finished(text):
                if "step 25" not in text and "validation" not in text:
                    return False
                steps = sorted(directory().glob("step-*"))
                if not steps or steps[-1].name != "step-000000025":
                    return False
                self.assertEqual(self.digest(directory()), expected, text)
                shutil.rmtree(directory())
                lap[0] += 1
                return True

            done = self.survive(choice, (KILLS + 1) // 2, restart, look, finished)
            print(f"{ranks} ranks: {done} kills, {lap[0]} runs with digest {expected}", flush=True)

    def test_exact_sums_in_another_layout_each_time(self):
        choice = random.Random(SEED + 1)
        steps = 40
        whole = FOLDER / "whole"
        status, text = Launch(1, [CLIENT, "train", whole, "1", "20", str(steps)]).end()
        self.assertEqual(status, 0, text)
        final = re.search(r"^final (\d+) ([0-9a-f]{8})$", text, re.M)
        self.assertEqual(int(final[1]), steps)
        digests = {steps: final[2]}
        committed = [-1]
        layouts = set()
        lap = [0]
        loads = [0]

        def restart():
            ranks = choice.randint(1, 6)
            shard = choice.choice([p for p in range(1, ranks + 1) if ranks % p == 0])
            layouts.add((ranks, shard))
            run = FOLDER / f"elastic{lap[0]}"
            return ranks, [CLIENT, "train", run, str(shard), "20", str(steps)]

        def look(status, text, disturbed):
            self.assertTrue(status == 0 or disturbed, text)
            self.assertNotIn("rong ", text)
            for word, step, digest in re.findall(r"^(\w+) (-?\d+) ([0-9a-f]{8})$", text, re.M):
                step = int(step)
                if word == "committed":
                    committed[0] = max(committed[0], step)
                    continue
                # Loads come first and last; what was committed is still there.
                self.assertGreaterEqual(step, committed[0], text)
                self.assertEqual(digests.setdefault(step, digest), digest, text)
                loads[0] += 1

        def finished(text):
            if not re.search(r"^final ", text, re.M):
                return False
            committed[0] = -1
            shutil.rmtree(FOLDER / f"elastic{lap[0]}")
            lap[0] += 1
            return True

        done = self.survive(choice, KILLS, restart, look, finished)
        print(
            f"{done} kills, {loads[0]} loads in {len(layouts)} layouts, {lap[0]} runs with digest "
            f"{digests[steps]}",
            flush=True,
        )


if __name__ == "__main__":
    (index, count), words = launch.slice_of(sys.argv[1:])
    KILLS = -(-int(words[0]) // count)
    SEED += 2 * index
    CLIENT, MICS = map(os.path.realpath, words[1:3])
    launch.LAUNCHER = words[3:]
    unittest.main(argv=sys.argv[:1], verbosity=2)
