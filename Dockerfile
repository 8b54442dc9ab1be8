# Danlu in a container with CUDA. The project folder is a volume; the environment is built into the image.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive \
    DANLU_HOME=/projects \
    DANLU_CACHE=/opt/danlu-cache \
    PYTHONUNBUFFERED=1

# gcc and the headers: Triton and DeepSpeed compile small launchers at run time.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc git make python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 danlu \
    && install -d -o danlu -g danlu /projects /opt/danlu-cache /opt/danlu

USER danlu
WORKDIR /opt/danlu
COPY --chown=danlu:danlu Makefile requirements.txt requirements-nodeps.txt ./
COPY --chown=danlu:danlu core ./core
RUN make setup

COPY --chown=danlu:danlu . .
VOLUME /projects
EXPOSE 6006

# An init that reaps: runs are detached from the server and would otherwise stay as zombies.
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD [".venv/bin/streamlit", "run", "app.py", "--server.address", "0.0.0.0", "--server.port", "6006"]
