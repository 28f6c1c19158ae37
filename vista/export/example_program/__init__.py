"""Programs that call an export without vista. `vista export` copies one alongside its graph."""
