# A service that answers from a model and a store (docs/guides/serve.md):
#   docker build --tag vista .
#   docker run --publish 8000:8000 --env VISTA_SERVE_TOKEN --volume ./models:/models --volume ./stores:/stores vista
FROM python:3.11-slim
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY conf conf
COPY kernels kernels
COPY vista vista
# The CPU build of torch; leave the index out for GPUs. The compiler builds the library that scores requests.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ \
    && pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu '.[serve]' \
    && apt-get purge --yes --auto-remove g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /
RUN useradd --system vista
USER vista
EXPOSE 8000
ENTRYPOINT ["vista", "serve"]
CMD ["model=/models/best", "store=/stores/mine", "host=0.0.0.0"]
