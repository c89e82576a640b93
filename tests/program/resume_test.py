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
            for ranks, others in ((1, (1, 4)), (4, (4, 2, 6, 5, 1))):
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

    def test_a_named_step_and_what_follows_it(self):
        self.train("checkpoint.every=10", "checkpoint.keep=0", ranks=2)
        expected = self.losses()
        text = self.train("--resume", "--step", "10", "checkpoint.keep=0", ranks=2)
        self.assertIn("resumed after step 10", text)
        self.assertEqual(self.losses(), expected)
        self.assertEqual(self.steps(), [10, 20, 30])
        result = launch.run(*self.words, "--resume", "--step", "11", ranks=2)
        self.assertEqual((result.status, len(result.stderr.splitlines())), (1, 1), result)
        self.assertRegex(result.stderr, "step-000000011.*there are 30, 20, 10$")
        result = launch.run(*self.words, "--step", "10")
        self.assertNotEqual(result.status, 0)
        self.assertIn("--resume", result.stderr)

    def test_a_damaged_step_gives_way_to_the_one_before_with_a_warning(self):
        self.train("checkpoint.every=10", "checkpoint.keep=0", ranks=4)
        expected = self.losses()
        damaged = max((self.run_folder / "step-000000030").glob("s*.h5"), key=os.path.getsize)
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 16
        damaged.write_bytes(data)
        (self.run_folder / "step-000000020" / "COMMIT").unlink()
        text = self.train("--resume", ranks=2)
        self.assertRegex(text, "warning: .*" + damaged.name + r".*step 30 is passed over for an older one")
        self.assertRegex(text, "warning: .*COMMIT.*step 20 is passed over for an older one")
        self.assertIn("resumed after step 10", text)
        for step, loss in self.losses().items():
            self.assertAlmostEqual(loss, expected[step], delta=SIMILAR)

    def test_the_global_batch_stays_or_is_asked_for(self):
        # 3 samples of a rank and micro-step: 12 of 4 ranks, and 6 of 2.
        sizes = ("engine.train_batch_size=\"auto\"", "engine.train_micro_batch_size_per_gpu=3")
        self.train("training.steps=10", *sizes, ranks=4)
        result = launch.run(*self.words, *sizes, "--resume", ranks=2)
        self.assertEqual((result.status, len(result.stderr.splitlines())), (1, 1), result)
        self.assertRegex(result.stderr, "train_batch_size: expected 12 samples.*found 6 on 2 ranks")
        self.assertIn("resumed after step 10", self.train("--resume", ranks=2))
        self.assertEqual(max(self.losses()), STEPS)

    def test_retention(self):
        self.train("checkpoint.every=5", "checkpoint.keep=2", "checkpoint.keep_every=10")
        self.assertEqual(self.steps(), [10, 20, 25, 30])

    def test_a_run_that_is_done_has_nothing_to_go_on_with(self):
        self.train(ranks=2)
        self.assertIn("resumed after step 30", self.train("--resume", ranks=4))
        line = self.refused("training.steps=29", ranks=2)
        self.assertRegex(line, r"training\.steps: expected at least the 30 .*found 29; .*--step")

    def test_steps_of_another_run_are_told_of(self):
        ours = "checkpoint.every=5", "checkpoint.keep=0"
        self.assertNotIn("warning", self.train(*ours, "training.steps=20"))
        told = "warning: .*holds step 20 of another run.*newer than step "
        self.assertRegex(self.train(*ours, "training.steps=10"), told + "0\n")
        self.assertEqual(self.steps(), [5, 10, 15, 20])
        text = self.train("--resume", "--step", "10", *ours, "training.steps=15")
        self.assertRegex(text, told + "10\n")
        self.assertNotIn("warning", self.train("--resume", *ours))

    def test_a_step_is_no_directory_to_save_to(self):
        self.train(ranks=2)
        step = self.run_folder / "step-000000030"
        before = sorted(step.iterdir())
        for ranks in (1, 2):
            result = launch.run(*self.words, f"checkpoint.directory={step}", ranks=ranks)
            self.assertEqual((result.status, len(result.stderr.splitlines())), (1, 1), result)
            self.assertIn("name the directory that it is in", result.stderr)
        self.assertEqual(sorted(step.iterdir()), before)

    def test_a_first_run_may_say_resume(self):
        self.assertIn("a new run", self.train("--resume"))
        self.assertEqual(self.steps(), [30])

    def training_process(self, *more):
        """A run without end, once it is at work."""
        shutil.rmtree(self.run_folder, ignore_errors=True)
        metrics = pathlib.Path(f"{self.run_folder}.jsonl")
        metrics.unlink(missing_ok=True)
        words = [launch.PROGRAM, *map(os.fspath, self.words), "training.steps=100000000", *more]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.addCleanup(process.kill)
        deadline = time.monotonic() + 60
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.02)
        return process

    def test_a_signal_saves_and_ends_the_run(self):
        for name in (signal.SIGUSR1, signal.SIGTERM):
            with self.subTest(signal=name):
                process = self.training_process()
                process.send_signal(name)
                stdout, stderr = process.communicate(timeout=60)
                self.assertEqual((process.returncode, stderr), (0, ""), stdout)
                self.assertIn("stopped by a signal after step", stdout)
                self.assertEqual(self.steps(), [max(self.losses())])

    def test_more_signals_do_not_disturb_the_end(self):
        process = self.training_process()
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.001)
        stdout, stderr = process.communicate(timeout=60)
        self.assertEqual((process.returncode, stderr), (0, ""), stdout)
        self.assertEqual(self.steps(), [max(self.losses())])

    def test_a_signal_ends_a_run_that_saves_nothing(self):
        for name in (signal.SIGUSR1, signal.SIGTERM):
            with self.subTest(signal=name):
                process = self.training_process("checkpoint.directory=")
                process.send_signal(name)
                process.communicate(timeout=60)
                self.assertEqual(process.returncode, -name)

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

    def refused(self, *words, ranks):
        """The one line of a run that ends before it begins."""
        result = launch.run(*self.words, "--resume", *words, ranks=ranks)
        self.assertEqual((result.status, len(result.stderr.splitlines())), (1, 1), result)
        self.assertTrue(result.stderr.startswith("mics train: "), result)
        return result.stderr

    def test_what_is_no_checkpoint_is_one_line(self):
        self.train("checkpoint.every=10", "checkpoint.keep=0", ranks=2)
        folder = self.run_folder
        step = folder / "step-000000030"
        for ranks in (1, 4):
            with self.subTest("a step in place of its directory", ranks=ranks):
                line = self.refused(f"checkpoint.directory={step}", ranks=ranks)
                self.assertIn("name the directory that it is in", line)
            with self.subTest("a file", ranks=ranks):
                line = self.refused(f"checkpoint.directory={step / 'manifest.h5'}", ranks=ranks)
                self.assertIn("manifest.h5", line)
            with self.subTest("a folder that only looks like a step", ranks=ranks):
                other = FOLDER / f"looks_like{ranks}"
                (other / "step-000000005").mkdir(parents=True)
                (other / "step-000000005" / "notes.txt").write_text("nothing")
                line = self.refused(f"checkpoint.directory={other}", ranks=ranks)
                self.assertRegex(line, "step-000000005/COMMIT.*No such file")
        with self.subTest("a piece of another step"):
            piece = max(step.glob("s*.h5"), key=os.path.getsize)
            other = folder / "step-000000020"
            twin = max(other.glob("s*.h5"), key=os.path.getsize)
            self.assertEqual(piece.stat().st_size, twin.stat().st_size)
            good = piece.read_bytes()
            piece.write_bytes(twin.read_bytes())
            line = self.refused("--step", "30", ranks=4)
            self.assertIn(piece.name, line)
            self.assertIn("damaged or another's", line)
            text = self.train("--resume", ranks=4)
            self.assertRegex(text, piece.name + ".*step 30 is passed over")
            self.assertIn("resumed after step 20", text)
        with self.subTest("a piece that is another HDF5 file"):
            step = folder / "step-000000020"
            manifest = (step / "manifest.h5").read_bytes()
            twin.write_bytes(manifest)
            line = self.refused("--step", "20", ranks=4)
            self.assertRegex(line, twin.name + ".*bytes")
        with self.subTest("a manifest that is another HDF5 file"):
            step = folder / "step-000000010"
            (step / "manifest.h5").write_bytes(good)
            line = self.refused("--step", "10", ranks=4)
            self.assertIn("manifest.h5", line)

    def test_another_model_is_named(self):
        self.train()
        result = launch.run(*self.words, "--resume", "model.width=32", ranks=4)
        self.assertEqual(result.status, 1)
        self.assertEqual(len(result.stderr.strip().splitlines()), 1, result)
        self.assertRegex(result.stderr, r"embedding/token\.weight.*32.*16")


if __name__ == "__main__":
    launch.PROGRAM, *launch.LAUNCHER = sys.argv[1:]
    unittest.main(argv=sys.argv[:1], verbosity=2)
