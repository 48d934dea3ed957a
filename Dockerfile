# Build:  docker build -t moepp .                          CPU
#         docker build -t moepp --build-arg TORCH=cuda .   NVIDIA GPUs; torch's packages bring the CUDA libraries
# Run:    docker run --rm -it moepp ./launch/demo.sh
#         docker run --gpus all --network host --shm-size 8g -v "$PWD/data:/opt/moepp/data" \
#             -v "$PWD/runs:/opt/moepp/runs" moepp ./launch/torchrun.sh experiment=moepp_0.6b
# Tested: the CPU image, on a Debian 12 base with its Python 3.11 (--build-arg BASE=...). Not yet: TORCH=cuda on a GPU.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/moepp
# First what decides the environment, so that a change of code alone reuses the layer with the packages.
COPY pyproject.toml LICENSE README.md ./
COPY launch/setup.sh launch/
ARG TORCH=cpu
RUN PIP_NO_CACHE_DIR=1 MOEPP_TORCH=${TORCH} ./launch/setup.sh

COPY . .
RUN .venv/bin/python -m pip install -qq --no-deps --editable .
ENV PATH=/opt/moepp/.venv/bin:${PATH}
CMD ["moepp", "--help"]
