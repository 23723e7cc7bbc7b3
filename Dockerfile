# megatron_real on an NGC PyTorch image: torch, transformer-engine, apex and flash-attn are the base's, never replaced.
# docs/container.md says what each pin was chosen by and how to check another base; tools/check_container.py checks them.
ARG BASE=nvcr.io/nvidia/pytorch:26.10-py3

# vLLM's published wheels are compiled for another torch than the base's, so it is compiled here, for the base's own.
FROM ${BASE} AS wheels
ARG VLLM=0.31.0
ARG TORCH_CUDA_ARCH_LIST="8.0 9.0 10.0"
ARG MAX_JOBS=8
# The base's constraints pin the build tools too; the stage is thrown away, only torch must stay.
ENV PIP_CONSTRAINT=""
WORKDIR /build
RUN git clone --depth 1 --branch "v${VLLM}" https://github.com/vllm-project/vllm.git . \
    && python use_existing_torch.py \
    && pip install --no-cache-dir --requirement requirements/build/cuda.txt \
    && SETUPTOOLS_SCM_PRETEND_VERSION="${VLLM}" \
       pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${BASE}
ARG MEGATRON_CORE=0.19.2
ARG MATH_VERIFY=0.9.0

LABEL org.opencontainers.image.title="megatron_real" \
      org.opencontainers.image.description="REAL (Rewards as Labels) on Megatron-LM" \
      org.opencontainers.image.documentation="docs/container.md"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Instead of the base's constraints, which pin everything, ours pin what is compiled together: pip fails if it must change.
RUN pip list --format=freeze | grep -iE '^(torch|pytorch|triton|transformer.engine|flash.attn|apex)' > /opt/base.txt
ENV PIP_CONSTRAINT=/opt/base.txt

RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --no-cache-dir /wheels/*.whl "megatron-core==${MEGATRON_CORE}" "math-verify==${MATH_VERIFY}"

WORKDIR /opt/megatron_real
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megatron_real ./megatron_real
COPY tools ./tools
COPY examples ./examples
# The last line prints, and fails on, whatever of the base is no longer there as it was.
RUN pip install --no-cache-dir . \
    && pip list --format=freeze > /tmp/now.txt \
    && ! grep -Fxv --file=/tmp/now.txt /opt/base.txt

RUN useradd --create-home --uid 10001 trainer
USER 10001
WORKDIR /home/trainer
CMD ["megatron-real", "doctor"]
