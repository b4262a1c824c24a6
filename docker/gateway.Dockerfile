# syntax=docker/dockerfile:1
# The gateway over the light side of rerankq: no torch, no numpy, no model. Build from the repository's root.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /source
COPY constraints.txt pyproject.toml README.md LICENSE NOTICE ./
COPY conf conf
COPY producer producer
COPY worker worker
RUN pip install --constraint constraints.txt '.[gateway,cli]' \
 && useradd --create-home --uid 10001 rerankq \
 && install --directory --owner=rerankq /var/lib/rerankq/files
USER rerankq
WORKDIR /home/rerankq
EXPOSE 8080
CMD ["rerankq", "gateway"]
