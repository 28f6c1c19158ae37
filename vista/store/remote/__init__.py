"""Stores on a Valkey or Redis server: the same records and generations as in a folder, under keys of one prefix."""
