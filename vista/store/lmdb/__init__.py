"""LMDB environments and their files: opened safely, locked, checked, and with the right permissions."""
