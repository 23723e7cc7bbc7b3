# megatron_real on an NGC PyTorch image: torch, transformer-engine, apex and flash-attn are the base's, never replaced.
# Reasoned for nvcr.io/nvidia/pytorch:25.06-py3 (Python 3.12); not built by this project's CI, which has no GPU.
ARG BASE=nvcr.io/nvidia/pytorch:25.06-py3
FROM ${BASE}

LABEL org.opencontainers.image.title="megatron_real" \
      org.opencontainers.image.description="REAL (Rewards as Labels) on Megatron-LM"

WORKDIR /opt/megatron_real
COPY setup.py pyproject.toml README.md ./
COPY megatron_real ./megatron_real
COPY tools ./tools
COPY examples ./examples
# The constraint keeps pip from replacing the base's torch with another build.
RUN python -c "import torch; print('torch==' + torch.__version__)" > /tmp/base.txt \
    && pip install --no-cache-dir --constraint /tmp/base.txt "megatron-core>=0.16.1,<0.20" . \
    && rm /tmp/base.txt

RUN useradd --create-home trainer
USER trainer
ENTRYPOINT []
CMD ["megatron-real", "--help"]
