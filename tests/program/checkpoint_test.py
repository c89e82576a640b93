# SPDX-License-Identifier: Apache-2.0
"""`mics checkpoint …` on checkpoints of two layouts. Usage: checkpoint_test.py MICS SAMPLE MEANWHILE"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

MICS, SAMPLE, MEANWHILE = sys.argv[1:4]


def mics(*words, environment=None, directory=None):
    return subprocess.run(
        [MICS, "checkpoint", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=directory,
        env=dict(os.environ, **(environment or {})),
    )


def mics_while(command, at, *words):
    """The same, with a command of the shell that runs just before the file `at` is first opened."""
    instrumented = {"ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + ":verify_asan_link_order=0"}
    variables = {"LD_PRELOAD": MEANWHILE, "MICS_TEST_AT": at, "MICS_TEST_MEANWHILE": command}
    return mics(*words, environment=instrumented | variables)


def safetensors(path):
    """Header and data of a safetensors file, by its specification."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def table_entry(value):
    for _ in range(8):
        value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value


CRC_TABLE = [table_entry(i) for i in range(256)]


def edit_as_another_program_would(step, manifest=lambda data: data, commit=lambda text: text):
    """Changes a step and makes its sums fit again."""
    data = manifest((step / "manifest.h5").read_bytes())
    (step / "manifest.h5").write_bytes(data)
    text = commit((step / "COMMIT").read_text())
    text = re.sub("(file manifest.h5 [0-9]+ )[0-9a-f]{8}", rf"\g<1>{crc32c(data):08x}", text)
    body = text[: text.index("end ")]
    (step / "COMMIT").write_text(f"{body}end {crc32c(body.encode()):08x}\n")


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

    def saved(self, step):
        """The folder of another step of `a`."""
        subprocess.run([SAMPLE, self.folder / "a", "4", "2", "0", str(step)], check=True)
        return self.folder / "a" / f"step-{step:09}"

    def retention(self, old, new=None):
        """The command by which a job removes a step, after it saved another."""
        trash = old.with_name(".trash-" + old.name)
        save = f"'{SAMPLE}' '{old.parent}' 4 2 0 {new} && " if new else ""
        return f"{save}mv '{old}' '{trash}' && rm -r '{trash}'"

    def files_of(self, step):
        """One of each kind as MICS_TEST_AT has it."""
        piece = sorted(step.glob("s0001_*.h5"))[0].name
        return [f"{step.name}/{name}" for name in ("COMMIT", "manifest.h5", piece)]

    def test_verify_while_a_job_removes_a_step(self):
        for kind in range(3):
            old = self.saved(20 + 2 * kind)
            new = 21 + 2 * kind
            result = mics_while(self.retention(old, new), self.files_of(old)[kind], "verify", self.folder / "a")
            self.assertEqual((result.returncode, result.stderr), (0, ""), result.stdout)
            self.assertRegex(result.stdout, rf"(?m)^.*/{old.name}: removed while it was to be read$")
            for step in (new, 12):
                self.assertIn(f"step-{step:09}: every byte is as it was saved\n", result.stdout)
            # It was asked for.
            old = self.saved(new)
            command = self.retention(old)
            result = mics_while(command, self.files_of(old)[kind], "verify", self.folder / "a", "--step", new)
            self.assertEqual(result.returncode, 1, result.stdout)

    def test_verify_while_a_job_replaces_a_step(self):
        step = self.folder / "a" / "step-000000012"
        for kind in range(3):
            file = self.files_of(step)[kind]
            result = mics_while(f"'{SAMPLE}' '{self.folder / 'a'}' 4 2", file, "verify", self.folder / "a")
            self.assertEqual((result.returncode, result.stderr), (0, ""), result.stdout)
            self.assertEqual(result.stdout, f"{step}: every byte is as it was saved\n")

    def test_a_step_that_loses_a_file_meanwhile_is_damaged(self):
        step = self.folder / "a" / "step-000000012"
        for name in (self.piece().name, "COMMIT"):
            result = mics_while(f"rm '{step / name}'", f"{step.name}/COMMIT", "verify", self.folder / "a")
            self.assertEqual(result.returncode, 1, result.stdout)
            self.assertIn(name, result.stdout)

    def test_the_newest_step_is_another_when_it_is_removed_meanwhile(self):
        a, out = self.folder / "a", self.folder / "out"
        newest = 20
        for words, kinds in (
            (("inspect", a), (0,)),
            (("diff", a, self.folder / "b"), (1,)),
            (("export", a, out), (1, 2)),
            (("reshard", a, out / "to"), (2,)),
        ):
            for kind in kinds:
                with self.subTest(command=words[0], kind=kind):
                    shutil.rmtree(out, ignore_errors=True)
                    out.unlink(missing_ok=True)
                    old = self.saved(newest)
                    newest += 1
                    command = self.retention(old, newest)
                    result = mics_while(command, self.files_of(old)[kind], *words)
                    self.assertEqual((result.returncode, result.stderr), (0, ""), result.stdout)
                    expected = {"reshard": f"step-{newest:09}", "diff": "equal: digest"}
                    self.assertIn(expected.get(words[0], str(newest)), result.stdout)

    def test_a_step_that_was_asked_for_and_is_removed_meanwhile(self):
        a = self.folder / "a"
        for words in (("inspect", a, "--step", 20), ("inspect", a / "step-000000020"), ("export", a, self.folder / "out", "--step", 20)):
            old = self.saved(20)
            result = mics_while(self.retention(old, 21), self.files_of(old)[1], *words)
            self.assertEqual((result.returncode, len(result.stderr.splitlines())), (1, 1), result)
            self.assertIn("step-000000020\": expected to stay while it is read, found that it was removed", result.stderr)

    def test_diff(self):
        result = mics("diff", self.folder / "a", self.folder / "b" / "step-000000012")
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        self.assertIn("equal: digest", result.stdout)

    def test_diff_tells_a_difference_from_trouble(self):
        a, half = self.folder / "a", self.folder / "half"
        mics("reshard", a, half, "--compute-dtype", "fp64")
        self.assertEqual(mics("diff", a, half).returncode, 1)
        self.assertEqual(mics("diff", a, self.folder / "gone").returncode, 2)
        if os.path.exists("/dev/full"):
            with open("/dev/full", "w") as full:
                command = [MICS, "checkpoint", "diff", a, half]
                result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60)
            self.assertEqual((result.returncode, b"standard output" in result.stderr), (2, True))

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

    def test_an_export_without_a_name_has_that_of_its_step(self):
        result = mics("export", "a", "--format", "safetensors", directory=self.folder)
        self.assertEqual(result.returncode, 0, result.stderr)
        mics("export", self.folder / "a", self.folder / "named")
        own = self.folder / "step-000000012.safetensors"
        self.assertEqual(own.read_bytes(), (self.folder / "named").read_bytes())

    def test_export_does_not_depend_on_the_layout(self):
        for name in "ab":
            mics("export", self.folder / name, self.folder / (name + ".out"), "--array", "exp_avg")
        self.assertEqual((self.folder / "a.out").read_bytes(), (self.folder / "b.out").read_bytes())

    def test_reshard(self):
        to = self.folder / "to"
        result = mics("reshard", self.folder / "a", to, "--ranks", 6, "--shard-size", 3)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertIn("from 4 ranks, shard size 2 to 6 ranks, shard size 3", result.stdout)
        self.assertIn(", as before", result.stdout)
        for other in "ab":
            result = mics("diff", self.folder / other, to)
            self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        self.assertEqual(mics("verify", to).returncode, 0)
        self.assertIn("6 ranks, shard size 3", mics("inspect", to).stdout)

        result = mics("reshard", to, self.folder / "half", "--preset", "ddp", "--compute-dtype", "fp64")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertIn("in another dtype", result.stdout)
        text = mics("inspect", self.folder / "half", "--tensors").stdout
        self.assertIn("6 ranks, shard size 1", text)
        self.assertIn("exp_avg first/matrix: fp64, 37 x 29, digest", text)
        self.assertIn("weights frozen/table: fp16", text)

    def test_reshard_refusals_are_one_line(self):
        a, b = self.folder / "a", self.folder / "b"
        for words, expected in (
            (("--ranks", 4, "--shard-size", 3), "divides 4 ranks: 1, 2, 4"),
            (("--ranks", 3), "divides 3 ranks: 1, 3, found 2"),
            (("--preset", "mics"), "divides 4 ranks: 1, 2, 4, found none"),
            (("--preset", "zero3", "--shard-size", 2), "4, which is preset zero3, found 2"),
            (("--step", 5), "step-000000005.*there are 12$"),
            (("--ranks", 65537, "--shard-size", 65537), "at most 65536, each a file, found 65537"),
        ):
            result = mics("reshard", a, self.folder / "to", *words)
            self.assertEqual(result.returncode, 1, words)
            self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
            self.assertRegex(result.stderr, expected)
            self.assertFalse((self.folder / "to").exists())
        for same in (a, self.folder / "b" / ".." / "a"):
            result = mics("reshard", a / "step-000000012", same)
            self.assertEqual(result.returncode, 1)
            self.assertIn("another directory", result.stderr)
        result = mics("reshard", a, b, "--ranks", 1, "--shard-size", 1)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("1 ranks, shard size 1", mics("inspect", b).stdout)

    def test_prune(self):
        result = mics("prune", self.folder / "a", "--keep", 1)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("0 steps removed, 1 kept", result.stdout)

    def test_a_step_stays_as_it_was_saved(self):
        step = self.folder / "a" / "step-000000012"
        before = sorted(step.iterdir())
        for words in (("prune", step, "--keep", 1), ("reshard", self.folder / "b", step)):
            result = mics(*words)
            self.assertEqual((result.returncode, len(result.stderr.splitlines())), (1, 1), result)
            self.assertIn("name the directory that it is in", result.stderr)
        self.assertEqual(sorted(step.iterdir()), before)

    def test_an_export_takes_the_place_of_files_only(self):
        os.mkfifo(self.folder / "pipe")
        for to, expected in (
            ("pipe", "pipe.*expected the name of a file, found a pipe or a device"),
            ("b", "b.*found a folder"),
            ("b/", "b/.*found a folder"),
            ("c/", "c/.*found none"),
        ):
            result = mics("export", self.folder / "a", f"{self.folder}/{to}")
            self.assertEqual((result.returncode, len(result.stderr.splitlines())), (1, 1), result)
            self.assertRegex(result.stderr, expected)
        self.assertTrue((self.folder / "pipe").is_fifo())

    def test_sums_that_fit_do_not_stand_for_the_digest(self):
        """Of a manifest that another program wrote, and wrote wrongly."""
        step = self.folder / "a" / "step-000000012"

        def exchange_datasets(data):
            lists = re.findall(rb'"offsets":\[([0-9,]+)\]', data)
            self.assertTrue(lists)
            for text in lists:
                first, second, *rest = text.split(b",")
                data = data.replace(b"[" + text + b"]", b"[" + b",".join([second, first, *rest]) + b"]")
            return data

        original = (step / "manifest.h5").read_bytes()
        edit_as_another_program_would(step, manifest=exchange_datasets)
        result = mics("export", self.folder / "a", self.folder / "weights")
        self.assertEqual((result.returncode, len(result.stderr.splitlines())), (1, 1), result)
        self.assertRegex(result.stderr, "master_weights of parameter .* expected digest")
        self.assertFalse((self.folder / "weights").exists())

        edit_as_another_program_would(
            step, lambda _: original, lambda text: re.sub("digest .{8}", "digest 01234567", text)
        )
        for command in ("inspect", "verify"):
            result = mics(command, self.folder / "a")
            self.assertEqual(result.returncode, 1, result)
            self.assertRegex(result.stdout + result.stderr, "COMMIT.*found 01234567")

    def test_an_export_that_fails_leaves_nothing(self):
        piece = self.piece()
        data = bytearray(piece.read_bytes())
        data[len(data) // 2] ^= 1
        piece.write_bytes(data)
        self.assertEqual(mics("export", self.folder / "a", self.folder / "weights").returncode, 1)
        self.assertEqual(sorted(p.name for p in self.folder.iterdir()), ["a", "b"])

    def test_numbers_are_whole(self):
        a = self.folder / "a"
        for words, expected in (
            (("inspect", a, "--step", "1.5"), "--step: expected an integer of at least 0, found"),
            (("inspect", a, "--step", "-1"), '--step: expected .* 0, found "-1"'),
            (("inspect", a, "--step", "9" * 20), "--step: expected an integer"),
            (("prune", a, "--keep", "0"), '--keep: expected an integer of at least 1, found "0"'),
            (("prune", a, "--keep", "1", "--keep-every", "x"), "--keep-every: expected .*x"),
            (("reshard", a, "to", "--ranks", "2147483647"), "--ranks: expected .* at most 1048576"),
            (("frob", a), 'command of mics checkpoint: expected inspect, .*, found "frob"'),
        ):
            result = mics(*words)
            self.assertEqual((result.returncode, len(result.stderr.splitlines())), (2, 1), result)
            self.assertRegex(result.stderr, expected)

    def test_what_does_not_print_stays_on_one_line(self):
        for words in (
            ("inspect", f"{self.folder}/a\nb\033[1m"),
            ("frob\n\033[1m",),
            ("prune", "a", "--keep", "\n"),
        ):
            result = mics(*words)
            self.assertNotEqual(result.returncode, 0)
            self.assertEqual(len(result.stderr.splitlines()), 1, result)
            self.assertNotIn("\033", result.stderr)

    def test_bad_input_is_one_line_that_names_it(self):
        step = self.folder / "a" / "step-000000012"
        piece = self.piece()
        (self.folder / "empty").mkdir()
        foreign = self.folder / "foreign.h5"
        shutil.copy(piece, foreign)
        shutil.copytree(step, self.folder / "c" / "step-000000012")
        shutil.copy(step / "manifest.h5", self.folder / "c" / "step-000000012" / piece.name)
        shutil.copytree(step, self.folder / "d" / "step-000000012")
        shutil.copy(piece, self.folder / "d" / "step-000000012" / "manifest.h5")
        shutil.copytree(step, self.folder / "e" / "step-000000013")
        shutil.copytree(step, self.folder / "f" / "step-000000012")
        (self.folder / "f" / "step-000000012" / piece.name).unlink()
        for path, expected in (
            ("nowhere", "nowhere.*no step in it"),
            ("empty", "empty.*no step in it"),
            ("foreign.h5", "foreign.h5.*Not a directory"),
            ("c", piece.name + ".*expected [0-9]+ bytes"),
            ("d", "manifest.h5.*expected [0-9]+ bytes"),
            ("e", "COMMIT.*expected step 13, found step 12"),
            ("f", piece.name + ".*No such file"),
        ):
            for words in (("inspect",), ("diff", step), ("export", "out"), ("reshard", "to")):
                command, *rest = words
                if command == "diff":
                    result = mics("diff", *rest, self.folder / path)
                else:
                    result = mics(command, self.folder / path, *(self.folder / w for w in rest))
                with self.subTest(path=path, command=command):
                    self.assertEqual(result.returncode, 2 if command == "diff" else 1, result.stdout)
                    self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
                    self.assertRegex(result.stderr, expected)
                    self.assertFalse((self.folder / "out").exists())
                    self.assertFalse((self.folder / "to").exists())

    def test_what_is_none(self):
        for command in ("inspect", "verify", "prune --keep 1"):
            result = mics(*command.split(), self.folder)
            self.assertEqual(result.returncode, 1, command)
            self.assertIn("found no step in it", result.stderr)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
