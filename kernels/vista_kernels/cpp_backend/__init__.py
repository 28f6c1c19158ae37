"""Scoring in C++: stage 2 and its heads for whole requests, in one call that releases the interpreter's lock; and
decoding of records.

`build.py` compiles the library, when vista is installed, if there is a C++ compiler. It has a plain C interface
(`scoring.h`, `records.h`) and no dependency, so it fits every version of torch and Python. `library.py` loads it, and
`records.py` decodes records with it. `lanes.cpp` has the computation, compiled once per width of vectors, of which
`library.cpp` chooses the widest that the processor has.
"""
