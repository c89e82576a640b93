#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a fresh checkout on Debian 12 or 13 to a trained model or a tested build, in one command.
# See usage() below. Elsewhere, and on a cluster, use Spack or CMake as the README says.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: cmake/quickstart.sh setup
       cmake/quickstart.sh train [ARGUMENT...]
       cmake/quickstart.sh test [--label quick|full|soak|sanitize] [--sanitize]

setup  installs the Debian packages that are missing, and nothing else
train  setup, build, then `mics train inputs/gpt_small.json ARGUMENT...` on 4 ranks
test   setup, build, then the tests with that label (default: quick)
       --sanitize  in a build of its own, with the address, leak and undefined-behaviour
                   sanitizers (label: sanitize, unless given)

Everything is built below build/. Logs are in build/logs/.
TEXT
}

# Each package with the lowest version that will do ("-": any).
packages=(
  "g++ 4:13"
  "cmake 3.25"
  "ninja-build -"
  "libkokkos-dev 4.6"
  "libopenmpi-dev -"
  "openmpi-bin -"
  "libhdf5-dev 1.10.7"
  "hdf5-tools -"
  "libisal-dev 2.29"
  "nlohmann-json3-dev 3.10"
  "libcli11-dev 2.1"
  "libopenblas-dev -"
  "libgtest-dev 1.12"
  "python3 -"
)
# Modules of Python, which belong to the release that the machine's Python is of.
modules=(
  "python3-h5py -"
)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
logs="$root/build/logs"

say() { printf 'mics: %s\n' "$*"; }

die() {
  printf 'mics: %s\n' "$*" >&2
  exit 1
}

# logged <name> <command...>: runs the command with its output in a log, the end of which is shown
# if the command fails.
logged() {
  local log="$logs/$1.log"
  shift
  mkdir -p "$logs"
  if ! "$@" >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    die "failed: $1; the whole output is in $log"
  fi
}

# --- packages -----------------------------------------------------------------------------------

# is_installed <package> <lowest version or "-">
is_installed() {
  local found
  found=$(dpkg-query -W -f '${db:Status-Status} ${Version}\n' "$1" 2>/dev/null | head -n 1) || return 1
  [[ $found == "installed "* ]] || return 1
  [[ $2 == - ]] || dpkg --compare-versions "${found#installed }" ge "$2"
}

# missing <"package version"...>
missing() {
  local entry
  for entry in "$@"; do
    # shellcheck disable=SC2086 # two words on purpose
    is_installed $entry || printf '%s\n' "${entry% *}"
  done
}

# The release this is: "12" or "13"; stops elsewhere.
check_distribution() {
  local id="" version=""
  [[ -r /etc/os-release ]] || die "this is no Debian system; install with Spack or CMake (README.md)"
  # shellcheck disable=SC1091
  id=$(. /etc/os-release && printf '%s' "${ID:-}")
  # shellcheck disable=SC1091
  version=$(. /etc/os-release && printf '%s' "${VERSION_ID:-}")
  [[ $id == debian ]] ||
    die "this script is for Debian 12 and 13, not for ${id:-this system}; install with Spack or CMake (README.md)"
  [[ $version == 12 || $version == 13 ]] ||
    die "this script is for Debian 12 and 13, not for Debian ${version:-testing}; install with Spack or CMake (README.md)"
  command -v dpkg-query >/dev/null || die "dpkg-query is missing; this script needs Debian's own package tools"
}

# Prints the address of each source of this machine that may be a mirror of Debian, in the order of
# its configuration. apt itself reads the sources, so that every format, disabled entries and
# options are as the machine has them. Security, updates, backports and other archives go by other
# release names; whether a candidate is Debian shows when its signature is checked.
mirror_candidates() {
  # shellcheck disable=SC2016 # the words in $() are apt's
  apt-get indextargets --no-release-info --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' \
    'Created-By: Packages' 2>/dev/null |
    awk '$3 == "main" && $2 ~ /^(bookworm|trixie|forky|sid|oldstable|stable|testing|unstable)$/ &&
         $1 !~ /^cdrom:/ { sub("/$", "", $1); if (!seen[$1]++) print $1 }'
}

# Prints the field Signed-By that the machine's sources give for the mirror <uri>, whether a file or
# a whole key; Debian's own keyring if they give none.
signed_by() {
  local uri=$1 file field
  for file in /etc/apt/sources.list.d/*.sources; do
    [[ -r $file ]] || continue
    field=$(grep -v '^#' "$file" | awk -v uri="$uri" 'BEGIN { RS = "" }
      (index($0 "\n", uri "\n") || index($0, uri "/") || index($0, uri " ")) && !done {
        count = split($0, lines, "\n")
        for (i = 1; i <= count; i++) {
          if (lines[i] !~ /^[ \t]/) inside = tolower(lines[i]) ~ /^signed-by:/
          if (inside) { print lines[i]; done = 1 }
        }
      }')
    [[ -z $field ]] || { printf '%s\n' "$field" && return; }
  done
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
    [[ -r $file ]] || continue
    field=$(awk -v uri="$uri" '$1 == "deb" && (index($0, uri " ") || index($0, uri "/")) &&
      match($0, /signed-by=[^] ]+/) { print substr($0, RSTART + 10, RLENGTH - 10); exit }' "$file")
    [[ -z $field ]] || { printf 'Signed-By: %s\n' "$field" && return; }
  done
  file=/usr/share/keyrings/debian-archive-keyring.gpg
  [[ ! -r $file ]] || printf 'Signed-By: %s\n' "$file"
}

# The release whose Python is installed.
python_release() {
  local version
  version=$(dpkg-query -W -f '${Version}' python3-minimal 2>/dev/null) || version=""
  [[ $version == 3.11.* ]] && printf bookworm || printf trixie
}

# Sets up apt in <folder> with trixie and sid of the mirror <uri>, and bookworm for modules of its
# Python. The machine's own sources, preferences and package lists stay as they are; its proxy and
# credentials are used.
#
# Debian's only usable Kokkos is in unstable, its dependencies and the tools are best taken from
# trixie. The priorities let nothing else of unstable in, and upgrade nothing that no package asks
# for (an installed version has 100).
write_private_apt() {
  local folder=$1 uri=$2 key
  key=$(signed_by "$uri")
  mkdir -p "$folder/lists/partial" "$folder/sources.d" "$folder/preferences.d"
  local suite suites=(trixie sid)
  [[ $(python_release) == trixie ]] || suites+=(bookworm)
  for suite in "${suites[@]}"; do
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n' "$uri" "$suite"
    printf '%s\n\n' "$key"
  done >"$folder/sources.d/mics.sources"
  cat >"$folder/preferences" <<'TEXT'
Package: *
Pin: release n=trixie
Pin-Priority: 90

Package: *
Pin: release n=bookworm
Pin-Priority: 80

Package: *
Pin: release n=sid
Pin-Priority: -1

Package: libkokkos*
Pin: release n=sid
Pin-Priority: 500
TEXT
  # A mirror of unstable may lag so far behind that its Release file has expired.
  apt_options=(
    -o Dir::Etc::SourceList=/dev/null
    -o "Dir::Etc::SourceParts=$folder/sources.d"
    -o "Dir::Etc::Preferences=$folder/preferences"
    -o "Dir::Etc::PreferencesParts=$folder/preferences.d"
    -o "Dir::State::Lists=$folder/lists"
    -o Dir::Cache::pkgcache=
    -o Dir::Cache::srcpkgcache=
    -o Acquire::Check-Valid-Until=false
    -o Acquire::Retries=3
    -o APT::Update::Error-Mode=any
    -o Dpkg::Options::=--force-confdef
    -o Dpkg::Options::=--force-confold
  )
}

# Finds a mirror that serves trixie and sid with Debian's signature; leaves apt set up for it.
find_mirror() {
  local folder=$1 uri candidates
  candidates=$(mirror_candidates)
  [[ -n $candidates ]] || die "apt has no Debian source; add one to /etc/apt/sources.list.d"
  : >"$logs/apt-update.log"
  for uri in $candidates; do
    rm -rf "${folder:?}"/*
    write_private_apt "$folder" "$uri"
    if apt-get "${apt_options[@]}" update >>"$logs/apt-update.log" 2>&1 </dev/null; then
      say "mirror: $uri"
      return
    fi
  done
  tail -n 20 "$logs/apt-update.log" >&2
  die "no apt source of this machine serves trixie and sid (no network, or no full mirror); the whole output is in $logs/apt-update.log"
}

# Private apt files, once, until clear_apt.
apt_folder=""
set_up_apt() {
  [[ -z $apt_folder ]] || return 0
  mkdir -p "$logs"
  apt_folder=$(mktemp -d "${TMPDIR:-/tmp}/mics-apt.XXXXXX")
  trap clear_apt EXIT
  chmod 755 "$apt_folder" # apt downloads as a user of its own
  find_mirror "$apt_folder"
}

clear_apt() {
  [[ -z $apt_folder ]] || rm -rf "$apt_folder"
  apt_folder=""
  trap - EXIT
}

# install_packages <release> <package...>, after saying what apt will change.
install_packages() {
  local release=$1
  shift
  command -v apt-get >/dev/null || die "missing: $*; apt-get, which would install them, is missing too"
  [[ $(id -u) == 0 ]] || die "missing: $*; run \`$0 setup\` once as root"
  set_up_apt
  export DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=l
  local install=(apt-get "${apt_options[@]}" install -t "$release" --no-install-recommends -y "$@")
  logged apt-plan "${install[@]}" --simulate
  local new upgraded removed
  new=$(grep -cE '^Inst [^ ]+ \(' "$logs/apt-plan.log") || true
  upgraded=$(grep -cE '^Inst [^ ]+ \[' "$logs/apt-plan.log") || true
  removed=$(awk '$1 == "Remv" { printf " %s", $2 }' "$logs/apt-plan.log")
  say "missing: $*"
  say "apt will install $new new packages, upgrade $upgraded, remove $(wc -w <<<"$removed")${removed:+:$removed}"
  logged apt-install "${install[@]}"
}

# FIXME_KOKKOS(Debian 5.2.2-2): its CMake files name two static archives that the package does not
# ship, so that find_package fails. Both hold headers only; empty archives are what they would be.
# Remove when no supported package needs it.
add_missing_archives() {
  local files targets archives archive
  files=$(dpkg -L libkokkos-dev)
  targets=$(grep '/KokkosTargets-.*\.cmake$' <<<"$files") || return 0
  archives=$(xargs -d '\n' sed -nE \
    's#.*"\$\{_IMPORT_PREFIX\}(/[^"]*/libkokkos(algorithms|simd)\.a)".*#/usr\1#p' <<<"$targets" | sort -u)
  for archive in $archives; do
    [[ ! -e $archive ]] || continue
    [[ $(id -u) == 0 ]] || die "Debian's libkokkos-dev lacks $archive; run \`$0 setup\` once as root"
    ar rcs "$archive"
    say "made the empty $archive, which Debian's libkokkos-dev lacks"
  done
}

# install_missing <release> <"package version"...>
install_missing() {
  local release=$1 names
  shift
  mapfile -t names < <(missing "$@")
  ((${#names[@]} > 0)) || return 0
  install_packages "$release" "${names[@]}"
  mapfile -t names < <(missing "$@")
  ((${#names[@]} == 0)) || die "the mirror has no new enough ${names[*]}"
}

set_up() {
  check_distribution
  install_missing trixie "${packages[@]}"
  install_missing "$(python_release)" "${modules[@]}"
  clear_apt
  add_missing_archives
  say "all packages are installed"
}

# --- build --------------------------------------------------------------------------------------

# A compiler process takes up to 1.5 GB; more of them than fit make the machine swap.
build_jobs() {
  local cores memory_kb jobs
  cores=$(nproc)
  memory_kb=$(awk '$1 == "MemAvailable:" { print $2 }' /proc/meminfo)
  jobs=$((memory_kb / 1500000))
  ((jobs >= 1)) || jobs=1
  printf '%s' $((jobs < cores ? jobs : cores))
}

# build <folder below build/> <target> <CMake arguments...>
build() {
  local folder="$root/build/$1" target=$2
  local name=$1
  shift 2
  local launcher=()
  if command -v ccache >/dev/null; then
    launcher=(-DCMAKE_C_COMPILER_LAUNCHER=ccache -DCMAKE_CXX_COMPILER_LAUNCHER=ccache)
    # What ccache asks for where headers are precompiled.
    export CCACHE_SLOPPINESS=${CCACHE_SLOPPINESS:-pch_defines,time_macros,include_file_mtime,include_file_ctime}
  fi
  say "configuring build/$name"
  logged "configure-$name" cmake -S "$root" -B "$folder" -G Ninja "${launcher[@]}" "$@"
  say "building build/$name"
  logged "build-$name" cmake --build "$folder" --target "$target" --parallel "$(build_jobs)"
}

# --- run ----------------------------------------------------------------------------------------

# Several ranks on one machine, and quiet: one thread each, no network, more ranks than cores.
set_launch_environment() {
  export OMP_NUM_THREADS=1 OMP_PROC_BIND=false KOKKOS_DISABLE_WARNINGS=1
  # `vader` is the name of shared memory that Open MPI 4 and 5 both know.
  export OMPI_MCA_btl=self,vader OMPI_MCA_pml=ob1
  if [[ $(id -u) == 0 ]]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  fi
}

# Several sources are compiled as one, which takes half the time. One of the tests builds the library
# with each source alone.
unity=(-DCMAKE_UNITY_BUILD=ON)
release_options=(-DCMAKE_BUILD_TYPE=Release "${unity[@]}")

train() {
  set_up
  build release apps/all "${release_options[@]}"
  set_launch_environment
  say "training inputs/gpt_small.json on 4 ranks"
  cd "$root"
  exec mpirun --oversubscribe --bind-to none -n 4 build/release/apps/mics train inputs/gpt_small.json "$@"
}

run_tests() {
  local label="" folder=release target=all build_options=("${release_options[@]}")
  while (($# > 0)); do
    case $1 in
      --label)
        (($# > 1)) || die "--label: expected quick, full, soak or sanitize"
        label=$2
        shift 2
        ;;
      --sanitize)
        folder=sanitize
        # -O1: sanitizer reports stay readable, and the tests fast enough.
        build_options=(-DCMAKE_BUILD_TYPE=Debug "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1" -DMICS_SANITIZE=ON
          "${unity[@]}")
        shift
        ;;
      *) die "test: unknown argument $1 (see $0 --help)" ;;
    esac
  done
  [[ -n $label ]] || { [[ $folder == sanitize ]] && label=sanitize || label=quick; }
  [[ $label =~ ^(quick|full|soak|sanitize)$ ]] ||
    die "--label: expected quick, full, soak or sanitize, found $label"
  [[ $folder == release ]] || target=mics_tests_$label
  set_up
  build "$folder" "$target" "${build_options[@]}"
  say "running the tests labelled $label in build/$folder"
  # Launchers that were killed leave folders behind, over which one with the same number stumbles.
  TMPDIR=$(mktemp -d)
  export TMPDIR
  trap 'rm -rf "$TMPDIR"' EXIT
  ctest --test-dir "$root/build/$folder" --label-regex "^$label\$" --no-tests=error \
    --parallel "$(nproc)" --output-on-failure --output-junit "$logs/$folder-$label.xml"
}

main() {
  local command=${1:-}
  shift || true
  case $command in
    setup)
      (($# == 0)) || die "setup: unknown argument $1 (see $0 --help)"
      set_up
      ;;
    train) train "$@" ;;
    test) run_tests "$@" ;;
    -h | --help | help) usage ;;
    *)
      usage >&2
      exit 2
      ;;
  esac
}

main "$@"
