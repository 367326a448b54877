# The server: `docker build -f docker/server.Dockerfile .` in the root of the checkout. `--build-arg JAX=cuda13` makes
# the one for NVIDIA. Nothing here asks for BuildKit, so that every builder can make it.

FROM python:3.11-slim-bookworm AS packages
# Where packages come from, if not from where pip looks by itself. This stage is thrown away, and they with it.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG JAX=cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build

# The environment that the last stage takes over is filled from outside, so that there is no pip in it. The locks name
# the versions of requirements.lock, with the hashes of their files.
COPY docker/*.lock locks/
RUN python -m venv --without-pip /opt/kedge \
    && mv locks/server.lock locks/server-cpu.lock \
    && pip --python /opt/kedge/bin/python install --require-hashes -r "locks/server-$JAX.lock" \
    && pip install --require-hashes -r locks/build.lock


# Our own packages are installed twice: to see that all fits together, and into a folder that the last stage lays over
# the others. What changes with every build is then a small layer, and the large one stays as it is.
FROM packages AS own
COPY client client
COPY server server
RUN pip wheel --no-deps --no-build-isolation --wheel-dir wheels ./client ./server \
    && pip --python /opt/kedge/bin/python install --no-deps --no-index wheels/*.whl \
    && pip --python /opt/kedge/bin/python check \
    && pip --python /opt/kedge/bin/python install --no-deps --no-index --ignore-installed --root /own \
        --no-warn-script-location wheels/*.whl


FROM python:3.11-slim-bookworm
# What serves installs nothing. A volume that is mounted for the first time gets the owner of the folder under it.
RUN pip uninstall --yes --quiet --root-user-action ignore pip setuptools wheel \
    && groupadd --gid 10001 kedge \
    && useradd --uid 10001 --gid kedge --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin kedge \
    && install --directory --owner kedge --group kedge --mode 0750 /data
COPY --from=packages /opt/kedge /opt/kedge
COPY --from=own /own /
# Its root file system may be read-only: it writes to /data, and JAX and Orbax to /tmp now and then.
ENV PATH=/opt/kedge/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    KEDGE_SERVER__LISTEN=0.0.0.0:50051 \
    KEDGE_SERVER__DATA_DIR=/data \
    KEDGE_SERVER__SHARED_MEMORY=false
USER 10001:10001
VOLUME /data
EXPOSE 50051
# SIGTERM asks for the last checkpoints. They have server.grace_seconds, 10, and calls in flight as long again: whoever
# stops the container gives it 30 seconds, as compose.yaml does.
STOPSIGNAL SIGTERM
# SERVING: every run is recovered, and its update compiled.
HEALTHCHECK --interval=10s --timeout=6s --start-period=120s --retries=3 CMD ["kedge-server", "health"]
ENTRYPOINT ["kedge-server"]
CMD ["serve"]
