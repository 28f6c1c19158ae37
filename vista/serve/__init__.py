"""The HTTP service of `vista serve`: a scorer per process behind FastAPI and uvicorn (extra `serve`)."""

from importlib.util import find_spec

from vista.installation import require_module

for _package in ("fastapi", "httptools", "msgspec", "prometheus_client", "uvicorn", "uvloop"):
    if find_spec(_package) is None:  # The parent of workers does without them, so they are not imported here.
        require_module(_package, "serve")
