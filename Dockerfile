# The programs with kernels for Hopper and, as PTX, for everything from Ampere on; cuBLAS comes with the base image.
#   docker build -t l2p .
#   docker run --gpus all -p 7860:7860 -v $PWD/models:/models:ro l2p --model /models/demo/pixel --host 0.0.0.0
FROM rust:1.95-bookworm AS build
# What a release of the base image has; versions of its packages are that release's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /l2p
COPY . .
RUN scripts/cuda-toolchain && cargo install --locked --path bins --root /opt/l2p

FROM nvidia/cuda:13.0.1-base-ubuntu24.04
# What a release of the base image has; versions of its packages are that release's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libcublas-13-0 libnccl2 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/l2p/bin/ /usr/local/bin/
RUN useradd --system --uid 10001 l2p
USER 10001
EXPOSE 7860
ENTRYPOINT ["l2p-serve"]
CMD ["--help"]
