# The hub. Without a model: routing falls back to keywords, documents to rules. For one, install ".[hub,llm]" instead, mount its
# folder and set HUBPEER_MODEL__NAME.
FROM python:3.11-slim

WORKDIR /src
COPY pyproject.toml constraints.txt README.md ./
COPY hubpeer ./hubpeer
RUN pip install --no-cache-dir -c constraints.txt ".[hub]" \
    && rm -rf /src \
    && useradd --system --uid 10001 --home-dir /data hubpeer \
    && install -d -o hubpeer -g hubpeer -m 0700 /data

WORKDIR /data
USER hubpeer
VOLUME /data

# `hubpeer status` ends with 0 where the hub is well, 1 where it is degraded, 3 where it does not answer.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 CMD ["hubpeer", "status"]

# SIGTERM lets it finish what it has begun (service.drain_s, 10 s).
STOPSIGNAL SIGTERM
ENTRYPOINT ["hubpeer"]
CMD ["serve", "--data", "/data"]
