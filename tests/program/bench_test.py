# SPDX-License-Identifier: Apache-2.0
"""`mics bench` on small arrays: bench_test.py MICS [LAUNCHER WORD ...]

That every kernel is run and told of. Speeds are not looked at.
"""

import json
import pathlib
import shutil
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True
import launch  # noqa: E402

FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="mics_bench_"))
ELEMENT = 18  # bytes of gradient, master weight, two moments and bf16 copy
# Bytes that a kernel reads and writes of an element.
HOST = {"memcpy": 30, "AdamW fp32 + bf16 copy": 30, "AdamW fp32": 28, "norm fp32": 4}
DEVICE = {
    "copy": 30,
    "AdamW fp32 + bf16 copy": 30,
    "AdamW bf16 gradient + bf16 copy": 28,
    "AdamW fp32": 28,
    "norm fp32": 4,
    "norm bf16": 2,
}


def tearDownModule():
    shutil.rmtree(FOLDER)


class Optimizer(unittest.TestCase):
    def bench(self, memory, count, ranks):
        records = FOLDER / f"{memory}{ranks}.jsonl"
        result = launch.run(
            "bench", "optimizer", "--memory", memory, "--sizes", str(count * ELEMENT), "--pairs", "3",
            "--json", records, ranks=ranks,
        )  # fmt: skip
        self.assertEqual(result.status, 0, result)
        self.assertEqual(result.stderr, "")
        return [json.loads(line) for line in records.read_text().splitlines()]

    def check(self, memory, kernels, ranks):
        count = 100_003  # whole blocks, whole packs and some elements
        records = self.bench(memory, count, ranks)
        self.assertEqual([record["kernel"] for record in records], list(kernels))
        for record in records:
            self.assertEqual(record["memory"], memory)
            self.assertEqual(record["elements"], count)
            self.assertEqual(record["bytes"], kernels[record["kernel"]] * count)
            self.assertEqual(record["pairs"], 3)
            self.assertGreater(record["seconds"], 0)
        self.assertEqual(records[0]["ratio"], 1)

    def test_kernels_of_the_host(self):
        self.check("host", HOST, 1)
        self.check("host", HOST, 2)

    def test_kernels_of_a_device(self):
        self.check("device", DEVICE, 1)
        self.check("device", DEVICE, 2)

    def test_memory_that_is_none_is_refused(self):
        result = launch.run("bench", "optimizer", "--memory", "disk")
        self.assertEqual(result.status, 2, result)
        self.assertIn("--memory", result.stderr)
        self.assertIn("disk", result.stderr)


if __name__ == "__main__":
    launch.PROGRAM, *launch.LAUNCHER = sys.argv[1:]
    unittest.main(argv=sys.argv[:1], verbosity=2)
