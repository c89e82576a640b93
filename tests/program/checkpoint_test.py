# SPDX-License-Identifier: Apache-2.0
"""`mics checkpoint …` on checkpoints of two layouts. Usage: checkpoint_test.py MICS SAMPLE"""

import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

MICS, SAMPLE = sys.argv[1:3]


def mics(*words):
    return subprocess.run(
        [MICS, "checkpoint", *map(str, words)], capture_output=True, text=True, timeout=60
    )


def safetensors(path):
    """Header and data of a safetensors file, by its specification."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


class Checkpoint(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory(prefix="mics-checkpoint-")
        self.addCleanup(temporary.cleanup)
        self.folder = pathlib.Path(temporary.name)
        for name, world, shard in (("a", 4, 2), ("b", 6, 3)):
            subprocess.run([SAMPLE, self.folder / name, str(world), str(shard)], check=True)

    def piece(self):
        return sorted((self.folder / "a" / "step-000000012").glob("s0001_*.h5"))[0]

    def test_inspect(self):
        result = mics("inspect", self.folder / "a", "--tensors")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("layout    4 ranks, shard size 2", result.stdout)
        self.assertIn("exp_avg first/matrix: fp32, 37 x 29, digest", result.stdout)

    def test_verify(self):
        result = mics("verify", self.folder / "a")
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        piece = self.piece()
        data = bytearray(piece.read_bytes())
        data[300] ^= 1
        piece.write_bytes(data)
        result = mics("verify", self.folder / "a")
        self.assertEqual(result.returncode, 1)
        self.assertIn(piece.name, result.stdout)
        result = mics("export", self.folder / "a", self.folder / "weights")
        self.assertEqual(result.returncode, 1)
        self.assertIn(piece.name, result.stderr)
        self.assertFalse((self.folder / "weights").exists())

    def test_diff(self):
        result = mics("diff", self.folder / "a", self.folder / "b" / "step-000000012")
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        self.assertIn("equal: digest", result.stdout)

    def test_export(self):
        out = self.folder / "weights.safetensors"
        result = mics("export", self.folder / "a", out)
        self.assertEqual(result.returncode, 0, result.stderr)
        header, data = safetensors(out)
        self.assertEqual(header.pop("__metadata__")["step"], "12")
        samples = (self.folder / "a" / "sample.txt").read_text().splitlines()
        bits = (self.folder / "a" / "sample.bin").read_bytes()
        names = {"fp64": "F64", "fp32": "F32", "bf16": "BF16", "fp16": "F16"}
        seen = 0
        for line in samples:
            path, dtype, kind, layout, offset, length, *shape = line.split()
            if not path.startswith("/model/"):
                continue
            entry = header[path.removeprefix("/model/").removesuffix("%")]
            self.assertEqual(entry["dtype"], names[dtype])
            shape = [int(extent) for extent in shape] + ([2] if kind == "complex" else [])
            self.assertEqual(entry["shape"], shape)
            begin, end = entry["data_offsets"]
            self.assertEqual(end - begin, int(length))
            if layout == "right":
                self.assertEqual(data[begin:end], bits[int(offset) :][: end - begin], path)
            seen += 1
        self.assertEqual(seen, len(header))
        try:
            from safetensors import safe_open
        except ImportError:
            print("safetensors is not installed: its own reader was not tried", file=sys.stderr)
            return
        with safe_open(out, "np") as file:
            self.assertEqual(set(file.keys()), set(header))
            self.assertEqual(file.get_tensor("second/real").shape, (11, 5, 7))

    def test_export_does_not_depend_on_the_layout(self):
        for name in "ab":
            mics("export", self.folder / name, self.folder / (name + ".out"), "--array", "exp_avg")
        self.assertEqual((self.folder / "a.out").read_bytes(), (self.folder / "b.out").read_bytes())

    def test_prune(self):
        result = mics("prune", self.folder / "a", "--keep", 1)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("0 steps removed, 1 kept", result.stdout)

    def test_what_is_none(self):
        for command in ("inspect", "verify", "prune --keep 1"):
            result = mics(*command.split(), self.folder)
            self.assertEqual(result.returncode, 1, command)
            self.assertIn("found no step in it", result.stderr)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
