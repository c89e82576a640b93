# SPDX-License-Identifier: Apache-2.0
"""Builds and runs an application that uses mics as its users do.

install_test.py package      --build DIR  [-G GENERATOR] [-D NAME=VALUE ...] -- LAUNCHER WORD ...
install_test.py subdirectory --source DIR [-G GENERATOR] [-D NAME=VALUE ...] -- LAUNCHER WORD ...

package: installs the build folder DIR into a temporary prefix and lets the application find it
there. subdirectory: the application adds the checkout DIR to its own build. Either way the program
then runs on 4 ranks and must exit with status 0. Definitions go to the application's CMake.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
RANKS = 4


def step(title, command, **options):
    """Runs one command; ends the test with all of its output if it fails."""
    start = time.monotonic()
    result = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    print(f"{title}: {time.monotonic() - start:.1f} s", flush=True)
    if result.returncode != 0:
        print(result.stdout)
        sys.exit(f"{title} failed with status {result.returncode}")
    return result.stdout


def build(folder, build_folder, options):
    """Configures and builds the application; returns its program."""
    step("configure", ["cmake", "-S", folder, "-B", build_folder, *options])
    step("build", ["cmake", "--build", build_folder, "--target", "simulation", "--parallel", 2])
    return build_folder / "simulation"


def main():
    words = sys.argv[1:]
    launcher = words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("way", choices=["package", "subdirectory"])
    parser.add_argument("--build", type=pathlib.Path)
    parser.add_argument("--source", type=pathlib.Path)
    parser.add_argument("-G", dest="generator", default="Ninja")
    parser.add_argument("-D", dest="definitions", action="append", default=[])
    arguments = parser.parse_args(words[: words.index("--")])

    with tempfile.TemporaryDirectory(prefix="mics-install-") as temporary:
        folder = pathlib.Path(temporary)
        options = ["-G", arguments.generator, *(f"-D{d}" for d in arguments.definitions)]
        if arguments.way == "package":
            prefix = folder / "prefix"
            step("install", ["cmake", "--install", arguments.build, "--prefix", prefix])
            options.append(f"-Dmics_ROOT={prefix}")
            program = build(HERE / "as_package", folder / "build", options)
        else:
            options.append(f"-Dcheckout={arguments.source}")
            program = build(HERE / "as_subdirectory", folder / "build", options)
        output = step("run", [*launcher, "-n", RANKS, program], timeout=120)
        print(output, end="")
    # One line of the application; mics itself prints nothing.
    if output.count("\n") != 1 or not output.startswith("loss "):
        sys.exit("expected the application's one line")


main()
