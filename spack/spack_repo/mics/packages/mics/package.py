# SPDX-License-Identifier: Apache-2.0
import pathlib

from spack_repo.builtin.build_systems.cmake import CMakePackage
from spack_repo.builtin.build_systems.cuda import CudaPackage

from spack.package import *


class Mics(CMakePackage, CudaPackage):
    """Shards the training state of a model (MiCS, ZeRO-3) over the ranks of an HPC job, for C++
    codes that use Kokkos and MPI."""

    # The recipe lies in the sources, and builds the checkout that it lies in.
    git = pathlib.Path(__file__).resolve().parents[5].as_uri()

    license("Apache-2.0")

    version("main", branch="main")

    # Compute capability 8.0 is the lowest that is supported. One value, as Kokkos has one.
    cuda_archs = tuple(a for a in CudaPackage.cuda_arch_values if int(a.rstrip("af")) >= 80)

    variant("shared", default=True, description="Build shared libraries")
    variant("openmp", default=True, description="Use the cores of the host through OpenMP")
    variant("apps", default=True, description="Build the program `mics`")
    variant("tests", default=False, description="Build the tests")
    variant(
        "cuda_arch",
        default="none",
        values=("none",) + cuda_archs,
        multi=False,
        sticky=True,
        when="+cuda",
        description="CUDA compute capability",
    )

    conflicts("cuda_arch=none", when="+cuda", msg="+cuda needs a cuda_arch, for example cuda_arch=90")

    depends_on("c", type="build")
    depends_on("cxx", type="build")
    depends_on("cmake@3.25:", type="build")
    generator("ninja")

    depends_on("kokkos@4.6:5")
    depends_on("kokkos+openmp", when="+openmp")
    depends_on("kokkos+pic", when="+shared")
    depends_on("mpi@3.1:")
    depends_on("nlohmann-json@3.10:")
    depends_on("hdf5@1.10.7:")
    depends_on("isa-l@2.29:")

    depends_on("cli11@2.1:", when="+apps")
    depends_on("blas", when="+apps")

    depends_on("googletest@1.12:", when="+tests")
    depends_on("python@3.9:", when="+tests", type=("build", "run", "test"))

    with when("+cuda"):
        depends_on("kokkos+cuda")
        # Kokkos compiles CUDA with nvcc_wrapper where the host compiler is g++.
        depends_on("kokkos+wrapper", when="%cxx=gcc")
        depends_on("cuda@12.4:13")
        depends_on("nccl@2.18:")
    for arch in cuda_archs:
        depends_on(f"kokkos cuda_arch={arch}", when=f"+cuda cuda_arch={arch}")
        depends_on(f"nccl cuda_arch={arch}", when=f"+cuda cuda_arch={arch}")

    def cmake_args(self):
        args = [
            self.define_from_variant("BUILD_SHARED_LIBS", "shared"),
            self.define_from_variant("MICS_ENABLE_APPS", "apps"),
            self.define_from_variant("MICS_ENABLE_TESTS", "tests"),
            self.define_from_variant("MICS_ENABLE_NCCL", "cuda"),
            self.define("MICS_FUZZ", False),
            self.define("MICS_SANITIZE", False),
            self.define("MICS_WARNINGS_AS_ERRORS", False),
        ]
        if self.spec.satisfies("+cuda"):
            args.append(self.define("CMAKE_CXX_COMPILER", self["kokkos"].kokkos_cxx))
        return args

    def check(self):
        """The tests of `spack install --test=root mics+tests`."""
        if self.spec.satisfies("+tests"):
            with working_dir(self.build_directory):
                ctest("--label-regex", "^quick$", "--output-on-failure")
