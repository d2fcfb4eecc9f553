# Image for GPU clusters: docker build -t megatron-cogview .
#
# The base images bring torch, CUDA and NCCL; their torch is kept whatever the project pins.
# With --build-arg WITH_APEX=1 the first stage builds NVIDIA's apex (FusedAdam) from source.  Never
# `pip install apex`: the public index has an unrelated package of that name.

ARG DEVEL_IMAGE=pytorch/pytorch:2.10.0-cuda12.8-cudnn9-devel
ARG RUNTIME_IMAGE=pytorch/pytorch:2.10.0-cuda12.8-cudnn9-runtime

FROM ${DEVEL_IMAGE} AS devel
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG WITH_APEX=0
ARG APEX_COMMIT=10417aceddd7d5d05d7cbf7b0fc2daad1105f8b4
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0"
WORKDIR /wheels
# The package lists are needed by this layer alone, and apt's versions belong to the base image.
# hadolint ignore=DL3008
RUN if [ "${WITH_APEX}" = 1 ]; then \
      apt-get update \
      && apt-get install -y --no-install-recommends git \
      && rm -rf /var/lib/apt/lists/* \
      && git init -q /opt/apex \
      && git -C /opt/apex fetch -q --depth 1 https://github.com/NVIDIA/apex "${APEX_COMMIT}" \
      && git -C /opt/apex checkout -q FETCH_HEAD \
      && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST}" \
         PIP_BREAK_SYSTEM_PACKAGES=1 \
         python -m pip wheel --no-cache-dir --no-deps --no-build-isolation -w /wheels /opt/apex; \
    fi

FROM ${RUNTIME_IMAGE} AS runtime
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG WITH_APEX=0
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# The base image's own torch, and the triton that belongs to it, in place of the project's pins;
# everything else as pinned.
WORKDIR /opt/megatron-cogview
COPY constraints.txt ./
RUN { python -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" \
      && grep -v -e '^torch==' -e '^triton==' constraints.txt; } > /opt/constraints.txt

COPY --from=devel /wheels /opt/wheels
RUN if [ "${WITH_APEX}" = 1 ]; then \
      python -m pip install --no-deps /opt/wheels/*.whl \
      && python -c "import torch, amp_C; from apex.optimizers import FusedAdam"; \
    fi

# Dependencies before the project, so that a change of code does not install them again.
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megatron_cogview/__init__.py megatron_cogview/
RUN python -m pip install -c /opt/constraints.txt .

COPY . .
RUN python -m pip install --no-deps --force-reinstall . \
    && python -c "import megatron_cogview, megatron.core" \
    && useradd --create-home --uid 10001 --shell /bin/bash cogview

USER 10001
WORKDIR /home/cogview
# One process: docker run IMAGE plan base_4b --gpus 64
# One node:    docker run --gpus all --ipc host --entrypoint torchrun IMAGE \
#                --nproc-per-node 8 -m megatron_cogview pretrain base_4b ...
ENTRYPOINT ["python", "-m", "megatron_cogview"]
CMD ["--help"]
