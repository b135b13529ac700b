# ConvService in a container: `docker build -t convservice .`, or `docker compose up` beside this file.
#
# PYTHON_IMAGE is any Debian-like image with Python 3.11 or newer, its venv and pip. EXTRAS says what the environment
# holds: the processor and traces by default; `server,cuda13` makes the image for GPUs on the same base, with CUDA's
# libraries from wheels and the driver from the host. The classic builder is enough.
ARG PYTHON_IMAGE=python:3.13-slim

FROM ${PYTHON_IMAGE} AS build
ARG EXTRAS=server,bfloat16,otel
WORKDIR /source

# pip and what builds the project stay in this stage; the environment that runs holds neither.
COPY pyproject.toml tools/requirements.py ./
RUN python -m venv /opt/pip \
    && python requirements.py pyproject.toml --build > build.txt \
    && /opt/pip/bin/python -m pip install --quiet --no-cache-dir --requirement build.txt \
    && python -m venv --without-pip /opt/convservice

# What the project needs changes seldom: a layer of its own. Tests, headers, stubs and static libraries of these
# packages are of no use to a program that runs. Compiled here, since nothing can be written where it runs; by
# content, so that no time stamp matters.
RUN python requirements.py pyproject.toml "$EXTRAS" > requirements.txt \
    && /opt/pip/bin/python -m pip --python /opt/convservice/bin/python install \
        --quiet --no-cache-dir --no-compile --only-binary :all: --requirement requirements.txt \
    && find /opt/convservice/lib -depth -type d \
        \( -path '*/numpy/*/tests' -o -path '*/scipy/*/tests' -o -path '*/numpy/tests' \) -exec rm -r {} + \
    && find /opt/convservice/lib -type f \
        \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -path '*/numpy/*.a' -o -path '*/numpy/*.h' \) -delete \
    && /opt/convservice/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/convservice/lib

COPY README.md LICENSE ./
COPY client client
COPY backends backends
COPY server server
RUN /opt/pip/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir wheels . \
    && /opt/pip/bin/python -m pip --python /opt/convservice/bin/python install \
        --quiet --no-cache-dir --no-compile --no-deps wheels/*.whl \
    && /opt/convservice/bin/python -m compileall -q --invalidation-mode unchecked-hash \
        /opt/convservice/lib/python*/site-packages/convservice* \
    && install -d /var/cache/convservice

FROM ${PYTHON_IMAGE}
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ConvService" \
      org.opencontainers.image.description="Convolutional layers computed elsewhere, rows flowing all the way" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"

COPY --from=build /opt/convservice /opt/convservice
COPY --from=build --chown=65532:65532 /var/cache/convservice /var/cache/convservice

# The worked example, computed by a server inside: an image that cannot do it is not made. What it imports of the
# standard library is compiled by it, where the base image has not done so.
RUN ["/opt/convservice/bin/convservice", "example"]

# BLAS on one thread from the start: the server would otherwise start its command over to have it so.
ENV PATH=/opt/convservice/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 BLIS_NUM_THREADS=1 VECLIB_MAXIMUM_THREADS=1 \
    CONVSERVICE_LISTEN=0.0.0.0:50051 \
    CONVSERVICE_HEALTH_LISTEN=127.0.0.1:50052 \
    CONVSERVICE_METRICS=0.0.0.0:9464 \
    CONVSERVICE_LOG_FORMAT=json \
    CONVSERVICE_KERNEL_CACHE=/var/cache/convservice \
    CUPY_CACHE_DIR=/var/cache/convservice/cupy \
    CUDA_CACHE_PATH=/var/cache/convservice/cuda

USER 65532:65532
WORKDIR /
VOLUME /var/cache/convservice
EXPOSE 50051 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["/opt/convservice/bin/convservice", "health", "--target", "127.0.0.1:50052"]
ENTRYPOINT ["/opt/convservice/bin/convservice"]
CMD ["serve"]
