# syntax=docker/dockerfile:1
# Flower over the light side of rerankq: no torch, no model. Build from the repository's root.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /source
COPY constraints.txt pyproject.toml README.md LICENSE NOTICE ./
COPY conf conf
COPY producer producer
COPY worker worker
RUN pip install --constraint constraints.txt '.[flower]' \
 && install -D --mode=644 conf/flower.py /etc/rerankq/flower.py \
 && useradd --create-home --uid 10001 rerankq
USER rerankq
WORKDIR /home/rerankq
EXPOSE 5555
CMD ["celery", "-A", "rerankq.broker", "flower", "--conf=/etc/rerankq/flower.py"]
