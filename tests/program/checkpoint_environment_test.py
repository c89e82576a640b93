# SPDX-License-Identifier: Apache-2.0
"""`mics train` saves where it cannot: checkpoint_environment_test.py MICS [LAUNCHER WORD ...]

A full disk, a read-only folder, a folder that vanishes, limits of the process, another job in the
folder. The run goes on with a warning, or stops, as the deck says; earlier steps stay as they were.
"""

import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

sys.dont_write_bytecode = True
import launch  # noqa: E402
from launch import edited  # noqa: E402

FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="mics_environment_"))
WARNING = "is not saved: "


def setUpModule():
    launch.write_text(FOLDER / "text.txt")
    (FOLDER / "deck.json").write_text(edited(steps=12, validate_every=0))


def tearDownModule():
    shutil.rmtree(FOLDER)


def steps(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("step-"))


class Run:
    """A run on one rank that goes on until it is told to end."""

    def __init__(self, directory, *words):
        words = ["checkpoint.every=1", f"checkpoint.directory={directory}", *words]
        deck = FOLDER / "deck.json"
        self.process = subprocess.Popen(
            [launch.PROGRAM, "train", deck, *words, "training.steps=1000000"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def wait_for(self, condition):
        deadline = time.monotonic() + launch.SECONDS
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise AssertionError(f"{self.process.poll()} {self.process.communicate(timeout=1)}")
            time.sleep(0.01)

    def end(self, tell=True):
        """(status, stdout, stderr)."""
        if tell:
            self.process.send_signal(signal.SIGTERM)
        stdout, stderr = self.process.communicate(timeout=launch.SECONDS)
        return self.process.returncode, stdout, stderr


class Environment(unittest.TestCase):
    def setUp(self):
        self.directory = FOLDER / self.id().rsplit(".", 1)[1]

    def mount(self, options):
        """A file system of its own in place of the folder."""
        self.directory.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", os.fspath(self.directory)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            self.skipTest("mounting a small file system is not allowed here")
        unmount = ["umount", "-l", os.fspath(self.directory)]
        self.addCleanup(lambda: subprocess.run(unmount, check=True))

    def assert_sound(self, folder, least=1):
        names = steps(folder)
        self.assertGreaterEqual(len(names), least)
        for name in names:
            result = launch.run("checkpoint", "verify", folder / name)
            self.assertEqual(result.status, 0, result)

    def assert_stopped(self, result, *texts):
        status, stdout, stderr = result
        self.assertNotIn(status, (0, None), f"{stdout}\n{stderr}")
        self.assertEqual(len(stderr.strip().splitlines()), 1, stderr)
        for text in texts:
            self.assertIn(text, stderr)

    def test_full_disk(self):
        for ranks in (1, 4):
            for on_error in ("warn", "stop"):
                with self.subTest(ranks=ranks, on_error=on_error):
                    self.mount("size=512k")
                    result = launch.run(
                        "train",
                        FOLDER / "deck.json",
                        f"checkpoint.directory={self.directory}",
                        "checkpoint.every=1",
                        "checkpoint.keep=0",
                        f"checkpoint.on_error={on_error}",
                        ranks=ranks,
                    )
                    if on_error == "warn":
                        self.assertEqual((result.status, result.stderr), (0, ""), result)
                        self.assertIn(WARNING, result.stdout)
                        self.assertIn("No space left", result.stdout)
                        # Fails if a save that fails costs another one, or is told of by its number.
                        failed = re.findall(r"step (\d+) is not saved", result.stdout)
                        saved = [name.removeprefix("step-") for name in steps(self.directory)]
                        self.assertEqual(
                            sorted(map(int, failed + saved)), list(range(1, 13)), result
                        )
                    else:
                        self.assert_stopped(
                            (result.status, result.stdout, result.stderr), "No space left"
                        )
                    self.assert_sound(self.directory)

    def test_read_only_folder(self):
        self.directory.mkdir()
        self.mount("size=8m,ro")
        for ranks in (1, 4):
            words = ["train", FOLDER / "deck.json", f"checkpoint.directory={self.directory / 'run'}"]
            result = launch.run(*words, "checkpoint.every=4", ranks=ranks)
            self.assertEqual((result.status, result.stderr), (0, ""), result)
            self.assertIn(WARNING, result.stdout)
            self.assertIn("Read-only file system", result.stdout)
            result = launch.run(*words, "checkpoint.on_error=stop", ranks=ranks)
            self.assert_stopped(
                (result.status, result.stdout, result.stderr), "Read-only file system", "/run"
            )

    def disturbed(self, disturb, message, folder=None):
        """Both policies of a run that is disturbed once it has saved."""
        for on_error in ("warn", "stop"):
            with self.subTest(on_error=on_error):
                shutil.rmtree(self.directory, ignore_errors=True)
                with Run(self.directory, f"checkpoint.on_error={on_error}") as run:
                    run.wait_for(lambda: self.directory.exists() and steps(self.directory))
                    disturb(run.process.pid)
                    if on_error == "warn":
                        time.sleep(0.3)
                        status, stdout, stderr = run.end()
                        self.assertEqual((status, stderr), (0, ""), stdout)
                        self.assertIn(WARNING, stdout)
                        self.assertIn(message, stdout)
                        self.assertRegex(stdout, "by a signal after step [0-9]+, which is not saved; --resume")
                    else:
                        self.assert_stopped(run.end(tell=False), message)
                self.assert_sound(folder or self.directory)

    def test_folder_that_vanishes(self):
        away = FOLDER / "away"

        def disturb(_):
            shutil.rmtree(away, ignore_errors=True)
            self.directory.rename(away)

        self.disturbed(disturb, "No such file or directory", away)

    def test_no_more_files(self):
        # Fewer than are open: what is open stays.
        self.disturbed(
            lambda pid: resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, 3)), "Too many open files"
        )

    def test_limit_of_file_size(self):
        # Fails if a signal ends the process: SIGXFSZ does where nobody blocks it.
        self.disturbed(
            lambda pid: resource.prlimit(pid, resource.RLIMIT_FSIZE, (5000, 5000)), "File too large"
        )

    def test_second_job_is_refused(self):
        with Run(self.directory) as first:
            first.wait_for(lambda: self.directory.exists() and steps(self.directory))
            for ranks, words in ((1, ["checkpoint.every=0"]), (4, []), (4, ["--resume"])):
                # More steps than it has time for: it is refused before the first.
                result = launch.run(
                    "train",
                    FOLDER / "deck.json",
                    f"checkpoint.directory={self.directory}",
                    "training.steps=1000000",
                    *words,
                    ranks=ranks,
                )
                self.assertNotIn("step ", result.stdout)
                self.assert_stopped(
                    (result.status, result.stdout, result.stderr),
                    "one job that saves there",
                    f"process {first.process.pid}",
                )
            status, stdout, stderr = first.end()
            self.assertEqual((status, stderr), (0, ""), stdout)
            self.assertNotIn(WARNING, stdout)
        self.assert_sound(self.directory)


if __name__ == "__main__":
    launch.PROGRAM, *launch.LAUNCHER = sys.argv[1:]
    unittest.main(argv=sys.argv[:1], verbosity=2)
