# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of `mics train`: resume_test.py MICS [LAUNCHER WORD ...]

A run that goes on from a checkpoint has the losses of one that was never interrupted.
"""

import json
import os
import pathlib
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

FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="mics_resume_"))
STEPS = 30
SIMILAR = 1e-4  # fp32 sums in another order


def setUpModule():
    launch.write_text(FOLDER / "text.txt")
    (FOLDER / "deck.json").write_text(
        edited(
            {"engine.optimizer.params.lr": 0.01, "engine.gradient_clipping": 1.0},
            steps=STEPS,
            validate_every=0,
            print_every=10,
            sample_bytes=0,
        )
    )


def tearDownModule():
    shutil.rmtree(FOLDER)


class Resume(unittest.TestCase):
    def setUp(self):
        self.run_folder = FOLDER / self.id().rsplit(".", 1)[1]
        self.words = (
            "train",
            FOLDER / "deck.json",
            f"checkpoint.directory={self.run_folder}",
            f"training.metrics={self.run_folder}.jsonl",
        )

    def train(self, *words, ranks=1):
        result = launch.run(*self.words, *words, ranks=ranks)
        self.assertEqual((result.status, result.stderr), (0, ""), result)
        return result.stdout

    def losses(self):
        """By step, of all runs so far: the last one's count."""
        lines = pathlib.Path(f"{self.run_folder}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return {r["step"]: r["loss_bits_per_byte"] for r in records if r["event"] == "step"}

    def steps(self):
        return sorted(int(p.name[5:]) for p in self.run_folder.iterdir() if p.is_dir())

    # Fails if a state, a counter, the schedule's place or the data's is lost.
    def test_losses_are_those_of_a_run_without_interruption(self):
        for words in ((), ("checkpoint.asynchronous=false", "engine.mics.compute_dtype=bf16")):
            for ranks, others in ((1, (1, 4)), (4, (4, 2, 3))):
                with self.subTest(ranks=ranks, words=words):
                    shutil.rmtree(self.run_folder, ignore_errors=True)
                    pathlib.Path(f"{self.run_folder}.jsonl").unlink(missing_ok=True)
                    self.train("checkpoint.every=10", "checkpoint.keep=0", *words, ranks=ranks)
                    self.assertEqual(self.steps(), [10, 20, 30])
                    expected = self.losses()
                    for resumed in others:
                        shutil.rmtree(self.run_folder / "step-000000020", ignore_errors=True)
                        for step in self.steps():
                            if step > 10:
                                shutil.rmtree(self.run_folder / f"step-{step:09}")
                        text = self.train("--resume", *words, ranks=resumed)
                        self.assertIn("resumed after step 10", text)
                        self.assertNotIn("step 10/30", text)
                        for step, loss in self.losses().items():
                            if resumed == ranks:
                                self.assertEqual(loss, expected[step], step)
                            else:
                                tolerance = 0.02 if words else SIMILAR
                                self.assertAlmostEqual(loss, expected[step], delta=tolerance)

    def test_retention(self):
        self.train("checkpoint.every=5", "checkpoint.keep=2", "checkpoint.keep_every=10")
        self.assertEqual(self.steps(), [10, 20, 25, 30])

    def test_a_first_run_may_say_resume(self):
        self.assertIn("a new run", self.train("--resume"))
        self.assertEqual(self.steps(), [30])

    def test_a_signal_saves_and_ends_the_run(self):
        for name in (signal.SIGUSR1, signal.SIGTERM):
            with self.subTest(signal=name):
                shutil.rmtree(self.run_folder, ignore_errors=True)
                metrics = pathlib.Path(f"{self.run_folder}.jsonl")
                metrics.unlink(missing_ok=True)
                words = [launch.PROGRAM, *map(os.fspath, self.words), "training.steps=100000000"]
                process = subprocess.Popen(
                    words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
                self.addCleanup(process.kill)
                deadline = time.monotonic() + 60
                while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
                    self.assertLess(time.monotonic(), deadline)
                    time.sleep(0.02)
                process.send_signal(name)
                stdout, stderr = process.communicate(timeout=60)
                self.assertEqual((process.returncode, stderr), (0, ""), stdout)
                self.assertIn("stopped by a signal after step", stdout)
                self.assertEqual(self.steps(), [max(self.losses())])

    def test_a_save_that_fails_is_a_warning_or_the_end(self):
        self.run_folder.write_text("a file where a folder should be")
        text = self.train("checkpoint.every=10")
        self.assertIn("warning: step 10 is not saved", text)
        result = launch.run(*self.words, "checkpoint.every=10", "checkpoint.on_error=stop", ranks=4)
        self.assertNotEqual(result.status, 0)
        self.assertEqual(len(result.stderr.strip().splitlines()), 1, result)
        self.assertIn(self.run_folder.name, result.stderr)

    def test_resume_needs_a_directory(self):
        result = launch.run("train", FOLDER / "deck.json", "--resume")
        self.assertEqual(result.status, 1)
        self.assertIn("checkpoint.directory", result.stderr)

    def test_another_model_is_named(self):
        self.train()
        result = launch.run(*self.words, "--resume", "model.width=32", ranks=4)
        self.assertEqual(result.status, 1)
        self.assertEqual(len(result.stderr.strip().splitlines()), 1, result)
        self.assertRegex(result.stderr, r"embedding/token\.weight.*32.*16")


if __name__ == "__main__":
    launch.PROGRAM, *launch.LAUNCHER = sys.argv[1:]
    unittest.main(argv=sys.argv[:1], verbosity=2)
