# SPDX-License-Identifier: Apache-2.0
"""Compares the Spack recipe with the CMake files. Runs without Spack: the recipe is loaded with
stand-ins for Spack's directives that record what it declares."""

import contextlib
import importlib.util
import pathlib
import re
import sys
import types
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
REPOSITORY = ROOT / "spack" / "spack_repo" / "mics"

# CMake's name of each package -> Spack's; None: no package of Spack.
SPACK_NAMES = {
    "Kokkos": "kokkos",
    "MPI": "mpi",
    "nlohmann_json": "nlohmann-json",
    "HDF5": "hdf5",
    "ISAL": "isa-l",
    "NCCL": "nccl",
    "CUDAToolkit": "cuda",
    "GTest": "googletest",
    "CLI11": "cli11",
    "BLAS": "blas",
    "Python3": "python",
    "Threads": None,
    "mics": None,
}
# Dependencies that no find_package names: languages and CMake itself.
WITHOUT_FIND_PACKAGE = {"c", "cxx", "cmake"}
# Options of the CMake files that have a variant of another name, or none.
VARIANTS = {
    "BUILD_SHARED_LIBS": "shared",
    "MICS_ENABLE_TESTS": "tests",
    "MICS_ENABLE_APPS": "apps",
    "MICS_ENABLE_NCCL": "cuda",
    "MICS_FUZZ": False,
    "MICS_SANITIZE": False,
    "MICS_WARNINGS_AS_ERRORS": False,
}
# Packages of Debian whose lowest versions cmake/quickstart.sh names -> CMake's name.
DEBIAN_NAMES = {
    "libkokkos-dev": "Kokkos",
    "nlohmann-json3-dev": "nlohmann_json",
    "libhdf5-dev": "HDF5",
    "libisal-dev": "ISAL",
    "libcli11-dev": "CLI11",
    "libgtest-dev": "GTest",
}


class Recipe:
    """Loads the recipe and keeps what it declares."""

    def __init__(self, path):
        self.depends = []  # (spec, conditions)
        self.variants = {}  # name -> default
        self.versions = []
        self.conflicts = []
        conditions = []

        def depends_on(spec, when=None, type=None):
            self.depends.append((spec, conditions + ([when] if when else [])))

        def variant(name, default=None, **_):
            self.variants[name] = default

        @contextlib.contextmanager
        def when(condition):
            conditions.append(condition)
            yield
            conditions.pop()

        class CMakePackage:
            def define(self, name, value):
                return name, value

            def define_from_variant(self, name, variant):
                return name, variant

        class CudaPackage:
            cuda_arch_values = ("10", "75", "80", "90", "90a", "100f")

        api = types.ModuleType("spack.package")
        api.depends_on = depends_on
        api.variant = variant
        api.when = when
        api.version = lambda *args, **kwargs: self.versions.append((args, kwargs))
        api.conflicts = lambda spec, **kwargs: self.conflicts.append((spec, kwargs))
        api.license = api.generator = lambda *args: None
        cmake = types.ModuleType("cmake")
        cmake.CMakePackage = CMakePackage
        cuda = types.ModuleType("cuda")
        cuda.CudaPackage = CudaPackage
        stand_ins = {
            "spack": types.ModuleType("spack"),
            "spack.package": api,
            "spack_repo": types.ModuleType("spack_repo"),
            "spack_repo.builtin": types.ModuleType("builtin"),
            "spack_repo.builtin.build_systems": types.ModuleType("build_systems"),
            "spack_repo.builtin.build_systems.cmake": cmake,
            "spack_repo.builtin.build_systems.cuda": cuda,
        }
        spec = importlib.util.spec_from_file_location("recipe", path)
        module = importlib.util.module_from_spec(spec)
        before = {name: sys.modules.get(name) for name in stand_ins}
        sys.modules.update(stand_ins)
        try:
            spec.loader.exec_module(module)
        finally:
            for name, old in before.items():
                if old is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = old
        self.package = module.Mics

    def cmake_args(self, *enabled):
        """cmake_args() as {option: variant or value} for a spec with the variants given."""
        package = self.package()
        package.spec = types.SimpleNamespace(satisfies=lambda text: text.lstrip("+") in enabled)
        kokkos = types.SimpleNamespace(kokkos_cxx="nvcc_wrapper")
        type(package).__getitem__ = lambda _, name: {"kokkos": kokkos}[name]
        return dict(package.cmake_args())

    def lowest_versions(self):
        """{dependency: lowest version or None}, over all its depends_on."""
        found = {}
        for spec, _ in self.depends:
            name, version = re.match(r"([a-z0-9-]+)(?:@([0-9.]+):)?", spec).groups()
            found[name] = version or found.get(name)
        return found

    def condition_of(self, name):
        """Conditions of the first depends_on of a package."""
        for spec, conditions in self.depends:
            if re.match(r"[a-z0-9-]+", spec).group() == name:
                return conditions
        return None


def cmake_files():
    files = [ROOT / "CMakeLists.txt", *ROOT.glob("cmake/*.cmake"), *ROOT.glob("cmake/*.in")]
    for folder in ("lib", "apps", "tests"):
        files += ROOT.glob(folder + "/**/CMakeLists.txt")
    return {f.relative_to(ROOT).as_posix(): re.sub(r"(?m)#.*$", "", f.read_text()) for f in files}


class RecipeTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.recipe = Recipe(REPOSITORY / "packages" / "mics" / "package.py")
        cls.cmake = cmake_files()

    def find_packages(self):
        """{package: {version or None of each call}} over all CMake files."""
        found = {}
        call = re.compile(r"find_(?:package|dependency)\(\s*(\w+)(?:\s+([0-9][0-9.]*))?")
        for text in self.cmake.values():
            for name, version in call.findall(text):
                found.setdefault(name, set()).add(version or None)
        return found

    def test_every_package_has_the_same_lowest_version(self):
        recipe = self.recipe.lowest_versions()
        for name, versions in self.find_packages().items():
            with self.subTest(name):
                self.assertIn(name, SPACK_NAMES, "a find_package that this test does not know")
                self.assertEqual(len(versions), 1, f"CMake files differ: {versions}")
                spack = SPACK_NAMES[name]
                if spack is not None:
                    self.assertIn(spack, recipe, "the recipe does not depend on it")
                    self.assertEqual(recipe[spack], versions.pop())

    def test_every_dependency_is_found_by_cmake(self):
        found = {SPACK_NAMES.get(name) for name in self.find_packages()}
        self.assertEqual(set(self.recipe.lowest_versions()) - found - WITHOUT_FIND_PACKAGE, set())

    def test_cmake_version(self):
        for path in ("CMakeLists.txt", "tests/CMakeLists.txt"):
            minimum = re.search(r"cmake_minimum_required\(VERSION ([0-9.]+)", self.cmake[path])
            self.assertEqual(self.recipe.lowest_versions()["cmake"], minimum.group(1), path)

    def test_quickstart_asks_for_the_same_versions(self):
        text = (ROOT / "cmake" / "quickstart.sh").read_text()
        asked = dict(re.findall(r'(?m)^  "([a-z0-9+-]+) ([0-9.]+)"$', text))
        self.assertEqual(asked.pop("cmake"), self.recipe.lowest_versions()["cmake"])
        self.assertEqual(set(asked), set(DEBIAN_NAMES))
        for debian, name in DEBIAN_NAMES.items():
            self.assertEqual(asked[debian], self.recipe.lowest_versions()[SPACK_NAMES[name]], debian)

    def test_every_option_is_set(self):
        top = self.cmake["CMakeLists.txt"]
        options = set(re.findall(r"(?:mics_option|^\s*option)\(\s*(\w+)", top, re.M))
        self.assertEqual(options, set(VARIANTS))
        self.assertEqual(self.recipe.cmake_args(), VARIANTS)

    def test_variants(self):
        expected = {"shared": True, "openmp": True, "apps": True, "tests": False, "cuda_arch": "none"}
        self.assertEqual(self.recipe.variants, expected)
        self.assertIn(("cuda_arch=none"), [spec for spec, _ in self.recipe.conflicts])

    def test_optional_dependencies_follow_their_variant(self):
        for name, variant in (
            ("cli11", "+apps"),
            ("blas", "+apps"),
            ("googletest", "+tests"),
            ("python", "+tests"),
            ("nccl", "+cuda"),
            ("cuda", "+cuda"),
        ):
            self.assertEqual(self.recipe.condition_of(name), [variant], name)
        for name in ("kokkos", "mpi", "nlohmann-json", "hdf5", "isa-l"):
            self.assertEqual(self.recipe.condition_of(name), [], name)

    def test_cuda(self):
        self.assertEqual(self.recipe.cmake_args("cuda")["CMAKE_CXX_COMPILER"], "nvcc_wrapper")
        archs = {s for s, _ in self.recipe.depends if s.startswith("kokkos cuda_arch=")}
        self.assertEqual(archs, {f"kokkos cuda_arch={a}" for a in ("80", "90", "90a", "100f")})

    def test_package_repository(self):
        text = (REPOSITORY / "repo.yaml").read_text()
        # Spack's rule: the namespace is the folder below spack_repo.
        self.assertRegex(text, r"(?m)^  namespace: " + REPOSITORY.name + "$")
        self.assertRegex(text, r"(?m)^  api: v2\.0$")
        index = (ROOT / "spack-repo-index.yaml").read_text()
        self.assertIn("- " + REPOSITORY.relative_to(ROOT).as_posix(), index)

    def test_source_is_the_repository(self):
        self.assertEqual(self.recipe.package.git, ROOT.as_uri())
        self.assertEqual(self.recipe.versions, [(("main",), {"branch": "main"})])


if __name__ == "__main__":
    unittest.main(verbosity=2)
