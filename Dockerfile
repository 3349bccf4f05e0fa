# The demo on a CPU, and every other command:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=INDEX --tag bestrq2 .
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" bestrq2                      writes demo/
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" bestrq2 demo --data recordings
# INDEX is PyTorch's index of CPU builds; without it, PyPI's build with CUDA makes the image some gigabytes larger.
FROM python:3.11-slim

ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# torch first, in a layer of its own, by its pinned version, so that no other requirement decides which build is taken.
WORKDIR /opt/bestrq2
COPY constraints.txt ./
RUN pip install -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install -c constraints.txt '.[demo]'

# Any user may run it; caches go to a place that all can write.
ENV HOME=/tmp
WORKDIR /work
RUN chmod 1777 .
USER 1000:1000
ENTRYPOINT ["bestrq2"]
CMD ["demo"]
