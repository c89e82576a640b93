#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Compiles all of mics, tests and program included, against a Kokkos with CUDA; a warning fails,
# too. Prints one line that can be kept with the commit. Needs CUDA and NCCL, but no device.
#
#   cmake/check_cuda.sh <prefix of Kokkos> <nvcc_wrapper> [<build folder>]
#
# Without a build folder a temporary one is used and removed. JOBS (default: all cores) is the number
# of compilers at once: one takes 1 to 2 GB.
set -euo pipefail

if [[ $# -lt 2 || $# -gt 3 ]]; then
  sed -n '3,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
kokkos=$(realpath "$1")
wrapper=$(realpath "$2")
source_folder=$(cd "$(dirname "$0")/.." && pwd)
if [[ $# -eq 3 ]]; then
  mkdir -p "$3"
  build=$(realpath "$3")
else
  build=$(mktemp -d)
  trap 'rm -rf "$build"' EXIT
fi
config=$(find "$kokkos" -name KokkosConfigVersion.cmake -print -quit)
if [[ -z $config ]]; then
  echo "check_cuda.sh: $kokkos: expected the prefix of an installed Kokkos, found no KokkosConfigVersion.cmake" >&2
  exit 2
fi
if [[ ! -x $wrapper ]]; then
  echo "check_cuda.sh: $wrapper: expected nvcc_wrapper, found no program" >&2
  exit 2
fi

version_of_kokkos=$(sed -n 's/^ *set(PACKAGE_VERSION "\(.*\)")/\1/p' "$config" | head -1)
nvcc=$(command -v "${CUDA_ROOT:+$CUDA_ROOT/bin/}nvcc" || true)
version_of_cuda=$("${nvcc:-nvcc}" --version | sed -n 's/.*release [^V]*V\(.*\)/\1/p')
version_of_compiler=$("${NVCC_WRAPPER_DEFAULT_COMPILER:-g++}" --version | head -1)
commit=$(git -C "$source_folder" rev-parse --short HEAD 2>/dev/null || echo "no commit")
if [[ $commit != "no commit" && -n $(git -C "$source_folder" status --porcelain) ]]; then
  commit+=" with changes"
fi

log=$build/check_cuda.log
result=failed
if cmake -S "$source_folder" -B "$build" -DCMAKE_BUILD_TYPE=Release \
     -DCMAKE_CXX_COMPILER="$wrapper" -DKokkos_ROOT="$kokkos" -DMICS_ENABLE_NCCL=ON >"$log" 2>&1 &&
   cmake --build "$build" --parallel "${JOBS:-$(nproc)}" >>"$log" 2>&1; then
  result=compiled
fi
if [[ $result == compiled ]] && grep -qE 'warning( #|:)' "$log"; then # -Werror would not stop nvcc
  result="compiled with $(grep -cE 'warning( #|:)' "$log") warnings"
fi
[[ $result == compiled ]] || grep -E -A 5 'error|warning( #|:)' "$log" | head -60 >&2 || true
nccl=$(sed -n 's/.*Found NCCL.*found suitable version "\([0-9.]*\)".*/\1/p' "$log" | head -1)

echo "check_cuda: mics $commit: $result; Kokkos $version_of_kokkos, CUDA $version_of_cuda, NCCL ${nccl:-unknown}, $version_of_compiler; $(date -u +%F)"
[[ $result == compiled ]]
