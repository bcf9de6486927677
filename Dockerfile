# All programs, with the libraries of the newest versions. For NVIDIA GPUs and for CPUs.
#   docker build -t movienet-stream .
#   docker run --gpus all --shm-size 2g --user "$(id -u):$(id -g)" -v "$PWD:/project" movienet-stream \
#       movienet-train run --config my.yaml
FROM python:3.12 AS wheel
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE NOTICE THIRD-PARTY.md ./
COPY configs configs
COPY sharding sharding
COPY encoders encoders
COPY training training
COPY eval eval
COPY slurm slurm
COPY movienet_stream movienet_stream
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:3.12-slim
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir "$(echo /dist/*.whl)[s3,tensorboard,video]"
# Any user of the host may run it: caches of the hub and of matplotlib are not in the home of root.
ENV HOME=/tmp HF_HOME=/project/.cache/huggingface
WORKDIR /project
CMD ["movienet-shard", "--help"]
