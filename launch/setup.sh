# Sourced by the other scripts: makes a virtual environment with pinned engines, builds the package, applies the patches.
# Does nothing where that is done already and nothing that it depends on has changed; else brings it there from whatever state it is in.
#
# PYTHON: the interpreter. Default: python3.
# SGLANG_VERSION, MEGATRON_VERSION: pins, of those in launch/pins/ and patches/megatron-core/. Default: sglang 0.5.20; megatron-core 0.19.2
# from Python 3.12 on, 0.16.1 before.
# R3_VENV: the folder of the environment. Default: .venv, or .venv-3.12, .venv-3.13 and so on, and behind it each pin that is not the default.
# R3_EXTRAS: extras of pyproject.toml to install; default: "gpu" where nvidia-smi finds one, else "cpu"; with megatron-core 0.19 and
# newer also "bridge", and megatron-bridge with it.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}

r3_say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }

# Print a Python 3.12 or newer, from the path or from where pyenv keeps them; nothing where there is none.
r3_newer_python() {
    local python
    for python in python3.{12..14} "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.{12..14}.*/bin/python; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
}

# r3_pin VARIABLE DISTRIBUTION VERSION PIN...: refuse a version that is none of the pins.
r3_pin() {
    local variable=$1 distribution=$2 version=$3 pin
    shift 3
    for pin in "$@"; do [ "$pin" != "$version" ] || return 0; done
    r3_say "$variable=$version is no pin of $distribution; pins: $*"
    exit 2
}

# Say in VENV, SGLANG, MEGATRON, BRIDGE and PINS what is installed where; BRIDGE is empty where it is not to be.
r3_choose() {
    local sglang=0.5.20 megatron=0.16.1 newer series
    local -a known=(launch/pins/sglang-*.txt)
    known=("${known[@]#launch/pins/sglang-}")
    newer=$("$PYTHON" -c 'import sys; print("-%d.%d" % sys.version_info[:2] if sys.version_info >= (3, 12) else "")')
    [ -z "$newer" ] || megatron=0.19.2
    SGLANG=${SGLANG_VERSION:-$sglang} MEGATRON=${MEGATRON_VERSION:-$megatron} VENV=.venv$newer
    r3_pin SGLANG_VERSION sglang "$SGLANG" "${known[@]%.txt}"
    known=()
    for series in patches/megatron-core/*/series; do
        # A version that no registry has says in this file which commit it is.
        [ -e "${series%series}source" ] || known+=("$series")
    done
    known=("${known[@]#patches/megatron-core/}")
    r3_pin MEGATRON_VERSION megatron-core "$MEGATRON" "${known[@]%/series}"
    [ "$SGLANG" = "$sglang" ] || VENV+=-sglang-$SGLANG
    [ "$MEGATRON" = "$megatron" ] || VENV+=-megatron-core-$MEGATRON
    VENV=${R3_VENV:-$VENV} PINS=launch/pins/sglang-$SGLANG.txt SGLANG=sglang==$SGLANG MEGATRON=megatron-core==$MEGATRON BRIDGE=
    # megatron-bridge is for Python 3.12 alone, and for transformers up to 5.12.1.
    if [ "$newer" = -3.12 ] && [[ $MEGATRON = megatron-core==0.19.* ]] && grep -q '^transformers==5\.12\.' "$PINS"; then
        BRIDGE=megatron-bridge==0.6.2
    fi
}
r3_choose

r3_extras() {
    local extras
    if [ -n "${R3_EXTRAS:-}" ]; then extras=$R3_EXTRAS; elif nvidia-smi -L >/dev/null 2>&1; then extras=gpu; else extras=cpu; fi
    echo "$extras${BRIDGE:+,bridge}"
}

# What the installation was made from: a change of it means to install again.
r3_fingerprint() {
    {
        echo "$SGLANG $MEGATRON $BRIDGE"
        r3_extras
        "$PYTHON" --version
        cat launch/setup.sh pyproject.toml "$PINS"
        find cpp patches -type f -print0 | sort -z | xargs -0 cat
    } | sha256sum | cut -d ' ' -f 1
}

r3_install() {
    local extras pip="$VENV/bin/python -m pip install --quiet --disable-pip-version-check"
    extras=$(r3_extras)
    r3_say "installing $SGLANG, $MEGATRON and the package ($extras) into $VENV"
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
    if [ "${extras%,bridge}" = cpu ]; then
        # torch first and alone: everything after it must take what is there.
        $pip --constraint "$PINS" torch
        $pip --constraint "$PINS" "$MEGATRON" --editable ".[$extras,report,rl,test]"
        # SGLang's CUDA dependencies are left out; docs/install.md names them.
        $pip --no-deps "$SGLANG"
    else
        $pip "$SGLANG" "$MEGATRON" --editable ".[$extras,report,rl,test]"
    fi
    [ -z "$BRIDGE" ] || $pip --no-deps "$BRIDGE"
    r3_patch
}

r3_patch() {
    r3_say "patching the engines"
    "$VENV/bin/r3" patch apply sglang megatron-core && return
    r3_say "installing the engines again"
    r3_replace_engines
    "$VENV/bin/r3" patch apply sglang megatron-core
}

# pip leaves what it did not install: set that aside, whoever made it, and the metadata that a stopped pip may have damaged.
r3_replace_engines() {
    local site kept path
    "$VENV/bin/python" -m pip uninstall --quiet --disable-pip-version-check --yes sglang megatron-core || true
    site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    kept=$(mktemp -d "$VENV/set-aside-$(date +%F)-XXXX")
    for path in "$site"/{sglang,megatron/core} "$site"/{sglang,megatron_core}-*.{dist,egg}-info "$site"/{,.}r3-patch-*; do
        if [ -e "$path" ]; then mv "$path" "$kept/"; fi
    done
    r3_say "what was left of them is in $kept"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps "$SGLANG" "$MEGATRON"
}

r3_setup() {
    local want
    want=$(r3_fingerprint)
    if [ "$(cat "$VENV/.r3-setup" 2>/dev/null)" != "$want" ] || ! "$VENV/bin/r3" patch verify sglang megatron-core >/dev/null 2>&1; then
        rm -f "$VENV/.r3-setup"
        r3_install
        echo "$want" >"$VENV/.r3-setup"
    fi
    "$VENV/bin/r3" patch verify sglang megatron-core >&2
}

# Run the tests on several workers: engines wait for each other much of the time.
r3_pytest() {
    local cores
    cores=$(nproc)
    "$VENV/bin/python" -m pytest --numprocesses $((cores < 2 ? 2 : cores < 8 ? cores : 8)) --dist loadfile "$@"
}
