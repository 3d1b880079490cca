# Sourced by the scripts before they install anything: -h and --help install nothing.

# r3_help PROGRAM WORD...: if one of the words asks for help, print the comment at the head of the script, then what PROGRAM says of its
# flags, where an environment is there that can run it, and end. PROGRAM is empty for a script whose head says all.
r3_help() {
    local program=$1 root word python
    shift
    root=$(dirname "${BASH_SOURCE[0]}")/..
    for word in "$@"; do
        if [ "$word" != -h ] && [ "$word" != --help ]; then continue; fi
        sed -n '2,$ { /^#/!q; s/^# \{0,1\}//p; }' "$0"
        [ -n "$program" ] || exit 0
        echo
        for python in "$root"/.venv{,-*}/bin/python; do
            if "$python" -c 'from r3_adapter import _core' 2>/dev/null; then exec "$python" "$root/$program" --help; fi
        done
        echo "Its flags are listed here once it is installed, which a run without --help does."
        exit 0
    done
}
