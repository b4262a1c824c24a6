# syntax=docker/dockerfile:1
# A worker: one process, one device, one cross-encoder. Build from the repository's root.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
# Where torch comes from: empty is PyPI, whose Linux build brings CUDA along; docker-compose.cpu.yml names the CPU builds.
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/rerankq/bin:$PATH
RUN python -m venv /opt/rerankq
WORKDIR /source
# torch alone first: it is the largest layer, and changes of our own code leave it in the build cache.
COPY constraints.txt ./
RUN pip install --constraint constraints.txt --upgrade pip \
 && pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY conf conf
COPY producer producer
COPY worker worker
RUN pip install --constraint constraints.txt '.[worker,remote,openvino,cli]'

FROM python:${PYTHON}-slim
RUN useradd --create-home --uid 10001 rerankq \
 && install --directory --owner=rerankq /var/lib/rerankq/models
COPY --from=build /opt/rerankq /opt/rerankq
# Models that are downloaded outlive the container in a volume of this path.
ENV PATH=/opt/rerankq/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/var/lib/rerankq/models
USER rerankq
WORKDIR /home/rerankq
CMD ["rerankq", "worker"]
