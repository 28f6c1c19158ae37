"""The HTTP service of `vista serve`: a scorer per process behind FastAPI and uvicorn (extra `serve`)."""

from vista.installation import require_module

for _package in ("fastapi", "httptools", "msgspec", "prometheus_client", "uvicorn", "uvloop"):
    require_module(_package, "serve")
