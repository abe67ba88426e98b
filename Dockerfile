# vLLM's official image with glassbox in it; `vllm serve` stays the entry point.
#   docker build -t vllm-glassbox .
#   docker run --gpus all --ipc=host -p 8000:8000 -v model-cache:/home/vllm/.cache vllm-glassbox MODEL
# Any release that README lists: docker build --build-arg VLLM_VERSION=0.31.0 -t vllm-glassbox .
ARG VLLM_VERSION=0.33.0
FROM vllm/vllm-openai:v${VLLM_VERSION}

# vLLM is in the image, so no extra is named; pip leaves installed packages that satisfy it as they are.
WORKDIR /opt/glassbox
COPY . .
RUN python3 -m pip install --no-cache-dir . \
    && useradd --create-home --uid 10001 vllm

# The image's own user is root; the server needs no more than a home for its caches.
USER 10001
ENV HOME=/home/vllm
WORKDIR /home/vllm
# A new volume takes its owner from the directory that it is mounted at; if there is none, root owns it, and no model
# could be fetched into it.
RUN mkdir .cache
