# SPDX-License-Identifier: Apache-2.0
"""`mics train` on files of tokens: tokens_test.py MICS [LAUNCHER WORD ...]"""

import array
import json
import math
import pathlib
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True
import launch  # noqa: E402
from launch import edited  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="mics_tokens_"))
STEPS = 20
SIMILAR = 1e-4  # fp32 sums in another order
VOCABULARY = 3000


def stored(type_code, tokens):
    numbers = array.array(type_code, tokens)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def npy(descr, data, count):
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({count},), }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def setUpModule():
    choice = random.Random(1)
    # Of few tokens most: there is something to learn.
    tokens = [min(VOCABULARY - 1, int(choice.expovariate(0.02))) for _ in range(20000)]
    files = {
        "a.bin": stored("H", tokens),
        "long.bin": stored("I", tokens),
        "a.npy": npy("<u2", stored("H", tokens), len(tokens)),
        "long.npy": npy("<i8", stored("q", tokens), len(tokens)),
        "wrong.npy": npy(">u2", stored("H", tokens), len(tokens)),
        "bytes.bin": bytes(token % 256 for token in tokens),
        "bytes.npy": npy("|u1", bytes(token % 256 for token in tokens), len(tokens)),
    }
    for name, content in files.items():
        (FOLDER / name).write_bytes(content)
    half = len(tokens)  # bytes of half the tokens
    (FOLDER / "parts").mkdir()
    (FOLDER / "parts" / "1.bin").write_bytes(files["a.bin"][:half])
    (FOLDER / "parts" / "2.bin").write_bytes(files["a.bin"][half:])
    (FOLDER / "parts" / "about.txt").write_text("two parts")
    text = edited({"data.format": "uint16", "data.files": ["a.bin"], "model.vocabulary": VOCABULARY,
                   "engine.optimizer.params.lr": 0.01}, steps=STEPS, print_every=10, sample_tokens=5,
                  sample_prompt_tokens=[7, 8])
    (FOLDER / "deck.json").write_text(text)


def tearDownModule():
    shutil.rmtree(FOLDER)


class Tokens(unittest.TestCase):
    maxDiff = None

    def train(self, *words, ranks=1, deck=FOLDER / "deck.json", seconds=None):
        """Trains; returns (standard output, metrics)."""
        metrics = FOLDER / "metrics.jsonl"
        metrics.unlink(missing_ok=True)
        result = launch.run("train", deck, f"training.metrics={metrics}", *words, ranks=ranks, seconds=seconds)
        self.assertEqual((result.status, result.stderr), (0, ""), result)
        return result.stdout, [json.loads(line) for line in metrics.read_text().splitlines()]

    def losses(self, records, key="loss_nats_per_token"):
        return [record[key] for record in records if record["event"] == "step"]

    def expect_similar(self, found, expected):
        self.assertEqual(len(found), len(expected))
        for a, b in zip(found, expected):
            self.assertLessEqual(abs(a - b), SIMILAR * abs(b))

    def test_every_format_and_number_of_ranks_gives_the_same_losses(self):
        text, records = self.train()
        reference = self.losses(records)
        self.assertAlmostEqual(reference[0], math.log(VOCABULARY), delta=0.1)
        self.assertLess(reference[-1], reference[0] - 0.5)
        self.assertIn(f"GPT over tokens of a vocabulary of {VOCABULARY}: ", text)
        self.assertIn("\n  1 files, 20000 tokens: ", text)
        table = [
            (2, ("data.files=long.bin", "data.format=uint32")),
            (3, ("data.files=a.npy", "data.format=npy")),
            (4, ("data.files=long.npy", "data.format=npy", "engine.zero_optimization.mics_shard_size=2")),
            (2, ("data.files=parts", "model.recompute=true")),
        ]
        for ranks, words in table:
            with self.subTest(ranks=ranks, words=words):
                self.expect_similar(self.losses(self.train(*words, ranks=ranks)[1]), reference)

    def test_losses_are_told_in_nats_and_tokens_as_numbers(self):
        text, records = self.train(ranks=2)
        self.assertEqual(len(re.findall(r"^step \d+/20  loss \d\.\d{3} nats/token  [\d.]+[kMG]? tokens/s"
                                        r"  \d+\.\d% of peak  ETA \d+:\d\d$", text, re.M)), 2, text)
        found = re.search(r"^validation after step 20: (\d\.\d{3}) nats/token \((\d+\.\d{3}) bits\)$", text, re.M)
        self.assertIsNotNone(found, text)
        self.assertAlmostEqual(float(found[1]) / math.log(2), float(found[2]), delta=0.002)
        self.assertRegex(text, r"\n  validation: GPT \d\.\d{3} nats/token \(\S+ bits\), bigram model \d\.\d{3} nats/token")
        self.assertRegex(text, r"\nsample\n7 8( \d+){5}\n$")
        result = records[-1]
        self.assertAlmostEqual(result["validation_nats_per_token"], float(found[1]), delta=0.001)
        self.assertGreater(result["bigram_nats_per_token"], 1)

    def test_tokens_that_are_bytes_train_as_bytes_do(self):
        deck = FOLDER / "bytes.json"
        content = json.loads((FOLDER / "deck.json").read_text())
        for key in ("sample_tokens", "sample_prompt_tokens"):
            del content["training"][key]
        deck.write_text(json.dumps(content))
        words = ("model.vocabulary=256",)
        _, as_bytes = self.train(*words, "data.format=bytes", "data.files=bytes.bin", deck=deck)
        _, as_array = self.train(*words, "data.format=npy", "data.files=bytes.npy", deck=deck)
        bits = self.losses(as_bytes, "loss_bits_per_byte")
        self.expect_similar([nats / math.log(2) for nats in self.losses(as_array)], bits)

    def test_an_array_of_the_other_byte_order_is_refused(self):
        for ranks in (1, 3):
            result = launch.run("train", FOLDER / "deck.json", "data.format=npy", "data.files=wrong.npy", ranks=ranks)
            self.assertNotEqual(result.status, 0)
            self.assertRegex(result.stderr, r"^mics train: .*wrong\.npy: expected elements .*, found >u2 \(big endian\)"
                                            r"; .*\n$")

    def test_the_deck_with_its_recipe(self):
        deck = ROOT / "inputs" / "gpt_tokens.json"
        recipe = re.search(r"^python3 - \S+ <<'EOF'\n(.*?)^EOF$", deck.read_text(), re.M | re.S)[1]
        file = FOLDER / "recipe.bin"
        subprocess.run([sys.executable, "-", file], input=recipe.encode(), cwd=ROOT, check=True)
        self.assertGreater(file.stat().st_size, 200000)
        words = (f"data.files={file}", "training.steps=3", "training.validate_every=0", "data.validation_windows=24")
        text, records = self.train(*words, ranks=4, deck=deck, seconds=120)
        self.assertAlmostEqual(self.losses(records)[0], math.log(4096), delta=0.2)
        self.assertIn("blocks recomputed", text)


if __name__ == "__main__":
    launch.PROGRAM, *launch.LAUNCHER = sys.argv[1:]
    unittest.main(argv=sys.argv[:1], verbosity=2)
