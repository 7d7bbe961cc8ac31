#!/usr/bin/env bash
# Set-up behind `make setup`: system packages for FFCV, then .venv with the pinned Python packages.
#   PYTHON=...           the interpreter (default: the first of python3, python3.13, .12, .11 that fits)
#   TORCH_INDEX_URL=...  where pip takes torch and torchvision from (default: pip's own index)
# .venv/.setup-done holds what was installed; while it matches, this ends at once. A .venv with
# .setup-started in it was interrupted and is made anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

want=${PYTHON:-} index=${TORCH_INDEX_URL:-}
done_file=.venv/.setup-done started=.venv/.setup-started

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 2; }
fits() { [[ $1 == 3.1[123] ]]; }
version_of() { "$1" -ISc 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
base_of() { "$1" -ISc 'import sys; print(sys._base_executable)' 2>/dev/null || true; }

stamp() {  # VERSION INDEX: the inputs of an installation, one a line
    printf '%s\n' "$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-64)" \
        "python $1" "torch from ${2:-default}" "at $PWD"
}

is_done() {  # an option left out means: whatever is installed
    [[ -f $done_file && -x .venv/bin/python ]] || return 1
    local have_index
    have_index=$(sed -n 's/^torch from //p' "$done_file")
    [[ $have_index == default ]] && have_index=
    index=${index:-$have_index}
    [[ $(stamp "$(version_of .venv/bin/python)" "$index") == "$(<"$done_file")" ]] || return 1
    [[ -z $want || $(version_of "$want") == "$(version_of .venv/bin/python)" ]]
}

as_root() {
    if [[ $(id -u) == 0 ]]; then "$@"; else sudo -n "$@"; fi
}

install_packages() {  # PACKAGE...
    local command="apt-get install -y --no-install-recommends $*"
    command -v apt-get >/dev/null ||
        fail "needs $*, or your distribution's packages with the same contents; install them and run this again"
    [[ $(id -u) == 0 ]] || sudo -n true 2>/dev/null ||
        fail "system packages are missing and this is not root; run this once:  sudo apt-get update && sudo $command"
    say "system packages: $* (a minute or more; about 250 MB to download on a bare system)"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 update ||
        say "apt-get update failed; trying with the package lists that are here"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 \
        install -y --no-install-recommends "$@" >/dev/null ||
        fail "apt-get could not install them; run it by hand to see why:  sudo $command"
}

find_python() {  # sets python and version; where nothing is asked for, the one of .venv comes first
    local candidate candidates=(python3 python3.13 python3.12 python3.11)
    if [[ -n $want ]]; then
        candidates=("$want")
    elif [[ -e $done_file || -e $started ]]; then
        candidates=("$(base_of .venv/bin/python)" "${candidates[@]}")
    fi
    for candidate in "${candidates[@]}"; do
        version=$(version_of "$candidate")
        if fits "$version"; then python=$candidate; return; fi
    done
    return 1
}

if is_done; then exit 0; fi
exec 9>.setup.lock
if ! flock -n 9; then
    say "waiting for another set-up of this checkout"
    flock 9
    if is_done; then exit 0; fi
fi

# The interpreter, what FFCV is compiled with, and what a virtual environment needs.
missing=()
command -v g++ >/dev/null || missing+=(g++)
command -v pkg-config >/dev/null || missing+=(pkg-config)
pkg-config --exists opencv4 2>/dev/null || missing+=(libopencv-dev)
pkg-config --exists libturbojpeg 2>/dev/null || missing+=(libturbojpeg0-dev)
supported="this needs Python 3.11, 3.12 or 3.13"
if find_python; then
    from_system=$("$python" -ISc 'import sys; print(sys.base_prefix == "/usr")')
    "$python" -Ic 'import os, sysconfig as s; assert os.path.exists(s.get_path("include") + "/Python.h")' 2>/dev/null ||
        if [[ $from_system == True ]]; then missing+=("python$version-dev")
        else fail "$python has no C headers (Python.h), which FFCV needs; install them or name another with PYTHON=..."; fi
    "$python" -Ic 'import ensurepip, venv' 2>/dev/null ||
        if [[ $from_system == True ]]; then missing+=("python$version-venv")
        else fail "$python has no venv and ensurepip; name another interpreter with PYTHON=..."; fi
elif [[ -n $want ]]; then
    fail "PYTHON=$want is ${version:+Python }${version:-not a working Python}; $supported"
elif [[ -n $(version_of python3) ]]; then
    fail "python3 is Python $(version_of python3); $supported: install one, or name it with PYTHON=..."
else
    missing+=(python3 python3-dev python3-venv)
fi
[[ ${#missing[@]} == 0 ]] || install_packages "${missing[@]}"
find_python || fail "the system's python3 is Python $(version_of python3); $supported: install one, or name it with PYTHON=..."

# The virtual environment: updated where it is whole and of this Python, else made anew. One that
# somebody made by hand is used, never deleted.
if [[ -e .venv && $(version_of .venv/bin/python) != "$version" && ! -e $done_file && ! -e $started ]]; then
    fail ".venv exists, was not made by this set-up and is not Python $version; remove it and run this again"
fi
if [[ -e $started || ( -e $done_file && $(version_of .venv/bin/python) != "$version" ) ]] ||
   { [[ -e $done_file ]] && ! grep -qxF "at $PWD" "$done_file"; }; then
    rm -rf .venv
fi
mkdir -p .venv
touch "$started"
rm -f "$done_file"
say "virtual environment .venv, Python $version"
[[ -x .venv/bin/pip ]] || "$python" -m venv .venv

pip() {
    env -u PIP_TARGET -u PIP_PREFIX PIP_USER=0 PIP_USE_PEP517=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
        .venv/bin/python -I -m pip "$@" || fail "pip failed (above); run make setup again once that is solved"
}
quiet=(--no-input)
[[ -t 1 ]] || quiet+=(-q)
say "Python packages of constraints.txt (minutes; the default torch for Linux is several GB)"
if [[ -n $index ]]; then
    mapfile -t torch < <(grep -E '^(torch|torchvision)==' constraints.txt)
    pip install "${quiet[@]}" --no-deps --index-url "$index" "${torch[@]}"
fi
pip install "${quiet[@]}" -c constraints.txt -e '.[dev]'
.venv/bin/python -c 'import cv2, ffcv, torch, torchvision, wandb' ||
    fail "the packages are installed but do not import (above)"

stamp "$version" "$index" >"$done_file.new"
mv "$done_file.new" "$done_file"
rm -f "$started"
say "done in $SECONDS s"
