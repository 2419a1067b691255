# CPU:         docker build -t reverie-jax .
# NVIDIA GPUs: docker build -t reverie-jax --build-arg EXTRAS=web,cuda13 .     (run with --gpus all)
# TPU:         docker build -t reverie-jax --build-arg EXTRAS=web,tpu .        (run with --privileged --net host)
#
# docker run -v "$PWD:/work" reverie-jax data check reverie.json --images photos
# Pages and endpoints listen on all addresses of the container, so they need a key:
# docker run -v "$PWD:/work" -p 127.0.0.1:8000:8000 -e REVERIE_API_KEY reverie-jax serve scenes-base --host 0.0.0.0
ARG PYTHON=3.12
FROM python:${PYTHON}-slim
ARG EXTRAS=web

WORKDIR /opt/reverie-jax
COPY pyproject.toml README.md LICENSE ./
COPY constraints constraints
COPY reverie_jax reverie_jax
RUN line="py$(python -c 'import sys; print(f"{sys.version_info[0]}{sys.version_info[1]}")')" \
    && pip install --no-cache-dir --constraint "constraints/${line}.txt" ".[${EXTRAS}]"

# Files that a run writes belong to whoever starts it: docker run --user "$(id -u):$(id -g)" …
RUN useradd --create-home reverie && chmod 777 /home/reverie
ENV HOME=/home/reverie
USER reverie
WORKDIR /work
ENTRYPOINT ["reverie"]
