# A GPU node with both engines patched, on SGLang's own image, which slime and verl build on too. It needs no GPU to build:
#
#   docker build -t r3-adapter .
#   docker run --gpus all --ipc host --ulimit memlock=-1 r3-adapter r3 doctor
#
# The versions are pins of patches/; tests/unit/test_container.py holds them to it.
ARG SGLANG_VERSION=0.5.20
FROM lmsysorg/sglang:v${SGLANG_VERSION} AS wheel
COPY . /src
RUN python3 -m pip wheel --no-deps --wheel-dir /wheels /src

FROM lmsysorg/sglang:v${SGLANG_VERSION}
ARG SGLANG_VERSION
ARG MEGATRON_VERSION=0.19.2
ARG BRIDGE_VERSION=0.6.2
# Some of these images are of a distribution that keeps pip out otherwise.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY --from=wheel /wheels /wheels
# The image's own torch and kernels stay: everything that comes after must take them.
RUN python3 -m pip list --format freeze | grep -E '^(torch|torchaudio|torchvision|triton|sglang-kernel|flashinfer)' >/constraints.txt \
    && python3 -m pip install --constraint /constraints.txt "megatron-core==${MEGATRON_VERSION}" /wheels/r3_adapter-*.whl \
        "r3-adapter[bridge,report,rl]" \
    && python3 -m pip install --no-deps "megatron-bridge==${BRIDGE_VERSION}"
# The image has SGLang as a clone. The release takes its place, whose files the patches know by their hashes.
RUN python3 -m pip install --no-deps --force-reinstall "sglang==${SGLANG_VERSION}" \
    && r3 patch apply sglang megatron-core \
    && r3 patch verify sglang megatron-core
# Megatron-core wants it for context parallelism, and for tensor parallelism with norms. It is compiled, for an hour or so:
#   docker build --build-arg TRANSFORMER_ENGINE=transformer-engine[pytorch] -t r3-adapter .
ARG TRANSFORMER_ENGINE=
RUN if [ -n "$TRANSFORMER_ENGINE" ]; then \
        python3 -m pip install --no-build-isolation --constraint /constraints.txt "$TRANSFORMER_ENGINE"; \
    fi
