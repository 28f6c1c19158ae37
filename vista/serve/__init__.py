"""The HTTP service of `vista serve`: a scorer per process behind FastAPI and uvicorn (extra `serve`)."""
