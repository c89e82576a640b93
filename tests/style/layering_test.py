# SPDX-License-Identifier: Apache-2.0
"""Rules for lib/ that the compiler does not check: who may include whom, and what a library does
not do (print, exit, use MPI_COMM_WORLD)."""

import pathlib
import re
import unittest

LIB = pathlib.Path(__file__).resolve().parents[2] / "lib"

# What each layer may include, itself apart. The umbrella header lib/mics/mics.hpp may all.
ALLOWED = {
    "base": set(),
    "layout": {"base"},
    "comm": {"base"},
    "state": {"base", "layout", "comm"},
    "h5": {"base"},
    "checkpoint": {"base", "layout", "comm", "state", "h5"},
    "parallel": {"base", "layout", "comm", "state"},
    "optim": {"base", "layout", "comm", "state", "parallel"},
    "plan": {"base", "layout", "comm", "state", "parallel"},
    "engine": {"base", "layout", "comm", "state", "h5", "checkpoint", "parallel", "optim", "plan"},
}

# Includes that would end a layer's independence.
FOREIGN = {"layout": re.compile(r"mpi\.h|Kokkos_")}

# A call as a statement of its own: a member or a function declared with such a name is none.
STATEMENT = r"(?:^|[;{}()]|\breturn\b|\belse\b)\s*(?:std::|::)?"
FORBIDDEN = [
    (re.compile(r"\bMPI_COMM_WORLD\b"), "uses MPI_COMM_WORLD; the application hands over its communicator"),
    (re.compile(r"\bstd::(?:cout|cerr|clog|print|println)\b"), "prints; report through the log sink"),
    (re.compile(r"\b(?:std::)?(?:printf|fprintf|puts|fputs|putchar)\s*\("), "prints; report through the log sink"),
    (re.compile(STATEMENT + r"(?:exit|_exit|_Exit|quick_exit|abort|terminate)\s*\(", re.M), "ends the process; throw"),
    (re.compile(r"\bstd::(?:exit|_Exit|quick_exit|abort|terminate)\b"), "ends the process; throw"),
    (re.compile(r"\bMPI_Abort\b"), "ends the job; throw"),
    (re.compile(r"\b(?:sigaction|std::signal)\s*\("), "installs a signal handler"),
]

TOKENS = re.compile(
    r'//[^\n]*|/\*.*?\*/|R"([^(\s]*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|' r"'(?:\\[^'\n]+|[^'\\\n])'",
    re.S,
)


def without_comments_and_strings(text):
    """The code alone, with its line numbers kept."""
    return TOKENS.sub(lambda match: "\n" * match.group().count("\n") or " ", text)


def violations(path, text):
    """Violations in a file of lib/; `path` is relative to lib/mics."""
    found = []

    def add(line, message):
        found.append(f"lib/mics/{path}:{line}: {message}")

    path = pathlib.PurePosixPath(path)
    layer = path.parts[0] if len(path.parts) > 1 else None
    if layer is not None and layer not in ALLOWED:
        add(1, f"{layer} is in no layer; add it to tests/style/layering_test.py")
        return found
    if not text.startswith("// SPDX-License-Identifier: Apache-2.0\n"):
        add(1, "expected `// SPDX-License-Identifier: Apache-2.0` as first line")
    if path.suffix == ".hpp" and not re.search(r"^#pragma once$", text, re.M):
        add(1, "expected `#pragma once`")

    for number, line in enumerate(text.splitlines(), start=1):
        include = re.match(r'\s*#\s*include\s*([<"])([^>"]+)[>"]', line)
        if not include:
            continue
        bracket, target = include.groups()
        if bracket == '"':
            add(number, f'include "{target}": expected <mics/...>, found a relative path')
        if layer in FOREIGN and FOREIGN[layer].match(target):
            add(number, f"{layer} must not include <{target}>")
        parts = pathlib.PurePosixPath(target).parts
        if parts[0] != "mics" or len(parts) < 3 or layer is None:
            continue
        other = parts[1]
        if other != layer and other not in ALLOWED[layer]:
            add(number, f"{layer} must not include <{target}>; it may use {sorted(ALLOWED[layer])}")
        if other != layer and parts[2] == "detail":
            add(number, f"<{target}> is internal to {other}")

    code = without_comments_and_strings(text)
    for pattern, message in FORBIDDEN:
        for match in pattern.finditer(code):
            add(code.count("\n", 0, match.end()) + 1, message)
    return found


class Layering(unittest.TestCase):
    maxDiff = None

    def test_lib_keeps_the_rules(self):
        files = sorted(p for p in (LIB / "mics").rglob("*") if p.suffix in (".hpp", ".cpp"))
        self.assertTrue(files)
        found = []
        for file in files:
            found += violations(file.relative_to(LIB / "mics").as_posix(), file.read_text())
        self.assertEqual(found, [], "\n" + "\n".join(found))

    def test_cmake_links_only_allowed_layers(self):
        for layer, allowed in ALLOWED.items():
            file = LIB / "mics" / layer / "CMakeLists.txt"
            with self.subTest(layer):
                text = re.sub(r"#.*", "", file.read_text())
                call = re.search(r"mics_add_layer\(\s*(\w+)(.*?)\)", text, re.S)
                self.assertIsNotNone(call, f"{file}: expected mics_add_layer")
                self.assertEqual(call.group(1), layer)
                depends = re.search(r"\bDEPENDS\b([^A-Z]*)", call.group(2))
                named = set(depends.group(1).replace("mics::", "").split()) if depends else set()
                self.assertLessEqual(named & set(ALLOWED), allowed)

    def test_every_file_is_listed(self):
        for layer in ALLOWED:
            folder = LIB / "mics" / layer
            listed = set((folder / "CMakeLists.txt").read_text().replace(")", " ").split())
            for file in sorted(folder.rglob("*.[ch]pp")):
                name = file.relative_to(folder).as_posix()
                with self.subTest(f"{layer}/{name}"):
                    self.assertIn(name, listed, f"{layer}/CMakeLists.txt does not list it")


class Checker(unittest.TestCase):
    """The rules themselves: each must be able to fail."""

    HEAD = "// SPDX-License-Identifier: Apache-2.0\n#pragma once\n"

    def assert_found(self, path, code, message):
        found = violations(path, self.HEAD + code)
        self.assertEqual(len(found), 1, found)
        self.assertIn(message, found[0])

    def test_finds_each_violation(self):
        self.assert_found("base/a.hpp", "#include <mics/comm/b.hpp>\n", "a.hpp:3: base must not")
        self.assert_found("comm/a.hpp", "#include <mics/layout/b.hpp>\n", "comm must not include")
        self.assert_found("state/a.hpp", "#include <mics/comm/detail/b.hpp>\n", "internal to comm")
        self.assert_found("layout/a.hpp", "#include <Kokkos_Core.hpp>\n", "layout must not include")
        self.assert_found("base/a.hpp", '#include "b.hpp"\n', "found a relative path")
        self.assert_found("comm/a.hpp", "auto c = MPI_COMM_WORLD;\n", "MPI_COMM_WORLD")
        self.assert_found("base/a.hpp", "\n  std::cout << 1;\n", "a.hpp:4: prints")
        self.assert_found("base/a.hpp", '  std::fprintf(stderr, "x");\n', "prints")
        self.assert_found("base/a.hpp", "  if (x) exit(1);\n", "ends the process")
        self.assert_found("base/a.hpp", "std::set_terminate(&std::abort);\n", "ends the process")
        self.assert_found("engine/a.hpp", "MPI_Abort(comm, 1);\n", "ends the job")
        self.assert_found("nowhere/a.hpp", "", "is in no layer")

    def test_finds_missing_heads(self):
        self.assertEqual(len(violations("base/a.hpp", "int a;\n")), 2)
        self.assertEqual(len(violations("base/a.cpp", "int a;\n")), 1)

    def test_leaves_correct_code_alone(self):
        code = """
        #include <mics/base/b.hpp>
        // MPI_COMM_WORLD in a comment, and printf( too
        /* std::cout */ const char* text = "call abort() or MPI_COMM_WORLD";
        const auto raw = R"(std::cerr)"; char quote = '"'; long n = 1'000'000;
        std::snprintf(buffer, 8, "%d", 1);
        Kokkos::abort("device");
        channel.abort(); void abort(int reason);
        """
        self.assertEqual(violations("comm/a.hpp", self.HEAD + code), [])


if __name__ == "__main__":
    unittest.main(verbosity=2)
