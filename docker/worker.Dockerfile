# A worker: the SDK, and what training on the handwritten digits needs; no JAX. In the root of the checkout:
# `docker build -f docker/worker.Dockerfile .` For one of your own, put other packages and another script in.

FROM python:3.11-slim-bookworm AS packages
# Where packages come from, if not from where pip looks by itself. This stage is thrown away, and they with it.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build

# The environment that the last stage takes over is filled from outside, so that there is no pip in it. The locks name
# the versions of requirements.lock, with the hashes of their files.
COPY docker/*.lock locks/
RUN python -m venv --without-pip /opt/kedge \
    && pip --python /opt/kedge/bin/python install --require-hashes -r locks/worker.lock \
    && pip install --require-hashes -r locks/build.lock


# Our own package is installed twice: to see that all fits together, and into a folder that the last stage lays over
# the others. What changes with every build is then a small layer, and the large one stays as it is.
FROM packages AS own
COPY client client
RUN pip wheel --no-deps --no-build-isolation --wheel-dir wheels ./client \
    && pip --python /opt/kedge/bin/python install --no-deps --no-index wheels/*.whl \
    && pip --python /opt/kedge/bin/python check \
    && pip --python /opt/kedge/bin/python install --no-deps --no-index --ignore-installed --root /own \
        --no-warn-script-location wheels/*.whl


FROM python:3.11-slim-bookworm
RUN pip uninstall --yes --quiet --root-user-action ignore pip setuptools wheel \
    && groupadd --gid 10001 kedge \
    && useradd --uid 10001 --gid kedge --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin kedge
COPY --from=packages /opt/kedge /opt/kedge
COPY --from=own /own /
COPY examples/digits/data.py examples/digits/model.py examples/digits/open_run.py examples/digits/numpy_worker.py \
    examples/digits/evaluator.py /app/
# Many workers share a host: one thread each for arithmetic.
ENV PATH=/opt/kedge/bin:$PATH \
    HOME=/tmp \
    OMP_NUM_THREADS=1 \
    OPENBLAS_NUM_THREADS=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /app
USER 10001:10001
# SIGTERM lets a worker leave its run, so that nobody waits for its lease to expire.
STOPSIGNAL SIGTERM
# It serves nothing: whether it is well, the run knows by its heartbeats.
HEALTHCHECK NONE
ENTRYPOINT ["python"]
CMD ["numpy_worker.py"]
