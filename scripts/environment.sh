# Sourced by the other scripts: the repository root, the runtime's folder, and the Python environment in .venv.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export ATHENA_GGUF_RUNTIME=${ATHENA_GGUF_RUNTIME:-$root/build/runtime}

# need COMMAND PACKAGE ...: leave with one message that names every command that is missing, and its package.
need() {
    local commands=() packages=()
    while [ $# -gt 0 ]; do
        if ! command -v "$1" >/dev/null; then
            commands+=("$1")
            packages+=("$2")
        fi
        shift 2
    done
    if [ ${#commands[@]} -gt 0 ]; then
        echo "missing: ${commands[*]}; on Debian or Ubuntu: sudo apt-get install ${packages[*]}" >&2
        exit 1
    fi
}

# environment: create .venv if there is none and install the package with its development tools, editable.
environment() {
    local python=${PYTHON:-python3} venv=$root/.venv stamp state
    need "$python" python3 git git cmake cmake ninja ninja-build c++ g++
    stamp=$venv/installed
    if [ ! -x "$venv/bin/python" ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "$python is older than Python 3.10; set PYTHON to a newer one" >&2
            exit 1
        }
        "$python" -c 'import ensurepip, venv' 2>/dev/null || {
            echo "$python cannot make virtual environments; on Debian or Ubuntu: sudo apt-get install python3-venv" >&2
            exit 1
        }
        "$python" -m venv "$venv"
    fi
    export PATH=$venv/bin:$PATH VIRTUAL_ENV=$venv
    state=$(cat "$root/pyproject.toml" "$root/scripts/constraints.txt" | cksum)
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$state" ]; then
        echo "== Python environment in $venv (1 to 2 GB with torch's CPU build, some 6 GB more where pip takes CUDA's)"
        # Of what pip says, the large downloads: its bars are for terminals, and all of it is too much.
        PYTHONUNBUFFERED=1 python -m pip install --progress-bar off --constraint "$root/scripts/constraints.txt" \
            --editable "${root}[dev]" | awk '
                /Downloading .*\([0-9.]+ [MG]B\)/ { print "  downloading " $2 " " $3 " " $4 }
                /^Installing collected packages/ { print "  installing all of them" }
                { fflush() }'
        echo "$state" >"$stamp"
    fi
    command -v ccache >/dev/null || echo "(ccache would make the next build of llama.cpp faster)"
}
