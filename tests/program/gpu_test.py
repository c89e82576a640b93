# SPDX-License-Identifier: Apache-2.0
"""What only a machine with GPUs can show of the program: gpu_test.py MICS OLD_NCCL [LAUNCHER WORD ...]

OLD_NCCL is a library that says that NCCL is older than it is; empty where mics has no NCCL. Bad
input ends on every rank with one line that says where, what was expected and what was found.
Starts and stops leave no memory of a GPU behind.
"""

import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True
import launch  # noqa: E402
from launch import edited  # noqa: E402

FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="mics_gpu_"))
DECK = FOLDER / "deck.json"
OLD_NCCL = ""
PROCESSES = int(os.environ.get("MICS_TEST_PROCESSES", "20"))


def query(what):
    """One number of each GPU that may be used here, as the driver tells it."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command += ["-i", visible]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [int(re.match(r"\d+", line)[0]) for line in lines.splitlines()]


GPUS = len(query("memory.used"))


def train(*words, ranks=1, **environment):
    return launch.run("train", DECK, *words, ranks=ranks, seconds=120, environment=environment)


def deck(model=None):
    """The passes on a device are in bf16, and heads have a width of 64 or 128."""
    model = model or {"layers": 1, "heads": 1, "width": 64, "positions": 8}
    return edited({"engine.mics.memory": "device", "engine.bf16.enabled": True, "model": model})


class Gpu(unittest.TestCase):
    def setUp(self):
        launch.write_text(FOLDER / "text.txt")
        DECK.write_text(deck())

    def check_line(self, result, expects):
        lines = [line for line in result.stderr.split("\n") if line]
        self.assertEqual(len(lines), 1, f"expected one line on standard error\n{result}")
        self.assertRegex(lines[0], r"^mics( train)?: \S", result)
        self.assertRegex(lines[0], expects, result)
        self.assertNotIn(result.status, (0, None), result)

    def test_no_visible_gpu(self):
        for ranks in (1, 2):
            with self.subTest(ranks=ranks):
                result = train(ranks=ranks, CUDA_VISIBLE_DEVICES="")
                self.check_line(result, "devices of this process: expected at least one, found none")

    def test_ranks_that_share_a_gpu_need_leave(self):
        result = train(ranks=2, CUDA_VISIBLE_DEVICES="0")
        self.check_line(result, "device of rank 1: expected one device a rank, found .*, which rank 0 uses")
        for ranks in (2, 4):
            words = ("engine.mics.share_device=true",)
            result = train(*words, ranks=ranks, CUDA_VISIBLE_DEVICES="0")
            self.assertEqual(result.status, 0, result)
        result = train(*words, "engine.mics.nccl=on", ranks=2, CUDA_VISIBLE_DEVICES="0")
        self.check_line(result, "nccl: expected ranks that can use it, found ranks share a device")

    def test_nccl_too_old(self):
        if not OLD_NCCL:
            self.skipTest("this mics has no NCCL")
        if GPUS < 2:
            self.skipTest("NCCL is used between GPUs")
        # For the ranks alone: the launcher would load it too.
        words = ("-x", f"LD_PRELOAD={OLD_NCCL}")
        launcher, launch.LAUNCHER = launch.LAUNCHER, launch.LAUNCHER + list(words)
        try:
            result = train(ranks=2)
        finally:
            launch.LAUNCHER = launcher
        self.check_line(result, r"NCCL of rank 0: expected version 2\.18\.0 or newer, found 2\.17\.3")

    def test_plan_larger_than_the_memory(self):
        model = {"layers": 96, "heads": 128, "width": 16384, "positions": 8}
        DECK.write_text(deck(model))
        for ranks in (1, 2):
            if ranks > GPUS:
                continue
            with self.subTest(ranks=ranks):
                result = train(ranks=ranks)
                self.check_line(result, r"device memory of rank \d+: expected \d+ bytes free, found \d+ of \d+")

    def test_processes_come_and_go(self):
        ranks = min(GPUS, 2)
        before = query("memory.used")
        with concurrent.futures.ThreadPoolExecutor(4) as lanes:
            for result in lanes.map(lambda _: train(ranks=ranks), range(PROCESSES)):
                self.assertEqual(result.status, 0, result)
        self.assertLessEqual(max(b - a for a, b in zip(before, query("memory.used"))), 16, "MiB of a GPU")


if __name__ == "__main__":
    launch.PROGRAM, OLD_NCCL, *launch.LAUNCHER = sys.argv[1:]
    launch.ADDRESS_SPACE = None  # CUDA reserves terabytes of it
    try:
        unittest.main(argv=sys.argv[:1] + os.environ.get("MICS_GPU_TESTS", "").split(), verbosity=2)
    finally:
        shutil.rmtree(FOLDER)
