# SPDX-License-Identifier: Apache-2.0
"""Bad input to the program: bad_input_test.py MICS [LAUNCHER WORD ...]

However many ranks meet it: the run ends, with a status other than 0 and one line that says where,
what was expected, what was found and what to do.
"""

import dataclasses
import os
import pathlib
import re
import shutil
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True
import launch  # noqa: E402
from launch import edited  # noqa: E402

FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="mics_bad_input_"))
DECK = FOLDER / "deck.json"
LONGEST_LINE = 600
BOTH = (1, 4)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    expects: str  # what is found in the line, a regular expression
    words: tuple = ()  # behind the deck: overrides
    deck: object = None  # what the deck holds, str or bytes; None: a good one
    ranks: tuple = BOTH
    seconds: int = None
    has_started: bool = False  # it may say what it is going to do before it fails
    command: tuple = None  # all words, in place of `train DECK word ...`


def deck(name, expects, text, **more):
    """A deck that cannot be used."""
    return Case(name, expects, deck=text, **more)


def value(name, expects, path, content, **more):
    """A good deck but for one value."""
    return Case(name, expects, deck=edited({path: content}), **more)


def override(name, expects, *words, **more):
    """A good deck with a bad word behind it."""
    return Case(name, expects, words=words, **more)


def command(name, expects, *words, **more):
    """A bad command line."""
    return Case(name, expects, command=words, **more)


def syntax(name, line, text, **more):
    return deck("syntax_" + name, rf"deck\.json:{line}: expected valid JSON, found .+", text, **more)


def unknown(name, path, key, meant):
    where = re.escape(".".join(filter(None, (path, key))))
    return value(
        "unknown_key_" + name,
        rf'deck\.json: {where}: expected a known key, found "{key}"; did you mean "{meant}"\?',
        ".".join(filter(None, (path, key))),
        1,
    )


LR = "engine.optimizer.params.lr"
ZERO = "engine.zero_optimization."
SHARD = ZERO + "mics_shard_size"
RATE = r"deck\.json: engine\.optimizer\.params\.lr: expected a finite number"


def lr_text(text):
    """A good deck in which the learning rate is this text."""
    return edited().replace('"lr": 0.003', '"lr": ' + text)


CASES = [
    # The command line.
    command("no_subcommand", r"^mics: .*subcommand is required; try mics --help$"),
    command("unknown_subcommand", r"^mics: .*\btrian\b.*; try mics", "trian", DECK),
    command("unknown_option", r"^mics: .*--fast; try mics", "train", DECK, "--fast"),
    command("no_deck", r"^mics: .*deck is required; try mics", "train"),
    command("unknown_config_command",
            r'^mics: .*command of mics config: expected explain, found "explian"; try mics', "config", "explian",
            ranks=(1,)),
    command("no_config_command", r"^mics: .*subcommand is required; try mics", "config", ranks=(1,)),
    command("no_config_file", r"^mics: .*file is required; try mics", "config", "explain", ranks=(1,)),
    command("config_missing", r"^mics config explain: .*/gone\.json: expected a file that can be read",
            "config", "explain", FOLDER / "gone.json"),
    command("config_syntax", r"^mics config explain: .*/text\.txt:1: expected valid JSON",
            "config", "explain", FOLDER / "text.txt", ranks=(1,)),
    command("deepspeed_missing", r"/gone\.json: expected a file that can be read",
            "train", DECK, "--deepspeed", FOLDER / "gone.json"),
    override("word_without_equals", r'argument "steps": expected key\.inner=value', "steps"),
    override("word_without_key", r'argument "=3": expected key\.inner=value', "=3", ranks=(1,)),
    override("word_unknown", r'training\.setps: expected a known key, .*"steps"\?', "training.setps=3"),
    override("word_below_a_number", r'an object to hold "training\.steps\.x", found 3',
             "training.steps.x=3", ranks=(1,)),
    override("word_of_other_type", r"deck\.json: model: expected an object, found 5", "model=5",
             ranks=(1,)),
    override("word_not_utf8", r"data\.files", b"data.files=\xff\xfe"),
    # Of a build for the host, where the path of device memory runs too.
    override("nccl_without", r"nccl: expected ranks that can use it, found this build has no NCCL; use \"auto\"",
             "engine.mics.memory=device", "engine.mics.nccl=on"),
    # The deck as a file.
    command("deck_missing", r"/gone\.json: expected a file that can be read, found none; check the path",
            "train", FOLDER / "gone.json"),
    command("deck_folder", re.escape(str(FOLDER)) + r": expected a file.*\b(folder|directory)\b",
            "train", FOLDER),
    deck("deck_empty", r"deck\.json: expected a JSON object, found an empty file", ""),
    deck("deck_blank", r"deck\.json: expected a JSON object, found an empty file", " \n\t\r\n", ranks=(1,)),
    deck("deck_array", r"deck\.json: expected a JSON object, found \[1,2\]", "[1, 2]", ranks=(1,)),
    deck("deck_binary", r"deck\.json(:\d+)?: expected valid JSON, found .+",
         bytes(range(128, 256)) * 20),
    deck("deck_program", r"deck\.json(:\d+)?: expected valid JSON, found .+",
         b"\x7fELF\2\1\1" + bytes(range(256)) * 20),
    deck("deck_zeros", r"deck\.json(:\d+)?: expected valid JSON, found .+", bytes(1000), ranks=(1,)),
    deck("deck_not_utf8", r"deck\.json:1: expected valid JSON", b'{"purpose": "\xe4\xf6"}', ranks=(1,)),
    deck("deck_one_long_word", r"deck\.json:1: expected valid JSON", '{"purpose": "' + "x" * 10**6,
         ranks=(1,)),
    deck("deck_deep_array", r"deck\.json", '{"model": ' + "[" * 200000 + "]" * 200000 + "}", ranks=(1,)),
    deck("deck_deep_object", r"deck\.json", '{"model": ' * 100000 + "1" + "}" * 100000, ranks=(1,)),
    deck("deck_zero_byte", r"deck\.json:2: expected valid JSON, found a zero byte", b"{}\n\0{", ranks=(1,)),
    override("word_deep", r"deck\.json: expected at most 64 levels of nesting, found more",
             "model" + ".x" * 10000 + "=1", ranks=(1,)),
    override("word_deep_value", r"deck\.json: expected at most 64 levels of nesting, found more",
             "model=" + "[" * 10000 + "]" * 10000, ranks=(1,)),
    # Its syntax: the line where it goes wrong.
    syntax("no_colon", 3, '{\n "purpose": "a",\n "expected" "b"\n}\n'),
    syntax("no_comma", 3, '{\n "purpose": "a"\n "expected": "b"\n}\n'),
    syntax("comma_at_end", 4, '{\n "purpose": "a",\n "expected": "b",\n}\n', ranks=(1,)),
    syntax("not_closed", "[34]", '{\n "purpose": "a",\n "expected": "b"\n', ranks=(1,)),
    syntax("open_string", 2, '{\n "purpose": "a: b\n,\n "expected": "b"\n}\n', ranks=(1,)),
    syntax("open_word", 2, '{\n "purpose": tru\n,\n "expected": "b"\n}\n', ranks=(1,)),
    syntax("open_comment", "[1-4]", "// a\n{}\n/* b\n\n", ranks=(1,)),
    syntax("two_objects", 2, "{}\n{}\n", ranks=(1,)),
    deck("duplicate_key", r'deck\.json.*: expected each key once, found two values of "width"',
         edited().replace('"width": 16', '"width": 16, "width": 32')),
    # Wrong types.
    value("text_for_number", r'deck\.json: model\.width: expected an integer, found "16"', "model.width", "16"),
    value("fraction_for_integer", r"deck\.json: training\.steps: expected an integer.*, found 1\.5",
          "training.steps", 1.5, ranks=(1,)),
    value("number_for_section", r"deck\.json: engine: expected an object, found 3", "engine", 3, ranks=(1,)),
    value("array_for_section", r"deck\.json: model: expected an object, found \[\]", "model", [], ranks=(1,)),
    value("number_for_file", r"data\.files: expected a string or an array of strings, found \[7\]",
          "data.files", [7], ranks=(1,)),
    value("number_for_switch", r"engine\.bf16\.enabled: expected true or false, found 1",
          "engine.bf16", {"enabled": 1}, ranks=(1,)),
    value("one_beta", r"params\.betas: expected two numbers, found 1", "engine.optimizer.params.betas",
          [0.9], ranks=(1,)),
    value("text_for_rate", RATE + r', found "fast"', LR, "fast", ranks=(1,)),
    value("no_steps", r"training\.steps: expected an integer, found nothing; add the key",
          "training.steps", ..., ranks=(1,)),
    # Unknown keys.
    unknown("top", "", "modle", "model"),
    unknown("model", "model", "widht", "width"),
    unknown("data", "data", "file", "files"),
    unknown("training", "training", "setps", "steps"),
    unknown("engine", "engine", "gradient_cliping", "gradient_clipping"),
    unknown("zero", "engine.zero_optimization", "mics_shard_sise", "mics_shard_size"),
    unknown("engine_mics", "engine.mics", "prefech", "prefetch"),
    unknown("optimizer", "engine.optimizer", "parms", "params"),
    unknown("params", "engine.optimizer.params", "lrr", "lr"),
    deck("unknown_section", r'trainig: expected a known key, .*did you mean "training"\?',
         edited().replace('"training"', '"trainig"')),
    # Shard sizes.
    value("p_that_does_not_fit", r"engine\.zero_optimization\.mics_shard_size: expected a divisor of the [14] ranks, found 3; "
          r"sizes that fit: 1(, 2, 4)?$", SHARD, 3),
    value("p_too_large", r"shard_size: expected a divisor of the [14] ranks, found 8; sizes that fit: 1",
          SHARD, 8),
    value("p_zero", r"mics_shard_size: expected 1 or more ranks, or -1 for all, found 0", SHARD, 0),
    value("p_negative", r"mics_shard_size: expected .*-1 for all, found -2", SHARD, -2),
    value("p_zero_own_key", r"shard_size: expected .*, found 0", "engine.mics", {"shard_size": 0}),
    value("p_own_key", r"engine\.mics\.shard_size: expected a divisor .*, found 3",
          "engine.mics", {"preset": "mics", "shard_size": 3}),
    value("p_own_key_without_preset", r"shard_size: expected .*, found ", "engine.mics",
          {"shard_size": 3}, ranks=(4,)),
    value("p_fraction", r"mics_shard_size: expected an integer, found 1\.5", SHARD, 1.5, ranks=(1,)),
    value("p_huge", r"mics_shard_size: expected .*, found 4294967296", SHARD, 2**32, ranks=(1,)),
    # Learning rates: in the deck, and behind it.
    deck("lr_nan", r"deck\.json:\d+: expected valid JSON, found .*N", lr_text("NaN")),
    deck("lr_infinity", r"deck\.json:\d+: expected valid JSON, found .*I", lr_text("Infinity")),
    deck("lr_1e999", r"deck\.json.*: expected .*, found .*1e999", lr_text("1e999")),
    value("lr_negative", RATE + r" of at least 0.*, found -0\.1", LR, -0.1),
    override("lr_nan_behind", RATE + r', found "NaN"', LR + "=NaN"),
    override("lr_infinity_behind", RATE + r', found "inf"', LR + "=inf", ranks=(1,)),
    override("lr_1e999_behind", RATE + r', found "1e999"', LR + "=1e999"),
    override("lr_negative_behind", RATE + r" of at least 0.*, found -1", LR + "=-1"),
    override("lr_empty_behind", RATE + r', found ""', LR + "=", ranks=(1,)),
    value("lr_ratio_negative", r"learning.rate.*: expected .*, found -", "training.final_learning_rate_ratio",
          -1),
    # Other numbers.
    value("width_and_heads", r"model\.width: expected a multiple of the 3 heads, found 16", "model.heads", 3),
    value("no_layers", r"model\.layers: expected an integer of at least 1 .*, found 0", "model.layers", 0,
          ranks=(1,)),
    override("clipping_nan", r'gradient_clipping: expected a finite number, found "nan"',
             "engine.gradient_clipping=nan", ranks=(1,)),
    value("beta_one", r"betas\[1\]: expected .*, found 1", "engine.optimizer.params.betas", [0.9, 1],
          ranks=(1,)),
    value("momentum", r"engine\.optimizer\.params\.momentum: expected .*at most 0\.9+, found 1\.5",
          "engine.optimizer", {"type": "SGD", "params": {"momentum": 1.5}}, ranks=(1,)),
    value("optimizer_type", r'engine\.optimizer\.type: expected "AdamW".*, found "Muon"; .*"AdamW"',
          "engine.optimizer", {"type": "Muon"}, ranks=(1,)),
    value("max_grad_norm", r"params\.max_grad_norm: expected no such .*, found 1; use gradient_clipping",
          "engine.optimizer.params.max_grad_norm", 1, ranks=(1,)),
    value("scheduler_type", r'engine\.scheduler\.type: expected "WarmupLR", .*, found "StepLR"; ',
          "engine.scheduler", {"type": "StepLR"}, ranks=(1,)),
    value("cycle_without_bounds", r"params\.cycle_min_lr: expected a learning rate, found nothing; add it",
          "engine.scheduler", {"type": "OneCycle"}, ranks=(1,)),
    value("temperature", r"sample_temperature: expected more than 0, found 0", "training.sample_temperature",
          0, ranks=(1,)),
    value("seed_negative", r"data\.seed: expected an integer of at least 0, found -1", "data.seed", -1,
          ranks=(1,)),
    # Batches.
    value("batch_zero", r"engine\.train_batch_size: expected an integer of at least 1, found 0",
          "engine.train_batch_size", 0),
    value("batch_negative", r"engine\.train_batch_size: expected an integer of at least 1, found -12",
          "engine.train_batch_size", -12, ranks=(1,)),
    value("batch_missing", r"train_batch_size: expected train_batch_size or .*, found neither",
          "engine.train_batch_size", ...),
    deck("batch_of_micro_batches", r"engine\.train_batch_size: expected a multiple of 5 a micro-step, found 12; "
         r"leave train_micro_batch_size_per_gpu out",
         edited({"engine.train_micro_batch_size_per_gpu": 5})),
    deck("batch_of_micro_batches_and_ranks", r"engine\.train_batch_size: expected a multiple of 6 a micro-step x "
         r"4 ranks, found 12; leave train_micro_batch_size_per_gpu out",
         edited({"engine.train_micro_batch_size_per_gpu": 6}), ranks=(4,)),
    deck("batch_triple", r"engine\.train_batch_size: expected a multiple of 2 a micro-step x 5 micro-steps, "
         r"found 12; leave one of the three out",
         edited({"engine.train_micro_batch_size_per_gpu": 2, "engine.gradient_accumulation_steps": 5})),
    deck("batch_triple_and_ranks", r"engine\.train_batch_size: expected 2 a micro-step x 3 micro-steps x [14] "
         r"ranks = (6|24), found 12; leave one of the three out",
         edited({"engine.train_micro_batch_size_per_gpu": 2, "engine.gradient_accumulation_steps": 3})),
    value("more_micro_steps_than_samples",
          r"gradient_accumulation_steps: expected at most the 12 samples, found 13",
          "engine.gradient_accumulation_steps", 13),
    value("batch_of_2_to_32", r"batch", "engine.train_batch_size", 2**32 + 12, has_started=True),
    value("batch_product_overflows", r"batch|accumulation", "engine", {
        "train_micro_batch_size_per_gpu": 2**40, "gradient_accumulation_steps": 2**40}, has_started=True),
    # The engine's own keys.
    override("slots_huge", r"mics\.slots: expected .*at most 1024, found 1000000", "engine.mics.slots=1000000"),
    override("slots_zero", r"mics\.slots: expected an integer of at least 1 .*, found 0",
             "engine.mics.slots=0", ranks=(1,)),
    override("slots_too_few", r'slots.*at least 2', "engine.mics.slots=1", has_started=True),
    override("gradient_dtype_of_its_own", r"mics\.gradient_dtype: expected the compute dtype, fp32, .*found bf16",
             "engine.mics.gradient_dtype=bf16", has_started=True, ranks=(1,)),
    override("prefetch_huge", r"mics\.prefetch: expected .*at most 1024, found 1000000",
             "engine.mics.prefetch=1000000"),
    override("prefetch_negative", r"mics\.prefetch: expected .*at least 0 .*, found -1",
             "engine.mics.prefetch=-1", ranks=(1,)),
    override("memory_budget_none", r"memory_budget: expected at most 1000 bytes a rank, found \d+ in the "
             r"plan; no shard size fits", "engine.mics.memory_budget=1000"),
    override("memory_budget_zero", r"memory_budget: expected an integer of at least 1, found 0",
             "engine.mics.memory_budget=0", ranks=(1,)),
    override("ranks_per_node", r"ranks_per_node: expected an integer of at least 1 .*, found 0",
             "engine.mics.ranks_per_node=0", ranks=(1,)),
    override("timeout", r"mics\.timeout: expected .*, found 0", "engine.mics.timeout=0", ranks=(1,)),
    override("preset", r'mics\.preset: expected ddp, .*, found "zero4"', "engine.mics.preset=zero4",
             ranks=(1,)),
    override("dtype", r'compute_dtype: expected fp64, .*, found "fp8"', "engine.mics.compute_dtype=fp8",
             ranks=(1,)),
    override("dtype_of_bf16", r"engine\.mics\.compute_dtype: expected bf16, which is enabled, found fp32",
             'engine.bf16={"enabled":true}', "engine.mics.compute_dtype=fp32"),
    override("bf16_and_fp16", r"engine\.fp16\.enabled: expected one of fp16 and bf16, found both; disable",
             'engine.bf16={"enabled":true}', 'engine.fp16={"enabled":true}'),
    value("loss_scale_negative", r"engine\.fp16\.loss_scale: expected 0 \(dynamic\) or .*, found -1",
          "engine.fp16", {"enabled": True, "loss_scale": -1}, ranks=(1,)),
    value("loss_scale_window", r"fp16\.loss_scale_window: expected an integer of at least 1, found 0",
          "engine.fp16", {"enabled": True, "loss_scale_window": 0}, ranks=(1,)),
    value("loss_scale_minimum", r"deck\.json: engine\.fp16\.min_loss_scale: expected .*, found 131072",
          "engine.fp16", {"enabled": True, "min_loss_scale": 131072}, ranks=(1,)),
    override("master_bf16", r"master_dtype: expected fp32 or fp64, found bf16",
             "engine.mics.master_dtype=bf16", ranks=(1,)),
    override("stage_1", r"zero_optimization\.stage: expected 0, 2 or 3, found 1", ZERO + "stage=1"),
    override("stage_4", r"zero_optimization\.stage: expected .*at most 3, found 4", ZERO + "stage=4",
             ranks=(1,)),
    override("stage_0_with_p", r"mics_shard_size: expected stage 3, found stage 0", ZERO + "stage=0",
             SHARD + "=2", ranks=(4,)),
    override("two_stage_on_one_node", r"two-stage gather: expected .*, found shard group 0 lies on one node; "
             r"use ", "engine.mics.two_stage=on"),
    override("offload", r'offload_param\.device: expected "none", found "cpu"',
             ZERO + 'offload_param={"device":"cpu"}', ranks=(1,)),
    # The text.
    override("no_files", r"data\.files: expected files or folders to train on, found none", "data.files=[]"),
    override("file_without_name", r"data\.files", "data.files="),
    value("file_with_a_zero_byte", r"data\.files: expected a name of a file, found a zero byte in it", "data.files",
          ["text.txt\0more"], ranks=(1,)),
    value("metrics_with_a_zero_byte", r"training\.metrics: expected a name .*zero byte", "training.metrics", "m\0",
          ranks=(1,)),
    value("directory_with_a_zero_byte", r"checkpoint\.directory: expected a name .*zero byte",
          "checkpoint.directory", "run\0", ranks=(1,)),
    override("file_missing", r"/gone\.txt: expected a file or folder, found nothing there; check the path",
             "data.files=gone.txt"),
    override("file_empty", r"/empty\.txt: expected text, found an empty file; ", "data.files=empty.txt"),
    override("second_file_empty", r"/empty\.txt: expected text, found an empty file; ",
             'data.files=["text.txt","empty.txt"]', ranks=(1,)),
    override("folder_empty", r"/nothing: expected text, found no text file below it; ", "data.files=nothing"),
    override("file_unreadable", r": expected a readable file, found .*; check",
             "data.files=/proc/self/mem" if os.geteuid() == 0 else "data.files=secret.txt"),
    override("file_endless", r"/pipe: expected a (regular )?file", "data.files=pipe", seconds=10),
    override("file_of_two_lines", r"a.b: expected a file or folder, found nothing there", "data.files=a\nb"),
    override("text_too_short", r"text: expected at least 90 bytes, found 20; give more text",
             "data.files=short.txt"),
    # Tokens.
    override("format", r'data\.format: expected bytes, uint16, uint32 or npy, found "int8"',
             "data.format=int8", ranks=(1,)),
    override("vocabulary_missing", r"model\.vocabulary: expected the number of tokens of the vocabulary, found "
             r"nothing; add the key$", "data.format=uint16"),
    override("vocabulary_zero", r"model\.vocabulary: expected an integer of at least 1", "model.vocabulary=0",
             ranks=(1,)),
    override("byte_outside_the_vocabulary", r"text\.txt: element \d+: expected a token below the vocabulary of "
             r"117, found \d+; raise model\.vocabulary", "model.vocabulary=117"),
    override("token_outside_the_vocabulary", r"text\.txt: element 0: expected a token below the vocabulary of "
             r"2000, found \d+; raise", "model.vocabulary=2000", "data.format=uint16"),
    override("token_of_half_the_bytes", r"odd\.bin: expected a multiple of 4 bytes, found 4002; the file was cut",
             "model.vocabulary=2000", "data.format=uint32", "data.files=odd.bin"),
    override("no_array", r"text\.txt: expected a NumPy array \(\.npy\), found a file that does not begin",
             "model.vocabulary=2000", "data.format=npy"),
    override("prompt_outside_the_vocabulary", r"sample_prompt_tokens: expected tokens below the vocabulary of 10, "
             r"found 10", "model.vocabulary=10", "data.format=npy", "training.sample_tokens=1",
             "training.sample_prompt_tokens=[9,10]", ranks=(1,)),
    override("prompt_is_no_number_of_a_token", r"sample_prompt_tokens: expected numbers of tokens, found -1",
             "model.vocabulary=10", "data.format=npy", "training.sample_prompt_tokens=[-1]", ranks=(1,)),
    override("peak", r"peak_flops: expected more than 0 .*, found 0", "training.peak_flops=0", ranks=(1,)),
    override("positions_beyond_the_text", r"text: expected at least 100010 bytes, found \d+; give more text, "
             r"fewer positions", "model.positions=10000"),
    override("validation_zero", r"validation_fraction: expected .*0\.5, found 0",
             "data.validation_fraction=0", ranks=(1,)),
    override("validation_most", r"validation_fraction: expected .*0\.5, found 0\.6",
             "data.validation_fraction=0.6", ranks=(1,)),
    override("validation_tiny", r"validation.fraction|text: expected at least", "data.validation_fraction=1e-300",
             ranks=(1,)),
]


class BadInput(unittest.TestCase):
    def check(self, result, expects, has_started=False):
        """The run ended as it must, and said what `expects` describes."""
        output = "\n" + str(result)[:4000]
        self.assertIsNotNone(result.status, "it hung" + output)
        lines = [line for line in result.stderr.split("\n") if line]
        self.assertEqual(len(lines), 1, "expected one line on standard error" + output)
        line = lines[0]
        self.assertRegex(line, r"^mics( train| config explain)?: \S", output)
        self.assertRegex(line, expects, output)
        self.assertNotEqual(result.status, 0, output)
        self.assertLessEqual(len(line), LONGEST_LINE, "a line that nobody can read")
        self.assertNotRegex(line, r"[\x00-\x1f\x7f]|\\x[89a-f][0-9a-f]", "bytes that do not print")
        if not has_started:
            self.assertEqual(result.stdout, "", "expected nothing on standard output")

    def check_case(self, case, ranks):
        text = edited() if case.deck is None else case.deck
        DECK.write_bytes(text.encode() if isinstance(text, str) else text)
        words = ("train", DECK, *case.words) if case.command is None else case.command
        result = launch.run(*words, ranks=ranks, seconds=case.seconds)
        self.check(result, case.expects, case.has_started)

    def test_memory_budget_names_the_smallest_shard_size_that_fits(self):
        DECK.write_text(edited({"model": {"layers": 6, "heads": 2, "width": 64, "positions": 8}}))

        def refused(p, budget):
            budget = f"engine.mics.memory_budget={budget}"
            return launch.run("train", DECK, f"{SHARD}={p}", budget, ranks=4)

        needs = {}
        for p in (2, 4):
            found = re.search(r"found (\d+) in the plan; no shard size fits", refused(p, 1000).stderr)
            self.assertIsNotNone(found)
            needs[p] = int(found[1])
        self.assertLess(needs[4], needs[2])
        for budget, p in ((needs[2], 2), (needs[2] - 1, 4), (needs[4], 4)):
            with self.subTest(budget=budget):
                self.check(refused(1, budget), rf"smallest shard size that fits: {p}$")
        self.check(refused(1, needs[4] - 1), "no shard size fits$")

    def test_ranks_that_disagree(self):
        good = FOLDER / "good" / "deck.json"
        other = FOLDER / "other" / "deck.json"
        good.write_text(edited())
        other.write_text(edited({LR: 0.004}))
        for file in ("text.txt", "deck.json"):
            text = (FOLDER / "good" / file).read_bytes()
            for folder in ("changed", "longer", "validation"):
                (FOLDER / folder / file).write_bytes(text)
        text = bytearray((FOLDER / "good" / "text.txt").read_bytes())
        with (FOLDER / "longer" / "text.txt").open("ab") as file:
            file.write(b"more")
        (FOLDER / "changed" / "text.txt").write_bytes(b"S" + text[1:])
        # Nine blocks of 16 windows of 9 bytes are for training, the tenth is for validation.
        text[9 * 16 * 9 + 5] ^= 1
        (FOLDER / "validation" / "text.txt").write_bytes(text)

        def on(folder, *words):
            return ("train", FOLDER / folder / "deck.json", *words)

        same = "expected the same on every rank.*, found .* on rank 1; give every rank the same input"
        table = {
            "decks": (on("good"), on("other"), r"deck: " + same + "$"),
            "words": (on("good"), on("good", "training.steps=4"), r"deck: " + same),
            "text": (on("good"), on("changed"), r"text of the input files: " + same),
            "length_of_text": (on("good"), on("longer"), r"text of the input files: " + same),
            "text_for_validation": (on("good"), on("validation"), r"text of the input files: " + same),
            "deck_missing_on_1": (on("good"), on("gone"), r"gone/deck.json: expected a file"),
            "deck_missing_on_0": (on("gone"), on("good"), r"gone/deck.json: expected a file"),
            "command_unknown_on_1": (on("good"), ("trian", DECK), r"trian"),
            "option_unknown_on_1": (on("good"), on("good", "--fast"), r"--fast"),
        }
        for name, (first, second, expects) in table.items():
            with self.subTest(name):
                self.check(launch.run_on_two(first, second), expects)

    def test_a_rank_that_never_starts(self):
        """Another program in its place, which ends long after the limit."""
        result = launch.run_beside_a_stranger(
            ("train", DECK), "sleep 20", environment={"MICS_START_LIMIT": "3"}
        )
        self.check(result, r"start of the program: expected all ranks within 3000 ms, found a wait in MPI_Init")
        self.assertLess(result.seconds, 15, result)

    @unittest.skipIf(launch.SANITIZED, "the shadow memory exceeds the limit")
    def test_one_rank_is_short_of_memory(self):
        """Where activations need 830 MiB a rank and rank 1 may have 781."""
        DECK.write_text(edited({"engine.train_batch_size": 80000}, steps=1))
        words = ("train", DECK)
        self.check(launch.run_on_two(words, words, memory_of_second=800000), r"allocat|memory")

    def test_environment(self):
        DECK.write_text(edited())
        words = ("config", "explain", DECK)
        table = {"KOKKOS_NUM_THREADS": ("abc", "0", "-1", "2x", "99999999999"), "KOKKOS_DEVICE_ID": ("x",), "MICS_START_LIMIT": ("0", "1s")}
        for variable, values in table.items():
            for value in values:
                for ranks in BOTH:
                    with self.subTest(variable=variable, value=value, ranks=ranks):
                        result = launch.run(*words, ranks=ranks, environment={variable: value})
                        self.check(result, rf'environment: {variable}: expected an integer of at least \d, found '
                                           rf'"{value}"; correct or unset it$')
        # GNU's OpenMP complains before the program begins.
        result = launch.run(*words, environment={"OMP_NUM_THREADS": "abc"})
        own = [line for line in result.stderr.split("\n") if line.startswith("mics: ")]
        self.assertEqual((result.status, len(own)), (2, 1), result)
        self.assertIn('OMP_NUM_THREADS: expected an integer of at least 1, found "abc"', own[0])
        for value in ("2,1", "1"):  # a number for each level of nesting
            result = launch.run(*words, environment={"OMP_NUM_THREADS": value})
            self.assertEqual((result.status, result.stderr), (0, ""), result)

    def test_output_that_cannot_be_written(self):
        DECK.write_text(edited())
        for words in (("train", DECK), ("--help",)):
            with self.subTest(words=words):
                result = launch.run(*words, output="/dev/full")
                self.check(result, r"standard output: expected all that was printed to be written, found an error")

    def test_metrics_that_cannot_be_written_stop_nothing(self):
        DECK.write_text(edited())
        for path in ("/proc/none/metrics.jsonl", FOLDER, "/dev/full"):
            for ranks in BOTH:
                with self.subTest(path=path, ranks=ranks):
                    result = launch.run("train", DECK, f"training.metrics={path}", ranks=ranks)
                    self.assertEqual((result.status, result.stderr), (0, ""), result)
                    notes = re.findall(r"^note: .*", result.stdout, re.M)
                    self.assertEqual(len(notes), 1, result)
                    self.assertRegex(
                        notes[0], rf"metrics file {path}: .*, found \".+\"; training goes on without it"
                    )
                    self.assertIn("step 3/3", result.stdout)
                    self.assertRegex(result.stdout, r"validation: GPT \d")


def add(case, ranks):
    def test(self):
        self.check_case(case, ranks)

    name = f"test_{case.name}_on_{ranks}"
    assert not hasattr(BadInput, name), name
    setattr(BadInput, name, test)


for each in CASES:
    for count in each.ranks:
        add(each, count)


def setUpModule():
    for folder in ("good", "other", "changed", "longer", "validation", "nothing"):
        (FOLDER / folder).mkdir()
    launch.write_text(FOLDER / "text.txt")
    launch.write_text(FOLDER / "good" / "text.txt")
    (FOLDER / "empty.txt").touch()
    (FOLDER / "odd.bin").write_bytes(bytes(4002))
    (FOLDER / "short.txt").write_text("20 bytes of a text.\n")
    (FOLDER / "secret.txt").write_text("text " * 1000)
    (FOLDER / "secret.txt").chmod(0)
    os.mkfifo(FOLDER / "pipe")


def tearDownModule():
    shutil.rmtree(FOLDER)


if __name__ == "__main__":
    launch.PROGRAM, *launch.LAUNCHER = sys.argv[1:]
    unittest.main(argv=sys.argv[:1], verbosity=2)
