# One member of HiveFabric and what it depends on, nothing else:
#   docker build --build-arg PACKAGE=hivefabric-scheduler -t hivefabric-scheduler .
FROM python:3.11-slim AS build
WORKDIR /src
ENV UV_SYSTEM_CERTS=1 UV_LINK_MODE=copy UV_NO_PROGRESS=1 UV_PYTHON_DOWNLOADS=never

# Every dependency goes into the cache here, checked against its hash. The members are later installed offline from
# that cache, so that nothing can come in which was not checked.
COPY requirements.txt requirements-dev.txt requirements-setup.txt ./
RUN pip install -q --no-cache-dir --disable-pip-version-check --require-hashes -r requirements-setup.txt \
 && uv venv -q /checked \
 && uv pip install -q --python /checked --require-hashes -r requirements.txt \
 && rm -r /checked

COPY . .
RUN uv build -q --all-packages --wheel --out-dir /wheels --build-constraints requirements-dev.txt --require-hashes

ARG PACKAGE
RUN test -n "$PACKAGE" \
 && uv venv -q /opt/hive \
 && uv pip install -q --python /opt/hive --offline --find-links /wheels --constraints requirements.txt --compile-bytecode "$PACKAGE"


FROM python:3.11-slim
# A new volume takes the owner of the folder that it is first mounted on; hence the empty ones.
RUN groupadd --gid 10001 hive \
 && useradd --uid 10001 --gid hive --home-dir /var/lib/hive --no-create-home --shell /usr/sbin/nologin hive \
 && install -d -o hive -g hive -m 700 /var/lib/hive /var/lib/hive/artifacts /var/lib/hive/cache /var/lib/hive/keys \
      /var/lib/hive/executors /var/lib/hive/executors/executor-1 \
 && for process in postgres nats prometheus registry scheduler router audit gateway executor-1; do \
      install -d -o hive -g hive "/handout/$process"; \
    done
COPY --from=build /opt/hive /opt/hive
ENV PATH=/opt/hive/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HIVE_HOME=/var/lib/hive
WORKDIR /
USER hive
