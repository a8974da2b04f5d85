# CPU:   docker build -t cifar_jax .
# CUDA:  docker build -t cifar_jax:cuda --build-arg EXTRA=cuda12 .
# Train: docker run --rm -v "$PWD/runs:/app/runs" -v ~/tensorflow_datasets:/data cifar_jax \
#            train --model dropout_cnn            (with --gpus all for the second)
# JAX's CUDA wheels bring CUDA itself; the host needs NVIDIA's driver and container toolkit.
FROM python:3.11-slim
ARG EXTRA=""
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY cifar_jax cifar_jax
RUN pip install --no-cache-dir -c constraints.txt ".${EXTRA:+[$EXTRA]}"
RUN useradd --create-home --uid 1000 user && mkdir -p /app/runs /data && chown -R user /app /data
USER user
WORKDIR /app
ENV TFDS_DATA_DIR=/data
ENTRYPOINT ["sh", "-c", "command=$1; shift; exec python -m cifar_jax.$command \"$@\"", "cifar_jax"]
CMD ["train", "--help"]
